//! [`Sampling`]: from logits on the device to tokens on the host.
//!
//! All of sampling is done on the device; only ids and asked-for log-probabilities come back. Steps with a row that
//! [`LogitEdits`] leaves to the host copy the logits there and sample by the definition, [`crate::sampler`].

use cudarc::driver::sys;
use rayon::prelude::*;

use super::{
    buffers::StepLimits,
    compile,
    device::Gpu,
    forward::Forward,
    kernel::{Arg, Kernel, Launch},
    logit_edits::{LogitEdits, edits_logits},
    memory::{DeviceBuffer, PinnedBuffer},
    status::Check,
};
use crate::{
    Error,
    decoder::DecoderSpec,
    request::{SamplingParams, TokenLogprobs},
    sampler,
    step::{SampleRow, SampledToken, StepInput, StepOutput},
};

/// Best tokens that the kernels leave room for.
pub(super) const MAX_TOP: usize = 20;
/// Blocks of a cluster that works on a row's threshold.
const CLUSTER: usize = 4;
/// Prompt rows whose logits are computed at once.
const PROMPT_ROWS: usize = 256;

/// Kernels and buffers of sampling.
pub(super) struct Sampling {
    sample: Kernel,
    /// One block a row.
    threshold: Kernel,
    /// [`CLUSTER`] blocks a row, where there are clusters.
    cluster_threshold: Option<Kernel>,
    token_logprobs: Kernel,
    edits: LogitEdits,
    /// uint64 `[max_seqs]`: least key that is kept.
    thresholds: DeviceBuffer,
    /// uint64 `[max_seqs]`: best key so far; zero between launches.
    best: DeviceBuffer,
    /// uint32 `[max_seqs]`: blocks done; zero between launches.
    counters: DeviceBuffer,
    results: DeviceBuffer,
    /// Copies of the results, one for each step in flight.
    host_results: [PinnedBuffer; 2],
    /// int32 `[3, PROMPT_ROWS]`: rows of the residual stream, their targets, how many best tokens.
    prompt_rows: DeviceBuffer,
    prompt_results: DeviceBuffer,
    layout: ResultLayout,
    limits: StepLimits,
    vocab_size: usize,
    n_sms: usize,
    /// Prompt log-probabilities of the step being launched.
    prompt_logprobs: Vec<Vec<TokenLogprobs>>,
}

/// Arrays of 4-byte numbers for `n` rows: ids, log-probabilities, ranks, best ids and their log-probabilities.
#[derive(Debug, Clone, Copy)]
struct ResultLayout {
    n: usize,
}

impl ResultLayout {
    const N_WORDS: usize = 3 + 2 * MAX_TOP;

    fn n_bytes(self) -> usize {
        self.n * Self::N_WORDS * 4
    }

    /// Byte offsets of log-probabilities, ranks, best ids and their log-probabilities.
    fn offsets(self) -> [u64; 4] {
        [1, 2, 3, 3 + MAX_TOP].map(|column| (self.n * column * 4) as u64)
    }

    /// Row `row` of `words`, with `n_top` best tokens.
    fn read(self, words: &[i32], row: usize, n_top: usize) -> TokenLogprobs {
        let n = self.n;
        let float = |at: usize| f32::from_bits(words[at] as u32);
        let top = 3 * n + row * MAX_TOP;
        TokenLogprobs {
            token_id: words[row] as u32,
            logprob: float(n + row),
            rank: words[2 * n + row] as u32,
            top: (top..top + n_top).map(|at| (words[at] as u32, float(at + n * MAX_TOP))).collect(),
        }
    }
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
    /// In [`Sampling::host_results`] when the step is done: for each, the best tokens it wants log-probabilities of.
    InFlight(Vec<Option<u32>>),
}

