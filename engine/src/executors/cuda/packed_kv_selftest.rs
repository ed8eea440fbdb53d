//! The 12-bit KV cache against its definition: keys and values that the device has packed and unpacked again are what
//! went in, down to 2^-14 of the greatest of a vector bit for bit, below that to 2^-22 of it.

use half::bf16;

use super::{
    buffers::block_bytes,
    compile,
    device::Gpu,
    kernel::{
        Arg::{Float, Int, Ptr},
        Launch,
    },
    memory::DeviceBuffer,
    packed_weights_selftest::random_below,
};
use crate::{Error, decoder::DecoderSpec, step::PAGE_SIZE};

const N_KV: usize = 3;
/// Pages of the context, in its order.
const PAGES: [i32; 3] = [2, 0, 1];
const N_TOKENS: usize = PAGES.len() * PAGE_SIZE;
/// A query head, keys, values.
const N_HEADS: usize = 1 + 2 * N_KV;

/// Name of each case and 0, or infinity where a number is wrong. `spec`: any model; head dimensions are tried in turn.
pub(super) fn compare(gpu: &Gpu, spec: &DecoderSpec) -> Result<Vec<(String, f32)>, Error> {
    let of = |head_dim: usize| {
        let spec = DecoderSpec { n_heads: 1, n_kv_heads: N_KV, head_dim, ..spec.clone() };
        let qkv = numbers(head_dim);
        let (keys, values) = round_trip(gpu, &spec, &qkv)?;
        let is_right = (0..N_TOKENS * N_KV).all(|i| {
            let (token, head) = (i / N_KV, i % N_KV);
            let row = |x: &[u16], at: usize| x[at * head_dim..(at + 1) * head_dim].to_vec();
            let packed = head * N_TOKENS + token;
            is_kept(&row(&qkv, token * N_HEADS + 1 + head), &row(&keys, packed))
                && is_kept(&row(&qkv, token * N_HEADS + 1 + N_KV + head), &row(&values, packed))
        });
        Ok((format!("packed KV cache, head_dim {head_dim}"), if is_right { 0.0 } else { f32::INFINITY }))
    };
    [64, 96, 128].into_iter().map(of).collect()
}

/// q, k and v of every token, bf16: vectors of greatly different sizes, of numbers of greatly different sizes; some of
/// zeros alone.
fn numbers(head_dim: usize) -> Vec<u16> {
    let mut random = random_below(7);
    let mut numbers = Vec::with_capacity(N_TOKENS * N_HEADS * head_dim);
    for _ in 0..N_TOKENS * N_HEADS {
        let greatest = [0, 1, 12, 60, 120, 127, 140, 200][random(8) as usize];
        for _ in 0..head_dim {
            let exponent = greatest - random(greatest.min(30) + 1);
            let mantissa = if greatest == 0 { 0 } else { random(128) };
            numbers.push((random(2) << 15 | exponent << 7 | mantissa) as u16);
        }
    }
    numbers
}

/// Whether `got` is `want` as far as the format keeps it.
fn is_kept(want: &[u16], got: &[u16]) -> bool {
    let float = |&bits: &u16| f64::from(bf16::from_bits(bits).to_f32());
    let greatest = want.iter().map(|bits| float(bits).abs()).fold(0.0, f64::max);
    want.iter().zip(got).all(|(want, got)| {
        let is_large = float(want).abs() >= greatest * 2f64.powi(-14);
        let error = (float(want) - float(got)).abs();
        if is_large && greatest > 0.0 { want == got } else { error <= greatest * 2f64.powi(-22) }
    })
}

