//! [`StepInputs`]: what a step uploads, packed into one pinned block that mirrors one device block.
//!
//! The block starts with what a decode step needs, each array at its place for the largest batch, so that addresses
//! in CUDA graphs never change; the arrays of a step with prompt chunks follow and travel only with such steps.

use super::{
    attention_work::AttentionWork, long_attention::LongAttention, memory::PinnedBuffer, ops::Contexts,
    prompt_contexts::PromptGroup,
};
use crate::step::{SampleRow, StepInput, StepSeq};

/// Query rows of one tile of the prefill kernel, heads packed in.
pub(super) const TILE_ROWS: usize = 128;

/// An array of 4-byte numbers in the block: where it starts and how many it holds, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Section {
    start: usize,
    len: usize,
}

impl Section {
    /// Bytes from the block's start.
    pub(super) fn offset(self) -> u64 {
        (self.start * 4) as u64
    }

    /// The array in the block.
    fn of(self, block: &mut [i32]) -> &mut [i32] {
        &mut block[self.start..self.start + self.len]
    }
}

/// Where everything is. Sections are 16-byte aligned.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Tokens in the cache of each sequence, 0 for padding.
    pub(super) context_lens: Section,
    /// Rows of the residual stream to sample.
    pub(super) sample_rows: Section,
    /// How to sample them: eight words each, the `SampleRow` of `sampling.cuh`.
    pub(super) sample_params: Section,
    /// Best tokens whose log-probabilities each of them wants, beside its own; -1: no log-probabilities.
    pub(super) n_top: Section,
    /// First unit of attention of each sequence of a decode step, and the end.
    pub(super) unit_starts: Section,
    /// First unit of each block of attention, and the end.
    pub(super) block_starts: Section,
    /// How they are made.
    work: AttentionWork,
    /// Token ids, positions and cache slots of a decode step: one row a sequence.
    pub(super) decode: TokenSections,
    /// The same of a step with prompt chunks.
    pub(super) chunk: TokenSections,
    /// First query row of each sequence, and the end.
    pub(super) cu_seqlens: Section,
    /// Where each sequence's context begins among those of its group.
    pub(super) context_starts: Section,
    /// Pairs (sequence, first row of the tile), by group, of tiles with rows that are sampled.
    pub(super) sampled_tiles: Section,
    /// The same of all tiles.
    pub(super) tiles: Section,
    /// Numbers in the block.
    n_words: usize,
    /// Numbers that a decode step uploads.
    n_decode_words: usize,
}

/// Per-token arrays.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenSections {
    /// Ids; negative ones name a slot whose last token is meant.
    pub(super) token_ids: Section,
    /// Positions in the sequence.
    pub(super) positions: Section,
    /// `page * 16 + offset`, -1 for padding.
    pub(super) slot_mapping: Section,
}

impl Layout {
    /// For up to `max_seqs` sequences (a bucket) and `max_tokens` rows; `group` query heads share a kv head.
    pub(super) fn new(max_seqs: usize, max_tokens: usize, group: usize, work: AttentionWork) -> Self {
        let mut end = 0;
        let mut section = |len: usize| {
            let start = end;
            end += len.next_multiple_of(4);
            Section { start, len }
        };
        let tokens = |n: usize, section: &mut dyn FnMut(usize) -> Section| TokenSections {
            token_ids: section(n),
            positions: section(n),
            slot_mapping: section(n),
        };
        let context_lens = section(max_seqs);
        let sample_rows = section(max_seqs);
        let sample_params = section(8 * max_seqs);
        let n_top = section(max_seqs);
        let unit_starts = section(max_seqs + 1);
        let block_starts = section(work.n_blocks + 1);
        let decode = tokens(max_seqs, &mut section);
        let n_decode_words = decode.slot_mapping.start + max_seqs.next_multiple_of(4);
        let chunk = tokens(max_tokens, &mut section);
        let cu_seqlens = section(max_seqs + 1);
        let context_starts = section(max_seqs);
        let sampled_tiles = section(2 * 2 * max_seqs);
        let tiles = section(2 * max_tiles(max_seqs, max_tokens, group));
        let n_words = end;
        Self {
            context_lens,
            sample_rows,
            sample_params,
            n_top,
            unit_starts,
            block_starts,
            work,
            decode,
            chunk,
            cu_seqlens,
            context_starts,
            sampled_tiles,
            tiles,
            n_words,
            n_decode_words,
        }
    }

