// variant: llama_3_1_8b HEAD_DIM=128 GROUP=4
// variant: qwen2_0_5b HEAD_DIM=64 GROUP=7
// variant: smollm2_135m HEAD_DIM=64 GROUP=3
// variant: head_dim_96 HEAD_DIM=96 GROUP=1
//
// prefill_attention.cu for Hopper (sm_90a only): same inputs, rows, tiles and result; wgmma, tensor
// memory access and warp specialisation in its place. See there for shapes and the packing of rows.
//
// Further parameters
//   k_map, v_map  tensor maps over keys and values seen as bf16 [n_kv * capacity, HEAD_DIM], box 64 columns x
//                 128 rows, SWIZZLE_128B, zero fill out of bounds
//   tiles         int2 [n_tiles] (sequence, first row), longest context first
//
// Grid: min(n_tiles * n_kv, multiprocessors) persistent blocks, which share the tiles out in snake order
// (0 1 2, 2 1 0, ...), so that with the longest first every block gets about the same work.
// Block: (N_CONSUMERS + 1) * 128 threads. Dynamic shared memory: 1024 + (N_CONSUMERS * 64 + 2 * STAGES * 128)
// * ROW_BYTES + 256, ROW_BYTES being 128 for HEAD_DIM 64 and 256 for 96 and 128.
//
// FlashAttention-3 (Shah et al., 2024): the producer warpgroup brings K and V tiles of 128 tokens (one
// warp) and q (the other three); each consumer warpgroup owns 64 rows, runs QK^T of the next tile while
// the tensor cores do PV of this one, and with PINGPONG takes turns at the tensor cores with its
// neighbour, so that one's softmax runs under the other's products.

#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#ifndef STAGES
#define STAGES 2
#endif
#ifndef N_CONSUMERS
#define N_CONSUMERS 2
#endif
#ifndef PINGPONG
#define PINGPONG 1
#endif

constexpr int TILE_M = N_CONSUMERS * 64;
constexpr int TILE_N = 128;
constexpr int SLABS = HEAD_DIM <= 64 ? 1 : 2;  // 64 columns each: the width of the 128-byte swizzle
constexpr int D_PADDED = SLABS * 64;           // columns from HEAD_DIM on are zeros
constexpr int CHUNKS = HEAD_DIM / 8;
constexpr int Q_SLAB_BYTES = TILE_M * 128;
constexpr int KV_SLAB_BYTES = TILE_N * 128;
constexpr int KV_TILE_BYTES = SLABS * KV_SLAB_BYTES;
constexpr int K_OFFSET = SLABS * Q_SLAB_BYTES;
constexpr int V_OFFSET = K_OFFSET + STAGES * KV_TILE_BYTES;
constexpr int BARRIER_OFFSET = V_OFFSET + STAGES * KV_TILE_BYTES;
constexpr int Q_LOADERS = 96;
// The registers a block may share out are those it was launched with, LAUNCH_REGS a thread, not those of the
// multiprocessor: one more asked for and the last setmaxnreg.inc waits for ever.
constexpr int LAUNCH_REGS = 65536 / ((N_CONSUMERS + 1) * 128) / 8 * 8;
constexpr int PRODUCER_REGS = N_CONSUMERS == 2 ? 40 : 32;
constexpr int CONSUMER_REGS = N_CONSUMERS == 2 ? 232 : 160;
static_assert(PRODUCER_REGS + N_CONSUMERS * CONSUMER_REGS <= (N_CONSUMERS + 1) * LAUNCH_REGS, "more than the pool");
#define NEG_INF __int_as_float(0xff800000)
static_assert(HEAD_DIM == 64 || HEAD_DIM == 96 || HEAD_DIM == 128, "HEAD_DIM must be 64, 96 or 128");
static_assert(N_CONSUMERS == 2 || N_CONSUMERS == 3, "N_CONSUMERS must be 2 or 3");

// Barriers, 8 bytes each.
constexpr int Q_FULL = 0, Q_EMPTY = 1, K_FULL = 2, K_EMPTY = K_FULL + STAGES, V_FULL = K_EMPTY + STAGES,
              V_EMPTY = V_FULL + STAGES;
