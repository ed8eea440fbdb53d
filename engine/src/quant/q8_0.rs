//! Q8_0: 32 elements of 8 bits and a half-precision scale; `value = q * scale`.
//!
//! Layout as in ggml's `block_q8_0`: the scale, then 32 signed bytes.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Quantizer, Scales, f16_at, u16_at};

/// The Q8_0 format.
pub struct Q8_0;

impl QuantFormat for Q8_0 {
    fn name(&self) -> &'static str {
        "Q8_0"
    }

    fn ggml_type(&self) -> u32 {
        8
    }

    fn block_size(&self) -> usize {
        32
    }

    fn block_bytes(&self) -> usize {
        34
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(34).zip(out.chunks_exact_mut(32)) {
            let scale = f16_at(block, 0);
            for (&byte, out) in block[2..].iter().zip(out) {
                *out = f32::from(byte as i8) * scale;
            }
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], _: usize, codes: &mut [i8; GROUP]| {
            codes.copy_from_slice(bytemuck::cast_slice(&block[2..]));
            GroupScales { scale: u16_at(block, 0), ..GroupScales::default() }
        };
        Some(Affine { codes: Codes { nibbles: false, scales: Scales::Single }, read })
    }

    fn quantizer(&self) -> Option<Quantizer> {
        Some(|values, block| {
            let scale = values.iter().fold(0f32, |max, v| max.max(v.abs())) / 127.0;
            let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
            block[..2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes());
            for (byte, value) in block[2..].iter_mut().zip(values) {
                *byte = (value * inverse).round() as i8 as u8;
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
        let block: [u8; 34] = [
            8, 40, 129, 139, 150, 160, 170, 181, 191, 201, 212, 222, 233, 243, 253, 8, 18, 28, 39, 49, 59, 70, 80, 90,
            101, 111, 10, 234, 60, 70, 151, 0, 0, 221,
        ];
        let expected: [f32; 32] = [
            -3.9997559,
            -3.6848145,
            -3.338379,
            -3.0234375,
            -2.708496,
            -2.3620605,
            -2.0471191,
            -1.7321777,
            -1.3857422,
            -1.0708008,
            -0.72436523,
            -0.40942383,
            -0.09448242,
            0.25195312,
            0.56689453,
            0.88183594,
            1.2282715,
            1.5432129,
            1.8581543,
            2.2045898,
            2.5195312,
            2.8344727,
            3.1809082,
            3.4958496,
            0.3149414,
            -0.6928711,
            1.8896484,
            2.2045898,
            -3.3068848,
            0.0,
            0.0,
            -1.1022949,
        ];
        let mut out = [f32::NAN; 32];
        Q8_0.dequantize(&block, &mut out);
        for (value, expected) in out.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{out:?}");
        }
    }
}
