//! Owns the live display: a bar with running rates on a terminal, plain lines elsewhere.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::client::Client;
use crate::record::RequestRecord;

/// Shows how a run goes on, on standard error.
pub struct Progress {
    bar: ProgressBar,
    client: Arc<Client>,
    start: Instant,
    n_total: usize,
    n_done: usize,
    n_failed: usize,
    completion_tokens: i64,
    ttft_s: f64,
    log_every: usize,
}

impl Progress {
    /// `log_every`: a plain line each so many requests when standard error is not a terminal.
    pub fn new(n_total: usize, log_every: usize, client: Arc<Client>) -> Self {
        let bar = ProgressBar::new(n_total as u64);
        let template = "{bar:30} {pos}/{len} {elapsed}<{eta} {msg}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well-formed"));
        bar.enable_steady_tick(Duration::from_millis(500));
        Self {
            bar,
            client,
            start: Instant::now(),
            n_total,
            n_done: 0,
            n_failed: 0,
            completion_tokens: 0,
            ttft_s: 0.0,
            log_every,
        }
    }

    /// Takes a finished request in.
    pub fn add(&mut self, record: &RequestRecord) {
        self.n_done += 1;
        if record.success {
            self.completion_tokens += record.completion_tokens.unwrap_or(0);
            self.ttft_s += record.ttft_s();
        } else {
            self.n_failed += 1;
        }
        self.bar.set_position(self.n_done as u64);
        if self.bar.is_hidden() {
            if self.n_done.is_multiple_of(self.log_every) || self.n_done == self.n_total {
                eprintln!("{}/{} requests, {}", self.n_done, self.n_total, self.rates());
            }
        } else {
            self.tick();
        }
    }

    /// Refreshes the rates between finished requests.
    pub fn tick(&self) {
        if !self.bar.is_hidden() {
            self.bar.set_message(self.rates());
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }

    fn rates(&self) -> String {
        let elapsed_s = self.start.elapsed().as_secs_f64().max(1e-9);
        // Streams are counted as they arrive; whole answers when they end.
        let live = self.client.live_tokens.load(Ordering::Relaxed) as i64;
        let n_succeeded = self.n_done - self.n_failed;
        format!(
            "{} failed, {:.2} req/s, {:.1} tok/s, TTFT {:.3} s",
            self.n_failed,
            self.n_done as f64 / elapsed_s,
            live.max(self.completion_tokens) as f64 / elapsed_s,
            self.ttft_s / n_succeeded.max(1) as f64,
        )
    }
}
