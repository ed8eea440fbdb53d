//! Accepts connections and, at the end, lets requests in flight finish.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::net::TcpListener;

use crate::{App, Error};

/// How often histograms are folded and the engine's health is looked at.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long to wait when the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

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

/// Binds `host:port`.
///
/// # Errors
/// [`Error::Bind`].
pub async fn bind(host: &str, port: u16) -> Result<TcpListener, Error> {
    TcpListener::bind((host.trim_start_matches('[').trim_end_matches(']'), port))
        .await
        .map_err(|source| Error::Bind { address: format!("{host}:{port}"), source })
}

/// Serves until `stop` resolves, then takes no more connections and waits for requests in flight:
/// at most `drain_timeout`, and not after `abort` resolves.
pub async fn serve(
    listener: TcpListener,
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
                Ok((stream, peer)) => connection(&app, &graceful, stream, peer),
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

fn connection(app: &Arc<App>, graceful: &GracefulShutdown, stream: tokio::net::TcpStream, peer: SocketAddr) {
    // Tokens are small and each is wanted at once.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "TCP_NODELAY");
    }
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    let service = TowerToHyperService::new(app.service::<Incoming>());
    let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%peer, error, "connection ended");
        }
    });
}
