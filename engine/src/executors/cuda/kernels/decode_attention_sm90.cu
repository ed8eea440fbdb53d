// variant: llama_3_1_8b HEAD_DIM=128 GROUP=4
// variant: qwen2_0_5b HEAD_DIM=64 GROUP=7
// variant: smollm2_135m HEAD_DIM=64 GROUP=3
// variant: head_dim_96 HEAD_DIM=96 GROUP=12
//
// Paged attention of one new token per sequence over its context, long ones on Hopper (sm_90a only): the same as
// decode_attention_rope of decode_attention.cu, with one block a multiprocessor, whose warps take their pages through
// rings of shared memory that the copy engine fills, the first of them before the kernel ahead has ended.
//
//   qkv, qkv_bias, cos_sin, block_tables, context_lens, cache, out, scale, window: see decode_attention.cu
//
// A unit of work is one page of one tile of query heads (up to 8 that share a kv head; n_tiles = n_kv * HEAD_TILES) of
// one sequence. Units are numbered by (sequence, tile, page), so those of a row (sequence, tile) follow each other:
//   unit_starts   int32 [n_seqs + 1]     first unit of each sequence, and the end
//   block_starts  int32 [gridDim.x + 1]  first unit of each block, and the end
// The host decides where blocks begin (attention_work.rs). A row that several blocks share is combined by the last of them:
//   partial_out      float32 [gridDim.x, 2, HEADS, HEAD_DIM]  a block's part of the row that it begins with (0), of the
//   partial_max_sum  float32 [gridDim.x, 2, HEADS, 2]         row that it ends with (1)
//   counters         uint32 [gridDim.x]  by the first block of a row; zero before the first launch; left zero
// Parts are added in the blocks' order, so results do not depend on timing.
//
// Grid: at most one block a multiprocessor. Block: THREADS. Dynamic shared memory:
// RING_BYTES + sizeof(State) + 4 * (2 * n_seqs + gridDim.x + 2).
//
// Dependent launch: as in decode_attention.cu, pages, tables and lengths are read before PDL_WAIT.

#include "decode_page.cuh"
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#ifndef WARPS
#define WARPS 12
#endif
constexpr int THREADS = 32 * WARPS;
#ifndef STAGES
#define STAGES 2  // pages of a warp's ring
#endif
#ifndef ROWS
#define ROWS 8  // rows whose queries are rotated at a time
#endif
constexpr int RING_BYTES = WARPS * STAGES * KV_BLOCK;
constexpr int PARTIAL_VECS = HEADS * HEAD_DIM / 4;
static_assert(ROWS <= WARPS, "each warp stores the new token of one row");

struct State {
    u64 full[WARPS * STAGES];
    bf16 q[ROWS][HEADS][HEAD_DIM + 8];
    NewToken tokens[ROWS];
    float out[WARPS][HEADS][HEAD_DIM + 4];
    float2 max_sum[WARPS][8];
    int is_last;
};

struct Inputs {
    const bf16 *qkv, *qkv_bias;
    const float* cos_sin;
    const int* block_tables;
    unsigned char* cache;
    bf16* out;
    float4* partial_out;
    float2* partial_max_sum;
    u32* counters;
    int n_kv, block_table_stride, window;
};

// A page of a kv head in shared memory.
struct SharedBlock {
    const unsigned char* block;

    __device__ __forceinline__ uint4 load_16(int at) const { return *(const uint4*)(block + at); }
    __device__ __forceinline__ uint2 load_8(int at) const { return *(const uint2*)(block + at); }
    __device__ __forceinline__ u32 load_4(int at) const { return *(const u32*)(block + at); }
};

// The work of all blocks, and this block's part of it: units from `first` to before `end`.
struct Work {
    const int *unit_starts, *block_starts, *context_lens;  // in shared memory
    int n_seqs, n_tiles;
    int first, end;

    // The last of n sorted numbers that is at most x. They begin with one that is.
    static __device__ __forceinline__ int last_at_most(const int* starts, int n, int x) {
        int low = 0;
        while (n > 1) {
            const int half = n / 2;
            if (starts[low + half] <= x) low += half;
            n -= half;
        }
        return low;
    }
    __device__ __forceinline__ int seq_of(int unit) const { return last_at_most(unit_starts, n_seqs, unit); }
    __device__ __forceinline__ int block_of(int unit) const { return last_at_most(block_starts, gridDim.x, unit); }
    __device__ __forceinline__ int pages_of(int seq) const { return (unit_starts[seq + 1] - unit_starts[seq]) / n_tiles; }
};

