//! [`StepBuffers`]: activations and step state, allocated once for the largest step.

use super::{
    device::Gpu, gemm::padded_rows, inputs::Layout, long_attention, memory::DeviceBuffer, ops::kv_tiles,
    stream_gemm::StreamGemm,
};
use crate::{Error, decoder::DecoderSpec};

/// Sizes of the largest step.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepLimits {
    /// Sequences, rounded up to a bucket.
    pub(super) max_seqs: usize,
    /// Query rows.
    pub(super) max_tokens: usize,
    /// Pages of the longest context.
    pub(super) max_blocks: usize,
    /// Splits of decode attention times sequences, at most.
    pub(super) max_seq_splits: usize,
}

impl StepLimits {
    /// Rows that logits are computed for at once.
    pub(super) fn logits_rows(&self) -> usize {
        padded_rows(self.max_seqs)
    }
}

/// Device memory of a step. One step uses it at a time: the stream orders steps.
pub(super) struct StepBuffers {
    /// What [`super::inputs::StepInputs`] uploads.
    pub(super) inputs: DeviceBuffer,
    /// int32 `[max_seqs, max_blocks]`.
    pub(super) block_tables: DeviceBuffer,
    /// Residual stream, float32 `[T, hidden]`.
    pub(super) x: DeviceBuffer,
    /// Normalised activations, bf16 `[T, hidden]`.
    pub(super) h: DeviceBuffer,
    /// bf16 `[T, (n_heads + 2 n_kv_heads) * head_dim]`.
    pub(super) qkv: DeviceBuffer,
    /// bf16 `[T, n_heads * head_dim]`.
    pub(super) attn_out: DeviceBuffer,
    /// bf16 `[T, 2 * intermediate]`; on Hopper nothing, for products there write [`Self::act`].
    pub(super) gate_up: DeviceBuffer,
    /// bf16 `[T, intermediate]`.
    pub(super) act: DeviceBuffer,
    /// Parts of a product that the next norm adds to the residual stream, float32 `[parts, T, hidden]`.
    pub(super) parts: DeviceBuffer,
    /// float32 `[logits_rows, vocab]`.
    pub(super) logits: DeviceBuffer,
    /// Token sampled last for each slot, int32 `[max_seqs]`.
    pub(super) last_tokens: DeviceBuffer,
    /// Partial results of split decode attention, float32.
    pub(super) partial_out: DeviceBuffer,
    /// Their maxima and sums, float32.
    pub(super) partial_max_sum: DeviceBuffer,
    /// Splits done, uint32; zero between launches.
    pub(super) counters: DeviceBuffer,
}

/// Query heads that one block of decode attention serves.
pub(super) const HEADS_PER_TILE: usize = 8;

impl StepBuffers {
    /// Allocates all of it.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, limits: StepLimits, layout: &Layout) -> Result<Self, Error> {
        let rows = padded_rows(limits.max_tokens.max(limits.max_seqs));
        let (q, kv) = (spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim);
        let group = spec.n_heads / spec.n_kv_heads;
        let kv_tiles = kv_tiles(spec.n_heads, spec.n_kv_heads);
        let partials = limits.max_seq_splits * kv_tiles * group.min(HEADS_PER_TILE);
        let (of_blocks, sums_of_blocks) = long_attention::partial_numbers(spec, gpu.n_sms as usize);
        let gate_up_rows = if gpu.is_hopper() { 1 } else { rows };
        // Zeroed: rows past the step's end are computed from what is there, and NaNs would be slow to find.
        let zeroed = |n_bytes: usize, what: &str| DeviceBuffer::zeroed(gpu, n_bytes, what);
        Ok(Self {
            inputs: zeroed(layout.n_bytes(), "the step inputs")?,
            block_tables: zeroed(limits.max_seqs * limits.max_blocks * 4, "the block tables")?,
            x: zeroed(rows * spec.hidden_size * 4, "the residual stream")?,
            h: zeroed(rows * spec.hidden_size * 2, "the normalised activations")?,
            qkv: zeroed(rows * (q + 2 * kv) * 2, "the q, k and v activations")?,
            attn_out: zeroed(rows * q * 2, "the attention output")?,
            gate_up: zeroed(gate_up_rows * 2 * spec.intermediate_size * 2, "the gate and up activations")?,
            act: zeroed(rows * spec.intermediate_size * 2, "the MLP activations")?,
            parts: zeroed(StreamGemm::max_part_numbers(spec) * 4, "the parts of products")?,
            logits: zeroed(limits.logits_rows() * spec.vocab_size * 4, "the logits")?,
            last_tokens: zeroed(limits.max_seqs * 4, "the last tokens")?,
            partial_out: zeroed((partials * spec.head_dim).max(of_blocks) * 4, "the partial attention results")?,
            partial_max_sum: zeroed((partials * 2).max(sums_of_blocks) * 4, "the partial attention sums")?,
            counters: zeroed((limits.max_seqs * kv_tiles).max(gpu.n_sms as usize) * 4, "the attention counters")?,
        })
    }
}

/// The KV cache: of each layer blocks of [`block_bytes`], `[n_pages, n_kv_heads]` (`kernels/packed_kv.cuh`).
pub(super) struct KvCache {
    pub(super) layers: Vec<DeviceBuffer>,
}

impl KvCache {
    /// `n_pages` pages in every layer. Zeroed: a scale that was never written must not be infinite.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, n_pages: usize) -> Result<Self, Error> {
        let n_bytes = n_pages * page_bytes(spec);
        let layers = (0..spec.n_layers).map(|_| DeviceBuffer::zeroed(gpu, n_bytes, "a layer's KV cache"));
        Ok(Self { layers: layers.collect::<Result<_, Error>>()? })
    }
}

/// Bytes of one page of one layer, keys and values.
pub(super) fn page_bytes(spec: &DecoderSpec) -> usize {
    spec.n_kv_heads * block_bytes(spec)
}

/// Bytes of one page of one kv head, keys and values: 12 bits a number, and a line of scales.
pub(super) fn block_bytes(spec: &DecoderSpec) -> usize {
    2 * crate::step::PAGE_SIZE * kv_dim(spec) * 12 / 8 + 128
}

/// Head dimensions in the cache, padding included.
pub(super) fn kv_dim(spec: &DecoderSpec) -> usize {
    spec.head_dim.next_multiple_of(64)
}
