//! [`PackedMatrix`]: quantised weights rearranged for vectors, without loss; at their stored size if that is of four or
//! eight bits an element.
//!
//! Rows lie in groups of eight, a group in blocks of 32 columns. A block holds the codes, then the scales of its rows (see
//! [`Scales`]): eight half-precision scales and, with a minimum, eight minima; or twice eight bytes of factors, whose
//! units, half-precision scales (and minima) of 256 columns, lie behind the group's last block. Codes form 16-bit words;
//! a vector of 16 words covers the pairs of columns of all eight rows: word `2 * row + parity` is column
//! `2 * pair + parity` of `row`. A word holds four nibbles or two bytes, one for each of as many pairs, lowest bits first:
//!
//! ```text
//! nibbles: vector j (0..4), field n (0..4): pair 4 j + n      bytes: vector j (0..8), field n (0..2): pair 2 j + n
//! ```

use std::ops::Range;

use rayon::prelude::*;

use super::arena::{Arena, Piece};
use crate::{
    Error,
    quant::{Affine, Codes, GROUP, Scales},
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

/// Blocks that share units of scales.
pub const BLOCKS_PER_UNIT: usize = 8;

/// Bytes of a block's codes: eight rows, 32 columns.
pub const fn scales_offset(nibbles: bool) -> usize {
    if nibbles { ROWS * GROUP / 2 } else { ROWS * GROUP }
}

/// Bytes of a block.
pub const fn block_bytes(codes: Codes) -> usize {
    let scales = match codes.scales {
        Scales::Single | Scales::AroundEight | Scales::InUnits | Scales::BySixteen => 2 * ROWS,
        Scales::WithMinimum => 4 * ROWS,
    };
    scales_offset(codes.nibbles) + scales
}

/// Bytes of the units of [`BLOCKS_PER_UNIT`] blocks.
pub const fn unit_bytes(scales: Scales) -> usize {
    match scales {
        Scales::Single | Scales::AroundEight | Scales::WithMinimum => 0,
        Scales::InUnits => 4 * ROWS,
        Scales::BySixteen => 2 * ROWS,
    }
}

/// Bytes of a group of `n_cols` columns.
const fn group_bytes(codes: Codes, n_cols: usize) -> usize {
    let n_blocks = n_cols / GROUP;
    n_blocks * block_bytes(codes) + n_blocks / BLOCKS_PER_UNIT * unit_bytes(codes.scales)
}

/// Groups of a packed matrix, one after the other.
#[derive(Clone, Copy)]
pub struct PackedGroups<'a> {
    /// What the codes are.
    pub codes: Codes,
    /// Columns.
    pub n_cols: usize,
    /// As many whole groups as fit.
    pub bytes: &'a [u8],
}

impl<'a> PackedGroups<'a> {
    /// Bytes of a group.
    pub fn group_bytes(&self) -> usize {
        group_bytes(self.codes, self.n_cols)
    }

    /// The bytes of each group.
    pub fn groups(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        self.bytes.chunks_exact(self.group_bytes())
    }

    /// Blocks of a group.
    pub fn n_blocks(&self) -> usize {
        self.n_cols / GROUP
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
        let group_bytes = group_bytes(affine.codes, n_cols);
        let stored = (format.block_bytes(), format.block_size() / GROUP);
        let fill = |bytes: &mut [u8]| {
            bytes
                .par_chunks_mut(group_bytes)
                .zip(tensor.data.par_chunks(ROWS * tensor.row_bytes()))
                .for_each(|(group, rows)| pack_group(affine, stored, rows, (group, n_cols)));
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
        group_bytes(self.codes, self.n_cols)
    }

    /// The groups `range`.
    pub fn groups(&self, range: Range<usize>) -> PackedGroups<'_> {
        let bytes = &self.groups.bytes()[range.start * self.group_bytes()..range.end * self.group_bytes()];
        PackedGroups { codes: self.codes, n_cols: self.n_cols, bytes }
    }

    /// Bytes of memory.
    pub fn n_bytes(&self) -> usize {
        self.groups.bytes().len()
    }
}

