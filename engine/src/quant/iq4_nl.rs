//! IQ4_NL: 32 elements of 4 bits, which index a table of unevenly spaced values, and a half-precision scale;
//! `value = VALUES[q] * scale`.
//!
//! Layout as in ggml's `block_iq4_nl`: the scale, then 16 bytes whose low halves are elements 0 to 15 and whose high
//! halves are elements 16 to 31.

use super::{Affine, Codes, GROUP, GroupScales, QuantFormat, Scales, f16_at, read_nibbles, u16_at};

/// The IQ4_NL format.
pub struct Iq4Nl;

/// What the 16 codes of IQ4_NL and IQ4_XS stand for (ggml's `kvalues_iq4nl`).
pub(super) const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Reads the values of 32 elements from 16 bytes.
pub(super) fn read_values(packed: &[u8], values: &mut [i8; GROUP]) {
    read_nibbles(packed, values);
    values.iter_mut().for_each(|value| *value = VALUES[*value as usize & 15]);
}

impl QuantFormat for Iq4Nl {
    fn name(&self) -> &'static str {
        "IQ4_NL"
    }

    fn ggml_type(&self) -> u32 {
        20
    }

    fn block_size(&self) -> usize {
        32
    }

    fn block_bytes(&self) -> usize {
        18
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        let mut values = [0; GROUP];
        for (block, out) in blocks.chunks_exact(18).zip(out.chunks_exact_mut(GROUP)) {
            let scale = f16_at(block, 0);
            read_values(&block[2..], &mut values);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from(value) * scale);
        }
    }

    fn affine(&self) -> Option<Affine> {
        let read = |block: &[u8], _: usize, codes: &mut [i8; GROUP]| {
            read_values(&block[2..], codes);
            GroupScales { scale: u16_at(block, 0), ..GroupScales::default() }
        };
        Some(Affine { codes: Codes { nibbles: false, scales: Scales::Single }, read })
    }
}