// Named barriers (0 is __syncthreads): a warpgroup's turn at the tensor cores, and its own meeting point.
constexpr int TURN = 1, MEETING = TURN + N_CONSUMERS;

// s[64 x 128] (+)= q[64 x 16] k[128 x 16]^T, both from shared memory.
__device__ __forceinline__ void wgmma_qk(float (&s)[64], u64 q, u64 k, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGS64 "}, %64, %65, p, 1, 1, 0, 0;\n}"
        : ACC64(s)
        : "l"(q), "l"(k), "r"(accumulate));
}
// o[64 x 128] += p[64 x 16] v[16 x 128], p from registers.
__device__ __forceinline__ void wgmma_pv(float (&o)[64], const unsigned* p, u64 v) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGS64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
        : ACC64(o)
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
// o[64 x 64] += p[64 x 16] v[16 x 64].
__device__ __forceinline__ void wgmma_pv(float (&o)[32], const unsigned* p, u64 v) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGS32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
        : ACC32(o)
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}

// One block's share of the work and the ranges a tile needs.
struct Tile {
    int kv_head, seq, row, n_rows, q_begin, first_query_pos;  // row: of the sequence; pos of its row 0
    int kv_end, n_first, n_last;                              // tokens read, kv tiles read

    // False when tile number `round` of this block does not exist or is empty; `done` tells which.
    __device__ __forceinline__ bool read(int round, const int2* tiles, int n_tiles, int n_kv, const int* cu_seqlens_q,
                                         const int* context_lens, int window, bool& done) {
        const int lane = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        const int idx = round * gridDim.x + lane;
        done = round * (int)gridDim.x >= n_tiles * n_kv;
        if (idx >= n_tiles * n_kv) return false;
        const int2 tile = tiles[idx / n_kv];
        kv_head = idx % n_kv;
        seq = tile.x;
        row = tile.y;
        q_begin = cu_seqlens_q[seq];
        const int q_len = cu_seqlens_q[seq + 1] - q_begin;
        n_rows = q_len * GROUP;
        first_query_pos = context_lens[seq] - q_len;
        if (row >= n_rows || first_query_pos < 0) return false;
        kv_end = first_query_pos + (min(row + TILE_M, n_rows) - 1) / GROUP + 1;
        const int kv_begin = window > 0 ? max(0, first_query_pos + row / GROUP - window + 1) : 0;
        n_first = kv_begin / TILE_N;
        n_last = (kv_end - 1) / TILE_N;
        return true;
    }
};

// The rows of one consumer thread and their softmax state (rows lane / 4 and lane / 4 + 8 of its warp's 16).
struct Softmax {
    float top[2], sum[2], decay[2];

    // Masked scores to probabilities; `decay` is what the output so far is to be scaled by.
    __device__ __forceinline__ void step(float (&s)[64], float scale_log2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float m = top[h];
#pragma unroll
            for (int j = 0; j < 16; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
            m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 1));
            m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, 2));
            // A row that has seen no key yet keeps -inf; 0 in its place keeps exp2 free of NaN.
            const float m_scaled = m == NEG_INF ? 0.f : m * scale_log2;
            decay[h] = exp2_approx(top[h] * scale_log2 - m_scaled);
            top[h] = m;
            float a = 0.f, b = 0.f;
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                s[4 * j + 2 * h] = exp2_approx(s[4 * j + 2 * h] * scale_log2 - m_scaled);
                s[4 * j + 2 * h + 1] = exp2_approx(s[4 * j + 2 * h + 1] * scale_log2 - m_scaled);
                a += s[4 * j + 2 * h];
                b += s[4 * j + 2 * h + 1];
            }
            sum[h] = sum[h] * decay[h] + (a + b);
        }
    }
};

// Scores of keys that the rows at positions pos[0], pos[1] may not see become -inf.
__device__ __forceinline__ void mask(float (&s)[64], int column, const int (&pos)[2], int window) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int newest = pos[h] - column, oldest = window > 0 ? newest - window : -TILE_N;
#pragma unroll
        for (int j = 0; j < 16; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (8 * j + e > newest || 8 * j + e <= oldest) s[4 * j + 2 * h + e] = NEG_INF;
    }
}

