// variant: argmax
//
// Greedy sampling: tokens[r] = the best token of row r, the lowest id among equals; kept as its slot's last token.
//   logits      float32 [grid, vocab], vocab even
//   slots       int32 [grid]    -1: a padded row, nothing is written
//   tokens      int32 [grid]
//   last_tokens int32 [slots]
// Grid: one block per row; block BLOCK. NaN is never the best; a row of nothing but NaN gives token 0.
#include "common.cuh"

constexpr int BLOCK = 1024;

struct Best {
    float value;
    int id;
};

__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const Best other = {__shfl_xor_sync(FULL_WARP, best.value, offset), __shfl_xor_sync(FULL_WARP, best.id, offset)};
        best = better(best, other);
    }
    return best;
}

extern "C" __global__ void __launch_bounds__(BLOCK)
argmax(const float* logits, const int* slots, int* tokens, int* last_tokens, int vocab) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int slot = slots[blockIdx.x];
    if (slot < 0) return;
    const float2* row = reinterpret_cast<const float2*>(logits + (long long)blockIdx.x * vocab);
    Best best = {__int_as_float(0xff800000), 0x7fffffff};
#pragma unroll 8
    for (int i = threadIdx.x; i < vocab / 2; i += BLOCK) {
        const float2 v = row[i];
        best = better(best, {v.x, 2 * i});
        best = better(best, {v.y, 2 * i + 1});
    }
    __shared__ Best warps[BLOCK / 32];
    best = warp_best(best);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
    __syncthreads();
    if (threadIdx.x < 32) {
        best = warp_best(warps[threadIdx.x]);
        if (threadIdx.x == 0) {
            const int token = best.id < vocab ? best.id : 0;
            tokens[blockIdx.x] = token;
            last_tokens[slot] = token;
        }
    }
}
