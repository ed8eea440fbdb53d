// variant: llama HEAD_DIM=128
// variant: qwen2 HEAD_DIM=64
// variant: phi HEAD_DIM=96
//
// Keys and values of a few contexts from their pages, packed, to bf16 rows that prefill attention reads.
//   cache          bytes [n_pages, n_kv, KV_BLOCK] (packed_kv.cuh)
//   block_tables   int32 [n_seqs, block_table_stride]
//   context_lens   int32 [n_seqs]; cu_seqlens_q int32 [n_seqs + 1]
//   context_starts int32 [n_seqs]  where the tokens of each context begin, multiples of 16, rising
//   keys, values   bf16 [n_kv, capacity, HEAD_DIM]
// Sequences first_seq to before first_seq + n_seqs; their pages follow each other from 0 on. Pages that the window (0:
// none) hides from all queries of their sequence are left out.
// Grid (pages of these sequences, n_kv), block THREADS.
#include "packed_kv.cuh"

constexpr int THREADS = 256;
constexpr int WORDS = HEAD_DIM / 8;
constexpr int TILE = 128;  // tokens that prefill attention reads at a time, from a multiple of them on

extern "C" __global__ void __launch_bounds__(THREADS)
unpack_kv(const unsigned char* cache, const int* block_tables, int block_table_stride, const int* context_lens,
          const int* cu_seqlens_q, const int* context_starts, bf16* keys, bf16* values, int first_seq, int n_seqs,
          int capacity, int window) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int n_kv = gridDim.y, kv_head = blockIdx.y, first_token = blockIdx.x * PAGE;
    int seq = first_seq;
    for (int n = n_seqs; n > 1;) {
        const int half = n / 2;
        if (context_starts[seq + half] <= first_token) seq += half;
        n -= half;
    }
    const int page = (first_token - context_starts[seq]) / PAGE;
    const int first_query = context_lens[seq] - (cu_seqlens_q[seq + 1] - cu_seqlens_q[seq]);
    if (window > 0 && page * PAGE < max(0, first_query - window + 1) / TILE * TILE) return;
    const int number = block_tables[(long long)seq * block_table_stride + page];
    const unsigned char* block = cache + ((long long)number * n_kv + kv_head) * KV_BLOCK;
    for (int i = threadIdx.x; i < 2 * PAGE * WORDS; i += THREADS) {
        const bool is_v = i >= PAGE * WORDS;
        const int token = i / WORDS % PAGE, word = i % WORDS;
        const uint2 low = load_stream_8(block + low_at(token, word, is_v));
        const u32 upper = load_stream_4(block + upper_at(token, word, is_v));
        const float scale = __uint_as_float((u32)block[scale_at(token, is_v)] << 23);
        u32 x[4];
        unpack_word(x, low.x, low.y, upper);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            x[j] = pack_bf16(bf16_low(x[j]) * UNBIAS * scale, bf16_high(x[j]) * UNBIAS * scale);
        bf16* to = (is_v ? values : keys) + ((long long)kv_head * capacity + first_token + token) * HEAD_DIM + word * 8;
        store_bf16x8(to, make_uint4(x[0], x[1], x[2], x[3]));
    }
}
