// variant: bf16_16 OUTPUT=0 BN=16
// variant: bf16_128_narrow OUTPUT=0 BN=128 TILE_ROWS=48 K_GROUPS=2
// variant: bf16_176_narrow OUTPUT=0 BN=176 TILE_ROWS=48
// variant: bf16_192_narrow OUTPUT=0 BN=192 TILE_ROWS=48
// variant: bf16_256 OUTPUT=0 BN=256
// variant: bf16_128_wide OUTPUT=0 BN=128 TILE_ROWS=192
// variant: f32_8 OUTPUT=1 BN=8 TILE_ROWS=64 K_GROUPS=2 RING_BYTES=136000
// variant: f32_16 OUTPUT=1 BN=16 TILE_ROWS=64 K_GROUPS=4
// variant: bf16_16_narrow OUTPUT=0 BN=16 TILE_ROWS=64 K_GROUPS=4
// variant: f32_96 OUTPUT=1 BN=96 TILE_ROWS=64 K_GROUPS=2
// variant: f32_128 OUTPUT=1 BN=128 TILE_ROWS=64 K_GROUPS=2
// variant: f32_192 OUTPUT=1 BN=192 TILE_ROWS=64
// variant: gated_16 OUTPUT=2 BN=16 TILE_ROWS=112
// variant: gated_128 OUTPUT=2 BN=128 TILE_ROWS=112
// variant: gated_192 OUTPUT=2 BN=192
// variant: gated_240 OUTPUT=2 BN=240
// variant: f32_256 OUTPUT=1 BN=256
// variant: gated_256 OUTPUT=2 BN=256 CLUSTER=2
// variant: add_256 OUTPUT=3 BN=256 CLUSTER=2
// variant: add_128 OUTPUT=3 BN=128
// variant: add_128_narrow OUTPUT=3 BN=128 TILE_ROWS=64 K_GROUPS=2
//
// stream_gemm_sm90.cu's products with weights in 12 bits each (packed.cuh), for Hopper (sm_90a only): the same results
// from a quarter fewer bytes. The copy engine brings blocks as they lie; each warp unpacks the 16 rows of a tile that
// are its part of the warpgroup's 64 into registers, from where the tensor cores take them, while they still compute the
// stage before.
//
//   w_map     the packed matrix's planes, of 8-byte elements [n_out / 16][K / 64][192]: box 192 x 1 x TILE_ROWS / 16
//   extras    its extras; GATED in the order that pack_weights gives rows
//   x_map     x, bf16 [>= BN, K]: box 64 columns x BN / CLUSTER rows, SWIZZLE_128B, zero fill out of bounds
//   out       see stream_tile.cuh
//   n_out     rows of W, a multiple of 16
//   n_rows    rows of x that count; more than BN of them are taken in tiles, with a split of 1
//   k_blocks  K / 64
//
// With CLUSTER 2 two blocks share the copies of x, which takes less power, a prompt's limit (docs/log.md).
//
// Grid: (split, blocks), split 1, with OUTPUT 1 perhaps 2 or 4; blocks a multiple of CLUSTER. Block: THREADS. Dynamic
// shared memory: 1024 (the swizzle's alignment) + STAGES * (BN * 128 + W_BYTES + 16) + SUM_BYTES + what the last
// warpgroup's four blocks go beyond a stage.

#ifndef BN
#define BN 128  // columns: rows of x, as wgmma below has an instruction for
#endif
#ifndef TILE_ROWS
#define TILE_ROWS 128  // rows of W of a tile, a multiple of 16 up to 256
#endif
#ifndef RING_BYTES
#define RING_BYTES 208000  // of which a whole number of stages is used
#endif
#define MANY_REGISTERS (BN > 128 || TILE_ROWS > 128)
#include "packed.cuh"
#include "stream_tile.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int TILE_BLOCKS = TILE_ROWS / 16;
constexpr int X_BYTES = BN * 128;
constexpr int W_BYTES = TILE_BLOCKS * PACKED_BLOCK;
// Sums of the warpgroups that are not the first in their turns.
constexpr int SUM_BYTES = (K_GROUPS - 1) * TILE_GROUPS * 128 * BN / 2 * 4;
constexpr int STAGES = (RING_BYTES - SUM_BYTES) / (X_BYTES + W_BYTES);
static_assert(STAGES >= 2, "the ring is too small");
// What setmaxnreg leaves to each thread, of the registers that the block is launched with.
constexpr int CONSUMER_REGISTERS = N_CONSUMERS == 3 ? 160 : 232, LOADER_REGISTERS = N_CONSUMERS == 3 ? 32 : 40;
static_assert(!MANY_REGISTERS || N_CONSUMERS * CONSUMER_REGISTERS + LOADER_REGISTERS <= 512, "no such registers");

