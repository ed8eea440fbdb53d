//! The kernels for AVX2, FMA and F16C: x86-64 processors since 2013 (Intel) and 2015 (AMD).

use std::arch::x86_64::*;

use super::{
    ActivationBlock, Expanded, ExpandedGroup, FloatType, Kernels, Operand, Output, QuantizedRows, elementwise,
};
use crate::{
    executors::cpu::packed::{block_bytes, scales_offset},
    quant::{Codes, GROUP},
};

pub static KERNELS: Kernels = Kernels {
    name: "avx2",
    affine,
    expand,
    expanded,
    dots,
    tile,
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
fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    elementwise::rms_norm(x, weight, eps, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn quantize(x: &[f32], place: (usize, usize), block: QuantizedRows) {
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
fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    elementwise::silu_mul::<true>(gate, up, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn softmax(scores: &mut [f32], max_so_far: f32) -> (f32, f32) {
    elementwise::softmax::<true>(scores, max_so_far)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    elementwise::rotate(head, cos, sin);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn scale(x: &mut [f32], factor: f32) {
    elementwise::scale(x, factor);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn argmax(x: &[f32]) -> u32 {
    elementwise::argmax(x)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn to_f16(x: &[f32], out: &mut [u16]) {
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

/// Calls `$f` with the number of rows as a constant.
macro_rules! by_width {
    ($width:expr, $f:ident::<_ $(, $more:literal)*>($($arg:expr),*)) => {
        match $width {
            1 => $f::<1 $(, $more)*>($($arg),*),
            2 => $f::<2 $(, $more)*>($($arg),*),
            3 => $f::<3 $(, $more)*>($($arg),*),
            4 => $f::<4 $(, $more)*>($($arg),*),
            5 => $f::<5 $(, $more)*>($($arg),*),
            6 => $f::<6 $(, $more)*>($($arg),*),
            7 => $f::<7 $(, $more)*>($($arg),*),
            _ => $f::<8 $(, $more)*>($($arg),*),
        }
    };
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn affine(codes: Codes, group: &[u8], activations: &ActivationBlock<'_>, out: Output) {
    // SAFETY: `Kernels::affine` checked the lengths; `out` is its caller's promise.
    unsafe {
        match codes {
            Codes::NibblesWithMinimum => by_width!(activations.width, nibbles::<_, true>(group, activations, out)),
            Codes::NibblesAroundEight => by_width!(activations.width, nibbles::<_, false>(group, activations, out)),
            Codes::Bytes => by_width!(activations.width, bytes::<_>(group, activations, out)),
        }
    }
}

/// Adds the products of one vector of weight pairs with the pairs of `W` activation rows at `pairs`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_pairs<const W: usize>(weights: __m256i, pairs: *const i32, sums: &mut [__m256i; W]) {
    for (m, sum) in sums.iter_mut().enumerate() {
        // SAFETY: the caller gives `W` pairs, which need no alignment.
        let activations = _mm256_set1_epi32(unsafe { pairs.add(m).read_unaligned() });
        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(weights, activations));
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

/// Asks for the cache lines that lie [`PREFETCH`] behind a block of `N` bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn prefetch<const N: usize>(block: *const u8) {
    for line in (0..N).step_by(64) {
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

/// Adds the products of a block's 16 vectors of pairs with `W` rows of activations.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn multiply_block<const W: usize>(weights: [__m256i; 16], pairs: *const i32) -> [__m256i; W] {
    let mut sums = [_mm256_setzero_si256(); W];
    // With many rows, sums take the registers: from memory, decoded weights cost a load each and no more.
    let in_memory = if W >= 4 { std::hint::black_box(&weights) } else { &weights };
    for (i, &weights) in in_memory.iter().enumerate() {
        // SAFETY: the caller gives 16 pairs of `W` rows.
        unsafe { multiply_pairs::<W>(weights, pairs.add(i * W), &mut sums) };
    }
    sums
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nibbles<const W: usize, const MINIMUM: bool>(group: &[u8], x: &ActivationBlock<'_>, out: Output) {
    let codes = if MINIMUM { Codes::NibblesWithMinimum } else { Codes::NibblesAroundEight };
    let mut totals = [_mm256_setzero_ps(); W];
    for (b, block) in group.chunks_exact(block_bytes(codes)).enumerate() {
        let block = block.as_ptr();
        prefetch::<{ block_bytes(Codes::NibblesWithMinimum) }>(block);
        // SAFETY: a block has four vectors of codes, then scales and minima; `Kernels::affine` checked that there are
        // 16 pairs, a scale and a sum for each block and row of activations.
        unsafe {
            let sums = multiply_block::<W>(decode_nibbles(block), x.codes.as_ptr().cast::<i32>().add(b * 16 * W));
            let scales = load_halves(block.add(scales_offset(codes)));
            let minima = if MINIMUM {
                load_halves(block.add(scales_offset(codes) + 16))
            } else {
                _mm256_mul_ps(scales, _mm256_set1_ps(-8.0))
            };
            for m in 0..W {
                let scale = _mm256_mul_ps(scales, _mm256_set1_ps(*x.scales.get_unchecked(b * W + m)));
                let sum = _mm256_set1_ps(*x.sums.get_unchecked(b * W + m));
                totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, totals[m]);
                totals[m] = _mm256_fmadd_ps(minima, sum, totals[m]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bytes<const W: usize>(group: &[u8], x: &ActivationBlock<'_>, out: Output) {
    let mut totals = [_mm256_setzero_ps(); W];
    for (b, block) in group.chunks_exact(block_bytes(Codes::Bytes)).enumerate() {
        let block = block.as_ptr();
        prefetch::<{ block_bytes(Codes::Bytes) }>(block);
        // SAFETY: as in `nibbles`, with eight vectors of codes and no minima.
        unsafe {
            let sums = multiply_block::<W>(decode_bytes(block), x.codes.as_ptr().cast::<i32>().add(b * 16 * W));
            let scales = load_halves(block.add(scales_offset(Codes::Bytes)));
            for m in 0..W {
                let scale = _mm256_mul_ps(scales, _mm256_set1_ps(*x.scales.get_unchecked(b * W + m)));
                totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, totals[m]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn expand(codes: Codes, group: &[u8], out: &mut Expanded<'_>) {
    let to: *mut __m256i = out.codes.as_mut_ptr().cast();
    for (b, block) in group.chunks_exact(block_bytes(codes)).enumerate() {
        let block = block.as_ptr();
        prefetch::<{ block_bytes(Codes::NibblesWithMinimum) }>(block);
        // SAFETY: a block has four or eight vectors of codes, then scales and minima; `Kernels::expand` checked that
        // there is room for 16 vectors of integers, a scale and a minimum of eight rows for each block.
        unsafe {
            let pairs = if codes == Codes::Bytes { decode_bytes(block) } else { decode_nibbles(block) };
            for (i, &pairs) in pairs.iter().enumerate() {
                _mm256_storeu_si256(to.add(16 * b + i), pairs);
            }
            let scales = load_halves(block.add(scales_offset(codes)));
            let minima = match codes {
                Codes::NibblesWithMinimum => load_halves(block.add(scales_offset(codes) + 16)),
                Codes::NibblesAroundEight => _mm256_mul_ps(scales, _mm256_set1_ps(-8.0)),
                Codes::Bytes => _mm256_setzero_ps(),
            };
            _mm256_storeu_ps(out.scales.as_mut_ptr().add(8 * b), scales);
            _mm256_storeu_ps(out.minima.as_mut_ptr().add(8 * b), minima);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn expanded(group: &ExpandedGroup<'_>, activations: &ActivationBlock<'_>, out: Output) {
    // SAFETY: `Kernels::expanded` checked the lengths; `out` is its caller's promise.
    unsafe { by_width!(activations.width, expanded_by::<_>(group, activations, out)) }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn expanded_by<const W: usize>(group: &ExpandedGroup<'_>, x: &ActivationBlock<'_>, out: Output) {
    let mut totals = [_mm256_setzero_ps(); W];
    let mut pairs: *const i32 = x.codes.as_ptr().cast();
    let mut weights: *const __m256i = group.codes.as_ptr().cast();
    for b in 0..group.scales.len() / 8 {
        let mut sums = [_mm256_setzero_si256(); W];
        // SAFETY: `Kernels::expanded` checked that there are 16 vectors of codes, and scales and minima of eight rows,
        // for each block of weights, and as many pairs, a scale and a sum for each row of activations.
        unsafe {
            for _ in 0..16 {
                multiply_pairs::<W>(_mm256_loadu_si256(weights), pairs, &mut sums);
                (weights, pairs) = (weights.add(1), pairs.add(W));
            }
            let scales = _mm256_loadu_ps(group.scales.as_ptr().add(8 * b));
            let minima = _mm256_loadu_ps(group.minima.as_ptr().add(8 * b));
            for m in 0..W {
                let scale = _mm256_mul_ps(scales, _mm256_set1_ps(*x.scales.get_unchecked(b * W + m)));
                let sum = _mm256_set1_ps(*x.sums.get_unchecked(b * W + m));
                totals[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, totals[m]);
                totals[m] = _mm256_fmadd_ps(minima, sum, totals[m]);
            }
        }
    }
    // SAFETY: the caller's promise.
    unsafe { store(&totals, out) }
}

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots(float: FloatType, rows: (&[u8], usize), x: (&[f32], usize), out: Output) {
    // SAFETY: `Kernels::dots` checked the lengths; `out` is its caller's promise.
    unsafe {
        match float {
            FloatType::F32 => dots_of::<F32>(rows, x, out),
            FloatType::F16 => dots_of::<F16>(rows, x, out),
            FloatType::BF16 => dots_of::<BF16>(rows, x, out),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_of<const T: u8>((rows, n_rows): (&[u8], usize), x: (&[f32], usize), out: Output) {
    let n_cols = x.0.len() / x.1;
    // SAFETY: as in `dots`.
    unsafe {
        if n_rows == super::DOT_ROWS {
            return dots_by_width::<T, 3>(rows, x, out);
        }
        for (n, row) in rows.chunks_exact(rows.len() / n_rows).enumerate() {
            debug_assert_eq!(row.len(), n_cols * size::<T>());
            dots_by_width::<T, 1>(row, x, Output { ptr: out.ptr.add(n), ..out });
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_by_width<const T: u8, const R: usize>(rows: &[u8], (x, width): (&[f32], usize), out: Output) {
    // SAFETY: as in `dots`.
    unsafe {
        match width {
            1 => dots_tile::<T, R, 1>(rows, x, out),
            2 => dots_tile::<T, R, 2>(rows, x, out),
            3 => dots_tile::<T, R, 3>(rows, x, out),
            _ => dots_tile::<T, R, 4>(rows, x, out),
        }
    }
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
    unsafe {
        match n_rows {
            1 => tile_of::<1>(depth, a, b, out),
            2 => tile_of::<2>(depth, a, b, out),
            3 => tile_of::<3>(depth, a, b, out),
            4 => tile_of::<4>(depth, a, b, out),
            5 => tile_of::<5>(depth, a, b, out),
            _ => tile_of::<6>(depth, a, b, out),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile_of<const R: usize>(depth: usize, a: Operand<f32>, b: Operand<u16>, out: Output) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    // SAFETY: the caller's promise: `R` rows of `depth` in `a`, `depth` rows of 16 in `b`, `R` rows of 16 in `out`.
    unsafe {
        for k in 0..depth {
            let at = b.ptr.add(k * b.stride);
            let columns = [load_halves(at.cast()), load_halves(at.add(8).cast())];
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*a.ptr.add(r * a.stride + k));
                sums[0] = _mm256_fmadd_ps(a, columns[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(a, columns[1], sums[1]);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (half, &sum) in sums.iter().enumerate() {
                let at = out.ptr.add(r * out.stride + 8 * half);
                let sum = if out.accumulate { _mm256_add_ps(_mm256_loadu_ps(at), sum) } else { sum };
                _mm256_storeu_ps(at, sum);
            }
        }
    }
}
