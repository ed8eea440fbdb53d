//! The kernels for AVX2, FMA and F16C: x86-64 processors since 2013 (Intel) and 2015 (AMD).

use std::arch::{asm, x86_64::*};

use super::{
    ActivationBlock, DOT_ROWS, Expanded, ExpandedGroup, FloatType, Kernels, Operand, Output, QuantizedRows, TILE_COLS,
    dispatch::{by_codes, by_float, by_tile_rows, by_width},
    elementwise,
};
use crate::{
    executors::cpu::packed::{BLOCKS_PER_UNIT, PackedGroups, ROWS, block_bytes, scales_offset, unit_bytes},
    quant::{Codes, GROUP, Scales},
};

pub const KERNELS: Kernels = Kernels {
    name: "avx2",
    // Decoding for two blocks costs as much as it saves.
    expand_from: 25,
    max_width: 8,
    affine: affine::<false>,
    expand,
    expanded: expanded::<false>,
    dots,
    tile,
    tile_i8,
    rms_norm,
    quantize,
    silu_mul,
    softmax,
    rotate,
    scale,
    to_f16,
    argmax,
};

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    elementwise::rms_norm(x, weight, eps, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn quantize(x: &[f32], place: (usize, usize), block: QuantizedRows) {
    // SAFETY: the caller's promise.
    unsafe {
        for (g, values) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            quantize_group(values, (place.0, place.1, g), block);
        }
    }
}

