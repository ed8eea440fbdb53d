//! The engine's one error type.

use std::path::PathBuf;

/// Everything that can go wrong in the engine, by who can mend it.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A request field is out of range or contradicts another one. Maps to HTTP 400.
    #[error("{message}")]
    InvalidRequest {
        /// The offending field, by its OpenAI name (`temperature`, `max_tokens`, ...).
        param: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
    /// A model file or folder cannot be used as it is.
    #[error("{}: {message}", path.display())]
    Model {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// An engine option cannot be honoured.
    #[error("{option}: {message}")]
    Config {
        /// The option, as its command-line flag (`--max-model-len`).
        option: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
    /// The device failed or ran out of memory; requests in flight are lost.
    #[error("device error: {0}")]
    Device(String),
    /// The engine has stopped; it takes no more requests.
    #[error("the engine has stopped: {0}")]
    Stopped(String),
}

impl Error {
    /// An [`Error::InvalidRequest`] about `param`.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self::InvalidRequest { param, message: message.into() }
    }

    /// An [`Error::Model`] about `path`.
    pub fn model(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Self::Model { path: path.into(), message: message.into() }
    }

    /// An [`Error::Config`] about the command-line flag `option`.
    pub fn config(option: &'static str, message: impl Into<String>) -> Self {
        Self::Config { option, message: message.into() }
    }
}
