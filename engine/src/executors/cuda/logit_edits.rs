//! [`LogitEdits`]: penalties, biases, allowed and banned ids and grammar masks, applied to the logits on the device.
//!
//! [`crate::sampler`] is the definition. What penalties need to know of a sequence stays on the device, by slot: its
//! prompt's tokens and how often each token is in its output. Tokens are counted there when they are sampled, so a
//! step can follow another whose tokens the host does not know yet. A slot whose counts are not those of the sequence
//! (it is new, came back after a preemption, or was sampled on the host) is filled again from its history.

use cudarc::driver::sys;
use rayon::prelude::*;

use super::{
    buffers::StepLimits,
    compile,
    device::Gpu,
    kernel::{Arg, Kernel, Launch},
    memory::{DeviceBuffer, PinnedBuffer},
    status::Check,
};
use crate::{
    Error,
    decoder::DecoderSpec,
    step::{PAGE_SIZE, SampleRow, StepInput},
};

/// Entries (biases, bans, allowed ids) that a step has room for, by sequence.
const ENTRIES: usize = 256;

/// Kernels and state.
pub(super) struct LogitEdits {
    kernels: Kernels,
    /// uint16 `[max_seqs, vocab_stride]`: times a token is in the output.
    counts: DeviceBuffer,
    /// uint32 `[max_seqs, vocab_stride / 32]`: whether it is in the prompt.
    prompt_bits: DeviceBuffer,
    /// Whose tokens a slot's counts are.
    slots: Vec<Option<Counted>>,
    /// What a step uploads; page-locked sources for the steps in flight.
    block: DeviceBuffer,
    host: [PinnedBuffer; 2],
    vocab_size: usize,
    /// The vocabulary rounded up to whole words of bits.
    vocab_stride: usize,
}

struct Kernels {
    apply_penalties: Kernel,
    edit_logits: Kernel,
    keep_allowed: Kernel,
    apply_masks: Kernel,
    count_tokens: Kernel,
    count_sampled: Kernel,
    set_prompt_bits: Kernel,
    clear_slot: Kernel,
}

/// A sequence and how many of its tokens are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counted {
    seq_id: u64,
    n_output: u32,
}

/// Numbers for the device, one array after the other.
#[derive(Debug, Default)]
struct Block {
    words: Vec<i32>,
}

/// An array of a [`Block`]: where it starts and how many numbers it has.
#[derive(Debug, Clone, Copy)]
struct Array {
    start: usize,
    len: usize,
}

impl Block {
    fn push(&mut self, values: impl IntoIterator<Item = i32>) -> Array {
        // `PenaltyRow` is read as 16 bytes.
        let start = self.words.len().next_multiple_of(4);
        self.words.resize(start, 0);
        self.words.extend(values);
        Array { start, len: self.words.len() - start }
    }
}

/// Values to add to logits: rows, ids, values.
struct Additions([Array; 3]);

impl Additions {
    fn of(block: &mut Block, entries: &[(usize, u32, f32)]) -> Self {
        let rows = block.push(entries.iter().map(|&(row, ..)| row as i32));
        let ids = block.push(entries.iter().map(|&(_, id, _)| id as i32));
        let values = block.push(entries.iter().map(|&(.., value)| value.to_bits() as i32));
        Self([rows, ids, values])
    }
}

/// A slot to fill again.
struct Refill {
    slot: i32,
    prompt: Array,
    output: Array,
    /// The slot, if the token it sampled last is not in `output`.
    in_flight: Option<Array>,
}

/// A step's edits as they are uploaded.
struct Packed {
    block: Block,
    penalties: Option<Array>,
    refills: Vec<Refill>,
    biases: Additions,
    /// Rows, offsets and ids of what is allowed.
    allowed: [Array; 3],
    bans: Additions,
    /// Rows and bits.
    masks: [Array; 2],
    /// Slots whose sampled tokens are counted.
    counted: Array,
}

/// Whether `row`'s logits are changed before a token is drawn.
pub(super) fn edits_logits(row: &SampleRow) -> bool {
    let params = &row.params;
    !params.logit_bias.is_empty() || params.allowed_token_ids.is_some() || row.history.is_some() || row.banned.is_some()
}

/// Whether the device can do what `row` wants: log-probabilities are those of logits before they are edited, which it
/// does not keep, and where a mask and another list leave nothing, the host knows which one yields.
fn is_for_device(row: &SampleRow) -> bool {
    let masked = row.banned.as_ref().is_some_and(|banned| banned.mask.is_some());
    let listed = row.params.allowed_token_ids.is_some() || row.banned.as_ref().is_some_and(|b| !b.ids.is_empty());
    !edits_logits(row) || (row.params.logprobs.is_none() && !(masked && listed))
}