/// Keys and values, bf16 `[N_KV, N_TOKENS, head_dim]`, of `qkv`, through the cache. No rotation: all angles are 0.
fn round_trip(gpu: &Gpu, spec: &DecoderSpec, qkv: &[u16]) -> Result<(Vec<u16>, Vec<u16>), Error> {
    let head_dim = spec.head_dim;
    let macros = [("HEAD_DIM", head_dim)];
    let [rope_kv] = compile::load(gpu, &compile::ROPE_KV, &macros, ["rope_kv_write"])?;
    let [unpack_kv] = compile::load(gpu, &compile::UNPACK_KV, &macros, ["unpack_kv"])?;

    let what = "the test of the KV cache";
    let upload = |data: &[i32]| -> Result<DeviceBuffer, Error> {
        let buffer = DeviceBuffer::new(gpu, data.len() * 4, what)?;
        buffer.write(gpu, 0, data)?;
        Ok(buffer)
    };
    let activations = DeviceBuffer::new(gpu, qkv.len() * 2, what)?;
    activations.write(gpu, 0, qkv)?;
    let angles: Vec<i32> = (0..head_dim).map(|d| if d < head_dim / 2 { 1f32.to_bits() as i32 } else { 0 }).collect();
    let cos_sin = upload(&angles)?;
    let positions = upload(&[0; N_TOKENS])?;
    let slot = |token: usize| PAGES[token / PAGE_SIZE] * PAGE_SIZE as i32 + (token % PAGE_SIZE) as i32;
    let slots = upload(&(0..N_TOKENS).map(slot).collect::<Vec<_>>())?;
    let (tables, starts) = (upload(&PAGES)?, upload(&[0])?);
    let (context_lens, cu_seqlens) = (upload(&[N_TOKENS as i32])?, upload(&[0, N_TOKENS as i32])?);
    let cache = DeviceBuffer::zeroed(gpu, PAGES.len() * N_KV * block_bytes(spec), what)?;
    let n = N_KV * N_TOKENS * head_dim;
    let (keys, values) = (DeviceBuffer::zeroed(gpu, n * 2, what)?, DeviceBuffer::zeroed(gpu, n * 2, what)?);

    let launch = |grid: [u32; 3]| Launch { grid, block: 256, shared_bytes: 0, dependent: false };
    let stream = gpu.cu_stream();
    let n_threads = N_TOKENS * N_HEADS * 8;
    let (tokens, table_stride) = (Int(N_TOKENS as i32), Int(PAGES.len() as i32));
    let args = [
        Ptr(activations.ptr()),
        Ptr(0),
        Ptr(cos_sin.ptr()),
        Ptr(positions.ptr()),
        Ptr(slots.ptr()),
        Ptr(cache.ptr()),
        tokens,
        Int(1),
        Int(N_KV as i32),
        Ptr(0),
        Ptr(0),
        Float(0.0),
    ];
    rope_kv.launch(stream, launch([n_threads.div_ceil(256) as u32, 1, 1]), &args)?;
    let args = [
        Ptr(cache.ptr()),
        Ptr(tables.ptr()),
        table_stride,
        Ptr(context_lens.ptr()),
        Ptr(cu_seqlens.ptr()),
        Ptr(starts.ptr()),
        Ptr(keys.ptr()),
        Ptr(values.ptr()),
        Int(0),
        Int(1),
        tokens,
        Int(0),
    ];
    unpack_kv.launch(stream, launch([PAGES.len() as u32, N_KV as u32, 1]), &args)?;
    gpu.synchronize()?;
    Ok((keys.read(gpu, 0, n)?, values.read(gpu, 0, n)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_format_rounds_is_told_from_what_it_loses() {
        let bits = |x: f32| bf16::from_f32(x).to_bits();
        let want = [bits(1.0), bits(-0.5), bits(3e-6)];
        assert!(is_kept(&want, &want));
        assert!(is_kept(&want, &[want[0], want[1], bits(3.1e-6)]), "far below the greatest");
        assert!(!is_kept(&want, &[want[0], want[1], bits(4e-6)]));
        assert!(!is_kept(&want, &[want[0], want[1] + 1, want[2]]), "a bit of a large one");
        assert!(is_kept(&[0, 0x8000], &[0, 0]));
    }

    #[test]
    fn numbers_are_of_many_sizes() {
        let numbers = numbers(64);
        let exponents: std::collections::BTreeSet<_> = numbers.iter().map(|bits| bits >> 7 & 255).collect();
        assert!(exponents.len() > 100 && exponents.contains(&0) && exponents.contains(&200));
    }
}
