// variant: llama-qkv GEMV_NORM=1 K=4096 WARPS=16 STAGES=5
// variant: llama-o GEMV_RESIDUAL=1 K=4096
// variant: llama-gate_up GEMV_GATE_UP=1 K=4096
// variant: llama-down GEMV_RESIDUAL=1 K=14336
// variant: llama-lm_head GEMV_LOGITS=1 K=4096
// variant: qwen2-qkv GEMV_NORM=1 K=896 WARPS_K=2
// variant: qwen2-gate_up GEMV_GATE_UP=1 K=896 WARPS_K=2
// variant: qwen2-down GEMV_RESIDUAL=1 K=4864
// variant: smollm2-qkv GEMV_NORM=1 K=576 WARPS_K=1
// variant: tiny-gate_up GEMV_GATE_UP=1 K=64 WARPS_K=1
//
// Matrix-vector products of the decode step for 1 to 8 * BATCH_TILES rows, bound by the reading of the weights.
// Four entries, each compiled where its macro is set, K (in features, a multiple of 8) being a macro too:
//   GEMV_NORM      gemv_norm      out bf16 [n_rows, N] = rmsnorm(x) W^T + bias  (qkv)
//   GEMV_RESIDUAL  gemv_residual  x float32 [n_rows, N] += in W^T, in bf16 [n_rows, K]  (o, down)
//   GEMV_GATE_UP   gemv_gate_up   act bf16 [n_rows, I] = silu(g) * u, (g, u) = rmsnorm(x) W^T, W [2I, K]: gate, then up
//   GEMV_LOGITS    gemv_logits    logits float32 [n_rows, N] = rmsnorm(x[rows]) W^T  (lm_head)
// W bf16 [N, K], x float32 [*, K], norm weights bf16 [K], bias bf16 [N] or null, rows int32 [n_rows] or null.
//
// A block is persistent: it walks tiles of 16 * ROW_TILES weight rows, blockIdx.x first, then steps of the grid.
// WARPS_K warps share a tile's K; each streams its units (KCHUNKS 16-byte chunks of every row) through a ring of STAGES
// slots in shared memory by cp.async, across tile boundaries, so that loads stay in flight through reductions and
// epilogues and, under dependent launch, fill the ring before the kernel that makes the input has finished.
// Products run on the tensor cores (m16n8k16): weights are the 16-row operand and the batch is the 8 columns, so that
// 1 to 8 rows cost the same. K may be permuted freely as long as both operands agree: a lane takes 16 contiguous bytes
// of a weight row, which serve two mma.
// RMSNorm needs no pass of its own: the operand is bf16(x * norm weight); the sum of squares is gathered on the way and
// 1 / rms, a scalar of the row, is applied to the sums.
//
// Grid: min(tiles, multiprocessors or a small multiple), tiles = ceil(N / (16 * ROW_TILES * WARPS / WARPS_K)).
// Block: WARPS * 32. Dynamic shared memory in bytes:
//   WARPS * (STAGES * ROW_TILES * KCHUNKS * 256 + 32 * BATCH_TILES + 128 * ROW_TILES * n_rows)
// Set the preferred shared-memory carveout to 100 % on this and on every kernel beside it in the step: a multiprocessor
// must drain to change its carveout, which would undo dependent launch.
#include "common.cuh"

#ifndef WARPS
#define WARPS 8
#endif
#ifndef WARPS_K
#define WARPS_K WARPS
#endif
#ifndef STAGES
#define STAGES 6
#endif
#ifndef KCHUNKS
#define KCHUNKS 8
#endif
#ifndef ROW_TILES
#define ROW_TILES 1
#endif
#ifndef BATCH_TILES
#define BATCH_TILES 1
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS (WARPS <= 8 ? 2 : 1)  // two kernels' blocks share a multiprocessor under dependent launch
#endif
#ifndef TRIGGER_AT_START
#define TRIGGER_AT_START 0  // 0: the next kernel may start once all loads of this one are issued
#endif
#ifndef L2_HINT
#define L2_HINT ".L2::256B"
#endif

constexpr int ROWS = 16 * ROW_TILES;
constexpr int STEPS = KCHUNKS / 4;  // a step: 4 chunks of each row, two mma
constexpr int UNIT_K = KCHUNKS * 8;
constexpr int UNITS = (K + UNIT_K - 1) / UNIT_K;
constexpr int WARP_UNITS = (UNITS + WARPS_K - 1) / WARPS_K;  // of each tile
constexpr int UNIT_BYTES = ROWS * KCHUNKS * 16;
constexpr int GROUPS = WARPS / WARPS_K;
constexpr int GROUP_THREADS = WARPS_K * 32;
constexpr int MAX_ROWS = 8 * BATCH_TILES;
// A warp's share of the input stays in registers where it fits; else it is read again for each tile, one unit ahead.
constexpr bool RESIDENT = WARP_UNITS * KCHUNKS * BATCH_TILES <= 64;
static_assert(K % 8 == 0 && WARPS % WARPS_K == 0 && STAGES >= 2, "see the header");
static_assert(KCHUNKS == 8 || KCHUNKS == 16 || KCHUNKS == 32, "a load covers whole 128-byte lines of whole rows");

