// One page of decode attention, by one warp, entirely in registers: S^T = K Q^T and O^T = V^T P^T by mma.m16n8k16 with
// up to 8 query heads of a kv head as the columns. The order of head dimensions within a dot product is free, so a
// lane's 16-byte loads of K are used as A fragments as they are, with Q loaded in the same order; V's fragments need
// pairs of tokens, which one byte permutation a register makes.
//
// HEAD_DIM and GROUP (query heads of a kv head) are macros of the source that includes this.
#pragma once
#include "attention.cuh"

#define HEAD_TILES ((GROUP + 7) / 8)
#define HEADS (GROUP < 8 ? GROUP : 8)
#define K_VECS (HEAD_DIM / 32)              // 16-byte loads of K a lane and row
#define V_REGS (HEAD_DIM / 16)              // registers of V a lane and token, and tiles of 16 head dimensions
#define V_VEC (HEAD_DIM % 64 == 0 ? 8 : 4)  // head dimensions a lane loads at a time
#define LOG2_E 1.4426950408889634f

DEVICE int lane_group() { return (threadIdx.x % 32) / 4; }
DEVICE int lane_member() { return threadIdx.x % 4; }

// The K and V fragments of one page.
struct Page {
    uint4 k[2][K_VECS];   // rows g and g + 8
    u32 v[4][V_REGS];     // tokens 2t, 2t + 1, 2t + 8, 2t + 9
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

// A page's K or V in global memory: [16, HEAD_DIM].
struct GlobalRows {
    const bf16* rows;

    __device__ __forceinline__ uint4 load_16(int row, int d) const { return load_stream_16(rows + row * HEAD_DIM + d); }
    __device__ __forceinline__ uint2 load_8(int row, int d) const { return load_stream_8(rows + row * HEAD_DIM + d); }
};

template <class Rows> DEVICE void load_k(Page& page, const Rows& rows) {
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < K_VECS; i++)
            page.k[half][i] = rows.load_16(lane_group() + half * 8, lane_member() * 8 + i * 32);
}

template <class Rows> DEVICE void load_v(Page& page, const Rows& rows) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int token = lane_member() * 2 + (i & 1) + (i >> 1) * 8;
#pragma unroll
        for (int r = 0; r < V_REGS; r += V_VEC / 2) {
            const int d = r / (V_VEC / 2) * 8 * V_VEC + lane_group() * V_VEC;
            if (V_VEC == 8) {
                uint4 x = rows.load_16(token, d);
                page.v[i][r] = x.x, page.v[i][r + 1] = x.y, page.v[i][r + 2] = x.z, page.v[i][r + 3] = x.w;
            } else {
                uint2 x = rows.load_8(token, d);
                page.v[i][r] = x.x, page.v[i][r + 1] = x.y;
            }
        }
    }
}

// The head dimension of register r of a lane's V fragment (its low half).
DEVICE int v_dim(int r) { return r / (V_VEC / 2) * 8 * V_VEC + lane_group() * V_VEC + r % (V_VEC / 2) * 2; }

// Puts the new token, which is row `row` of the page, into the fragments.
DEVICE void insert_new_k(Page& page, const bf16* new_k, int row) {
    if (lane_group() != row % 8) return;
#pragma unroll
    for (int i = 0; i < K_VECS; i++) {
        uint4 k = *(const uint4*)&new_k[lane_member() * 8 + i * 32];
        if (row < 8) page.k[0][i] = k;
        else page.k[1][i] = k;
    }
}
// The same for V, and zeroes the rows after it: 0 * NaN is NaN. new_v may be null: the page has the token already.
DEVICE void insert_new_v(Page& page, const bf16* new_v, int row) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int token = lane_member() * 2 + (i & 1) + (i >> 1) * 8;
#pragma unroll
        for (int r = 0; r < V_REGS; r++) {
            if (token > row) page.v[i][r] = 0;
            else if (new_v && token == row) page.v[i][r] = *(const u32*)&new_v[v_dim(r)];
        }
    }
}

