// variant: llama_3_1_8b HEAD_DIM=128 GROUP=4 WARPS=4
// variant: llama_3_1_8b_cluster HEAD_DIM=128 GROUP=4 WARPS=4 CLUSTER=8 min-arch=90
// variant: llama_3_1_8b_cluster_4 HEAD_DIM=128 GROUP=4 WARPS=4 CLUSTER=4 min-arch=90
// variant: qwen2_0_5b HEAD_DIM=64 GROUP=7 WARPS=4
// variant: smollm2_135m HEAD_DIM=64 GROUP=3 WARPS=4
// variant: head_dim_96 HEAD_DIM=96 GROUP=12 WARPS=4
//
// Paged attention of one new token per sequence over its context (flash decoding: the context is split among
// blocks, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; online softmax, arXiv:1805.02867).
//
//   qkv          bf16  [n_seqs, (n_q + 2 n_kv) * HEAD_DIM]   q heads, then k heads, then v heads
//   block_tables int32 [n_seqs, block_table_stride]           page numbers
//   context_lens int32 [n_seqs]    tokens in the context, the new one included; 0: padded row, nothing is written
//   cache        bytes [n_pages, n_kv, KV_BLOCK] (packed_kv.cuh)
//   out          bf16  [n_seqs, n_q * HEAD_DIM]
//   scale        softmax scale; window: the new token sees the last `window` tokens, itself included (0: all)
//
// decode_attention_rope rotates q and k itself (position = context_len - 1; cos_sin float32 [max_position, HEAD_DIM],
// cosines in the first half of a row, sines in the second), adds qkv_bias (bf16, or null) before that, uses the new
// token's k and v from shared memory, and writes them to the page that the block table names (one block a kv head does).
// decode_attention takes q rotated, and k and v of the new token already in their page.
//
// Grid (n_splits, n_kv * HEAD_TILES, n_seqs), block 32 * WARPS, static shared memory only. HEAD_TILES = ceil(GROUP / 8):
// a block serves up to 8 query heads of one kv head. n_splits is free and independent of the context lengths:
// of the n_pages pages of a context, min(n_splits, ceil(n_pages / min_pages)) splits take a share, page by page in
// turn; the others leave at once. The last split to finish combines the partial results:
//   partial_out  float32 [n_seqs, n_kv * HEAD_TILES, n_splits, HEADS, HEAD_DIM]   HEADS = min(GROUP, 8)
//   partial_max_sum float32 [n_seqs, n_kv * HEAD_TILES, n_splits, HEADS, 2]
//   counters     uint32 [n_seqs, n_kv * HEAD_TILES]   zero before the first launch; left zero
// With CLUSTER=n (sm_90 and later) the splits of a kv head are one thread block cluster (n_splits must be n) and
// combine through shared memory; the three buffers are unused and may be null.
//
// One warp works on one page at a time (decode_page.cuh). The loads of the next page are issued as soon as the registers
// of this one are read.
//
// Dependent launch: the pages' old tokens, block_tables and context_lens are read before PDL_WAIT. That is right because
// they were written by earlier graph launches or copies, never by a kernel of the same chain of dependent launches; only
// qkv (and, for decode_attention, the pages) comes from those, and is read after it.
#include "decode_page.cuh"

#ifndef CLUSTER
#define CLUSTER 0
#endif
#if CLUSTER
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_DIMS
#endif

#define THREADS (32 * WARPS)
#define MAX_SPLITS 128

// The part of one sequence and kv head that a block works on.
struct Share {
    int context_len, first_token, first_page, n_pages;
    int active;  // splits that have work
    int split;
};

struct SharedState {
    bf16 q[8][HEAD_DIM + 8];
    NewToken token;
    float out[WARPS][HEADS][HEAD_DIM + 4];
    float2 max_sum[WARPS][8];
    float4 block_out[CLUSTER ? HEADS * HEAD_DIM / 4 : 1];
    float2 block_max_sum[8];
    float2 splits[CLUSTER ? 1 : MAX_SPLITS * HEADS];
    bool last;
};

