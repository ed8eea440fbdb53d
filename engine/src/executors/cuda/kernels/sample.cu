// variant: cluster CLUSTER=8 min-arch=90
// variant: block CLUSTER=1
//
// Samples one token a row from logits float32 [rows, stride], `vocab` of them used. sampler.rs is the definition.
//
//   rows[row]   SampleRow, below; slot -1: padded row, nothing is written
//   threshold_rows: the least rank_key that top-k, top-p and min-p keep -> thresholds uint64 [rows]; only rows that
//                   ask for one of them are written (and read). Launch it only in steps that have such rows.
//   sample_rows:    greedy, or Gumbel-max at the row's temperature among the tokens kept
//                   -> out_tokens int32 [rows], last_tokens[slot] int32
//   token_logprobs: of the raw logits, for rows with n_top[row] >= 0: log-probability and rank of tokens[row] and
//                   the n_top best ids -> logprobs float32 [rows], ranks int32 [rows], top_ids int32 and
//                   top_logprobs float32 [rows, 20]. A row whose logits were edited is read from
//                   raw_logits[raw_index[row]] instead (raw_index may be null; -1: not edited).
//   save_raw_logits: makes those copies, before penalties.cu edits.
//
// The noise of a token is a function of (seed, n_output, id) alone: Philox4x32-10 (Salmon et al. 2011), so a seed gives
// the same token whatever else runs and however the row is cut into blocks. All choices are deterministic: probability
// masses are added as integers (2^-27 of the best token's probability), ties go to the lowest id.
//
// threshold_rows: a cluster of CLUSTER blocks a row (1 where there are no clusters) makes a histogram of the row's
// distances from its maximum, finds the bin in which the cut falls, and orders that bin's tokens alone; if they are
// too many (thousands of equal logits), it bisects the keys instead.
#include "sampling.cuh"

constexpr int MAX_TOP = 20;
constexpr float GREEDY_BELOW = 1e-5f;

struct SampleRow {
    float temperature;  // below 1e-5: greedy
    float top_p;        // 1: off
    float min_p;        // 0: off
    int top_k;          // 0: off
    u64 seed;
    u32 n_output;       // index of the token in the output
    int slot;
};

DEVICE bool wants_threshold(const SampleRow& row, int vocab) {
    return row.slot >= 0 && row.temperature >= GREEDY_BELOW &&
           (row.top_p < 1.f || row.min_p > 0.f || (row.top_k > 0 && row.top_k < vocab));
}

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

// ------------------------------------------------------------------------------------------------ threshold_rows

constexpr int THRESHOLD_THREADS = 1024;
constexpr int N_BINS = 2 * THRESHOLD_THREADS;
constexpr int MAX_CANDIDATES = 2048;

// Tokens above some key: how many, and their mass in units of 2^-27 of the best token's probability.
struct Mass {
    u64 mass;
    u32 count;
};

struct ThresholdShared {
    u32 counts[N_BINS];
    u32 mass_low[N_BINS], mass_high[N_BINS];  // 14 bits of a token's mass each: room for 2^18 tokens a bin
    u64 candidates[MAX_CANDIDATES];
    u64 warp_mass[32];
    u32 warp_count[32];
    u64 reduced[2][2];  // by parity of the reduction
    // Published by the first block of the cluster:
    int bin;
    Mass above_bin;
    u64 threshold;
    Mass kept;
    u32 n_candidates;
};

#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)
DEVICE u32 load_shared(const u32* p, u32 rank) { return load_cluster_u32(p, rank); }
DEVICE void sync_all() { cluster_sync(); }
#else
#define CLUSTER_DIMS
DEVICE u32 load_shared(const u32* p, u32) { return *p; }
DEVICE void sync_all() { __syncthreads(); }
#endif
DEVICE u64 load_shared(const u64* p, u32 rank) {
    return load_shared((const u32*)p, rank) | (u64)load_shared((const u32*)p + 1, rank) << 32;
}

// One row as threshold_rows sees it.
struct Row {
    const float* logits;
    int vocab;
    float max, inv_temperature;
    float floor;       // least tempered distance that min-p keeps, ln(min_p)
    float bins_per_unit;

