// variant: qwen2-57b-gate_up-8 GATED=1 K=3584 TOP_K=8 TILE_T=8 STAGES=6
// variant: qwen2-57b-down-8 K=2560 TOP_K=8 TILE_T=8 STAGES=6
// variant: qwen2-57b-gate_up-32 GATED=1 K=3584 TOP_K=8 TILE_T=32 STAGES=5
// variant: qwen2-57b-down-32 K=2560 TOP_K=8 TILE_T=32 STAGES=5
// variant: qwen2-57b-gate_up-128 GATED=1 K=3584 TOP_K=8 TILE_T=128 TILE_W=128 WARPS_T=2 STAGES=3
// variant: qwen2-57b-down-128 K=2560 TOP_K=8 TILE_T=128 TILE_W=128 WARPS_T=2 STAGES=3
// variant: tiny-gate_up-8 GATED=1 K=72 TOP_K=2 TILE_T=8 STAGES=6
//
// The products of a mixture of experts: rows of tokens that go to the same expert with that expert's weights. A block
// takes TILE_W weight rows and up to TILE_T rows of tokens, a tile of moe_group's; it looks up whose they are, so the
// host need not know. With few tokens an expert, the time is that of reading the weights of the experts that have any.
//   GATED  act bf16 [R, n_out] = silu(g) * u, (g, u) = x[token] W^T; x bf16 [T, K], W [EXPERTS, 2 n_out, K]: gate, then up
//   else   out bf16 [R, n_out] = weight * (x[r] W^T); x bf16 [R, K], W bf16 [EXPERTS, n_out, K]
// Row r is that of routes[r], an index of experts and weights [T, TOP_K]; token = routes[r] / TOP_K. R = T * TOP_K.
//
// Products run on the tensor cores (m16n8k16): weights are the 16-row operand, tokens the 8 columns. Both stream through
// a ring of STAGES slots by cp.async, 64 of K in a slot: rows of 128 bytes whose 16-byte chunks are permuted by the row,
// which keeps ldmatrix free of bank conflicts. A row's sums have the same order in every tile.
//
// Grid: (ceil(2 n_out or n_out / TILE_W), most tiles); block: WARPS_W * WARPS_T * 32.
// Dynamic shared memory in bytes: STAGES * (TILE_W + TILE_T) * 128. K and n_out: multiples of 8.
#include "common.cuh"

#ifndef GATED
#define GATED 0
#endif
#ifndef TILE_W
#define TILE_W 64
#endif
#ifndef WARPS_W
#define WARPS_W 4
#endif
#ifndef WARPS_T
#define WARPS_T 1
#endif

constexpr int THREADS = WARPS_W * WARPS_T * 32;
constexpr int W_TILES = TILE_W / WARPS_W / 16;  // 16-row tiles of a warp
constexpr int T_TILES = TILE_T / WARPS_T / 8;   // 8-token tiles of a warp
constexpr int STEPS = (K + 63) / 64;
constexpr int STAGE_BYTES = (TILE_W + TILE_T) * 128;
constexpr int LOAD_ROWS = THREADS / 8;  // rows that all threads load at once, a chunk each
constexpr int W_LOADS = TILE_W / LOAD_ROWS;
constexpr int T_LOADS = (TILE_T + LOAD_ROWS - 1) / LOAD_ROWS;
constexpr int OUT_W = GATED ? TILE_W / 2 : TILE_W;  // columns of the block's results
constexpr int OUT_STRIDE = OUT_W + 8;               // in shared memory, free of bank conflicts
static_assert(K % 8 == 0 && STAGES >= 2 && TILE_W % LOAD_ROWS == 0, "see the header");
static_assert(W_TILES >= 1 && (T_TILES == 1 || T_TILES % 2 == 0), "fragments of tokens come in pairs");
static_assert(TILE_T * OUT_STRIDE * 2 <= STAGES * STAGE_BYTES, "results fit where the ring was");

__device__ __forceinline__ void copy16(unsigned to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(unsigned address, unsigned& a, unsigned& b, unsigned& c, unsigned& d) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(unsigned address, unsigned& a, unsigned& b) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(a), "=r"(b) : "r"(address) : "memory");
}