/// Rounds group `g` of row `row` in a block of `width` rows.
///
/// # Safety
/// As `quantize`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize_group(values: &[f32; GROUP], (width, row, g): (usize, usize, usize), block: QuantizedRows) {
    // SAFETY: 32 values; the block's places are the caller's promise.
    unsafe {
        let v: [__m256; 4] = std::array::from_fn(|i| _mm256_loadu_ps(values.as_ptr().add(8 * i)));
        let sign = _mm256_set1_ps(-0.0);
        let abs = v.map(|v| _mm256_andnot_ps(sign, v));
        let largest = _mm256_max_ps(_mm256_max_ps(abs[0], abs[1]), _mm256_max_ps(abs[2], abs[3]));
        let scale = max_lanes(largest) / 32767.0;
        let inverse = _mm256_set1_ps(if scale > 0.0 { 1.0 / scale } else { 0.0 });
        let rounded = v.map(|v| _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)));
        // Packing works within halves of 128 bits, so the quarters are put in order after it.
        let pack = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
        let words = [pack(rounded[0], rounded[1]), pack(rounded[2], rounded[3])];
        let ones = _mm256_set1_epi16(1);
        let total = _mm256_add_epi32(_mm256_madd_epi16(words[0], ones), _mm256_madd_epi16(words[1], ones));
        *block.scales.add(g * width + row) = scale;
        *block.sums.add(g * width + row) = scale * sum_lanes_i32(total) as f32;
        let mut to = block.codes.cast::<i32>().add(g * GROUP / 2 * width + row);
        if width == 1 {
            _mm256_storeu_si256(to.cast(), words[0]);
            _mm256_storeu_si256(to.add(8).cast(), words[1]);
            return;
        }
        for words in words {
            for half in [_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words)] {
                to.write_unaligned(_mm_cvtsi128_si32(half));
                to.add(width).write_unaligned(_mm_extract_epi32::<1>(half));
                to.add(2 * width).write_unaligned(_mm_extract_epi32::<2>(half));
                to.add(3 * width).write_unaligned(_mm_extract_epi32::<3>(half));
                to = to.add(4 * width);
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn max_lanes(v: __m256) -> f32 {
    let halves = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let pairs = _mm_max_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_max_ss(pairs, _mm_movehdup_ps(pairs)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_lanes_i32(v: __m256i) -> i32 {
    let halves = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    let pairs = _mm_add_epi32(halves, _mm_shuffle_epi32::<0b01_00_11_10>(halves));
    _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32::<0b10_11_00_01>(pairs)))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    elementwise::silu_mul::<true>(gate, up, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn softmax(scores: &mut [f32], max_so_far: f32) -> (f32, f32) {
    elementwise::softmax::<true>(scores, max_so_far)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    elementwise::rotate(head, cos, sin);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn scale(x: &mut [f32], factor: f32) {
    elementwise::scale(x, factor);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn argmax(x: &[f32]) -> u32 {
    elementwise::argmax(x)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn to_f16(x: &[f32], out: &mut [u16]) {
    let (x, x_rest) = x.as_chunks::<8>();
    let (out, out_rest) = out.as_chunks_mut::<8>();
    for (x, out) in x.iter().zip(out) {
        // SAFETY: eight elements on both sides.
        unsafe {
            let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(x.as_ptr()));
            _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
        }
    }
    for (x, out) in x_rest.iter().zip(out_rest) {
        *out = half::f16::from_f32(*x).to_bits();
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn affine<const VNNI: bool>(groups: &PackedGroups<'_>, x: &ActivationBlock<'_>, out: Output) {
    for (i, bytes) in groups.groups().enumerate() {
        // SAFETY: `Kernels::affine` checked the lengths; `out` is its caller's promise.
        unsafe {
            let (group, out) = (PackedGroups { bytes, ..*groups }, Output { ptr: out.ptr.add(i * ROWS), ..out });
            by_codes!(groups.codes, x.width, product[VNNI](&group, x, out));
        }
    }
}

/// Adds the products of one vector of weight pairs with the pairs of `W` activation rows at `pairs`. `VNNI`: the machine
/// has the instruction that does both. (In assembly: LLVM turns its intrinsic into the two instructions.)
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_pairs<const W: usize, const VNNI: bool>(
    weights: __m256i,
    pairs: *const i32,
    sums: &mut [__m256i; W],
) {
    for (m, sum) in sums.iter_mut().enumerate() {
        // SAFETY: the caller gives `W` pairs, which need no alignment.
        let activations = _mm256_set1_epi32(unsafe { pairs.add(m).read_unaligned() });
        if VNNI {
            // SAFETY: registers only.
            unsafe {
                asm!("{{vex}} vpdpwssd {0}, {1}, {2}", inout(ymm_reg) *sum, in(ymm_reg) weights,
                     in(ymm_reg) activations, options(pure, nomem, nostack, preserves_flags));
            }
        } else {
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weights, activations));
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_halves(ptr: *const u8) -> __m256 {
    // SAFETY: the caller gives 16 bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(ptr.cast()) })
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store<const W: usize>(values: &[__m256; W], out: Output) {
    for (m, &value) in values.iter().enumerate() {
        // SAFETY: the caller gives `W` rows of eight elements.
        unsafe {
            let at = out.ptr.add(m * out.stride);
            let value = if out.accumulate { _mm256_add_ps(_mm256_loadu_ps(at), value) } else { value };
            _mm256_storeu_ps(at, value);
        }
    }
}

/// Bytes between the weights that are read and those that are asked for: what two cores need to stream from memory.
const PREFETCH: usize = 2048;

/// Asks for the cache lines that lie [`PREFETCH`] behind a block of `n_bytes` bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn prefetch(block: *const u8, n_bytes: usize) {
    for line in (0..n_bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(PREFETCH + line).cast());
    }
}

/// Decodes the codes of a block: 16 vectors of pairs.
///
/// # Safety
/// A block of nibbles.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode_nibbles(block: *const u8) -> [__m256i; 16] {
    let mask = _mm256_set1_epi16(15);
    let mut pairs = [_mm256_setzero_si256(); 16];
    for (j, pairs) in pairs.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: the caller gives four vectors.
        let words = unsafe { _mm256_loadu_si256(block.add(32 * j).cast()) };
        *pairs = [
            _mm256_and_si256(words, mask),
            _mm256_and_si256(_mm256_srli_epi16::<4>(words), mask),
            _mm256_and_si256(_mm256_srli_epi16::<8>(words), mask),
            _mm256_srli_epi16::<12>(words),
        ];
    }
    pairs
}

/// Decodes the codes of a block: 16 vectors of pairs.
///
/// # Safety
/// A block of bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode_bytes(block: *const u8) -> [__m256i; 16] {
    let mut pairs = [_mm256_setzero_si256(); 16];
    for (j, pairs) in pairs.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        // SAFETY: the caller gives eight vectors.
        let words = unsafe { _mm256_loadu_si256(block.add(32 * j).cast()) };
        *pairs = [_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(words)), _mm256_srai_epi16::<8>(words)];
    }
    pairs
}

/// Adds the products of `weights`, vectors of pairs, with `W` rows of activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_block<const W: usize, const VNNI: bool>(weights: &[__m256i], pairs: *const i32) -> [__m256i; W] {
    let mut sums = [_mm256_setzero_si256(); W];
    // With many rows, sums take the registers: from memory, decoded weights cost a load each and no more.
    let in_memory = if W >= 4 { std::hint::black_box(weights) } else { weights };
    for (i, &weights) in in_memory.iter().enumerate() {
        // SAFETY: the caller gives as many pairs of `W` rows.
        unsafe { multiply_pairs::<W, VNNI>(weights, pairs.add(i * W), &mut sums) };
    }
    sums
}

/// Where a block's scales lie: in the block, and in its units.
#[inline]
pub(super) fn scales_of(codes: Codes, group: *const u8, n_blocks: usize, b: usize) -> (*const u8, *const u8) {
    let n_bytes = block_bytes(codes);
    let unit = n_blocks * n_bytes + b / BLOCKS_PER_UNIT * unit_bytes(codes.scales);
    (group.wrapping_add(b * n_bytes + scales_offset(codes.nibbles)), group.wrapping_add(unit))
}

/// Scales of a block's first and second 16 columns (the same but for [`Scales::BySixteen`]), and minima.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_scales<const SCALES: u8>((own, units): (*const u8, *const u8)) -> ([__m256; 2], __m256) {
    // SAFETY: the caller gives places as of `scales_of`.
    unsafe {
        let factors = |i: usize| {
            let bytes = _mm_loadl_epi64(own.add(ROWS * i).cast());
            let signed = SCALES == Scales::BySixteen as u8;
            _mm256_cvtepi32_ps(if signed { _mm256_cvtepi8_epi32(bytes) } else { _mm256_cvtepu8_epi32(bytes) })
        };
        if SCALES == Scales::BySixteen as u8 {
            let scale = load_halves(units);
            return ([_mm256_mul_ps(factors(0), scale), _mm256_mul_ps(factors(1), scale)], _mm256_setzero_ps());
        }
        if SCALES == Scales::InUnits as u8 {
            let scale = _mm256_mul_ps(factors(0), load_halves(units));
            let minima = _mm256_mul_ps(factors(1), load_halves(units.add(2 * ROWS)));
            return ([scale; 2], _mm256_xor_ps(minima, _mm256_set1_ps(-0.0)));
        }
        let scale = load_halves(own);
        let minima = if SCALES == Scales::WithMinimum as u8 {
            load_halves(own.add(2 * ROWS))
        } else if SCALES == Scales::AroundEight as u8 {
            _mm256_mul_ps(scale, _mm256_set1_ps(-8.0))
        } else {
            _mm256_setzero_ps()
        };
        ([scale; 2], minima)
    }
}

