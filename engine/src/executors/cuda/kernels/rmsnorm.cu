// variant: rmsnorm BLOCK=256
// variant: rmsnorm-wide BLOCK=512 CHUNKS=1
// variant: rmsnorm-small BLOCK=128 CHUNKS=2
// variant: rmsnorm-whole BLOCK=256 CHUNKS=2 MAX_PARTS=0
//
// RMSNorm (Zhang and Sennrich 2019): h[i, :] = bf16(v / sqrt(mean(v^2) + eps) * w) with v = x[r, :] + the sum of
// parts[p, r, :], r = rows[i] or i.
//   x       float32 [T, hidden]: the residual stream
//   parts   float32 [n_parts, T, hidden], part_stride numbers apart: what a product left to be added
//   x_out   v goes here, or null
//   w       bf16 [hidden], h bf16 [grid, hidden]; hidden a multiple of 8, at most BLOCK * CHUNKS * 8
//   rows    int32 [grid] or null: gathers the rows that lm_head needs
// Grid: one block per output row; block BLOCK. The row stays in registers, so everything is read once.
#include "common.cuh"

#ifndef BLOCK
#define BLOCK 256
#endif
#ifndef CHUNKS
#define CHUNKS 4  // 8-element chunks a thread may hold
#endif
#ifndef MAX_PARTS
#define MAX_PARTS 4  // read at once; more come one by one. 0: there are none
#endif

extern "C" __global__ void __launch_bounds__(BLOCK)
rmsnorm(const float* x, const float* parts, int n_parts, long long part_stride, float* x_out,
        const bf16* w, bf16* h, int hidden, float eps, const int* rows) {
    PDL_TRIGGER();
    // Between two products only this kernel runs, and it is all latency: so every load that does not need another's
    // result is under way at once, the weights' before the kernel ahead has ended.
    bf16x8 weights[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * BLOCK + threadIdx.x) * 8;
        weights[c] = i < hidden ? load_once(w + i) : make_uint4(0, 0, 0, 0);
    }
    PDL_WAIT();
    const long long row = rows ? rows[blockIdx.x] : blockIdx.x;
    bf16* to = h + (long long)blockIdx.x * hidden;

    float v[CHUNKS][8] = {};
    float part[CHUNKS][MAX_PARTS > 0 ? MAX_PARTS : 1][8] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * BLOCK + threadIdx.x) * 8;
        if (i >= hidden) continue;
        load_f32x8(x + row * hidden + i, v[c]);
#pragma unroll
        for (int p = 0; p < MAX_PARTS; ++p)
            if (p < n_parts) load_f32x8(parts + p * part_stride + row * hidden + i, part[c][p]);
    }
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * BLOCK + threadIdx.x) * 8;
        if (i >= hidden) continue;
#pragma unroll
        for (int p = 0; p < MAX_PARTS; ++p)
#pragma unroll
            for (int j = 0; j < 8; ++j) v[c][j] += part[c][p][j];
        for (int p = MAX_PARTS; MAX_PARTS > 0 && p < n_parts; ++p) {
            float more[8];
            load_f32x8(parts + p * part_stride + row * hidden + i, more);
#pragma unroll
            for (int j = 0; j < 8; ++j) v[c][j] += more[j];
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) squares += v[c][j] * v[c][j];
    }
    const float scale = rsqrtf(block_sum<BLOCK>(squares) / hidden + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        const int i = (c * BLOCK + threadIdx.x) * 8;
        if (i >= hidden) continue;
        float weight[8];
        unpack(weights[c], weight);
#pragma unroll
        for (int j = 0; j < 8; ++j) weight[j] *= v[c][j] * scale;
        store_bf16x8(to + i, pack(weight));
    }
    // The next product does not read these.
    if (x_out)
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            const int i = (c * BLOCK + threadIdx.x) * 8;
            if (i < hidden) store_f32x8(x_out + row * hidden + i, v[c]);
        }
}
