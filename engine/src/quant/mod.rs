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
        }
    }
}
