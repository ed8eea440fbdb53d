// One page of decode attention, by one warp, entirely in registers: S^T = K Q^T and O^T = V^T P^T by mma.m16n8k16 with
// up to 8 query heads of a kv head as the columns. Keys and values have 12 bits (packed_kv.cuh), of which a few
// integer instructions make fragments. The order of head dimensions within a dot product is free, so a lane's 16-byte
// loads of K are A fragments as they are, with Q loaded in the same order; V's fragments need pairs of tokens, which
// one byte permutation a register makes.
//
// HEAD_DIM and GROUP (query heads of a kv head) are macros of the source that includes this.
#pragma once
#include "packed_kv.cuh"

#define HEAD_TILES ((GROUP + 7) / 8)
#define HEADS (GROUP < 8 ? GROUP : 8)
#define Q_VECS (KV_DIM / 32)    // 16-byte vectors of Q a lane
#define V_REGS (KV_DIM / 16)    // registers of V a lane and token once unpacked, and tiles of 16 head dimensions
#define PAIRS (KV_DIM / 4)      // lanes that rotate a head, two adjacent pairs (d, d + HEAD_DIM / 2) each
#define LOG2_E 1.4426950408889634f

DEVICE int lane_group() { return (threadIdx.x % 32) / 4; }
DEVICE int lane_member() { return threadIdx.x % 4; }

// What a lane holds of one page, packed.
struct Page {
    u32 k_low[2][Q_VECS][2], k_upper[2][Q_VECS];  // tokens g and g + 8
    u32 v_low[4][V_REGS / 4][2], v_upper[4][V_REGS / 4];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9
    u32 scales;  // bytes: of K of tokens g and g + 8, of V of the same
};

// A token's vector, its words in order.
struct __align__(16) PackedRow {
    unsigned char low[KV_DIM];
    u32 upper[KV_DIM / 8];
    u32 scale;
};
struct NewToken {
    PackedRow k, v;
};

// A warp's running softmax: columns are the heads 2t and 2t + 1.
struct Softmax {
    float max[2], sum[2];
    float out[V_REGS][4];

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int c = 0; c < 2; c++) max[c] = -INF, sum[c] = 0.f;
#pragma unroll
        for (int r = 0; r < V_REGS; r++)
#pragma unroll
            for (int c = 0; c < 4; c++) out[r][c] = 0.f;
    }
};

// A page of a kv head in global memory.
struct GlobalBlock {
    const unsigned char* block;

    __device__ __forceinline__ uint4 load_16(int at) const { return load_stream_16(block + at); }
    __device__ __forceinline__ uint2 load_8(int at) const { return load_stream_8(block + at); }
    __device__ __forceinline__ u32 load_4(int at) const { return load_stream_4(block + at); }
};

// Where this lane's parts of a block begin. Tokens 8 further on are as far away in all of them.
struct LaneAt {
    int k_low[Q_VECS / 2], k_upper, v_low, v_upper, scales;

    __device__ __forceinline__ LaneAt() {
        const int token = lane_group(), v_token = 2 * lane_member(), v_word = lane_group() * (KV_DIM / 64);
#pragma unroll
        for (int i = 0; i < Q_VECS / 2; i++) k_low[i] = keep(k_low_at(token, 2 * lane_member() + 8 * i));
        k_upper = keep(k_upper_at(token, 2 * lane_member()));
        v_low = keep(v_low_at(v_token, v_word));
        v_upper = keep(v_upper_at(v_token, v_word));
        scales = keep(SCALES + lane_group() * 4);
    }
    // In a register: the compiler would rather compute it for each page.
    static __device__ __forceinline__ int keep(int x) {
        asm volatile("" : "+r"(x));
        return x;
    }
};

template <class Block> DEVICE void load_k(Page& page, const Block& block, const LaneAt& at) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32* const upper = page.k_upper[half];
#pragma unroll
        for (int i = 0; i < Q_VECS; i += 2) {
            const uint4 x = block.load_16(at.k_low[i / 2] + half * 8 * KV_DIM);
            page.k_low[half][i][0] = x.x, page.k_low[half][i][1] = x.y;
            page.k_low[half][i + 1][0] = x.z, page.k_low[half][i + 1][1] = x.w;
        }
        if constexpr (Q_VECS == 4) {
            const uint4 x = block.load_16(at.k_upper + half * 4 * KV_DIM);
            upper[0] = x.x, upper[1] = x.y, upper[2] = x.z, upper[3] = x.w;
        } else {
            const uint2 x = block.load_8(at.k_upper + half * 4 * KV_DIM);
            upper[0] = x.x, upper[1] = x.y;
        }
    }
    page.scales = block.load_4(at.scales);
}

