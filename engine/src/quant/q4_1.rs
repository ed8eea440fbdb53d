//! Q4_1: 32 elements of 4 bits, a half-precision scale and minimum; `value = q * scale + minimum`.
//!
//! Layout as in ggml's `block_q4_1`: the scale, the minimum, then 16 bytes whose low halves are
//! elements 0 to 15 and whose high halves are elements 16 to 31.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, read_nibbles, u16_at};

/// The Q4_1 format.
pub struct Q4_1;

impl QuantFormat for Q4_1 {
    fn name(&self) -> &'static str {
        "Q4_1"
    }

    fn ggml_type(&self) -> u32 {
        3
    }

    fn block_size(&self) -> usize {
        32
    }

    fn block_bytes(&self) -> usize {
        20
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(20).zip(out.chunks_exact_mut(32)) {
            let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
            let (low, high) = out.split_at_mut(16);
            for ((&byte, low), high) in block[4..].iter().zip(low).zip(high) {
                *low = f32::from(byte & 15) * scale + minimum;
                *high = f32::from(byte >> 4) * scale + minimum;
            }
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], _: usize, codes: &mut [i8; GROUP]| {
            read_nibbles(&block[4..], codes);
            GroupScales { scale: u16_at(block, 0), minimum: u16_at(block, 2), ..GroupScales::default() }
        };
        Some(Affine { codes: Codes { nibbles: true, scales: Scales::WithMinimum }, read })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_as_the_gguf_package_does() {
        // A block and its values from `gguf.quants` (PyPI gguf 0.19.0).
        let block: [u8; 20] =
            [0, 56, 0, 196, 160, 177, 193, 194, 211, 227, 228, 245, 149, 118, 199, 199, 24, 136, 137, 106];
        let expected: [f32; 32] = [
            -4.0, -3.5, -3.5, -3.0, -2.5, -2.5, -2.0, -1.5, -1.5, -1.0, -0.5, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0,
            2.0, 2.5, 3.0, 3.0, 3.5, 0.5, -0.5, 2.0, 2.0, -3.5, 0.0, 0.0, -1.0,
        ];
        let mut out = [f32::NAN; 32];
        Q4_1.dequantize(&block, &mut out);
        for (value, expected) in out.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{out:?}");
        }
    }
}
