// variant: bf16_16 OUTPUT=0 BN=16
// variant: bf16_128 OUTPUT=0 BN=128
// variant: bf16_128_narrow OUTPUT=0 BN=128 TILE_ROWS=64
// variant: f32_8 OUTPUT=1 BN=8
// variant: f32_96 OUTPUT=1 BN=96
// variant: f32_128 OUTPUT=1 BN=128
// variant: gated_16 OUTPUT=2 BN=16
// variant: gated_128 OUTPUT=2 BN=128
// variant: gated_128_narrow OUTPUT=2 BN=128 TILE_ROWS=112
// variant: gated_256 OUTPUT=2 BN=256
//
// Products of a few rows of activations with large weights, for Hopper (sm_90a only): y[m, n] = sum_k x[m, k] W[n, k].
// The weights are read once and set the time, so they stream through a ring of shared memory by the copy engine, and
// its first stages are filled before the kernel ahead has ended (programmatic dependent launch): the next weights
// arrive while attention, norms and the tail of the product before still run.
//
//   w_map     W, bf16 [n_out, K]: box 64 columns x TILE_ROWS rows. GATED: gate rows, then up rows, seen as
//             [n_out / 16][2][8][K], box 64 x 8 x 2 x TILE_ROWS / 16, so that a tile's rows are eight of gate, their
//             eight of up, ...
//   x_map     x, bf16 [>= BN, K]: box 64 columns x BN rows. Both SWIZZLE_128B, zero fill out of bounds.
//   out       OUTPUT 0: bf16 [n_rows, n_out]
//             OUTPUT 1: float32 [split, n_rows, n_out]: each block's part of the sum over K
//             OUTPUT 2: bf16 [n_rows, n_out / 2], silu(gate) * up (GATED)
//   n_out     rows of W; a multiple of 2, GATED of 16
//   n_rows    rows of x that count; more than BN of them, a prompt's, with OUTPUT 2 only
//   k_blocks  ceil(K / 64)
//
// Grid: (split, blocks). Each block takes tiles of TILE_ROWS rows of W and BN rows of x in turn; K is cut into `split`
// parts (1 unless OUTPUT 1), whose sums the next RMSNorm adds to the residual stream in order: results do not depend on timing. (Adding
// them here through distributed shared memory was slower: clusters wait for neighbouring multiprocessors to be free.)
// Block: THREADS. Dynamic shared memory: 1024 (the swizzle's alignment) + STAGES * (STAGE_BYTES + 16) + what the last
// warpgroup's 64 rows go beyond a stage.
//
// The tensor cores take W as their 64 rows and the activations as columns, so a batch of 16 wastes nothing.

#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

#ifndef BN
#define BN 128  // columns: rows of x, a multiple of 8 up to 256
#endif
#ifndef RING_BYTES
#define RING_BYTES 208000  // of which a whole number of stages is used
#endif

constexpr bool GATED = OUTPUT == 2;
#ifndef TILE_ROWS
#define TILE_ROWS 128  // rows of W of a tile, a multiple of 16 up to 256
#endif
constexpr int N_CONSUMERS = (TILE_ROWS + 63) / 64;
constexpr int THREADS = N_CONSUMERS * 128 + 32;
constexpr int W_BYTES = TILE_ROWS * 128;
constexpr int STAGE_BYTES = W_BYTES + BN * 128;
constexpr int STAGES = RING_BYTES / STAGE_BYTES;
constexpr int GROUP_X = 8;  // tiles of x that blocks at work at one time share
constexpr int BARRIER_OFFSET = STAGES * STAGE_BYTES;
static_assert(BN % 8 == 0 && BN <= 256, "BN must be a multiple of 8 up to 256");
static_assert(TILE_ROWS % 16 == 0 && TILE_ROWS <= 256, "TILE_ROWS must be a multiple of 16 up to 256");
static_assert(STAGES >= 2, "the ring is too small");
// Cache policies of createpolicy.fractional: weights pass once, activations are read by every block.
constexpr u64 EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

#define WGMMA(N, REGS, W, X, ...)                                                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS "}, " W ", " X ", 1, 1, 1, 0, 0;" \
                 : __VA_ARGS__                                                                                 \
                 : "l"(w), "l"(x))