// The mma column operand of one unit: chunk 4 * step + lane % 4 of batch row 8 * tile + lane / 4.
struct Columns {
    bf16x8 chunk[BATCH_TILES][STEPS];
};

struct PlainInput {
    static constexpr bool NORM = false;
    const bf16* in;

    __device__ const bf16* row(int n) const { return in + (long long)n * K; }
    __device__ void prefetch(int) const {}
    __device__ bf16x8 load(const bf16* row, int k, float&) const { return load_bf16x8(row + k); }
};

struct NormedInput {
    static constexpr bool NORM = true;
    const float* x;
    const bf16* norm;
    float eps;
    const int* rows;

    __device__ const float* row(int n) const { return x + (long long)(rows ? rows[n] : n) * K; }
    // No kernel writes the norm's weights: they may come before the kernel ahead has ended.
    __device__ void prefetch(int unit) const {
        const int k = unit * UNIT_K;
        if (threadIdx.x % 32 == 0 && k < K) asm volatile("prefetch.global.L2 [%0];" ::"l"(norm + k));
    }
    __device__ bf16x8 load(const float* row, int k, float& squares) const {
        float v[8], w[8];
        unpack(load_bf16x8(norm + k), w);
        load_f32x8(row + k, v);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            squares += v[j] * v[j];
            w[j] *= v[j];
        }
        return pack(w);
    }
};

// Reads this lane's part of unit `unit`; adds the squares of what it read to `squares`.
template <class Input, class Row>
__device__ __forceinline__ Columns load_columns(const Input& input, Row (&row)[BATCH_TILES], int unit, int n_rows,
                                                float (&squares)[BATCH_TILES]) {
    const int lane = threadIdx.x % 32;
    Columns columns;
#pragma unroll
    for (int b = 0; b < BATCH_TILES; ++b)
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int k = unit * UNIT_K + (s * 4 + lane % 4) * 8;
            columns.chunk[b][s] = make_uint4(0, 0, 0, 0);
            if (b * 8 + lane / 4 < n_rows && k < K) columns.chunk[b][s] = input.load(row[b], k, squares[b]);
        }
    return columns;
}

__device__ __forceinline__ void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                    unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// One warp's stream of weight units, in tile order. Slot layout: chunk c of row r at (r * KCHUNKS + (c ^ 4 * (r % 2)))
// * 16, which keeps both the row-wise writes and the reads (two rows, four chunks a phase) free of bank conflicts.
template <bool GATED>
struct WeightStream {
    static constexpr int ROWS_PER_LOAD = 32 / KCHUNKS;
    static constexpr int LOADS = ROWS / ROWS_PER_LOAD;

    const bf16* lane_weights;  // this lane's element of tile 0, unit 0, load 0
    long long up_offset;       // GATED: from a gate row to its up row
    unsigned ring;             // shared address of the warp's ring
    int n_out, n_tiles, tile, unit, slot;

    __device__ WeightStream(const bf16* weights, int n_out, int n_tiles, unsigned ring)
        : ring(ring), n_out(n_out), n_tiles(n_tiles), unit(0), slot(0) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        lane_weights = weights + (long long)(lane / KCHUNKS) * K + lane % KCHUNKS * 8;
        up_offset = (long long)(n_out / 2) * K;
        tile = blockIdx.x * GROUPS + warp / WARPS_K;
    }

    // Starts the copy of the next unit, if there is one, and closes a group of copies either way.
    __device__ __forceinline__ void issue() {
        const int u = unit * WARPS_K + threadIdx.x / 32 % WARPS_K;
        if (tile < n_tiles && u < UNITS) {
            const int lane = threadIdx.x % 32, lane_row = lane / KCHUNKS, chunk = lane % KCHUNKS;
            const int first_row = tile * (GATED ? ROWS / 2 : ROWS);
            const int rows_left = (GATED ? n_out / 2 : n_out) - first_row;
            const bool in_k = K % UNIT_K == 0 || u * UNIT_K + chunk * 8 < K;
            const bf16* from = lane_weights + (long long)first_row * K + u * UNIT_K;
            const unsigned to = ring + slot * UNIT_BYTES;
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const int local = i * ROWS_PER_LOAD;  // row in the tile, less lane_row
                const int row = GATED ? local / 16 * 8 + local % 8 : local;
                const bf16* source = from + (long long)row * K + (GATED && local % 16 >= 8 ? up_offset : 0);
                const int r = local + lane_row;
                const unsigned target = to + (r * KCHUNKS + (chunk ^ (r % 2 * 4))) * 16;
                const bool valid = in_k && row + lane_row < rows_left;
                asm volatile("cp.async.cg.shared.global" L2_HINT " [%0], [%1], 16, %2;" ::"r"(target),
                             "l"(valid ? source : lane_weights), "r"(valid ? 16 : 0) : "memory");
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        if (++unit == WARP_UNITS) {
            unit = 0;
            const bool last = tile < n_tiles && tile + (int)gridDim.x * GROUPS >= n_tiles;
            tile += gridDim.x * GROUPS;
            if (last && !TRIGGER_AT_START) PDL_TRIGGER();
        }
    }
};