template <class Block> DEVICE void load_v(Page& page, const Block& block, const LaneAt& at) {
    auto& low = page.v_low;
    auto& upper = page.v_upper;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const int low_at = at.v_low + i * 4 * KV_DIM, upper_at = at.v_upper + i * 2 * KV_DIM;
        const uint4 x = block.load_16(low_at);
        low[i][0][0] = x.x, low[i][0][1] = x.y;
        if constexpr (KV_DIM == 128) {
            const uint4 y = block.load_16(low_at + KV_DIM), u = block.load_16(upper_at);
            low[i][1][0] = x.z, low[i][1][1] = x.w;
            low[i + 1][0][0] = y.x, low[i + 1][0][1] = y.y, low[i + 1][1][0] = y.z, low[i + 1][1][1] = y.w;
            upper[i][0] = u.x, upper[i][1] = u.y, upper[i + 1][0] = u.z, upper[i + 1][1] = u.w;
        } else {
            const uint2 u = block.load_8(upper_at);
            low[i + 1][0][0] = x.z, low[i + 1][0][1] = x.w;
            upper[i][0] = u.x, upper[i + 1][0] = u.y;
        }
    }
}

// First of the eight head dimensions of vector i of a lane's Q, and those of register r of its V (its low half).
DEVICE int q_dim(int i) { return 16 * (lane_member() + i / 2 * 4) + i % 2 * 8; }
DEVICE int v_dim(int r) { return lane_group() * (KV_DIM / 8) + 2 * r; }

// A lane's Q of one head, scaled for packed K.
DEVICE void load_query(uint4 (&q)[Q_VECS], const bf16* head) {
    const __nv_bfloat162 unbias = __float2bfloat162_rn(UNBIAS);
    const auto scaled = [&](u32 pair) {
        const __nv_bfloat162 x = __hmul2(*(const __nv_bfloat162*)&pair, unbias);
        return *(const u32*)&x;
    };
#pragma unroll
    for (int i = 0; i < Q_VECS; i++) {
        q[i] = make_uint4(0, 0, 0, 0);
        if (!head || q_dim(i) >= HEAD_DIM) continue;
        const uint4 x = *(const uint4*)(head + q_dim(i));
        q[i] = make_uint4(scaled(x.x), scaled(x.y), scaled(x.z), scaled(x.w));
    }
}

// Puts the new token's K, which is row `row` of the page, and the scales of both its vectors into the registers.
DEVICE void insert_new_k(Page& page, const NewToken& token, int row) {
    if (lane_group() != row % 8) return;
    const int half = row / 8;
#pragma unroll
    for (int i = 0; i < Q_VECS; i++) {
        const uint2 low = *(const uint2*)&token.k.low[q_dim(i)];
        const u32 upper = token.k.upper[q_dim(i) / 8];
        if (half == 0) page.k_low[0][i][0] = low.x, page.k_low[0][i][1] = low.y, page.k_upper[0][i] = upper;
        else page.k_low[1][i][0] = low.x, page.k_low[1][i][1] = low.y, page.k_upper[1][i] = upper;
    }
    const u32 scales = (token.k.scale | token.v.scale << 16) << half * 8;
    page.scales = (page.scales & ~(0x00ff00ffu << half * 8)) | scales;
}
// The same for its V. (Rows after it have probabilities of 0, and no packed number is a NaN.)
DEVICE void insert_new_v(Page& page, const NewToken& token, int row) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (lane_member() * 2 + (i & 1) + (i >> 1) * 8 != row) continue;
#pragma unroll
        for (int w = 0; w < V_REGS / 4; w++) {
            const uint2 low = *(const uint2*)&token.v.low[v_dim(4 * w)];
            page.v_low[i][w][0] = low.x, page.v_low[i][w][1] = low.y;
            page.v_upper[i][w] = token.v.upper[v_dim(4 * w) / 8];
        }
    }
}