impl LogitEdits {
    /// For steps within `limits`.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, limits: StepLimits) -> Result<Self, Error> {
        let [
            apply_penalties,
            edit_logits,
            keep_allowed,
            apply_masks,
            count_tokens,
            count_sampled,
            set_prompt_bits,
            clear_slot,
        ] = compile::load(
            gpu,
            &compile::PENALTIES,
            &[],
            [
                "apply_penalties",
                "edit_logits",
                "keep_allowed",
                "apply_masks",
                "count_tokens",
                "count_sampled",
                "set_prompt_bits",
                "clear_slot",
            ],
        )?;
        let vocab_stride = spec.vocab_size.next_multiple_of(32);
        keep_allowed.allow_shared((vocab_stride / 8) as u32)?;
        let n = limits.max_seqs;
        let words = n * (vocab_stride / 32 + ENTRIES) + 2 * limits.max_blocks * PAGE_SIZE;
        let zeroed = |n_bytes: usize, what: &str| DeviceBuffer::zeroed(gpu, n_bytes, what);
        Ok(Self {
            kernels: Kernels {
                apply_penalties,
                edit_logits,
                keep_allowed,
                apply_masks,
                count_tokens,
                count_sampled,
                set_prompt_bits,
                clear_slot,
            },
            counts: zeroed(n * vocab_stride * 2, "the counts of penalties")?,
            prompt_bits: zeroed(n * vocab_stride / 8, "the prompts of penalties")?,
            slots: vec![None; n],
            block: zeroed(words * 4, "the edits of logits")?,
            host: [PinnedBuffer::new(words * 4)?, PinnedBuffer::new(words * 4)?],
            vocab_size: spec.vocab_size,
            vocab_stride,
        })
    }

    /// Edits `logits`, float32 `[samples, vocab_size]`. Returns what [`Self::count`] needs, or `None` if the host must
    /// edit and sample this step. `index`: which of the steps in flight.
    pub(super) fn apply(
        &mut self,
        gpu: &Gpu,
        buffers: (u64, u64),
        step: &StepInput,
        index: usize,
    ) -> Result<Option<EditedStep>, Error> {
        let (logits, last_tokens) = buffers;
        if !step.samples.iter().all(is_for_device) {
            return Ok(None);
        }
        let packed = self.pack(step);
        let n_bytes = packed.block.words.len() * 4;
        if n_bytes > self.block.n_bytes() {
            return Ok(None);
        }
        self.host[index].as_mut_slice::<i32>()[..packed.block.words.len()].copy_from_slice(&packed.block.words);
        let stream = gpu.cu_stream();
        // SAFETY: both sides hold `n_bytes`; the source is not written before the step is done.
        unsafe { sys::cuMemcpyHtoDAsync_v2(self.block.ptr(), self.host[index].ptr().cast(), n_bytes, stream) }
            .check("cuMemcpyHtoDAsync")?;
        for refill in &packed.refills {
            self.refill(gpu, refill, last_tokens)?;
        }
        self.edit(gpu, logits, step.samples.len(), &packed)?;
        Ok(Some(EditedStep { slots: packed.counted }))
    }

    /// Counts the tokens that `step` sampled.
    pub(super) fn count(
        &mut self,
        gpu: &Gpu,
        last_tokens: u64,
        step: &StepInput,
        edited: &EditedStep,
    ) -> Result<(), Error> {
        for row in step.samples.iter().filter(|row| row.history.is_some()) {
            let counted = Counted { seq_id: row.seq_id, n_output: row.n_output + 1 };
            self.slots[step.seqs[row.seq].slot as usize] = Some(counted);
        }
        self.count_sampled(gpu, edited.slots, last_tokens)
    }

    fn pack(&self, step: &StepInput) -> Packed {
        let mut block = Block::default();
        let slot = |row: &SampleRow| step.seqs[row.seq].slot as i32;
        let rows = || step.samples.iter().enumerate();
        let has_history = step.samples.iter().any(|row| row.history.is_some());
        let penalties = has_history.then(|| {
            let row = |row: &SampleRow| {
                let p = &row.params;
                let slot = if row.history.is_some() { slot(row) } else { -1 };
                let bits = [p.repetition_penalty, p.frequency_penalty, p.presence_penalty].map(|x| x.to_bits() as i32);
                [bits[0], bits[1], bits[2], slot]
            };
            block.push(step.samples.iter().flat_map(row))
        });
        let refills = step.samples.iter().filter_map(|row| {
            let history = row.history.as_ref()?;
            let counted = Counted { seq_id: row.seq_id, n_output: row.n_output };
            if self.slots[slot(row) as usize] == Some(counted) {
                return None;
            }
            let is_whole = history.output.len() as u32 == row.n_output;
            Some(Refill {
                slot: slot(row),
                prompt: block.push(history.prompt.iter().map(|&id| id as i32)),
                output: block.push(history.output.iter().map(|&id| id as i32)),
                in_flight: (!is_whole).then(|| block.push([slot(row)])),
            })
        });
        let refills = refills.collect();
        let biases: Vec<_> =
            rows().flat_map(|(i, row)| row.params.logit_bias.iter().map(move |&(id, bias)| (i, id, bias))).collect();
        let biases = Additions::of(&mut block, &biases);
        let lists: Vec<_> = rows().filter_map(|(i, row)| Some((i, row.params.allowed_token_ids.as_ref()?))).collect();
        let mut end = 0;
        let offsets: Vec<i32> = std::iter::once(0)
            .chain(lists.iter().map(|(_, ids)| {
                end += ids.len() as i32;
                end
            }))
            .collect();
        let allowed = [
            block.push(lists.iter().map(|&(i, _)| i as i32)),
            block.push(offsets),
            block.push(lists.iter().flat_map(|(_, ids)| ids.iter().map(|&id| id as i32))),
        ];
        let bans: Vec<_> = rows()
            .filter_map(|(i, row)| Some((i, row.banned.as_ref()?)))
            .flat_map(|(i, banned)| banned.ids.iter().map(move |&id| (i, id, f32::NEG_INFINITY)))
            .collect();
        let bans = Additions::of(&mut block, &bans);
        let masks = self.pack_masks(&mut block, step);
        let counted = block.push(step.samples.iter().filter(|row| row.history.is_some()).map(slot));
        Packed { block, penalties, refills, biases, allowed, bans, masks, counted }
    }

    /// Rows with a mask, and the masks' bits.
    fn pack_masks(&self, block: &mut Block, step: &StepInput) -> [Array; 2] {
        // Computing a mask takes a fraction of a millisecond, while the device is busy with this step.
        let masks: Vec<(usize, &[u32])> = step
            .samples
            .par_iter()
            .enumerate()
            .filter_map(|(i, row)| Some((i, row.banned.as_ref()?.mask.as_ref()?.bits())))
            .filter(|(_, bits)| !bits.is_empty())
            .collect();
        let n_words = self.vocab_stride / 32;
        let padded = |bits: &[u32]| {
            let mut words = bits[..bits.len().min(n_words)].iter().map(|&word| word as i32).collect::<Vec<_>>();
            words.resize(n_words, 0);
            words
        };
        [block.push(masks.iter().map(|&(i, _)| i as i32)), block.push(masks.iter().flat_map(|&(_, bits)| padded(bits)))]
    }

    fn at(&self, array: Array) -> Arg {
        Arg::Ptr(self.block.ptr() + array.start as u64 * 4)
    }

    fn stride(&self) -> Arg {
        Arg::Int(self.vocab_stride as i32)
    }

    fn refill(&self, gpu: &Gpu, refill: &Refill, last_tokens: u64) -> Result<(), Error> {
        let (k, stream) = (&self.kernels, gpu.cu_stream());
        let (counts, bits) = (Arg::Ptr(self.counts.ptr()), Arg::Ptr(self.prompt_bits.ptr()));
        let slot = Arg::Int(refill.slot);
        k.clear_slot.launch(stream, per_entry(self.vocab_stride / 2), &[counts, bits, self.stride(), slot])?;
        for (kernel, state, ids) in
            [(&k.set_prompt_bits, bits, refill.prompt), (&k.count_tokens, counts, refill.output)]
        {
            let args = [state, self.stride(), slot, self.at(ids), Arg::Int(ids.len as i32)];
            kernel.launch(stream, per_entry(ids.len), &args)?;
        }
        refill.in_flight.map_or(Ok(()), |slots| self.count_sampled(gpu, slots, last_tokens))
    }

    fn count_sampled(&self, gpu: &Gpu, slots: Array, last_tokens: u64) -> Result<(), Error> {
        let args = [
            Arg::Ptr(self.counts.ptr()),
            self.stride(),
            self.at(slots),
            Arg::Ptr(last_tokens),
            Arg::Int(slots.len as i32),
        ];
        self.kernels.count_sampled.launch(gpu.cu_stream(), per_entry(slots.len), &args)
    }

    /// In the order of [`crate::sampler`].
    fn edit(&self, gpu: &Gpu, logits: u64, n_rows: usize, packed: &Packed) -> Result<(), Error> {
        let (k, stream) = (&self.kernels, gpu.cu_stream());
        let (logits, vocab) = (Arg::Ptr(logits), Arg::Int(self.vocab_size as i32));
        let by_row = |n_rows: usize, n_blocks: u32, block: u32, shared_bytes: usize| Launch {
            grid: [n_blocks, n_rows as u32, 1],
            block,
            shared_bytes: shared_bytes as u32,
            dependent: false,
        };
        if let Some(rows) = packed.penalties {
            let (counts, bits) = (Arg::Ptr(self.counts.ptr()), Arg::Ptr(self.prompt_bits.ptr()));
            let args = [logits, vocab, vocab, self.at(rows), counts, bits, self.stride()];
            k.apply_penalties.launch(stream, by_row(n_rows, 16, 256, 0), &args)?;
        }
        self.add(gpu, logits, &packed.biases)?;
        let [rows, offsets, ids] = packed.allowed;
        let launch = Launch { grid: [rows.len as u32, 1, 1], ..by_row(1, 1, 1024, self.vocab_stride / 8) };
        let args = [logits, vocab, vocab, self.at(rows), self.at(offsets), self.at(ids)];
        k.keep_allowed.launch(stream, launch, &args)?;
        self.add(gpu, logits, &packed.bans)?;
        let [rows, bits] = packed.masks;
        let args = [logits, vocab, vocab, self.at(rows), self.at(bits), self.stride()];
        k.apply_masks.launch(stream, by_row(rows.len, 16, 256, 0), &args)
    }

    fn add(&self, gpu: &Gpu, logits: Arg, additions: &Additions) -> Result<(), Error> {
        let [rows, ids, values] = additions.0;
        let args = [
            logits,
            Arg::Int(self.vocab_size as i32),
            self.at(rows),
            self.at(ids),
            self.at(values),
            Arg::Int(rows.len as i32),
        ];
        self.kernels.edit_logits.launch(gpu.cu_stream(), per_entry(rows.len), &args)
    }
}