// The whole kernel. Calls `output.store(row, n, sum, up)` once for each result; `up` is the paired row's sum if GATED.
template <class Input, class Output>
__device__ __forceinline__ void gemv(const bf16* weights, int n_out, int n_rows, const Input& input,
                                     const Output& output) {
    constexpr bool GATED = Output::GATED;
    constexpr int OUT_ROWS = GATED ? ROWS / 2 : ROWS;
    extern __shared__ __align__(128) unsigned char shared[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / WARPS_K, in_group = warp % WARPS_K;
    const int g = lane / 4, t = lane % 4;
    float* const squares_of = reinterpret_cast<float*>(shared + WARPS * STAGES * UNIT_BYTES);  // [WARPS][MAX_ROWS]
    float* const sums_of = squares_of + WARPS * MAX_ROWS;  // [2][WARPS][n_rows][ROWS]
    const unsigned ring = (unsigned)__cvta_generic_to_shared(shared) + warp * STAGES * UNIT_BYTES;

    if (TRIGGER_AT_START) PDL_TRIGGER();
    const int n_tiles = ((GATED ? n_out / 2 : n_out) + OUT_ROWS - 1) / OUT_ROWS;
    WeightStream<GATED> stream(weights, n_out, n_tiles, ring);
    const int first_tile = stream.tile;
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) stream.issue();
    for (int u = in_group; u < UNITS; u += WARPS_K) input.prefetch(u);
    PDL_WAIT();

    decltype(input.row(0)) row[BATCH_TILES];
    float squares[BATCH_TILES] = {};
#pragma unroll
    for (int b = 0; b < BATCH_TILES; ++b) row[b] = input.row(b * 8 + g < n_rows ? b * 8 + g : 0);
    Columns columns[RESIDENT ? WARP_UNITS : 1];
#pragma unroll
    for (int u = 0; u < (RESIDENT ? WARP_UNITS : 1); ++u)
        columns[u] = load_columns(input, row, u * WARPS_K + in_group, n_rows, squares);

    const unsigned lane_source = (g * KCHUNKS + t) * 16;
    const unsigned odd_row = g % 2 * 64;
    int slot = 0, buffer = 0;
    for (int tile = first_tile; tile < n_tiles; tile += gridDim.x * GROUPS) {
        float sum[ROW_TILES][BATCH_TILES][4] = {};
        const auto consume = [&](int unit, const Columns& c) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncwarp();    // the other lanes' copies of this unit have landed too, and the last unit is read
            stream.issue();  // into the slot of the last unit
            if (unit * WARPS_K + in_group < UNITS) {
                const unsigned from = ring + slot * UNIT_BYTES + lane_source;
#pragma unroll
                for (int s = 0; s < STEPS; ++s)
#pragma unroll
                    for (int r = 0; r < ROW_TILES; ++r) {
                        const unsigned at = from + ((s * 64) ^ odd_row) + r * 16 * KCHUNKS * 16;
                        const bf16x8 a = load_shared_16(at), b = load_shared_16(at + 8 * KCHUNKS * 16);
#pragma unroll
                        for (int n = 0; n < BATCH_TILES; ++n) {
                            mma(sum[r][n], a.x, b.x, a.y, b.y, c.chunk[n][s].x, c.chunk[n][s].y);
                            mma(sum[r][n], a.z, b.z, a.w, b.w, c.chunk[n][s].z, c.chunk[n][s].w);
                        }
                    }
            }
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        };
        if constexpr (RESIDENT) {
#pragma unroll
            for (int u = 0; u < WARP_UNITS; ++u) consume(u, columns[u]);
        } else {
#pragma unroll 2
            for (int u = 0; u < WARP_UNITS; ++u) {
                const int next = u + 1 < WARP_UNITS ? u + 1 : 0;
                float more[BATCH_TILES] = {};
                const Columns ahead = load_columns(input, row, next * WARPS_K + in_group, n_rows, more);
                consume(u, columns[0]);
                columns[0] = ahead;
                if (Input::NORM && tile == first_tile && next > 0)
#pragma unroll
                    for (int b = 0; b < BATCH_TILES; ++b) squares[b] += more[b];
            }
        }

        float* const sums = sums_of + (buffer * WARPS + warp) * n_rows * ROWS;
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (int b = 0; b < BATCH_TILES; ++b)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = b * 8 + t * 2 + i % 2;
                    if (n < n_rows) sums[n * ROWS + r * 16 + i / 2 * 8 + g] = sum[r][b][i];
                }
        if (Input::NORM && tile == first_tile)
