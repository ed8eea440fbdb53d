// What the sampling kernels share: parameters of a row, order-preserving keys of logits, walks over a row, reductions of 64-bit keys.
#pragma once
#include "attention.cuh"

// Maps floats to integers of the same order as Rust's `total_cmp`.
DEVICE u32 ordered(float x) {
    u32 u = __float_as_uint(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Ranks a token: the greater logit first, the lower id among equals. Never 0.
DEVICE u64 rank_key(float logit, u32 id) { return (u64)ordered(logit) << 32 | (u32)~id; }
DEVICE u32 key_id(u64 key) { return ~(u32)key; }
DEVICE float key_logit(u64 key) {
    u32 o = (u32)(key >> 32);
    return __uint_as_float(o & 0x80000000u ? o & 0x7fffffffu : ~o);
}

// Calls `visit(logits, first_id, n)` on groups of up to 4 neighbours of a row, group `first`, `first + step`, ...
// Four loads are in flight at a time. Rows that are not 16-byte aligned are read word by word.
template <class Visit>
DEVICE void walk_row(const float* row, int vocab, int first, int step, Visit visit) {
    const int n_groups = (vocab + 3) / 4;
    const bool aligned = ((u64)row & 15) == 0;
    for (int group = first; group < n_groups; group += 4 * step) {
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int id = (group + i * step) * 4;
            if (aligned && id + 4 <= vocab) {
                x[i] = *(const float4*)(row + id);
            } else {
                x[i].x = id < vocab ? row[id] : 0.f;
                x[i].y = id + 1 < vocab ? row[id + 1] : 0.f;
                x[i].z = id + 2 < vocab ? row[id + 2] : 0.f;
                x[i].w = id + 3 < vocab ? row[id + 3] : 0.f;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int id = (group + i * step) * 4;
            const float values[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
            if (id < vocab) visit(values, id, min(4, vocab - id));
        }
    }
}

DEVICE u64 max_key(u64 a, u64 b) { return a > b ? a : b; }

// Greatest key of a block of up to 1024 threads (a multiple of 32), in every thread. All threads take part.
DEVICE u64 block_max_key(u64 key) {
    __shared__ u64 partial[32];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) key = max_key(key, __shfl_xor_sync(FULL_WARP, key, mask));
    __syncthreads();  // an earlier call's readers are done
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = key;
    __syncthreads();
    key = threadIdx.x % 32 < blockDim.x / 32 ? partial[threadIdx.x % 32] : 0;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) key = max_key(key, __shfl_xor_sync(FULL_WARP, key, mask));
    return key;
}

constexpr float GREEDY_BELOW = 1e-5f;

// How a row is sampled.
struct SampleRow {
    float temperature;  // below 1e-5: greedy
    float top_p;        // 1: off
    float min_p;        // 0: off
    int top_k;          // 0: off
    u64 seed;
    u32 n_output;       // index of the token in the output
    int slot;
};

// Whether it drops unlikely tokens.
DEVICE bool wants_threshold(const SampleRow& row, int vocab) {
    return row.slot >= 0 && row.temperature >= GREEDY_BELOW &&
           (row.top_p < 1.f || row.min_p > 0.f || (row.top_k > 0 && row.top_k < vocab));
}