// One row: a tile of query heads of one sequence.
struct Row {
    int seq, tile, n_pages, first_unit;

    __device__ __forceinline__ Row(const Work& work, int unit) {
        seq = work.seq_of(unit);
        n_pages = work.pages_of(seq);
        tile = (unit - work.unit_starts[seq]) / n_pages;
        first_unit = work.unit_starts[seq] + tile * n_pages;
    }
    // On to the row after this one, which there must be.
    __device__ __forceinline__ void advance(const Work& work) {
        first_unit += n_pages;
        if (++tile < work.n_tiles) return;
        tile = 0;
        n_pages = work.pages_of(++seq);
    }
    __device__ __forceinline__ int end_unit() const { return first_unit + n_pages; }
    __device__ __forceinline__ int kv_head() const { return tile / HEAD_TILES; }
    __device__ __forceinline__ int first_head() const { return kv_head() * GROUP + tile % HEAD_TILES * 8; }
    __device__ __forceinline__ int n_heads() const { return min(HEADS, GROUP - tile % HEAD_TILES * 8); }
};

DEVICE int first_seen(int context_len, int window) {
    return window > 0 && context_len > window ? context_len - window : 0;
}

// A warp's way through its units, first + warp, first + warp + WARPS, ...: their pages are asked for STAGES ahead.
struct Loader {
    const Inputs& in;
    const Work& work;
    unsigned ring, full;  // of this warp
    int first_unit;
    unsigned n_units;
    int queued;  // numbers of the blocks of 32 units, one a lane

    __device__ __forceinline__ void refill(int i) {
        const int unit = first_unit + (i + threadIdx.x % 32) * WARPS;
        if (unit >= work.end) return;
        const Row row(work, unit);
        const int page = first_seen(work.context_lens[row.seq], in.window) / PAGE + unit - row.first_unit;
        const int number = in.block_tables[(size_t)row.seq * in.block_table_stride + page];
        queued = number * in.n_kv + row.kv_head();
    }
    // Asks for the page of the i-th unit; for i = 0, 1, 2, ... in turn, by the whole warp.
    __device__ __forceinline__ void load(unsigned i) {
        if (i >= n_units) return;
        if (i % 32 == 0) refill(i);
        const int block = __shfl_sync(FULL_WARP, queued, i % 32);
        if (elect_one()) {
            const unsigned bar = full + 8 * (i % STAGES);
            mbarrier_expect(bar, KV_BLOCK);
            load_bytes(ring + i % STAGES * KV_BLOCK, in.cache + (size_t)block * KV_BLOCK, KV_BLOCK, bar,
                       EVICT_FIRST);
        }
    }
};

// Rotates the queries of up to ROWS rows into shared memory and puts their new tokens beside them (whole block). Rows are
// numbered by (sequence, tile).
DEVICE void rotate_rows(State& state, const Inputs& in, const Work& work, int first_row, int n_rows) {
    const int row_len = in.n_kv * (GROUP + 2) * HEAD_DIM;
    for (int i = threadIdx.x; i < n_rows * (HEADS + 2) * PAIRS; i += THREADS) {
        const int r = i / ((HEADS + 2) * PAIRS), head = i / PAIRS % (HEADS + 2), d = i % PAIRS * 2;
        const int seq = (first_row + r) / work.n_tiles, tile = (first_row + r) % work.n_tiles;
        const int kv_head = tile / HEAD_TILES, tile_head = tile % HEAD_TILES * 8 + head;
        const bool is_q = head < HEADS, is_v = head > HEADS, exists = d < HEAD_DIM / 2;
        if (is_q && (!exists || tile_head >= GROUP)) continue;
        const int column = (is_q ? kv_head * GROUP + tile_head : in.n_kv * (GROUP + is_v) + kv_head) * HEAD_DIM;
        const float* cos_sin = is_v ? nullptr : in.cos_sin + (size_t)(work.context_lens[seq] - 1) * HEAD_DIM;
        uint2 pairs = {0, 0};
        if (exists) pairs = rotated_pairs(in.qkv + (size_t)seq * row_len, in.qkv_bias, cos_sin, column, d);
        if (is_q) store_pairs(state.q[r][head], pairs, d);
        else pack_row(is_v ? state.tokens[r].v : state.tokens[r].k, pairs, d);
    }
}

