//! Q5_1: 32 elements of 5 bits, a half-precision scale and minimum; `value = q * scale + minimum`.
//!
//! Layout as in ggml's `block_q5_1`: the scale, the minimum, 4 bytes with the fifth bits of elements 0 to 31, then 16
//! bytes whose low halves are elements 0 to 15 and whose high halves are elements 16 to 31.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, read_five_bits, u16_at};

/// The Q5_1 format.
pub struct Q5_1;

impl QuantFormat for Q5_1 {
    fn name(&self) -> &'static str {
        "Q5_1"
    }

    fn ggml_type(&self) -> u32 {
        7
    }

    fn block_size(&self) -> usize {
        32
    }

    fn block_bytes(&self) -> usize {
        24
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        let mut codes = [0; GROUP];
        for (block, out) in blocks.chunks_exact(24).zip(out.chunks_exact_mut(GROUP)) {
            let (scale, minimum) = (f16_at(block, 0), f16_at(block, 2));
            read_five_bits(&block[4..], &mut codes);
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(code) * scale + minimum);
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], _: usize, codes: &mut [i8; GROUP]| {
            read_five_bits(&block[4..], codes);
            GroupScales { scale: u16_at(block, 0), minimum: u16_at(block, 2), ..GroupScales::default() }
        };
        Some(Affine { codes: Codes { nibbles: false, scales: Scales::WithMinimum }, read })
    }
}
