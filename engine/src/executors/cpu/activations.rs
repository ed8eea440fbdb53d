//! [`Activations`]: the input rows of a product, as float32 and as 16-bit integers.

use std::{cell::RefCell, ops::Range};

use bytemuck::{Pod, Zeroable};

use super::{
    disjoint::Disjoint,
    kernels::{ActivationBlock, Kernels, MAX_WIDTH, QuantizedRows},
    pool::Pool,
};
use crate::quant::GROUP;

/// Input rows of a [`super::linear::Linear`], or of several of them: each multiplies a segment.
pub struct Activations {
    n_cols: usize,
    /// Ranges of rows, one after the other.
    segments: Vec<Range<usize>>,
    /// `[n_rows, n_cols]`; empty if no matrix wants floats.
    rows: Vec<f32>,
    /// Block after block as in [`ActivationBlock`]; empty if no matrix wants integers.
    codes: Vec<Line>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    quantized: bool,
    /// Most rows of a block.
    max_width: usize,
}

/// A cache line of codes.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([i16; GROUP]);

impl Activations {
    /// Room for `max_rows` rows of `n_cols`; with `quantized`, as integers too.
    pub fn new(max_rows: usize, n_cols: usize, quantized: bool) -> Self {
        let n = if quantized { max_rows * n_cols } else { 0 };
        Self {
            n_cols,
            segments: Vec::new(),
            rows: vec![0.0; max_rows * n_cols],
            codes: vec![Line::zeroed(); n / GROUP],
            scales: vec![0.0; n / GROUP + MAX_WIDTH],
            sums: vec![0.0; n / GROUP + MAX_WIDTH],
            quantized,
            max_width: 1,
        }
    }

    /// Without room for the rows as float32, which matrices of integer codes never read.
    pub fn without_floats(mut self) -> Self {
        debug_assert!(self.quantized);
        self.rows = Vec::new();
        self
    }

    /// Sets the rows, all of one segment: `fill` writes row `m` of `n_rows`, on any thread.
    pub fn fill(
        &mut self,
        pool: &mut Pool,
        kernels: &Kernels,
        n_rows: usize,
        fill: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        self.fill_segments(pool, kernels, [n_rows], fill);
    }

    /// Sets the rows of segments of these lengths, none of them 0: `fill` writes row `m` of all, on any thread.
    pub fn fill_segments(
        &mut self,
        pool: &mut Pool,
        kernels: &Kernels,
        lengths: impl IntoIterator<Item = usize>,
        fill: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) {
        let mut n_rows = 0;
        self.segments.clear();
        self.segments.extend(lengths.into_iter().map(|n| {
            n_rows += n;
            n_rows - n..n_rows
        }));
        self.max_width = kernels.max_width;
        let (segments, max_width) = (&self.segments, self.max_width);
        let n_cols = self.n_cols;
        let n_groups = n_cols / GROUP;
        let per_task = n_rows.div_ceil(4 * pool.n_threads());
        let (quantized, keep) = (self.quantized, !self.rows.is_empty());
        let rows = Disjoint::new(&mut self.rows);
        let codes = Disjoint::<i16>::new(bytemuck::cast_slice_mut(&mut self.codes));
        let (scales, sums) = (Disjoint::new(&mut self.scales), Disjoint::new(&mut self.sums));
        pool.run(n_rows.div_ceil(per_task.max(1)), &|task| {
            for m in task * per_task..((task + 1) * per_task).min(n_rows) {
                let fill_and_round = |row: &mut [f32]| {
                    fill(m, row);
                    if quantized {
                        let segment = &segments[segments.partition_point(|segment| segment.end <= m)];
                        let (first, width) = block_of(max_width, segment.len(), m - segment.start);
                        let first = segment.start + first;
                        let block = QuantizedRows {
                            codes: codes.ptr_at(first * n_cols),
                            scales: scales.ptr_at(first * n_groups),
                            sums: sums.ptr_at(first * n_groups),
                        };
                        // SAFETY: blocks hold `width` rows of `n_cols` columns; each row belongs to one task.
                        unsafe { kernels.quantize(row, (width, m - first), block) };
                    }
                };
                if keep {
                    // SAFETY: each row belongs to one task.
                    fill_and_round(unsafe { rows.range(m * n_cols..(m + 1) * n_cols) });
                } else {
                    ROW.with_borrow_mut(|row| {
                        row.resize(row.len().max(n_cols), 0.0);
                        fill_and_round(&mut row[..n_cols]);
                    });
                }
            }
        });
    }

    /// The rows of segment `index`.
    pub fn segment(&self, index: usize) -> Rows<'_> {
        Rows { all: self, range: self.segments[index].clone() }
    }
}

/// The rows of a segment.
#[derive(Clone)]
pub struct Rows<'a> {
    all: &'a Activations,
    range: Range<usize>,
}

impl<'a> Rows<'a> {
    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.range.len()
    }

    /// Where they lie among the rows of all segments.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Rows `first..first + n` as float32, `[n, n_cols]`.
    pub fn floats(&self, first: usize, n: usize) -> &'a [f32] {
        let start = (self.range.start + first) * self.all.n_cols;
        &self.all.rows[start..start + n * self.all.n_cols]
    }

    /// The rows as integers: first row of each block, and the block.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, ActivationBlock<'a>)> {
        let (all, n_rows, origin) = (self.all, self.n_rows(), self.range.start);
        debug_assert!(all.quantized);
        let n_groups = all.n_cols / GROUP;
        let codes: &[i16] = bytemuck::cast_slice(&all.codes);
        let mut next = 0;
        std::iter::from_fn(move || {
            if next == n_rows {
                return None;
            }
            let (start, width) = block_of(all.max_width, n_rows, next);
            next = start + width;
            let of = |per_row: usize| (origin + start) * per_row..(origin + next) * per_row;
            let block = ActivationBlock {
                width,
                codes: &codes[of(all.n_cols)],
                scales: &all.scales[of(n_groups).start..],
                sums: &all.sums[of(n_groups).start..],
            };
            Some((start, block))
        })
    }
}

thread_local! {
    /// A row that is kept as integers only.
    static ROW: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// First row and number of rows of the block of at most `max_width` that holds row `m` of `n_rows`. Blocks are as equal
/// as can be, so that none is so narrow that its kernel wastes the weights' decoding.
fn block_of(max_width: usize, n_rows: usize, m: usize) -> (usize, usize) {
    let n_blocks = n_rows.div_ceil(max_width);
    let (narrow, n_wide) = (n_rows / n_blocks, n_rows % n_blocks);
    // The first `n_wide` blocks have a row more.
    let in_wide = n_wide * (narrow + 1);
    if m < in_wide {
        (m / (narrow + 1) * (narrow + 1), narrow + 1)
    } else {
        (in_wide + (m - in_wide) / narrow * narrow, narrow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_the_rows_in_order() {
        for (n_rows, max_width) in (1..60).flat_map(|n_rows| [(n_rows, 8), (n_rows, 16)]) {
            let mut next = 0;
            let mut widths = Vec::new();
            while next < n_rows {
                let (first, width) = block_of(max_width, n_rows, next);
                assert_eq!(first, next);
                assert!((1..=max_width).contains(&width));
                for m in first..first + width {
                    assert_eq!(block_of(max_width, n_rows, m), (first, width));
                }
                next += width;
                widths.push(width);
            }
            assert_eq!(next, n_rows);
            assert!(widths.iter().max().unwrap() - widths.iter().min().unwrap() <= 1);
        }
    }
}