// Scores of the page's tokens, as P^T fragments, with the running maximum and sum brought up to date. Tokens from
// seen_tokens.x to before seen_tokens.y are seen.
DEVICE void softmax_page(Softmax& state, const Page& page, const uint4 (&q)[K_VECS], int2 seen_tokens, int page_index,
                         float scale_log2, u32 (&p)[2]) {
    float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < K_VECS; i++) {
        mma_bf16(even, page.k[0][i].x, page.k[1][i].x, page.k[0][i].y, page.k[1][i].y, q[i].x, q[i].y);
        mma_bf16(odd, page.k[0][i].z, page.k[1][i].z, page.k[0][i].w, page.k[1][i].w, q[i].z, q[i].w);
    }
    float s[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int token = page_index * PAGE + lane_group() + (i >> 1) * 8;
        bool seen = token >= seen_tokens.x && token < seen_tokens.y;
        s[i] = seen ? (even[i] + odd[i]) * scale_log2 : -INF;
    }
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float m = fmaxf(state.max[c], fmaxf(s[c], s[c + 2]));
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) m = fmaxf(m, __shfl_xor_sync(FULL_WARP, m, mask));
        float rescale = exp2_approx(state.max[c] - m);
        state.max[c] = m;
        s[c] = exp2_approx(s[c] - m);
        s[c + 2] = exp2_approx(s[c + 2] - m);
        state.sum[c] = state.sum[c] * rescale + s[c] + s[c + 2];
#pragma unroll
        for (int r = 0; r < V_REGS; r++) state.out[r][c] *= rescale, state.out[r][c + 2] *= rescale;
    }
    p[0] = transpose_8x8(pack_bf16(s[0], s[1]));
    p[1] = transpose_8x8(pack_bf16(s[2], s[3]));
}

DEVICE void accumulate_page(Softmax& state, const Page& page, const u32 (&p)[2]) {
#pragma unroll
    for (int r = 0; r < V_REGS; r++)
        mma_bf16(state.out[r], low_halves(page.v[0][r], page.v[1][r]), high_halves(page.v[0][r], page.v[1][r]),
             low_halves(page.v[2][r], page.v[3][r]), high_halves(page.v[2][r], page.v[3][r]), p[0], p[1]);
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
            *(float2*)&out[head][v_dim(r)] = make_float2(state.out[r][c], state.out[r][c + 2]);
    }
}

DEVICE u32 add_bias(u32 x, const bf16* bias, int column) {
    if (!bias) return x;
    u32 b = *(const u32*)(bias + column);
    return pack_bf16(bf16_low(x) + bf16_low(b), bf16_high(x) + bf16_high(b));
}

// Rotates the pairs (d, d + HEAD_DIM / 2) and (d + 1, ...) of the head at `column` of a row of q, k and v. cos_sin: the
// position's row, cosines in the first half.
DEVICE void rotate_pairs(bf16* to, const bf16* row, const bf16* bias, const float* cos_sin, int column, int d) {
    u32 a = add_bias(*(const u32*)(row + column + d), bias, column + d);
    u32 b = add_bias(*(const u32*)(row + column + d + HEAD_DIM / 2), bias, column + d + HEAD_DIM / 2);
    float2 c = *(const float2*)(cos_sin + d), s = *(const float2*)(cos_sin + HEAD_DIM / 2 + d);
    *(u32*)(to + d) = pack_bf16(bf16_low(a) * c.x - bf16_low(b) * s.x, bf16_high(a) * c.y - bf16_high(b) * s.y);
    *(u32*)(to + d + HEAD_DIM / 2) =
            pack_bf16(bf16_low(b) * c.x + bf16_low(a) * s.x, bf16_high(b) * c.y + bf16_high(a) * s.y);
}

// Adds part `o` of a softmax with maximum and sum `part` to (acc, sum), both relative to maximum `m`.
DEVICE void add_part(float4& acc, float& sum, float4 o, float2 part, float m) {
    const float w = exp2_approx(part.x - m);
    sum += w * part.y;
    acc.x += w * o.x, acc.y += w * o.y, acc.z += w * o.z, acc.w += w * o.w;
}
