// Hopper's copy engine, barriers and warpgroup products (sm_90a), one function each. PTX ISA, mbarrier,
// cp.async.bulk.tensor and wgmma.
#pragma once
#include "attention.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What cuTensorMapEncodeTiled fills in (CUtensorMap of cuda.h, which NVRTC does not bring).
struct __align__(64) TensorMap {
    u64 opaque[16];
};

DEVICE void mbarrier_init(unsigned bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// Barriers that were just initialised become visible to the copy engine and to the cluster.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(unsigned bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// At the same barrier of the cluster's block `rank`. (With `.release.cluster` it would be a fence of the whole device.)
DEVICE void mbarrier_arrive_at(unsigned bar, unsigned rank) {
    unsigned address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(bar), "r"(rank));
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address) : "memory");
}
DEVICE void mbarrier_expect(unsigned bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void mbarrier_wait(unsigned bar, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra AGAIN;\n"
        "DONE:\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}
// True in one lane of a warp, all of whose lanes are here. Copies that `lane == 0` asks for stand in a loop over the lanes
// that might be there, 40 cycles each; of this one ptxas knows that it is alone.
DEVICE bool elect_one() {
    int elected;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.b32 %0, 1, 0, one;\n}" : "=r"(elected));
    return elected;
}
DEVICE void named_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }
DEVICE void named_arrive(int id, int n) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(n) : "memory"); }
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE void load_box(unsigned dst, const TensorMap* map, int column, int row, unsigned bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            dst),
        "l"(map), "r"(column), "r"(row), "r"(bar)
        : "memory");
}

// L2 cache policies of createpolicy.fractional: for what passes once (weights, pages), for what every block reads, and
// for everything else.
constexpr u64 EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000, EVICT_NORMAL = 0x1000000000000000;

// `n_bytes` in a row, with an L2 policy; addresses and size are multiples of 16.
DEVICE void load_bytes(unsigned dst, const void* src, int n_bytes, unsigned bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst),
        "l"(src), "r"(n_bytes), "r"(bar), "l"(policy)
        : "memory");
}

// A word with an L2 policy.
DEVICE void store_word(void* to, u32 word, u64 policy) {
    asm volatile("st.global.L2::cache_hint.b32 [%0], %1, %2;" ::"l"(to), "r"(word), "l"(policy) : "memory");
}

// wgmma descriptor of a 128-byte-swizzled tile: groups of eight rows 1024 bytes apart, slabs `slab_bytes` apart
// (read only for the transposed operand, whose columns run over slabs).
DEVICE u64 descriptor(unsigned addr, unsigned slab_bytes) {
    return (u64)((addr & 0x3ffff) >> 4) | (u64)(slab_bytes >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Lists of accumulators and of their operand numbers, for the inline assembly of wgmma.
#define ACC4(d, i) "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3])
#define ACC8(d, i) ACC4(d, i), ACC4(d, i + 4)
#define ACC16(d, i) ACC8(d, i), ACC8(d, i + 8)
#define ACC24(d) ACC16(d, 0), ACC8(d, 16)
#define ACC32(d) ACC16(d, 0), ACC16(d, 16)
#define ACC48(d) ACC32(d), ACC16(d, 32)
#define ACC64(d) ACC48(d), ACC16(d, 48)
#define ACC72(d) ACC64(d), ACC8(d, 64)
#define ACC80(d) ACC72(d), ACC8(d, 72)
#define ACC88(d) ACC80(d), ACC8(d, 80)
#define ACC96(d) ACC88(d), ACC8(d, 88)
#define ACC104(d) ACC96(d), ACC8(d, 96)
#define ACC112(d) ACC104(d), ACC8(d, 104)
#define ACC120(d) ACC112(d), ACC8(d, 112)
#define ACC128(d) ACC120(d), ACC8(d, 120)
#define REGS4 "%0, %1, %2, %3"
#define REGS8 REGS4 ", %4, %5, %6, %7"
#define REGS16 REGS8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGS24 REGS16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define REGS32 REGS24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define REGS40 REGS32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REGS48 REGS40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define REGS56 REGS48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define REGS64 REGS56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define REGS72 REGS64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define REGS80 REGS72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define REGS88 REGS80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define REGS96 REGS88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define REGS104 REGS96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define REGS112 REGS104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define REGS120 REGS112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define REGS128 REGS120 ", %120, %121, %122, %123, %124, %125, %126, %127"

#endif
