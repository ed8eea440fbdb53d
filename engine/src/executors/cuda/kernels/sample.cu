// variant: all
//
// Samples one token a row from logits float32 [rows, stride], `vocab` of them used. sampler.rs is the definition.
//
//   rows[row]   SampleRow of sampling.cuh; slot -1: padded row, nothing is written
//   sample_rows:    greedy, or Gumbel-max at the row's temperature among the tokens kept, those from thresholds[row] on
//                   (threshold.cu) -> out_tokens int32 [rows], last_tokens[slot] int32
//   token_logprobs: of the raw logits, for rows with n_top[row] >= 0: log-probability and rank of tokens[row] and
//                   the n_top best ids -> logprobs float32 [rows], ranks int32 [rows], top_ids int32 and
//                   top_logprobs float32 [rows, 20]. A row whose logits were edited is read from
//                   raw_logits[raw_index[row]] instead (raw_index may be null; -1: not edited).
//   save_raw_logits: makes those copies, before penalties.cu edits.
//
// The noise of a token is a function of (seed, n_output, id) alone: Philox4x32-10 (Salmon et al. 2011), so a seed gives
// the same token whatever else runs and however the row is cut into blocks. Ties go to the lowest id.
#include "sampling.cuh"

constexpr int MAX_TOP = 20;

// ------------------------------------------------------------------------------------------------ sample_rows

DEVICE void philox4x32(u32 (&c)[4], u64 seed) {
    u32 key0 = (u32)seed, key1 = (u32)(seed >> 32);
#pragma unroll
    for (int i = 0; i < 10; i++) {
        const u32 high0 = __umulhi(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
        const u32 high1 = __umulhi(c[2], 0xCD9E8D57u), low1 = c[2] * 0xCD9E8D57u;
        c[0] = high1 ^ c[1] ^ key0, c[1] = low1, c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
}

// -ln(-ln u) for u = ((word >> 9) + 1/2) / 2^23. Near u = 1 the inner logarithm is a series in 1 - u, because the
// hardware's is absolutely, not relatively, exact there, and large noise is what decides.
DEVICE float gumbel(u32 word) {
    const float LN_2 = 0.69314718056f;
    const float u = ((float)(word >> 9) + 0.5f) * (1.f / 8388608.f);
    const float v = 1.f - u;
    const float series = v * (1.f + v * (0.5f + v * (0.33333333f + v * 0.25f)));
    const float e = v < 0.015625f ? series : -LN_2 * log2_approx(u);
    return -LN_2 * log2_approx(e);
}

extern "C" __global__ void __launch_bounds__(256)
    sample_rows(const float* logits, int stride, int vocab, const SampleRow* rows, const u64* thresholds, u64* best,
                u32* counters, int* out_tokens, int* last_tokens) {
    // Grid (n_blocks, rows), block 256. best uint64 [rows] and counters uint32 [rows]: zero before the first launch,
    // left zero.
    PDL_TRIGGER();
    PDL_WAIT();
    const int r = blockIdx.y;
    const SampleRow row = rows[r];
    if (row.slot < 0) return;
    const float* logit_row = logits + (size_t)r * stride;
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    u64 key = 0;
    if (row.temperature < GREEDY_BELOW) {
        walk_row(logit_row, vocab, first, step, [&](const float(&x)[4], int id, int n) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < n) key = max_key(key, rank_key(x[i] == x[i] ? x[i] : -INF, id + i));
        });
    } else {
        const float inv_temperature = 1.f / row.temperature;
        const u64 threshold = wants_threshold(row, vocab) ? thresholds[r] : 0;
        walk_row(logit_row, vocab, first, step, [&](const float(&x)[4], int id, int n) {
            bool kept = false;
#pragma unroll
            for (int i = 0; i < 4; i++) kept |= i < n && rank_key(x[i], id + i) >= threshold;
            if (!kept) return;
            u32 words[4] = {(u32)id / 4, row.n_output, 0, 0};
            philox4x32(words, row.seed);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float score = x[i] * inv_temperature + gumbel(words[i]);
                if (i < n && rank_key(x[i], id + i) >= threshold)
                    key = max_key(key, rank_key(score == score ? score : -INF, id + i));
            }
        });
    }
    key = block_max_key(key);
    if (threadIdx.x != 0) return;
    atomicMax(&best[r], key);
    __threadfence();
    const bool last = atomicInc(&counters[r], gridDim.x - 1) == gridDim.x - 1;
    if (!last) return;
    __threadfence();
    const int token = key_id(atomicExch(&best[r], 0ull));
    out_tokens[r] = token;
    last_tokens[row.slot] = token;
}

// ------------------------------------------------------------------------------------------------ token_logprobs

constexpr int LOGPROB_THREADS = 1024;
constexpr int MAX_TOP_CANDIDATES = 5120;  // MAX_TOP threads of 256 tokens: vocabularies to 2^18

