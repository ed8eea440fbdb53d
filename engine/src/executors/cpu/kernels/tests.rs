//! Each instruction set against double precision and against the portable kernels.

use std::ops::Range;

use half::f16;

use super::*;

fn noise(n: usize) -> Vec<f32> {
    let mut state = 12_345u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn softmax_is_that_of_float64() {
    for kernels in Kernels::available() {
        for n in [1, 5, 16, 64] {
            let mut scores: Vec<f32> = noise(n).iter().map(|v| v * 60.0).collect();
            if n > 5 {
                scores[3] = f32::NEG_INFINITY;
            }
            for before in [f32::NEG_INFINITY, -100.0, 70.0] {
                let max = scores.iter().copied().fold(before, f32::max);
                let expected: Vec<f64> = scores.iter().map(|&v| (f64::from(v) - f64::from(max)).exp()).collect();
                let mut got = scores.clone();
                let (got_max, total) = kernels.softmax(&mut got, before);
                assert_eq!(got_max, max);
                // The difference to the maximum, up to 100, is itself rounded.
                for (got, want) in got.iter().zip(&expected) {
                    assert!((f64::from(*got) - want).abs() <= 5e-6 * want + 1e-37, "{}: {got} {want}", kernels.name);
                }
                let want = expected.iter().sum::<f64>();
                assert!((f64::from(total) - want).abs() <= 5e-6 * want + 1e-36, "{}: {total} {want}", kernels.name);
            }
        }
        let mut nothing = [f32::NEG_INFINITY; 16];
        assert_eq!(kernels.softmax(&mut nothing, f32::NEG_INFINITY), (f32::NEG_INFINITY, 0.0));
        assert_eq!(nothing, [0.0; 16]);
    }
}

#[test]
fn silu_and_norm_are_those_of_float64() {
    for kernels in Kernels::available() {
        for n in [8, 37, 576] {
            let (gate, up): (Vec<f32>, Vec<f32>) = (noise(n).iter().map(|v| v * 120.0).collect(), noise(n));
            let mut out = vec![0.0; n];
            kernels.silu_mul(&gate, &up, &mut out);
            for ((&g, &u), &got) in gate.iter().zip(&up).zip(&out) {
                let want = f64::from(g) / (1.0 + (-f64::from(g)).exp()) * f64::from(u);
                assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs() + 1e-30, "{}: {got} {want}", kernels.name);
            }
            kernels.rms_norm(&gate, &up, 1e-5, &mut out);
            let mean = gate.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
            for ((&g, &u), &got) in gate.iter().zip(&up).zip(&out) {
                let want = f64::from(g) / (mean + 1e-5).sqrt() * f64::from(u);
                assert!((f64::from(got) - want).abs() <= 1e-5, "{}: {got} {want}", kernels.name);
            }
        }
    }
}