/// Whether values have a minimum.
pub(super) const fn has_minimum(scales: u8) -> bool {
    scales != Scales::Single as u8 && scales != Scales::BySixteen as u8
}

/// The product of one group.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn product<const W: usize, const NIBBLES: bool, const SCALES: u8, const VNNI: bool>(
    group: &PackedGroups<'_>,
    x: &ActivationBlock<'_>,
    out: Output,
) {
    let (codes, n_blocks, first) = (group.codes, group.n_blocks(), group.bytes.as_ptr());
    let n_parts = if SCALES == Scales::BySixteen as u8 { 2 } else { 1 };
    let mut totals = [_mm256_setzero_ps(); W];
    for b in 0..n_blocks {
        let block = first.wrapping_add(b * block_bytes(codes));
        prefetch(block, if NIBBLES { 160 } else { 288 });
        // SAFETY: a block has four or eight vectors of codes, then its scales; `Kernels::affine` checked that there are
        // 16 pairs, a scale and a sum for each block and row of activations.
        unsafe {
            let weights = if NIBBLES { decode_nibbles(block) } else { decode_bytes(block) };
            let (scales, minima) = load_scales::<SCALES>(scales_of(codes, first, n_blocks, b));
            for (part, weights) in weights.chunks_exact(16 / n_parts).enumerate() {
                let pairs = x.codes.as_ptr().cast::<i32>().add((b * 16 + part * 8) * W);
                let sums = multiply_block::<W, VNNI>(weights, pairs);
                for m in 0..W {
                    let scale = _mm256_mul_ps(scales[part], _mm256_set1_ps(*x.scales.get_unchecked(b * W + m)));
                    totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, totals[m]);
                }
            }
            if has_minimum(SCALES) {
                for (m, total) in totals.iter_mut().enumerate() {
                    let sum = _mm256_set1_ps(*x.sums.get_unchecked(b * W + m));
                    *total = _mm256_fmadd_ps(minima, sum, *total);
                }
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn expand(group: &PackedGroups<'_>, out: &mut Expanded<'_>) {
    match group.codes.scales {
        Scales::Single => expand_by::<{ Scales::Single as u8 }>(group, out),
        Scales::AroundEight => expand_by::<{ Scales::AroundEight as u8 }>(group, out),
        Scales::WithMinimum => expand_by::<{ Scales::WithMinimum as u8 }>(group, out),
        Scales::InUnits => expand_by::<{ Scales::InUnits as u8 }>(group, out),
        Scales::BySixteen => expand_by::<{ Scales::BySixteen as u8 }>(group, out),
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn expand_by<const SCALES: u8>(group: &PackedGroups<'_>, out: &mut Expanded<'_>) {
    let (codes, n_blocks, first) = (group.codes, group.n_blocks(), group.bytes.as_ptr());
    let to: *mut __m256i = out.codes.as_mut_ptr().cast();
    for b in 0..n_blocks {
        let block = first.wrapping_add(b * block_bytes(codes));
        prefetch(block, block_bytes(codes));
        // SAFETY: a block has four or eight vectors of codes, then its scales; `Kernels::expand` checked that there is
        // room for 16 vectors of integers, scales and minima of eight rows for each block.
        unsafe {
            let pairs = if codes.nibbles { decode_nibbles(block) } else { decode_bytes(block) };
            for (i, &pairs) in pairs.iter().enumerate() {
                _mm256_storeu_si256(to.add(16 * b + i), pairs);
            }
            let (scales, minima) = load_scales::<SCALES>(scales_of(codes, first, n_blocks, b));
            if SCALES == Scales::BySixteen as u8 {
                _mm256_storeu_ps(out.scales.as_mut_ptr().add(16 * b), scales[0]);
                _mm256_storeu_ps(out.scales.as_mut_ptr().add(16 * b + 8), scales[1]);
            } else {
                _mm256_storeu_ps(out.scales.as_mut_ptr().add(8 * b), scales[0]);
            }
            _mm256_storeu_ps(out.minima.as_mut_ptr().add(8 * b), minima);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn expanded<const VNNI: bool>(group: &ExpandedGroup<'_>, x: &ActivationBlock<'_>, out: Output) {
    // SAFETY: `Kernels::expanded` checked the lengths; `out` is its caller's promise.
    unsafe {
        if group.scales.len() == group.minima.len() {
            by_width!(x.width, expanded_by[1, VNNI](group, x, out));
        } else {
            by_width!(x.width, expanded_by[2, VNNI](group, x, out));
        }
    }
}

/// `PARTS`: scales of a block.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn expanded_by<const W: usize, const PARTS: usize, const VNNI: bool>(
    group: &ExpandedGroup<'_>,
    x: &ActivationBlock<'_>,
    out: Output,
) {
    let mut totals = [_mm256_setzero_ps(); W];
    let mut pairs: *const i32 = x.codes.as_ptr().cast();
    let mut weights: *const __m256i = group.codes.as_ptr().cast();
    for b in 0..group.minima.len() / 8 {
        // SAFETY: `Kernels::expanded` checked that there are 16 vectors of codes, and scales and minima of eight rows,
        // for each block of weights, and as many pairs, a scale and a sum for each row of activations.
        unsafe {
            for part in 0..PARTS {
                let mut sums = [_mm256_setzero_si256(); W];
                for _ in 0..16 / PARTS {
                    multiply_pairs::<W, VNNI>(_mm256_loadu_si256(weights), pairs, &mut sums);
                    (weights, pairs) = (weights.add(1), pairs.add(W));
                }
                let scales = _mm256_loadu_ps(group.scales.as_ptr().add(8 * (PARTS * b + part)));
                for m in 0..W {
                    let scale = _mm256_mul_ps(scales, _mm256_set1_ps(*x.scales.get_unchecked(b * W + m)));
                    totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, totals[m]);
                }
            }
            let minima = _mm256_loadu_ps(group.minima.as_ptr().add(8 * b));
            for (m, total) in totals.iter_mut().enumerate() {
                let sum = _mm256_set1_ps(*x.sums.get_unchecked(b * W + m));
                *total = _mm256_fmadd_ps(minima, sum, *total);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out) }
}

const F32: u8 = FloatType::F32 as u8;
const F16: u8 = FloatType::F16 as u8;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots(float: FloatType, (rows, n_rows): (&[u8], usize), (x, width): (&[f32], usize), out: Output) {
    // SAFETY: `Kernels::dots` checked the lengths; `out` is its caller's promise.
    unsafe { by_float!(float, (rows, n_rows), (x, width), out, dots_tile) }
}

const fn size<const T: u8>() -> usize {
    if T == F32 { 4 } else { 2 }
}

/// Eight elements of type `T`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load<const T: u8>(ptr: *const u8) -> __m256 {
    // SAFETY: the caller gives eight elements.
    unsafe {
        match T {
            F32 => _mm256_loadu_ps(ptr.cast()),
            F16 => _mm256_cvtph_ps(_mm_loadu_si128(ptr.cast())),
            _ => _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(ptr.cast())))),
        }
    }
}

/// One element of type `T`.
#[inline]
unsafe fn load_one<const T: u8>(ptr: *const u8) -> f32 {
    // SAFETY: the caller gives an element, which needs no alignment.
    unsafe {
        match T {
            F32 => ptr.cast::<f32>().read_unaligned(),
            F16 => half::f16::from_bits(ptr.cast::<u16>().read_unaligned()).to_f32(),
            _ => half::bf16::from_bits(ptr.cast::<u16>().read_unaligned()).to_f32(),
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sum_lanes(v: __m256) -> f32 {
    let halves = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_tile<const T: u8, const R: usize, const W: usize>(rows: &[u8], x: &[f32], out: Output) {
    let n_cols = x.len() / W;
    let row_bytes = n_cols * size::<T>();
    let (rows, x) = (rows.as_ptr(), x.as_ptr());
    let mut sums = [[_mm256_setzero_ps(); R]; W];
    let n_whole = n_cols / 8 * 8;
    // SAFETY: columns stay below `n_cols` in `R` rows of weights and `W` rows of activations.
    unsafe {
        for k in (0..n_whole).step_by(8) {
            let mut weights = [_mm256_setzero_ps(); R];
            for (r, weights) in weights.iter_mut().enumerate() {
                *weights = load::<T>(rows.add(r * row_bytes + k * size::<T>()));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = _mm256_loadu_ps(x.add(m * n_cols + k));
                for (sum, &weights) in sums.iter_mut().zip(&weights) {
                    *sum = _mm256_fmadd_ps(weights, x, *sum);
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            for (r, &sum) in sums.iter().enumerate() {
                let mut total = sum_lanes(sum);
                for k in n_whole..n_cols {
                    total += load_one::<T>(rows.add(r * row_bytes + k * size::<T>())) * *x.add(m * n_cols + k);
                }
                let at = out.ptr.add(m * out.stride + r);
                *at = if out.accumulate { *at + total } else { total };
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile((n_rows, depth): (usize, usize), a: Operand<f32>, b: Operand<u16>, out: Output) {
    // SAFETY: the caller's promise.
    unsafe { by_tile_rows!(n_rows, tile_of[u16; 4, 2, 1, 1, 1, 1](depth, a, (b, &[1.0; TILE_COLS]), out)) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_i8((n_rows, depth): (usize, usize), a: Operand<f32>, b: (Operand<i8>, &[f32; TILE_COLS]), out: Output) {
    // SAFETY: the caller's promise.
    unsafe { by_tile_rows!(n_rows, tile_of[i8; 4, 2, 1, 1, 1, 1](depth, a, b, out)) }
}

/// `T`: half-precision numbers as `u16`, or `i8`. `R` rows; `U` values of k at a time, with sums of their own: a multiply-add takes four cycles, and two can start in
/// each, so fewer than eight sums leave the units idle. (Three rows twice spill registers and are slower.)
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<T, const R: usize, const U: usize>(
    depth: usize,
    a: Operand<f32>,
    (b, scales): (Operand<T>, &[f32; TILE_COLS]),
    out: Output,
) {
    let mut sums = [[[_mm256_setzero_ps(); 2]; R]; U];
    // SAFETY: the caller's promise: `R` rows of `depth` in `a`, `depth` rows of 16 in `b`, `R` rows of 16 in `out`.
    unsafe {
        let step = |k: usize, sums: &mut [[__m256; 2]; R]| {
            let at: *const u8 = b.ptr.add(k * b.stride).cast();
            let columns = if size_of::<T>() == 1 {
                [0, 8].map(|c| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.add(c).cast()))))
            } else {
                [load_halves(at), load_halves(at.add(16))]
            };
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*a.ptr.add(r * a.stride + k));
                sums[0] = _mm256_fmadd_ps(a, columns[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(a, columns[1], sums[1]);
            }
        };
        let n_whole = depth / U * U;
        for first in (0..n_whole).step_by(U) {
            for (u, sums) in sums.iter_mut().enumerate() {
                step(first + u, sums);
            }
        }
        for k in n_whole..depth {
            step(k, &mut sums[0]);
        }
        for r in 0..R {
            for half in 0..2 {
                let at = out.ptr.add(r * out.stride + 8 * half);
                let mut sum = sums[0][r][half];
                for more in &sums[1..] {
                    sum = _mm256_add_ps(sum, more[r][half]);
                }
                let scales = _mm256_loadu_ps(scales.as_ptr().add(8 * half));
                let start = if out.accumulate { _mm256_loadu_ps(at) } else { _mm256_setzero_ps() };
                _mm256_storeu_ps(at, _mm256_fmadd_ps(sum, scales, start));
            }
        }
    }
}
