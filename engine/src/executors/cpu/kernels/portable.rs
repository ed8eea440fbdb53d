//! The kernels in plain Rust: they run everywhere and say what the others must compute.

use half::{bf16, f16};

use super::{
    ActivationBlock, Expanded, ExpandedGroup, FloatType, Kernels, Operand, Output, TILE_COLS, TILE_ROWS, elementwise,
    scale_columns,
};
use crate::{
    executors::cpu::packed::{BLOCKS_PER_UNIT, PackedGroups, ROWS, block_bytes, position, scales_offset, unit_bytes},
    quant::{GROUP, Scales},
};

pub static KERNELS: Kernels = Kernels {
    name: "portable",
    expand_from: 2,
    max_width: 8,
    affine,
    expand,
    expanded,
    dots,
    tile,
    tile_i8,
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

unsafe fn affine(groups: &PackedGroups<'_>, activations: &ActivationBlock<'_>, out: Output) {
    let (n_cols, n_scales) = (groups.n_cols, groups.n_cols / scale_columns(groups.codes.scales));
    let (mut codes, mut scales, mut minima) =
        (vec![0; n_cols * ROWS], vec![0.0; n_scales * ROWS], vec![0.0; n_cols / GROUP * ROWS]);
    for (i, bytes) in groups.groups().enumerate() {
        let room = &mut Expanded { codes: &mut codes, scales: &mut scales, minima: &mut minima };
        expand(&PackedGroups { bytes, ..*groups }, room);
        let group = ExpandedGroup { codes: &codes, scales: &scales, minima: &minima };
        // SAFETY: the caller's promise.
        unsafe { expanded(&group, activations, Output { ptr: out.ptr.add(i * ROWS), ..out }) }
    }
}

fn expand(group: &PackedGroups<'_>, out: &mut Expanded<'_>) {
    let (kind, n_bytes) = (group.codes, block_bytes(group.codes));
    let (blocks, units) = group.bytes.split_at(group.n_blocks() * n_bytes);
    for (b, block) in blocks.chunks_exact(n_bytes).enumerate() {
        let own = &block[scales_offset(kind.nibbles)..];
        let halves = match unit_bytes(kind.scales) {
            0 => own,
            n_bytes => &units[b / BLOCKS_PER_UNIT * n_bytes..],
        };
        let half = |at: usize| f16::from_le_bytes([halves[at], halves[at + 1]]).to_f32();
        for row in 0..ROWS {
            for column in 0..GROUP {
                let (byte, shift) = position(kind.nibbles, row, column);
                let place = ((b * GROUP + column) / 2 * ROWS + row) * 2 + column % 2;
                out.codes[place] =
                    if kind.nibbles { i16::from(block[byte] >> shift & 15) } else { i16::from(block[byte] as i8) };
            }
            let (scale, place) = (half(2 * row), b * ROWS + row);
            let (scale, minimum) = match kind.scales {
                Scales::Single => (scale, 0.0),
                Scales::AroundEight => (scale, -8.0 * scale),
                Scales::WithMinimum => (scale, half(2 * (ROWS + row))),
                Scales::InUnits => {
                    let (factor, minimum) = (f32::from(own[row]), f32::from(own[ROWS + row]));
                    (factor * scale, -(minimum * half(2 * (ROWS + row))))
                }
                Scales::BySixteen => {
                    for i in 0..2 {
                        let factor = f32::from(own[i * ROWS + row] as i8);
                        out.scales[(2 * b + i) * ROWS + row] = factor * scale;
                    }
                    continue;
                }
            };
            (out.scales[place], out.minima[place]) = (scale, minimum);
        }
    }
    if kind.scales == Scales::BySixteen {
        out.minima.fill(0.0);
    }
}

unsafe fn expanded(group: &ExpandedGroup<'_>, activations: &ActivationBlock<'_>, out: Output) {
    let width = activations.width;
    let n_blocks = group.minima.len() / ROWS;
    let scales_per_block = group.scales.len() / group.minima.len();
    let n_pairs = GROUP / 2 / scales_per_block;
    let mut sums = [[0f32; ROWS]; super::MAX_WIDTH];
    for b in 0..n_blocks {
        for (m, sums) in sums.iter_mut().take(width).enumerate() {
            let (scale, sum) = (activations.scales[b * width + m], activations.sums[b * width + m]);
            for (row, total) in sums.iter_mut().enumerate() {
                let product = |pair: usize, parity: usize| {
                    let x = activations.codes[(pair * width + m) * 2 + parity];
                    i32::from(group.codes[(pair * ROWS + row) * 2 + parity]) * i32::from(x)
                };
                for part in b * scales_per_block..(b + 1) * scales_per_block {
                    let pairs = part * n_pairs..(part + 1) * n_pairs;
                    let dot: i32 = pairs.map(|pair| product(pair, 0) + product(pair, 1)).sum();
                    *total += dot as f32 * (group.scales[part * ROWS + row] * scale);
                }
                *total += group.minima[b * ROWS + row] * sum;
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

unsafe fn tile(size: (usize, usize), a: Operand<f32>, b: Operand<u16>, out: Output) {
    // SAFETY: the caller's promise.
    unsafe { tile_of(size, a, (b, |bits| f16::from_bits(bits).to_f32()), (&[1.0; TILE_COLS], out)) }
}

unsafe fn tile_i8(size: (usize, usize), a: Operand<f32>, (b, scales): (Operand<i8>, &[f32; TILE_COLS]), out: Output) {
    // SAFETY: the caller's promise.
    unsafe { tile_of(size, a, (b, f32::from), (scales, out)) }
}

unsafe fn tile_of<T: Copy>(
    (n_rows, depth): (usize, usize),
    a: Operand<f32>,
    (b, to_f32): (Operand<T>, impl Fn(T) -> f32),
    (scales, out): (&[f32; TILE_COLS], Output),
) {
    let mut sums = [[0f32; TILE_COLS]; TILE_ROWS];
    for k in 0..depth {
        // SAFETY: `b` is valid for `depth` rows of 16 columns.
        let b = unsafe { std::slice::from_raw_parts(b.ptr.add(k * b.stride), TILE_COLS) };
        for (r, sums) in sums.iter_mut().take(n_rows).enumerate() {
            // SAFETY: `a` is valid for `n_rows` rows of `depth` columns.
            let a = unsafe { *a.ptr.add(r * a.stride + k) };
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum += a * to_f32(b);
            }
        }
    }
    for (r, sums) in sums.iter().take(n_rows).enumerate() {
        for (c, (&sum, scale)) in sums.iter().zip(scales).enumerate() {
            // SAFETY: the caller's promise.
            unsafe { put(out, r, c, sum * scale) };
        }
    }
}

fn to_f16(x: &[f32], out: &mut [u16]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = f16::from_f32(x).to_bits();
    }
}