__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Address of 16-byte chunk `chunk` of row `row`.
__device__ __forceinline__ unsigned at(unsigned base, int row, int chunk) {
    return base + row * 128 + ((chunk ^ (row & 7)) << 4);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
moe_gemm(const bf16* x, const bf16* w, bf16* out, const int4* tiles, const int* n_tiles, const int* routes,
         const float* weights, int n_out) {
    PDL_TRIGGER();
    PDL_WAIT();
    if ((int)blockIdx.y >= *n_tiles) return;
    extern __shared__ __align__(128) unsigned char shared[];
    const int4 tile = tiles[blockIdx.y];
    const int expert = tile.x, first = tile.y, n_rows = min(tile.z - tile.y, TILE_T);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunk = threadIdx.x % 8, load_row = threadIdx.x / 8;
    const unsigned ring = (unsigned)__cvta_generic_to_shared(shared);

    // This thread's chunk of the rows that it loads.
    const bf16* weight_rows[W_LOADS];
    bool weight_valid[W_LOADS];
#pragma unroll
    for (int i = 0; i < W_LOADS; ++i) {
        const int r = i * LOAD_ROWS + load_row;
        // GATED: eight gate rows, then their eight up rows, in every sixteen.
        const int column = GATED ? blockIdx.x * OUT_W + r / 16 * 8 + r % 8 : blockIdx.x * TILE_W + r;
        const int row = GATED && r % 16 >= 8 ? n_out + column : column;
        weight_valid[i] = column < n_out;
        weight_rows[i] = w + ((long long)expert * (GATED ? 2 : 1) * n_out + (weight_valid[i] ? row : 0)) * K + chunk * 8;
    }
    const bf16* token_rows[T_LOADS];
    bool token_valid[T_LOADS];
#pragma unroll
    for (int i = 0; i < T_LOADS; ++i) {
        const int r = i * LOAD_ROWS + load_row;
        token_valid[i] = r < n_rows;
        const int row = first + (token_valid[i] ? r : 0);
        token_rows[i] = x + (long long)(GATED ? routes[row] / TOP_K : row) * K + chunk * 8;
    }
    const auto load = [&](int step) {
        if (step < STEPS) {
            const unsigned stage = ring + step % STAGES * STAGE_BYTES;
            const int k = step * 64;
            const bool in_k = K % 64 == 0 || k + chunk * 8 < K;
#pragma unroll
            for (int i = 0; i < W_LOADS; ++i) {
                const bool valid = weight_valid[i] && in_k;
                copy16(at(stage, i * LOAD_ROWS + load_row, chunk), weight_rows[i] + (valid ? k : 0), valid);
            }
#pragma unroll
            for (int i = 0; i < T_LOADS; ++i) {
                if (TILE_T % LOAD_ROWS != 0 && i * LOAD_ROWS + load_row >= TILE_T) continue;
                const bool valid = token_valid[i] && in_k;
                copy16(at(stage, TILE_W + i * LOAD_ROWS + load_row, chunk), token_rows[i] + (valid ? k : 0), valid);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    const int first_w = warp / WARPS_T * W_TILES * 16, first_t = TILE_W + warp % WARPS_T * T_TILES * 8;
    float sums[W_TILES][T_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) load(step);
    for (int step = 0; step < STEPS; ++step) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();  // the slot is whole, and the one before it is read
        load(step + STAGES - 1);
        const unsigned stage = ring + step % STAGES * STAGE_BYTES;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            unsigned a[W_TILES][4], b[T_TILES][2];
#pragma unroll
            for (int i = 0; i < W_TILES; ++i)
                ldmatrix_x4(at(stage, first_w + i * 16 + lane % 16, k * 2 + lane / 16), a[i][0], a[i][1], a[i][2],
                            a[i][3]);
            if constexpr (T_TILES == 1) {
                ldmatrix_x2(at(stage, first_t + lane % 8, k * 2 + lane / 8 % 2), b[0][0], b[0][1]);
            } else {
#pragma unroll
                for (int j = 0; j + 1 < T_TILES; j += 2)
                    ldmatrix_x4(at(stage, first_t + j * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2), b[j][0],
                                b[j][1], b[j + 1][0], b[j + 1][1]);
            }
#pragma unroll
            for (int i = 0; i < W_TILES; ++i)
#pragma unroll
                for (int j = 0; j < T_TILES; ++j) mma(sums[i][j], a[i], b[j][0], b[j][1]);
        }
    }

    // Results go through shared memory, so that rows are stored whole.
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    bf16* results = reinterpret_cast<bf16*>(shared);
#pragma unroll
    for (int j = 0; j < T_TILES; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int token = first_t - TILE_W + j * 8 + lane % 4 * 2 + c;
            const float scale = GATED || token >= n_rows ? 1.0f : weights[routes[first + token]];
#pragma unroll
            for (int i = 0; i < W_TILES; ++i) {
                // Rows lane / 4 and 8 more of the sixteen.
                const float low = sums[i][j][c], high = sums[i][j][c + 2];
                bf16* to = results + token * OUT_STRIDE;
                if (GATED) {
                    to[first_w / 2 + i * 8 + lane / 4] = __float2bfloat16(silu(low) * high);
                } else {
                    to[first_w + i * 16 + lane / 4] = __float2bfloat16(low * scale);
                    to[first_w + i * 16 + lane / 4 + 8] = __float2bfloat16(high * scale);
                }
            }
        }
    __syncthreads();
    const int first_column = blockIdx.x * OUT_W;
    for (int i = threadIdx.x; i < n_rows * (OUT_W / 8); i += THREADS) {
        const int token = i / (OUT_W / 8), column = i % (OUT_W / 8) * 8;
        if (first_column + column < n_out)
            store_bf16x8(out + (long long)(first + token) * n_out + first_column + column,
                         load_bf16x8(results + token * OUT_STRIDE + column));
    }
}
