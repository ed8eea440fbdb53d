//! What runs a step on a device: one trait, one folder per executor.

pub mod burn;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod comparison;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
mod host_capacity;
mod step_times;

pub use step_times::{StepLoad, StepTime, step_times};

use crate::{
    DeviceChoice, EngineConfig, Error,
    decoder::DecoderSpec,
    step::{StepInput, StepOutput},
    weights::WeightSource,
};

/// What an executor can hold, fixed at load.
#[derive(Debug, Clone)]
pub struct Capacity {
    /// KV pages of [`crate::step::PAGE_SIZE`] tokens.
    pub n_pages: usize,
    /// Most sequences in a step; slots are below this.
    pub max_num_seqs: usize,
    /// Most query rows in a step.
    pub max_num_batched_tokens: usize,
    /// Longest context, in tokens.
    pub max_model_len: usize,
    /// Steps that may be launched before the first is collected.
    pub max_in_flight: usize,
    /// How long prompt chunks are beside decoding sequences.
    pub mixed_steps: MixedSteps,
    /// Best tokens whose log-probabilities a row can have.
    pub max_logprobs: usize,
}

/// How a prompt chunk is cut in a step in which sequences decode, all of which it holds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MixedSteps {
    /// So that the step has so many query rows at most, by the number of prompts that wait: pairs of a number of prompts
    /// and the rows from there on, rising, from one prompt on. On a device that reads the weights anyway, some hundred
    /// rows cost little in every step; but they let a queue of prompts grow, and what waits there does not decode.
    Rows(&'static [(usize, usize)]),
    /// By measured times, so that the step takes at most a few times as long as one that only decodes.
    Timed,
}

/// Runs forward steps and samples.
///
/// Steps are launched and collected in the same order. An executor with `max_in_flight` of 2 lets
/// the host plan step N+1, whose input tokens are still being sampled, while the device runs step N.
pub trait Executor: Send {
    /// What it can hold.
    fn capacity(&self) -> &Capacity;

    /// One line for the operator: device, element type, memory plan.
    fn describe(&self) -> String;

    /// Starts `step`.
    ///
    /// # Errors
    /// [`Error::Device`]; the executor must not be used again after it.
    fn launch(&mut self, step: StepInput) -> Result<(), Error>;

    /// Waits for the oldest launched step.
    ///
    /// # Errors
    /// [`Error::Device`]; the executor must not be used again after it.
    fn collect(&mut self) -> Result<StepOutput, Error>;

    /// The hidden states after the final norm of a step that samples nothing, `[n_tokens, hidden_size]`, while no other
    /// step is in flight.
    ///
    /// # Errors
    /// [`Error::Device`], as of [`Executor::launch`].
    fn hidden_states(&mut self, step: &StepInput) -> Result<Vec<f32>, Error>;

    /// Fills the KV cache with copies of the keys and values of `step`, whose pages are the first ones, while no step is
    /// in flight: for measurements on devices whose clock depends on the numbers that they work on. Others do nothing.
    ///
    /// # Errors
    /// [`Error::Device`], as of [`Executor::launch`].
    fn fill_cache(&mut self, step: StepInput) -> Result<(), Error> {
        let _ = step;
        Ok(())
    }
}

/// Makes the executor for `config.device` and loads `weights` into it.
///
/// # Errors
/// [`Error::Config`] if the device is not in this build or an option cannot be honoured,
/// [`Error::Model`] for bad weights, [`Error::Device`] if the device fails or lacks memory.
pub fn create(
    spec: &DecoderSpec,
    weights: &dyn WeightSource,
    config: &EngineConfig,
) -> Result<Box<dyn Executor>, Error> {
    match config.device {
        DeviceChoice::Cpu => on_cpu(spec, weights, config),
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(index) => on_cuda(spec, weights, config, index),
        #[cfg(feature = "cuda")]
        DeviceChoice::Auto if cuda::is_available() => on_cuda(spec, weights, config, 0),
        DeviceChoice::Auto => on_cpu(spec, weights, config),
        #[cfg(not(feature = "cuda"))]
        DeviceChoice::Cuda(_) => Err(Error::config(
            "--device",
            "this build has no CUDA; build with `--features cuda`, or use `--device cpu`",
        )),
    }
}

#[cfg(feature = "cuda")]
fn on_cuda(
    spec: &DecoderSpec,
    weights: &dyn WeightSource,
    config: &EngineConfig,
    index: usize,
) -> Result<Box<dyn Executor>, Error> {
    if config.kv_cache_dtype != crate::KvCacheDType::Auto {
        let message = "on a GPU the KV cache keeps bfloat16 in 12 bits; use `--kv-cache-dtype auto` or `--device cpu`";
        return Err(Error::config("--kv-cache-dtype", message));
    }
    if config.quantization.is_some() {
        return Err(Error::config(
            "--quantization",
            "rounding at load is for the CPU; leave it out or use `--device cpu`",
        ));
    }
    Ok(Box::new(cuda::CudaExecutor::new(spec, weights, config, index)?))
}

fn on_cpu(spec: &DecoderSpec, weights: &dyn WeightSource, config: &EngineConfig) -> Result<Box<dyn Executor>, Error> {
    Ok(Box::new(cpu::CpuExecutor::new(spec, weights, config)?))
}
