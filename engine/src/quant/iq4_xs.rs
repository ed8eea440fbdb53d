//! IQ4_XS: 256 elements of 4 bits, which index IQ4_NL's table; each 32 have a 6-bit scale in units of a half-precision
//! number of the block; `value = VALUES[q] * ((scale - 32) * unit)`.
//!
//! Layout as in ggml's `block_iq4_xs`: the unit, a 16-bit word with the upper two bits of the eight scales, 4 bytes with
//! their lower four bits, 128 bytes of elements: of each 16 bytes, the low halves are 16 elements, the high halves the
//! next 16.

use super::{GROUP, QuantFormat, f16_at, iq4_nl::read_values, u16_at};

/// The IQ4_XS format.
pub struct Iq4Xs;

impl QuantFormat for Iq4Xs {
    fn name(&self) -> &'static str {
        "IQ4_XS"
    }

    fn ggml_type(&self) -> u32 {
        23
    }

    fn block_size(&self) -> usize {
        256
    }

    fn block_bytes(&self) -> usize {
        136
    }

    fn dequantize(&self, blocks: &[u8], out: &mut [f32]) {
        let mut values = [0; GROUP];
        for (block, out) in blocks.chunks_exact(136).zip(out.chunks_exact_mut(256)) {
            let (unit, upper, lower) = (f16_at(block, 0), u16_at(block, 2), &block[4..8]);
            for (i, (packed, out)) in block[8..].chunks_exact(16).zip(out.chunks_exact_mut(GROUP)).enumerate() {
                let low = lower[i / 2] >> (i % 2 * 4) & 15;
                let high = (upper >> (2 * i) & 3) as u8;
                let scale = unit * f32::from((low | high << 4) as i8 - 32);
                read_values(packed, &mut values);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from(value) * scale);
            }
        }
    }
}
