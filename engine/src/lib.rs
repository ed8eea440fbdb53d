//! Ember's inference engine as a library: models, executors, scheduler, sampling, tokenizer and
//! chat template. It knows nothing of HTTP.
//!
//! The principal types, in the order a request meets them:
//!
//! - [`Engine`] owns one thread per model replica. [`Engine::load`] reads a model from disk,
//!   [`Engine::generate`] runs a batch to its end, [`Engine::submit`] answers with a stream.
//! - [`GenerateRequest`] and [`SamplingParams`] say what is wanted; [`Event`]s say what came.
//!   Dropping the [`Generation`] cancels its sequences and frees their KV pages.
//! - [`scheduler`], [`sequence`] and [`kv_pool`] decide which tokens run in the next step. They
//!   are pure values: no tensors, no clock, no IO.
//! - [`step`] is the waist: a `StepInput` of flat arrays goes to an [`executors::Executor`], a
//!   `StepOutput` of sampled tokens comes back.
//! - [`decoder::DecoderSpec`] is the one description of a model; [`models`] fills it from
//!   `config.json` or GGUF metadata, executors interpret it.
//! - [`grammar`] says which tokens may come next where the output's form is prescribed.
//! - [`text`] turns text to tokens and back on the caller's side of the channel.

#![warn(missing_docs)]

// Code that unit and integration tests share names the crate as a user does.
#[cfg(test)]
extern crate self as ember_engine;

pub mod config;
pub mod decoder;
pub mod embedding;
mod engine;
mod error;
pub mod executors;
mod generation;
pub mod grammar;
pub mod kv_pool;
pub mod models;
mod pace;
mod prompt_share;
pub mod quant;
mod repetition;
pub mod request;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
mod serving;
pub mod step;
pub mod text;
mod thinking;
pub mod weights;

pub use config::{DTypeChoice, DeviceChoice, EngineConfig, KvCacheDType, LoadFormat, Quantization, SchedulingPolicy};
pub use engine::{Engine, EngineInfo, EngineStats};
pub use error::Error;
pub use generation::Generation;
pub use grammar::{OutputForm, StructuredOutputs};
pub use repetition::RepetitionDetection;
pub use request::{
    Delta, Event, Finish, GenerateRequest, Output, Prompt, PromptEvent, SamplingParams, StopReason, TokenLogprobs,
};
pub use thinking::ThinkingBudget;
