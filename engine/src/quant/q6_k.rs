//! Q6_K: 256 elements of 6 bits; each 16 have an 8-bit scale in units of a half-precision number of the block;
//! `value = (q - 32) * (scale * unit)`.
//!
//! Layout as in ggml's `block_q6_K`: 128 bytes of the lower four bits, 64 bytes of the upper two, 16 scales, the unit.
//! The lower bits of elements 128 n to 128 n + 127 lie in bytes 64 n to 64 n + 63, the first 64 in the low halves; the
//! upper bits in bytes 32 n to 32 n + 31, the first 32 in the lowest bits.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, u16_at};

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
            let unit = f16_at(block, 208);
            let mut codes = [0; GROUP];
            for (i, out) in out.chunks_exact_mut(GROUP).enumerate() {
                read_codes(block, i, &mut codes);
                for (half, (codes, out)) in codes.chunks(16).zip(out.chunks_mut(16)).enumerate() {
                    let scale = unit * f32::from(block[192 + 2 * i + half] as i8);
                    out.iter_mut().zip(codes).for_each(|(out, &code)| *out = scale * f32::from(code));
                }
            }
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], index: usize, codes: &mut [i8; GROUP]| {
            read_codes(block, index, codes);
            let factors = [block[192 + 2 * index], block[193 + 2 * index]];
            GroupScales { scale: u16_at(block, 208), minimum: 0, factors }
        };
        Some(Affine { codes: Codes { nibbles: false, scales: Scales::BySixteen }, read })
    }
}

/// Codes -32 to 31 of elements `32 * index` to `32 * index + 31`.
fn read_codes(block: &[u8], index: usize, codes: &mut [i8; GROUP]) {
    let (half, quarter) = (index / 4, index % 4);
    let (lower, upper) = (&block[half * 64 + quarter % 2 * 32..], &block[128 + half * 32..]);
    let (shift, upper_shift) = (quarter / 2 * 4, quarter * 2);
    for ((&low, &high), code) in lower.iter().zip(upper).zip(codes) {
        *code = ((low >> shift & 15) | (high >> upper_shift & 3) << 4) as i8 - 32;
    }
}
