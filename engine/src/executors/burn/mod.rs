//! The portable executor: [`DecoderSpec`] in Burn tensors on any Burn device. It is
//! the oracle for the tuned executors.

mod attention;
mod experts;
mod model;

use ::burn::tensor::{Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use self::{attention::AttentionPlan, model::BurnModel};
use super::{Capacity, Executor, host_capacity};
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
        let capacity = host_capacity::plan(spec, config, spec.kv_bytes_per_token(ELEMENT_SIZE) * PAGE_SIZE)?;
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
        let hidden = self.model.forward(step, &plan)?;

        let rows: Vec<usize> = step.samples.iter().map(|sample| step.sample_row(sample)).collect();
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
        to_host(self.model.logits(hidden.select(0, rows)))
    }
}

/// The elements of `tensor`.
fn to_host(tensor: Tensor<2>) -> Result<Vec<f32>, Error> {
    let data = tensor.try_into_data().map_err(|e| Error::Device(e.to_string()))?;
    data.try_into_vec().map_err(|e| Error::Device(format!("a result is not float32: {e:?}")))
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

    fn hidden_states(&mut self, step: &StepInput) -> Result<Vec<f32>, Error> {
        let plan = AttentionPlan::new(self.model.spec(), step, &self.device);
        let hidden = self.model.forward(step, &plan)?;
        to_host(self.model.norm(hidden))
    }
}

fn is_cpu(device: &Device) -> bool {
    *device == Device::flex()
}

fn int_tensor(values: Vec<i64>, device: &Device) -> Tensor<1, Int> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), device)
}