#define WGMMA(N, REGS, A, X, ...)                                                                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGS "}, {" A "}, " X ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))

// d[64 x BN] += a[64 x 16] x[BN x 16]^T, x from shared memory.
DEVICE void wgmma(float (&d)[BN / 2], const u32 (&a)[4], u64 x) {
    constexpr bool IS_SMALL = BN == 8 || BN == 16 || BN == 32 || BN == 48 || BN == 64 || BN == 96;
    static_assert(IS_SMALL || (BN >= 128 && BN != 144 && BN % 16 == 0), "BN has no instruction below");
    if constexpr (BN == 8) WGMMA(8, REGS4, "%4, %5, %6, %7", "%8", ACC4(d, 0));
    if constexpr (BN == 16) WGMMA(16, REGS8, "%8, %9, %10, %11", "%12", ACC8(d, 0));
    if constexpr (BN == 32) WGMMA(32, REGS16, "%16, %17, %18, %19", "%20", ACC16(d, 0));
    if constexpr (BN == 48) WGMMA(48, REGS24, "%24, %25, %26, %27", "%28", ACC24(d));
    if constexpr (BN == 64) WGMMA(64, REGS32, "%32, %33, %34, %35", "%36", ACC32(d));
    if constexpr (BN == 96) WGMMA(96, REGS48, "%48, %49, %50, %51", "%52", ACC48(d));
    if constexpr (BN == 128) WGMMA(128, REGS64, "%64, %65, %66, %67", "%68", ACC64(d));
    if constexpr (BN == 160) WGMMA(160, REGS80, "%80, %81, %82, %83", "%84", ACC80(d));
    if constexpr (BN == 176) WGMMA(176, REGS88, "%88, %89, %90, %91", "%92", ACC88(d));
    if constexpr (BN == 192) WGMMA(192, REGS96, "%96, %97, %98, %99", "%100", ACC96(d));
    if constexpr (BN == 208) WGMMA(208, REGS104, "%104, %105, %106, %107", "%108", ACC104(d));
    if constexpr (BN == 224) WGMMA(224, REGS112, "%112, %113, %114, %115", "%116", ACC112(d));
    if constexpr (BN == 240) WGMMA(240, REGS120, "%120, %121, %122, %123", "%124", ACC120(d));
    if constexpr (BN == 256) WGMMA(256, REGS128, "%128, %129, %130, %131", "%132", ACC128(d));
}

// A tile's blocks of one 64 columns, from rows `row` on.
DEVICE void load_blocks(u32 dst, const TensorMap* map, int k, int row, u32 bar, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(dst),
        "l"(map), "r"(0), "r"(k), "r"(row / 16), "r"(bar), "l"(policy)
        : "memory");
}

#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTER_DIMS
#endif

