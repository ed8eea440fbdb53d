//! [`Sampling`]: from logits on the device to tokens on the host.

use cudarc::driver::sys;
use rayon::prelude::*;

use super::{
    buffers::StepLimits,
    compile::{self, Variant},
    device::Gpu,
    forward::Forward,
    kernel::{Arg, Kernel, Launch},
    memory::{DeviceBuffer, PinnedBuffer},
    status::Check,
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
    argmax: Kernel,
    /// Sampled tokens, int32 `[max_seqs]`.
    tokens: DeviceBuffer,
    /// Their copies, one for each step in flight.
    host_tokens: [PinnedBuffer; 2],
    limits: StepLimits,
    vocab_size: usize,
    /// Prompt log-probabilities of the step being launched.
    prompt_logprobs: Vec<Vec<TokenLogprobs>>,
}

/// What [`Sampling::finish`] needs of a launched step.
pub(super) struct SamplingOutput {
    tokens: SampledTokens,
    prompt_logprobs: Vec<Vec<TokenLogprobs>>,
}

/// Where a step's tokens are.
enum SampledTokens {
    /// Here already.
    OnHost(Vec<SampledToken>),
    /// In [`Sampling::host_tokens`] when the step is done: this many.
    InFlight(usize),
}

impl Sampling {
    /// For steps within `limits`.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, limits: StepLimits) -> Result<Self, Error> {
        let cubins = compile::compile(&[Variant::new(&compile::ARGMAX, &[])], &gpu.arch())?;
        let [argmax] = Kernel::load(&cubins[0], ["argmax"])?;
        let host_tokens = || PinnedBuffer::new(limits.max_seqs * 4);
        Ok(Self {
            argmax,
            tokens: DeviceBuffer::zeroed(gpu, limits.max_seqs * 4, "the sampled tokens")?,
            host_tokens: [host_tokens()?, host_tokens()?],
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

    /// Samples the rows of `step`, whose logits are on the device. `index`: which of the steps in flight.
    pub(super) fn sample(
        &mut self,
        gpu: &Gpu,
        forward: &Forward,
        step: &StepInput,
        index: usize,
    ) -> Result<SamplingOutput, Error> {
        let n = step.samples.len();
        let tokens = if step.samples.iter().all(is_plain_greedy) {
            if n > 0 {
                self.sample_on_device(gpu, forward, n, index)?;
            }
            SampledTokens::InFlight(n)
        } else {
            SampledTokens::OnHost(self.sample_on_host(gpu, forward, step)?)
        };
        Ok(SamplingOutput { tokens, prompt_logprobs: std::mem::take(&mut self.prompt_logprobs) })
    }

    /// The output of a step that is done.
    pub(super) fn finish(&mut self, output: SamplingOutput, index: usize) -> StepOutput {
        let tokens = match output.tokens {
            SampledTokens::OnHost(tokens) => tokens,
            SampledTokens::InFlight(n) => self.host_tokens[index].as_mut_slice::<i32>()[..n]
                .iter()
                .map(|&token| SampledToken { token_id: token as u32, logprobs: None })
                .collect(),
        };
        StepOutput { tokens, prompt_logprobs: output.prompt_logprobs }
    }

    fn sample_on_device(&self, gpu: &Gpu, forward: &Forward, n: usize, index: usize) -> Result<(), Error> {
        let launch = Launch { grid: [n as u32, 1, 1], block: 1024, shared_bytes: 0, dependent: false };
        let args = [
            Arg::Ptr(forward.buffers.logits.ptr()),
            Arg::Ptr(forward.input(forward.layout.sample_slots)),
            Arg::Ptr(self.tokens.ptr()),
            Arg::Ptr(forward.buffers.last_tokens.ptr()),
            Arg::Int(self.vocab_size as i32),
        ];
        self.argmax.launch(gpu.cu_stream(), launch, &args)?;
        let to = self.host_tokens[index].ptr();
        // SAFETY: both sides hold `max_seqs` tokens; the pinned one is read only after the step's event.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), self.tokens.ptr(), n * 4, gpu.cu_stream()) }
            .check("cuMemcpyDtoHAsync")
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

/// Whether the best raw logit is the answer.
fn is_plain_greedy(row: &SampleRow) -> bool {
    let params = &row.params;
    params.is_greedy()
        && params.logprobs.is_none()
        && params.logit_bias.is_empty()
        && params.allowed_token_ids.is_none()
        && row.history.is_none()
        && row.banned.is_none()
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
