// Weights in 12 bits each, every bit of their bf16 kept, for Hopper's tensor cores.
//
// The exponents of a row of weights take few values: the upper seven bits of nearly all lie in a window of eight. So a
// weight is kept as the lower byte of its bf16 and four bits, the sign and the place in its row's window; the few that
// lie outside are written out beside them. (The entropy is lower still, some 11 bits: DFloat11, arXiv:2504.11651, codes
// exponents by Huffman. A fixed length costs 1.4 instructions a weight and no tables.)
//
// A matrix [n, K] is two pieces of memory:
//   planes  blocks [n / 16][K / 64] of PACKED_BLOCK bytes
//   extras  bytes [n], each row's window: the least upper exponent bits, plus 128 if the first place stands for zeros
//           and subnormals instead. From the next multiple of 16 on EscapeStart [n / 16][4]: of each 16 rows the first
//           weight outside of its row's window from block q K / 64 / 4 of columns on, for q = 0, 1, 2, 3. Then all such
//           weights, Escape [*], by row, then by column
// A block is 16 rows x 64 columns in the order in which the lanes of a warp hold it as A of mma.m16n8k16 and of
// wgmma.m64k16, so that each lane reads 16 bytes at a time. With g = lane / 4, t = lane % 4, step s of 16 columns, a
// lane's quad of row r (g or g + 8) is columns 16 s + 2t, + 1, + 8, + 9.
//   0     [2][32 lanes][16 bytes]: lower bytes of the quads of steps 0, 1; 2, 3: row g, row g + 8, next step
//   1024  [32 lanes][4 words], one a step: nibbles of the quad of row g, then of row g + 8, places in the window in
//         their lower three bits; bits 7, 15, 23, 31 are the signs of row g's quad, bits 3, 11, 19, 27 of row g + 8's
// Blocks are whole 128-byte lines: the copy engine takes half as long again for others.
#pragma once
#include "attention.cuh"

constexpr int PACKED_BLOCK = 1536, PACKED_NIBBLES = 1024;

// A weight outside of its row's window.
struct Escape {
    int block;  // of 64 columns; NO_BLOCK: none
    u32 what;   // bf16 << 16 | lane << 5 | register (4 step + i of a[i]) << 1 | half
};
constexpr int NO_BLOCK = 0x7fffffff;
struct __align__(16) EscapeStart {
    int next, end;  // in the list, the one after the first; the end of the 16 rows
    Escape first;
};

DEVICE const EscapeStart* escape_starts(const unsigned char* extras, int n_rows) {
    return (const EscapeStart*)(extras + (n_rows + 15) / 16 * 16);
}
DEVICE const Escape* escape_list(const unsigned char* extras, int n_rows) {
    return (const Escape*)(escape_starts(extras, n_rows) + n_rows / 16 * 4);
}

// A row's window: the upper bytes, without signs, of its eight places.
struct Window {
    u32 low, high;

    __device__ __forceinline__ Window(u32 byte) {
        const u32 first = (byte & 127) * 0x01010101;
        low = (first + 0x03020100) & (byte & 128 ? 0xffffff00 : 0xffffffff);
        high = first + 0x07060504;
    }
};

// One step's A: of row g into a[0], a[2], of row g + 8 into a[1], a[3].
DEVICE void unpack_step(u32 (&a)[4], u32 quad_g, u32 quad_g8, u32 nibbles, const Window& g, const Window& g8) {
    const u32 places = nibbles & 0x77777777;
    const u32 upper_g = permute(g.low, g.high, places) | (nibbles & 0x80808080);
    const u32 upper_g8 = permute(g8.low, g8.high, places >> 16) | (nibbles << 4 & 0x80808080);
    a[0] = permute(quad_g, upper_g, 0x5140);
    a[1] = permute(quad_g8, upper_g8, 0x5140);
    a[2] = permute(quad_g, upper_g, 0x7362);
    a[3] = permute(quad_g8, upper_g8, 0x7362);
}

// A whole block from shared memory, by one warp: the A of its four steps.
DEVICE void unpack_block(u32 (&a)[4][4], u32 block, const Window& g, const Window& g8) {
    const int lane = threadIdx.x % 32;
    const uint4 nibbles = load_shared_16(block + PACKED_NIBBLES + lane * 16);
    const uint4 first = load_shared_16(block + lane * 16), second = load_shared_16(block + 512 + lane * 16);
    unpack_step(a[0], first.x, first.y, nibbles.x, g, g8);
    unpack_step(a[1], first.z, first.w, nibbles.y, g, g8);
    unpack_step(a[2], second.x, second.y, nibbles.z, g, g8);
    unpack_step(a[3], second.z, second.w, nibbles.w, g, g8);
}

// A warp's way through the weights that are written out for its 16 rows: the next one is known, the 32 after it are on
// their way, one a lane.
struct Escapes {
    const Escape* list;
    int base, end, cursor;
    Escape next, mine;

    __device__ __forceinline__ Escapes(const unsigned char* extras, int n_rows, int row, int quarter) {
        const int4 start = *(const int4*)(escape_starts(extras, n_rows) + row / 16 * 4 + quarter);
        list = escape_list(extras, n_rows);
        next = {start.z, (u32)start.w};
        base = start.x, end = start.y;
        load();
    }
    __device__ __forceinline__ void load() {
        const int i = base + threadIdx.x % 32;
        mine = {NO_BLOCK, 0};
        if (i < end) {
            const int2 escape = *(const int2*)(list + i);
            mine = {escape.x, (u32)escape.y};
        }
        cursor = 0;
    }
    // Puts what is written out for block `block` of columns into its registers. Blocks come in rising order.
    __device__ __forceinline__ void patch(u32 (&a)[4][4], int block) {
        while (next.block <= block) {
            if (next.block == block && (next.what >> 5 & 31) == threadIdx.x % 32)
#pragma unroll
                for (int r = 0; r < 16; ++r) {
                    u32& pair = a[r / 4][r % 4];
                    const u32 weight = next.what & 0xffff0000;
                    if ((next.what >> 1 & 15) == r)
                        pair = next.what & 1 ? (pair & 0xffff) | weight : (pair & 0xffff0000) | weight >> 16;
                }
            if (cursor == 32) base += 32, load();
            next.block = __shfl_sync(FULL_WARP, mine.block, cursor);
            next.what = __shfl_sync(FULL_WARP, mine.what, cursor);
            ++cursor;
        }
    }
};