    /// Bytes of the block.
    pub(super) fn n_bytes(&self) -> usize {
        self.n_words * 4
    }
}

/// Most tiles a step can have.
fn max_tiles(max_seqs: usize, max_tokens: usize, group: usize) -> usize {
    max_tokens * group / TILE_ROWS + max_seqs + 1
}

/// A step as the executor runs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct StepShape {
    /// Query rows.
    pub(super) n_tokens: usize,
    /// Sequences.
    pub(super) n_seqs: usize,
    /// Leading sequences of one row.
    pub(super) n_decode: usize,
    /// The sequences with prompt chunks.
    pub(super) groups: Vec<PromptGroup>,
    /// Rows to sample.
    pub(super) n_samples: usize,
    /// Whether log-probabilities of prompts are wanted.
    pub(super) scores_prompts: bool,
    /// Longest block table.
    pub(super) n_blocks: usize,
    /// Query heads that share a kv head.
    pub(super) group: usize,
    /// Tokens in the contexts of the leading sequences, together.
    pub(super) n_decode_context: usize,
    /// Pairs of a query and a token that it sees, in the prompt chunks.
    pub(super) n_chunk_pairs: usize,
    /// Blocks of decode attention, where it runs beside prefill attention; else as many as there are.
    pub(super) decode_blocks: usize,
}

impl StepShape {
    /// Of `step`; `group` query heads share a kv head, and prompts of up to `max_pages` pages are attended together.
    pub(super) fn of(step: &StepInput, group: usize, max_pages: usize) -> Self {
        let n_decode = step.seqs.iter().take_while(|seq| seq.query_len == 1).count();
        Self {
            n_tokens: step.n_tokens(),
            n_seqs: step.seqs.len(),
            n_decode,
            groups: PromptGroup::all(step, n_decode, group, max_pages),
            n_samples: step.samples.len(),
            scores_prompts: step.seqs.iter().any(|seq| seq.prompt_logprobs.is_some()),
            n_blocks: step.seqs.iter().map(|seq| seq.block_table.len()).max().unwrap_or(0),
            group,
            n_decode_context: step.seqs[..n_decode].iter().map(|seq| seq.context_len as usize).sum(),
            n_chunk_pairs: step.seqs[n_decode..].iter().map(n_pairs).sum(),
            decode_blocks: 0,
        }
    }

    /// Whether few of the rows are sampled, so that most of the last layer is for nothing.
    pub(super) fn samples_few(&self) -> bool {
        2 * self.n_samples <= self.n_tokens
    }

    /// Whether every sequence decodes one token and is sampled, and nothing else is wanted: what a CUDA graph runs.
    pub(super) fn is_decode(&self) -> bool {
        self.n_seqs > 0 && self.n_decode == self.n_seqs && self.n_samples == self.n_seqs && !self.scores_prompts
    }
}

/// Pairs of a query of `seq` and a token that it sees.
fn n_pairs(seq: &StepSeq) -> usize {
    let (queries, context) = (seq.query_len as usize, seq.context_len as usize);
    queries * (2 * context + 1 - queries) / 2
}

/// Tiles of a prompt chunk of `query_len` rows.
pub(super) fn n_tiles(query_len: u32, group: usize) -> usize {
    (query_len as usize * group).div_ceil(TILE_ROWS)
}

/// The tile where the last of `query_len` rows begins: its heads may lie in two.
pub(super) fn last_row_tile(query_len: u32, group: usize) -> usize {
    (query_len as usize - 1) * group / TILE_ROWS
}

/// The pinned blocks of one step in flight.
pub(super) struct StepInputs {
    block: PinnedBuffer,
    block_tables: PinnedBuffer,
}

impl StepInputs {
    /// For steps of `layout` with `max_seqs` block tables of `max_blocks` pages.
    pub(super) fn new(layout: &Layout, max_seqs: usize, max_blocks: usize) -> Result<Self, crate::Error> {
        Ok(Self {
            block: PinnedBuffer::new(layout.n_bytes())?,
            block_tables: PinnedBuffer::new(max_seqs * max_blocks * 4)?,
        })
    }