DEVICE Share block_share(int context_len, int window, int min_pages) {
    Share s;
    s.context_len = context_len;
    s.first_token = window > 0 && context_len > window ? context_len - window : 0;
    s.first_page = s.first_token / PAGE;
    s.n_pages = (context_len + PAGE - 1) / PAGE - s.first_page;
    s.active = min((int)gridDim.x, (s.n_pages + min_pages - 1) / min_pages);
    s.split = blockIdx.x;
    return s;
}

struct Inputs {
    const bf16 *qkv, *qkv_bias;
    const float* cos_sin;
    const int *block_tables, *context_lens;
    unsigned char* cache;
    bf16* out;
    float* partial_out;
    float2* partial_max_sum;
    u32* counters;
    int block_table_stride, window, min_pages;
    float scale;
};

DEVICE int n_kv_heads() { return gridDim.y / HEAD_TILES; }
DEVICE int kv_head() { return blockIdx.y / HEAD_TILES; }
DEVICE int first_head() { return kv_head() * GROUP + blockIdx.y % HEAD_TILES * 8; }
// Query heads of this block; fewer than HEADS in the last tile of a group that 8 does not divide.
DEVICE int n_heads() { return min(HEADS, GROUP - (int)(blockIdx.y % HEAD_TILES) * 8); }

// Rotates this block's q heads into shared memory and puts the new token beside them (whole block).
DEVICE void rotate_new_token(SharedState& shared, const Inputs& in, int context_len) {
    const bf16* row = in.qkv + (size_t)blockIdx.z * n_kv_heads() * (GROUP + 2) * HEAD_DIM;
    for (int i = threadIdx.x; i < (n_heads() + 2) * PAIRS; i += THREADS) {
        const int head = i / PAIRS, d = i % PAIRS * 2;
        const bool is_q = head < n_heads(), is_v = head > n_heads(), exists = d < HEAD_DIM / 2;
        const int column = (is_q ? first_head() + head : n_kv_heads() * (GROUP + is_v) + kv_head()) * HEAD_DIM;
        const float* cos_sin = is_v ? nullptr : in.cos_sin + (size_t)(context_len - 1) * HEAD_DIM;
        uint2 pairs = {0, 0};
        if (exists) pairs = rotated_pairs(row, in.qkv_bias, cos_sin, column, d);
        if (!is_q) pack_row(is_v ? shared.token.v : shared.token.k, pairs, d);
        else if (exists) store_pairs(shared.q[head], pairs, d);
    }
}

// The block of this kv head in page `page`.
DEVICE unsigned char* block_of(const Inputs& in, int page) {
    return in.cache + ((size_t)page * n_kv_heads() + kv_head()) * KV_BLOCK;
}

// Writes the new token to its page (whole block).
DEVICE void store_new_token(const SharedState& shared, const Inputs& in, int context_len) {
    const int page = in.block_tables[(size_t)blockIdx.z * in.block_table_stride + (context_len - 1) / PAGE];
    store_token(block_of(in, page), shared.token, (context_len - 1) % PAGE, threadIdx.x, THREADS);
}

// Merges the warps' states; returns element `i` (4 head dimensions of one head) relative to max_sum.x.
DEVICE float4 merge_warps(const SharedState& shared, int n_warps, int i, float2& max_sum) {
    int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    float m = shared.max_sum[0][head].x;
    for (int w = 1; w < n_warps; w++) m = fmaxf(m, shared.max_sum[w][head].x);
    float4 acc = {0.f, 0.f, 0.f, 0.f};
    float sum = 0.f;
    for (int w = 0; w < n_warps; w++)
        add_part(acc, sum, *(const float4*)&shared.out[w][head][d], shared.max_sum[w][head], m);
    max_sum = make_float2(m, sum);
    return acc;
}

DEVICE void store_out(const Inputs& in, int i, float4 acc, float sum) {
    int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    float inv = UNBIAS / sum;
    uint2 packed = make_uint2(pack_bf16(acc.x * inv, acc.y * inv), pack_bf16(acc.z * inv, acc.w * inv));
    *(uint2*)(in.out + ((size_t)blockIdx.z * n_kv_heads() * GROUP + first_head() + head) * HEAD_DIM + d) = packed;
}