/// A step whose logits were edited on the device.
pub(super) struct EditedStep {
    slots: Array,
}

/// One thread an entry.
fn per_entry(n: usize) -> Launch {
    Launch { grid: [n.div_ceil(256) as u32, 1, 1], block: 256, shared_bytes: 0, dependent: false }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{SamplingParams, grammar::TokenMask, step::Banned};

    fn row(params: SamplingParams, banned: Option<Banned>) -> SampleRow {
        SampleRow { seq: 0, seq_id: 0, params: Arc::new(params), seed: 0, n_output: 0, banned, history: None }
    }

    #[test]
    fn the_host_takes_what_needs_the_logits_before_and_after() {
        let biased = SamplingParams { logit_bias: vec![(1, 2.0)], ..SamplingParams::default() };
        assert!(is_for_device(&row(SamplingParams::default(), None)));
        assert!(is_for_device(&row(biased.clone(), None)));
        assert!(!is_for_device(&row(SamplingParams { logprobs: Some(0), ..biased.clone() }, None)));
        let mask = Some(Arc::new(TokenMask::of_bits(vec![1])));
        let masked = Banned { mask: mask.clone(), ..Banned::default() };
        assert!(is_for_device(&row(biased.clone(), Some(masked.clone()))));
        let allowed = SamplingParams { allowed_token_ids: Some(vec![1]), ..biased.clone() };
        assert!(!is_for_device(&row(allowed, Some(masked))));
        assert!(!is_for_device(&row(biased, Some(Banned { mask, ..Banned::of([3]) }))));
    }

    #[test]
    fn arrays_of_a_block_begin_at_16_bytes() {
        let mut block = Block::default();
        let (a, b) = (block.push([1, 2, 3]), block.push([4; 5]));
        let empty = block.push([]);
        assert_eq!((a.start, a.len, b.start, b.len, empty.start, empty.len), (0, 3, 4, 5, 12, 0));
        assert_eq!(block.words[..5], [1, 2, 3, 0, 4]);
    }
}