    /// Packs `step`. `bucket`: sequences that a graph runs, the last ones padding.
    /// Returns the bytes of the block that the step needs on the device.
    pub(super) fn pack(
        &mut self,
        layout: &Layout,
        step: &StepInput,
        shape: &StepShape,
        bucket: Option<usize>,
    ) -> usize {
        pack_block(self.block.as_mut_slice(), layout, step, bucket);
        if LongAttention::takes(Contexts::of(shape.n_blocks)) {
            pack_work(self.block.as_mut_slice(), layout, bucket.unwrap_or(shape.n_decode), shape.decode_blocks);
        }
        pack_block_tables(self.block_tables.as_mut_slice(), step, shape.n_blocks);
        match bucket {
            Some(_) => layout.n_decode_words * 4,
            None => {
                let starts = layout.context_starts.of(self.block.as_mut_slice());
                for (seq, start) in shape.groups.iter().flat_map(|group| group.context_starts(step)) {
                    starts[seq] = start;
                }
                let (before, tiles) = self.block.as_mut_slice().split_at_mut(layout.tiles.start);
                (layout.tiles.start + pack_tiles(tiles, layout.sampled_tiles.of(before), step, shape)) * 4
            }
        }
    }

    /// The packed block.
    pub(super) fn block(&self) -> *const u8 {
        self.block.ptr()
    }

    /// Block tables, `[n_seqs, shape.n_blocks]` of the step and more.
    pub(super) fn block_tables(&mut self) -> &[i32] {
        self.block_tables.as_mut_slice()
    }
}

/// Everything but tiles and block tables.
fn pack_block(block: &mut [i32], layout: &Layout, step: &StepInput, bucket: Option<usize>) {
    let n_rows = bucket.unwrap_or(step.seqs.len());
    let fill = |to: &mut [i32], values: &mut dyn Iterator<Item = i32>, n: usize, padding: i32| {
        to[..n].iter_mut().for_each(|to| *to = values.next().unwrap_or(padding));
    };
    let sample_row = |row: &SampleRow| step.sample_row(row) as i32;
    fill(layout.context_lens.of(block), &mut step.seqs.iter().map(|s| s.context_len as i32), n_rows, 0);
    let n_samples = bucket.unwrap_or(step.samples.len());
    fill(layout.sample_rows.of(block), &mut step.samples.iter().map(sample_row), n_samples, 0);
    let params = layout.sample_params.of(block);
    for (to, row) in params.chunks_exact_mut(8).zip(&step.samples) {
        to.copy_from_slice(&sample_params(row, step.seqs[row.seq].slot));
    }
    let n_top = |row: &SampleRow| row.params.logprobs.map_or(-1, |n| n as i32);
    fill(layout.n_top.of(block), &mut step.samples.iter().map(n_top), step.samples.len(), -1);
    let (sections, n_tokens) = match bucket {
        Some(bucket) => (layout.decode, bucket),
        None => (layout.chunk, step.n_tokens()),
    };
    fill(sections.token_ids.of(block), &mut step.token_ids.iter().copied(), n_tokens, 0);
    fill(sections.positions.of(block), &mut step.positions.iter().map(|&p| p as i32), n_tokens, 0);
    fill(sections.slot_mapping.of(block), &mut step.slot_mapping.iter().map(|&s| s as i32), n_tokens, -1);
    if bucket.is_none() {
        let starts = step.seqs.iter().map(|s| s.query_start as i32).chain([step.n_tokens() as i32]);
        fill(layout.cu_seqlens.of(block), &mut { starts }, step.seqs.len() + 1, 0);
    }
}

/// The work of `n_blocks` blocks of decode attention, from the first `n` contexts packed before.
fn pack_work(block: &mut [i32], layout: &Layout, n: usize, n_blocks: usize) {
    let (before, rest) = block.split_at_mut(layout.unit_starts.start);
    let (unit_starts, block_starts) = rest.split_at_mut(layout.block_starts.start - layout.unit_starts.start);
    layout.work.fill(n_blocks, &layout.context_lens.of(before)[..n], unit_starts, block_starts);
}

/// `SampleRow` of `sampling.cuh`: temperature, top_p, min_p, top_k, seed (two words), index in the output, slot.
fn sample_params(row: &SampleRow, slot: u32) -> [i32; 8] {
    let params = &row.params;
    let bits = |value: f32| value.to_bits() as i32;
    [
        bits(params.temperature),
        bits(params.top_p),
        bits(params.min_p),
        params.top_k.min(i32::MAX as u32) as i32,
        row.seed as i32,
        (row.seed >> 32) as i32,
        row.n_output as i32,
        slot as i32,
    ]
}

