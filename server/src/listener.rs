//! Accepts connections and, at the end, lets requests in flight finish.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{
        conn::auto,
        graceful::{GracefulShutdown, Watcher},
    },
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_rustls::TlsAcceptor;

use crate::{App, Error, write_timeout::WriteTimeout};

/// How often histograms are folded and the engine's health is looked at.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a client may take to agree on keys.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may leave sent data lying, unless the operator says otherwise.
pub const DEFAULT_WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Why serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every request in flight was answered.
    Drained,
    /// Some were cut off by the timeout or a second signal.
    Aborted,
    /// The engine failed.
    EngineDied,
}

/// A bound socket and how its connections are treated.
pub struct Listener {
    socket: Socket,
    tls: Option<TlsAcceptor>,
    write_timeout: Duration,
}

enum Socket {
    Tcp(TcpListener),
    /// Its file is removed at the end.
    Unix(UnixListener, PathBuf),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// Binds `host:port`.
///
/// # Errors
/// [`Error::Bind`].
pub async fn bind(host: &str, port: u16) -> Result<Listener, Error> {
    let socket = TcpListener::bind((host.trim_start_matches('[').trim_end_matches(']'), port)).await;
    let socket = socket.map_err(|source| Error::Bind { address: format!("{host}:{port}"), source })?;
    Ok(Listener::new(Socket::Tcp(socket)))
}

/// Binds a Unix socket at `path`; the file of a server that is gone is replaced.
///
/// # Errors
/// [`Error::BindUnix`].
pub fn bind_unix(path: &Path) -> Result<Listener, Error> {
    let fail = |source| Error::BindUnix { path: path.to_owned(), source };
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path).map_err(fail)?;
    }
    let socket = UnixListener::bind(path).map_err(fail)?;
    Ok(Listener::new(Socket::Unix(socket, path.to_owned())))
}

impl Listener {
    fn new(socket: Socket) -> Self {
        Self { socket, tls: None, write_timeout: DEFAULT_WRITE_TIMEOUT }
    }

    /// Speaks TLS.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<TlsAcceptor>) -> Self {
        self.tls = tls;
        self
    }

    /// Cuts clients that leave data lying for so long.
    #[must_use]
    pub fn with_write_timeout(mut self, write_timeout: Duration) -> Self {
        self.write_timeout = write_timeout;
        self
    }

    /// The address, if it is one of TCP.
    ///
    /// # Errors
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.socket {
            Socket::Tcp(socket) => socket.local_addr(),
            Socket::Unix(..) => Err(io::Error::other("a Unix socket has no port")),
        }
    }

    /// The address as operators see it.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        match &self.socket {
            Socket::Tcp(socket) => {
                socket.local_addr().map_or_else(|error| error.to_string(), |address| format!("{scheme}://{address}"))
            }
            Socket::Unix(_, path) => format!("{scheme}+unix://{}", path.display()),
        }
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        match &self.socket {
            Socket::Tcp(socket) => {
                let (stream, peer) = socket.accept().await?;
                // Tokens are small and each is wanted at once.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%peer, %error, "TCP_NODELAY");
                }
                Ok(Box::new(stream))
            }
            Socket::Unix(socket, _) => Ok(Box::new(socket.accept().await?.0)),
        }
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.url())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Serves until `stop` resolves, then takes no more connections and waits for requests in flight:
/// at most `drain_timeout`, and not after `abort` resolves.
pub async fn serve(
    listener: Listener,
    app: Arc<App>,
    stop: impl Future<Output = ()>,
    abort: impl Future<Output = ()>,
    drain_timeout: Duration,
) -> End {
    let graceful = GracefulShutdown::new();
    let mut upkeep = tokio::time::interval(UPKEEP_INTERVAL);
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(stream) => {
                    let stream = WriteTimeout::new(stream, listener.write_timeout);
                    tokio::spawn(connection(app.clone(), graceful.watcher(), stream, listener.tls.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            _ = upkeep.tick() => {
                app.run_metrics_upkeep();
                if !app.is_healthy() {
                    return End::EngineDied;
                }
            }
            () = &mut stop => break,
        }
    }
    drop(listener);
    tracing::info!(in_flight = app.admission().n_admitted(), timeout = ?drain_timeout, "draining");
    tokio::select! {
        () = graceful.shutdown() => End::Drained,
        () = tokio::time::sleep(drain_timeout) => End::Aborted,
        () = abort => End::Aborted,
    }
}

async fn connection(app: Arc<App>, watcher: Watcher, stream: WriteTimeout<Box<dyn Stream>>, tls: Option<TlsAcceptor>) {
    let Some(tls) = tls else {
        return http(app, watcher, stream).await;
    };
    match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => http(app, watcher, stream).await,
        Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => tracing::debug!("TLS handshake took too long"),
    }
}

async fn http(app: Arc<App>, watcher: Watcher, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    let service = TowerToHyperService::new(app.service::<Incoming>());
    let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(error, "connection ended");
    }
}