#[test]
fn tiles_are_products() {
    for kernels in Kernels::available() {
        for (n_rows, depth) in [(1, 64), (2, 16), (3, 5), (4, 1), (5, 80), (6, 64)] {
            let (a_stride, b_stride, out_stride) = (depth + 3, TILE_COLS + 2, TILE_COLS + 1);
            let a = noise(n_rows * a_stride);
            let mut b = vec![0u16; depth * b_stride];
            kernels.to_f16(&noise(depth * b_stride), &mut b);
            let mut out = vec![1.0f32; n_rows * out_stride];
            for accumulate in [false, true] {
                let (a, b) =
                    (Operand { ptr: a.as_ptr(), stride: a_stride }, Operand { ptr: b.as_ptr(), stride: b_stride });
                let target = Output { ptr: out.as_mut_ptr(), stride: out_stride, accumulate };
                // SAFETY: the buffers have these sizes.
                unsafe { kernels.tile((n_rows, depth), a, b, target) };
            }
            for r in 0..n_rows {
                for c in 0..TILE_COLS {
                    let term = |k: usize| f64::from(a[r * a_stride + k]) * f16::from_bits(b[k * b_stride + c]).to_f64();
                    let want = 2.0 * (0..depth).map(term).sum::<f64>();
                    let got = f64::from(out[r * out_stride + c]);
                    assert!((got - want).abs() < 1e-5, "{}: ({r}, {c}) {got} {want}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn tiles_of_integers_are_products() {
    for kernels in Kernels::available() {
        for (n_rows, depth) in [(1, 32), (2, 16), (3, 5), (4, 1), (5, 8), (6, 32)] {
            let (a_stride, b_stride, out_stride) = (depth + 3, TILE_COLS + 2, TILE_COLS + 1);
            let a = noise(n_rows * a_stride);
            let b: Vec<i8> = noise(depth * b_stride).iter().map(|v| (v * 127.0) as i8).collect();
            let scales: [f32; TILE_COLS] = std::array::from_fn(|c| 0.01 * (c as f32 - 3.0));
            let mut out = vec![1.0f32; n_rows * out_stride];
            for accumulate in [false, true] {
                let (a, b) =
                    (Operand { ptr: a.as_ptr(), stride: a_stride }, Operand { ptr: b.as_ptr(), stride: b_stride });
                let target = Output { ptr: out.as_mut_ptr(), stride: out_stride, accumulate };
                // SAFETY: the buffers have these sizes.
                unsafe { kernels.tile_i8((n_rows, depth), a, (b, &scales), target) };
            }
            for r in 0..n_rows {
                for c in 0..TILE_COLS {
                    let term = |k: usize| f64::from(a[r * a_stride + k]) * f64::from(b[k * b_stride + c]);
                    let want = 2.0 * f64::from(scales[c]) * (0..depth).map(term).sum::<f64>();
                    let got = f64::from(out[r * out_stride + c]);
                    assert!((got - want).abs() < 1e-4, "{}: ({r}, {c}) {got} {want}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn activations_come_back_from_their_codes() {
    const N: usize = 96;
    for kernels in Kernels::available() {
        let mut x = noise(N);
        x[40] = 1000.0;
        x[64..].fill(0.0);
        // Wider blocks lie otherwise for tiles; their products are compared below.
        for width in 1..=if kernels.max_width > 8 { 4 } else { 8 } {
            let (mut codes, mut scales, mut sums) =
                (vec![0i16; N * width], vec![0f32; N / 32 * width], vec![0f32; N / 32 * width]);
            let block =
                QuantizedRows { codes: codes.as_mut_ptr(), scales: scales.as_mut_ptr(), sums: sums.as_mut_ptr() };
            let row = width - 1;
            // SAFETY: the buffers have room for `width` rows.
            unsafe { kernels.quantize(&x, (width, row), block) };
            for (i, &x) in x.iter().enumerate() {
                let scale = scales[i / 32 * width + row];
                let value = f32::from(codes[(i / 2 * width + row) * 2 + i % 2]) * scale;
                assert!((value - x).abs() <= 0.5001 * scale, "{}: {value} {x}", kernels.name);
            }
            for (g, values) in x.chunks(32).enumerate() {
                let (want, scale) = (values.iter().sum::<f32>(), scales[g * width + row]);
                assert!((sums[g * width + row] - want).abs() <= 20.0 * scale, "{}", kernels.name);
            }
        }
    }
}

/// `rows` of noise as `kernels` round them, times a random matrix of `format`: `[rows, 24]`, twice.
#[cfg(target_arch = "x86_64")]
fn product(kernels: &Kernels, format: &dyn crate::quant::QuantFormat, rows: Range<usize>) -> Vec<f32> {
    use crate::executors::cpu::{
        arena::Arena,
        packed::{PackedMatrix, tests::random_tensor},
    };
    const N: usize = 512;
    let width = rows.len();
    let tensor = random_tensor(format.ggml_type(), 24, N, 7);
    let packed = PackedMatrix::pack(&tensor, &mut Arena::default()).expect("memory").expect("has codes");
    let (mut codes, mut scales, mut sums) =
        (vec![0i16; N * width], vec![0f32; N / GROUP * width + MAX_WIDTH], vec![0f32; N / GROUP * width + MAX_WIDTH]);
    for (row, x) in noise(N * MAX_WIDTH)[rows.start * N..rows.end * N].chunks_exact(N).enumerate() {
        let block = QuantizedRows { codes: codes.as_mut_ptr(), scales: scales.as_mut_ptr(), sums: sums.as_mut_ptr() };
        // SAFETY: the buffers have room for `width` rows.
        unsafe { kernels.quantize(x, (width, row), block) };
    }
    let block = ActivationBlock { width, codes: &codes, scales: &scales, sums: &sums };
    let mut out = vec![1.0; width * 24];
    for accumulate in [false, true] {
        // SAFETY: `width` rows of 24 columns.
        unsafe {
            kernels.affine(&packed.groups(0..3), &block, Output { ptr: out.as_mut_ptr(), stride: 24, accumulate })
        };
    }
    out
}

#[test]
#[cfg(target_arch = "x86_64")]
fn tiles_make_the_same_bits() {
    if !is_x86_feature_detected!("avx512vnni") || !amx::is_usable() {
        eprintln!("not tested: this machine, or its system, has no AMX");
        return;
    }
    for format in crate::quant::FORMATS.iter().filter(|format| format.affine().is_some()) {
        let row_by_row: Vec<f32> = (0..16).flat_map(|m| product(&avx512::KERNELS, *format, m..m + 1)).collect();
        for width in 1..=amx::KERNELS.max_width {
            let rows = product(&amx::KERNELS, *format, 0..width);
            assert_eq!(rows, row_by_row[..rows.len()], "{}, {width} rows", format.name());
        }
    }
}

#[test]
fn the_first_of_the_best_is_found() {
    for kernels in Kernels::available() {
        let mut x = noise(1003);
        for at in [1002, 500, 17] {
            x[at] = 3.0;
            assert_eq!(kernels.argmax(&x), at as u32, "{}", kernels.name);
        }
        assert_eq!(kernels.argmax(&[f32::NEG_INFINITY; 20]), 0);
    }
}

#[test]
fn halves_are_rounded_to_nearest_even() {
    let x: Vec<f32> = noise(77).iter().map(|v| v * 300.0).chain([0.0, -0.0, 65504.0, 1e-7, 2048.0 + 1.0]).collect();
    let expected: Vec<u16> = x.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
    for kernels in Kernels::available() {
        let mut out = vec![0; x.len()];
        kernels.to_f16(&x, &mut out);
        assert_eq!(out, expected, "{}", kernels.name);
    }
}
