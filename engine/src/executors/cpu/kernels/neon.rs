//! The kernels for NEON: every 64-bit ARM processor.

use std::arch::{aarch64::*, asm};

use half::{bf16, f16};

use super::{
    ActivationBlock, DOT_ROWS, Expanded, ExpandedGroup, FloatType, Kernels, Operand, Output, TILE_COLS, elementwise,
};
use crate::{
    executors::cpu::packed::{BLOCKS_PER_UNIT, PackedGroups, ROWS, block_bytes, scales_offset, unit_bytes},
    quant::{GROUP, Scales},
};

pub static KERNELS: Kernels = Kernels {
    name: "neon",
    expand_from: 25,
    max_width: 8,
    affine,
    expand,
    expanded,
    dots,
    tile,
    tile_i8,
    rms_norm: elementwise::rms_norm,
    quantize: elementwise::quantize,
    silu_mul: elementwise::silu_mul::<true>,
    softmax: elementwise::softmax::<true>,
    rotate: elementwise::rotate,
    scale: elementwise::scale,
    to_f16,
    argmax: elementwise::argmax,
};

/// Eight elements.
type Floats = [float32x4_t; 2];

/// Most rows of activations at once: each takes four registers for sums and two for totals.
const PASS: usize = 4;

/// Widens four half-precision numbers. In assembly: the intrinsic wants a type that stable Rust lacks.
#[inline]
#[target_feature(enable = "neon")]
fn widen(halves: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) halves, options(pure, nomem, nostack));
    }
    wide
}

/// Rounds four numbers to half precision.
#[inline]
#[target_feature(enable = "neon")]
fn narrow(wide: float32x4_t) -> uint16x4_t {
    let halves: uint16x4_t;
    // SAFETY: registers only.
    unsafe {
        asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) halves, in(vreg) wide, options(pure, nomem, nostack));
    }
    halves
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_halves(ptr: *const u8) -> Floats {
    // SAFETY: the caller gives 16 bytes.
    let halves = vreinterpretq_u16_u8(unsafe { vld1q_u8(ptr) });
    [widen(vget_low_u16(halves)), widen(vget_high_u16(halves))]
}

#[target_feature(enable = "neon")]
fn to_f16(x: &[f32], out: &mut [u16]) {
    let (x, x_rest) = x.as_chunks::<4>();
    let (out, out_rest) = out.as_chunks_mut::<4>();
    for (x, out) in x.iter().zip(out) {
        // SAFETY: four elements on both sides.
        unsafe { vst1_u16(out.as_mut_ptr(), narrow(vld1q_f32(x.as_ptr()))) };
    }
    for (x, out) in x_rest.iter().zip(out_rest) {
        *out = f16::from_f32(*x).to_bits();
    }
}

/// Decodes the codes of a block: 16 pairs of columns of eight rows, four rows in each vector.
///
/// # Safety
/// A block of these codes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn decode(nibbles: bool, block: *const u8) -> [[int16x8_t; 2]; 16] {
    let mut pairs = [[vdupq_n_s16(0); 2]; 16];
    for half in 0..2 {
        if nibbles {
            let mask = vdupq_n_u16(15);
            for (j, pairs) in pairs.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                // SAFETY: the caller gives four times 32 bytes.
                let words = vreinterpretq_u16_u8(unsafe { vld1q_u8(block.add(32 * j + 16 * half)) });
                pairs[0][half] = vreinterpretq_s16_u16(vandq_u16(words, mask));
                pairs[1][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16::<4>(words), mask));
                pairs[2][half] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16::<8>(words), mask));
                pairs[3][half] = vreinterpretq_s16_u16(vshrq_n_u16::<12>(words));
            }
        } else {
            for (j, pairs) in pairs.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                // SAFETY: the caller gives eight times 32 bytes.
                let words = vreinterpretq_s16_u8(unsafe { vld1q_u8(block.add(32 * j + 16 * half)) });
                pairs[0][half] = vshrq_n_s16::<8>(vshlq_n_s16::<8>(words));
                pairs[1][half] = vshrq_n_s16::<8>(words);
            }
        }
    }
    pairs
}