fn pack_block_tables(tables: &mut [i32], step: &StepInput, n_blocks: usize) {
    for (row, seq) in tables.chunks_exact_mut(n_blocks.max(1)).zip(&step.seqs) {
        let pages = step.pages(seq);
        row.iter_mut().zip(pages).for_each(|(to, &page)| *to = page as i32);
    }
}

/// Tiles of the prompt chunks, of each group those of the longest context first so that the last blocks to run are short
/// ones; those with rows that are sampled once more to `sampled`. Returns the numbers written to `tiles`.
fn pack_tiles(tiles: &mut [i32], sampled: &mut [i32], step: &StepInput, shape: &StepShape) -> usize {
    let (mut pairs, mut sampled) = (tiles.chunks_exact_mut(2), sampled.chunks_exact_mut(2));
    for group in &shape.groups {
        let mut order = Vec::with_capacity(group.n_tiles);
        for i in group.seqs.clone() {
            let seq = &step.seqs[i];
            let before = seq.context_len - seq.query_len;
            order.extend((0..n_tiles(seq.query_len, shape.group)).map(|tile| {
                let last_query = ((tile + 1) * TILE_ROWS / shape.group).min(seq.query_len as usize);
                (before as usize + last_query, i, tile)
            }));
        }
        order.sort_by_key(|&(context, ..)| std::cmp::Reverse(context));
        for &(_, seq, tile) in &order {
            let pair = [seq as i32, (tile * TILE_ROWS) as i32];
            let is_last = tile >= last_row_tile(step.seqs[seq].query_len, shape.group);
            let to_sampled = if is_last && step.is_sampled(seq) { sampled.next() } else { None };
            pairs.next().into_iter().chain(to_sampled).for_each(|to| to.copy_from_slice(&pair));
        }
    }
    2 * shape.groups.iter().map(|group| group.n_tiles).sum::<usize>()
}

#[cfg(test)]
mod tests {
    use std::{ops::Range, sync::Arc};

    use super::*;

    const GROUP: usize = 4;

    fn layout(max_seqs: usize, max_tokens: usize) -> Layout {
        Layout::new(max_seqs, max_tokens, GROUP, AttentionWork { n_blocks: 5, n_tiles: 2, window: 0 })
    }

    /// Sequences of (query_len, context_len), all sampled; pages are numbered through.
    fn step(seqs: &[(u32, u32)]) -> StepInput {
        let mut step = StepInput::default();
        for (i, &(query_len, context_len)) in seqs.iter().enumerate() {
            let start = step.token_ids.len() as u32;
            let first_page = step.block_tables.len() as u32;
            for position in context_len - query_len..context_len {
                step.token_ids.push(100 + position as i32);
                step.positions.push(position);
                step.slot_mapping.push((first_page + position / 16) * 16 + position % 16);
            }
            let n_pages = context_len.div_ceil(16);
            step.block_tables.extend(first_page..first_page + n_pages);
            step.seqs.push(StepSeq {
                slot: i as u32,
                query_start: start,
                query_len,
                context_len,
                block_table: first_page as usize..(first_page + n_pages) as usize,
                prompt_logprobs: None,
            });
            step.samples.push(SampleRow {
                seq: i,
                seq_id: i as u64,
                params: Arc::default(),
                seed: 7 << 32 | 9,
                n_output: 0,
                banned: None,
                history: None,
            });
        }
        step
    }

    #[test]
    fn sections_do_not_overlap_and_decode_comes_first() {
        let layout = layout(9, 100);
        let l = &layout;
        let sections = [
            l.context_lens,
            l.sample_rows,
            l.sample_params,
            l.n_top,
            l.unit_starts,
            l.block_starts,
            l.decode.token_ids,
            l.decode.positions,
            l.decode.slot_mapping,
            l.chunk.token_ids,
            l.chunk.positions,
            l.chunk.slot_mapping,
            l.cu_seqlens,
            l.context_starts,
            l.sampled_tiles,
            l.tiles,
        ];
        for pair in sections.windows(2) {
            assert!(pair[0].start + pair[0].len <= pair[1].start);
            assert_eq!(pair[1].offset() % 16, 0);
        }
        assert_eq!(l.n_decode_words, l.chunk.token_ids.start);
        assert!(l.tiles.start + l.tiles.len <= l.n_words);
    }

