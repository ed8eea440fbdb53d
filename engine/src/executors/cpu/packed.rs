//! [`PackedMatrix`]: quantised weights rearranged for vectors, without loss; at their stored size if that is of four or
//! eight bits an element.
//!
//! Rows lie in groups of eight, a group in blocks of 32 columns. A block holds the codes, then eight half-precision
//! scales, then eight minima if the format stores them. Codes form 16-bit words; a vector of 16 words covers the pairs
//! of columns of all eight rows: word `2 * row + parity` is column `2 * pair + parity` of `row`. A word holds four
//! nibbles or two bytes, one for each of as many pairs, lowest bits first:
//!
//! ```text
//! nibbles: vector j (0..4), field n (0..4): pair 4 j + n      bytes: vector j (0..8), field n (0..2): pair 2 j + n
//! ```

use rayon::prelude::*;

use super::arena::{Arena, Piece};
use crate::{
    Error,
    quant::{Affine, Codes, GROUP},
    weights::{DType, TensorView},
};

/// Rows of a group.
pub const ROWS: usize = 8;

/// A matrix of integer codes with a scale (and perhaps a minimum) per row and 32 columns.
pub struct PackedMatrix {
    codes: Codes,
    n_rows: usize,
    n_cols: usize,
    groups: Piece,
}

/// Bytes of a block: eight rows, 32 columns.
pub const fn block_bytes(codes: Codes) -> usize {
    match codes {
        Codes::NibblesWithMinimum => ROWS * GROUP / 2 + 4 * ROWS,
        Codes::NibblesAroundEight => ROWS * GROUP / 2 + 2 * ROWS,
        Codes::Bytes => ROWS * GROUP + 2 * ROWS,
    }
}

/// Offset of the scales in a block.
pub const fn scales_offset(codes: Codes) -> usize {
    match codes {
        Codes::NibblesWithMinimum | Codes::NibblesAroundEight => ROWS * GROUP / 2,
        Codes::Bytes => ROWS * GROUP,
    }
}

impl PackedMatrix {
    /// Packs `tensor`, `[n_rows, n_cols]`, into `arena`; `None` if its type has no [`Affine`] codes.
    ///
    /// # Errors
    /// [`Error::Device`] if there is no memory left.
    pub fn pack(tensor: &TensorView<'_>, arena: &mut Arena) -> Result<Option<Self>, Error> {
        let DType::Quant(format) = tensor.dtype else {
            return Ok(None);
        };
        let Some(affine) = format.affine() else {
            return Ok(None);
        };
        let (n_rows, n_cols) = (tensor.shape[0], tensor.n_columns());
        let group_bytes = n_cols / GROUP * block_bytes(affine.codes);
        let fill = |bytes: &mut [u8]| {
            bytes
                .par_chunks_mut(group_bytes)
                .zip(tensor.data.par_chunks(ROWS * tensor.row_bytes()))
                .for_each(|(group, rows)| pack_group(affine, format.block_bytes(), rows, group));
        };
        let groups = arena
            .piece(n_rows.div_ceil(ROWS) * group_bytes, fill)
            .map_err(|e| Error::Device(format!("no memory for the weights: {e}")))?;
        Ok(Some(Self { codes: affine.codes, n_rows, n_cols, groups }))
    }

    /// What the codes are.
    pub fn codes(&self) -> Codes {
        self.codes
    }

    /// Rows, without those that fill up the last group.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Groups of eight rows.
    pub fn n_groups(&self) -> usize {
        self.n_rows.div_ceil(ROWS)
    }

    /// Bytes of a group.
    pub fn group_bytes(&self) -> usize {
        self.n_cols / GROUP * block_bytes(self.codes)
    }

    /// The blocks of group `index`.
    pub fn group(&self, index: usize) -> &[u8] {
        &self.groups.bytes()[index * self.group_bytes()..][..self.group_bytes()]
    }

    /// Bytes of memory.
    pub fn n_bytes(&self) -> usize {
        self.groups.bytes().len()
    }
}