// Writes the new token of row `r` of those rotated to its page (one warp).
DEVICE void store_new_token(const State& state, const Inputs& in, const Row& row, int r, int position) {
    const int page = in.block_tables[(size_t)row.seq * in.block_table_stride + position / PAGE];
    unsigned char* block = in.cache + ((size_t)page * in.n_kv + row.kv_head()) * KV_BLOCK;
    store_token(block, state.tokens[r], position % PAGE, threadIdx.x % 32, 32);
}

DEVICE void store_out(const Inputs& in, const Row& row, int i, float4 acc, float sum) {
    const int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
    const float inv = UNBIAS / sum;
    const uint2 packed = make_uint2(pack_bf16(acc.x * inv, acc.y * inv), pack_bf16(acc.z * inv, acc.w * inv));
    *(uint2*)(in.out + ((size_t)row.seq * in.n_kv * GROUP + row.first_head() + head) * HEAD_DIM + d) = packed;
}

// Combines the parts that blocks `from` to before `from + n_parts` left of a row (whole block).
DEVICE void combine_parts(State& state, const Inputs& in, const Row& row, int from, int n_parts, float2* max_sums) {
    const auto part = [&](int j) { return 2 * (from + j) + (j == 0 ? 1 : 0); };
    for (int i = threadIdx.x; i < n_parts * HEADS; i += THREADS)
        max_sums[i] = __ldcg(&in.partial_max_sum[part(i / HEADS) * HEADS + i % HEADS]);
    __syncthreads();
    for (int i = threadIdx.x; i < row.n_heads() * (HEAD_DIM / 4); i += THREADS) {
        const int head = i / (HEAD_DIM / 4);
        float m = -INF, sum = 0.f;
        for (int j = 0; j < n_parts; ++j) m = fmaxf(m, max_sums[j * HEADS + head].x);
        float4 acc = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int j = 0; j < n_parts; ++j)
            add_part(acc, sum, __ldcg(&in.partial_out[(size_t)part(j) * PARTIAL_VECS + i]), max_sums[j * HEADS + head], m);
        store_out(in, row, i, acc, sum);
    }
}

// Merges what the warps have left of a row (whole block).
DEVICE void finish_row(State& state, const Inputs& in, const Work& work, const Row& row) {
    const int from = max(work.first, row.first_unit), to = min(work.end, row.end_unit());
    const int n_warps = min(WARPS, to - from), first_warp = (from - work.first) % WARPS;
    const bool is_whole = from == row.first_unit && to == row.end_unit();
    const int slot = 2 * blockIdx.x + (from == row.first_unit ? 1 : 0);
    for (int i = threadIdx.x; i < row.n_heads() * (HEAD_DIM / 4); i += THREADS) {
        const int head = i / (HEAD_DIM / 4), d = i % (HEAD_DIM / 4) * 4;
        float m = -INF, sum = 0.f;
        for (int j = 0; j < n_warps; ++j) m = fmaxf(m, state.max_sum[(first_warp + j) % WARPS][head].x);
        float4 acc = {0.f, 0.f, 0.f, 0.f};
        for (int j = 0; j < n_warps; ++j) {
            const int w = (first_warp + j) % WARPS;
            add_part(acc, sum, *(const float4*)&state.out[w][head][d], state.max_sum[w][head], m);
        }
        if (is_whole) {
            store_out(in, row, i, acc, sum);
        } else {
            __stcg(&in.partial_out[(size_t)slot * PARTIAL_VECS + i], acc);
            if (d == 0) __stcg(&in.partial_max_sum[slot * HEADS + head], make_float2(m, sum));
        }
    }
    if (is_whole) return;
    const int first_block = work.block_of(row.first_unit);
    const int n_parts = work.block_of(row.end_unit() - 1) - first_block + 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) state.is_last = atomicInc(&in.counters[first_block], n_parts - 1) == n_parts - 1;
    __syncthreads();
    if (!state.is_last) return;
    __threadfence();
    combine_parts(state, in, row, first_block, n_parts, (float2*)state.out);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_attention_sm90(const bf16* qkv, const bf16* qkv_bias, const float* cos_sin, const int* block_tables,
                      const int* context_lens, unsigned char* cache, bf16* out, float* partial_out,
                      float2* partial_max_sum, u32* counters, const int* unit_starts, const int* block_starts, int n_seqs,
                      int n_kv, int block_table_stride, int window, float scale) {
    extern __shared__ __align__(128) unsigned char smem_raw[];
    unsigned char* const ring = smem_raw;
    State& state = *(State*)(ring + RING_BYTES);
    int* starts = (int*)(&state + 1);
    const Inputs in = {qkv, qkv_bias, cos_sin, block_tables, cache, out, (float4*)partial_out,
                       partial_max_sum, counters, n_kv, block_table_stride, window};
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0);
    PDL_TRIGGER();

    int *const blocks = starts + n_seqs + 1, *const lens = blocks + gridDim.x + 1;
    for (int i = threadIdx.x; i <= n_seqs; i += THREADS) starts[i] = unit_starts[i];
    for (int i = threadIdx.x; i <= gridDim.x; i += THREADS) blocks[i] = block_starts[i];
    for (int i = threadIdx.x; i < n_seqs; i += THREADS) lens[i] = context_lens[i];
    if (elect_one())
        for (int i = 0; i < STAGES; ++i) mbarrier_init((unsigned)__cvta_generic_to_shared(&state.full[warp * STAGES + i]), 1);
    mbarrier_init_fence();
    __syncthreads();
    const Work work = {starts, blocks, lens, n_seqs, n_kv * HEAD_TILES, blocks[blockIdx.x], blocks[blockIdx.x + 1]};
    // The grid does not end before the kernel ahead, for a block that has work waits for it.
    if (work.first >= work.end) return;

    const int first_unit = work.first + warp;
    const unsigned n_units = max(0, (work.end - first_unit + WARPS - 1) / WARPS);
    Loader loader = {in, work, (unsigned)__cvta_generic_to_shared(ring + warp * STAGES * KV_BLOCK),
                     (unsigned)__cvta_generic_to_shared(&state.full[warp * STAGES]), first_unit, n_units, 0};
