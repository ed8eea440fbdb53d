// Tiles of products whose weights stream through shared memory, for Hopper: which block computes which, the copy of a
// tile of activations, and the way of results to global memory. BN, TILE_ROWS and OUTPUT are macros of the sources that
// include this: columns (rows of activations) and rows of weights of a tile, and what becomes of the results.
//   OUTPUT 0: bf16 [n_rows, n_out]
//          1: float32 [split, n_rows, n_out]: each block's part of the sum over K
//          2: bf16 [n_rows, n_out / 2], silu(gate) * up (GATED: 16 rows of weights are eight of gate, their eight of up)
//          3: added to float32 [n_rows, n_out]
#pragma once
#include "hopper.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr bool GATED = OUTPUT == 2;
#ifndef K_GROUPS
#define K_GROUPS 1  // warpgroups that take the stages of a tile in turns
#endif
#ifndef CLUSTER
#define CLUSTER 1  // blocks of a thread block cluster, which take neighbouring tiles of W and share those of x
#endif
constexpr int TILE_GROUPS = (TILE_ROWS + 63) / 64;  // warpgroups side by side
constexpr int N_CONSUMERS = TILE_GROUPS * K_GROUPS;
#ifndef MANY_REGISTERS
#define MANY_REGISTERS 0  // 1: the warp that loads is one of a whole warpgroup, which leaves its registers to the others
#endif
constexpr int THREADS = N_CONSUMERS * 128 + (MANY_REGISTERS ? 128 : 32);
constexpr int GROUP_X = 8;  // tiles of x that blocks at work at one time share
constexpr int MANY_X = 4;   // the results of more tiles of x do not fit the L2 cache beside x itself
static_assert(BN % 8 == 0 && BN <= 256, "BN must be a multiple of 8 up to 256");
static_assert(TILE_ROWS % 16 == 0 && TILE_ROWS <= 256, "TILE_ROWS must be a multiple of 16 up to 256");

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
    int n_w, n_x;      // tiles of rows of W, CLUSTER of them counted as one, of x

    __device__ __forceinline__ Share(int n_out, int n_rows, int k_blocks) {
        const int split = gridDim.x, part = blockIdx.x;
        n_w = (n_out + TILE_ROWS * CLUSTER - 1) / (TILE_ROWS * CLUSTER);
        n_x = (n_rows + BN - 1) / BN;
        n_tiles = n_w * n_x;
        first_tile = blockIdx.y / CLUSTER;
        tile_step = gridDim.y / CLUSTER;
        first_k = k_blocks * part / split;
        n_k = k_blocks * (part + 1) / split - first_k;
    }
    // First rows of W and of x of a tile. The blocks at work at one time share a few tiles of W and GROUP_X of x, so
    // that both are read from the L2 cache.
    __device__ __forceinline__ void rows_of(int tile, int& w, int& x) const {
        const int group = tile / (n_w * GROUP_X), in_group = tile - group * n_w * GROUP_X;
        const int width = min(GROUP_X, n_x - group * GROUP_X);
        w = (in_group / width * CLUSTER + blockIdx.y % CLUSTER) * TILE_ROWS;
        x = (group * GROUP_X + in_group % width) * BN;
    }
};

