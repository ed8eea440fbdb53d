//! [`PromptContexts`]: the keys and values that a layer's prefill attention reads, unpacked (`kernels/unpack_kv.cu`);
//! [`PromptGroup`]: prompts whose contexts are there at a time.

use std::ops::Range;

use super::{
    buffers::StepLimits,
    device::Gpu,
    inputs::{last_row_tile, n_tiles},
    memory::DeviceBuffer,
    tensor_map::{DeviceMaps, MapAt, TensorMap},
};
use crate::{
    Error,
    decoder::DecoderSpec,
    step::{PAGE_SIZE, StepInput},
};

/// Rows of a box of [`PromptContexts::maps`]: tokens that Hopper's prefill attention reads at a time.
const BOX_ROWS: usize = 128;

/// Device memory for contexts, one layer's at a time.
pub(super) struct PromptContexts {
    /// bf16 `[n_kv_heads, n_tokens, head_dim]`.
    pub(super) keys: DeviceBuffer,
    /// The same.
    pub(super) values: DeviceBuffer,
    /// [`KEYS`] and [`VALUES`] for Hopper's copy engine.
    pub(super) maps: Option<DeviceMaps>,
    /// Pages that fit.
    n_pages: usize,
}

/// Places of the two in [`PromptContexts::maps`].
pub(super) const KEYS: MapAt = MapAt(0);
pub(super) const VALUES: MapAt = MapAt(1);

impl PromptContexts {
    /// For any one context, and for all prompts of a step that have nothing in the cache yet.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, limits: StepLimits) -> Result<Self, Error> {
        let n_pages = limits.max_blocks.max(limits.max_tokens / PAGE_SIZE + limits.max_seqs);
        let n_rows = spec.n_kv_heads * n_pages * PAGE_SIZE;
        let buffer = || DeviceBuffer::zeroed(gpu, n_rows * spec.head_dim * 2, "the unpacked contexts of prompts");
        let (keys, values) = (buffer()?, buffer()?);
        let map = |x: &DeviceBuffer| TensorMap::of_activations(x.ptr(), n_rows, spec.head_dim, BOX_ROWS);
        let maps = if gpu.is_hopper() { Some(DeviceMaps::new(gpu, &[map(&keys)?, map(&values)?])?) } else { None };
        Ok(Self { keys, values, maps, n_pages })
    }

    /// Pages that fit.
    pub(super) fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Tokens that fit.
    pub(super) fn n_tokens(&self) -> usize {
        self.n_pages * PAGE_SIZE
    }
}

/// Sequences with prompt chunks that are attended together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PromptGroup {
    /// Their numbers in the step.
    pub(super) seqs: Range<usize>,
    /// Pages of their contexts.
    pub(super) n_pages: usize,
    /// Tiles of their query rows.
    pub(super) n_tiles: usize,
    /// Of these, those with a row that is sampled.
    pub(super) n_sampled_tiles: usize,
}

impl PromptGroup {
    /// The sequences of `step` from `first` on, in groups of up to `max_pages` pages (or one sequence); `heads` query
    /// heads share a kv head.
    pub(super) fn all(step: &StepInput, first: usize, heads: usize, max_pages: usize) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        for (i, seq) in step.seqs.iter().enumerate().skip(first) {
            let n_pages = (seq.context_len as usize).div_ceil(PAGE_SIZE);
            let n_tiles = n_tiles(seq.query_len, heads);
            let n_sampled_tiles = if step.is_sampled(i) { n_tiles - last_row_tile(seq.query_len, heads) } else { 0 };
            match groups.last_mut().filter(|group| group.n_pages + n_pages <= max_pages) {
                Some(group) => {
                    group.seqs.end = i + 1;
                    group.n_pages += n_pages;
                    group.n_tiles += n_tiles;
                    group.n_sampled_tiles += n_sampled_tiles;
                }
                None => groups.push(Self { seqs: i..i + 1, n_pages, n_tiles, n_sampled_tiles }),
            }
        }
        groups
    }

    /// Token of [`PromptContexts`] where each sequence's context begins.
    pub(super) fn context_starts<'a>(&'a self, step: &'a StepInput) -> impl Iterator<Item = (usize, i32)> + 'a {
        self.seqs.clone().scan(0, |n_pages, seq| {
            let start = *n_pages * PAGE_SIZE;
            *n_pages += (step.seqs[seq].context_len as usize).div_ceil(PAGE_SIZE);
            Some((seq, start as i32))
        })
    }
}
