// variant: silu_mul
//
// SwiGLU's elementwise half (Shazeer 2020): act[t, i] = bf16(silu(gate_up[t, i]) * gate_up[t, inter + i]).
//   gate_up bf16 [T, 2 * inter], act bf16 [T, inter]; inter a multiple of 8
// Grid (ceil(inter / 8 / blockDim.x), min(T, 65535)); block any multiple of 32 (256).
#include "common.cuh"

extern "C" __global__ void silu_mul(const bf16* gate_up, bf16* act, int n_tokens, int inter) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= inter) return;
    for (long long t = blockIdx.y; t < n_tokens; t += gridDim.y) {
        const bf16* row = gate_up + t * 2 * inter;
        float gate[8], up[8];
        unpack(load_bf16x8(row + i), gate);
        unpack(load_bf16x8(row + inter + i), up);
#pragma unroll
        for (int j = 0; j < 8; ++j) gate[j] = silu(gate[j]) * up[j];
        store_bf16x8(act + t * inter + i, pack(gate));
    }
}