// The loading warp's part, by one lane: fills the ring's STAGES slots tile after tile. weights(slot, k, row) and
// activations(slot, k, row) copy a stage's 64 columns from block k of columns and row `row` on.
template <int STAGES, class Weights, class Activations>
DEVICE void fill_ring(const Share& share, unsigned empty, const Weights& weights, const Activations& activations) {
    int slot = 0, phase = 1;  // a fresh barrier lets a wait for parity 1 pass
    int w_row, x_row;
    const auto advance = [&] {
        if (++slot == STAGES) slot = 0, phase ^= 1;
    };
    // The ring's first round: weights before the wait, activations after it.
    const int n_first = share.first_tile < share.n_tiles ? min(STAGES, share.n_k) : 0;
    share.rows_of(share.first_tile, w_row, x_row);
    for (int k = 0; k < n_first; ++k, advance()) weights(slot, share.first_k + k, w_row);
    PDL_WAIT();
    slot = 0, phase = 1;
    for (int k = 0; k < n_first; ++k, advance()) activations(slot, share.first_k + k, x_row);
    for (int tile = share.first_tile; tile < share.n_tiles; tile += share.tile_step) {
        share.rows_of(tile, w_row, x_row);
        for (int k = tile == share.first_tile ? n_first : 0; k < share.n_k; ++k, advance()) {
            mbarrier_wait(empty + 8 * slot, phase);
            weights(slot, share.first_k + k, w_row);
            activations(slot, share.first_k + k, x_row);
        }
    }
    // The other blocks of a cluster release slots of this one, too: it must not end before they have.
    if constexpr (CLUSTER > 1)
        for (int i = 0; i < STAGES; ++i, advance()) mbarrier_wait(empty + 8 * slot, phase);
}

// first, second: two neighbouring columns of this lane's row. Lanes of even rows keep the first column, those of odd
// rows the second, each for both rows: a word to store.
DEVICE unsigned pair_rows(float first, float second, int odd) {
    const float got = __shfl_xor_sync(FULL_WARP, odd ? first : second, 4);
    return odd ? pack_bf16(got, second) : pack_bf16(first, got);
}

// Where a tile's results go.
struct Result {
    void* rows;         // of the tile's first row of x
    int width, n_rows;  // numbers of a row; rows that count
    u64 policy;

    // The results of `n_rows` rows of x, at `out`, from row `x_row` on.
    __device__ __forceinline__ Result(void* out, const Share& share, int x_row, int n_out, int rows_of_x) {
        width = GATED ? n_out / 2 : n_out;
        n_rows = rows_of_x - x_row;
        constexpr int NUMBER_BYTES = OUTPUT == 1 || OUTPUT == 3 ? 4 : 2;
        rows = (unsigned char*)out + (long long)x_row * width * NUMBER_BYTES;
        // Or they would drive out x, which the next round of tiles reads again (docs/log.md).
        policy = share.n_x > MANY_X ? EVICT_FIRST : EVICT_NORMAL;
    }
};

// From registers to global memory. row: of W's results, this lane's first; end: of the tile's.
DEVICE void store_tile(const float (&acc)[BN / 2], const Result& out, int row, int end) {
    const int lane = threadIdx.x % 32, t = lane % 4, odd = lane / 4 % 2, width = out.width;
    constexpr bool PAIRS = OUTPUT == 0 || GATED;
    // One pointer that walks: addresses of all columns at once would not fit beside the accumulators.
    long long at = (long long)(2 * t + (PAIRS ? odd : 0)) * width + row - (PAIRS ? odd : 0);
#pragma unroll
    for (int j = 0; j < BN / 8; ++j, at += 8ll * width) {
        const float* v = acc + 4 * j;
        const int column = 8 * j + 2 * t;
        if constexpr (GATED) {
            const unsigned pair = pair_rows(silu(v[0]) * v[2], silu(v[1]) * v[3], odd);
            if (column + odd < out.n_rows && row < end) store_word((bf16*)out.rows + at, pair, out.policy);
        } else if constexpr (PAIRS) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const unsigned pair = pair_rows(v[2 * h], v[2 * h + 1], odd);
                if (column + odd < out.n_rows && row + 8 * h < end)
                    store_word((bf16*)out.rows + at + 8 * h, pair, out.policy);
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float* to = (float*)out.rows + at + (i % 2 ? width : 0) + i / 2 * 8;
                if (column + i % 2 >= out.n_rows || row + i / 2 * 8 >= end) continue;
                // One addition a number, so the order does not matter; an atomic need not wait for the old value.
                if constexpr (OUTPUT == 3) atomicAdd(to, v[i]);
                else *to = v[i];
            }
        }
        asm volatile("" : "+l"(at));
    }
}

#endif
