//! Packed weights against the format's definition: what the device has packed is unpacked here, and must be what went in,
//! bit for bit.

use super::{
    device::Gpu,
    packed_weights::{BLOCK_BYTES, BLOCK_COLUMNS, BLOCK_ROWS, Matrix, Packer},
};
use crate::Error;

/// Rows and columns of the matrix: four blocks down, ten across.
const SIZE: (usize, usize) = (256, 640);

/// Name of each case and 0, or infinity where a bit is wrong.
pub(super) fn compare(gpu: &Gpu) -> Result<Vec<(String, f32)>, Error> {
    if !gpu.is_hopper() {
        return Ok(Vec::new());
    }
    let packer = Packer::for_size(gpu, SIZE.0 * SIZE.1, SIZE.0)?;
    let verdict = |is_right: bool| if is_right { 0.0 } else { f32::INFINITY };
    let mut cases = Vec::new();
    for (name, gated) in [("rows in order", false), ("gate and up rows", true)] {
        let weights = weights(101);
        packer.write(gpu, &weights)?;
        let Matrix { values, extras } = packer.pack(gpu, SIZE, gated)?;
        let is_right = match extras {
            Some(extras) => {
                let planes = values.read::<u8>(gpu, 0, values.n_bytes())?;
                let extras = extras.read::<u8>(gpu, 0, extras.n_bytes())?;
                unpack(&planes, &extras, gated) == weights
            }
            None => false,
        };
        cases.push((format!("packed weights: {name}"), verdict(is_right)));
    }
    // One in five is unusual: too many to write out.
    let weights = weights(5);
    packer.write(gpu, &weights)?;
    let Matrix { values, extras } = packer.pack(gpu, SIZE, false)?;
    let is_right = extras.is_none() && values.read::<u16>(gpu, 0, weights.len())? == weights;
    cases.push(("packed weights: left as they are".into(), verdict(is_right)));
    Ok(cases)
}

/// Random numbers, each below the one that is asked with, the same for a seed.
pub(super) fn random_below(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    }
}

/// bf16 whose exponents mostly lie within a dozen, another dozen for each row; every `unusual_every`-th row and column
/// (a few in all if it is large) has a zero, a subnormal, an infinity, a NaN or an exponent far off.
fn weights(unusual_every: usize) -> Vec<u16> {
    let mut random = random_below(1);
    let (n, k) = SIZE;
    let mut weights = Vec::with_capacity(n * k);
    for row in 0..n {
        for column in 0..k {
            let sign = (random(2) as u16) << 15;
            let bits = if (row * k + column) % (unusual_every * unusual_every) == 7 {
                [0x0000, 0x0001, 0x7f80, 0x7fc1, 0x0180, 0x7e05][random(6) as usize]
            } else {
                // An even exponent, so that a window of 16 holds it and the 12 after it.
                let exponent = 2 * (20 + row as u64 % 80) + random(12);
                (exponent as u16) << 7 | random(128) as u16
            };
            weights.push(sign | bits);
        }
    }
    weights
}

/// The definition of the format: `kernels/packed.cuh`.
fn unpack(planes: &[u8], extras: &[u8], gated: bool) -> Vec<u16> {
    let (n, k) = SIZE;
    let across = k / BLOCK_COLUMNS;
    let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let mut weights = vec![0; n * k];
    let source = |row: usize| match gated {
        true => row / 16 * 8 + row % 8 + if row % 16 < 8 { 0 } else { n / 2 },
        false => row,
    };
    // Row and columns of the quad of a step that a lane holds of row g or g + 8.
    let quad_at = |group: usize, block: usize, (lane, step, half): (usize, usize, usize)| {
        let row = source(group * BLOCK_ROWS + lane / 4 + 8 * half);
        let column = block * BLOCK_COLUMNS + 16 * step + 2 * (lane % 4);
        [0, 1, 8, 9].map(|i| row * k + column + i)
    };
    for (index, bytes) in planes.chunks_exact(BLOCK_BYTES).enumerate() {
        let (group, block) = (index / across, index % across);
        for (lane, step, half) in (0..32).flat_map(|l| (0..4).flat_map(move |s| [(l, s, 0), (l, s, 1)])) {
            let low = &bytes[step / 2 * 512 + lane * 16 + (step % 2 * 2 + half) * 4..][..4];
            let nibbles = word(bytes, 1024 + lane * 16 + step * 4);
            let window = extras[group * BLOCK_ROWS + lane / 4 + 8 * half];
            for (i, at) in quad_at(group, block, (lane, step, half)).into_iter().enumerate() {
                let place = (nibbles >> (16 * half + 4 * i)) as u16 & 7;
                let sign = (nibbles >> (8 * i + if half == 0 { 7 } else { 3 })) as u16 & 1;
                let upper = if window & 128 != 0 && place == 0 { 0 } else { u16::from(window & 127) + place };
                weights[at] = sign << 15 | upper << 8 | u16::from(low[i]);
            }
        }
    }
    let starts = n;
    let list = starts + n / BLOCK_ROWS * 64;
    for group in 0..n / BLOCK_ROWS {
        let start = starts + group * 64;
        let (next, end) = (word(extras, start) as usize, word(extras, start + 4) as usize);
        for at in (next - 1..end).map(|i| list + i * 8) {
            let (block, what) = (word(extras, at) as usize, word(extras, at + 4));
            let (lane, register, high) = (what as usize >> 5 & 31, what as usize >> 1 & 15, what as usize & 1);
            let (step, half) = (register / 4, register % 2);
            let quad = quad_at(group, block, (lane, step, half));
            weights[quad[register % 4 / 2 * 2 + high]] = (what >> 16) as u16;
        }
    }
    weights
}
