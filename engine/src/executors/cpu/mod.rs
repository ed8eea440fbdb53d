//! The CPU executor: weights as they are stored, vector instructions, one pool of threads.
//!
//! Its parts are public for the benchmarks in engine/benches/cpu.rs.

pub mod activations;
pub mod arena;
pub mod attention;
mod disjoint;
mod experts;
pub mod kernels;
pub mod kv_cache;
pub mod linear;
mod mlp;
mod model;
pub mod packed;
pub mod pool;
#[cfg(test)]
mod tests;

use self::{
    disjoint::Disjoint,
    kernels::Kernels,
    kv_cache::{KvLayout, KvType},
    model::{CpuModel, LOGIT_ROWS, Storage},
    pool::{Pool, usable_cores},
};
use super::{Capacity, Executor, host_capacity};
use crate::{
    DTypeChoice, EngineConfig, Error, KvCacheDType, Quantization,
    decoder::DecoderSpec,
    quant,
    request::{SamplingParams, TokenLogprobs},
    sampler,
    step::{PAGE_SIZE, SampleRow, SampledToken, StepInput, StepOutput},
    weights::WeightSource,
};

/// Runs steps one at a time: `launch` computes, `collect` hands out.
pub struct CpuExecutor {
    model: CpuModel,
    capacity: Capacity,
    description: String,
    output: Option<StepOutput>,
}

impl CpuExecutor {
    /// Loads `weights`.
    ///
    /// # Errors
    /// [`Error::Config`] for a type other than float32, or limits that leave no room for one sequence;
    /// [`Error::Model`] for bad weights; [`Error::Device`] if the system gives no threads.
    pub fn new(spec: &DecoderSpec, weights: &dyn WeightSource, config: &EngineConfig) -> Result<Self, Error> {
        Self::with_kernels(spec, weights, config, Kernels::best())
    }

    fn with_kernels(
        spec: &DecoderSpec,
        weights: &dyn WeightSource,
        config: &EngineConfig,
        kernels: &'static Kernels,
    ) -> Result<Self, Error> {
        if !matches!(config.dtype, DTypeChoice::Auto | DTypeChoice::Float32) {
            return Err(Error::config("--dtype", "the CPU computes in float32; use `--dtype float32` or `auto`"));
        }
        let kv_type = match config.kv_cache_dtype {
            KvCacheDType::Auto | KvCacheDType::Float16 => KvType::F16,
            KvCacheDType::Q8_0 => KvType::Q8_0,
        };
        let quantization = config.quantization.and_then(|quantization| match quantization {
            Quantization::Q8_0 => quant::by_name("Q8_0"),
            Quantization::Q4_0 => quant::by_name("Q4_0"),
        });
        let storage = Storage { kv_layout: KvLayout::new(spec, kv_type), quantization };
        let page_bytes = spec.n_layers * storage.kv_layout.page_bytes();
        let capacity = host_capacity::plan(spec, config, page_bytes)?;
        let pool = Pool::new(usable_cores()).map_err(|e| Error::Device(format!("cannot start threads: {e}")))?;
        let n_threads = pool.n_threads();
        let model = CpuModel::load(spec, weights, (&capacity, storage), (kernels, pool))?;
        let n_kv_tokens = capacity.n_pages * PAGE_SIZE;
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let description = format!(
            "device cpu ({}, {n_threads} threads), float32, weights {} {:.2} GiB beside the file, \
             KV cache {} {:.2} GiB ({n_kv_tokens} tokens)",
            kernels.name,
            weights.typical_type(spec)?,
            gib(model.weight_bytes()),
            kv_type.name(),
            gib(capacity.n_pages * page_bytes),
        );
        Ok(Self { model, capacity, description, output: None })
    }

    fn sample(&mut self, step: &StepInput) -> Vec<SampledToken> {
        let rows: Vec<usize> = step.samples.iter().map(|sample| step.sample_row(sample)).collect();
        let (vocab_size, kernels) = (self.model.vocab_size(), self.model.kernels());
        let mut tokens: Vec<Option<SampledToken>> = vec![None; rows.len()];
        for ((rows, samples), tokens) in
            rows.chunks(LOGIT_ROWS).zip(step.samples.chunks(LOGIT_ROWS)).zip(tokens.chunks_mut(LOGIT_ROWS))
        {
            let (logits, pool) = self.model.logits(rows);
            let (logits, tokens) = (Disjoint::new(logits), Disjoint::new(tokens));
            pool.run(rows.len(), &|i| {
                // SAFETY: each row belongs to one task.
                let (logits, token) =
                    unsafe { (logits.range(i * vocab_size..(i + 1) * vocab_size), tokens.range(i..i + 1)) };
                token[0] = Some(sample_row(kernels, logits, &samples[i]));
            });
        }
        tokens.into_iter().flatten().collect()
    }

    fn prompt_logprobs(&mut self, step: &StepInput) -> Vec<Vec<TokenLogprobs>> {
        let vocab_size = self.model.vocab_size();
        let mut of_seqs = Vec::new();
        for seq in &step.seqs {
            let Some(wanted) = &seq.prompt_logprobs else {
                continue;
            };
            let mut of_seq = vec![None; wanted.targets.len()];
            for (i, (targets, of_rows)) in
                wanted.targets.chunks(LOGIT_ROWS).zip(of_seq.chunks_mut(LOGIT_ROWS)).enumerate()
            {
                let first = seq.query_start as usize + i * LOGIT_ROWS;
                let rows: Vec<usize> = (first..first + targets.len()).collect();
                let (logits, pool) = self.model.logits(&rows);
                let (logits, of_rows) = (&*logits, Disjoint::new(of_rows));
                pool.run(rows.len(), &|i| {
                    // SAFETY: each row belongs to one task.
                    let of_row = unsafe { of_rows.range(i..i + 1) };
                    let logits = &logits[i * vocab_size..][..vocab_size];
                    of_row[0] = Some(sampler::token_logprobs(logits, targets[i], wanted.n_top));
                });
            }
            of_seqs.push(of_seq.into_iter().flatten().collect());
        }
        of_seqs
    }
}

/// As [`sampler::sample_row`], with a shortcut for the plainest requests.
fn sample_row(kernels: &Kernels, logits: &mut [f32], row: &SampleRow) -> SampledToken {
    if is_plainly_greedy(&row.params) && row.history.is_none() && row.banned.is_none() {
        return SampledToken { token_id: kernels.argmax(logits), logprobs: None };
    }
    sampler::sample_row(logits, row)
}

/// Whether the token is the best of the logits as they are, and nothing else is asked for.
fn is_plainly_greedy(params: &SamplingParams) -> bool {
    params.is_greedy()
        && params.logprobs.is_none()
        && params.logit_bias.is_empty()
        && params.allowed_token_ids.is_none()
}

impl Executor for CpuExecutor {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn launch(&mut self, step: StepInput) -> Result<(), Error> {
        debug_assert!(self.output.is_none(), "one step at a time");
        self.model.forward(&step);
        let tokens = self.sample(&step);
        let prompt_logprobs = self.prompt_logprobs(&step);
        self.output = Some(StepOutput { tokens, prompt_logprobs });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.output.take().ok_or_else(|| Error::Device("no step was launched".into()))
    }

    fn hidden_states(&mut self, step: &StepInput) -> Result<Vec<f32>, Error> {
        self.model.forward(step);
        Ok(self.model.normed(step.n_tokens()))
    }
}
