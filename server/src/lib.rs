//! Ember's HTTP server and command line, as a library so that its tests need no socket.
//!
//! - [`cli::Cli`] is the command line as typed; [`config`] is what it comes to, checked once.
//! - [`App`] answers requests: [`App::service`] is the whole server as a tower service. It finds
//!   the endpoint in the table of [`routes`], which turns the wire's types (`ember_common::openai`)
//!   into the engine's and back.
//! - [`Backend`] is what an endpoint sees of the engine.
//! - [`generation::Choices`] is a request in flight: it owns the engine's streams and the admission
//!   permit, so dropping it (a client that hangs up drops the response body) cancels the request.
//! - [`output`] finds reasoning and tool calls in a chat model's text.
//! - [`stream`] writes server-sent events.
//! - [`listener`] accepts connections and drains them at the end.

#![warn(missing_docs)]

mod admission;
mod answer;
mod api_error;
mod app;
mod auth;
mod backend;
mod beam_search;
mod blocks;
mod chat_request;
pub mod cli;
pub mod commands;
pub mod config;
mod config_file;
pub mod cors;
mod embedding_backend;
mod embedding_encoding;
mod error;
pub mod generation;
mod json;
pub mod listener;
mod logprobs;
pub mod metrics;
pub mod output;
mod priority;
mod prompt;
mod request_id;
pub mod routes;
mod sampling;
pub mod sampling_defaults;
pub mod stream;
mod structural_tag;
mod structured;
mod thinking;
pub mod tls;
mod tools;
mod tracker;
mod write_timeout;

pub use admission::{Admission, Permit};
pub use api_error::ApiError;
pub use app::{App, Body, Service};
pub use backend::{Backend, EventStream, Task};
pub use error::Error;
