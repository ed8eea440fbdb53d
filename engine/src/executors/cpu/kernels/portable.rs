//! The kernels in plain Rust: they run everywhere and say what the others must compute.

use half::{bf16, f16};

use super::{
    ActivationBlock, Expanded, ExpandedGroup, FloatType, Kernels, Operand, Output, TILE_COLS, TILE_ROWS, elementwise,
};
use crate::{
    executors::cpu::packed::{ROWS, block_bytes, position, scales_offset},
    quant::{Codes, GROUP},
};

pub static KERNELS: Kernels = Kernels {
    name: "portable",
    affine,
    expand,
    expanded,
    dots,
    tile,
    rms_norm: elementwise::rms_norm,
    quantize: elementwise::quantize,
    silu_mul: elementwise::silu_mul::<false>,
    softmax: elementwise::softmax::<false>,
    rotate: elementwise::rotate,
    scale: elementwise::scale,
    to_f16,
    argmax: elementwise::argmax,
};

/// Stores or adds `value` at row `m`, column `n`.
///
/// # Safety
/// `out` must be valid there.
unsafe fn put(out: Output, m: usize, n: usize, value: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let at = out.ptr.add(m * out.stride + n);
        *at = if out.accumulate { *at + value } else { value };
    }
}

unsafe fn affine(codes: Codes, group: &[u8], activations: &ActivationBlock<'_>, out: Output) {
    let n_blocks = group.len() / block_bytes(codes);
    let (mut integers, mut scales, mut minima) =
        (vec![0; n_blocks * ROWS * GROUP], vec![0.0; n_blocks * ROWS], vec![0.0; n_blocks * ROWS]);
    expand(codes, group, &mut Expanded { codes: &mut integers, scales: &mut scales, minima: &mut minima });
    // SAFETY: the caller's promise.
    unsafe { expanded(&ExpandedGroup { codes: &integers, scales: &scales, minima: &minima }, activations, out) }
}

fn expand(codes: Codes, group: &[u8], out: &mut Expanded<'_>) {
    for (b, block) in group.chunks_exact(block_bytes(codes)).enumerate() {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        for row in 0..ROWS {
            for column in 0..GROUP {
                let (byte, shift) = position(codes, row, column);
                let place = ((b * GROUP + column) / 2 * ROWS + row) * 2 + column % 2;
                out.codes[place] = match codes {
                    Codes::Bytes => i16::from(block[byte] as i8),
                    _ => i16::from(block[byte] >> shift & 15),
                };
            }
            let at = scales_offset(codes) + 2 * row;
            let scale = half(at);
            out.scales[b * ROWS + row] = scale;
            out.minima[b * ROWS + row] = match codes {
                Codes::NibblesWithMinimum => half(at + 2 * ROWS),
                Codes::NibblesAroundEight => -8.0 * scale,
                Codes::Bytes => 0.0,
            };
        }
    }
}

unsafe fn expanded(group: &ExpandedGroup<'_>, activations: &ActivationBlock<'_>, out: Output) {
    let width = activations.width;
    let mut sums = [[0f32; ROWS]; super::MAX_WIDTH];
    for b in 0..group.scales.len() / ROWS {
        let pairs = b * GROUP / 2..(b + 1) * GROUP / 2;
        for (m, sums) in sums.iter_mut().take(width).enumerate() {
            let (scale, sum) = (activations.scales[b * width + m], activations.sums[b * width + m]);
            for (row, total) in sums.iter_mut().enumerate() {
                let product = |pair: usize, parity: usize| {
                    let x = activations.codes[(pair * width + m) * 2 + parity];
                    i32::from(group.codes[(pair * ROWS + row) * 2 + parity]) * i32::from(x)
                };
                let dot: i32 = pairs.clone().map(|pair| product(pair, 0) + product(pair, 1)).sum();
                let at = b * ROWS + row;
                *total += dot as f32 * (group.scales[at] * scale) + group.minima[at] * sum;
            }
        }
    }
    for (m, sums) in sums.iter().take(width).enumerate() {
        for (n, &sum) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, m, n, sum) };
        }
    }
}

unsafe fn dots(float: FloatType, (rows, n_rows): (&[u8], usize), (x, width): (&[f32], usize), out: Output) {
    let n_cols = x.len() / width;
    let weight = |i: usize| match float {
        FloatType::F32 => f32::from_le_bytes([rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]]),
        FloatType::F16 => f16::from_le_bytes([rows[2 * i], rows[2 * i + 1]]).to_f32(),
        FloatType::BF16 => bf16::from_le_bytes([rows[2 * i], rows[2 * i + 1]]).to_f32(),
    };
    for n in 0..n_rows {
        for (m, x) in x.chunks_exact(n_cols).enumerate() {
            let mut sums = [0f32; 8];
            for (i, &x) in x.iter().enumerate() {
                sums[i % 8] += weight(n * n_cols + i) * x;
            }
            // SAFETY: the caller's promise.
            unsafe { put(out, m, n, sums.iter().sum()) };
        }
    }
}

unsafe fn tile((n_rows, depth): (usize, usize), a: Operand<f32>, b: Operand<u16>, out: Output) {
    let mut sums = [[0f32; TILE_COLS]; TILE_ROWS];
    for k in 0..depth {
        // SAFETY: `b` is valid for `depth` rows of 16 columns.
        let b = unsafe { std::slice::from_raw_parts(b.ptr.add(k * b.stride), TILE_COLS) };
        for (r, sums) in sums.iter_mut().take(n_rows).enumerate() {
            // SAFETY: `a` is valid for `n_rows` rows of `depth` columns.
            let a = unsafe { *a.ptr.add(r * a.stride + k) };
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum += a * f16::from_bits(b).to_f32();
            }
        }
    }
    for (r, sums) in sums.iter().take(n_rows).enumerate() {
        for (c, &sum) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, r, c, sum) };
        }
    }
}

fn to_f16(x: &[f32], out: &mut [u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(x).to_bits();
    }
}
