//! [`Kernels`]: the inner loops, one table of functions per instruction set.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
#[cfg(target_arch = "x86_64")]
mod dispatch;
mod elementwise;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;

use super::packed::{PackedGroups, unit_bytes};
use crate::{
    quant::{GROUP, Scales},
    weights::DType,
};

/// Most activation rows that one call of [`Kernels::affine`] takes, whatever the instruction set.
pub const MAX_WIDTH: usize = 16;
/// Weight rows and most activation rows of [`Kernels::dots`].
pub const DOT_ROWS: usize = 3;
/// Most activation rows that one call of [`Kernels::dots`] takes.
pub const DOT_WIDTH: usize = 4;
/// Most rows of [`Kernels::tile`].
pub const TILE_ROWS: usize = 6;
/// Columns of [`Kernels::tile`].
pub const TILE_COLS: usize = 16;

/// Up to [`Kernels::max_width`] activation rows as 16-bit integers, as [`Kernels::quantize`] lays them out.
#[derive(Clone, Copy)]
pub struct ActivationBlock<'a> {
    /// Rows.
    pub width: usize,
    /// `[n_cols / 2, width, 2]`, or what the instruction set prefers.
    pub codes: &'a [i16],
    /// `[n_cols / 32, width]`, with [`MAX_WIDTH`] more elements behind: `value = code * scale`.
    pub scales: &'a [f32],
    /// `[n_cols / 32, width]`, with [`MAX_WIDTH`] more elements behind: sums of the 32 values.
    pub sums: &'a [f32],
}

/// Room for a decoded group; see [`ExpandedGroup`].
pub struct Expanded<'a> {
    /// `[n_cols / 2, 8, 2]`.
    pub codes: &'a mut [i16],
    /// `[n_cols / scale_columns, 8]`, see [`scale_columns`].
    pub scales: &'a mut [f32],
    /// `[n_cols / 32, 8]`.
    pub minima: &'a mut [f32],
}

/// A group of eight weight rows whose codes are 16-bit integers.
#[derive(Clone, Copy)]
pub struct ExpandedGroup<'a> {
    /// `[n_cols / 2, 8, 2]`.
    pub codes: &'a [i16],
    /// `[n_cols / scale_columns, 8]`, see [`scale_columns`].
    pub scales: &'a [f32],
    /// `[n_cols / 32, 8]`.
    pub minima: &'a [f32],
}

/// Columns that share a scale.
pub const fn scale_columns(scales: Scales) -> usize {
    match scales {
        Scales::BySixteen => GROUP / 2,
        _ => GROUP,
    }
}

/// Where the rows of an [`ActivationBlock`] are written.
#[derive(Clone, Copy)]
pub struct QuantizedRows {
    /// `[n_cols / 2, width, 2]`, or what the instruction set prefers.
    pub codes: *mut i16,
    /// `[n_cols / 32, width]`.
    pub scales: *mut f32,
    /// `[n_cols / 32, width]`.
    pub sums: *mut f32,
}

/// Where results go: row `m`, column `n` at `ptr + m * stride + n`.
#[derive(Clone, Copy)]
pub struct Output {
    /// The first element.
    pub ptr: *mut f32,
    /// Elements from row to row.
    pub stride: usize,
    /// Add to what is there.
    pub accumulate: bool,
}

/// A matrix operand in memory: row `r`, column `c` at `ptr + r * stride + c`.
#[derive(Clone, Copy)]
pub struct Operand<T> {
    /// The first element.
    pub ptr: *const T,
    /// Elements from row to row.
    pub stride: usize,
}

/// Element type of the rows that [`Kernels::dots`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl FloatType {
    /// The float type of `dtype`; `None` if it is quantised.
    pub fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::BF16),
            DType::Quant(_) => None,
        }
    }
}

type AffineFn = unsafe fn(&PackedGroups<'_>, &ActivationBlock<'_>, Output);
type ExpandFn = unsafe fn(&PackedGroups<'_>, &mut Expanded<'_>);
type ExpandedFn = unsafe fn(&ExpandedGroup<'_>, &ActivationBlock<'_>, Output);
type DotsFn = unsafe fn(FloatType, (&[u8], usize), (&[f32], usize), Output);
type TileFn = unsafe fn((usize, usize), Operand<f32>, Operand<u16>, Output);
type TileI8Fn = unsafe fn((usize, usize), Operand<f32>, (Operand<i8>, &[f32; TILE_COLS]), Output);