/// Packs up to eight `rows` of blocks of `stored_bytes` bytes; rows that are missing stay zero.
fn pack_group(affine: Affine, stored_bytes: usize, rows: &[u8], group: &mut [u8]) {
    let n_bytes = block_bytes(affine.codes);
    let row_bytes = group.len() / n_bytes * stored_bytes;
    let mut codes = [0i8; GROUP];
    for (row, stored) in rows.chunks_exact(row_bytes).enumerate() {
        for (stored, block) in stored.chunks_exact(stored_bytes).zip(group.chunks_exact_mut(n_bytes)) {
            let (scale, minimum) = (affine.read)(stored, &mut codes);
            for (column, code) in codes.iter().enumerate() {
                place(affine.codes, block, (row, column), *code as u8);
            }
            let at = scales_offset(affine.codes) + 2 * row;
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            if affine.codes == Codes::NibblesWithMinimum {
                block[at + 2 * ROWS..][..2].copy_from_slice(&minimum.to_le_bytes());
            }
        }
    }
}

/// Byte and shift of the code at (row, column) in a block.
pub const fn position(codes: Codes, row: usize, column: usize) -> (usize, usize) {
    let (pair, word) = (column / 2, 2 * row + column % 2);
    match codes {
        Codes::NibblesWithMinimum | Codes::NibblesAroundEight => {
            let field = pair % 4;
            (pair / 4 * 32 + 2 * word + field / 2, field % 2 * 4)
        }
        Codes::Bytes => (pair / 2 * 32 + 2 * word + pair % 2, 0),
    }
}

fn place(codes: Codes, block: &mut [u8], (row, column): (usize, usize), code: u8) {
    let (byte, shift) = position(codes, row, column);
    block[byte] |= code << shift;
}

#[cfg(test)]
pub(super) mod tests {
    use std::borrow::Cow;

    use half::f16;

    use super::*;
    use crate::quant;

    /// A tensor of random blocks of the format `ggml_type` with scales near 0.01.
    pub fn random_tensor(ggml_type: u32, n_rows: usize, n_cols: usize, seed: u64) -> TensorView<'static> {
        let format = quant::by_ggml_type(ggml_type).expect("a format");
        let data = quant::sample::blocks(format, n_rows * n_cols / format.block_size(), seed);
        TensorView { dtype: DType::Quant(format), shape: vec![n_rows, n_cols], data: Cow::Owned(data) }
    }

    #[test]
    fn codes_have_places_of_their_own() {
        for codes in [Codes::NibblesWithMinimum, Codes::Bytes] {
            let places: std::collections::HashSet<_> =
                (0..ROWS * GROUP).map(|i| position(codes, i / GROUP, i % GROUP)).collect();
            assert_eq!(places.len(), ROWS * GROUP);
            assert!(places.iter().all(|&(byte, _)| byte < scales_offset(codes)));
        }
    }

    #[test]
    fn packing_keeps_size_and_values() {
        for (ggml_type, n_rows) in [(2, 16), (3, 16), (8, 16), (3, 13), (6, 16), (20, 9)] {
            let tensor = random_tensor(ggml_type, n_rows, 96, 1);
            let packed = PackedMatrix::pack(&tensor, &mut Arena::default()).expect("memory").expect("has codes");
            if n_rows == 16 && ggml_type != 6 {
                assert_eq!(packed.n_groups() * packed.group_bytes(), tensor.data.len());
            }
            let values = tensor.to_f32();
            for row in 0..n_rows {
                let group = packed.group(row / ROWS);
                for column in 0..96 {
                    let block = &group[column / GROUP * block_bytes(packed.codes())..];
                    let (byte, shift) = position(packed.codes(), row % ROWS, column % GROUP);
                    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
                    let at = scales_offset(packed.codes()) + 2 * (row % ROWS);
                    let value = match packed.codes() {
                        Codes::Bytes => f32::from(block[byte] as i8) * half(at),
                        Codes::NibblesAroundEight => (f32::from(block[byte] >> shift & 15) - 8.0) * half(at),
                        Codes::NibblesWithMinimum => {
                            f32::from(block[byte] >> shift & 15) * half(at) + half(at + 2 * ROWS)
                        }
                    };
                    assert!((value - values[row * 96 + column]).abs() < 1e-6, "row {row}, column {column}");
                }
            }
        }
    }
}