// d[64 x N] += w[64 x 16] x[N x 16]^T, both from shared memory.
template <int N> DEVICE void wgmma(float* d, u64 w, u64 x) {
    if constexpr (N == 8) WGMMA(8, REGS4, "%4", "%5", ACC4(d, 0));
    if constexpr (N == 16) WGMMA(16, REGS8, "%8", "%9", ACC8(d, 0));
    if constexpr (N == 32) WGMMA(32, REGS16, "%16", "%17", ACC16(d, 0));
    if constexpr (N == 64) WGMMA(64, REGS32, "%32", "%33", ACC32(d));
    if constexpr (N == 128) WGMMA(128, REGS64, "%64", "%65", ACC64(d));
}

// The columns from FIRST on, in pieces of a power of two.
template <int FIRST> DEVICE void wgmma_columns(float* d, unsigned w, unsigned x) {
    constexpr int LEFT = BN - FIRST;
    if constexpr (LEFT > 0) {
        constexpr int N = LEFT >= 128 ? 128 : LEFT >= 64 ? 64 : LEFT >= 32 ? 32 : LEFT >= 16 ? 16 : 8;
        wgmma<N>(d + FIRST / 2, descriptor(w, 16), descriptor(x + FIRST * 128, 16));
        wgmma_columns<FIRST + N>(d, w, x);
    }
}

// A tile's rows of W, from row `row` on.
DEVICE void load_weights(unsigned dst, const TensorMap* map, int k, int row, unsigned bar, u64 policy) {
    if constexpr (GATED)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, {%2, %4, %4, %3}], [%5], %6;" ::"r"(dst),
            "l"(map), "r"(k), "r"(row / 16), "r"(0), "r"(bar), "l"(policy)
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
            "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
            "l"(map), "r"(k), "r"(row), "r"(bar), "l"(policy)
            : "memory");
}
DEVICE void load_activations(unsigned dst, const TensorMap* map, int k, int row, unsigned bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%2, %3}], [%4], %5;" ::"r"(dst),
        "l"(map), "r"(k), "r"(row), "r"(bar), "l"(EVICT_LAST)
        : "memory");
}

// The block's share of the work: stages of 64 columns of K, tile after tile.
struct Share {
    int first_tile, n_tiles, tile_step;
    int first_k, n_k;  // 64-column blocks
    int n_w, n_x;      // tiles of rows of W, of x

    __device__ __forceinline__ Share(int n_out, int n_rows, int k_blocks) {
        const int split = gridDim.x, part = blockIdx.x;
        n_w = (n_out + TILE_ROWS - 1) / TILE_ROWS;
        n_x = (n_rows + BN - 1) / BN;
        n_tiles = n_w * n_x;
        first_tile = blockIdx.y;
        tile_step = gridDim.y;
        first_k = k_blocks * part / split;
        n_k = k_blocks * (part + 1) / split - first_k;
    }
    // First rows of W and of x of a tile. The blocks at work at one time share a few tiles of W and GROUP_X of x, so
    // that both are read from the L2 cache.
    __device__ __forceinline__ void rows_of(int tile, int& w, int& x) const {
        const int group = tile / (n_w * GROUP_X), in_group = tile - group * n_w * GROUP_X;
        const int width = min(GROUP_X, n_x - group * GROUP_X);
        w = in_group / width * TILE_ROWS;
        x = (group * GROUP_X + in_group % width) * BN;
    }
};

// first, second: two neighbouring columns of this lane's row. Lanes of even rows keep the first column, those of odd
// rows the second, each for both rows: a word to store.
DEVICE unsigned pair_rows(float first, float second, int odd) {
    const float got = __shfl_xor_sync(FULL_WARP, odd ? first : second, 4);
    return odd ? pack_bf16(got, second) : pack_bf16(first, got);
}

// From registers to global memory. row: of the result, this lane's first; end: of the tile's; width: of a row of the
// result.
DEVICE void store_tile(const float (&acc)[BN / 2], void* out, int row, int end, int width, int n_rows) {
    const int lane = threadIdx.x % 32, t = lane % 4, odd = lane / 4 % 2;
    constexpr bool PAIRS = OUTPUT != 1;
    // One pointer that walks: addresses of all columns at once would not fit beside the accumulators.
    long long at = (long long)(2 * t + (PAIRS ? odd : 0)) * width + row - (PAIRS ? odd : 0);
#pragma unroll
    for (int j = 0; j < BN / 8; ++j, at += 8ll * width) {
        const float* v = acc + 4 * j;
        const int column = 8 * j + 2 * t;
        if constexpr (GATED) {
            const unsigned pair = pair_rows(silu(v[0]) * v[2], silu(v[1]) * v[3], odd);
            if (column + odd < n_rows && row < end) *(unsigned*)((bf16*)out + at) = pair;
        } else if constexpr (PAIRS) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const unsigned pair = pair_rows(v[2 * h], v[2 * h + 1], odd);
                if (column + odd < n_rows && row + 8 * h < end) *(unsigned*)((bf16*)out + at + 8 * h) = pair;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float* to = (float*)out + at + (i % 2 ? width : 0) + i / 2 * 8;
                if (column + i % 2 < n_rows && row + i / 2 * 8 < end) *to = v[i];
            }
        }
        asm volatile("" : "+l"(at));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
