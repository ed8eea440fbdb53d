//! Loops over elements in plain Rust, written so that compilers turn them into vector code. Each instruction set
//! compiles them for itself.

use super::QuantizedRows;
use crate::quant::GROUP;

/// Independent sums of a reduction: two vectors of eight.
const LANES: usize = 16;

/// Sum of `f(x)` over all elements, in a fixed order.
#[inline(always)]
fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, &value) in sums.iter_mut().zip(chunk) {
            *sum += f(value);
        }
    }
    for (sum, &value) in sums.iter_mut().zip(rest) {
        *sum += f(value);
    }
    sums.iter().sum()
}

#[inline(always)]
fn max_of(x: &[f32], start: f32) -> f32 {
    let max = |a: f32, b: f32| if b > a { b } else { a };
    let mut best = [start; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (best, &value) in best.iter_mut().zip(chunk) {
            *best = max(*best, value);
        }
    }
    for (best, &value) in best.iter_mut().zip(rest) {
        *best = max(*best, value);
    }
    best.into_iter().fold(start, max)
}

/// Adding 1.5 * 2^23 to a number below 2^22 rounds it to a whole number (to nearest even) in the low bits.
const ROUND: f32 = 12_582_912.0;

/// The whole number next to `x`, whose size is below 2^22.
#[inline(always)]
fn round_to_i32(x: f32) -> i32 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32
}

/// `a * b + c`, rounded once if the machine has an instruction for it.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// e^x to a few units in the last place; 0 below -87, never infinite.
#[inline(always)]
fn exp<const FUSED: bool>(x: f32) -> f32 {
    let add = multiply_add::<FUSED>;
    let x = if x > 88.0 { 88.0 } else { x };
    let n = add(x, std::f32::consts::LOG2_E, ROUND);
    let exponent = n.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let n = n - ROUND;
    // ln 2 in two parts, the first short enough for exact products (Cody and Waite).
    let r = add(n, 2.121_944_4e-4, add(n, -0.693_359_4, x));
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = add(p, r, coefficient);
    }
    if x < -87.0 { 0.0 } else { p * f32::from_bits(exponent) }
}

#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean_square = sum_of(x, |v| v * v) / x.len() as f32;
    let scale = (mean_square + eps).sqrt().recip();
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// See [`super::Kernels::quantize`].
///
/// # Safety
/// The block must hold `x.len()` columns of `width` rows, and nobody else may use this row meanwhile.
#[inline(always)]
pub unsafe fn quantize(x: &[f32], (width, row): (usize, usize), block: QuantizedRows) {
    for (g, values) in x.as_chunks::<GROUP>().0.iter().enumerate() {
        let mut largest = [0f32; 8];
        for chunk in values.as_chunks::<8>().0 {
            for (largest, value) in largest.iter_mut().zip(chunk) {
                let value = value.abs();
                *largest = if value > *largest { value } else { *largest };
            }
        }
        let largest = largest.into_iter().fold(0f32, f32::max);
        let scale = largest / 32767.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let mut rounded = [0i32; GROUP];
        for (rounded, value) in rounded.iter_mut().zip(values) {
            *rounded = round_to_i32(value * inverse);
        }
        let total: i32 = rounded.iter().sum();
        // SAFETY: the caller's promise.
        unsafe {
            *block.scales.add(g * width + row) = scale;
            *block.sums.add(g * width + row) = scale * total as f32;
            let first: *mut [i16; 2] = block.codes.cast::<[i16; 2]>().add(g * GROUP / 2 * width + row);
            for (pair, [a, b]) in rounded.as_chunks::<2>().0.iter().enumerate() {
                *first.add(pair * width) = [*a as i16, *b as i16];
            }
        }
    }
}

#[inline(always)]
pub fn silu_mul<const FUSED: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp::<FUSED>(-gate)) * up;
    }
}

#[inline(always)]
pub fn softmax<const FUSED: bool>(scores: &mut [f32], max_so_far: f32) -> (f32, f32) {
    let max = max_of(scores, max_so_far);
    if max == f32::NEG_INFINITY {
        scores.fill(0.0);
        return (max, 0.0);
    }
    for score in scores.iter_mut() {
        *score = exp::<FUSED>(*score - max);
    }
    (max, sum_of(scores, |v| v))
}

#[inline(always)]
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

#[inline(always)]
pub fn scale(x: &mut [f32], factor: f32) {
    x.iter_mut().for_each(|x| *x *= factor);
}

#[inline(always)]
pub fn argmax(x: &[f32]) -> u32 {
    let best = max_of(x, f32::NEG_INFINITY);
    x.iter().position(|&v| v == best).unwrap_or(0) as u32
}