DEVICE float block_max_float(float x) { return key_logit(block_max_key((u64)ordered(x) << 32)); }

// The n-th greatest (from 1) of the block's keys, one a thread, all different; by sorting them (bitonic).
DEVICE u64 nth_key(u64* keys, u64 key, int n) {
    const int t = threadIdx.x;
    __syncthreads();
    keys[t] = key;
    for (int size = 2; size <= LOGPROB_THREADS; size *= 2) {
        for (int half = size / 2; half > 0; half /= 2) {
            __syncthreads();
            const int other = t ^ half;
            if (other > t) {
                const bool descending = (t & size) == 0;
                const u64 a = keys[t], b = keys[other];
                if ((a < b) == descending) keys[t] = b, keys[other] = a;
            }
        }
    }
    __syncthreads();
    return keys[n - 1];
}

extern "C" __global__ void __launch_bounds__(LOGPROB_THREADS)
    token_logprobs(const float* logits, int stride, int vocab, const float* raw_logits, const int* raw_index,
                   const int* tokens, const int* n_top, float* logprobs, int* ranks, int* top_ids, float* top_logprobs) {
    // Grid (rows), block 1024. Of the best logits of the threads (each has one token in 1024), the n-th bounds the n-th
    // best token from below, and only the n threads that reach it can hold tokens above it: few enough to list.
    __shared__ u64 keys[MAX_TOP_CANDIDATES];
    __shared__ u32 n_keys;
    __shared__ float warp_sums[32];
    PDL_TRIGGER();
    PDL_WAIT();
    const int r = blockIdx.x;
    const int n = min(n_top[r], min(MAX_TOP, vocab));
    if (n < 0) return;
    const bool edited = raw_index != nullptr && raw_index[r] >= 0;
    const float* row = edited ? raw_logits + (size_t)raw_index[r] * vocab : logits + (size_t)r * stride;
    const float target = row[tokens[r]];

    u64 best = 0;
    float m = -INF, sum = 0.f;
    int above = 0;
    walk_row(row, vocab, threadIdx.x, LOGPROB_THREADS, [&](const float(&x)[4], int id, int count) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i >= count) continue;
            best = max_key(best, rank_key(x[i], id + i));
            above += x[i] > target;
            if (x[i] > m) sum *= __expf(m - x[i]), m = x[i];
            if (x[i] > -INF) sum += __expf(x[i] - m);
        }
    });
    const float row_max = block_max_float(m);
    sum *= m > -INF ? __expf(m - row_max) : 0.f;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(FULL_WARP, sum, mask);
        above += __shfl_xor_sync(FULL_WARP, above, mask);
    }
    if (threadIdx.x == 0) n_keys = 0;
    __syncthreads();
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum, atomicAdd(&n_keys, (u32)above);
    __syncthreads();
    float total = 0.f;
    for (int w = 0; w < LOGPROB_THREADS / 32; w++) total += warp_sums[w];
    const float log_sum = row_max + logf(total);
    if (threadIdx.x == 0) logprobs[r] = target - log_sum, ranks[r] = 1 + n_keys;
    if (n == 0) return;

    const u64 bound = nth_key(keys, best, n);
    __syncthreads();
    if (threadIdx.x == 0) n_keys = 0;
    __syncthreads();
    if (best >= bound) {
        walk_row(row, vocab, threadIdx.x, LOGPROB_THREADS, [&](const float(&x)[4], int id, int count) {
            for (int i = 0; i < count; i++) {
                const u64 key = rank_key(x[i], id + i);
                if (key < bound) continue;
                const u32 at = atomicAdd(&n_keys, 1u);
                if (at < MAX_TOP_CANDIDATES) keys[at] = key;
            }
        });
    }
    __syncthreads();
    const u32 n_found = min(n_keys, (u32)MAX_TOP_CANDIDATES);
    for (u32 i = threadIdx.x; i < n_found; i += LOGPROB_THREADS) {
        int place = 0;
        for (u32 j = 0; j < n_found; j++) place += keys[j] > keys[i];
        if (place < n) {
            top_ids[r * MAX_TOP + place] = key_id(keys[i]);
            top_logprobs[r * MAX_TOP + place] = key_logit(keys[i]) - log_sum;
        }
    }
}

extern "C" __global__ void save_raw_logits(const float* logits, int stride, int vocab, float* raw_logits, const int* raw_index) {
    // Grid (n_blocks, rows), any block. raw_logits float32 [n_raw, vocab].
    PDL_TRIGGER();
    PDL_WAIT();
    const int to = raw_index[blockIdx.y];
    if (to < 0) return;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x)
        raw_logits[(size_t)to * vocab + i] = logits[(size_t)blockIdx.y * stride + i];
}
