//! Quantised block formats: one trait, one file per format, one row in [`FORMATS`].

mod q4_0;
mod q4_1;
mod q8_0;

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
    /// How to read the codes of a block without decoding them, if its values are `code * scale + minimum` with
    /// half-precision scales for each [`GROUP`] elements.
    fn affine(&self) -> Option<Affine> {
        None
    }
}

/// Elements that share a scale in [`Affine`] formats.
pub const GROUP: usize = 32;

/// The codes and scales of a format; `value = code * scale + minimum`.
#[derive(Clone, Copy)]
pub struct Affine {
    /// The set of codes, and what the minimum is.
    pub codes: Codes,
    /// Reads one block of [`GROUP`] elements: its codes into the slice, and its scale and minimum as half-precision bits
    /// (the minimum is 0 where [`Codes`] defines it).
    pub read: fn(block: &[u8], codes: &mut [i8; GROUP]) -> (u16, u16),
}

/// Integer codes of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codes {
    /// 0 to 15, with a stored minimum.
    NibblesWithMinimum,
    /// 0 to 15; the minimum is -8 scales.
    NibblesAroundEight,
    /// -128 to 127; the minimum is 0.
    Bytes,
}

/// Codes 0 to 15 of `packed`: the low halves, then the high halves.
fn read_nibbles(packed: &[u8], codes: &mut [i8; GROUP]) {
    let (low, high) = codes.split_at_mut(GROUP / 2);
    for ((&byte, low), high) in packed.iter().zip(low).zip(high) {
        *low = (byte & 15) as i8;
        *high = (byte >> 4) as i8;
    }
}

/// The half-precision bits at `block[offset..offset + 2]`.
fn u16_at(block: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes([block[offset], block[offset + 1]])
}

/// Every format that Ember decodes, by name.
pub const FORMATS: &[&dyn QuantFormat] = &[&q4_0::Q4_0, &q4_1::Q4_1, &q8_0::Q8_0];

/// The format of GGUF's type number `ggml_type`.
pub fn by_ggml_type(ggml_type: u32) -> Option<&'static dyn QuantFormat> {
    FORMATS.iter().copied().find(|format| format.ggml_type() == ggml_type)
}

/// The half-precision number at `block[offset..offset + 2]`.
fn f16_at(block: &[u8], offset: usize) -> f32 {
    half::f16::from_le_bytes([block[offset], block[offset + 1]]).to_f32()
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(format.block_size(), GROUP, "{}", format.name());
            let mut codes = [0; GROUP];
            let (scale, minimum) = (affine.read)(&blocks[format.block_bytes()..2 * format.block_bytes()], &mut codes);
            let scale = half::f16::from_bits(scale).to_f32();
            let minimum = match affine.codes {
                Codes::NibblesWithMinimum => half::f16::from_bits(minimum).to_f32(),
                Codes::NibblesAroundEight => -8.0 * scale,
                Codes::Bytes => 0.0,
            };
            for (code, value) in codes.iter().zip(&single) {
                let error = f32::from(*code) * scale + minimum - value;
                assert!(error.abs() <= value.abs() * 1e-6, "{}: {code} is not {value}", format.name());
            }
        }
    }
}