/// Scales of a block's first and second 16 columns (the same but for [`Scales::BySixteen`]), and minima.
///
/// # Safety
/// A group of these codes with a block `b`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_scales(group: &PackedGroups<'_>, b: usize) -> ([Floats; 2], Floats) {
    let (codes, zero) = (group.codes, [vdupq_n_f32(0.0); 2]);
    let n_bytes = block_bytes(codes);
    // SAFETY: a block's scales, and the units behind the blocks.
    unsafe {
        let own = group.bytes.as_ptr().add(b * n_bytes + scales_offset(codes.nibbles));
        let unit = group.n_blocks() * n_bytes + b / BLOCKS_PER_UNIT * unit_bytes(codes.scales);
        let units = group.bytes.as_ptr().wrapping_add(unit);
        let unsigned = |i: usize| {
            let words = vmovl_u8(vld1_u8(own.add(ROWS * i)));
            [vcvtq_f32_u32(vmovl_u16(vget_low_u16(words))), vcvtq_f32_u32(vmovl_high_u16(words))]
        };
        let signed = |i: usize| {
            let words = vmovl_s8(vreinterpret_s8_u8(vld1_u8(own.add(ROWS * i))));
            [vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))]
        };
        let times = |a: Floats, b: Floats| [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])];
        match codes.scales {
            Scales::Single => ([load_halves(own); 2], zero),
            Scales::AroundEight => {
                let scale = load_halves(own);
                ([scale; 2], times(scale, [vdupq_n_f32(-8.0); 2]))
            }
            Scales::WithMinimum => ([load_halves(own); 2], load_halves(own.add(2 * ROWS))),
            Scales::InUnits => {
                let minima = times(unsigned(1), load_halves(units.add(2 * ROWS)));
                ([times(unsigned(0), load_halves(units)); 2], minima.map(|v| vnegq_f32(v)))
            }
            Scales::BySixteen => {
                let unit = load_halves(units);
                ([times(signed(0), unit), times(signed(1), unit)], zero)
            }
        }
    }
}

/// Rows of activations `first..first + W` of a block of `width`, at pair, scale and sum 0 of a block of columns.
#[derive(Clone, Copy)]
struct Rows {
    width: usize,
    pairs: *const i32,
    scales: *const f32,
    sums: *const f32,
}

impl Rows {
    fn new(x: &ActivationBlock<'_>, b: usize, first: usize) -> Self {
        let offset = b * x.width + first;
        Self {
            width: x.width,
            pairs: x.codes.as_ptr().cast::<i32>().wrapping_add(b * GROUP / 2 * x.width + first),
            scales: x.scales.as_ptr().wrapping_add(offset),
            sums: x.sums.as_ptr().wrapping_add(offset),
        }
    }
}

/// Adds to `totals` the products of `weights`, pairs of columns from pair `from` on, with `W` rows of activations.
///
/// # Safety
/// `x` must have these pairs.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn multiply<const W: usize>(
    (weights, from): (&[[int16x8_t; 2]], usize),
    x: Rows,
    scales: Floats,
    totals: &mut [Floats; W],
) {
    // Two rows and both columns of a pair in each: columns are added last.
    let mut sums = [[vdupq_n_s32(0); 4]; W];
    for (i, weights) in weights.iter().enumerate() {
        for (m, sums) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let pair = unsafe { x.pairs.add((from + i) * x.width + m).read_unaligned() };
            let pair = vreinterpretq_s16_s32(vdupq_n_s32(pair));
            for half in 0..2 {
                sums[2 * half] = vmlal_s16(sums[2 * half], vget_low_s16(weights[half]), vget_low_s16(pair));
                sums[2 * half + 1] = vmlal_high_s16(sums[2 * half + 1], weights[half], pair);
            }
        }
    }
    for (m, (sums, totals)) in sums.iter().zip(totals).enumerate() {
        // SAFETY: the caller's promise.
        let scale = unsafe { *x.scales.add(m) };
        for half in 0..2 {
            let sum = vcvtq_f32_s32(vpaddq_s32(sums[2 * half], sums[2 * half + 1]));
            totals[half] = vfmaq_f32(totals[half], sum, vmulq_n_f32(scales[half], scale));
        }
    }
}

