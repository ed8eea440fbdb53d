//! Q3_K: 256 elements of 3 bits; each 16 have a 6-bit scale in units of a half-precision number of the block;
//! `value = (q - 4) * ((scale - 32) * unit)`.
//!
//! Layout as in ggml's `block_q3_K`: 32 bytes of third bits, 64 bytes of the lower two bits, 12 bytes of scales, the
//! unit. The lower bits of elements 128 n to 128 n + 127 lie in bytes 32 n to 32 n + 31, the first 32 in the lowest
//! bits; the third bit of element 32 n + i is bit n of byte i.

use super::{QuantFormat, f16_at};

/// The Q3_K format.
pub struct Q3K;

impl QuantFormat for Q3K {
    fn name(&self) -> &'static str {
        "Q3_K"
    }

    fn ggml_type(&self) -> u32 {
        11
    }

    fn block_size(&self) -> usize {
        256
    }

    fn block_bytes(&self) -> usize {
        110
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(110).zip(out.chunks_exact_mut(256)) {
            let (thirds, lower, scales) = (&block[..32], &block[32..96], &block[96..108]);
            let unit = f16_at(block, 108);
            for (i, out) in out.chunks_exact_mut(16).enumerate() {
                let scale = unit * f32::from(read_scale(scales, i) - 32);
                let (first, shift, third) = (i % 2 * 16, i % 8 / 2 * 2, i / 2);
                let lower = &lower[i / 8 * 32 + first..];
                for ((&low, &high), out) in lower.iter().zip(&thirds[first..]).zip(out) {
                    let q = (low >> shift & 3) | (high >> third & 1) << 2;
                    *out = scale * f32::from(q as i8 - 4);
                }
            }
        }
    }
}

/// Scale `i` of 16, 0 to 63: its lower four bits in the halves of bytes 0 to 7, its upper two in bytes 8 to 11.
fn read_scale(scales: &[u8], i: usize) -> i8 {
    let low = scales[i % 8] >> (i / 8 * 4) & 15;
    let high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
    (low | high << 4) as i8
}
