//! Q4_K: 256 elements of 4 bits; each 32 have a 6-bit scale and minimum, in units of half-precision numbers of the
//! block; `value = q * (scale * scale_unit) - minimum * minimum_unit`.
//!
//! Layout as in ggml's `block_q4_K`: the scales' unit, the minima's unit, 12 bytes of scales and minima, 128 bytes of
//! elements: of each 32 bytes, the low halves are 32 elements, the high halves the next 32.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, u16_at};

/// The Q4_K format.
pub struct Q4K;

impl QuantFormat for Q4K {
    fn name(&self) -> &'static str {
        "Q4_K"
    }

    fn ggml_type(&self) -> u32 {
        12
    }

    fn block_size(&self) -> usize {
        256
    }

    fn block_bytes(&self) -> usize {
        144
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        for (block, out) in blocks.chunks_exact(144).zip(out.chunks_exact_mut(256)) {
            let (scale_unit, minimum_unit) = (f16_at(block, 0), f16_at(block, 2));
            let (packed, elements) = (&block[4..16], &block[16..]);
            for (i, out) in out.chunks_exact_mut(32).enumerate() {
                let (scale, minimum) = read_scale_and_minimum(packed, i);
                let (scale, minimum) = (scale_unit * f32::from(scale), minimum_unit * f32::from(minimum));
                let shift = i % 2 * 4;
                for (&byte, out) in elements[i / 2 * 32..].iter().zip(out) {
                    *out = scale * f32::from(byte >> shift & 15) - minimum;
                }
            }
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], index: usize, codes: &mut [i8; GROUP]| {
            let (scale, minimum) = read_scale_and_minimum(&block[4..16], index);
            for (code, &byte) in codes.iter_mut().zip(&block[16 + index / 2 * 32..]) {
                *code = (byte >> (index % 2 * 4) & 15) as i8;
            }
            GroupScales { scale: u16_at(block, 0), minimum: u16_at(block, 2), factors: [scale, minimum] }
        };
        Some(Affine { codes: Codes { nibbles: true, scales: Scales::InUnits }, read })
    }
}

/// Scale and minimum `i` of eight, 0 to 63 each, in Q4_K's and Q5_K's 12 bytes (ggml's `get_scale_min_k4`).
pub(super) fn read_scale_and_minimum(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let low = packed[i + 4];
    ((low & 15) | packed[i - 4] >> 6 << 4, low >> 4 | packed[i] >> 6 << 4)
}
