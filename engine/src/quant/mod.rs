//! Quantised block formats: one trait, one file per format, one row in [`FORMATS`].

mod iq4_nl;
mod iq4_xs;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
#[cfg(test)]
pub(crate) mod sample;

/// A quantised format: `block_size` elements of a row in `block_bytes` bytes.
pub trait QuantFormat: Send + Sync {
    /// The format's name in GGUF tools, such as `Q4_0`.
    fn name(&self) -> &'static str;
    /// The type number in GGUF tensor infos (`ggml_type`).
    fn ggml_type(&self) -> u32;
    /// Elements per block.
    fn block_size(&self) -> usize;
    /// Bytes per block.
    fn block_bytes(&self) -> usize;
    /// Decodes `blocks` (a whole number of blocks) into `out` (as many elements).
    fn dequantize(&self, blocks: &[u8], out: &mut [f32]);
    /// How to read the codes of a block without decoding them, if its values are integer codes times a scale for each
    /// [`GROUP`] elements (or half as many), perhaps plus a minimum.
    fn affine(&self) -> Option<Affine> {
        None
    }

    /// Rounds [`GROUP`] values to a block, of formats whose blocks have that size and that floats can be rounded to at
    /// load.
    fn quantizer(&self) -> Option<Quantizer> {
        None
    }
}

/// Rounds values to a block.
pub type Quantizer = fn(values: &[f32; GROUP], block: &mut [u8]);

/// Elements that share a scale in [`Affine`] formats.
pub const GROUP: usize = 32;

/// The codes and scales of a format.
#[derive(Clone, Copy)]
pub struct Affine {
    /// The set of codes, and how values come from them.
    pub codes: Codes,
    /// Reads group `index` of a block: its codes into the slice, and its scales.
    pub read: fn(block: &[u8], index: usize, codes: &mut [i8; GROUP]) -> GroupScales,
}

/// Integer codes of a group and what they mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Codes {
    /// Codes are 0 to 15; else -128 to 127.
    pub nibbles: bool,
    /// How values come from codes.
    pub scales: Scales,
}

/// How values come from codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// `code * scale`.
    Single,
    /// `(code - 8) * scale`.
    AroundEight,
    /// `code * scale + minimum`.
    WithMinimum,
    /// `code * (factors[0] * scale) - factors[1] * minimum`, factors unsigned; scale and minimum are the same for 256
    /// elements.
    InUnits,
    /// `code * (factors[i] * scale)`, where `i` is 0 for the first 16 elements, else 1; factors signed; the scale is the
    /// same for 256 elements.
    BySixteen,
}

/// What a group of elements stores beside its codes; see [`Scales`].
#[derive(Debug, Clone, Copy, Default)]
pub struct GroupScales {
    /// Half-precision bits.
    pub scale: u16,
    /// Half-precision bits; 0 where there is none.
    pub minimum: u16,
    /// Small integers; 0 where there are none.
    pub factors: [u8; 2],
}

impl GroupScales {
    /// The value of element `i`, whose code is `code`.
    #[cfg(test)]
    pub fn value(&self, kind: Scales, code: i8, i: usize) -> f32 {
        let half = |bits| half::f16::from_bits(bits).to_f32();
        let (code, scale, minimum) = (f32::from(code), half(self.scale), half(self.minimum));
        match kind {
            Scales::Single => code * scale,
            Scales::AroundEight => (code - 8.0) * scale,
            Scales::WithMinimum => code * scale + minimum,
            Scales::InUnits => code * (scale * f32::from(self.factors[0])) - minimum * f32::from(self.factors[1]),
            Scales::BySixteen => code * (scale * f32::from(self.factors[i / 16] as i8)),
        }
    }
}

/// Codes 0 to 15 of `packed`: the low halves, then the high halves.
fn read_nibbles(packed: &[u8], codes: &mut [i8; GROUP]) {
    let (low, high) = codes.split_at_mut(GROUP / 2);
    for ((&byte, low), high) in packed.iter().zip(low).zip(high) {
        *low = (byte & 15) as i8;
        *high = (byte >> 4) as i8;
    }
}

/// Codes 0 to 31 of `packed`: 4 bytes with the fifth bits of all, then the lower four as in [`read_nibbles`].
fn read_five_bits(packed: &[u8], codes: &mut [i8; GROUP]) {
    read_nibbles(&packed[4..], codes);
    let fifths = u32::from_le_bytes([packed[0], packed[1], packed[2], packed[3]]);
    for (i, code) in codes.iter_mut().enumerate() {
        *code |= ((fifths >> i & 1) << 4) as i8;
    }
}

/// The half-precision bits at `block[offset..offset + 2]`.
fn u16_at(block: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([block[offset], block[offset + 1]])
}

/// Every format that Ember decodes, by name.
pub const FORMATS: &[&dyn QuantFormat] = &[
    &iq4_nl::Iq4Nl,
    &iq4_xs::Iq4Xs,
    &q2_k::Q2K,
    &q3_k::Q3K,
    &q4_0::Q4_0,
    &q4_1::Q4_1,
    &q4_k::Q4K,
    &q5_0::Q5_0,
    &q5_1::Q5_1,
    &q5_k::Q5K,
    &q6_k::Q6K,
    &q8_0::Q8_0,
];

/// The format of GGUF's type number `ggml_type`.
pub fn by_ggml_type(ggml_type: u32) -> Option<&'static dyn QuantFormat> {
    FORMATS.iter().copied().find(|format| format.ggml_type() == ggml_type)
}

