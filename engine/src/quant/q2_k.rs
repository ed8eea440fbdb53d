//! Q2_K: 256 elements of 2 bits; each 16 have a 4-bit scale and minimum, in units of half-precision numbers of the
//! block; `value = q * (scale * scale_unit) - minimum * minimum_unit`.
//!
//! Layout as in ggml's `block_q2_K`: 16 bytes of scales (low halves) and minima (high halves), 64 bytes of elements,
//! the scales' unit, the minima's unit. Elements 128 n to 128 n + 127 lie in bytes 32 n to 32 n + 31, the first 32 in
//! the lowest bits.

use super::{QuantFormat, f16_at};

/// The Q2_K format.
pub struct Q2K;

impl QuantFormat for Q2K {
    fn name(&self) -> &'static str {
        "Q2_K"
    }

    fn ggml_type(&self) -> u32 {
        10
    }

    fn block_size(&self) -> usize {
        256
    }

    fn block_bytes(&self) -> usize {
        84
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(84).zip(out.chunks_exact_mut(256)) {
            let (packed, elements) = (&block[..16], &block[16..80]);
            let (scale_unit, minimum_unit) = (f16_at(block, 80), f16_at(block, 82));
            for (i, out) in out.chunks_exact_mut(16).enumerate() {
                let scale = scale_unit * f32::from(packed[i] & 15);
                let minimum = minimum_unit * f32::from(packed[i] >> 4);
                let (first, shift) = (i / 8 * 32 + i % 2 * 16, i % 8 / 2 * 2);
                for (&byte, out) in elements[first..first + 16].iter().zip(out) {
                    *out = scale * f32::from(byte >> shift & 3) - minimum;
                }
            }
        }
    }
}