#if CLUSTER
// Combines the splits of this cluster; each block writes its share of the output. Every thread must call it.
DEVICE void combine_cluster(SharedState& shared, const Inputs& in, const Share& share, int n_warps) {
    const int n = n_heads() * HEAD_DIM / 4;
    if (share.split < share.active) {
        for (int i = threadIdx.x; i < n; i += THREADS) {
            float2 max_sum;
            shared.block_out[i] = merge_warps(shared, n_warps, i, max_sum);
            if (i % (HEAD_DIM / 4) == 0) shared.block_max_sum[i / (HEAD_DIM / 4)] = max_sum;
        }
    }
    cluster_sync();
    for (int i = share.split * THREADS + threadIdx.x; i < n; i += CLUSTER * THREADS) {
        int head = i / (HEAD_DIM / 4);
        float2 max_sums[CLUSTER];
        float4 outs[CLUSTER];
        float m = -INF, sum = 0.f;
#pragma unroll
        for (int s = 0; s < CLUSTER; s++)
            if (s < share.active) {
                max_sums[s] = load_cluster_float2(&shared.block_max_sum[head], s);
                outs[s] = load_cluster_float4(&shared.block_out[i], s);
            }
#pragma unroll
        for (int s = 0; s < CLUSTER; s++)
            if (s < share.active) m = fmaxf(m, max_sums[s].x);
        float4 acc = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < CLUSTER; s++)
            if (s < share.active) add_part(acc, sum, outs[s], max_sums[s], m);
        store_out(in, i, acc, sum);
    }
    cluster_sync();  // a block's shared memory must live until all have read it
}
#else
// Combines the splits through global memory; the block that arrives last does it. Every thread must call it.
DEVICE void combine_splits(SharedState& shared, const Inputs& in, const Share& share, int n_warps) {
    const int n = n_heads() * HEAD_DIM / 4;
    const size_t pair = (size_t)blockIdx.z * gridDim.y + blockIdx.y;
    float4* outs = (float4*)in.partial_out + pair * gridDim.x * (HEADS * HEAD_DIM / 4);
    float2* max_sums = in.partial_max_sum + pair * gridDim.x * HEADS;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        float2 max_sum;
        float4 acc = merge_warps(shared, n_warps, i, max_sum);
        if (share.active == 1) {
            store_out(in, i, acc, max_sum.y);
        } else {
            __stcg(&outs[share.split * (HEADS * HEAD_DIM / 4) + i], acc);
            if (i % (HEAD_DIM / 4) == 0) __stcg(&max_sums[share.split * HEADS + i / (HEAD_DIM / 4)], max_sum);
        }
    }
    if (share.active == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.last = atomicInc(&in.counters[pair], share.active - 1) == share.active - 1;
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
    for (int i = threadIdx.x; i < share.active * HEADS; i += THREADS) shared.splits[i] = __ldcg(&max_sums[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += THREADS) {
        int head = i / (HEAD_DIM / 4);
        float m = -INF, sum = 0.f;
        for (int s = 0; s < share.active; s++) m = fmaxf(m, shared.splits[s * HEADS + head].x);
        float4 acc = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int s = 0; s < share.active; s++)
            add_part(acc, sum, __ldcg(&outs[s * (HEADS * HEAD_DIM / 4) + i]), shared.splits[s * HEADS + head], m);
        store_out(in, i, acc, sum);
    }
}
#endif

// This lane's query head: rotated in shared memory or as it is in `qkv`; null past the block's heads.
template <bool FUSED>
DEVICE const bf16* query_head(const SharedState& shared, const Inputs& in) {
    const int head = lane_group();
    if (head >= n_heads()) return nullptr;
    if (FUSED) return shared.q[head];
    return in.qkv + ((size_t)blockIdx.z * n_kv_heads() * (GROUP + 2) + first_head() + head) * HEAD_DIM;
}

// Page numbers of the pages that a warp will work on, 32 ahead, one a lane.
struct PageQueue {
    const int* table;
    int first, stride, end, queued;

    __device__ __forceinline__ int index(int i) const { return first + i * stride; }
    __device__ __forceinline__ void refill(int i) {
        int mine = index(i + threadIdx.x % 32);
        queued = mine < end ? table[mine] : 0;
    }
    // The i-th page. Called for i = 0, 1, 2, ... by the whole warp.
    __device__ __forceinline__ int page(int i) {
        if (i % 32 == 0) refill(i);
        return __shfl_sync(FULL_WARP, queued, i % 32);
    }
};

