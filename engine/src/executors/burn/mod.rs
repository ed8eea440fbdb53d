//! The portable executor: [`DecoderSpec`] in Burn tensors on any Burn device. On the CPU it is the
//! default; everywhere it is the oracle for tuned executors.

mod attention;
mod model;

use ::burn::tensor::{Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use self::{attention::AttentionPlan, model::BurnModel};
use super::{Capacity, Executor};
use crate::{
    DTypeChoice, EngineConfig, Error,
    decoder::DecoderSpec,
    request::TokenLogprobs,
    sampler,
    step::{PAGE_SIZE, StepInput, StepOutput},
    weights::WeightSource,
};

/// Float32 throughout.
const ELEMENT_SIZE: usize = 4;
/// Most sequences in a step unless the operator says otherwise.
const DEFAULT_MAX_NUM_SEQS: usize = 128;
/// Tokens per step: long enough for efficient matrix products, short enough to keep decoding smooth.
const DEFAULT_MAX_NUM_BATCHED_TOKENS: usize = 512;
/// KV cache bytes unless the operator says otherwise: this at most, and a quarter of free memory.
const DEFAULT_KV_CACHE_BYTES: usize = 4 << 30;

/// Runs steps one at a time: `launch` computes, `collect` hands out.
pub struct BurnExecutor {
    model: BurnModel,
    device: Device,
    capacity: Capacity,
    description: String,
    output: Option<StepOutput>,
}

impl BurnExecutor {
    /// Loads `weights` to `device` as float32.
    ///
    /// # Errors
    /// [`Error::Config`] for a type other than float32, or limits that leave no room for one
    /// sequence; [`Error::Model`] for bad weights.
    pub fn new(
        spec: &DecoderSpec,
        weights: &dyn WeightSource,
        config: &EngineConfig,
        device: Device,
    ) -> Result<Self, Error> {
        if !matches!(config.dtype, DTypeChoice::Auto | DTypeChoice::Float32) {
            return Err(Error::config("--dtype", "the CPU computes in float32; use `--dtype float32` or `auto`"));
        }
        let capacity = plan_capacity(spec, config)?;
        let n_kv_tokens = capacity.n_pages * PAGE_SIZE;
        let model = BurnModel::load(spec, weights, &capacity, &device)?;
        let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
        let description = format!(
            "device {}, float32, weights {:.2} GiB, KV cache {:.2} GiB ({n_kv_tokens} tokens)",
            if is_cpu(&device) { "cpu".to_owned() } else { format!("{device:?}") },
            gib(spec.n_parameters() * ELEMENT_SIZE),
            gib(n_kv_tokens * spec.kv_bytes_per_token(ELEMENT_SIZE)),
        );
        Ok(Self { model, device, capacity, description, output: None })
    }

    fn forward(&mut self, step: &StepInput) -> Result<StepOutput, Error> {
        let plan = AttentionPlan::new(self.model.spec(), step, &self.device);
        let hidden = self.model.forward(step, &plan);

        let rows: Vec<usize> = step
            .samples
            .iter()
            .map(|sample| {
                let seq = &step.seqs[sample.seq];
                (seq.query_start + seq.query_len - 1) as usize
            })
            .collect();
        let tokens = if rows.is_empty() {
            Vec::new()
        } else {
            let mut logits = self.logits(hidden.clone(), rows)?;
            logits
                .par_chunks_mut(self.model.spec().vocab_size)
                .zip(&step.samples)
                .map(|(logits, row)| sampler::sample_row(logits, row))
                .collect()
        };
        let mut prompt_logprobs = Vec::new();
        for seq in &step.seqs {
            let Some(wanted) = &seq.prompt_logprobs else {
                continue;
            };
            let mut of_seq: Vec<TokenLogprobs> = Vec::with_capacity(wanted.targets.len());
            // In pieces: logits of a whole chunk may be larger than the model.
            for (i, targets) in wanted.targets.chunks(64).enumerate() {
                let first = seq.query_start as usize + i * 64;
                let logits = self.logits(hidden.clone(), (first..first + targets.len()).collect())?;
                of_seq.par_extend(
                    logits
                        .par_chunks(self.model.spec().vocab_size)
                        .zip(targets)
                        .map(|(logits, &target)| sampler::token_logprobs(logits, target, wanted.n_top)),
                );
            }
            prompt_logprobs.push(of_seq);
        }
        Ok(StepOutput { tokens, prompt_logprobs })
    }

    /// Logits of some rows of `hidden`, `[n_tokens, hidden_size]`: `[rows.len() * vocab_size]`.
    fn logits(&self, hidden: Tensor<2>, rows: Vec<usize>) -> Result<Vec<f32>, Error> {
        let rows = int_tensor(rows.into_iter().map(|r| r as i64).collect(), &self.device);
        let logits = self.model.logits(hidden.select(0, rows));
        logits
            .try_into_data()
            .map_err(|e| Error::Device(e.to_string()))?
            .try_into_vec::<f32>()
            .map_err(|e| Error::Device(format!("logits are not float32: {e:?}")))
    }
}

impl Executor for BurnExecutor {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn describe(&self) -> String {
        self.description.clone()
    }

    fn launch(&mut self, step: StepInput) -> Result<(), Error> {
        debug_assert!(self.output.is_none(), "one step at a time");
        self.output = Some(self.forward(&step)?);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        self.output.take().ok_or_else(|| Error::Device("no step was launched".into()))
    }
}

fn is_cpu(device: &Device) -> bool {
    *device == Device::flex()
}

fn int_tensor(values: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}

fn plan_capacity(spec: &DecoderSpec, config: &EngineConfig) -> Result<Capacity, Error> {
    let max_num_seqs = config.max_num_seqs.unwrap_or(DEFAULT_MAX_NUM_SEQS);
    let asked_len = config.max_model_len.unwrap_or(spec.max_position);
    for (option, value) in [
        ("--max-num-seqs", Some(max_num_seqs)),
        ("--max-model-len", Some(asked_len)),
        ("--max-num-batched-tokens", config.max_num_batched_tokens),
    ] {
        if value == Some(0) {
            return Err(Error::config(option, "must be at least 1"));
        }
    }
    if asked_len > spec.max_position {
        return Err(Error::config(
            "--max-model-len",
            format!("{asked_len} is more than the model's {} positions; lower it", spec.max_position),
        ));
    }
    let page_bytes = spec.kv_bytes_per_token(ELEMENT_SIZE) * PAGE_SIZE;
    let useful = max_num_seqs.saturating_mul(asked_len.div_ceil(PAGE_SIZE)).saturating_mul(page_bytes);
    let kv_bytes = config.kv_cache_memory_bytes.unwrap_or_else(|| {
        let quarter = free_memory().map_or(usize::MAX, |free| free / 4);
        DEFAULT_KV_CACHE_BYTES.min(quarter).max(page_bytes * 64).min(useful)
    });
    let n_pages = kv_bytes / page_bytes;
    let max_model_len = match config.max_model_len {
        Some(len) if len > n_pages * PAGE_SIZE => {
            return Err(Error::config(
                "--max-model-len",
                format!(
                    "{len} tokens need {} bytes of KV cache, but there are {kv_bytes}; lower it or raise \
                     --kv-cache-memory-bytes",
                    len.div_ceil(PAGE_SIZE) * page_bytes
                ),
            ));
        }
        Some(len) => len,
        None => asked_len.min(n_pages * PAGE_SIZE),
    };
    if max_model_len < 2 {
        return Err(Error::config(
            "--kv-cache-memory-bytes",
            format!("{kv_bytes} bytes hold no page of KV cache ({page_bytes} bytes); raise it"),
        ));
    }
    Ok(Capacity {
        n_pages,
        max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens.unwrap_or(DEFAULT_MAX_NUM_BATCHED_TOKENS),
        max_model_len,
        max_in_flight: 1,
    })
}

/// Bytes of memory that can be had without swapping, if the system tells.
fn free_memory() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let in_group = |file: &str| std::fs::read_to_string(file).ok()?.trim().parse::<usize>().ok();
    let limit = in_group("/sys/fs/cgroup/memory.max").unwrap_or(usize::MAX);
    Some((kib * 1024).min(limit))
}
