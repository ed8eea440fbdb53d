// Keys and values in 12 bits each: sign, four bits of exponent, seven of mantissa, and one shift for a token's vector.
//
// Attention of long contexts is the reading of its cache, and bf16's eight bits of exponent say little: within one
// head's vector of one token, what is 2^14 times smaller than the greatest does not move a sum of float32. So a vector
// is kept divided by 2^shift, where its greatest exponent becomes 15, the highest of four bits: numbers to 2^-14 of the
// greatest keep all bits of their bf16, smaller ones are rounded as subnormals, by 2^-22 of the greatest at most. As bf16 with
// the upper exponent bits zero these are what tensor cores multiply; the shift is taken back where scores and
// probabilities are float32 anyway. Numbers must be smaller than 2^79.
//
// A page of a kv head is one block of KV_BLOCK bytes, in the order in which the lanes of a warp (g = lane / 4,
// t = lane % 4) read it as A of mma.m16n8k16, 16 bytes at a time and on different banks. Head dimensions are padded to
// KV_DIM. A word is eight of them: eight lower bytes (of their bf16), and 32 bits with the upper halves of their bits.
//   K_LOW, K_UPPER  K, by token; lane t holds the words 2 (t + 4 c) and 2 (t + 4 c) + 1
//   V_LOW, V_UPPER  V, by token, or by pair of tokens; lane g holds KV_DIM / 8 dimensions from g * KV_DIM / 8 on
//   SCALES          [8][4] bytes: of K of tokens g and g + 8, of V of the same; shift + 63, the exponent of 2^(shift - 64)
//
// HEAD_DIM is a macro of the source that includes this.
#pragma once
#include "attention.cuh"

constexpr int KV_DIM = HEAD_DIM <= 64 ? 64 : 128;
constexpr int K_LOW = 0, K_UPPER = PAGE * KV_DIM, V_LOW = K_UPPER + PAGE * KV_DIM / 2, V_UPPER = V_LOW + PAGE * KV_DIM,
              SCALES = V_UPPER + PAGE * KV_DIM / 2;
constexpr int KV_BLOCK = SCALES + 128;  // whole lines of 128 bytes
static_assert(HEAD_DIM <= 128 && HEAD_DIM % 16 == 0, "heads of up to 128 dimensions");

// What packed numbers are short of after the factor of their scale: queries and outputs are multiplied by it.
constexpr float UNBIAS = 0x1p64f;
constexpr int BIAS_EXPONENT = 64;
constexpr int TOP_EXPONENT = 15, MAX_SHIFT = 190;

// Where the lower bytes and the upper bits of a word of `token` begin in a block.
DEVICE int k_low_at(int token, int word) {
    const int chunk = word / 2 ^ (KV_DIM == 128 ? (token & 1) * 4 : 0);
    return K_LOW + token * KV_DIM + chunk * 16 + word % 2 * 8;
}
DEVICE int k_upper_at(int token, int word) {
    const int chunk = word / 2;
    return K_UPPER + token * (KV_DIM / 2) + chunk % 4 * (KV_DIM / 8) + chunk / 4 * 8 + word % 2 * 4;
}
// In rows of 128 bytes, one for each lane g of each token (V_LOW of 128 dimensions) or pair of tokens.
DEVICE int v_low_at(int token, int word) {
    return KV_DIM == 128 ? V_LOW + token * 128 + (word / 2 ^ (token & 6)) * 16 + word % 2 * 8
                         : V_LOW + token / 2 * 128 + (word ^ (token & 6)) * 16 + token % 2 * 8;
}
DEVICE int v_upper_at(int token, int word) {
    return KV_DIM == 128 ? V_UPPER + token / 2 * 128 + (word / 2 ^ (token & 6)) * 16 + token % 2 * 8 + word % 2 * 4
                         : V_UPPER + token / 2 * 64 + (word ^ (token & 6)) * 8 + token % 2 * 4;
}
DEVICE int scale_at(int token, bool is_v) { return SCALES + token % 8 * 4 + is_v * 2 + token / 8; }

// Where a word of keys or of values begins.
DEVICE int low_at(int token, int word, bool is_v) { return is_v ? v_low_at(token, word) : k_low_at(token, word); }
DEVICE int upper_at(int token, int word, bool is_v) { return is_v ? v_upper_at(token, word) : k_upper_at(token, word); }

// The shift of a vector whose greatest magnitude has these bits.
DEVICE int shift_of(u32 greatest) { return min(max((int)(greatest >> 7) - TOP_EXPONENT, 0), MAX_SHIFT); }
DEVICE u32 scale_byte(int shift) { return shift + 127 - BIAS_EXPONENT; }

// The greater of the magnitudes of both halves, as bits.
DEVICE u32 greatest_bits(u32 pair) { return max(pair & 0x7fff, pair >> 16 & 0x7fff); }

// Two bf16 divided by 2^shift, of which 12 bits each are left.
DEVICE u32 shrink(u32 pair, int shift) {
    const float up = __uint_as_float((127 + BIAS_EXPONENT - shift) << 23);
    return pack_bf16(bf16_low(pair) * up * (1 / UNBIAS), bf16_high(pair) * up * (1 / UNBIAS)) & 0x87ff87ff;
}

// Upper bytes of four and of the next four numbers to the 32 bits of a word, and back: a byte of `a` is sCCC in bits 7, 2, 1,
// 0; those of `b` fill the gaps when they are rotated by four.
DEVICE u32 join_upper(u32 a, u32 b) { return a | __funnelshift_r(b, b, 4); }
DEVICE uint2 split_upper(u32 joined) {
    return make_uint2(joined & 0x87878787, __funnelshift_l(joined, joined, 4) & 0x87878787);
}

// A word: eight shrunk numbers to their lower bytes and upper bits, and back.
DEVICE uint2 low_bytes(const u32 (&x)[4]) {
    return make_uint2(permute(x[0], x[1], 0x6420), permute(x[2], x[3], 0x6420));
}
DEVICE u32 upper_bits(const u32 (&x)[4]) {
    return join_upper(permute(x[0], x[1], 0x7531), permute(x[2], x[3], 0x7531));
}
DEVICE void unpack_word(u32 (&x)[4], u32 low_a, u32 low_b, u32 upper) {
    const uint2 u = split_upper(upper);
    x[0] = permute(low_a, u.x, 0x5140), x[1] = permute(low_a, u.x, 0x7362);
    x[2] = permute(low_b, u.y, 0x5140), x[3] = permute(low_b, u.y, 0x7362);
}
