// variant: all
//
// Edits logits float32 [rows, stride] in place before sampling, and keeps what penalties need to know of each sequence.
// sampler.rs is the definition; its order: apply_penalties, edit_logits (logit bias), keep_allowed, edit_logits (bans;
// a ban is the value -inf, and may share the launch with the biases).
//
//   counts      uint16 [slots, vocab_stride]       times a token is in the output, at most 65,535
//   prompt_bits uint32 [slots, vocab_stride / 32]  bit: the token is in the prompt
//   vocab_stride: the vocabulary rounded up to a multiple of 32
//   rows[row]   PenaltyRow, below
//
// apply_penalties: grid (n_blocks, rows), any block of whole warps; rows without penalties leave at once.
// edit_logits, count_tokens, count_sampled, set_prompt_bits: one thread an entry. clear_slot: grid (n_blocks).
// keep_allowed: grid (n), block 1024, dynamic shared memory vocab_stride / 8 bytes. apply_masks: grid (n_blocks, n).
#include "sampling.cuh"

typedef unsigned short u16;

struct PenaltyRow {
    float repetition;  // 1: off
    float frequency, presence;  // 0: off
    int slot;  // -1: no penalties
};

extern "C" __global__ void apply_penalties(float* logits, int stride, int vocab, const PenaltyRow* rows, const u16* counts,
                                           const u32* prompt_bits, int vocab_stride) {
    PDL_TRIGGER();
    PDL_WAIT();
    const PenaltyRow p = rows[blockIdx.y];
    if (p.slot < 0 || (p.repetition == 1.f && p.frequency == 0.f && p.presence == 0.f)) return;
    const u32* count_pairs = (const u32*)(counts + (size_t)p.slot * vocab_stride);
    const u32* bits = prompt_bits + (size_t)p.slot * (vocab_stride / 32);
    float* row = logits + (size_t)blockIdx.y * stride;
    for (int id = (blockIdx.x * blockDim.x + threadIdx.x) * 2; id < vocab; id += gridDim.x * blockDim.x * 2) {
        const u32 pair = count_pairs[id / 2];
        const u32 prompt = bits[id / 32] >> id % 32;
        if (pair == 0 && (p.repetition == 1.f || (prompt & 3) == 0)) continue;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 count = pair >> 16 * i & 0xffff;
            if (id + i >= vocab || (count == 0 && (prompt >> i & 1) == 0)) continue;
            float x = row[id + i];
            if (p.repetition != 1.f) x = x > 0.f ? x / p.repetition : x * p.repetition;
            if (count > 0) x -= p.frequency * (float)count + p.presence;
            row[id + i] = x;
        }
    }
}

// Adds values[i] to the logit of token ids[i] in row rows[i].
extern "C" __global__ void edit_logits(float* logits, int stride, const int* rows, const int* ids, const float* values, int n) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicAdd(&logits[(size_t)rows[i] * stride + ids[i]], values[i]);
}

// Bans all but ids[offsets[i] .. offsets[i + 1]] in row rows[i].
extern "C" __global__ void __launch_bounds__(1024)
    keep_allowed(float* logits, int stride, int vocab, const int* rows, const int* offsets, const int* ids) {
    extern __shared__ u32 allowed[];
    PDL_TRIGGER();
    PDL_WAIT();
    for (int i = threadIdx.x; i < (vocab + 31) / 32; i += blockDim.x) allowed[i] = 0;
    __syncthreads();
    for (int i = offsets[blockIdx.x] + threadIdx.x; i < offsets[blockIdx.x + 1]; i += blockDim.x)
        atomicOr(&allowed[ids[i] / 32], 1u << ids[i] % 32);
    __syncthreads();
    float* row = logits + (size_t)rows[blockIdx.x] * stride;
    for (int id = threadIdx.x; id < vocab; id += blockDim.x)
        if ((allowed[id / 32] >> id % 32 & 1) == 0) row[id] = -INF;
}

// Bans the tokens whose bit is not set in masks uint32 [n, vocab_stride / 32] from row rows[i].
extern "C" __global__ void apply_masks(float* logits, int stride, int vocab, const int* rows, const u32* masks,
                                       int vocab_stride) {
    PDL_TRIGGER();
    PDL_WAIT();
    const u32* mask = masks + (size_t)blockIdx.y * (vocab_stride / 32);
    float* row = logits + (size_t)rows[blockIdx.y] * stride;
    for (int id = blockIdx.x * blockDim.x + threadIdx.x; id < vocab; id += gridDim.x * blockDim.x)
        if ((mask[id / 32] >> id % 32 & 1) == 0) row[id] = -INF;
}

DEVICE void count(u16* counts, int vocab_stride, int slot, int id) {
    const size_t at = (size_t)slot * vocab_stride + id;
    u32* pair = (u32*)counts + at / 2;
    const int shift = at % 2 * 16;
    u32 old = *pair, seen;
    do {
        seen = old;
        if ((seen >> shift & 0xffff) == 0xffff) return;
        old = atomicCAS(pair, seen, seen + (1u << shift));
    } while (old != seen);
}

// Counts ids[i] for a slot: the output so far of a sequence that comes, or comes back.
extern "C" __global__ void count_tokens(u16* counts, int vocab_stride, int slot, const int* ids, int n) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) count(counts, vocab_stride, slot, ids[i]);
}

// Counts what was sampled last for each of `slots`.
extern "C" __global__ void count_sampled(u16* counts, int vocab_stride, const int* slots, const int* last_tokens, int n) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) count(counts, vocab_stride, slots[i], last_tokens[slots[i]]);
}

extern "C" __global__ void set_prompt_bits(u32* prompt_bits, int vocab_stride, int slot, const int* ids, int n) {
    PDL_TRIGGER();
    PDL_WAIT();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) atomicOr(&prompt_bits[(size_t)slot * (vocab_stride / 32) + ids[i] / 32], 1u << ids[i] % 32);
}

// Forgets what is known of the sequence that had this slot.
extern "C" __global__ void clear_slot(u16* counts, u32* prompt_bits, int vocab_stride, int slot) {
    PDL_TRIGGER();
    PDL_WAIT();
    u32* pairs = (u32*)(counts + (size_t)slot * vocab_stride);
    u32* bits = prompt_bits + (size_t)slot * (vocab_stride / 32);
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab_stride / 2; i += gridDim.x * blockDim.x) {
        pairs[i] = 0;
        if (i < vocab_stride / 32) bits[i] = 0;
    }
}
