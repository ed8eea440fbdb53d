// variant: all
//
// Makes tensor maps that the host wrote to device memory known to the copy engine of every multiprocessor, which caches
// maps by address: what it has of these addresses from before is dropped (`fence.proxy.tensormap`, PTX ISA). For Hopper
// (sm_90a only). Once, when the maps are written, and not in each kernel that uses them, as the CUDA programming guide has
// it for maps that may change: there it costs 1 to 2 % of a prompt (docs/log.md).
//   maps   [n_maps]
// Grid: one block for each multiprocessor; block: one warp, with as much shared memory as only one of a multiprocessor
// can have.
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

extern "C" __global__ void acquire_maps(const TensorMap* maps, int n_maps) {
    if (!elect_one()) return;
    for (int i = 0; i < n_maps; ++i)
        asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(maps + i) : "memory");
}

#endif
