// Device code shared by Ember's CUDA kernels: dependent launch, 16-byte accesses, bf16 packing, reductions.
// Compiled by NVRTC and nvcc alike, for sm_80 and later: no host headers.
#pragma once
#include <cuda_bf16.h>

typedef __nv_bfloat16 bf16;

constexpr int PAGE = 16;                  // tokens in a page of the KV cache
constexpr unsigned FULL_WARP = 0xffffffffu;
#define INF __int_as_float(0x7f800000)    // NVRTC has no <math.h>; the intrinsic is not constexpr

// Programmatic dependent launch (PTX ISA, griddepcontrol). PDL_WAIT returns when every earlier kernel of the stream
// has finished and its writes are visible: it stands before the first access to a buffer that such a kernel writes.
// PDL_TRIGGER lets the next kernel's blocks start beside this one's. Without the launch attribute both do nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PDL_WAIT() asm volatile("griddepcontrol.wait;" ::: "memory")
#define PDL_TRIGGER() asm volatile("griddepcontrol.launch_dependents;" ::: "memory")
#else
#define PDL_WAIT() ((void)0)
#define PDL_TRIGGER() ((void)0)
#endif

// Eight bf16, four words of two: the unit of every 16-byte access.
typedef uint4 bf16x8;

// 16 bytes that are read once (weights): past L1, read-only path. Never for what an earlier kernel may still write.
__device__ __forceinline__ bf16x8 load_once(const void* p) {
    bf16x8 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// 16 bytes at a shared address.
__device__ __forceinline__ bf16x8 load_shared_16(unsigned address) {
    bf16x8 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}

__device__ __forceinline__ bf16x8 load_bf16x8(const bf16* p) { return *reinterpret_cast<const bf16x8*>(p); }
__device__ __forceinline__ void store_bf16x8(bf16* p, bf16x8 v) { *reinterpret_cast<bf16x8*>(p) = v; }

// A bf16 is the upper half of a float32: widening is a shift or a mask.
__device__ __forceinline__ float bf16_low(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
}

__device__ __forceinline__ void unpack(bf16x8 v, float (&f)[8]) {
    f[0] = bf16_low(v.x), f[1] = bf16_high(v.x), f[2] = bf16_low(v.y), f[3] = bf16_high(v.y);
    f[4] = bf16_low(v.z), f[5] = bf16_high(v.z), f[6] = bf16_low(v.w), f[7] = bf16_high(v.w);
}

__device__ __forceinline__ bf16x8 pack(const float (&f)[8]) {
    return make_uint4(pack_bf16(f[0], f[1]), pack_bf16(f[2], f[3]), pack_bf16(f[4], f[5]), pack_bf16(f[6], f[7]));
}

__device__ __forceinline__ void load_f32x8(const float* p, float (&f)[8]) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    f[0] = a.x, f[1] = a.y, f[2] = a.z, f[3] = a.w, f[4] = b.x, f[5] = b.y, f[6] = b.z, f[7] = b.w;
}

__device__ __forceinline__ void store_f32x8(float* p, const float (&f)[8]) {
    reinterpret_cast<float4*>(p)[0] = make_float4(f[0], f[1], f[2], f[3]);
    reinterpret_cast<float4*>(p)[1] = make_float4(f[4], f[5], f[6], f[7]);
}

// Sum over aligned groups of LANES lanes (a power of two); every lane gets its group's sum. The whole warp takes part.
template <int LANES = 32>
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL_WARP, v, offset);
    return v;
}

template <int LANES = 32>
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, offset));
    return v;
}

// Sum over a block of THREADS threads (a multiple of 32); every thread gets it. All threads take part.
template <int THREADS>
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float partial[THREADS / 32];
    v = warp_sum(v);
    __syncthreads();  // an earlier call's readers are done
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) total += partial[i];
    return total;
}

__device__ __forceinline__ float silu(float v) { return __fdividef(v, 1.0f + __expf(-v)); }
