// variant: llama HEAD_DIM=128
// variant: qwen2 HEAD_DIM=64
// variant: phi HEAD_DIM=96
// variant: qwen3 HEAD_DIM=128 QK_NORM=1
// variant: tiny-normed HEAD_DIM=96 QK_NORM=1
//
// Rotary position embedding (Su et al. 2021; rotate-half pairs i and i + HEAD_DIM/2) and the KV cache write.
// Adds the bias to q, k and v; with QK_NORM normalises each q and k head by RMSNorm; rotates q in place; rotates k and
// writes k and v to the paged cache, packed (k and v in qkv stay as they were).
//   qkv          bf16 [T, (n_q + 2 n_kv) * HEAD_DIM]: q heads, k heads, v heads
//   bias         bf16 [(n_q + 2 n_kv) * HEAD_DIM] or null
//   cos_sin      float32 [max_position, HEAD_DIM]: HEAD_DIM/2 cosines, then HEAD_DIM/2 sines
//   positions    int32 [T]; slot_mapping int32 [T]: page * 16 + offset, or -1: a padded row, nothing is written
//   cache        bytes [n_pages, n_kv, KV_BLOCK] (packed_kv.cuh)
//   q_norm, k_norm   bf16 [HEAD_DIM], eps: read with QK_NORM only (Qwen3)
// A thread holds 8 elements of a head's lower half and the 8 they pair with. LANES threads a head, the last ones idle
// where HEAD_DIM / 16 is no power of two. Grid ceil(T * (n_q + 2 n_kv) * LANES / blockDim.x), block a multiple of 32.
#include "packed_kv.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int LANES = HEAD_DIM > 64 ? (HEAD_DIM > 128 ? 16 : 8) : 4;
static_assert(HEAD_DIM % 16 == 0 && HALF <= LANES * 8, "a head is LANES pairs of 16-byte chunks");

// Writes a word of a token, already shrunk.
__device__ __forceinline__ void store_word(unsigned char* block, int token, int word, bool is_v, const u32 (&x)[4]) {
    *(uint2*)(block + low_at(token, word, is_v)) = low_bytes(x);
    *(u32*)(block + upper_at(token, word, is_v)) = upper_bits(x);
}

extern "C" __global__ void rope_kv_write(bf16* qkv, const bf16* bias, const float* cos_sin, const int* positions,
                                         const int* slot_mapping, unsigned char* cache, int n_tokens, int n_q, int n_kv,
                                         const bf16* q_norm, const bf16* k_norm, float eps) {
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
    if (active && !is_v) {
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
    const bf16x8 packed_low = pack(low), packed_high = pack(high);
    u32 x[2][4] = {{packed_low.x, packed_low.y, packed_low.z, packed_low.w},
                   {packed_high.x, packed_high.y, packed_high.z, packed_high.w}};
    u32 greatest = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) greatest = max(greatest, max(greatest_bits(x[0][j]), greatest_bits(x[1][j])));
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2)
        greatest = max(greatest, __shfl_xor_sync(FULL_WARP, greatest, offset));
    if (!active) return;
    if (is_q) {
        store_bf16x8(source, packed_low);
        store_bf16x8(source + HALF, packed_high);
        return;
    }
    const int shift = shift_of(greatest), token = slot % PAGE;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[0][j] = shrink(x[0][j], shift), x[1][j] = shrink(x[1][j], shift);
    const int kv_head = head - n_q - (is_v ? n_kv : 0);
    unsigned char* block = cache + ((long long)(slot / PAGE) * n_kv + kv_head) * KV_BLOCK;
    store_word(block, token, i / 8, is_v, x[0]);
    store_word(block, token, (i + HALF) / 8, is_v, x[1]);
    if (i == 0) block[scale_at(token, is_v)] = scale_byte(shift);
}