    template <class Visit>
    __device__ __forceinline__ void walk(Visit visit) const {
        walk_row(logits, vocab, blockIdx.x * THRESHOLD_THREADS + threadIdx.x, CLUSTER * THRESHOLD_THREADS,
                 [&](const float(&x)[4], int id, int n) {
#pragma unroll
                     for (int i = 0; i < 4; i++)
                         if (i < n && x[i] > -INF) visit(x[i], id + i);
                 });
    }
    // Tempered logit relative to the best: 0 and below.
    __device__ __forceinline__ float tempered(float x) const { return (x - max) * inv_temperature; }
    __device__ __forceinline__ bool above_floor(float x) const { return tempered(x) >= floor; }
    __device__ __forceinline__ u32 mass(float x) const {
        return (u32)(exp2_approx(tempered(x) * 1.4426950408889634f) * 134217728.f + 0.5f);
    }
    __device__ __forceinline__ int bin(float x) const {
        return (int)fminf(-tempered(x) * bins_per_unit, (float)(N_BINS - 1));
    }
};

// Sums over the block; results in every thread.
DEVICE Mass block_sum_mass(ThresholdShared& shared, Mass m) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        m.mass += __shfl_xor_sync(FULL_WARP, m.mass, mask);
        m.count += __shfl_xor_sync(FULL_WARP, m.count, mask);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared.warp_mass[threadIdx.x / 32] = m.mass, shared.warp_count[threadIdx.x / 32] = m.count;
    __syncthreads();
    m.mass = shared.warp_mass[threadIdx.x % 32], m.count = shared.warp_count[threadIdx.x % 32];
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        m.mass += __shfl_xor_sync(FULL_WARP, m.mass, mask);
        m.count += __shfl_xor_sync(FULL_WARP, m.count, mask);
    }
    return m;
}

// Reductions over the cluster; `parity` must alternate between calls, so that one barrier a call is enough.
DEVICE Mass cluster_sum_mass(ThresholdShared& shared, Mass m, int parity) {
    m = block_sum_mass(shared, m);
    if (threadIdx.x == 0) shared.reduced[parity][0] = m.mass, shared.reduced[parity][1] = m.count;
    sync_all();
    Mass total = {0, 0};
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
        total.mass += load_shared(&shared.reduced[parity][0], rank);
        total.count += (u32)load_shared(&shared.reduced[parity][1], rank);
    }
    return total;
}
DEVICE u64 cluster_max_key(ThresholdShared& shared, u64 key, int parity) {
    key = block_max_key(key);
    if (threadIdx.x == 0) shared.reduced[parity][0] = key;
    sync_all();
    u64 greatest = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) greatest = max_key(greatest, load_shared(&shared.reduced[parity][0], rank));
    return greatest;
}

// What top-k or top-p keeps: a token stays while what is above it is less than this.
struct Target {
    bool by_count;
    u32 count;
    double mass;
    __device__ __forceinline__ bool wants_more(Mass above) const {
        return by_count ? above.count < count : (double)above.mass < mass;
    }
};

// Fills the cluster's histogram with the tokens above the floor and leaves the sum of all blocks in the first one.
// Returns the totals; `least` is the lowest logit above the floor.
DEVICE Mass make_histogram(ThresholdShared& shared, const Row& row, bool by_count, float& least) {
    for (int i = threadIdx.x; i < N_BINS; i += THRESHOLD_THREADS)
        shared.counts[i] = 0, shared.mass_low[i] = 0, shared.mass_high[i] = 0;
    __syncthreads();
    u64 lowest = 0;
    Mass mine = {0, 0};
    row.walk([&](float x, int) {
        if (!row.above_floor(x)) return;
        lowest = max_key(lowest, ~((u64)ordered(x) << 32));
        const u32 mass = row.mass(x);
        const int bin = row.bin(x);
        mine.mass += mass, mine.count++;
        if (by_count) atomicAdd(&shared.counts[bin], 1u);
        if (mass > 0) {
            atomicAdd(&shared.mass_low[bin], mass & 0x3fff);
            atomicAdd(&shared.mass_high[bin], mass >> 14);
        }
    });
    lowest = cluster_max_key(shared, lowest, 0);
    least = key_logit(~lowest);
    return cluster_sum_mass(shared, mine, 1);  // its barrier also ends all histograms
}

