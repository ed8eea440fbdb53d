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

#ifndef BN
#define BN 128  // columns: rows of x, a multiple of 8 up to 256
#endif
#ifndef TILE_ROWS
#define TILE_ROWS 128  // rows of W of a tile, a multiple of 16 up to 256
#endif
#ifndef RING_BYTES
#define RING_BYTES 208000  // of which a whole number of stages is used
#endif
#include "stream_tile.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int W_BYTES = TILE_ROWS * 128;
constexpr int STAGE_BYTES = W_BYTES + BN * 128;
constexpr int STAGES = RING_BYTES / STAGE_BYTES;
constexpr int BARRIER_OFFSET = STAGES * STAGE_BYTES;
static_assert(STAGES >= 2, "the ring is too small");

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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
stream_gemm(const TensorMap* w_map, const TensorMap* x_map, void* out, int n_out, int n_rows, int k_blocks) {
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
        if (elect_one()) {
            const u64 policy = share.n_x > 1 ? EVICT_LAST : EVICT_FIRST;
            const auto weights = [&](int slot, int k, int row) {
                mbarrier_expect(full + 8 * slot, STAGE_BYTES);
                load_weights(ring + slot * STAGE_BYTES, w_map, k * 64, row, full + 8 * slot, policy);
            };
            const auto activations = [&](int slot, int k, int row) {
                load_activations(ring + slot * STAGE_BYTES + W_BYTES, x_map, k * 64, row, full + 8 * slot);
            };
            fill_ring<STAGES>(share, empty, weights, activations);
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
            const Result result(out, share, x_row, n_out, n_rows);
            // GATED: 16 rows of W are 8 of the result.
            const int row = w_row + warp * 16;
            const int end = min(result.width, GATED ? (w_row + TILE_ROWS) / 2 : w_row + TILE_ROWS);
            store_tile(acc, result, (GATED ? row / 2 : row) + lane / 4, end);
        }
    }
}

#endif
