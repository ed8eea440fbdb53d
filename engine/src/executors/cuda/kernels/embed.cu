// variant: embed
//
// Embedding lookup: x[t, :] = float32(table[token(t), :]).
//   token_ids   int32 [T]             >= 0: the token's id; negative -1-slot: take last_tokens[slot], the token that
//                                     an earlier step sampled on the device, so the host need not wait for it
//   last_tokens int32 [slots]
//   table       bf16 [vocab, hidden]  hidden a multiple of 8
//   x           float32 [T, hidden]   the residual stream
// Grid T, block any multiple of 32 (hidden / 8 rounded up, at most 256, is best).
#include "common.cuh"

extern "C" __global__ void embed_gather(const int* token_ids, const int* last_tokens, const bf16* table, float* x,
                                        int hidden) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int entry = token_ids[blockIdx.x];
    const long long token = entry >= 0 ? entry : last_tokens[-1 - entry];
    const bf16* from = table + token * hidden;
    float* to = x + (long long)blockIdx.x * hidden;
    for (int i = threadIdx.x * 8; i < hidden; i += blockDim.x * 8) {
        float f[8];
        unpack(load_once(from + i), f);
        store_f32x8(to + i, f);
    }
}