// Finds the bin in which `target` is reached, by the first block of the cluster. Ends with a barrier.
DEVICE void find_bin(ThresholdShared& shared, const Target& target) {
    if (blockIdx.x == 0) {
        Mass bins[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int bin = threadIdx.x * 2 + i;
            bins[i] = {0, 0};
#pragma unroll
            for (int rank = 0; rank < CLUSTER; rank++) {
                bins[i].count += load_shared(&shared.counts[bin], rank);
                bins[i].mass += load_shared(&shared.mass_low[bin], rank) + ((u64)load_shared(&shared.mass_high[bin], rank) << 14);
            }
        }
        // Inclusive sums of pairs of bins over the block.
        Mass sum = {bins[0].mass + bins[1].mass, bins[0].count + bins[1].count};
        const Mass pair = sum;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const u64 mass = __shfl_up_sync(FULL_WARP, sum.mass, offset);
            const u32 count = __shfl_up_sync(FULL_WARP, sum.count, offset);
            if (threadIdx.x % 32 >= offset) sum.mass += mass, sum.count += count;
        }
        __syncthreads();
        if (threadIdx.x % 32 == 31) shared.warp_mass[threadIdx.x / 32] = sum.mass, shared.warp_count[threadIdx.x / 32] = sum.count;
        __syncthreads();
        for (int w = 0; w < threadIdx.x / 32; w++) sum.mass += shared.warp_mass[w], sum.count += shared.warp_count[w];
        Mass above = {sum.mass - pair.mass, sum.count - pair.count};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const Mass below = {above.mass + bins[i].mass, above.count + bins[i].count};
            if (target.wants_more(above) && !target.wants_more(below)) {
                shared.bin = threadIdx.x * 2 + i;
                shared.above_bin = above;
            }
            above = below;
        }
    }
    sync_all();
}

// Gathers the tokens of the bin into the first block's list; false if they are too many. Ends with a barrier.
DEVICE bool gather_bin(ThresholdShared& shared, const Row& row, u32& n_total) {
    const int bin = (int)load_shared((const u32*)&shared.bin, 0);
    if (threadIdx.x == 0) shared.n_candidates = 0;
    __syncthreads();
    row.walk([&](float x, int id) {
        if (row.bin(x) != bin || !row.above_floor(x)) return;
        const u32 at = atomicAdd(&shared.n_candidates, 1u);
        if (at < MAX_CANDIDATES) shared.candidates[at] = rank_key(x, id);
    });
    sync_all();
    u32 n = 0;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) {
        const u32 theirs = load_shared(&shared.n_candidates, rank);
        if (rank > 0 && blockIdx.x == 0)
            for (u32 i = threadIdx.x; i < theirs; i += THRESHOLD_THREADS)
                if (n + i < MAX_CANDIDATES && i < MAX_CANDIDATES) shared.candidates[n + i] = load_shared(&shared.candidates[i], rank);
        n += theirs;
    }
    n_total = n;
    __syncthreads();
    return n <= MAX_CANDIDATES;
}

// The least candidate that `target` keeps, and all that is kept with it; by the first block, ends with a barrier.
DEVICE void order_candidates(ThresholdShared& shared, const Row& row, const Target& target, u32 n) {
    if (blockIdx.x == 0) {
        u64 least = 0;
        Mass kept = {0, 0};
        for (u32 i = threadIdx.x; i < n; i += THRESHOLD_THREADS) {
            const u64 key = shared.candidates[i];
            Mass above = shared.above_bin;
            for (u32 j = 0; j < n; j++) {
                const u64 other = shared.candidates[j];
                if (other > key) above.mass += row.mass(key_logit(other)), above.count++;
            }
            if (target.wants_more(above)) {
                least = max_key(least, ~key);
                kept.mass += row.mass(key_logit(key)), kept.count++;
            }
        }
        least = ~block_max_key(least);
        kept = block_sum_mass(shared, kept);
        if (threadIdx.x == 0) {
            shared.threshold = least;
            shared.kept = {shared.above_bin.mass + kept.mass, shared.above_bin.count + kept.count};
        }
    }
    sync_all();
}