// Probabilities as the A operand of PV: the accumulator layout of two 8-column blocks is that of one k step.
__device__ __forceinline__ void to_bf16(unsigned (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void issue_qk(float (&s)[64], unsigned q, unsigned k) {
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step)
        wgmma_qk(s, descriptor(q + step / 4 * Q_SLAB_BYTES + step % 4 * 32, 16),
                 descriptor(k + step / 4 * KV_SLAB_BYTES + step % 4 * 32, 16), step > 0);
    wgmma_commit();
}
__device__ __forceinline__ void issue_pv(float (&o)[D_PADDED / 2], const unsigned (&p)[32], unsigned v) {
#pragma unroll
    for (int step = 0; step < TILE_N / 16; ++step)
        wgmma_pv(o, p + 4 * step, descriptor(v + step * 16 * 128, KV_SLAB_BYTES));
    wgmma_commit();
}

// Writes zeros over the tokens of a V tile from `n_valid` on: their probability is 0, but what lies there may be
// NaN. Called by all of a warpgroup.
__device__ __forceinline__ void clear_tail(unsigned v, int n_valid, int thread, int warpgroup) {
    for (int i = n_valid * 8 + thread; i < TILE_N * 8; i += 128)
#pragma unroll
        for (int slab = 0; slab < SLABS; ++slab)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v + slab * KV_SLAB_BYTES + i * 16), "r"(0)
                         : "memory");
    fence_async_proxy();
    named_sync(MEETING + warpgroup, 128);
}

extern "C" __global__ void __launch_bounds__((N_CONSUMERS + 1) * 128, 1)
prefill_attention_sm90(const TensorMap* k_map, const TensorMap* v_map,
                       const bf16* __restrict__ qkv, bf16* __restrict__ out,
                       const int* __restrict__ cu_seqlens_q, const int* __restrict__ context_lens,
                       const int* __restrict__ context_starts, int capacity, const int2* __restrict__ tiles,
                       int n_tiles, int n_kv, float scale, int window) {
    extern __shared__ unsigned char smem_raw[];
    const unsigned smem = ((unsigned)__cvta_generic_to_shared(smem_raw) + 1023) & ~1023u;
    const unsigned bars = smem + BARRIER_OFFSET;
    const int warpgroup = __shfl_sync(FULL_WARP, threadIdx.x / 128, 0);
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32 % 4, 0);
    const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
