// variant: qwen2-57b EXPERTS=64 TOP_K=8 STRIDE=80 SHARED=1
// variant: qwen3-30b EXPERTS=128 TOP_K=8 STRIDE=128 NORM=1
// variant: mixtral EXPERTS=8 TOP_K=2 STRIDE=16 NORM=1
// variant: tiny EXPERTS=5 TOP_K=5 STRIDE=16 SHARED=1 NORM=1
//
// A mixture of experts but its products (moe_gemm.cu): which experts compute a token, the tokens of each expert in
// order, and the sum of a token's experts. Nothing depends on the order in which threads run.
//   moe_route    logits float32 [T, STRIDE] -> experts int32 [T, TOP_K], weights float32 [T, TOP_K], and with SHARED
//                share float32 [T], the sigmoid of logit EXPERTS. As `Moe::route` on the host: softmax over all EXPERTS,
//                the best TOP_K, equal ones by the lower index, with NORM scaled to a sum of 1. A token without a cache
//                slot is padding: its experts are EXPERTS, which is none.
//   moe_group    experts -> routes int32 [T * TOP_K]: the indices of `experts` ordered by expert, then by index;
//                places int32 [T * TOP_K]: where in `routes` each index is; tiles int4 [*]: (expert, first, end) of
//                `routes`, for each `tile_tokens` of an expert's; n_tiles
//   moe_combine  x float32 [T, hidden] += the sum over a token's experts of out bf16 [T * TOP_K, hidden], in order;
//                act bf16 [T, width] *= share, if act is not null
// Grids: ceil(T / 4) blocks of 128; EXPERTS blocks of GROUP_THREADS; T blocks of 256. hidden and width: multiples of 8.
#include "common.cuh"

#ifndef NORM
#define NORM 0
#endif
#ifndef SHARED
#define SHARED 0
#endif
constexpr int GROUP_THREADS = 512;
constexpr int PER_LANE = (EXPERTS + 31) / 32;
constexpr int NO_EXPERT = 0x7fffffff;
static_assert(TOP_K <= 32 && TOP_K <= EXPERTS && PER_LANE <= 32 && STRIDE >= EXPERTS + SHARED, "see the header");

extern "C" __global__ void __launch_bounds__(128)
moe_route(const float* logits, const int* slots, int* experts, float* weights, float* share, int n_tokens) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int lane = threadIdx.x % 32, token = blockIdx.x * 4 + threadIdx.x / 32;
    if (token >= n_tokens) return;
    const float* row = logits + (long long)token * STRIDE;
    float value[PER_LANE], max = -INF;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int e = i * 32 + lane;
        value[i] = e < EXPERTS ? row[e] : -INF;
        if (!(value[i] > -INF)) value[i] = -INF;  // not a number, in padding
        max = fmaxf(max, value[i]);
    }
    max = warp_max(max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) sum += __expf(value[i] - max);
    sum = warp_sum(sum);

    unsigned used = 0;  // bit i: this lane's expert i is chosen
    float total = 0.0f, my_weight = 0.0f;
    int my_expert = 0;
    for (int j = 0; j < TOP_K; ++j) {
        float best = -INF;
        int expert = NO_EXPERT;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int e = i * 32 + lane;
            const bool better = value[i] > best || (value[i] == best && e < expert);
            if (e < EXPERTS && !(used >> i & 1) && better) best = value[i], expert = e;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const float other = __shfl_xor_sync(FULL_WARP, best, offset);
            const int other_expert = __shfl_xor_sync(FULL_WARP, expert, offset);
            if (other > best || (other == best && other_expert < expert)) best = other, expert = other_expert;
        }
        if (expert % 32 == lane) used |= 1u << (expert / 32);
        const float weight = __expf(best - max) / sum;
        total += weight;
        if (lane == j) my_weight = weight, my_expert = expert;
    }
    if (lane < TOP_K) {
        experts[token * TOP_K + lane] = slots[token] >= 0 ? my_expert : EXPERTS;
        weights[token * TOP_K + lane] = NORM ? my_weight / total : my_weight;
    }
    if (SHARED && lane == 0) share[token] = 1.0f / (1.0f + __expf(-row[EXPERTS]));
}

__device__ __forceinline__ int warp_sum_int(int v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(FULL_WARP, v, offset);
    return v;
}

// A block orders one expert's routes; each counts all of them.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS)
moe_group(const int* experts, int* routes, int* places, int4* tiles, int* n_tiles, int n_routes, int tile_tokens) {
    PDL_TRIGGER();
    PDL_WAIT();
    __shared__ int counts[EXPERTS];
    __shared__ int first_route, first_tile;
    __shared__ int warp_counts[GROUP_THREADS / 32];
    const int mine = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int e = threadIdx.x; e < EXPERTS; e += GROUP_THREADS) counts[e] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n_routes; i += GROUP_THREADS) {
        const int e = experts[i];
        if (e < EXPERTS) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
    if (warp == 0) {
        int before = 0, tiles_before = 0;
        for (int e = lane; e < mine; e += 32) {
            before += counts[e];
            tiles_before += (counts[e] + tile_tokens - 1) / tile_tokens;
        }
        before = warp_sum_int(before), tiles_before = warp_sum_int(tiles_before);
        if (lane == 0) first_route = before, first_tile = tiles_before;
    }
    __syncthreads();
    const int end = first_route + counts[mine];
    const int my_tiles = (counts[mine] + tile_tokens - 1) / tile_tokens;
    for (int t = threadIdx.x; t < my_tiles; t += GROUP_THREADS)
        tiles[first_tile + t] = make_int4(mine, first_route + t * tile_tokens, end, 0);
    if (mine == EXPERTS - 1 && threadIdx.x == 0) *n_tiles = first_tile + my_tiles;
    if (my_tiles == 0) return;

    int next = first_route;  // place of the next route
    for (int base = 0; base < n_routes; base += GROUP_THREADS) {
        const int i = base + threadIdx.x;
        const bool is_mine = i < n_routes && experts[i] == mine;
        const unsigned matches = __ballot_sync(FULL_WARP, is_mine);
        if (lane == 0) warp_counts[warp] = __popc(matches);
        __syncthreads();
        int before = 0, all = 0;
#pragma unroll
        for (int w = 0; w < GROUP_THREADS / 32; ++w) {
            if (w < warp) before += warp_counts[w];
            all += warp_counts[w];
        }
        if (is_mine) {
            const int place = next + before + __popc(matches & ((1u << lane) - 1));
            routes[place] = i;
            places[i] = place;
        }
        next += all;
        __syncthreads();  // the counts are read
    }
}

extern "C" __global__ void __launch_bounds__(256)
moe_combine(const bf16* out, const int* places, const int* slots, float* x, int hidden, bf16* act, const float* share,
            int width) {
    PDL_TRIGGER();
    PDL_WAIT();
    const long long token = blockIdx.x;
    if (slots[token] < 0) return;
    for (int i = threadIdx.x * 8; i < hidden; i += 256 * 8) {
        float sum[8];
        load_f32x8(x + token * hidden + i, sum);
#pragma unroll
        for (int j = 0; j < TOP_K; ++j) {
            float v[8];
            unpack(load_bf16x8(out + (long long)places[token * TOP_K + j] * hidden + i), v);
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[c] += v[c];
        }
        store_f32x8(x + token * hidden + i, sum);
    }
    if (!act) return;
    const float scale = share[token];
    for (int i = threadIdx.x * 8; i < width; i += 256 * 8) {
        float v[8];
        unpack(load_bf16x8(act + token * width + i), v);
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] *= scale;
        store_bf16x8(act + token * width + i, pack(v));
    }
}