// The least key that `target` keeps, by bisection over all keys; every block of the cluster takes part.
DEVICE u64 bisect_keys(ThresholdShared& shared, const Row& row, const Target& target, Mass& kept) {
    u64 low = 0, high = ~0ull;  // the answer is in [low, high]
    int parity = 0;
    while (low < high) {
        const u64 middle = low + (high - low) / 2;
        Mass above = {0, 0};
        row.walk([&](float x, int id) {
            if (rank_key(x, id) > middle && row.above_floor(x)) above.mass += row.mass(x), above.count++;
        });
        above = cluster_sum_mass(shared, above, parity);
        parity ^= 1;
        if (target.wants_more(above)) high = middle;
        else low = middle + 1;
    }
    Mass mine = {0, 0};
    row.walk([&](float x, int id) {
        if (rank_key(x, id) >= low && row.above_floor(x)) mine.mass += row.mass(x), mine.count++;
    });
    kept = cluster_sum_mass(shared, mine, parity);
    sync_all();  // the parity starts anew with the next reduction
    return low;
}

// The least key that `target`, which is below the totals, keeps; and what is kept.
DEVICE u64 select(ThresholdShared& shared, const Row& row, const Target& target, Mass& kept) {
    find_bin(shared, target);
    u32 n;
    if (!gather_bin(shared, row, n)) return bisect_keys(shared, row, target, kept);
    order_candidates(shared, row, target, n);
    kept.mass = load_shared(&shared.kept.mass, 0);
    kept.count = load_shared(&shared.kept.count, 0);
    return load_shared(&shared.threshold, 0);
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THRESHOLD_THREADS)
    threshold_rows(const float* logits, int stride, int vocab, const SampleRow* rows, u64* thresholds) {
    // Grid (CLUSTER, rows), block 1024.
    __shared__ __align__(16) ThresholdShared shared;
    PDL_TRIGGER();
    PDL_WAIT();
    const SampleRow params = rows[blockIdx.y];
    if (!wants_threshold(params, vocab)) return;
    Row row;
    row.logits = logits + (size_t)blockIdx.y * stride;
    row.vocab = vocab;
    row.inv_temperature = 1.f / params.temperature;

    u64 greatest = 0, least = 0;
    row.walk([&](float x, int) {
        greatest = max_key(greatest, (u64)ordered(x) << 32);
        least = max_key(least, ~((u64)ordered(x) << 32));
    });
    greatest = cluster_max_key(shared, greatest, 0);
    least = ~cluster_max_key(shared, least, 1);
    u64 threshold = 0;
    if (greatest != 0) {
        row.max = key_logit(greatest);
        row.floor = params.min_p > 0.f ? logf(params.min_p) : -INF;
        const bool by_count = params.top_k > 0 && params.top_k < vocab;
        // Past 20 natural units a token has no mass; only counts need bins there.
        float range = fminf(-row.tempered(key_logit(least)), -row.floor);
        if (!by_count) range = fminf(range, 20.f);
        row.bins_per_unit = range > 0.f ? N_BINS / range : 0.f;
        float floor_logit;
        Mass kept = make_histogram(shared, row, by_count, floor_logit);
        threshold = (u64)ordered(floor_logit) << 32;
        if (by_count && kept.count > params.top_k)
            threshold = select(shared, row, {true, (u32)params.top_k, 0.0}, kept);
        if (params.top_p < 1.f) {
            const u64 nucleus = select(shared, row, {false, 0, (double)params.top_p * (double)kept.mass}, kept);
            threshold = max_key(threshold, nucleus);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) thresholds[blockIdx.y] = threshold;
    sync_all();  // a block's shared memory must live until all have read it
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