template <bool FUSED>
DEVICE void attend(const Inputs& in) {
    __shared__ __align__(16) SharedState shared;
    PDL_TRIGGER();
    if (!FUSED) PDL_WAIT();
    const int context_len = in.context_lens[blockIdx.z];
    const Share share = block_share(context_len, in.window, in.min_pages);
    if (context_len <= 0 || (!CLUSTER && share.split >= share.active)) {
        // The grid must not end before the kernel ahead has; for that one block a row is enough, and the others' places
        // are wanted by blocks with pages to load.
        if (FUSED && blockIdx.x == 0) PDL_WAIT();
        return;
    }
    const int warp = threadIdx.x / 32;
    const int n_block_pages = (share.n_pages - share.split + share.active - 1) / share.active;
    const int n_warps = share.split < share.active ? min(WARPS, n_block_pages) : 0;
    const int n_warp_pages = warp < n_warps ? (n_block_pages - warp + WARPS - 1) / WARPS : 0;

    PageQueue queue;
    queue.table = in.block_tables + (size_t)blockIdx.z * in.block_table_stride;
    queue.first = share.first_page + share.split + warp * share.active;
    queue.stride = share.active * WARPS;
    queue.end = share.first_page + share.n_pages;
    const LaneAt at;
    Page page;
    if (n_warp_pages > 0) {
        const GlobalBlock block = {block_of(in, queue.page(0))};
        load_k(page, block, at);
        load_v(page, block, at);
    }
    const bool owns_new_token = (share.n_pages - 1) % share.active == share.split;
    if (FUSED) {
        PDL_WAIT();
        rotate_new_token(shared, in, context_len);
        __syncthreads();
        if (owns_new_token && blockIdx.y % HEAD_TILES == 0) store_new_token(shared, in, context_len);
    }

    uint4 q[Q_VECS];
    load_query(q, query_head<FUSED>(shared, in));
    Softmax state;
    state.reset();
    const int2 seen = make_int2(share.first_token, context_len);
    const float scale_log2 = in.scale * LOG2_E;
    for (int i = 0; i < n_warp_pages; i++) {
        const int page_index = queue.index(i);
        const bool newest = page_index == queue.end - 1;
        u32 p[2];
        if (FUSED && newest) insert_new_k(page, shared.token, (context_len - 1) % PAGE);
        softmax_page(state, page, q, seen, page_index, scale_log2, p);
        const bool has_next = i + 1 < n_warp_pages;
        const GlobalBlock next = {has_next ? block_of(in, queue.page(i + 1)) : nullptr};
        if (has_next) load_k(page, next, at);
        if (FUSED && newest) insert_new_v(page, shared.token, (context_len - 1) % PAGE);
        accumulate_page(state, page, p);
        if (has_next) load_v(page, next, at);
    }

    if (n_warp_pages > 0) store_state(state, n_heads(), shared.out[warp], shared.max_sum[warp]);
    __syncthreads();
#if CLUSTER
    combine_cluster(shared, in, share, n_warps);
#else
    combine_splits(shared, in, share, n_warps);
#endif
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS)
        decode_attention_rope(const bf16* qkv, const bf16* qkv_bias, const float* cos_sin, const int* block_tables,
                          const int* context_lens, unsigned char* cache, bf16* out, float* partial_out,
                          float2* partial_max_sum, u32* counters, int block_table_stride, int window, int min_pages,
                          float scale) {
    attend<true>({qkv, qkv_bias, cos_sin, block_tables, context_lens, cache, out, partial_out, partial_max_sum,
                counters, block_table_stride, window, min_pages, scale});
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS)
        decode_attention(const bf16* qkv, const int* block_tables, const int* context_lens, unsigned char* cache,
                     bf16* out, float* partial_out, float2* partial_max_sum, u32* counters,
                     int block_table_stride, int window, int min_pages, float scale) {
    attend<false>({qkv, nullptr, nullptr, block_tables, context_lens, cache, out, partial_out,
                 partial_max_sum, counters, block_table_stride, window, min_pages, scale});
}