/// The inner loops for one instruction set.
pub struct Kernels {
    /// The instruction set's name.
    pub name: &'static str,
    /// From this many rows of activations on, [`Kernels::expand`] and [`Kernels::expanded`] are faster than
    /// [`Kernels::affine`].
    pub expand_from: usize,
    /// Most activation rows that one call of [`Kernels::affine`] takes.
    pub max_width: usize,
    affine: AffineFn,
    expand: ExpandFn,
    expanded: ExpandedFn,
    dots: DotsFn,
    tile: TileFn,
    tile_i8: TileI8Fn,
    rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    quantize: unsafe fn(&[f32], (usize, usize), QuantizedRows),
    silu_mul: unsafe fn(&[f32], &[f32], &mut [f32]),
    softmax: unsafe fn(&mut [f32], f32) -> (f32, f32),
    rotate: unsafe fn(&mut [f32], &[f32], &[f32]),
    scale: unsafe fn(&mut [f32], f32),
    to_f16: unsafe fn(&[f32], &mut [u16]),
    argmax: unsafe fn(&[f32]) -> u32,
}

/// Panics unless `activations` are one to `max_width` rows of `n_blocks` blocks of columns.
fn check(max_width: usize, n_blocks: usize, activations: &ActivationBlock<'_>) {
    let width = activations.width;
    assert!((1..=max_width).contains(&width));
    assert!(activations.codes.len() >= n_blocks * GROUP * width && activations.scales.len() >= n_blocks * width);
    assert!(activations.sums.len() >= n_blocks * width);
}

