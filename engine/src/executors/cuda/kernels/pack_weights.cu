// variant: pack_weights
//
// Puts a matrix of bf16 weights into the 12 bits of packed.cuh.
//   w         bf16 [n_rows, K], n_rows a multiple of 16, K of 64
//   windows   bytes [n_rows]
//   n_outside int32 [n_rows / 16]: weights outside of their rows' windows
//   planes, extras   the packed matrix; windows stand in extras before pack_weights
//   begins    int32 [n_rows / 16 + 1]: sums of n_outside
//   gated     not 0: w is gate rows, then up rows, and packed rows are eight of gate, their eight of up, ...
//
// choose_windows, then pack_weights. Grid free, block 256: a warp takes 16 rows; of pack_weights one warp, from left to
// right, since lists are in order.
#include "packed.cuh"

DEVICE long long source_row(int row, int n_rows, int gated) {
    if (!gated) return row;
    return row / 16 * 8 + row % 8 + (row % 16 < 8 ? 0 : n_rows / 2);
}

// Upper seven bits of the exponent.
DEVICE int upper_exponent(u32 weight) { return weight >> 8 & 127; }

extern "C" __global__ void __launch_bounds__(256)
choose_windows(const bf16* w, unsigned char* windows, int* n_outside, int n_rows, int n_columns, int gated) {
    __shared__ int counts_of[8][128 + 8];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int(&counts)[128 + 8] = counts_of[warp];
    for (int group = blockIdx.x * 8 + warp; group < n_rows / 16; group += gridDim.x * 8) {
        int outside = 0;
        for (int row = group * 16; row < group * 16 + 16; ++row) {
            for (int i = lane; i < 128 + 8; i += 32) counts[i] = 0;
            __syncwarp();
            const bf16* from = w + source_row(row, n_rows, gated) * n_columns;
            for (int i = lane * 8; i < n_columns; i += 256) {
                const bf16x8 v = load_once(from + i);
                for (u32 pair : {v.x, v.y, v.z, v.w}) {
                    atomicAdd(&counts[upper_exponent(pair)], 1);
                    atomicAdd(&counts[upper_exponent(pair >> 16)], 1);
                }
            }
            __syncwarp();
            // The window that holds the most weights; of equal ones the lowest.
            int best = -1, window = 0;
            for (int first = lane; first <= 120; first += 32) {
                int n = 0;
                for (int i = 1; i < 8; ++i) n += counts[first + i];
                if (n + counts[first] > best) best = n + counts[first], window = first;
                if (first > 0 && n + counts[0] > best) best = n + counts[0], window = first | 128;
            }
            int key = best << 8 | (255 - window);
            for (int mask = 16; mask > 0; mask /= 2) key = max(key, __shfl_xor_sync(FULL_WARP, key, mask));
            if (lane == 0) windows[row] = 255 - (key & 255);
            outside += n_columns - (key >> 8);
            __syncwarp();
        }
        if (lane == 0) n_outside[group] = outside;
    }
}

extern "C" __global__ void __launch_bounds__(256)
pack_weights(const bf16* w, unsigned char* planes, unsigned char* extras, const int* begins, int n_rows, int n_columns,
             int gated) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int across = n_columns / 64;
    for (int group = blockIdx.x * 8 + threadIdx.x / 32; group < n_rows / 16; group += gridDim.x * 8) {
        const u32 window_of[2] = {extras[group * 16 + g], extras[group * 16 + g + 8]};
        const bf16* row_of[2] = {w + source_row(group * 16 + g, n_rows, gated) * n_columns + 2 * t,
                                 w + source_row(group * 16 + g + 8, n_rows, gated) * n_columns + 2 * t};
        Escape* const list = (Escape*)escape_list(extras, n_rows);
        int at = begins[group];
        for (int block = 0; block < across; ++block) {
            u32 quads[8], nibbles[4] = {};
#pragma unroll
            for (int s = 0; s < 4; ++s)
#pragma unroll
                for (int half_block = 0; half_block < 2; ++half_block) {
                    const u32 window = window_of[half_block];
                    const int first = window & 127;
                    const bf16* from = row_of[half_block] + block * 64 + s * 16;
                    const u32 pairs[2] = {*(const u32*)from, *(const u32*)(from + 8)};
                    u32 quad = 0;
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const u32 weight = pairs[i / 2] >> i % 2 * 16 & 0xffff;
                        const int exponent = upper_exponent(weight);
                        const bool is_first = exponent == (window & 128 ? 0 : first);
                        const int place = is_first ? 0 : exponent - first;
                        const bool escapes = !is_first && (place < 1 || place > 7);
                        quad |= (weight & 255) << 8 * i;
                        if (!escapes) nibbles[s] |= place << (half_block * 16 + 4 * i);
                        nibbles[s] |= weight >> 15 << (half_block ? 8 * i + 3 : 8 * i + 7);
                        const u32 escaping = __ballot_sync(FULL_WARP, escapes);
                        const u32 reg = 4 * s + i / 2 * 2 + half_block;
                        if (escapes)
                            list[at + __popc(escaping & ((1u << lane) - 1))] = {
                                block, weight << 16 | lane << 5 | reg << 1 | i % 2};
                        at += __popc(escaping);
                    }
                    quads[s * 2 + half_block] = quad;
                }
            uint4* to = (uint4*)(planes + ((long long)group * across + block) * PACKED_BLOCK) + lane;
            to[0] = make_uint4(quads[0], quads[1], quads[2], quads[3]);
            to[32] = make_uint4(quads[4], quads[5], quads[6], quads[7]);
            to[64] = make_uint4(nibbles[0], nibbles[1], nibbles[2], nibbles[3]);
        }
        __syncwarp();
        if (lane < 4) {
            int first = begins[group];
            const int end = begins[group + 1];
            while (first < end && list[first].block < across * lane / 4) ++first;
            const Escape none = {NO_BLOCK, 0};
            ((EscapeStart*)escape_starts(extras, n_rows))[group * 4 + lane] = {
                first + 1, end, first < end ? list[first] : none};
        }
    }
}