// Bytes 0 to 3 of `scales` as the factors they stand for.
DEVICE float scale_factor(u32 scales, int byte) {
    const u32 bits = byte == 3 ? scales >> 1 : scales << (23 - 8 * byte);
    return __uint_as_float(bits & 0x7f800000);
}

// Scores of the page's tokens, as P^T fragments, with the running maximum and sum brought up to date. Tokens from
// seen_tokens.x to before seen_tokens.y are seen.
DEVICE void softmax_page(Softmax& state, const Page& page, const uint4 (&q)[Q_VECS], int2 seen_tokens, int page_index,
                         float scale_log2, u32 (&p)[2]) {
    float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < Q_VECS; i++) {
        u32 a[4], b[4];
        unpack_word(a, page.k_low[0][i][0], page.k_low[0][i][1], page.k_upper[0][i]);
        unpack_word(b, page.k_low[1][i][0], page.k_low[1][i][1], page.k_upper[1][i]);
        mma_bf16(even, a[0], b[0], a[1], b[1], q[i].x, q[i].y);
        mma_bf16(odd, a[2], b[2], a[3], b[3], q[i].z, q[i].w);
    }
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; i++) s[i] = (even[i] + odd[i]) * (scale_factor(page.scales, i >> 1) * scale_log2);
    const int first_token = page_index * PAGE;
    if (first_token < seen_tokens.x || first_token + PAGE > seen_tokens.y) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = first_token + lane_group() + (i >> 1) * 8;
            if (token < seen_tokens.x || token >= seen_tokens.y) s[i] = -INF;
        }
    }
    float m[2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
        m[c] = fmaxf(state.max[c], fmaxf(s[c], s[c + 2]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) m[c] = fmaxf(m[c], __shfl_xor_sync(FULL_WARP, m[c], mask));
    }
    // Few pages raise a maximum after the first ones.
    if (__any_sync(FULL_WARP, m[0] > state.max[0] || m[1] > state.max[1])) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const float rescale = exp2_approx(state.max[c] - m[c]);
            state.max[c] = m[c];
            state.sum[c] *= rescale;
#pragma unroll
            for (int r = 0; r < V_REGS; r++) state.out[r][c] *= rescale, state.out[r][c + 2] *= rescale;
        }
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
        s[c] = exp2_approx(s[c] - m[c]);
        s[c + 2] = exp2_approx(s[c + 2] - m[c]);
        state.sum[c] += s[c] + s[c + 2];
    }
    const float v_g = scale_factor(page.scales, 2), v_g8 = scale_factor(page.scales, 3);
    p[0] = transpose_8x8(pack_bf16(s[0] * v_g, s[1] * v_g));
    p[1] = transpose_8x8(pack_bf16(s[2] * v_g8, s[3] * v_g8));
}

DEVICE void accumulate_page(Softmax& state, const Page& page, const u32 (&p)[2]) {
#pragma unroll
    for (int w = 0; w < V_REGS / 4; w++) {
        u32 v[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) unpack_word(v[i], page.v_low[i][w][0], page.v_low[i][w][1], page.v_upper[i][w]);
#pragma unroll
        for (int r = 0; r < 4; r++)
            mma_bf16(state.out[4 * w + r], low_halves(v[0][r], v[1][r]), high_halves(v[0][r], v[1][r]),
                     low_halves(v[2][r], v[3][r]), high_halves(v[2][r], v[3][r]), p[0], p[1]);
    }
}

// Hands a warp's result to `out` [HEADS][HEAD_DIM + 4] and `max_sum` [8] in shared memory.
DEVICE void store_state(Softmax& state, int n_heads, float (*out)[HEAD_DIM + 4], float2* max_sum) {
#pragma unroll
    for (int c = 0; c < 2; c++) {
        int head = lane_member() * 2 + c;
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) state.sum[c] += __shfl_xor_sync(FULL_WARP, state.sum[c], mask);
        if (head >= n_heads) continue;
        if (lane_group() == 0) max_sum[head] = make_float2(state.max[c], state.sum[c]);
#pragma unroll
        for (int r = 0; r < V_REGS; r++)
            if (v_dim(r) < HEAD_DIM) *(float2*)&out[head][v_dim(r)] = make_float2(state.out[r][c], state.out[r][c + 2]);
    }
}

