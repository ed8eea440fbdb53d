//! The kernels for AVX-512 with VNNI: Intel servers since 2019 and clients since 2020, AMD since Zen 4. What gains
//! nothing from wider vectors is AVX2's.

use std::arch::{asm, x86_64::*};

use super::{
    ActivationBlock, DOT_ROWS, FloatType, Kernels, Operand, Output, QuantizedRows, TILE_COLS, avx2,
    dispatch::{by_codes, by_float, by_tile_rows, by_width},
};
use crate::{
    executors::cpu::packed::{PackedGroups, ROWS, block_bytes},
    quant::{GROUP, Scales},
};

pub const KERNELS: Kernels = Kernels {
    name: "avx512-vnni",
    max_width: 8,
    // Decoding once gains nothing: the multiplication is limited by what it reads, and decoded codes are four times
    // as many bytes.
    expand_from: usize::MAX,
    affine,
    expand: avx2::expand,
    expanded: avx2::expanded::<false>,
    dots,
    tile,
    tile_i8,
    rms_norm: avx2::rms_norm,
    quantize,
    silu_mul: avx2::silu_mul,
    softmax: avx2::softmax,
    rotate: avx2::rotate,
    scale: avx2::scale,
    to_f16: avx2::to_f16,
    argmax: avx2::argmax,
};

/// Adds to each 32-bit integer of `sum` the products of the two 16-bit integers of `a` and `b` at its place. In
/// assembly: LLVM turns the intrinsic into a product and a sum, which are two instructions on the same ports.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn multiply_add(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: registers only.
    unsafe {
        asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) sum, in(zmm_reg) a, in(zmm_reg) b,
             options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn affine(groups: &PackedGroups<'_>, x: &ActivationBlock<'_>, out: Output) {
    let n_bytes = groups.group_bytes();
    let n_groups = groups.bytes.len() / n_bytes;
    for first in (0..n_groups).step_by(2) {
        let n = (n_groups - first).min(2);
        let some = PackedGroups { bytes: &groups.bytes[first * n_bytes..(first + n) * n_bytes], ..*groups };
        // SAFETY: `Kernels::affine` checked the lengths; `out` is its caller's promise.
        unsafe {
            let out = Output { ptr: out.ptr.add(first * ROWS), ..out };
            if n == 2 {
                by_codes!(groups.codes, x.width, product[](&some, x, out));
            } else {
                avx2::affine::<false>(&some, x, out);
            }
        }
    }
}

/// 32 bytes of each of two groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn load_both([a, b]: [*const u8; 2]) -> __m512i {
    // SAFETY: the caller gives 32 bytes at both.
    unsafe {
        let (a, b) = (_mm256_loadu_si256(a.cast()), _mm256_loadu_si256(b.cast()));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
    }
}

/// Eight half-precision numbers of each of two groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn load_halves([a, b]: [*const u8; 2]) -> __m512 {
    // SAFETY: the caller gives 16 bytes at both.
    unsafe {
        let (a, b) = (_mm_loadu_si128(a.cast()), _mm_loadu_si128(b.cast()));
        _mm512_cvtph_ps(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(a), b))
    }
}

/// Adds the products of a vector of weight pairs with the pairs of `W` activation rows at `pairs`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply_pairs<const W: usize>(weights: __m512i, pairs: *const i32, sums: &mut [__m512i; W]) {
    for (m, sum) in sums.iter_mut().enumerate() {
        // SAFETY: the caller gives `W` pairs, which need no alignment.
        let activations = _mm512_set1_epi32(unsafe { pairs.add(m).read_unaligned() });
        *sum = multiply_add(*sum, weights, activations);
    }
}

/// As `avx2::load_scales`, of two groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn load_scales<const SCALES: u8>(places: [(*const u8, *const u8); 2]) -> ([__m512; 2], __m512) {
    let own = |offset: usize| places.map(|place| place.0.wrapping_add(offset));
    let units = |offset: usize| places.map(|place| place.1.wrapping_add(offset));
    // SAFETY: the caller gives places as of `avx2::scales_of`.
    unsafe {
        let factors = |i: usize| {
            let [a, b] = own(ROWS * i).map(|ptr| _mm_loadl_epi64(ptr.cast()));
            let bytes = _mm_unpacklo_epi64(a, b);
            let signed = SCALES == Scales::BySixteen as u8;
            _mm512_cvtepi32_ps(if signed { _mm512_cvtepi8_epi32(bytes) } else { _mm512_cvtepu8_epi32(bytes) })
        };
        if SCALES == Scales::BySixteen as u8 {
            let scale = load_halves(units(0));
            return ([_mm512_mul_ps(factors(0), scale), _mm512_mul_ps(factors(1), scale)], _mm512_setzero_ps());
        }
        if SCALES == Scales::InUnits as u8 {
            let scale = _mm512_mul_ps(factors(0), load_halves(units(0)));
            let minima = _mm512_mul_ps(factors(1), load_halves(units(2 * ROWS)));
            return ([scale; 2], _mm512_sub_ps(_mm512_setzero_ps(), minima));
        }
        let scale = load_halves(own(0));
        let minima = if SCALES == Scales::WithMinimum as u8 {
            load_halves(own(2 * ROWS))
        } else if SCALES == Scales::AroundEight as u8 {
            _mm512_mul_ps(scale, _mm512_set1_ps(-8.0))
        } else {
            _mm512_setzero_ps()
        };
        ([scale; 2], minima)
    }
}