#pragma unroll
            for (int b = 0; b < BATCH_TILES; ++b) {
                const float quad = warp_sum<4>(squares[b]);
                if (t == 0) squares_of[warp * MAX_ROWS + b * 8 + g] = quad;
            }
        // Two buffers make one barrier a tile enough: a buffer is written again only after the next tile's barrier.
        asm volatile("bar.sync %0, %1;" ::"r"(group), "n"(GROUP_THREADS) : "memory");

        const float* const parts = sums_of + (buffer * WARPS + group * WARPS_K) * n_rows * ROWS;
        for (int i = threadIdx.x % GROUP_THREADS; i < OUT_ROWS * n_rows; i += GROUP_THREADS) {
            const int n = i / OUT_ROWS, r = i % OUT_ROWS;
            const int at = n * ROWS + (GATED ? r / 8 * 16 + r % 8 : r);
            float total = 0.0f, up = 0.0f, square = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS_K; ++w) {
                total += parts[w * n_rows * ROWS + at];
                if (GATED) up += parts[w * n_rows * ROWS + at + 8];
                if (Input::NORM) square += squares_of[(group * WARPS_K + w) * MAX_ROWS + n];
            }
            if constexpr (Input::NORM) {
                const float scale = rsqrtf(square / K + input.eps);
                total *= scale;
                up *= scale;
            }
            const int out_row = tile * OUT_ROWS + r;
            if (out_row < (GATED ? n_out / 2 : n_out)) output.store(out_row, n, total, up);
        }
        buffer ^= 1;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

#define GEMV_KERNEL extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)

#ifdef GEMV_NORM
struct Bf16Output {
    static constexpr bool GATED = false;
    bf16* out;
    const bf16* bias;
    int n_out;
    __device__ void store(int row, int n, float sum, float) const {
        if (bias) sum += __bfloat162float(bias[row]);
        out[(long long)n * n_out + row] = __float2bfloat16_rn(sum);
    }
};

GEMV_KERNEL gemv_norm(const float* x, const bf16* norm, float eps, const bf16* weights, const bf16* bias, bf16* out,
                      int n_out, int n_rows) {
    gemv(weights, n_out, n_rows, NormedInput{x, norm, eps, nullptr}, Bf16Output{out, bias, n_out});
}
#endif

#ifdef GEMV_RESIDUAL
struct ResidualOutput {
    static constexpr bool GATED = false;
    float* x;
    int n_out;
    // One addition an element, so the result does not depend on the order; an atomic need not wait for the old value.
    __device__ void store(int row, int n, float sum, float) const { atomicAdd(x + (long long)n * n_out + row, sum); }
};

GEMV_KERNEL gemv_residual(const bf16* in, const bf16* weights, float* x, int n_out, int n_rows) {
    gemv(weights, n_out, n_rows, PlainInput{in}, ResidualOutput{x, n_out});
}
#endif

#ifdef GEMV_GATE_UP
struct GatedOutput {
    static constexpr bool GATED = true;
    bf16* act;
    int inter;
    __device__ void store(int row, int n, float gate, float up) const {
        act[(long long)n * inter + row] = __float2bfloat16_rn(silu(gate) * up);
    }
};

GEMV_KERNEL gemv_gate_up(const float* x, const bf16* norm, float eps, const bf16* weights, bf16* act, int inter,
                         int n_rows) {
    gemv(weights, 2 * inter, n_rows, NormedInput{x, norm, eps, nullptr}, GatedOutput{act, inter});
}
#endif

#ifdef GEMV_LOGITS
struct LogitsOutput {
    static constexpr bool GATED = false;
    float* logits;
    int n_out;
    __device__ void store(int row, int n, float sum, float) const { logits[(long long)n * n_out + row] = sum; }
};

GEMV_KERNEL gemv_logits(const float* x, const bf16* norm, float eps, const bf16* weights, float* logits, int n_out,
                        const int* rows, int n_rows) {
    gemv(weights, n_out, n_rows, NormedInput{x, norm, eps, rows}, LogitsOutput{logits, n_out});
}
#endif
