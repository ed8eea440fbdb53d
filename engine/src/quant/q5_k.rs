//! Q5_K: 256 elements of 5 bits; each 32 have a 6-bit scale and minimum, in units of half-precision numbers of the
//! block; `value = q * (scale * scale_unit) - minimum * minimum_unit`.
//!
//! Layout as in ggml's `block_q5_K`: the scales' unit, the minima's unit, 12 bytes of scales and minima, 32 bytes of
//! fifth bits (of element 32 n + i: bit n of byte i), 128 bytes of the lower four bits: of each 32 bytes, the low halves
//! are 32 elements, the high halves the next 32.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, q4_k::read_scale_and_minimum, u16_at};

/// The Q5_K format.
pub struct Q5K;

impl QuantFormat for Q5K {
    fn name(&self) -> &'static str {
        "Q5_K"
    }

    fn ggml_type(&self) -> u32 {
        13
    }

    fn block_size(&self) -> usize {
        256
    }

    fn block_bytes(&self) -> usize {
        176
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(176).zip(out.chunks_exact_mut(256)) {
            let (scale_unit, minimum_unit) = (f16_at(block, 0), f16_at(block, 2));
            let (packed, fifths, lower) = (&block[4..16], &block[16..48], &block[48..]);
            for (i, out) in out.chunks_exact_mut(32).enumerate() {
                let (scale, minimum) = read_scale_and_minimum(packed, i);
                let (scale, minimum) = (scale_unit * f32::from(scale), minimum_unit * f32::from(minimum));
                let shift = i % 2 * 4;
                for ((&low, &high), out) in lower[i / 2 * 32..].iter().zip(fifths).zip(out) {
                    *out = scale * f32::from((low >> shift & 15) | (high >> i & 1) << 4) - minimum;
                }
            }
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], index: usize, codes: &mut [i8; GROUP]| {
            let (scale, minimum) = read_scale_and_minimum(&block[4..16], index);
            for ((code, &low), &high) in codes.iter_mut().zip(&block[48 + index / 2 * 32..]).zip(&block[16..48]) {
                *code = ((low >> (index % 2 * 4) & 15) | (high >> index & 1) << 4) as i8;
            }
            GroupScales { scale: u16_at(block, 0), minimum: u16_at(block, 2), factors: [scale, minimum] }
        };
        Some(Affine { codes: Codes { nibbles: false, scales: Scales::InUnits }, read })
    }
}
