//! Owns the crate's error type: everything that ends a run, each with its cause and the remedy.

use std::path::PathBuf;

/// What can end a run. A failed request is not an error: it is a recorded result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag has a value that cannot work.
    #[error("{flag}: {message}")]
    Flag { flag: &'static str, message: String },
    /// A dataset file is not of the format its `--dataset` says.
    #[error("{path}:{line}: {message}; --dataset {dataset} expects {expected}")]
    DatasetFormat { path: PathBuf, line: usize, message: String, dataset: &'static str, expected: &'static str },
    /// No prompt is left to send.
    #[error(
        "no prompt of {source_name} is left between --min-prompt-length {min} and --max-prompt-length {max} {unit}"
    )]
    NoPrompts { source_name: String, min: usize, max: usize, unit: &'static str },
    /// The length limits admit too few prompts of a generator.
    #[error(
        "{} of {n_drawn} synthetic rows of {dataset} pass --min-prompt-length and --max-prompt-length, and {n_wanted} \
         are needed: widen the limits{}",
        if *.n_found == 0 { "none".to_owned() } else { format!("only {n_found}") },
        if *.n_found == 0 { "" } else { ", or lower --number and --warmup" }
    )]
    FewPrompts { n_found: usize, n_drawn: usize, n_wanted: usize, dataset: &'static str },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    /// `--tokenizer-path` cannot be loaded.
    #[error("--tokenizer-path {path}: {message}")]
    Tokenizer { path: PathBuf, message: String },
    /// Nothing answers at the server's address.
    #[error("cannot connect to {authority}: {message}. Is the server running, and is --url right?")]
    Connect { authority: String, message: String },
    /// The results database cannot be used.
    #[error("results database {path}: {source}")]
    Database { path: PathBuf, source: sqlx::Error },
    /// The results database has no such run.
    #[error("results database {path}: {message}")]
    NoRun { path: PathBuf, message: String },
}

impl Error {
    pub(crate) fn flag(flag: &'static str, message: impl Into<String>) -> Self {
        Error::Flag { flag, message: message.into() }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, source }
    }
}
