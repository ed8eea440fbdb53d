//! Why a subcommand failed.

use std::path::PathBuf;

/// Why a subcommand failed, by what the operator can mend.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A command-line option cannot be honoured.
    #[error("{flag}: {message}")]
    Config {
        /// The option, as its flag.
        flag: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
    /// The model could not be loaded or the engine failed.
    #[error(transparent)]
    Engine(#[from] ember_engine::Error),
    /// The address cannot be listened on.
    #[error("--host/--port: cannot listen on {address}: {source}{}", bind_remedy(.source))]
    Bind {
        /// Host and port.
        address: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The Unix socket cannot be made.
    #[error("--uds: cannot listen on {}: {source}{}", path.display(), bind_unix_remedy(.source))]
    BindUnix {
        /// The socket's file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The async runtime or a signal handler could not be set up, or output could not be written.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// The engine died while serving.
    #[error("the engine has failed; see the log above. Start the server again")]
    EngineDied,
}

impl Error {
    /// An [`Error::Config`] about `flag`.
    pub fn config(flag: &'static str, message: impl Into<String>) -> Self {
        Self::Config { flag, message: message.into() }
    }
}

fn bind_unix_remedy(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => ". Another server, or a file that is no socket, is there",
        _ => "",
    }
}

fn bind_remedy(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => ". Another process uses this port: stop it or choose one with --port",
        std::io::ErrorKind::PermissionDenied => ". Ports below 1024 need privileges: choose a higher one with --port",
        _ => "",
    }
}
