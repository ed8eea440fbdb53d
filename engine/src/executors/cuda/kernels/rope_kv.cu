// variant: llama HEAD_DIM=128
// variant: qwen2 HEAD_DIM=64
// variant: phi HEAD_DIM=96
// variant: qwen3 HEAD_DIM=128 QK_NORM=1
// variant: tiny-normed HEAD_DIM=96 QK_NORM=1
//
// Rotary position embedding (Su et al. 2021; rotate-half pairs i and i + HEAD_DIM/2) and the KV cache write.
// Adds the bias to q, k and v; with QK_NORM normalises each q and k head by RMSNorm; rotates q in place; rotates k and
// writes k and v to the paged cache (k and v in qkv stay as they were).
//   qkv          bf16 [T, (n_q + 2 n_kv) * HEAD_DIM]: q heads, k heads, v heads
//   bias         bf16 [(n_q + 2 n_kv) * HEAD_DIM] or null
//   cos_sin      float32 [max_position, HEAD_DIM]: HEAD_DIM/2 cosines, then HEAD_DIM/2 sines
//   positions    int32 [T]; slot_mapping int32 [T]: page * 16 + offset, or -1: a padded row, nothing is written
//   k_cache, v_cache bf16 [n_pages, n_kv, 16, HEAD_DIM]
//   q_norm, k_norm   bf16 [HEAD_DIM], eps: read with QK_NORM only (Qwen3)
// A thread holds 8 elements of a head's lower half and the 8 they pair with. LANES threads a head, the last ones idle
// where HEAD_DIM / 16 is no power of two. Grid ceil(T * (n_q + 2 n_kv) * LANES / blockDim.x), block a multiple of 32.
#include "common.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int LANES = HEAD_DIM > 64 ? (HEAD_DIM > 128 ? 16 : 8) : 4;
static_assert(HEAD_DIM % 16 == 0 && HALF <= LANES * 8, "a head is LANES pairs of 16-byte chunks");

extern "C" __global__ void rope_kv_write(bf16* qkv, const bf16* bias, const float* cos_sin, const int* positions,
                                         const int* slot_mapping, bf16* k_cache, bf16* v_cache, int n_tokens, int n_q,
                                         int n_kv, const bf16* q_norm, const bf16* k_norm, float eps) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int n_heads = n_q + 2 * n_kv;
    const long long item = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    const int i = threadIdx.x % LANES * 8;  // first element of this thread's lower chunk
    const int head = item % n_heads;
    const long long t = item / n_heads;
    const int slot = t < n_tokens ? slot_mapping[t] : -1;
    const bool active = slot >= 0 && i < HALF;
    const bool is_q = head < n_q, is_v = head >= n_q + n_kv;

    float low[8] = {}, high[8] = {};
    bf16* source = qkv + (t * n_heads + head) * HEAD_DIM + i;
    if (active) {
        unpack(load_bf16x8(source), low);
        unpack(load_bf16x8(source + HALF), high);
        if (bias) {
            float b[8];
            unpack(load_bf16x8(bias + head * HEAD_DIM + i), b);
#pragma unroll
            for (int j = 0; j < 8; ++j) low[j] += b[j];
            unpack(load_bf16x8(bias + head * HEAD_DIM + HALF + i), b);
#pragma unroll
            for (int j = 0; j < 8; ++j) high[j] += b[j];
        }
    }
#if QK_NORM
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += low[j] * low[j] + high[j] * high[j];
    const float scale = rsqrtf(warp_sum<LANES>(squares) / HEAD_DIM + eps);
    if (active && !is_v) {
        const bf16* norm = is_q ? q_norm : k_norm;
        float w[8];
        unpack(load_bf16x8(norm + i), w);
#pragma unroll
        for (int j = 0; j < 8; ++j) low[j] *= scale * w[j];
        unpack(load_bf16x8(norm + HALF + i), w);
#pragma unroll
        for (int j = 0; j < 8; ++j) high[j] *= scale * w[j];
    }
#endif
    if (!active) return;
    if (!is_v) {
        const float* angle = cos_sin + (long long)positions[t] * HEAD_DIM + i;
        float cosine[8], sine[8];
        load_f32x8(angle, cosine);
        load_f32x8(angle + HALF, sine);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float a = low[j], b = high[j];
            low[j] = a * cosine[j] - b * sine[j];
            high[j] = b * cosine[j] + a * sine[j];
        }
    }
    bf16* to = source;
    if (!is_q) {
        const int kv_head = head - n_q - (is_v ? n_kv : 0);
        const long long line = ((long long)(slot / PAGE) * n_kv + kv_head) * PAGE + slot % PAGE;
        to = (is_v ? v_cache : k_cache) + line * HEAD_DIM + i;
    }
    store_bf16x8(to, pack(low));
    store_bf16x8(to + HALF, pack(high));
}
