//! Random blocks of any format, for tests.

use half::f16;

use super::{GROUP, QuantFormat};

/// `n_blocks` blocks of random codes, whose values are around 0 and mostly below 0.3.
pub(crate) fn blocks(format: &dyn QuantFormat, n_blocks: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let (scale_at, minimum_at) = halves(format.name());
    let base = match (format.name(), format.block_size()) {
        ("IQ4_NL" | "Q8_0", _) => 1e-3,
        ("Q6_K", _) => 1e-4,
        // A unit of scales of up to 6 bits.
        (_, 256) => 3e-4,
        _ => 1e-2,
    };
    let mut data = Vec::with_capacity(n_blocks * format.block_bytes());
    for _ in 0..n_blocks {
        let scale = base * (0.5 + next() as f32 / (1u32 << 31) as f32);
        let first = data.len();
        data.extend((0..format.block_bytes()).map(|_| next() as u8));
        let mut put = |at: usize, value: f32| {
            data[first + at..first + at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        };
        put(scale_at, scale);
        if let Some(at) = minimum_at {
            put(at, if format.block_size() == GROUP { -7.5 * scale } else { 7.5 * scale });
        }
    }
    data
}

/// Where a block's half-precision scale and minimum lie.
fn halves(name: &str) -> (usize, Option<usize>) {
    match name {
        "Q4_1" | "Q5_1" | "Q4_K" | "Q5_K" => (0, Some(2)),
        "Q2_K" => (80, Some(82)),
        "Q3_K" => (108, None),
        "Q6_K" => (208, None),
        _ => (0, None),
    }
}
