//! Q5_0: 32 elements of 5 bits and a half-precision scale; `value = (q - 16) * scale`.
//!
//! Layout as in ggml's `block_q5_0`: the scale, 4 bytes with the fifth bits of elements 0 to 31, then 16 bytes whose
//! low halves are elements 0 to 15 and whose high halves are elements 16 to 31.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, read_five_bits, u16_at};

/// The Q5_0 format.
pub struct Q5_0;

/// Codes -16 to 15 of `block`.
fn read(block: &[u8], codes: &mut [i8; GROUP]) {
    read_five_bits(&block[2..], codes);
    codes.iter_mut().for_each(|code| *code -= 16);
}

impl QuantFormat for Q5_0 {
    fn name(&self) -> &'static str {
        "Q5_0"
    }

    fn ggml_type(&self) -> u32 {
        6
    }

    fn block_size(&self) -> usize {
        32
    }

    fn block_bytes(&self) -> usize {
        22
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        let mut codes = [0; GROUP];
        for (block, out) in blocks.chunks_exact(22).zip(out.chunks_exact_mut(GROUP)) {
            let scale = f16_at(block, 0);
            read(block, &mut codes);
            out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(code) * scale);
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], _: usize, codes: &mut [i8; GROUP]| {
            read(block, codes);
            GroupScales { scale: u16_at(block, 0), ..GroupScales::default() }
        };
        Some(Affine { codes: Codes { nibbles: false, scales: Scales::Single }, read })
    }
}
