// variant: gather
//
// Brings some rows of two matrices to their front, in place: row rows[i] becomes row i.
//   rows   int32 [n]   rising
//   x      float32 [*, hidden]   hidden a multiple of 4
//   y      bf16 [*, width]       width a multiple of 8
// Each thread moves one 16-byte column. rows[i] >= i, so a row that is written was read before, or is not wanted.
// Grid ceil((hidden / 4 + width / 8) / blockDim.x).
#include "common.cuh"

constexpr int BATCH = 8;  // rows on their way at a time

extern "C" __global__ void gather_rows(const int* rows, int n, float* x, int hidden, bf16* y, int width) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int column = blockIdx.x * blockDim.x + threadIdx.x, n_x = hidden / 4, n_y = width / 8;
    if (column >= n_x + n_y) return;
    uint4* const base = column < n_x ? (uint4*)x + column : (uint4*)y + column - n_x;
    const long long stride = column < n_x ? n_x : n_y;
    int first = 0;
    while (first < n && rows[first] == first) ++first;
    for (; first < n; first += BATCH) {
        uint4 moved[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i < n) moved[i] = base[rows[first + i] * stride];
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (first + i < n) base[(first + i) * stride] = moved[i];
    }
}