impl Sampling {
    /// For steps within `limits`.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec, limits: StepLimits) -> Result<Self, Error> {
        let mut plan = compile::Plan::default();
        let sample = plan.add(&compile::SAMPLE, &[]);
        let mut plan_threshold = |cluster| plan.add(&compile::THRESHOLD, &[("CLUSTER", cluster)]);
        let threshold = plan_threshold(1);
        let cluster_threshold = (gpu.capability.0 >= 9).then(|| plan_threshold(CLUSTER));
        let compiled = plan.compile(gpu)?;
        let [sample, token_logprobs] = compiled.load(sample, ["sample_rows", "token_logprobs"])?;
        let load_threshold = |planned| compiled.load(planned, ["threshold_rows"]).map(|[kernel]| kernel);
        let layout = ResultLayout { n: limits.max_seqs };
        let prompt_layout = ResultLayout { n: PROMPT_ROWS };
        let zeroed = |n_bytes: usize| DeviceBuffer::zeroed(gpu, n_bytes, "the sampling buffers");
        let host_results = || PinnedBuffer::new(layout.n_bytes());
        Ok(Self {
            sample,
            threshold: load_threshold(threshold)?,
            cluster_threshold: cluster_threshold.map(load_threshold).transpose()?,
            token_logprobs,
            edits: LogitEdits::new(gpu, spec, limits)?,
            thresholds: zeroed(limits.max_seqs * 8)?,
            best: zeroed(limits.max_seqs * 8)?,
            counters: zeroed(limits.max_seqs * 4)?,
            results: zeroed(layout.n_bytes())?,
            host_results: [host_results()?, host_results()?],
            prompt_rows: zeroed(3 * PROMPT_ROWS * 4)?,
            prompt_results: zeroed(prompt_layout.n_bytes())?,
            layout,
            limits,
            vocab_size: spec.vocab_size,
            n_sms: gpu.n_sms as usize,
            prompt_logprobs: Vec::new(),
        })
    }

    /// Computes the prompt log-probabilities that `step` asks for, and waits for them.
    pub(super) fn prompt_logprobs(&mut self, gpu: &Gpu, forward: &mut Forward, step: &StepInput) -> Result<(), Error> {
        let n_rows = PROMPT_ROWS.min(self.limits.logits_rows());
        let layout = ResultLayout { n: PROMPT_ROWS };
        for seq in &step.seqs {
            let Some(wanted) = &seq.prompt_logprobs else { continue };
            let mut entries = Vec::with_capacity(wanted.targets.len());
            for (i, targets) in wanted.targets.chunks(n_rows).enumerate() {
                let mut rows = vec![0i32; 3 * PROMPT_ROWS];
                for (j, &target) in targets.iter().enumerate() {
                    rows[j] = (seq.query_start as usize + i * n_rows + j) as i32;
                    rows[PROMPT_ROWS + j] = target as i32;
                    rows[2 * PROMPT_ROWS + j] = wanted.n_top as i32;
                }
                self.prompt_rows.write(gpu, 0, &rows)?;
                let rows = self.prompt_rows.ptr();
                let column = (PROMPT_ROWS * 4) as u64;
                forward.logits(gpu, rows, targets.len())?;
                let (tokens, n_top) = (rows + column, rows + 2 * column);
                let request = LogprobsRequest { tokens, n_top, results: self.prompt_results.ptr(), layout };
                self.launch_logprobs(gpu, forward, request, targets.len())?;
                let mut words: Vec<i32> = self.prompt_results.read(gpu, 0, layout.n * ResultLayout::N_WORDS)?;
                let n_top = (wanted.n_top as usize).min(self.vocab_size);
                for (j, &target) in targets.iter().enumerate() {
                    words[j] = target as i32;
                    entries.push(layout.read(&words, j, n_top));
                }
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
        let in_flight = || SampledTokens::InFlight(step.samples.iter().map(|row| row.params.logprobs).collect());
        let tokens = if step.samples.iter().any(edits_logits) {
            let (logits, last_tokens) = (forward.buffers.logits.ptr(), forward.buffers.last_tokens.ptr());
            match self.edits.apply(gpu, (logits, last_tokens), step, index)? {
                Some(edited) => {
                    self.sample_on_device(gpu, forward, step, index)?;
                    self.edits.count(gpu, last_tokens, step, &edited)?;
                    in_flight()
                }
                None => SampledTokens::OnHost(self.sample_on_host(gpu, forward, step)?),
            }
        } else {
            if !step.samples.is_empty() {
                self.sample_on_device(gpu, forward, step, index)?;
            }
            in_flight()
        };
        Ok(SamplingOutput { tokens, prompt_logprobs: std::mem::take(&mut self.prompt_logprobs) })
    }

    /// The output of a step that is done.
    pub(super) fn finish(&mut self, output: SamplingOutput, index: usize) -> StepOutput {
        let tokens = match output.tokens {
            SampledTokens::OnHost(tokens) => tokens,
            SampledTokens::InFlight(wanted) => {
                let words = self.host_results[index].as_mut_slice::<i32>();
                let logprobs = |row: usize, n: u32| self.layout.read(words, row, (n as usize).min(self.vocab_size));
                let token = |(row, wanted): (usize, Option<u32>)| SampledToken {
                    token_id: words[row] as u32,
                    logprobs: wanted.map(|n| logprobs(row, n)),
                };
                wanted.into_iter().enumerate().map(token).collect()
            }
        };
        StepOutput { tokens, prompt_logprobs: output.prompt_logprobs }
    }

    fn sample_on_device(&self, gpu: &Gpu, forward: &Forward, step: &StepInput, index: usize) -> Result<(), Error> {
        let n = step.samples.len();
        let stream = gpu.cu_stream();
        let vocab = Arg::Int(self.vocab_size as i32);
        let logits = Arg::Ptr(forward.buffers.logits.ptr());
        let params = Arg::Ptr(forward.input(forward.layout.sample_params));
        let launch =
            |x: usize, block| Launch { grid: [x as u32, n as u32, 1], block, shared_bytes: 0, dependent: false };
        if step.samples.iter().any(|row| wants_threshold(&row.params)) {
            let args = [logits, vocab, vocab, params, Arg::Ptr(self.thresholds.ptr())];
            let (kernel, n_blocks) = match &self.cluster_threshold {
                Some(kernel) if n <= most_cluster_rows(self.n_sms) => (kernel, CLUSTER),
                _ => (&self.threshold, 1),
            };
            kernel.launch(stream, launch(n_blocks, 1024), &args)?;
        }
        let to = self.host_results[index].ptr();
        let wants_logprobs = step.samples.iter().any(|row| row.params.logprobs.is_some());
        // Page-locked memory has one address on both sides: tokens alone go there without a copy.
        let tokens = if wants_logprobs { self.results.ptr() } else { to as u64 };
        let args = [
            logits,
            vocab,
            vocab,
            params,
            Arg::Ptr(self.thresholds.ptr()),
            Arg::Ptr(self.best.ptr()),
            Arg::Ptr(self.counters.ptr()),
            Arg::Ptr(tokens),
            Arg::Ptr(forward.buffers.last_tokens.ptr()),
        ];
        let n_blocks = (6 * self.n_sms).div_ceil(n).min(self.vocab_size.div_ceil(4096)).max(1);
        self.sample.launch(stream, launch(n_blocks, 256), &args)?;
        if !wants_logprobs {
            return Ok(());
        }
        let request = LogprobsRequest {
            tokens: self.results.ptr(),
            n_top: forward.input(forward.layout.n_top),
            results: self.results.ptr(),
            layout: self.layout,
        };
        self.launch_logprobs(gpu, forward, request, n)?;
        // SAFETY: both sides have this layout; the pinned one is read only after the step's event.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), self.results.ptr(), self.layout.n_bytes(), stream) }
            .check("cuMemcpyDtoHAsync")
    }

    /// Log-probabilities of the first `n` rows of logits.
    fn launch_logprobs(&self, gpu: &Gpu, forward: &Forward, request: LogprobsRequest, n: usize) -> Result<(), Error> {
        let vocab = Arg::Int(self.vocab_size as i32);
        let [logprobs, ranks, top_ids, top_logprobs] =
            request.layout.offsets().map(|at| Arg::Ptr(request.results + at));
        let args = [
            Arg::Ptr(forward.buffers.logits.ptr()),
            vocab,
            vocab,
            Arg::Ptr(0),
            Arg::Ptr(0),
            Arg::Ptr(request.tokens),
            Arg::Ptr(request.n_top),
            logprobs,
            ranks,
            top_ids,
            top_logprobs,
        ];
        let launch = Launch { grid: [n as u32, 1, 1], block: 1024, shared_bytes: 0, dependent: false };
        self.token_logprobs.launch(gpu.cu_stream(), launch, &args)
    }

    /// Waits for the logits and samples them by the definition in [`sampler`].
    fn sample_on_host(&self, gpu: &Gpu, forward: &Forward, step: &StepInput) -> Result<Vec<SampledToken>, Error> {
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

/// Addresses for `token_logprobs`.
#[derive(Debug, Clone, Copy)]
struct LogprobsRequest {
    /// int32 `[n]`: ids whose log-probabilities are wanted.
    tokens: u64,
    /// int32 `[n]`: how many best tokens beside them.
    n_top: u64,
    /// Where the results go, in `layout`.
    results: u64,
    layout: ResultLayout,
}

/// Most rows whose clusters surely run at one time on `n_sms` multiprocessors, of which some stay over in each group of
/// them. Clusters in turns take longer than one block for each row (docs/log.md).
pub(super) fn most_cluster_rows(n_sms: usize) -> usize {
    n_sms / (CLUSTER + 1)
}

/// Whether a row drops unlikely tokens.
fn wants_threshold(params: &SamplingParams) -> bool {
    !params.is_greedy() && (params.top_p < 1.0 || params.min_p > 0.0 || params.top_k > 0)
}

/// `row` with the token that was still unknown to the host when the step was planned.
fn with_token_in_flight(step: &StepInput, row: &SampleRow, last_tokens: &[i32]) -> SampleRow {
    let mut row = row.clone();
    let seq = &step.seqs[row.seq];
    let input = step.token_ids[step.sample_row(&row)];
    if input < 0
        && let Some(history) = &mut row.history
    {
        history.output.push(last_tokens[seq.slot as usize] as u32);
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_read_where_the_kernels_write() {
        let layout = ResultLayout { n: 3 };
        let mut words: Vec<i32> = vec![0; layout.n_bytes() / 4];
        let [logprobs, ranks, top_ids, top_logprobs] = layout.offsets().map(|at| at as usize / 4);
        words[1] = 42;
        words[logprobs + 1] = (-0.5f32).to_bits() as i32;
        words[ranks + 1] = 2;
        words[top_ids + MAX_TOP] = 7;
        words[top_logprobs + MAX_TOP] = (-0.25f32).to_bits() as i32;
        let expected = TokenLogprobs { token_id: 42, logprob: -0.5, rank: 2, top: vec![(7, -0.25)] };
        assert_eq!(layout.read(&words, 1, 1), expected);
    }
}
