//! Attention over the paged KV cache: softmax online over tiles of pages, work cut by (sequence, query block,
//! key/value head) and, for long decoding contexts, by context.

use std::{cell::RefCell, ops::Range};

use super::{
    disjoint::Disjoint,
    kernels::{Kernels, Operand, Output, TILE_COLS, TILE_ROWS},
    kv_cache::{KvCache, KvPage},
    pool::Pool,
};
use crate::{
    decoder::DecoderSpec,
    quant::GROUP,
    step::{PAGE_SIZE, StepInput},
};

/// Pages of a softmax tile.
const TILE_PAGES: usize = 4;
/// Tokens of a softmax tile.
const TILE_TOKENS: usize = TILE_PAGES * PAGE_SIZE;
/// Rows (query tokens times the heads that share a key/value head) of a piece of work: queries, scores and sums stay in
/// the L1 and L2 caches, and each tile of the KV cache serves all of them.
const PIECE_ROWS: usize = 48;
/// Longest context, in tokens, that a decoding sequence's piece covers. A constant, so that a sequence's results do not
/// depend on the batch.
const PART_TOKENS: usize = 256;

/// How a step's query rows meet the KV cache; the same for every layer.
pub struct AttentionPlan {
    pieces: Vec<Piece>,
    /// Decoding sequences that are attended to in parts.
    joins: Vec<Join>,
    n_parts: usize,
}

/// Query rows of one sequence and the context that they meet.
struct Piece {
    seq: usize,
    /// First query row in the step.
    first_row: usize,
    n_queries: usize,
    /// Position of the first query.
    position: usize,
    /// Positions of the context; starts at a page's first.
    context: Range<usize>,
    /// Where the result goes if it is one of several parts.
    part: Option<usize>,
}

/// The parts of one query row.
struct Join {
    row: usize,
    parts: Range<usize>,
}

/// Attention of one model.
pub struct Attention {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    value_stride: usize,
    /// `[n_parts, n_kv_heads, heads per kv head, value_stride + 2]`: sums, then maximum and total.
    parts: Vec<f32>,
}

/// One layer's inputs and output.
pub struct AttentionInput<'a> {
    /// `[n_tokens, q_stride]`: rotated queries first in each row.
    pub queries: &'a [f32],
    /// Elements from row to row of `queries`.
    pub q_stride: usize,
    /// The layer's keys and values, this step's included.
    pub cache: &'a KvCache,
}

impl AttentionPlan {
    /// Cuts up `step`.
    pub fn new(spec: &DecoderSpec, step: &StepInput) -> Self {
        let per_kv = spec.n_heads / spec.n_kv_heads;
        let block = (PIECE_ROWS / per_kv).max(1);
        let window = spec.sliding_window.unwrap_or(usize::MAX);
        let mut plan = Self { pieces: Vec::new(), joins: Vec::new(), n_parts: 0 };
        for (i, seq) in step.seqs.iter().enumerate() {
            let (first_row, n_rows) = (seq.query_start as usize, seq.query_len as usize);
            let first_position = (seq.context_len - seq.query_len) as usize;
            for done in (0..n_rows).step_by(block) {
                let n_queries = block.min(n_rows - done);
                let position = first_position + done;
                let start = (position + 1).saturating_sub(window) / PAGE_SIZE * PAGE_SIZE;
                let end = position + n_queries;
                let piece =
                    |context, part| Piece { seq: i, first_row: first_row + done, n_queries, position, context, part };
                if n_rows > 1 || end - start <= PART_TOKENS {
                    plan.pieces.push(piece(start..end, None));
                    continue;
                }
                let first_part = plan.n_parts;
                for from in (start..end).step_by(PART_TOKENS) {
                    plan.pieces.push(piece(from..(from + PART_TOKENS).min(end), Some(plan.n_parts)));
                    plan.n_parts += 1;
                }
                plan.joins.push(Join { row: first_row, parts: first_part..plan.n_parts });
            }
        }
        // The longest first, so that threads end together.
        plan.pieces.sort_by_key(|piece| std::cmp::Reverse(piece.n_queries * piece.context.len()));
        plan
    }
}