// This block's part of a tile of activations, to all blocks of the cluster.
DEVICE void load_shared_activations(u32 dst, const TensorMap* map, int k, int row, u32 bar) {
    const int part = blockIdx.y % CLUSTER;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(dst + part * (X_BYTES / CLUSTER)),
        "l"(map), "r"(k), "r"(row + part * (BN / CLUSTER)), "r"(bar), "h"((unsigned short)((1 << CLUSTER) - 1)),
        "l"(EVICT_LAST)
        : "memory");
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS, 1)
packed_gemm(const TensorMap* w_map, const unsigned char* extras, const TensorMap* x_map, void* out, int n_out, int n_rows,
            int k_blocks) {
    extern __shared__ unsigned char smem_raw[];
    const u32 ring = ((u32)__cvta_generic_to_shared(smem_raw) + 1023) & ~1023u;
    const u32 w_ring = ring + STAGES * X_BYTES;
    const u32 full = w_ring + STAGES * W_BYTES, empty = full + 8 * STAGES;
    const u32 sums_of_others = ring + STAGES * (X_BYTES + W_BYTES + 16);
    const int warp = __shfl_sync(FULL_WARP, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const Share share(n_out, n_rows, k_blocks);

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, TILE_GROUPS * 4 * CLUSTER);
        }
        mbarrier_init_fence();
    }
    // Blocks of a cluster write to each other's shared memory: not before the barriers are there, nor after the end, for
    // which fill_ring waits.
    if constexpr (CLUSTER > 1) cluster_sync();
    else __syncthreads();
    PDL_TRIGGER();

    if (warp >= N_CONSUMERS * 4) {
        if constexpr (MANY_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
        if (warp == N_CONSUMERS * 4 && elect_one()) {
            // Where x does not fit the L2 cache anyway (down), it is better to keep W for the other tiles of x.
            const u64 policy = OUTPUT == 3 && share.n_x > 1 ? EVICT_LAST : EVICT_FIRST;
            const auto weights = [&](int slot, int k, int row) {
                mbarrier_expect(full + 8 * slot, X_BYTES + W_BYTES);
                load_blocks(w_ring + slot * W_BYTES, w_map, k, row, full + 8 * slot, policy);
            };
            const auto activations = [&](int slot, int k, int row) {
                const u32 to = ring + slot * X_BYTES, bar = full + 8 * slot;
                if constexpr (CLUSTER > 1) load_shared_activations(to, x_map, k * 64, row, bar);
                else load_activations(to, x_map, k * 64, row, bar);
            };
            fill_ring<STAGES>(share, empty, weights, activations);
        }
    } else {
        if constexpr (MANY_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
        // The slot may be filled again, by any block of the cluster.
        const auto release = [&](int slot) {
            if constexpr (CLUSTER > 1) {
                if (lane < CLUSTER) mbarrier_arrive_at(empty + 8 * slot, lane);
            } else if (lane == 0) {
                mbarrier_arrive(empty + 8 * slot);
            }
        };
        const int group = warp / 4 / TILE_GROUPS, warp_row = warp % (TILE_GROUPS * 4) * 16;
        // Of the warp's 16 rows of a tile; past the matrix's end any will do.
        const auto first_row = [&](int tile) {
            int w_row, x_row;
            share.rows_of(min(tile, share.n_tiles - 1), w_row, x_row);
            return min(w_row + warp_row, n_out - 16);
        };
        const auto window = [&](int row) { return (u32)extras[row + lane / 4]; };
        int row_of_w = first_row(share.first_tile);
        u32 next_g = window(row_of_w), next_g8 = window(row_of_w + 8);
        // A split is 1, 2 or 4: its parts begin where quarters do.
        const int quarter = blockIdx.x * 4 / gridDim.x;
        Escapes escapes(extras, n_out, row_of_w, quarter);
        PDL_WAIT();
        if constexpr (OUTPUT == 1) out = (float*)out + (long long)blockIdx.x * n_rows * n_out;
        int n_stages = 0;  // before this tile
        for (int tile = share.first_tile; tile < share.n_tiles; tile += share.tile_step, n_stages += share.n_k) {
            const Window g(next_g), g8(next_g8);
            if (tile != share.first_tile) escapes = Escapes(extras, n_out, row_of_w, quarter);
            row_of_w = first_row(tile + share.tile_step);
            next_g = window(row_of_w), next_g8 = window(row_of_w + 8);
            float acc[BN / 2];
#pragma unroll
            for (int i = 0; i < BN / 2; ++i) acc[i] = 0.0f;
            // A warp has two sets of registers for its weights: one is filled while the products of the other run.
            u32 even[4][4], odd[4][4];
            int last_slot = -1;
            const auto stage = [&](u32 (&a)[4][4], int k) {
                const int slot = (n_stages + k) % STAGES, phase = (n_stages + k) / STAGES % 2;
                mbarrier_wait(full + 8 * slot, phase);
                unpack_block(a, w_ring + slot * W_BYTES + warp_row / 16 * PACKED_BLOCK, g, g8);
                escapes.patch(a, share.first_k + k);
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < 4; ++step) wgmma(acc, a[step], descriptor(ring + slot * X_BYTES + step * 32, 16));
                wgmma_commit();
                // The products of the stage before are done: its slot may be filled again.
                wgmma_wait<1>();
                if (last_slot >= 0) release(last_slot);
                last_slot = slot;
            };
            int k = group;
            for (; k + K_GROUPS < share.n_k; k += 2 * K_GROUPS) stage(even, k), stage(odd, k + K_GROUPS);
            if (k < share.n_k) stage(even, k);
            wgmma_wait<0>();
            if (last_slot >= 0) release(last_slot);
            if constexpr (K_GROUPS > 1) {
                constexpr int STRIDE = TILE_GROUPS * 128;
                float* sums = (float*)(smem_raw + (sums_of_others - (u32)__cvta_generic_to_shared(smem_raw))) +
                              threadIdx.x % STRIDE;
                if (group > 0)
#pragma unroll
                    for (int i = 0; i < BN / 2; ++i) sums[((group - 1) * BN / 2 + i) * STRIDE] = acc[i];
                named_sync(1, N_CONSUMERS * 128);
                if (group == 0)
#pragma unroll
                    for (int i = 0; i < (K_GROUPS - 1) * BN / 2; ++i) acc[i % (BN / 2)] += sums[i * STRIDE];
                named_sync(2, N_CONSUMERS * 128);
                if (group > 0) continue;
            }
            int w_row, x_row;
            share.rows_of(tile, w_row, x_row);
            const Result result(out, share, x_row, n_out, n_rows);
            const int row = w_row + warp_row;
            const int end = min(result.width, GATED ? (w_row + TILE_ROWS) / 2 : w_row + TILE_ROWS);
            store_tile(acc, result, (GATED ? row / 2 : row) + lane / 4, end);
        }
    }
}

#endif