#pragma unroll
    for (int i = 0; i < STAGES; ++i) loader.load(i);
    PDL_WAIT();

    const LaneAt at;
    const float scale_log2 = scale * LOG2_E;
    const Row last(work, work.end - 1);
    const int last_row = last.seq * work.n_tiles + last.tile;
    Row row(work, work.first);
    unsigned unit = 0;
    for (int row_index = row.seq * work.n_tiles + row.tile; row_index <= last_row; row_index += ROWS) {
        const int n_rows = min(ROWS, last_row - row_index + 1);
        rotate_rows(state, in, work, row_index, n_rows);
        __syncthreads();
        for (int r = 0; r < n_rows; ++r) {
            const int context_len = work.context_lens[row.seq];
            const int first_token = first_seen(context_len, window);
            const int2 seen = make_int2(first_token, context_len);
            const bool has_newest = row.end_unit() <= work.end;
            if (warp == r && has_newest && row.tile % HEAD_TILES == 0) store_new_token(state, in, row, r, context_len - 1);

            uint4 q[Q_VECS];
            load_query(q, lane_group() < row.n_heads() ? state.q[r][lane_group()] : nullptr);
            Softmax softmax;
            softmax.reset();
            const int end = min(work.end, row.end_unit());
            const unsigned before = unit;
            for (; first_unit + (int)unit * WARPS < end; ++unit) {
                const int page_index = first_token / PAGE + first_unit + (int)unit * WARPS - row.first_unit;
                const bool newest = first_unit + (int)unit * WARPS == row.end_unit() - 1;
                const unsigned stage = unit % STAGES;
                mbarrier_wait(loader.full + 8 * stage, unit / STAGES % 2);
                const SharedBlock block = {ring + (warp * STAGES + stage) * KV_BLOCK};
                Page page;
                load_k(page, block, at);
                load_v(page, block, at);
                // Orders this lane's reads before the copy engine's writes, which are another proxy's: the barrier of the
                // warp alone does not (PTX ISA, async proxy).
                fence_async_proxy();
                __syncwarp();
                loader.load(unit + STAGES);
                if (newest) {
                    insert_new_k(page, state.tokens[r], (context_len - 1) % PAGE);
                    insert_new_v(page, state.tokens[r], (context_len - 1) % PAGE);
                }
                u32 p[2];
                softmax_page(softmax, page, q, seen, page_index, scale_log2, p);
                accumulate_page(softmax, page, p);
            }
            if (unit > before) store_state(softmax, row.n_heads(), state.out[warp], state.max_sum[warp]);
            __syncthreads();
            finish_row(state, in, work, row);
            __syncthreads();  // what it merged lies where warps leave the next row
            if (row.end_unit() < work.end) row.advance(work);
        }
    }
}

#endif
