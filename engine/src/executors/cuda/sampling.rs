//! [`Sampling`]: from logits on the device to tokens on the host.

use rayon::prelude::*;

use super::{
    buffers::StepLimits, device::Gpu, forward::Forward, memory::DeviceBuffer,
};
use crate::{
    Error,
    decoder::DecoderSpec,
    request::TokenLogprobs,
    sampler,
    step::{SampleRow, SampledToken, StepInput, StepOutput},
};

/// Buffers of sampling.
pub(super) struct Sampling {
    /// Rows of the residual stream whose prompt logits are computed, int32.
    rows: DeviceBuffer,
    limits: StepLimits,
    vocab_size: usize,
    /// Prompt log-probabilities of the step being launched.
    prompt_logprobs: Vec<Vec<TokenLogprobs>>,
}

/// What [`Sampling::finish`] needs of a launched step.
pub(super) struct SamplingOutput {
    output: StepOutput,
}

impl Sampling {
    /// For steps within `limits`.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, limits: StepLimits) -> Result<Self, Error> {
        Ok(Self {
            rows: DeviceBuffer::zeroed(gpu, limits.logits_rows() * 4, "the prompt rows")?,
            limits,
            vocab_size: spec.vocab_size,
            prompt_logprobs: Vec::new(),
        })
    }

    /// Computes the prompt log-probabilities that `step` asks for, and waits for them.
    pub(super) fn prompt_logprobs(&mut self, gpu: &Gpu, forward: &mut Forward, step: &StepInput) -> Result<(), Error> {
        for seq in &step.seqs {
            let Some(wanted) = &seq.prompt_logprobs else { continue };
            let mut entries = Vec::with_capacity(wanted.targets.len());
            for (i, targets) in wanted.targets.chunks(self.limits.logits_rows().min(256)).enumerate() {
                let first = seq.query_start as usize + i * self.limits.logits_rows().min(256);
                let rows: Vec<i32> = (first..first + targets.len()).map(|row| row as i32).collect();
                self.rows.write(gpu, 0, &rows)?;
                forward.logits(gpu, self.rows.ptr(), targets.len())?;
                let logits: Vec<f32> = forward.buffers.logits.read(gpu, 0, targets.len() * self.vocab_size)?;
                let new: Vec<_> = logits
                    .par_chunks(self.vocab_size)
                    .zip(targets)
                    .map(|(logits, &target)| sampler::token_logprobs(logits, target, wanted.n_top))
                    .collect();
                entries.extend(new);
            }
            self.prompt_logprobs.push(entries);
        }
        Ok(())
    }

    /// Samples the rows of `step`, whose logits are on the device.
    pub(super) fn sample(
        &mut self,
        gpu: &Gpu,
        forward: &Forward,
        step: &StepInput,
        _index: usize,
    ) -> Result<SamplingOutput, Error> {
        let tokens = self.sample_on_host(gpu, forward, step)?;
        Ok(SamplingOutput { output: StepOutput { tokens, prompt_logprobs: std::mem::take(&mut self.prompt_logprobs) } })
    }

    /// The output of a step that is done.
    pub(super) fn finish(&mut self, output: SamplingOutput, _index: usize) -> StepOutput {
        output.output
    }

    /// Waits for the logits and samples them by the definition in [`sampler`].
    fn sample_on_host(&self, gpu: &Gpu, forward: &Forward, step: &StepInput) -> Result<Vec<SampledToken>, Error> {
        if step.samples.is_empty() {
            return Ok(Vec::new());
        }
        let n = step.samples.len();
        let mut logits: Vec<f32> = forward.buffers.logits.read(gpu, 0, n * self.vocab_size)?;
        let mut last_tokens: Vec<i32> = forward.buffers.last_tokens.read(gpu, 0, self.limits.max_seqs)?;
        let tokens: Vec<SampledToken> = logits
            .par_chunks_mut(self.vocab_size)
            .zip(&step.samples)
            .map(|(logits, row)| sampler::sample_row(logits, &with_token_in_flight(step, row, &last_tokens)))
            .collect();
        for (row, token) in step.samples.iter().zip(&tokens) {
            last_tokens[step.seqs[row.seq].slot as usize] = token.token_id as i32;
        }
        forward.buffers.last_tokens.write(gpu, 0, &last_tokens)?;
        Ok(tokens)
    }
}

/// `row` with the token that was still unknown to the host when the step was planned.
fn with_token_in_flight(step: &StepInput, row: &SampleRow, last_tokens: &[i32]) -> SampleRow {
    let mut row = row.clone();
    let seq = &step.seqs[row.seq];
    let input = step.token_ids[(seq.query_start + seq.query_len - 1) as usize];
    if input < 0
        && let Some(history) = &mut row.history
    {
        history.output.push(last_tokens[seq.slot as usize] as u32);
    }
    row
}
