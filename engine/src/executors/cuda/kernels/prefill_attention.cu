// variant: llama_3_1_8b HEAD_DIM=128 GROUP=4
// variant: qwen2_0_5b HEAD_DIM=64 GROUP=7
// variant: smollm2_135m HEAD_DIM=64 GROUP=3
// variant: head_dim_96 HEAD_DIM=96 GROUP=1
// spill-limit: 464
// The spills are at head_dim 128: both the scores and the outputs of a tile are in registers. Hopper does not pay for
// them, it runs prefill_attention_sm90.cu; measurements in docs/log.md.
//
// Causal attention of the new tokens of several sequences over their keys and values, unpacked from the paged
// cache (unpack_kv.cu), for every GPU from sm_80 on (mma.sync). q is rotated.
//
//   qkv           bf16  [n_tokens, (n_q + 2 n_kv) * HEAD_DIM]   only the q part is read
//   keys, values  bf16  [n_kv, capacity, HEAD_DIM]             of all contexts; anything between them
//   out           bf16  [n_tokens, n_q * HEAD_DIM]
//   cu_seqlens_q  int32 [n_seqs + 1]   query rows of sequence s: cu_seqlens_q[s] .. cu_seqlens_q[s+1]
//   context_lens  int32 [n_seqs]       tokens of each; the queries are the last ones of them
//   context_starts int32 [n_seqs]      where each begins in keys and values
//   tiles         int2  [n_tiles]      (sequence, first row of the tile), longest context first
//   window        keys further back than this are not seen; 0: all are
//
// Rows: the GROUP query heads of one kv head are packed with the query positions, row r of sequence s
// being position r / GROUP and head kv_head * GROUP + r % GROUP. One block does TILE_M = 128 rows of
// one kv head, so short chunks and decode rows fill the tensor cores as well as GROUP allows, and
// a sequence of q_len queries has ceil(q_len * GROUP / 128) tiles. n_q = n_kv * GROUP.
//
// Grid (n_kv, n_tiles), 256 / WARP_TILES threads, (TILE_M + 2 * TILE_N) * ROW_BYTES of dynamic shared memory
// (64 KiB for HEAD_DIM 96 and 128, 32 KiB for 64).
// FlashAttention-2 (Dao, 2023): each warp owns 16 WARP_TILES rows, the scores never leave the registers, V of a
// tile loads while QK^T runs and K of the next while softmax and PV run. Tiles that the causal mask
// or the window hides are never read.

#include "attention.cuh"

#ifndef WARP_TILES
#define WARP_TILES 2  // 16-row tiles of a warp
#endif

constexpr int TILE_M = 128;
constexpr int TILE_N = 64;
constexpr int WARP_ROWS = 16 * WARP_TILES;
constexpr int THREADS = TILE_M / WARP_ROWS * 32;
constexpr int CHUNKS = HEAD_DIM / 8;                       // 16-byte chunks of a row
constexpr int ROW_CHUNKS = HEAD_DIM <= 64 ? 8 : 16;        // a power of two, for the XOR swizzle
constexpr int ROW_BYTES = ROW_CHUNKS * 16;
constexpr int K_OFFSET = TILE_M * ROW_BYTES;
constexpr int V_OFFSET = K_OFFSET + TILE_N * ROW_BYTES;
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int N_BLOCKS = TILE_N / 8;
constexpr int D_BLOCKS = HEAD_DIM / 8;
#define NEG_INF __int_as_float(0xff800000)
static_assert(HEAD_DIM == 64 || HEAD_DIM == 96 || HEAD_DIM == 128, "HEAD_DIM must be 64, 96 or 128");