/// Adds the minima's part.
///
/// # Safety
/// `x` must have `W` rows.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_minima<const W: usize>(minima: Floats, x: Rows, totals: &mut [Floats; W]) {
    for (m, totals) in totals.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        let sum = unsafe { *x.sums.add(m) };
        for half in 0..2 {
            totals[half] = vfmaq_n_f32(totals[half], minima[half], sum);
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
unsafe fn store<const W: usize>(values: &[Floats; W], out: Output, first: usize) {
    for (m, value) in values.iter().enumerate() {
        for (half, &value) in value.iter().enumerate() {
            // SAFETY: the caller gives rows of eight elements.
            unsafe {
                let at = out.ptr.add((first + m) * out.stride + 4 * half);
                vst1q_f32(at, if out.accumulate { vaddq_f32(vld1q_f32(at), value) } else { value });
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn affine(groups: &PackedGroups<'_>, x: &ActivationBlock<'_>, out: Output) {
    for (i, bytes) in groups.groups().enumerate() {
        let group = PackedGroups { bytes, ..*groups };
        for first in (0..x.width).step_by(PASS) {
            // SAFETY: `Kernels::affine` checked the lengths; `out` is its caller's promise.
            unsafe {
                let out = Output { ptr: out.ptr.add(i * ROWS), ..out };
                match x.width - first {
                    1 => product::<1>(&group, (x, first), out),
                    2 => product::<2>(&group, (x, first), out),
                    3 => product::<3>(&group, (x, first), out),
                    _ => product::<PASS>(&group, (x, first), out),
                }
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn product<const W: usize>(group: &PackedGroups<'_>, (x, first): (&ActivationBlock<'_>, usize), out: Output) {
    let codes = group.codes;
    let n_parts = if codes.scales == Scales::BySixteen { 2 } else { 1 };
    let mut totals = [[vdupq_n_f32(0.0); 2]; W];
    for b in 0..group.n_blocks() {
        // SAFETY: `Kernels::affine` checked that there are 16 pairs, a scale and a sum for each block and row.
        unsafe {
            let weights = decode(codes.nibbles, group.bytes.as_ptr().add(b * block_bytes(codes)));
            let ((scales, minima), x) = (load_scales(group, b), Rows::new(x, b, first));
            for (part, weights) in weights.chunks_exact(16 / n_parts).enumerate() {
                multiply::<W>((weights, part * 8), x, scales[part], &mut totals);
            }
            add_minima::<W>(minima, x, &mut totals);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out, first) }
}

#[target_feature(enable = "neon")]
fn expand(group: &PackedGroups<'_>, out: &mut Expanded<'_>) {
    let codes = group.codes;
    let n_parts = if codes.scales == Scales::BySixteen { 2 } else { 1 };
    for b in 0..group.n_blocks() {
        // SAFETY: `Kernels::expand` checked that there is room for 16 pairs, scales and minima of eight rows for each
        // block.
        unsafe {
            let weights = decode(codes.nibbles, group.bytes.as_ptr().add(b * block_bytes(codes)));
            for (i, &weights) in weights.as_flattened().iter().enumerate() {
                vst1q_s16(out.codes.as_mut_ptr().add(b * ROWS * GROUP + 8 * i), weights);
            }
            let (scales, minima) = load_scales(group, b);
            for half in 0..2 {
                for (part, scales) in scales.iter().take(n_parts).enumerate() {
                    let at = (n_parts * b + part) * ROWS + 4 * half;
                    vst1q_f32(out.scales.as_mut_ptr().add(at), scales[half]);
                }
                vst1q_f32(out.minima.as_mut_ptr().add(b * ROWS + 4 * half), minima[half]);
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn expanded(group: &ExpandedGroup<'_>, x: &ActivationBlock<'_>, out: Output) {
    for first in (0..x.width).step_by(PASS) {
        // SAFETY: `Kernels::expanded` checked the lengths; `out` is its caller's promise.
        unsafe {
            match x.width - first {
                1 => expanded_by::<1>(group, (x, first), out),
                2 => expanded_by::<2>(group, (x, first), out),
                3 => expanded_by::<3>(group, (x, first), out),
                _ => expanded_by::<PASS>(group, (x, first), out),
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn expanded_by<const W: usize>(
    group: &ExpandedGroup<'_>,
    (x, first): (&ActivationBlock<'_>, usize),
    out: Output,
) {
    let n_parts = group.scales.len() / group.minima.len();
    let mut totals = [[vdupq_n_f32(0.0); 2]; W];
    for b in 0..group.minima.len() / ROWS {
        // SAFETY: `Kernels::expanded` checked the lengths.
        unsafe {
            let floats = |values: &[f32], at: usize| {
                let ptr = values.as_ptr().add(at * ROWS);
                [vld1q_f32(ptr), vld1q_f32(ptr.add(4))]
            };
            let x = Rows::new(x, b, first);
            for part in 0..n_parts {
                let mut weights = [[vdupq_n_s16(0); 2]; 16];
                let weights = &mut weights[..16 / n_parts];
                for (i, weights) in weights.as_flattened_mut().iter_mut().enumerate() {
                    *weights = vld1q_s16(group.codes.as_ptr().add(b * ROWS * GROUP + part * 128 + 8 * i));
                }
                multiply::<W>((weights, part * 8), x, floats(group.scales, n_parts * b + part), &mut totals);
            }
            add_minima::<W>(floats(group.minima, b), x, &mut totals);
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out, first) }
}

/// Four elements.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(float: FloatType, ptr: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise.
    unsafe {
        match float {
            FloatType::F32 => vreinterpretq_f32_u8(vld1q_u8(ptr)),
            FloatType::F16 => widen(vreinterpret_u16_u8(vld1_u8(ptr))),
            FloatType::BF16 => vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(ptr)))),
        }
    }
}

/// One element.
///
/// # Safety
/// It must be there.
#[target_feature(enable = "neon")]
unsafe fn load_one(float: FloatType, ptr: *const u8) -> f32 {
    // SAFETY: the caller's promise; no alignment is needed.
    unsafe {
        match float {
            FloatType::F32 => ptr.cast::<f32>().read_unaligned(),
            FloatType::F16 => f16::from_bits(ptr.cast::<u16>().read_unaligned()).to_f32(),
            FloatType::BF16 => bf16::from_bits(ptr.cast::<u16>().read_unaligned()).to_f32(),
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn dots(float: FloatType, (rows, n_rows): (&[u8], usize), (x, width): (&[f32], usize), out: Output) {
    let row_bytes = rows.len() / n_rows;
    // SAFETY: `Kernels::dots` checked the lengths; `out` is its caller's promise.
    unsafe {
        if n_rows == DOT_ROWS {
            match width {
                1 => dots_tile::<DOT_ROWS, 1>(float, rows, x, out),
                2 => dots_tile::<DOT_ROWS, 2>(float, rows, x, out),
                3 => dots_tile::<DOT_ROWS, 3>(float, rows, x, out),
                _ => dots_tile::<DOT_ROWS, 4>(float, rows, x, out),
            }
            return;
        }
        for (n, row) in rows.chunks_exact(row_bytes).enumerate() {
            let out = Output { ptr: out.ptr.add(n), ..out };
            match width {
                1 => dots_tile::<1, 1>(float, row, x, out),
                2 => dots_tile::<1, 2>(float, row, x, out),
                3 => dots_tile::<1, 3>(float, row, x, out),
                _ => dots_tile::<1, 4>(float, row, x, out),
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn dots_tile<const R: usize, const W: usize>(float: FloatType, rows: &[u8], x: &[f32], out: Output) {
    let n_cols = x.len() / W;
    let row_bytes = rows.len() / R;
    let size = row_bytes / n_cols;
    let mut sums = [[vdupq_n_f32(0.0); R]; W];
    let n_whole = n_cols / 4 * 4;
    // SAFETY: columns stay below `n_cols` in `R` rows of weights and `W` rows of activations.
    unsafe {
        let weight = |r: usize, k: usize| rows.as_ptr().add(r * row_bytes + k * size);
        for k in (0..n_whole).step_by(4) {
            let mut weights = [vdupq_n_f32(0.0); R];
            for (r, weights) in weights.iter_mut().enumerate() {
                *weights = load(float, weight(r, k));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = vld1q_f32(x.as_ptr().add(m * n_cols + k));
                for (sum, &weights) in sums.iter_mut().zip(&weights) {
                    *sum = vfmaq_f32(*sum, weights, x);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (r, &sum) in sums.iter().enumerate() {
                let mut total = vaddvq_f32(sum);
                for k in n_whole..n_cols {
                    total += load_one(float, weight(r, k)) * x[m * n_cols + k];
                }
                let at = out.ptr.add(m * out.stride + r);
                *at = if out.accumulate { *at + total } else { total };
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn tile(size: (usize, usize), a: Operand<f32>, b: Operand<u16>, out: Output) {
    // SAFETY: the caller's promise.
    unsafe { tile_by_rows::<u16>(size, a, (b, &[1.0; TILE_COLS]), out) }
}

#[target_feature(enable = "neon")]
unsafe fn tile_i8(size: (usize, usize), a: Operand<f32>, b: (Operand<i8>, &[f32; TILE_COLS]), out: Output) {
    // SAFETY: the caller's promise.
    unsafe { tile_by_rows::<i8>(size, a, b, out) }
}

/// `T`: half-precision numbers as `u16`, or `i8`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn tile_by_rows<T: Copy>(
    (n_rows, depth): (usize, usize),
    a: Operand<f32>,
    b: (Operand<T>, &[f32; TILE_COLS]),
    out: Output,
) {
    for first in (0..n_rows).step_by(3) {
        // SAFETY: the caller's promise.
        unsafe {
            let a = Operand { ptr: a.ptr.add(first * a.stride), ..a };
            let out = Output { ptr: out.ptr.add(first * out.stride), ..out };
            match n_rows - first {
                1 => tile_of::<T, 1>(depth, a, b, out),
                2 => tile_of::<T, 2>(depth, a, b, out),
                _ => tile_of::<T, 3>(depth, a, b, out),
            }
        }
    }
}

#[target_feature(enable = "neon")]
unsafe fn tile_of<T, const R: usize>(
    depth: usize,
    a: Operand<f32>,
    (b, scales): (Operand<T>, &[f32; TILE_COLS]),
    out: Output,
) {
    let mut sums = [[vdupq_n_f32(0.0); TILE_COLS / 4]; R];
    // SAFETY: the caller's promise: `R` rows of `depth` in `a`, `depth` rows of 16 in `b`, `R` rows of 16 in `out`.
    unsafe {
        for k in 0..depth {
            let at: *const u8 = b.ptr.add(k * b.stride).cast();
            let columns: [Floats; 2] = if size_of::<T>() == 1 {
                let codes = vld1q_s8(at.cast());
                [vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes)]
                    .map(|words| [vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), vcvtq_f32_s32(vmovl_high_s16(words))])
            } else {
                [load_halves(at), load_halves(at.add(16))]
            };
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = *a.ptr.add(r * a.stride + k);
                for (sum, &column) in sums.iter_mut().zip(columns.as_flattened()) {
                    *sum = vfmaq_n_f32(*sum, column, a);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                let at = out.ptr.add(r * out.stride + 4 * c);
                let start = if out.accumulate { vld1q_f32(at) } else { vdupq_n_f32(0.0) };
                vst1q_f32(at, vfmaq_f32(start, sum, vld1q_f32(scales.as_ptr().add(4 * c))));
            }
        }
    }
}
