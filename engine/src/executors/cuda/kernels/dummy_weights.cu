// variant: dummy_weights
//
// Random weights made in place: out[i] = bf16(bound * u), u uniform in [-1, 1), a pure function of (seed, i).
//   out bf16 [n], n a multiple of 8
// A hash of the counter: SplitMix64 (Steele, Lea and Flood 2014), four 16-bit numbers from each draw.
// Grid and block free: a thread makes 8 elements and strides over the rest.
#include "common.cuh"

__device__ __forceinline__ unsigned long long split_mix(unsigned long long counter) {
    unsigned long long z = counter * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

extern "C" __global__ void dummy_weights(bf16* out, unsigned long long n, unsigned long long seed, float bound) {
    const unsigned long long stride = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x; i < n / 8; i += stride) {
        float f[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned long long bits = split_mix(seed + 2 * i + half);
#pragma unroll
            for (int j = 0; j < 4; ++j, bits >>= 16) {
                f[half * 4 + j] = bound * ((int)(bits & 0xffff) - 32768 + 0.5f) * (1.0f / 32768.0f);
            }
        }
        store_bf16x8(out + i * 8, pack(f));
    }
}
