//! Vocabulary shared by the engine, the server and the load generator. No tokio, no burn.
//!
//! - [`FinishReason`] is the engine's word for the end of a sequence and the wire's.
//! - [`anthropic`] holds those of Anthropic's messages.
//! - [`openai`] holds the wire types of OpenAI's HTTP API with vLLM's extensions.

#![warn(missing_docs)]

pub mod anthropic;
mod finish_reason;
pub mod openai;

pub use finish_reason::FinishReason;
