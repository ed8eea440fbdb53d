//! [`Packer`]: weights in 12 bits each, every bit of their bf16 kept, for Hopper's products of any number of rows
//! (`kernels/packed.cuh` describes the format). A quarter fewer bytes are read, and a quarter fewer kept.

use cudarc::driver::sys;

use super::{
    compile,
    device::Gpu,
    kernel::{Arg, Kernel, Launch},
    memory::DeviceBuffer,
    product::Product,
    status::Check,
};
use crate::{Error, decoder::DecoderSpec};

/// Rows and columns of a block, and its bytes.
pub(super) const BLOCK_ROWS: usize = 16;
pub(super) const BLOCK_COLUMNS: usize = 64;
pub(super) const BLOCK_BYTES: usize = 1536;
/// Bytes of a weight outside of its row's window, and of what tells a warp where to begin in 16 rows' list of them.
const ESCAPE_BYTES: usize = 8;
const START_BYTES: usize = 4 * 16;
/// A matrix with more than one such weight for this many stays as it is: each holds its warp up for some 50 cycles.
const WEIGHTS_PER_ESCAPE: usize = 1024;

/// A matrix of weights on the device.
pub(super) struct Matrix {
    /// bf16, row-major, or the blocks of a packed one.
    pub(super) values: DeviceBuffer,
    /// Of a packed one: windows and the weights outside of them.
    pub(super) extras: Option<DeviceBuffer>,
}

/// Where a matrix of weights lies.
#[derive(Debug, Clone, Copy)]
pub(super) enum MatrixAt {
    /// Address of bf16, row-major.
    Raw(u64),
    /// Addresses of a packed one's parts.
    Packed {
        /// Blocks.
        planes: u64,
        /// Windows and the weights outside of them.
        extras: u64,
    },
}

impl Matrix {
    /// A matrix of bf16.
    pub(super) fn raw(values: DeviceBuffer) -> Self {
        Self { values, extras: None }
    }

    /// Its addresses.
    pub(super) fn at(&self) -> MatrixAt {
        match &self.extras {
            None => MatrixAt::Raw(self.values.ptr()),
            Some(extras) => MatrixAt::Packed { planes: self.values.ptr(), extras: extras.ptr() },
        }
    }
}

impl MatrixAt {
    /// Whether the matrix has 12 bits a weight.
    pub(super) fn is_packed(self) -> bool {
        matches!(self, Self::Packed { .. })
    }
}

/// Packs one matrix after the other.
pub(super) struct Packer {
    choose_windows: Kernel,
    pack_weights: Kernel,
    /// bf16, the largest matrix: what is to be packed.
    raw: DeviceBuffer,
    /// For as many rows as a matrix has, at most: windows, numbers of weights outside of them by 16 rows, their sums.
    windows: DeviceBuffer,
    n_outside: DeviceBuffer,
    begins: DeviceBuffer,
}

/// Whether a matrix of this size is made of whole blocks.
fn is_whole((n, k): (usize, usize)) -> bool {
    n.is_multiple_of(BLOCK_ROWS) && k.is_multiple_of(BLOCK_COLUMNS)
}

/// The products of `spec` that have a matrix of their own.
fn own_matrices(spec: &DecoderSpec) -> impl Iterator<Item = (usize, usize)> {
    let products = Product::ALL.into_iter().filter(|&product| product != Product::Logits || !spec.tie_embeddings);
    products.map(|product| product.size(spec)).filter(|&size| is_whole(size))
}

/// Bytes that the weights of `spec` take on a device that packs them, one matrix as bf16 beside them, when all can be.
pub(super) fn packed_bytes(spec: &DecoderSpec) -> usize {
    let saved = |(n, k): (usize, usize)| n * k / 2;
    // Experts stay bf16; whether there is a shared one does not matter to what is saved at least.
    let of_layer =
        Product::LAYER.into_iter().filter(|product| spec.moe.is_none() || matches!(product, Product::Qkv | Product::O));
    let of_layer: usize = of_layer.map(|product| product.size(spec)).filter(|&size| is_whole(size)).map(saved).sum();
    let logits = Product::Logits.size(spec);
    let of_logits = if spec.tie_embeddings || !is_whole(logits) { 0 } else { saved(logits) };
    let raw = own_matrices(spec).map(|(n, k)| n * k * 2).max().unwrap_or(0);
    (spec.n_parameters() * 2 + raw).saturating_sub(spec.n_layers * of_layer + of_logits)
}

