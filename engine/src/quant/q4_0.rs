//! Q4_0: 32 elements of 4 bits and a half-precision scale; `value = (q - 8) * scale`.
//!
//! Layout as in ggml's `block_q4_0`: the scale, then 16 bytes whose low halves are elements 0 to 15
//! and whose high halves are elements 16 to 31.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Quantizer, Scales, f16_at, read_nibbles, u16_at};

/// The Q4_0 format.
pub struct Q4_0;

impl QuantFormat for Q4_0 {
    fn name(&self) -> &'static str {
        "Q4_0"
    }

    fn ggml_type(&self) -> u32 {
        2
    }

    fn block_size(&self) -> usize {
        32
    }

    fn block_bytes(&self) -> usize {
        18
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(18).zip(out.chunks_exact_mut(32)) {
            let scale = f16_at(block, 0);
            let (low, high) = out.split_at_mut(16);
            for ((&byte, low), high) in block[2..].iter().zip(low).zip(high) {
                *low = (i32::from(byte & 15) - 8) as f32 * scale;
                *high = (i32::from(byte >> 4) - 8) as f32 * scale;
            }
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], _: usize, codes: &mut [i8; GROUP]| {
            read_nibbles(&block[2..], codes);
            GroupScales { scale: u16_at(block, 0), ..GroupScales::default() }
        };
        Some(Affine { codes: Codes { nibbles: true, scales: Scales::AroundEight }, read })
    }

    /// As ggml does it: the value of greatest size becomes code 0, which is -8 scales.
    fn quantizer(&self) -> Option<Quantizer> {
        Some(|values, block| {
            let largest = values.iter().fold(0f32, |best, &v| if v.abs() > best.abs() { v } else { best });
            let scale = largest / -8.0;
            let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
            let code = |value: f32| (value * inverse + 8.5).clamp(0.0, 15.0) as u8;
            block[..2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes());
            let (low, high) = values.split_at(GROUP / 2);
            for ((byte, &low), &high) in block[2..].iter_mut().zip(low).zip(high) {
                *byte = code(low) | code(high) << 4;
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_as_the_gguf_package_does() {
        // A block and its values from `gguf.quants` (PyPI gguf 0.19.0).
        let block: [u8; 18] = [0, 56, 160, 177, 193, 194, 211, 227, 228, 245, 149, 118, 199, 199, 24, 136, 137, 106];
        let expected: [f32; 32] = [
            -4.0, -3.5, -3.5, -3.0, -2.5, -2.5, -2.0, -1.5, -1.5, -1.0, -0.5, -0.5, 0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0,
            2.0, 2.5, 3.0, 3.0, 3.5, 0.5, -0.5, 2.0, 2.0, -3.5, 0.0, 0.0, -1.0,
        ];
        let mut out = [f32::NAN; 32];
        Q4_0.dequantize(&block, &mut out);
        for (value, expected) in out.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{out:?}");
        }
    }
}