DEVICE u32 add_bias(u32 x, const bf16* bias, int column) {
    if (!bias) return x;
    u32 b = *(const u32*)(bias + column);
    return pack_bf16(bf16_low(x) + bf16_low(b), bf16_high(x) + bf16_high(b));
}

// The pairs (d, d + HEAD_DIM / 2) and (d + 1, ...) of the head at `column` of a row of q, k and v, rotated: .x at d, .y at
// d + HEAD_DIM / 2. cos_sin: the position's row, cosines in the first half; null: not rotated.
DEVICE uint2 rotated_pairs(const bf16* row, const bf16* bias, const float* cos_sin, int column, int d) {
    const u32 a = add_bias(*(const u32*)(row + column + d), bias, column + d);
    const u32 b = add_bias(*(const u32*)(row + column + d + HEAD_DIM / 2), bias, column + d + HEAD_DIM / 2);
    if (!cos_sin) return make_uint2(a, b);
    const float2 c = *(const float2*)(cos_sin + d), s = *(const float2*)(cos_sin + HEAD_DIM / 2 + d);
    return make_uint2(pack_bf16(bf16_low(a) * c.x - bf16_low(b) * s.x, bf16_high(a) * c.y - bf16_high(b) * s.y),
                      pack_bf16(bf16_low(b) * c.x + bf16_low(a) * s.x, bf16_high(b) * c.y + bf16_high(a) * s.y));
}

DEVICE void store_pairs(bf16* to, uint2 pairs, int d) {
    *(u32*)(to + d) = pairs.x;
    *(u32*)(to + d + HEAD_DIM / 2) = pairs.y;
}

// Packs a vector of which each of PAIRS lanes holds the pairs at d = 0, 2, 4, ... and at d + HEAD_DIM / 2.
DEVICE void pack_row(PackedRow& to, uint2 pairs, int d) {
    const bool exists = d < HEAD_DIM / 2;
    const u32 group = PAIRS == 32 ? FULL_WARP : 0xffffu << (threadIdx.x & 16);
    const u32 greatest = exists ? max(greatest_bits(pairs.x), greatest_bits(pairs.y)) : 0;
    const int shift = shift_of(__reduce_max_sync(group, greatest));
    const u32 halves[2] = {shrink(pairs.x, shift), shrink(pairs.y, shift)};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const u32 x = halves[half];
        const int at = d + half * (HEAD_DIM / 2);
        const u32 upper = (x >> 8 & 0xff | x >> 16 & 0xff00) << d % 4 * 8;
        u32 bits = d % 8 < 4 ? join_upper(upper, 0) : join_upper(0, upper);
        bits |= __shfl_xor_sync(group, bits, 1);
        bits |= __shfl_xor_sync(group, bits, 2);
        if (!exists) continue;
        *(unsigned short*)&to.low[at] = x & 0xff | x >> 8 & 0xff00;
        if (d % 8 == 0) to.upper[at / 8] = bits;
    }
    if (d == 0) to.scale = scale_byte(shift);
}

// Writes a packed token to row `row` of a block; by `n_threads` threads, of which this is number `i`.
DEVICE void store_token(unsigned char* block, const NewToken& token, int row, int i, int n_threads) {
    constexpr int WORDS = HEAD_DIM / 8;
    for (; i < 2 * WORDS; i += n_threads) {
        const bool is_v = i >= WORDS;
        const int word = i % WORDS;
        const PackedRow& from = is_v ? token.v : token.k;
        *(uint2*)(block + low_at(row, word, is_v)) = *(const uint2*)&from.low[word * 8];
        *(u32*)(block + upper_at(row, word, is_v)) = from.upper[word];
        if (word == 0) block[scale_at(row, is_v)] = from.scale;
    }
}

// Adds part `o` of a softmax with maximum and sum `part` to (acc, sum), both relative to maximum `m`.
DEVICE void add_part(float4& acc, float& sum, float4 o, float2 part, float m) {
    const float w = exp2_approx(part.x - m);
    sum += w * part.y;
    acc.x += w * o.x, acc.y += w * o.y, acc.z += w * o.z, acc.w += w * o.w;
}