/// Buffers of a piece, kept from one to the next.
#[derive(Default)]
struct Scratch {
    /// `[rows, head_dim]`, scaled.
    queries: Vec<f32>,
    /// `[rows, TILE_TOKENS]`.
    scores: Vec<f32>,
    /// `[rows, value_stride]`.
    sums: Vec<f32>,
    /// `[rows]`: best score and sum of exponentials so far.
    state: Vec<(f32, f32)>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Attention {
    /// Attention for the heads of `spec`.
    pub fn new(spec: &DecoderSpec) -> Self {
        Self {
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            head_dim: spec.head_dim,
            window: spec.sliding_window,
            value_stride: spec.head_dim.next_multiple_of(TILE_COLS),
            parts: Vec::new(),
        }
    }

    fn per_kv(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Floats of a part's result for one head.
    fn part_stride(&self) -> usize {
        self.value_stride + 2
    }

    /// Attends: `out`, `[n_tokens, n_heads * head_dim]`.
    pub fn run(
        &mut self,
        (pool, kernels): (&mut Pool, &Kernels),
        (plan, step): (&AttentionPlan, &StepInput),
        input: &AttentionInput<'_>,
        out: &mut [f32],
    ) {
        let mut parts = std::mem::take(&mut self.parts);
        parts.resize(plan.n_parts * self.n_heads * self.part_stride(), 0.0);
        {
            let (parts, out) = (Disjoint::new(&mut parts), Disjoint::new(&mut *out));
            let this = &*self;
            pool.run(plan.pieces.len() * this.n_kv_heads, &|i| {
                let (piece, kv_head) = (&plan.pieces[i / this.n_kv_heads], i % this.n_kv_heads);
                SCRATCH.with_borrow_mut(|scratch| {
                    this.attend(kernels, (piece, step), kv_head, input, scratch);
                    this.finish(piece, kv_head, scratch, (&parts, &out));
                });
            });
        }
        for join in &plan.joins {
            self.join(join, &parts, out);
        }
        self.parts = parts;
    }

    /// Fills `scratch.sums` and `scratch.state` for the rows of a piece: query after query, the heads that share
    /// `kv_head` within.
    fn attend(
        &self,
        kernels: &Kernels,
        (piece, step): (&Piece, &StepInput),
        kv_head: usize,
        input: &AttentionInput<'_>,
        scratch: &mut Scratch,
    ) {
        let (d, per_kv, stride) = (self.head_dim, self.per_kv(), self.value_stride);
        let n_rows = piece.n_queries * per_kv;
        let factor = (d as f32).sqrt().recip();
        scratch.queries.clear();
        for query in 0..piece.n_queries {
            let first = (piece.first_row + query) * input.q_stride + kv_head * per_kv * d;
            scratch.queries.extend(input.queries[first..first + per_kv * d].iter().map(|q| q * factor));
        }
        scratch.scores.resize(n_rows * TILE_TOKENS, 0.0);
        scratch.sums.clear();
        scratch.sums.resize(n_rows * stride, 0.0);
        scratch.state.clear();
        scratch.state.resize(n_rows, (f32::NEG_INFINITY, 0.0));

        let pages = step.pages(&step.seqs[piece.seq]);
        for first in piece.context.clone().step_by(TILE_TOKENS) {
            let n_tokens = TILE_TOKENS.min(piece.context.end - first);
            let pages = &pages[first / PAGE_SIZE..(first + n_tokens).div_ceil(PAGE_SIZE)];
            for (p, &page) in pages.iter().enumerate() {
                let page = input.cache.page(page, kv_head);
                for row in (0..n_rows).step_by(TILE_ROWS) {
                    let queries = Operand { ptr: scratch.queries[row * d..].as_ptr(), stride: d };
                    let scores = scratch.scores[row * TILE_TOKENS + p * PAGE_SIZE..].as_mut_ptr();
                    let out = Output { ptr: scores, stride: TILE_TOKENS, accumulate: false };
                    // SAFETY: at most six of the rows left.
                    unsafe { self.score(kernels, (TILE_ROWS.min(n_rows - row), queries), page, out) };
                }
            }
            for row in 0..n_rows {
                let scores = &mut scratch.scores[row * TILE_TOKENS..][..pages.len() * PAGE_SIZE];
                let position = piece.position + row / per_kv;
                self.mask(scores, position, first..first + n_tokens);
                let (max_before, total) = scratch.state[row];
                let (max, sum) = kernels.softmax(scores, max_before);
                // No score yet: nothing to rescale either.
                let factor =
                    if max == max_before || max_before == f32::NEG_INFINITY { 1.0 } else { (max_before - max).exp() };
                scratch.state[row] = (max, total * factor + sum);
                if factor != 1.0 {
                    kernels.scale(&mut scratch.sums[row * stride..][..stride], factor);
                }
            }
            for (p, &page) in pages.iter().enumerate() {
                // What lies behind the last token is not to be touched: it may be anything.
                let depth = PAGE_SIZE.min(n_tokens - p * PAGE_SIZE);
                let page = input.cache.page(page, kv_head);
                for row in (0..n_rows).step_by(TILE_ROWS) {
                    let weights = scratch.scores[row * TILE_TOKENS + p * PAGE_SIZE..].as_ptr();
                    let weights = Operand { ptr: weights, stride: TILE_TOKENS };
                    let sums = scratch.sums[row * stride..].as_mut_ptr();
                    let out = Output { ptr: sums, stride, accumulate: true };
                    // SAFETY: at most six of the rows left; at most a page's tokens.
                    unsafe { self.add_values(kernels, (TILE_ROWS.min(n_rows - row), depth, weights), page, out) };
                }
            }
        }
    }

    /// Products of at most [`TILE_ROWS`] queries, `[n_rows, head_dim]`, with a page's keys: `out`, `[n_rows, PAGE_SIZE]`.
    ///
    /// # Safety
    /// Both must be valid for these sizes, and nobody else may use `out` meanwhile.
    unsafe fn score(&self, kernels: &Kernels, (n_rows, queries): (usize, Operand<f32>), page: KvPage<'_>, out: Output) {
        match page {
            KvPage::F16 { keys, .. } => {
                let keys = Operand { ptr: keys.as_ptr(), stride: PAGE_SIZE };
                // SAFETY: the caller's promise; a page's keys are `[head_dim, PAGE_SIZE]`.
                unsafe { kernels.tile((n_rows, self.head_dim), queries, keys, out) };
            }
            KvPage::Q8_0 { keys, key_scales, .. } => {
                for (g, scales) in key_scales.iter().enumerate() {
                    let depth = GROUP.min(self.head_dim - g * GROUP);
                    let queries = Operand { ptr: queries.ptr.wrapping_add(g * GROUP), ..queries };
                    let keys = Operand { ptr: keys[g * GROUP * PAGE_SIZE..].as_ptr(), stride: PAGE_SIZE };
                    // SAFETY: as above.
                    unsafe {
                        kernels.tile_i8((n_rows, depth), queries, (keys, scales), Output { accumulate: g > 0, ..out });
                    }
                }
            }
        }
    }

    /// Adds to `out`, `[n_rows, value_stride]`, the sums of the first `depth` tokens' values of a page times `weights`,
    /// `[n_rows, depth]`.
    ///
    /// # Safety
    /// Both must be valid for these sizes, and nobody else may use `out` meanwhile.
    unsafe fn add_values(
        &self,
        kernels: &Kernels,
        (n_rows, depth, weights): (usize, usize, Operand<f32>),
        page: KvPage<'_>,
        out: Output,
    ) {
        let stride = self.value_stride;
        let at = |column: usize| Output { ptr: out.ptr.wrapping_add(column), ..out };
        match page {
            KvPage::F16 { values, .. } => {
                for column in (0..stride).step_by(TILE_COLS) {
                    let values = Operand { ptr: values[column..].as_ptr(), stride };
                    // SAFETY: the caller's promise; a page's values are `[PAGE_SIZE, value_stride]`.
                    unsafe { kernels.tile((n_rows, depth), weights, values, at(column)) };
                }
            }
            KvPage::Q8_0 { values, value_scales, .. } => {
                let mut scaled = [[0f32; PAGE_SIZE]; TILE_ROWS];
                for (g, scales) in value_scales.iter().enumerate() {
                    for (row, scaled) in scaled.iter_mut().take(n_rows).enumerate() {
                        for (token, (scaled, scale)) in scaled.iter_mut().zip(scales).take(depth).enumerate() {
                            // SAFETY: the caller's promise.
                            *scaled = unsafe { *weights.ptr.add(row * weights.stride + token) } * scale;
                        }
                    }
                    let weights = Operand { ptr: scaled.as_ptr().cast(), stride: PAGE_SIZE };
                    for column in (g * GROUP..stride.min((g + 1) * GROUP)).step_by(TILE_COLS) {
                        let values = Operand { ptr: values[column..].as_ptr(), stride };
                        // SAFETY: as above.
                        unsafe { kernels.tile_i8((n_rows, depth), weights, (values, &[1.0; TILE_COLS]), at(column)) };
                    }
                }
            }
        }
    }

    /// Sets the scores of tokens that the query at `position` must not see to negative infinity. `scores` are those of
    /// `tokens` and of what lies behind them in the last page.
    fn mask(&self, scores: &mut [f32], position: usize, tokens: Range<usize>) {
        let n = scores.len();
        let end = (position + 1).clamp(tokens.start, tokens.end) - tokens.start;
        scores[end..].fill(f32::NEG_INFINITY);
        if let Some(window) = self.window {
            let start = (position + 1).saturating_sub(window).saturating_sub(tokens.start);
            scores[..start.min(n)].fill(f32::NEG_INFINITY);
        }
    }

    /// Writes a piece's result to its place.
    fn finish(
        &self,
        piece: &Piece,
        kv_head: usize,
        scratch: &Scratch,
        (parts, out): (&Disjoint<'_, f32>, &Disjoint<'_, f32>),
    ) {
        let (d, per_kv, stride) = (self.head_dim, self.per_kv(), self.value_stride);
        for (row, (sums, &(max, total))) in scratch.sums.chunks_exact(stride).zip(&scratch.state).enumerate() {
            let head = kv_head * per_kv + row % per_kv;
            if let Some(part) = piece.part {
                let first = (part * self.n_heads + head) * self.part_stride();
                // SAFETY: each part and head has its place.
                let place = unsafe { parts.range(first..first + self.part_stride()) };
                place[..stride].copy_from_slice(sums);
                place[stride..].copy_from_slice(&[max, total]);
            } else {
                let first = ((piece.first_row + row / per_kv) * self.n_heads + head) * d;
                // SAFETY: each query row and head belongs to one piece and key/value head.
                let out = unsafe { out.range(first..first + d) };
                let factor = total.recip();
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * factor);
            }
        }
    }

    /// Joins the parts of one query row.
    fn join(&self, join: &Join, parts: &[f32], out: &mut [f32]) {
        let (d, stride) = (self.head_dim, self.value_stride);
        for head in 0..self.n_heads {
            let part = |i: usize| &parts[(i * self.n_heads + head) * self.part_stride()..][..self.part_stride()];
            let max = join.parts.clone().map(|i| part(i)[stride]).fold(f32::NEG_INFINITY, f32::max);
            let out = &mut out[(join.row * self.n_heads + head) * d..][..d];
            out.fill(0.0);
            let mut total = 0.0;
            for i in join.parts.clone() {
                let factor = (part(i)[stride] - max).exp();
                total += part(i)[stride + 1] * factor;
                out.iter_mut().zip(part(i)).for_each(|(out, sum)| *out += sum * factor);
            }
            let factor = f32::recip(total);
            out.iter_mut().for_each(|out| *out *= factor);
        }
    }
}
