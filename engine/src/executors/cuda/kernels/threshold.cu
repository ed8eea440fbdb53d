// variant: cluster CLUSTER=4 min-arch=90
// variant: block CLUSTER=1
//
// The least rank_key that top-k, top-p and min-p keep of each row of logits float32 [rows, stride], `vocab` of them used
// -> thresholds uint64 [rows]; only rows that ask for one of them are written. sampler.rs is the definition.
//
// CLUSTER blocks a row (a thread block cluster if there are several) make a histogram of the row's distances from its
// maximum, find the bin in which the cut falls, and order that bin's tokens alone; if they are too many (thousands of
// equal logits), they bisect the keys instead. Probability masses are added as integers (2^-27 of the best token's
// probability), so results depend neither on timing nor on CLUSTER.
//
// A cluster is done with a row sooner, a block alone spends no time on cluster barriers: the cluster is for few rows.
#include "sampling.cuh"

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