// Byte offset of a 16-byte chunk; the XOR spreads the eight rows of an ldmatrix over all banks.
__device__ __forceinline__ unsigned chunk_offset(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// Asynchronous 16-byte copy to shared memory; zeros are written when `valid` is false.
__device__ __forceinline__ void copy_chunk(unsigned dst, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], unsigned addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], unsigned addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
prefill_attention(const bf16* __restrict__ qkv, const bf16* __restrict__ keys, const bf16* __restrict__ values,
                  bf16* __restrict__ out, const int* __restrict__ cu_seqlens_q, const int* __restrict__ context_lens,
                  const int* __restrict__ context_starts, int capacity, const int2* __restrict__ tiles, float scale,
                  int window) {
    extern __shared__ __align__(1024) unsigned char smem[];
    const unsigned smem_base = (unsigned)__cvta_generic_to_shared(smem);
    const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
    const int n_kv = gridDim.x, kv_head = blockIdx.x;

    PDL_TRIGGER();
    PDL_WAIT();
    const int2 tile = tiles[blockIdx.y];
    const int seq = tile.x, tile_row = tile.y;
    const int q_begin = cu_seqlens_q[seq];
    const int q_len = cu_seqlens_q[seq + 1] - q_begin;
    const int context = context_lens[seq];
    const int n_rows = q_len * GROUP;
    if (tile_row >= n_rows || context < q_len) return;
    const long long first_number = ((long long)kv_head * capacity + context_starts[seq]) * HEAD_DIM;
    keys += first_number, values += first_number;

    const int first_pos = context - q_len + tile_row / GROUP;
    const int last_row = min(tile_row + TILE_M, n_rows) - 1;
    const int kv_end = context - q_len + last_row / GROUP + 1;
    const int kv_begin = window > 0 ? max(0, first_pos - window + 1) : 0;
    const int tile_first = kv_begin / TILE_N;
    const int tile_last = (kv_end - 1) / TILE_N;

    auto load_kv = [&](const bf16* tokens, int n, unsigned offset) {
#pragma unroll
        for (int i = 0; i < TILE_N * CHUNKS / THREADS; ++i) {
            const int idx = tid + i * THREADS;
            const int row = idx / CHUNKS, chunk = idx % CHUNKS;
            const bf16* src = tokens + (n * TILE_N + row) * HEAD_DIM + chunk * 8;
            copy_chunk(smem_base + offset + chunk_offset(row, chunk), src, n * TILE_N + row < kv_end);
        }
        commit_copies();
    };

    {
        const long long qkv_stride = (long long)(n_kv * GROUP + 2 * n_kv) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < TILE_M * CHUNKS / THREADS; ++i) {
            const int idx = tid + i * THREADS;
            const int row = idx / CHUNKS, chunk = idx % CHUNKS;
            const int r = min(tile_row + row, n_rows - 1);
            const bf16* src = qkv + (q_begin + r / GROUP) * qkv_stride +
                                   (kv_head * GROUP + r % GROUP) * HEAD_DIM + chunk * 8;
            copy_chunk(smem_base + chunk_offset(row, chunk), src, true);
        }
    }
    load_kv(keys, tile_last, K_OFFSET);  // commits q and k together

    const float scale_log2 = scale * 1.4426950408889634f;
    // A warp with no live row only helps to load. Rows of this thread: warp * WARP_ROWS + 16 m + 8 h + lane / 4.
    const bool active = tile_row + warp * WARP_ROWS < n_rows;
    // chunk_offset of a lane at step k is that of step 0 with k * 32 flipped in, rows being ROW_BYTES apart.
    const unsigned q_addr = smem_base + chunk_offset(warp * WARP_ROWS + (lane & 15), lane >> 4);
    const unsigned k_addr = smem_base + K_OFFSET + chunk_offset((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
    const unsigned v_addr = smem_base + V_OFFSET + chunk_offset(lane & 15, lane >> 4);
    const int warp_first_pos = context - q_len + min(tile_row + warp * WARP_ROWS, n_rows - 1) / GROUP;
    const int warp_last_pos = context - q_len + min(tile_row + warp * WARP_ROWS + WARP_ROWS - 1, n_rows - 1) / GROUP;

    float o[WARP_TILES][D_BLOCKS][4] = {};
    float row_max[WARP_TILES][2], row_sum[WARP_TILES][2];
#pragma unroll
    for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            row_max[m][h] = NEG_INF;
            row_sum[m][h] = 0.f;
        }

    for (int n = tile_last; n >= tile_first; --n) {
        wait_copies<0>();
        __syncthreads();  // K of this tile is here; all warps are done with V of the tile before
        load_kv(values, n, V_OFFSET);

        float s[WARP_TILES][N_BLOCKS][4];
        if (active) {
#pragma unroll
            for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
                for (int j = 0; j < N_BLOCKS; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[m][j][e] = 0.f;
#pragma unroll
            for (int k = 0; k < K_STEPS; ++k) {
                unsigned q[WARP_TILES][4];
#pragma unroll
                for (int m = 0; m < WARP_TILES; ++m)
                    load_matrices(q[m], (q_addr ^ (k * 32)) + m * 16 * ROW_BYTES);
#pragma unroll
                for (int j = 0; j < N_BLOCKS; j += 2) {
                    unsigned b[4];
                    load_matrices(b, (k_addr ^ (k * 32)) + j * 8 * ROW_BYTES);
#pragma unroll
                    for (int m = 0; m < WARP_TILES; ++m) {
                        mma_bf16(s[m][j], q[m][0], q[m][1], q[m][2], q[m][3], b[0], b[1]);
                        mma_bf16(s[m][j + 1], q[m][0], q[m][1], q[m][2], q[m][3], b[2], b[3]);
                    }
                }
            }
        }
        wait_copies<0>();
        __syncthreads();  // V is here; all warps are done with K
        if (n > tile_first) load_kv(keys, n - 1, K_OFFSET);
        if (!active) continue;

        const int col0 = n * TILE_N + (lane & 3) * 2;
        if (n * TILE_N + TILE_N - 1 > warp_first_pos || (window > 0 && n * TILE_N <= warp_last_pos - window)) {
#pragma unroll
            for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = min(tile_row + warp * WARP_ROWS + m * 16 + h * 8 + lane / 4, n_rows - 1);
                    const int pos = context - q_len + row / GROUP;
                    const int oldest = window > 0 ? pos - window : -1;
#pragma unroll
                    for (int j = 0; j < N_BLOCKS; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int col = col0 + j * 8 + e;
                            if (col > pos || col <= oldest) s[m][j][2 * h + e] = NEG_INF;
                        }
                }
        }

        unsigned p[WARP_TILES][N_BLOCKS][2];
#pragma unroll
        for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float top = row_max[m][h];
#pragma unroll
                for (int j = 0; j < N_BLOCKS; ++j) top = fmaxf(top, fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
                // A row that has seen no key yet keeps -inf; 0 in its place keeps exp2 free of NaN.
                const float top_scaled = top == NEG_INF ? 0.f : top * scale_log2;
                const float decay = exp2_approx(row_max[m][h] * scale_log2 - top_scaled);
                row_max[m][h] = top;
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < N_BLOCKS; ++j) {
                    const float a = exp2_approx(s[m][j][2 * h] * scale_log2 - top_scaled);
                    const float b = exp2_approx(s[m][j][2 * h + 1] * scale_log2 - top_scaled);
                    sum += a + b;
                    p[m][j][h] = pack_bf16(a, b);
                }
                row_sum[m][h] = row_sum[m][h] * decay + sum;
#pragma unroll
                for (int d = 0; d < D_BLOCKS; ++d) {
                    o[m][d][2 * h] *= decay;
                    o[m][d][2 * h + 1] *= decay;
                }
            }

#pragma unroll
        for (int k = 0; k < TILE_N / 16; ++k) {
            unsigned a[WARP_TILES][4];
#pragma unroll
            for (int m = 0; m < WARP_TILES; ++m) {
                a[m][0] = p[m][2 * k][0];
                a[m][1] = p[m][2 * k][1];
                a[m][2] = p[m][2 * k + 1][0];
                a[m][3] = p[m][2 * k + 1][1];
            }
#pragma unroll
            for (int d = 0; d < D_BLOCKS; d += 2) {
                unsigned b[4];
                load_matrices_transposed(b, (v_addr ^ (d * 16)) + k * 16 * ROW_BYTES);
#pragma unroll
                for (int m = 0; m < WARP_TILES; ++m) {
                    mma_bf16(o[m][d], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
                    mma_bf16(o[m][d + 1], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
                }
            }
        }
    }
    if (!active) return;

    // Each warp passes its own 32 rows of q's space in shared memory, so that rows leave in 16-byte pieces.
#pragma unroll
    for (int m = 0; m < WARP_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum = row_sum[m][h];
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            const float inv = sum > 0.f ? 1.f / sum : 0.f;
            const int row = warp * WARP_ROWS + m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int d = 0; d < D_BLOCKS; ++d)
                *(unsigned*)(smem + chunk_offset(row, d) + (lane & 3) * 4) =
                    pack_bf16(o[m][d][2 * h] * inv, o[m][d][2 * h + 1] * inv);
        }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < WARP_ROWS * CHUNKS / 32; ++i) {
        const int idx = lane + i * 32;
        const int row = warp * WARP_ROWS + idx / CHUNKS, chunk = idx % CHUNKS;
        const int r = tile_row + row;
        if (r < n_rows)
            *(uint4*)(out + ((long long)(q_begin + r / GROUP) * n_kv * GROUP + kv_head * GROUP + r % GROUP) * HEAD_DIM +
                      chunk * 8) = *(const uint4*)(smem + chunk_offset(row, chunk));
    }
}