stream_gemm(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, void* out, int n_out,
            int n_rows, int k_blocks) {
    extern __shared__ unsigned char smem_raw[];
    const unsigned ring = ((unsigned)__cvta_generic_to_shared(smem_raw) + 1023) & ~1023u;
    const unsigned full = ring + BARRIER_OFFSET, empty = full + 8 * STAGES;
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const Share share(n_out, n_rows, k_blocks);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, N_CONSUMERS * 4);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    PDL_TRIGGER();

    if (warp == N_CONSUMERS * 4) {
        if (lane == 0) {
            int slot = 0, phase = 1;  // a fresh barrier lets a wait for parity 1 pass
            int w_row, x_row;
            const u64 policy = share.n_x > 1 ? EVICT_LAST : EVICT_FIRST;
            const auto weights = [&](int k) {
                mbarrier_expect(full + 8 * slot, STAGE_BYTES);
                load_weights(ring + slot * STAGE_BYTES, &w_map, k * 64, w_row, full + 8 * slot, policy);
            };
            const auto activations = [&](int k) {
                load_activations(ring + slot * STAGE_BYTES + W_BYTES, &x_map, k * 64, x_row, full + 8 * slot);
            };
            const auto advance = [&] {
                if (++slot == STAGES) slot = 0, phase ^= 1;
            };
            // The ring's first round: weights before the wait, activations after it.
            const int n_first = share.first_tile < share.n_tiles ? min(STAGES, share.n_k) : 0;
            share.rows_of(share.first_tile, w_row, x_row);
            for (int k = 0; k < n_first; ++k, advance()) weights(share.first_k + k);
            PDL_WAIT();
            slot = 0, phase = 1;
            for (int k = 0; k < n_first; ++k, advance()) activations(share.first_k + k);
            for (int tile = share.first_tile; tile < share.n_tiles; tile += share.tile_step) {
                share.rows_of(tile, w_row, x_row);
                for (int k = tile == share.first_tile ? n_first : 0; k < share.n_k; ++k, advance()) {
                    mbarrier_wait(empty + 8 * slot, phase);
                    weights(share.first_k + k);
                    activations(share.first_k + k);
                }
            }
        }
    } else {
        PDL_WAIT();
        if constexpr (OUTPUT == 1) out = (float*)out + (long long)blockIdx.x * n_rows * n_out;
        int slot = 0, phase = 0;
        const unsigned rows = warp / 4 * 64 * 128;
        for (int tile = share.first_tile; tile < share.n_tiles; tile += share.tile_step) {
            float acc[BN / 2];
#pragma unroll
            for (int i = 0; i < BN / 2; ++i) acc[i] = 0.0f;
            for (int k = 0; k < share.n_k; ++k) {
                mbarrier_wait(full + 8 * slot, phase);
                const unsigned stage = ring + slot * STAGE_BYTES;
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 4; ++step)
                    wgmma_columns<0>(acc, stage + rows + step * 32, stage + W_BYTES + step * 32);
                wgmma_commit();
                // The products of the stage before are done: its slot may be filled again.
                wgmma_wait<1>();
                if (lane == 0 && k > 0) mbarrier_arrive(empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1));
                if (++slot == STAGES) slot = 0, phase ^= 1;
            }
            wgmma_wait<0>();
            if (lane == 0) mbarrier_arrive(empty + 8 * (slot == 0 ? STAGES - 1 : slot - 1));
            int w_row, x_row;
            share.rows_of(tile, w_row, x_row);
            const int row = w_row + warp * 16, width = GATED ? n_out / 2 : n_out;
            // GATED: 16 rows of W are 8 of the result.
            void* rows = GATED ? (bf16*)out + (long long)x_row * width : out;
            const int end = min(width, GATED ? (w_row + TILE_ROWS) / 2 : w_row + TILE_ROWS);
            store_tile(acc, rows, (GATED ? row / 2 : row) + lane / 4, end, width, n_rows - x_row);
        }
    }
}

#endif