#define BAR(i) (bars + 8 * (i))

    if (threadIdx.x == 0) {
        mbarrier_init(BAR(Q_FULL), Q_LOADERS);
        mbarrier_init(BAR(Q_EMPTY), N_CONSUMERS * 4);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(BAR(K_FULL + i), 1);
            mbarrier_init(BAR(V_FULL + i), 1);
            mbarrier_init(BAR(K_EMPTY + i), N_CONSUMERS * 4);
            mbarrier_init(BAR(V_EMPTY + i), N_CONSUMERS * 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    PDL_TRIGGER();
    PDL_WAIT();

    Tile tile;
    bool done = false;
    if (warpgroup == N_CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGS));
        if (warp == 0) {
            // One thread alone: others that waited for a stage a little later could find it filled and emptied again, and
            // wait for ever.
            int stage = 0, phase = 0;
            const bool alone = elect_one();
            for (int round = 0; alone && !done; ++round) {
                if (!tile.read(round, tiles, n_tiles, n_kv, cu_seqlens_q, context_lens, window, done)) continue;
                const int first_row = tile.kv_head * capacity + context_starts[tile.seq];
                for (int n = tile.n_last; n >= tile.n_first; --n) {
#pragma unroll
                    for (int which = 0; which < 2; ++which) {
                        const unsigned full = BAR((which ? V_FULL : K_FULL) + stage);
                        mbarrier_wait(BAR((which ? V_EMPTY : K_EMPTY) + stage), phase ^ 1);
                        mbarrier_expect(full, KV_TILE_BYTES);
                        const unsigned dst = smem + (which ? V_OFFSET : K_OFFSET) + stage * KV_TILE_BYTES;
#pragma unroll
                        for (int slab = 0; slab < SLABS; ++slab)
                            load_box(dst + slab * KV_SLAB_BYTES, which ? v_map : k_map, slab * 64,
                                     first_row + n * TILE_N, full);
                    }
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        } else {
            int phase = 0;
            const long long stride = (long long)(n_kv * GROUP + 2 * n_kv) * HEAD_DIM;
            for (int round = 0; !done; ++round) {
                if (!tile.read(round, tiles, n_tiles, n_kv, cu_seqlens_q, context_lens, window, done)) continue;
                mbarrier_wait(BAR(Q_EMPTY), phase ^ 1);
#pragma unroll 4
                for (int i = thread - 32; i < TILE_M * CHUNKS; i += Q_LOADERS) {
                    const int row = i / CHUNKS, chunk = i % CHUNKS;
                    const int r = min(tile.row + row, tile.n_rows - 1);
                    const bf16* src = qkv + (tile.q_begin + r / GROUP) * stride +
                                           (tile.kv_head * GROUP + r % GROUP) * HEAD_DIM + chunk * 8;
                    const unsigned dst =
                        smem + chunk / 8 * Q_SLAB_BYTES + row * 128 + ((chunk % 8 ^ (row & 7)) << 4);
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
                }
                asm volatile("cp.async.wait_all;" ::: "memory");
                fence_async_proxy();
                mbarrier_arrive(BAR(Q_FULL));
                phase ^= 1;
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGS));
        const float scale_log2 = scale * 1.4426950408889634f;
        const unsigned q = smem + warpgroup * 64 * 128;
        const int next_turn = TURN + (warpgroup + 1) % N_CONSUMERS;
        int stage = 0, phase = 0, q_phase = 0;
        // The turn starts with warpgroup 0: its predecessor in the ring hands it over.
        if (PINGPONG && warpgroup == N_CONSUMERS - 1) named_arrive(TURN, 256);

        for (int round = 0; !done; ++round) {
            if (!tile.read(round, tiles, n_tiles, n_kv, cu_seqlens_q, context_lens, window, done)) continue;
            const int row0 = tile.row + warpgroup * 64;
            int pos[2];
#pragma unroll
            for (int h = 0; h < 2; ++h)
                pos[h] = tile.first_query_pos + min(row0 + warp * 16 + lane / 4 + 8 * h, tile.n_rows - 1) / GROUP;
            const int first_pos = tile.first_query_pos + min(row0, tile.n_rows - 1) / GROUP;
            const int last_pos = tile.first_query_pos + min(row0 + 63, tile.n_rows - 1) / GROUP;
            const int column0 = lane % 4 * 2;

            float o[D_PADDED / 2];
#pragma unroll
            for (int i = 0; i < D_PADDED / 2; ++i) o[i] = 0.f;
            Softmax softmax = {{NEG_INF, NEG_INF}, {0.f, 0.f}, {0.f, 0.f}};
            unsigned p[32];

            mbarrier_wait(BAR(Q_FULL), q_phase);
            q_phase ^= 1;
            float s[64];
            mbarrier_wait(BAR(K_FULL + stage), phase);
            wgmma_fence();
            issue_qk(s, q, smem + K_OFFSET + stage * KV_TILE_BYTES);
            wgmma_wait<0>();
            if (lane == 0) mbarrier_arrive(BAR(K_EMPTY + stage));
            mask(s, tile.n_last * TILE_N + column0, pos, window);
            softmax.step(s, scale_log2);
            const int n_valid = tile.kv_end - tile.n_last * TILE_N;
            if (n_valid < TILE_N) {
                mbarrier_wait(BAR(V_FULL + stage), phase);
                clear_tail(smem + V_OFFSET + stage * KV_TILE_BYTES, n_valid, thread, warpgroup);
            }

            // The wait for PV of the tile before stands at the top, a branch away from the softmax that is to run
            // beside it: in one basic block ptxas moves the wait up to the products.
            int busy_stage = -1;  // V stage that products in flight read
            for (int n = tile.n_last - 1; n >= tile.n_first; --n) {
                wgmma_wait<0>();
                if (lane == 0 && busy_stage >= 0) mbarrier_arrive(BAR(V_EMPTY + busy_stage));
                to_bf16(p, s);
                // Few tiles raise a maximum after the first ones.
                if (__any_sync(FULL_WARP, softmax.decay[0] != 1.f || softmax.decay[1] != 1.f))
#pragma unroll
                    for (int i = 0; i < D_PADDED / 2; ++i) o[i] *= softmax.decay[i / 2 % 2];
                const int v_phase = phase;
                busy_stage = stage;
                if (++stage == STAGES) stage = 0, phase ^= 1;
                mbarrier_wait(BAR(K_FULL + stage), phase);
                mbarrier_wait(BAR(V_FULL + busy_stage), v_phase);
                if (PINGPONG) named_sync(TURN + warpgroup, 256);
                wgmma_fence();
                issue_qk(s, q, smem + K_OFFSET + stage * KV_TILE_BYTES);
                issue_pv(o, p, smem + V_OFFSET + busy_stage * KV_TILE_BYTES);
                if (PINGPONG) named_arrive(next_turn, 256);
                wgmma_wait<1>();
                if (lane == 0) mbarrier_arrive(BAR(K_EMPTY + stage));
                const int column = n * TILE_N;
                if (column + TILE_N - 1 > first_pos || (window > 0 && column <= last_pos - window))
                    mask(s, column + column0, pos, window);
                softmax.step(s, scale_log2);
            }
            if (lane == 0) mbarrier_arrive(BAR(Q_EMPTY));
            wgmma_wait<0>();
            if (lane == 0 && busy_stage >= 0) mbarrier_arrive(BAR(V_EMPTY + busy_stage));
            to_bf16(p, s);
#pragma unroll
            for (int i = 0; i < D_PADDED / 2; ++i) o[i] *= softmax.decay[i / 2 % 2];
            mbarrier_wait(BAR(V_FULL + stage), phase);
            wgmma_fence();
            issue_pv(o, p, smem + V_OFFSET + stage * KV_TILE_BYTES);
            float inv[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sum = softmax.sum[h];
                sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                inv[h] = sum > 0.f ? 1.f / sum : 0.f;
            }
            wgmma_wait<0>();
            if (lane == 0) mbarrier_arrive(BAR(V_EMPTY + stage));
            if (++stage == STAGES) stage = 0, phase ^= 1;

            // A quad holds 2 columns a thread of each 8-column block; after a 4 x 4 transpose each thread holds
            // one whole block of every four, so a row leaves in 16-byte pieces.
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int r = row0 + warp * 16 + lane / 4 + 8 * h;
                bf16* dst = out + ((long long)(tile.q_begin + r / GROUP) * n_kv * GROUP + tile.kv_head * GROUP +
                                        r % GROUP) * HEAD_DIM;
#pragma unroll
                for (int b = 0; b < CHUNKS; b += 4) {
                    unsigned w[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        w[i] = pack_bf16(o[4 * (b + i) + 2 * h] * inv[h], o[4 * (b + i) + 2 * h + 1] * inv[h]);
                    // Exchange with lane ^ 1, then with lane ^ 2: entry i of lane l goes to entry l of lane i.
#pragma unroll
                    for (int i = 0; i < 4; i += 2) {
                        const unsigned got = __shfl_xor_sync(FULL_WARP, lane & 1 ? w[i] : w[i + 1], 1);
                        if (lane & 1) w[i] = got; else w[i + 1] = got;
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned got = __shfl_xor_sync(FULL_WARP, lane & 2 ? w[i] : w[i + 2], 2);
                        if (lane & 2) w[i] = got; else w[i + 2] = got;
                    }
                    if (r < tile.n_rows) *(uint4*)(dst + (b + lane % 4) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
                }
            }
        }
    }
}

#endif