/// The product of two groups. Sums are made in the order of `avx2::affine`, so both give the same bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn product<const W: usize, const NIBBLES: bool, const SCALES: u8>(
    groups: &PackedGroups<'_>,
    x: &ActivationBlock<'_>,
    out: Output,
) {
    let (codes, n_blocks) = (groups.codes, groups.n_blocks());
    let firsts = [groups.bytes.as_ptr(), groups.bytes.as_ptr().wrapping_add(groups.group_bytes())];
    let n_parts = if SCALES == Scales::BySixteen as u8 { 2 } else { 1 };
    let mask = _mm512_set1_epi16(15);
    let mut totals = [_mm512_setzero_ps(); W];
    for b in 0..n_blocks {
        let blocks = firsts.map(|first| first.wrapping_add(b * block_bytes(codes)));
        for block in blocks {
            avx2::prefetch(block, if NIBBLES { 160 } else { 288 });
        }
        // SAFETY: a block has four or eight vectors of codes, then its scales; `Kernels::affine` checked that there are
        // 16 pairs, a scale and a sum for each block and row of activations.
        unsafe {
            let (scales, minima) = load_scales::<SCALES>(firsts.map(|f| avx2::scales_of(codes, f, n_blocks, b)));
            for (part, &scales) in scales.iter().enumerate().take(n_parts) {
                // An instruction takes five cycles and two start in each: few rows need sums of their own for every
                // other pair.
                let mut sums = [[_mm512_setzero_si512(); W]; 2];
                let n_vectors = if NIBBLES { 4 } else { 8 } / n_parts;
                for j in part * n_vectors..(part + 1) * n_vectors {
                    let words = load_both(blocks.map(|block| block.wrapping_add(32 * j)));
                    let pairs = x.codes.as_ptr().cast::<i32>().add(b * 16 * W);
                    let second = if W <= 4 { 1 } else { 0 };
                    if NIBBLES {
                        let pairs = pairs.add(4 * j * W);
                        let fields = [
                            _mm512_and_si512(words, mask),
                            _mm512_and_si512(_mm512_srli_epi16::<4>(words), mask),
                            _mm512_and_si512(_mm512_srli_epi16::<8>(words), mask),
                            _mm512_srli_epi16::<12>(words),
                        ];
                        for (n, &weights) in fields.iter().enumerate() {
                            multiply_pairs::<W>(weights, pairs.add(n * W), &mut sums[n % 2 * second]);
                        }
                    } else {
                        let pairs = pairs.add(2 * j * W);
                        let low = _mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(words));
                        multiply_pairs::<W>(low, pairs, &mut sums[0]);
                        multiply_pairs::<W>(_mm512_srai_epi16::<8>(words), pairs.add(W), &mut sums[second]);
                    }
                }
                for m in 0..W {
                    let sum = if W <= 4 { _mm512_add_epi32(sums[0][m], sums[1][m]) } else { sums[0][m] };
                    let scale = _mm512_mul_ps(scales, _mm512_set1_ps(*x.scales.get_unchecked(b * W + m)));
                    totals[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, totals[m]);
                }
            }
            if avx2::has_minimum(SCALES) {
                for (m, total) in totals.iter_mut().enumerate() {
                    let sum = _mm512_set1_ps(*x.sums.get_unchecked(b * W + m));
                    *total = _mm512_fmadd_ps(minima, sum, *total);
                }
            }
        }
    }
    for (m, &total) in totals.iter().enumerate() {
        // SAFETY: the caller's promise: `W` rows of sixteen elements.
        unsafe {
            let at = out.ptr.add(m * out.stride);
            let total = if out.accumulate { _mm512_add_ps(_mm512_loadu_ps(at), total) } else { total };
            _mm512_storeu_ps(at, total);
        }
    }
}

/// Rounds 32 values to 16-bit integers, which it returns; sets their scale and their sum.
///
/// # Safety
/// Both places must be valid.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn round(values: &[f32; GROUP], scale: *mut f32, sum: *mut f32) -> __m512i {
    // SAFETY: 32 values; the places are the caller's promise.
    unsafe {
        let v = [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(16))];
        let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_abs_ps(v[1])));
        let unit = largest / 32767.0;
        let inverse = _mm512_set1_ps(if unit > 0.0 { 1.0 / unit } else { 0.0 });
        let rounded = v.map(|v| _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
        let total = _mm512_reduce_add_epi32(_mm512_add_epi32(rounded[0], rounded[1]));
        *scale = unit;
        *sum = unit * total as f32;
        let [low, high] = rounded.map(|words| _mm512_cvtsepi32_epi16(words));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) unsafe fn quantize(x: &[f32], (width, row): (usize, usize), block: QuantizedRows) {
    let lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    let places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(width as i32));
    for (g, values) in x.as_chunks::<GROUP>().0.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let words = round(values, block.scales.add(g * width + row), block.sums.add(g * width + row));
            let first = block.codes.cast::<i32>().add(g * GROUP / 2 * width + row);
            if width == 1 {
                _mm512_storeu_si512(first.cast(), words);
            } else {
                _mm512_i32scatter_epi32::<4>(first, places, words);
            }
        }
    }
}