/// Packs up to eight `rows` of blocks of `stored.0` bytes with `stored.1` groups of columns each; rows that are missing
/// stay zero. `group`: the packed bytes, and the columns.
fn pack_group(affine: Affine, stored: (usize, usize), rows: &[u8], (group, n_cols): (&mut [u8], usize)) {
    let Affine { codes: kind, read } = affine;
    let (n_blocks, n_bytes) = (n_cols / GROUP, block_bytes(kind));
    let (blocks, units) = group.split_at_mut(n_blocks * n_bytes);
    let row_bytes = n_blocks / stored.1 * stored.0;
    let mut codes = [0i8; GROUP];
    for (b, block) in blocks.chunks_exact_mut(n_bytes).enumerate() {
        for (row, stored_row) in rows.chunks_exact(row_bytes).enumerate() {
            let scales = read(&stored_row[b / stored.1 * stored.0..][..stored.0], b % stored.1, &mut codes);
            place_row(kind.nibbles, block, row, &codes);
            let put_halves = |to: &mut [u8]| {
                to[2 * row..][..2].copy_from_slice(&scales.scale.to_le_bytes());
                if matches!(kind.scales, Scales::WithMinimum | Scales::InUnits) {
                    to[2 * (ROWS + row)..][..2].copy_from_slice(&scales.minimum.to_le_bytes());
                }
            };
            let own = &mut block[scales_offset(kind.nibbles)..];
            if unit_bytes(kind.scales) == 0 {
                put_halves(own);
                continue;
            }
            [own[row], own[ROWS + row]] = scales.factors;
            if b % BLOCKS_PER_UNIT == 0 {
                put_halves(&mut units[b / BLOCKS_PER_UNIT * unit_bytes(kind.scales)..]);
            }
        }
    }
}

/// Byte and shift of the code at (row, column) in a block.
pub const fn position(nibbles: bool, row: usize, column: usize) -> (usize, usize) {
    let (pair, word) = (column / 2, 2 * row + column % 2);
    if nibbles {
        let field = pair % 4;
        (pair / 4 * 32 + 2 * word + field / 2, field % 2 * 4)
    } else {
        (pair / 2 * 32 + 2 * word + pair % 2, 0)
    }
}

/// Writes the codes of a row to their places in a block, see [`position`]: those of eight (nibbles) or four columns are
/// four bytes.
fn place_row(nibbles: bool, block: &mut [u8], row: usize, codes: &[i8; GROUP]) {
    let (vectors, _) = block.as_chunks_mut::<{ 4 * ROWS }>();
    let places = vectors.iter_mut().map(|vector| &mut vector[4 * row..4 * row + 4]);
    if nibbles {
        for (place, codes) in places.zip(codes.as_chunks::<8>().0) {
            let [a, b, c, d, e, f, g, h] = codes.map(|code| code as u8);
            place.copy_from_slice(&[a | c << 4, e | g << 4, b | d << 4, f | h << 4]);
        }
    } else {
        for (place, codes) in places.zip(codes.as_chunks::<4>().0) {
            let [a, b, c, d] = codes.map(|code| code as u8);
            place.copy_from_slice(&[a, c, b, d]);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::borrow::Cow;

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
        for nibbles in [true, false] {
            let places: std::collections::HashSet<_> =
                (0..ROWS * GROUP).map(|i| position(nibbles, i / GROUP, i % GROUP)).collect();
            assert_eq!(places.len(), ROWS * GROUP);
            assert!(places.iter().all(|&(byte, _)| byte < scales_offset(nibbles)));
        }
    }

    /// Formats, by number, whose packed size is the stored one.
    const OF_EQUAL_SIZE: [u32; 3] = [2, 3, 8];

    #[test]
    fn packing_keeps_size_and_values() {
        for format in quant::FORMATS.iter().filter(|format| format.affine().is_some()) {
            for n_rows in [16, 13] {
                let tensor = random_tensor(format.ggml_type(), n_rows, 512, 1);
                let packed = PackedMatrix::pack(&tensor, &mut Arena::default()).expect("memory").expect("has codes");
                if n_rows == 16 && OF_EQUAL_SIZE.contains(&format.ggml_type()) {
                    assert_eq!(packed.n_bytes(), tensor.data.len());
                }
                let values = tensor.to_f32();
                for row in 0..n_rows {
                    let group = packed.groups(row / ROWS..row / ROWS + 1);
                    for column in 0..512 {
                        let (value, want) = (value_at(&group, row % ROWS, column), values[row * 512 + column]);
                        assert!((value - want).abs() < 1e-6, "{}: row {row}, column {column}", format.name());
                    }
                }
            }
        }
    }

    /// The value at a row and column of a group, read as the module's description has it.
    fn value_at(group: &PackedGroups<'_>, row: usize, column: usize) -> f32 {
        let (codes, b) = (group.codes, column / GROUP);
        let block = &group.bytes[b * block_bytes(codes)..];
        let (byte, shift) = position(codes.nibbles, row, column % GROUP);
        let code = if codes.nibbles { (block[byte] >> shift & 15) as i8 } else { block[byte] as i8 };
        let own = &block[scales_offset(codes.nibbles)..];
        let units = &group.bytes[group.n_blocks() * block_bytes(codes)..];
        let halves = match unit_bytes(codes.scales) {
            0 => own,
            n_bytes => &units[b / BLOCKS_PER_UNIT * n_bytes..],
        };
        let half = |at: usize| halves.get(at..at + 2).map_or(0, |bits| u16::from_le_bytes([bits[0], bits[1]]));
        let scales = quant::GroupScales {
            scale: half(2 * row),
            minimum: half(2 * (ROWS + row)),
            factors: [own[row], own[ROWS + row]],
        };
        scales.value(codes.scales, code, column % GROUP)
    }
}
