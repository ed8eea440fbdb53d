//! 8-bit floats of safetensors checkpoints: `F8_E4M3` elements (Micikevicius et al. 2022, arXiv:2209.05433: sign, 4 bits
//! of exponent with bias 7, 3 of mantissa, no infinities) with scales of their own tensor, per tensor, row or block.

use half::bf16;
use rayon::prelude::*;

/// The value of an `F8_E4M3` byte.
pub fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Scales of a matrix, `value = element * scale`: one for each block of `block` rows and columns.
pub struct Scales {
    /// `[ceil(n_rows / block.0), ceil(n_columns / block.1)]`.
    pub values: Vec<f32>,
    /// Rows and columns of a block.
    pub block: (usize, usize),
}

impl Scales {
    /// The scales `values` of shape `shape` for a matrix of `[n_rows, n_columns]`, which are one for all, one a row, or
    /// one a block of `block` rows and columns; `None` if the shape is none of these.
    pub fn new(
        values: Vec<f32>,
        shape: &[usize],
        (n_rows, n_columns): (usize, usize),
        block: (usize, usize),
    ) -> Option<Self> {
        let blocks = [n_rows.div_ceil(block.0), n_columns.div_ceil(block.1)];
        let block = match shape {
            [] | [1] | [1, 1] => (n_rows, n_columns),
            [n] | [n, 1] if *n == n_rows => (1, n_columns),
            shape if *shape == blocks => block,
            _ => return None,
        };
        Some(Self { values, block })
    }
}

/// `elements`, rows of `n_columns` `F8_E4M3`, times their scales, rounded to little-endian bfloat16.
pub fn to_bf16(elements: &[u8], n_columns: usize, scales: &Scales) -> Vec<u8> {
    let table: [f32; 256] = std::array::from_fn(|byte| e4m3(byte as u8));
    let per_row = n_columns.div_ceil(scales.block.1);
    let mut out = vec![0u8; 2 * elements.len()];
    out.par_chunks_exact_mut(2 * n_columns).zip(elements.par_chunks_exact(n_columns)).enumerate().for_each(
        |(row, (out, elements))| {
            let scales_of_row = &scales.values[row / scales.block.0 * per_row..][..per_row];
            let blocks = elements.chunks(scales.block.1).zip(out.chunks_mut(2 * scales.block.1));
            for ((elements, out), scale) in blocks.zip(scales_of_row) {
                for (&byte, out) in elements.iter().zip(out.as_chunks_mut::<2>().0) {
                    *out = bf16::from_f32(table[usize::from(byte)] * scale).to_le_bytes();
                }
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_the_value_that_torch_gives_it() {
        #[derive(serde::Deserialize)]
        struct Golden {
            values: Vec<Option<f32>>,
        }
        let golden: Golden = serde_json::from_str(include_str!("../../tests/golden/fp8_e4m3.json")).expect("a table");
        assert_eq!(golden.values.len(), 256);
        for (byte, value) in golden.values.into_iter().enumerate() {
            let got = e4m3(byte as u8);
            assert!(value.map_or(got.is_nan(), |value| got.to_bits() == value.to_bits()), "{byte}: {got}");
        }
    }

    #[test]
    fn scales_are_those_of_the_tensor_the_row_or_the_block() {
        // One in e4m3.
        let ones = [0x38; 15];
        let check = |values: &[f32], shape: &[usize], expected: [f32; 15]| {
            let scales = Scales::new(values.to_vec(), shape, (3, 5), (2, 2)).expect("fits");
            let bytes = to_bf16(&ones, 5, &scales);
            let got: Vec<f32> = bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
            assert_eq!(got, expected, "{shape:?}");
        };
        check(&[3.0], &[], [3.0; 15]);
        check(&[3.0], &[1], [3.0; 15]);
        let by_row = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0];
        check(&[1.0, 2.0, 3.0], &[3, 1], by_row);
        let by_block = [1.0, 1.0, 2.0, 2.0, 3.0, 1.0, 1.0, 2.0, 2.0, 3.0, 4.0, 4.0, 5.0, 5.0, 6.0];
        check(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3], by_block);
        assert!(Scales::new(vec![1.0; 5], &[5], (3, 5), (2, 2)).is_none());
    }
}
