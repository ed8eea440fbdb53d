//! Measures how well a server of large language models serves: the library behind `ember-bench`.
//!
//! One run goes through five stages, each a module that knows nothing of the later ones:
//! a [`dataset`] gives prompts, an [`api`] turns a prompt into a request body and reads the answer,
//! [`load`] decides when each request leaves and [`client`] carries it over a socket into a
//! [`record::RequestRecord`]; [`store`] keeps every record in SQLite. [`metrics`] then computes the figures
//! from the stored rows and [`report`] prints them, the same way after a run and years later.
//!
//! The crate talks to servers through sockets only, so that all of them are measured by the same code.

pub mod api;
pub mod cli;
pub mod client;
pub mod config;
pub mod dataset;
pub mod endpoint;
pub mod environment;
mod error;
pub mod lengths;
pub mod load;
pub mod metrics;
pub mod perf;
pub mod progress;
pub mod record;
pub mod report;
pub mod schedule;
pub mod sse;
pub mod store;
pub mod synthetic;

pub use error::Error;

/// Result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;