    #[test]
    fn decode_steps_are_padded_to_the_bucket() {
        let layout = layout(16, 64);
        let step = step(&[(1, 5), (1, 17), (1, 1)]);
        let shape = StepShape::of(&step, GROUP, 64);
        assert!(shape.is_decode() && shape.groups.is_empty());
        let mut block = vec![7; layout.n_words];
        pack_block(&mut block, &layout, &step, Some(4));
        assert_eq!(layout.context_lens.of(&mut block)[..5], [5, 17, 1, 0, 7]);
        assert_eq!(layout.decode.positions.of(&mut block)[..5], [4, 16, 0, 0, 7]);
        assert_eq!(layout.decode.slot_mapping.of(&mut block)[..5], [4, 32, 48, -1, 7]);
        assert_eq!(layout.sample_rows.of(&mut block)[..4], [0, 1, 2, 0]);
        assert_eq!(layout.sample_params.of(&mut block)[8 + 7..8 + 9], [1, 1f32.to_bits() as i32]);
        pack_work(&mut block, &layout, 4, 5);
        assert_eq!(layout.unit_starts.of(&mut block)[..6], [0, 2, 6, 8, 8, 7]);
        assert_eq!(layout.block_starts.of(&mut block), [0, 8, 8, 8, 8, 8]);
        let mut tables = vec![-1; 16 * 2];
        pack_block_tables(&mut tables, &step, shape.n_blocks);
        assert_eq!(tables[..6], [0, -1, 1, 2, 3, -1]);
    }

    #[test]
    fn tiles_cover_every_chunk_row_once() {
        let step = step(&[(1, 50), (1, 3), (40, 40), (100, 500), (2, 2)]);
        let shape = StepShape::of(&step, GROUP, 64);
        assert_eq!((shape.n_decode, shape.n_tokens, shape.n_blocks), (2, 144, 32));
        assert!(!shape.is_decode());
        let mut tiles = vec![0; 2 * max_tiles(5, 144, GROUP)];
        assert_eq!(shape.groups, [PromptGroup { seqs: 2..5, n_pages: 3 + 32 + 1, n_tiles: 7, n_sampled_tiles: 3 }]);
        let mut sampled = vec![0; 2 * 2 * 5];
        let n = pack_tiles(&mut tiles, &mut sampled, &step, &shape);
        assert_eq!(sampled[..7], [3, 384, 2, 128, 4, 0, 0], "of each sequence the last");
        let mut pairs: Vec<_> = tiles[..n].chunks(2).map(|p| (p[0], p[1])).collect();
        assert_eq!(pairs[0].0, 3, "the longest context comes first");
        pairs.sort();
        let expected = [(2, 0), (2, 128), (3, 0), (3, 128), (3, 256), (3, 384), (4, 0)];
        assert_eq!(pairs, expected);
        let layout = layout(5, 144);
        let mut block = vec![0; layout.n_words];
        pack_block(&mut block, &layout, &step, None);
        assert_eq!(layout.cu_seqlens.of(&mut block), [0, 1, 2, 42, 142, 144]);
        assert_eq!(layout.sample_rows.of(&mut block), [0, 1, 41, 141, 143]);
    }

    #[test]
    fn contexts_that_do_not_fit_together_are_attended_in_turn() {
        let step = step(&[(1, 50), (40, 40), (100, 500), (2, 2), (3, 33)]);
        let shape = StepShape::of(&step, GROUP, 33);
        let group =
            |seqs: Range<usize>, n_pages, n_tiles| PromptGroup { n_sampled_tiles: seqs.len(), seqs, n_pages, n_tiles };
        assert_eq!(shape.groups, [group(1..2, 3, 2), group(2..4, 33, 5), group(4..5, 3, 1)]);
        let starts: Vec<_> = shape.groups.iter().flat_map(|group| group.context_starts(&step)).collect();
        assert_eq!(starts, [(1, 0), (2, 0), (3, 512), (4, 0)]);
        let mut tiles = vec![0; 2 * max_tiles(5, 146, GROUP)];
        assert_eq!(pack_tiles(&mut tiles, &mut [0; 2 * 2 * 5], &step, &shape), 16);
        let seqs: Vec<_> = tiles[..16].chunks(2).map(|pair| pair[0]).collect();
        assert_eq!(seqs, [1, 1, 2, 2, 2, 2, 3, 4], "no tile of a group among those of another");
        let alone = StepShape::of(&step, GROUP, 8);
        assert_eq!(alone.groups[1], group(2..3, 32, 4), "one that is larger than all is a group");
    }
}
