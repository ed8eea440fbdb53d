//! Owns when requests leave: closed loop by concurrency, open loop by an absolute schedule.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::Result;
use crate::api::RequestOptions;
use crate::client::{Client, Connection};
use crate::config::{Config, Point};
use crate::dataset::{Sample, count_tokens};
use crate::record::RequestRecord;
use crate::schedule::{announce, poisson_arrivals};

/// The requests of one point, ready to be sent.
pub struct Load {
    pub config: Arc<Config>,
    pub client: Arc<Client>,
    pub samples: Arc<Vec<Sample>>,
    /// Index of the first sample: points of a sweep go on where the last one stopped, so that no prompt repeats.
    pub offset: usize,
    pub n_requests: usize,
    pub point: Point,
}

impl Load {
    /// Sends every request and hands each record on as it ends. Dropping the future closes every connection.
    pub async fn run(self, records: mpsc::Sender<RequestRecord>) {
        let load = Arc::new(self);
        match load.point.rate {
            Some(rate) => load.open_loop(rate, records).await,
            None => load.closed_loop(records).await,
        }
    }

    /// The body of request `i` of this point.
    ///
    /// # Errors
    /// If the prompt does not fit the API or endpoint.
    pub fn body(&self, i: usize) -> Result<Bytes> {
        let config = &self.config;
        let sample_idx = self.offset + i;
        let sample = &self.samples[sample_idx % self.samples.len()];
        let mut rng = StdRng::seed_from_u64(config.data.seed ^ (sample_idx as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let (low, high) = config.max_tokens;
        let max_tokens = sample.output_tokens.unwrap_or_else(|| rng.random_range(low..=high));
        let body = config.api.body(
            &sample.prompt,
            &RequestOptions {
                model: config.model.as_deref(),
                kind: config.endpoint.kind,
                stream: config.stream,
                max_tokens,
                min_tokens: sample.output_tokens.or(config.min_tokens).map(|min| min.min(max_tokens)),
                ignore_eos: config.ignore_eos || sample.output_tokens.is_some(),
                generation: &config.generation,
                template: config.template.as_ref(),
                extra: &config.extra,
            },
        )?;
        tracing::debug!(request = i, body = %body.to_string().chars().take(200).collect::<String>());
        Ok(body.to_string().into())
    }

    /// `parallel` workers, each with its own connection, each sending as soon as its last answer has ended.
    async fn closed_loop(self: Arc<Self>, records: mpsc::Sender<RequestRecord>) {
        let n_workers = self.point.parallel.unwrap_or(1).min(self.n_requests);
        // Connected before the first send: the handshake is not part of any answer.
        let connections = futures_util::future::join_all((0..n_workers).map(|_| self.client.connect())).await;
        let next = Arc::new(AtomicUsize::new(0));
        let mut workers = JoinSet::new();
        for connection in connections {
            let (load, next, records) = (Arc::clone(&self), Arc::clone(&next), records.clone());
            workers.spawn(async move {
                // A failed connection is tried again, and recorded, by the request that needs it.
                let mut connection = connection.ok();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= load.n_requests {
                        return;
                    }
                    let record = load.exchange(&mut connection, i, None).await;
                    if records.send(record).await.is_err() {
                        return;
                    }
                }
            });
        }
        while workers.join_next().await.is_some() {}
    }

    /// Requests leave at their due times whatever the answers do; with `parallel`, at most so many are in flight and
    /// the wait for a place counts, because times run from the due time.
    async fn open_loop(self: Arc<Self>, rate: f64, records: mpsc::Sender<RequestRecord>) {
        let arrivals = poisson_arrivals(self.n_requests, rate, self.config.data.seed.wrapping_add(self.offset as u64));
        let places = self.point.parallel.map(|parallel| Arc::new(Semaphore::new(parallel)));
        let pool = Arc::new(Pool::default());
        let start_s = self.client.now_s();
        let mut announced = announce(arrivals, Instant::now());
        let mut requests = JoinSet::new();
        while let Some((i, due_s)) = announced.recv().await {
            let (load, pool, records, places) = (Arc::clone(&self), Arc::clone(&pool), records.clone(), places.clone());
            requests.spawn(async move {
                let _place = match &places {
                    Some(places) => places.acquire().await.ok(),
                    None => None,
                };
                let mut connection = pool.take();
                let record = load.exchange(&mut connection, i, Some(start_s + due_s)).await;
                pool.give_back(connection);
                // The receiver is gone only when the run is being stopped.
                let _ = records.send(record).await;
            });
            while requests.try_join_next().is_some() {}
        }
        while requests.join_next().await.is_some() {}
    }

    async fn exchange(&self, connection: &mut Option<Connection>, i: usize, intended_s: Option<f64>) -> RequestRecord {
        let body = match self.body(i) {
            Ok(body) => body,
            Err(error) => {
                let now_s = self.client.now_s();
                let (intended_s, error) = (intended_s.unwrap_or(now_s), Some(error.to_string()));
                return RequestRecord { intended_s, sent_s: now_s, end_s: now_s, error, ..Default::default() };
            }
        };
        let mut record = self.client.exchange(connection, body, intended_s).await;
        if record.success
            && record.completion_tokens.is_none()
            && let Some(tokenizer) = &self.config.data.tokenizer
        {
            record.completion_tokens = count_tokens(tokenizer, &record.response).ok().map(|n_tokens| n_tokens as i64);
            record.prompt_tokens = record.prompt_tokens.or_else(|| self.count_prompt(i));
        }
        record
    }

    fn count_prompt(&self, i: usize) -> Option<i64> {
        let sample = &self.samples[(self.offset + i) % self.samples.len()];
        crate::dataset::prompt_tokens(&sample.prompt, self.config.data.tokenizer.as_ref()?)
    }
}

/// Idle connections of an open loop.
#[derive(Default)]
struct Pool(Mutex<Vec<Connection>>);

impl Pool {
    fn take(&self) -> Option<Connection> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn give_back(&self, connection: Option<Connection>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(connection);
    }
}