impl Packer {
    /// For the matrices of `spec`; `None` where the kernels that read them do not run, or for no matrix.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec) -> Result<Option<Self>, Error> {
        let (Some(n_weights), Some(n_rows)) =
            (own_matrices(spec).map(|(n, k)| n * k).max(), own_matrices(spec).map(|(n, _)| n).max())
        else {
            return Ok(None);
        };
        if !gpu.is_hopper() {
            return Ok(None);
        }
        Self::for_size(gpu, n_weights, n_rows).map(Some)
    }

    /// For matrices of up to so many weights and rows.
    pub(super) fn for_size(gpu: &Gpu, n_weights: usize, n_rows: usize) -> Result<Self, Error> {
        let [choose_windows, pack_weights] =
            compile::load(gpu, &compile::PACK_WEIGHTS, &[], ["choose_windows", "pack_weights"])?;
        let n_groups = n_rows / BLOCK_ROWS;
        Ok(Self {
            choose_windows,
            pack_weights,
            raw: DeviceBuffer::new(gpu, n_weights * 2, "a matrix of weights")?,
            windows: DeviceBuffer::new(gpu, n_rows, "windows of exponents")?,
            n_outside: DeviceBuffer::new(gpu, n_groups * 4, "numbers of weights")?,
            begins: DeviceBuffer::new(gpu, (n_groups + 1) * 4, "numbers of weights")?,
        })
    }

    /// Whether a matrix of this size can be packed; then its bf16 go to the address [`Self::raw`].
    pub(super) fn takes(&self, size: (usize, usize)) -> bool {
        is_whole(size) && size.0 * size.1 * 2 <= self.raw.n_bytes() && size.0 <= self.windows.n_bytes()
    }

    /// Address for the bf16 of the matrix to be packed next.
    pub(super) fn raw(&self) -> u64 {
        self.raw.ptr()
    }

    /// Puts `weights`, bf16, where [`Self::pack`] finds them.
    pub(super) fn write(&self, gpu: &Gpu, weights: &[u16]) -> Result<(), Error> {
        self.raw.write(gpu, 0, weights)
    }

    /// The matrix at [`Self::raw`], of `n` rows of `k`, packed, or a copy of it if too many of its weights have unusual
    /// exponents. `gated`: gate rows, then up rows, which the products want eight by eight.
    pub(super) fn pack(&self, gpu: &Gpu, (n, k): (usize, usize), gated: bool) -> Result<Matrix, Error> {
        let n_groups = n / BLOCK_ROWS;
        let launch =
            Launch { grid: [n_groups.div_ceil(8) as u32, 1, 1], block: 256, shared_bytes: 0, dependent: false };
        let size = [Arg::Int(n as i32), Arg::Int(k as i32), Arg::Int(gated.into())];
        let raw = Arg::Ptr(self.raw.ptr());
        let args = [raw, Arg::Ptr(self.windows.ptr()), Arg::Ptr(self.n_outside.ptr()), size[0], size[1], size[2]];
        self.choose_windows.launch(gpu.cu_stream(), launch, &args)?;
        let mut n_escapes = 0;
        let begins: Vec<i32> = std::iter::once(0)
            .chain(self.n_outside.read::<i32>(gpu, 0, n_groups)?.into_iter().map(|outside| {
                n_escapes += outside as usize;
                n_escapes as i32
            }))
            .collect();
        if n_escapes > n * k / WEIGHTS_PER_ESCAPE {
            let copy = DeviceBuffer::new(gpu, n * k * 2, "a weight")?;
            copy_within(gpu, copy.ptr(), self.raw.ptr(), n * k * 2)?;
            return Ok(Matrix::raw(copy));
        }
        let planes = DeviceBuffer::new(gpu, n_groups * (k / BLOCK_COLUMNS) * BLOCK_BYTES, "a weight")?;
        let extras = DeviceBuffer::new(gpu, n + n_groups * START_BYTES + n_escapes * ESCAPE_BYTES, "a weight")?;
        self.begins.write(gpu, 0, &begins)?;
        copy_within(gpu, extras.ptr(), self.windows.ptr(), n)?;
        let [planes_at, extras_at, begins] = [&planes, &extras, &self.begins].map(|buffer| Arg::Ptr(buffer.ptr()));
        let args = [raw, planes_at, extras_at, begins, size[0], size[1], size[2]];
        self.pack_weights.launch(gpu.cu_stream(), launch, &args)?;
        Ok(Matrix { values: planes, extras: Some(extras) })
    }
}

/// Copies `n_bytes` on the device, in the stream's order.
fn copy_within(gpu: &Gpu, to: u64, from: u64, n_bytes: usize) -> Result<(), Error> {
    // SAFETY: the callers' buffers have this size and live until the stream is done with them.
    unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, n_bytes, gpu.cu_stream()) }.check("cuMemcpyDtoDAsync")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executors::cuda::selftest::models;

    #[test]
    fn packed_weights_and_one_matrix_take_less_than_bf16() {
        let (_, tiny_llama) = models().swap_remove(0);
        let llama_8b = DecoderSpec {
            hidden_size: 4096,
            intermediate_size: 14_336,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 8,
            vocab_size: 128_256,
            ..tiny_llama
        };
        let raw = llama_8b.n_parameters() * 2;
        // All but the embedding at three quarters, and the logits' matrix once more as bf16.
        let logits = 128_256 * 4096 * 2;
        let expected = raw - (raw - logits) / 4 + logits;
        assert!(packed_bytes(&llama_8b).abs_diff(expected) < 1 << 20, "{} of {raw}", packed_bytes(&llama_8b));
        let odd = DecoderSpec { hidden_size: 4104, intermediate_size: 14_344, vocab_size: 128_258, ..llama_8b };
        assert!(packed_bytes(&odd) >= odd.n_parameters() * 2);
    }
}
