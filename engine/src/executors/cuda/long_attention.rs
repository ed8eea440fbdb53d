//! [`LongAttention`]: decode attention of long contexts on Hopper (`kernels/decode_attention_sm90.cu`).

use super::{
    buffers::{HEADS_PER_TILE, block_bytes, kv_dim},
    compile,
    device::Gpu,
    kernel::{Kernel, Launch},
    ops::Contexts,
};
use crate::{Error, decoder::DecoderSpec};

/// Warps of a block and pages of a warp's ring, the fastest first (docs/log.md).
const SHAPES: [(usize, usize); 4] = [(12, 2), (8, 2), (8, 1), (4, 1)];
/// Rows whose queries are rotated at a time.
const ROWS: usize = 8;

/// The kernel for one model.
pub(super) struct LongAttention {
    kernel: Kernel,
    n_warps: usize,
    /// Most blocks: multiprocessors.
    n_sms: usize,
    /// Dynamic shared memory, without the lists of sequences.
    shared_bytes: usize,
}

impl LongAttention {
    /// Compiles (or takes from the cache) and loads it, for batches of up to `max_seqs`; `None` if the device is not a
    /// Hopper or the model's heads do not fit its multiprocessors.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, max_seqs: usize) -> Result<Option<Self>, Error> {
        let n_sms = gpu.n_sms as usize;
        let fits = |&(n_warps, n_stages): &(usize, usize)| {
            shared_bytes(spec, n_warps, n_stages) + lists_bytes(max_seqs, n_sms) <= gpu.max_shared as usize
        };
        let shape = SHAPES.into_iter().find(fits).filter(|_| gpu.is_hopper());
        let Some((n_warps, n_stages)) = shape else { return Ok(None) };
        let macros = [
            ("HEAD_DIM", spec.head_dim),
            ("GROUP", spec.n_heads / spec.n_kv_heads),
            ("STAGES", n_stages),
            ("WARPS", n_warps),
            ("ROWS", ROWS.min(n_warps)),
        ];
        let [kernel] = compile::load(gpu, &compile::DECODE_ATTENTION_SM90, &macros, ["decode_attention_sm90"])?;
        kernel.allow_shared(gpu.max_shared)?;
        Ok(Some(Self { kernel, n_warps, n_sms, shared_bytes: shared_bytes(spec, n_warps, n_stages) }))
    }

    /// Whether it is the fastest for such contexts: short ones want more blocks beside the weights' streams.
    pub(super) fn takes(contexts: Contexts) -> bool {
        contexts == Contexts::Long
    }

    pub(super) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// For `n_seqs` sequences, on `n_blocks` multiprocessors.
    pub(super) fn launch(&self, n_seqs: usize, n_blocks: usize) -> Launch {
        Launch {
            grid: [n_blocks as u32, 1, 1],
            block: self.n_warps as u32 * 32,
            shared_bytes: (self.shared_bytes + lists_bytes(n_seqs, self.n_sms)) as u32,
            dependent: true,
        }
    }
}

/// float32 numbers of the partial results of all blocks, and of their maxima and sums.
pub(super) fn partial_numbers(spec: &DecoderSpec, n_blocks: usize) -> (usize, usize) {
    let heads = heads(spec);
    (n_blocks * 2 * heads * spec.head_dim, n_blocks * 2 * heads * 2)
}

/// Query heads of a tile.
fn heads(spec: &DecoderSpec) -> usize {
    (spec.n_heads / spec.n_kv_heads).min(HEADS_PER_TILE)
}

/// The kernel's ring and `State`.
fn shared_bytes(spec: &DecoderSpec, n_warps: usize, n_stages: usize) -> usize {
    let (heads, head_dim) = (heads(spec), spec.head_dim);
    let ring = n_warps * n_stages * block_bytes(spec);
    let barriers = n_warps * n_stages * 8;
    let packed_row = (kv_dim(spec) * 12 / 8 + 4).next_multiple_of(16);
    let rotated = ROWS * (heads * (head_dim + 8) * 2 + 2 * packed_row);
    let results = n_warps * (heads * (head_dim + 4) * 4 + 8 * 8);
    ring + barriers + rotated + results + 16
}

/// The lists of units, blocks and contexts that the kernel copies.
fn lists_bytes(n_seqs: usize, n_blocks: usize) -> usize {
    4 * (2 * n_seqs + n_blocks + 2)
}
