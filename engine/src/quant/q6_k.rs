//! Q6_K: 256 elements of 6 bits; each 16 have an 8-bit scale in units of a half-precision number of the block;
//! `value = (q - 32) * (scale * unit)`.
//!
//! Layout as in ggml's `block_q6_K`: 128 bytes of the lower four bits, 64 bytes of the upper two, 16 scales, the unit.
//! The lower bits of elements 128 n to 128 n + 127 lie in bytes 64 n to 64 n + 63, the first 64 in the low halves; the
//! upper bits in bytes 32 n to 32 n + 31, the first 32 in the lowest bits.

use super::{QuantFormat, f16_at};

/// The Q6_K format.
pub struct Q6K;

impl QuantFormat for Q6K {
    fn name(&self) -> &'static str {
        "Q6_K"
    }

    fn ggml_type(&self) -> u32 {
        14
    }

    fn block_size(&self) -> usize {
        256
    }

    fn block_bytes(&self) -> usize {
        210
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(210).zip(out.chunks_exact_mut(256)) {
            let (lower, upper, scales) = (&block[..128], &block[128..192], &block[192..208]);
            let unit = f16_at(block, 208);
            for (i, out) in out.chunks_exact_mut(16).enumerate() {
                let scale = unit * f32::from(scales[i] as i8);
                let (half, quarter, first) = (i / 8, i % 8 / 2, i % 2 * 16);
                let lower = &lower[half * 64 + quarter % 2 * 32 + first..];
                let upper = &upper[half * 32 + first..];
                let (shift, upper_shift) = (quarter / 2 * 4, quarter * 2);
                for ((&low, &high), out) in lower.iter().zip(upper).zip(out) {
                    let q = (low >> shift & 15) | (high >> upper_shift & 3) << 4;
                    *out = scale * f32::from(q as i8 - 32);
                }
            }
        }
    }
}