impl Kernels {
    /// The tables that this machine can run, best first.
    pub fn available() -> Vec<&'static Self> {
        let mut tables: Vec<&'static Self> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            if is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                if amx::is_usable() {
                    tables.push(&amx::KERNELS);
                }
                tables.push(&avx512::KERNELS);
            }
            if is_x86_feature_detected!("avxvnni") {
                tables.push(&avx_vnni::KERNELS);
            }
            tables.push(&avx2::KERNELS);
        }
        #[cfg(target_arch = "aarch64")]
        tables.push(&neon::KERNELS);
        tables.push(&portable::KERNELS);
        tables
    }

    /// The best table.
    pub fn best() -> &'static Self {
        Self::available()[0]
    }

    /// Multiplies groups of eight weight rows with the rows of `activations`, which have as many columns:
    /// `out[m, 8 * group + n]`.
    ///
    /// # Safety
    /// `out` must be valid for `activations.width` rows of these columns, and nobody else may use them meanwhile.
    pub unsafe fn affine(&self, groups: &PackedGroups<'_>, activations: &ActivationBlock<'_>, out: Output) {
        check(self.max_width, groups.n_blocks(), activations);
        debug_assert!(unit_bytes(groups.codes.scales) == 0 || groups.n_cols.is_multiple_of(256));
        // SAFETY: lengths are checked; `out` is the caller's promise; a table is only had if the machine can run it.
        unsafe { (self.affine)(groups, activations, out) }
    }

    /// Decodes a packed group, for [`Kernels::expanded`].
    pub fn expand(&self, group: &PackedGroups<'_>, out: &mut Expanded<'_>) {
        let n_cols = group.n_cols;
        assert!(group.bytes.len() == group.group_bytes() && out.codes.len() == n_cols * 8);
        assert_eq!(out.scales.len(), n_cols / scale_columns(group.codes.scales) * 8);
        assert_eq!(out.minima.len(), n_cols / GROUP * 8);
        // SAFETY: lengths are checked; a table is only had if the machine can run it.
        unsafe { (self.expand)(group, out) }
    }

    /// As [`Kernels::affine`], to the bit, for one group that is decoded already.
    ///
    /// # Safety
    /// As [`Kernels::affine`].
    pub unsafe fn expanded(&self, group: &ExpandedGroup<'_>, activations: &ActivationBlock<'_>, out: Output) {
        let n_blocks = group.minima.len() / 8;
        check(self.max_width, n_blocks, activations);
        assert!(group.codes.len() == n_blocks * 256 && group.minima.len() == n_blocks * 8);
        assert!(group.scales.len() == n_blocks * 8 || group.scales.len() == n_blocks * 16);
        // SAFETY: as in `affine`.
        unsafe { (self.expanded)(group, activations, out) }
    }

    /// Dot products of up to [`DOT_ROWS`] weight rows, stored one after the other, with up to [`DOT_WIDTH`] rows of
    /// `n_cols` activations: `out[m, n]`. `rows`: their bytes and number; `activations`: the rows' elements, one row
    /// after the other, and their number.
    ///
    /// # Safety
    /// `out` must be valid for these rows and columns, and nobody else may use them meanwhile.
    pub unsafe fn dots(&self, float: FloatType, rows: (&[u8], usize), activations: (&[f32], usize), out: Output) {
        let n_cols = activations.0.len() / activations.1;
        let size = if float == FloatType::F32 { 4 } else { 2 };
        assert!((1..=DOT_ROWS).contains(&rows.1) && (1..=DOT_WIDTH).contains(&activations.1));
        assert_eq!(rows.0.len(), rows.1 * n_cols * size);
        // SAFETY: as in `affine`.
        unsafe { (self.dots)(float, rows, activations, out) }
    }

    /// `out[r, c] = sum over k of a[r, k] * b[k, c]` for `n_rows` (at most [`TILE_ROWS`]) rows, [`TILE_COLS`] columns
    /// and `depth` values of k; `b` in half precision.
    ///
    /// # Safety
    /// All three matrices must be valid for these sizes, and nobody else may use `out` meanwhile.
    pub unsafe fn tile(&self, (n_rows, depth): (usize, usize), a: Operand<f32>, b: Operand<u16>, out: Output) {
        debug_assert!((1..=TILE_ROWS).contains(&n_rows));
        // SAFETY: the caller's promise; a table is only had if the machine can run it.
        unsafe { (self.tile)((n_rows, depth), a, b, out) }
    }

    /// As [`Kernels::tile`] for 8-bit integers: `out[r, c] = b.1[c] * sum over k of a[r, k] * b.0[k, c]`.
    ///
    /// # Safety
    /// As [`Kernels::tile`].
    pub unsafe fn tile_i8(
        &self,
        (n_rows, depth): (usize, usize),
        a: Operand<f32>,
        b: (Operand<i8>, &[f32; TILE_COLS]),
        out: Output,
    ) {
        debug_assert!((1..=TILE_ROWS).contains(&n_rows));
        // SAFETY: as in `tile`.
        unsafe { (self.tile_i8)((n_rows, depth), a, b, out) }
    }

    /// `out = x / rms(x) * weight`, all of equal length.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: safe code; a table is only had if the machine can run it. The same below.
        unsafe { (self.rms_norm)(x, weight, eps, out) }
    }

    /// Rounds `x`, `[n_cols]`, to row `row` of a block of `width` rows.
    ///
    /// # Safety
    /// The block must hold `x.len()` columns of `width` rows, and nobody else may use this row meanwhile.
    pub unsafe fn quantize(&self, x: &[f32], (width, row): (usize, usize), block: QuantizedRows) {
        // SAFETY: the caller's promise; a table is only had if the machine can run it.
        unsafe { (self.quantize)(x, (width, row), block) }
    }

    /// `out = silu(gate) * up`, all of equal length.
    pub fn silu_mul(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.silu_mul)(gate, up, out) }
    }

    /// Turns `scores` into `exp(score - max)`, where `max` is the greater of `max_so_far` and the best score. Returns
    /// that maximum and the sum. If no score is above negative infinity and neither is `max_so_far`, all become 0.
    pub fn softmax(&self, scores: &mut [f32], max_so_far: f32) -> (f32, f32) {
        // SAFETY: as above.
        unsafe { (self.softmax)(scores, max_so_far) }
    }

    /// Rotates a head in rotate-half order; `cos` and `sin`: `[head_dim / 2]`.
    pub fn rotate(&self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        // SAFETY: as above.
        unsafe { (self.rotate)(head, cos, sin) }
    }

    /// Multiplies `x` by `factor`.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        // SAFETY: as above.
        unsafe { (self.scale)(x, factor) }
    }

    /// Rounds to half precision (to nearest even). Equal lengths.
    pub fn to_f16(&self, x: &[f32], out: &mut [u16]) {
        // SAFETY: as above.
        unsafe { (self.to_f16)(x, out) }
    }

    /// Index of the greatest element, the lowest among equals.
    pub fn argmax(&self, x: &[f32]) -> u32 {
        // SAFETY: as above.
        unsafe { (self.argmax)(x) }
    }
}