/// The format that GGUF tools call `name`.
pub fn by_name(name: &str) -> Option<&'static dyn QuantFormat> {
    FORMATS.iter().copied().find(|format| format.name() == name)
}

/// The half-precision number at `block[offset..offset + 2]`.
fn f16_at(block: &[u8], offset: usize) -> f32 {
    half::f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::weights::gguf::{Gguf, writer::GgufWriter};

    #[test]
    fn all_decode_as_the_gguf_package_does() {
        let bytes_of = |hex: &str| -> Vec<u8> {
            let digit = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).expect("hexadecimal");
            (0..hex.len()).step_by(2).map(digit).collect()
        };
        let golden = include_str!("testdata/golden.txt");
        let mut names = Vec::new();
        for line in golden.lines() {
            let [name, blocks, values] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("three fields in a line");
            };
            let format = FORMATS.iter().find(|format| format.name() == name).expect("a format");
            let (blocks, values) = (bytes_of(blocks), bytes_of(values));
            let mut out = vec![f32::NAN; blocks.len() / format.block_bytes() * format.block_size()];
            format.dequantize(&blocks, &mut out);
            let bits: Vec<u8> = out.iter().flat_map(|value| value.to_bits().to_be_bytes()).collect();
            assert!(bits == values, "{name}");
            names.push(name);
        }
        assert_eq!(names, FORMATS.iter().map(|format| format.name()).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn truncated_data_are_an_error(cut in 1usize..400, seed in any::<u64>()) {
            for format in FORMATS {
                let (n_rows, n_columns) = (3, 2 * format.block_size());
                let mut data = sample::blocks(*format, 2 * n_rows, seed);
                let whole = data.len();
                data.truncate(whole.saturating_sub(cut));
                // Whole blocks of what is left are decoded, the rest is left alone.
                let mut out = vec![0.0; n_rows * n_columns];
                format.dequantize(&data, &mut out);
                let n_decoded = data.len() / format.block_bytes() * format.block_size();
                prop_assert!(out[n_decoded..].iter().all(|value| *value == 0.0), "{}", format.name());

                let mut writer = GgufWriter::default();
                writer.tensor("x", &[n_rows, n_columns], format.ggml_type(), data);
                let message = Gguf::open(writer.file().path()).err().map(|e| e.to_string()).unwrap_or_default();
                prop_assert!(message.contains("'x'") && message.contains("truncated"), "{}: {message:?}", format.name());
            }
        }
    }

    #[test]
    fn rounded_values_are_near() {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for format in FORMATS {
            let Some(quantize) = format.quantizer() else {
                continue;
            };
            assert_eq!(format.block_size(), GROUP, "{}", format.name());
            let n_steps = if format.name() == "Q8_0" { 127.0 } else { 8.0 };
            for size in [1.0f32, 1e-3, 0.0] {
                let values: [f32; GROUP] = std::array::from_fn(|_| size * next());
                let mut block = vec![0; format.block_bytes()];
                quantize(&values, &mut block);
                let mut back = [f32::NAN; GROUP];
                format.dequantize(&block, &mut back);
                let largest = values.iter().fold(0f32, |max, v| max.max(v.abs()));
                for (value, back) in values.iter().zip(back) {
                    // At the far end of an uneven range the last step is missing.
                    let error = (value - back).abs();
                    assert!(error <= 1.01 * largest / n_steps, "{}: {value} became {back}", format.name());
                }
            }
        }
    }

    #[test]
    fn names_and_type_numbers_are_unique_and_sorted() {
        let names: Vec<_> = FORMATS.iter().map(|f| f.name()).collect();
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
        for format in FORMATS {
            assert_eq!(FORMATS.iter().filter(|f| f.ggml_type() == format.ggml_type()).count(), 1, "{}", format.name());
            assert!(by_ggml_type(format.ggml_type()).is_some_and(|f| f.name() == format.name()));
        }
        assert!(by_ggml_type(9999).is_none());
    }

    #[test]
    fn all_decode_every_byte_of_several_blocks() {
        for format in FORMATS {
            let n_blocks = 3;
            let mut blocks = vec![0u8; n_blocks * format.block_bytes()];
            for (i, byte) in blocks.iter_mut().enumerate() {
                // Low bytes keep the scales finite.
                *byte = (i * 37 % 113) as u8;
            }
            let mut whole = vec![f32::NAN; n_blocks * format.block_size()];
            format.dequantize(&blocks, &mut whole);
            assert!(whole.iter().all(|v| v.is_finite()), "{}", format.name());
            let mut single = vec![f32::NAN; format.block_size()];
            format.dequantize(&blocks[format.block_bytes()..2 * format.block_bytes()], &mut single);
            assert_eq!(single, whole[format.block_size()..2 * format.block_size()], "{}", format.name());
            let Some(affine) = format.affine() else {
                continue;
            };
            let block = &blocks[format.block_bytes()..2 * format.block_bytes()];
            let mut codes = [0; GROUP];
            for (index, values) in single.chunks(GROUP).enumerate() {
                let scales = (affine.read)(block, index, &mut codes);
                for (i, (&code, value)) in codes.iter().zip(values).enumerate() {
                    assert!(!affine.codes.nibbles || (0..16).contains(&code), "{}", format.name());
                    let error = scales.value(affine.codes.scales, code, i) - value;
                    assert!(error.abs() <= value.abs() * 1e-6, "{}: {code} is not {value}", format.name());
                }
            }
        }
    }
}