const F32: u8 = FloatType::F32 as u8;
const F16: u8 = FloatType::F16 as u8;

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn dots(float: FloatType, (rows, n_rows): (&[u8], usize), (x, width): (&[f32], usize), out: Output) {
    // SAFETY: `Kernels::dots` checked the lengths; `out` is its caller's promise.
    unsafe { by_float!(float, (rows, n_rows), (x, width), out, dots_tile) }
}

/// The elements of type `T` whose bits in `mask` are set, others zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn load<const T: u8>(ptr: *const u8, mask: __mmask16) -> __m512 {
    // SAFETY: the caller gives as many elements as the mask has bits.
    unsafe {
        if T == F32 {
            return _mm512_maskz_loadu_ps(mask, ptr.cast());
        }
        let words = _mm256_maskz_loadu_epi16(mask, ptr.cast());
        match T {
            F16 => _mm512_cvtph_ps(words),
            _ => _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words))),
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn dots_tile<const T: u8, const R: usize, const W: usize>(rows: &[u8], x: &[f32], out: Output) {
    let n_cols = x.len() / W;
    let row_bytes = rows.len() / R;
    let (rows, x) = (rows.as_ptr(), x.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); R]; W];
    // SAFETY: columns stay below `n_cols` in `R` rows of weights and `W` rows of activations.
    unsafe {
        let mut step = |k: usize, mask: __mmask16| {
            let mut weights = [_mm512_setzero_ps(); R];
            for (r, weights) in weights.iter_mut().enumerate() {
                *weights = load::<T>(rows.add(r * row_bytes + k * (row_bytes / n_cols)), mask);
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let x = _mm512_maskz_loadu_ps(mask, x.add(m * n_cols + k));
                for (sum, &weights) in sums.iter_mut().zip(&weights) {
                    *sum = _mm512_fmadd_ps(weights, x, *sum);
                }
            }
        };
        let n_whole = n_cols / 16 * 16;
        for k in (0..n_whole).step_by(16) {
            step(k, !0);
        }
        if n_whole < n_cols {
            step(n_whole, (1 << (n_cols - n_whole)) - 1);
        }
        for (m, sums) in sums.iter().enumerate() {
            for (r, &sum) in sums.iter().enumerate() {
                let (at, total) = (out.ptr.add(m * out.stride + r), _mm512_reduce_add_ps(sum));
                *at = if out.accumulate { *at + total } else { total };
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile((n_rows, depth): (usize, usize), a: Operand<f32>, b: Operand<u16>, out: Output) {
    // SAFETY: the caller's promise.
    unsafe { by_tile_rows!(n_rows, tile_of[u16; 4, 4, 4, 2, 2, 2](depth, a, (b, &[1.0; TILE_COLS]), out)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile_i8((n_rows, depth): (usize, usize), a: Operand<f32>, b: (Operand<i8>, &[f32; TILE_COLS]), out: Output) {
    // SAFETY: the caller's promise.
    unsafe { by_tile_rows!(n_rows, tile_of[i8; 4, 4, 4, 2, 2, 2](depth, a, b, out)) }
}

/// `T`: half-precision numbers as `u16`, or `i8`. `R` rows; `U` values of k at a time, with sums of their own: a
/// multiply-add takes four cycles, and two can start in each, so fewer than eight sums leave the units idle.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn tile_of<T, const R: usize, const U: usize>(
    depth: usize,
    a: Operand<f32>,
    (b, scales): (Operand<T>, &[f32; TILE_COLS]),
    out: Output,
) {
    let mut sums = [[_mm512_setzero_ps(); R]; U];
    // SAFETY: the caller's promise: `R` rows of `depth` in `a`, `depth` rows of 16 in `b`, `R` rows of 16 in `out`.
    unsafe {
        let step = |k: usize, sums: &mut [__m512; R]| {
            let at = b.ptr.add(k * b.stride);
            let columns = if size_of::<T>() == 1 {
                _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())))
            } else {
                _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()))
            };
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(*a.ptr.add(r * a.stride + k)), columns, *sum);
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
        let scales = _mm512_loadu_ps(scales.as_ptr());
        for r in 0..R {
            let at = out.ptr.add(r * out.stride);
            let mut sum = sums[0][r];
            for more in &sums[1..] {
                sum = _mm512_add_ps(sum, more[r]);
            }
            let start = if out.accumulate { _mm512_loadu_ps(at) } else { _mm512_setzero_ps() };
            _mm512_storeu_ps(at, _mm512_fmadd_ps(sum, scales, start));
        }
    }
}
