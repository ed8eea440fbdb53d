//! The serving loop: the thread that owns the scheduler and the executor.
//!
//! Each turn is four calls: drain the inbox, plan and launch steps while the executor takes more,
//! collect the oldest step, tell the callers. With two steps in flight the planning of step N+1 and
//! the emission of step N's tokens happen while the device works. Step N+1 is planned as late as
//! [`Pace`] allows.

use std::{
    collections::{HashMap, VecDeque},
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc::UnboundedSender;

use crate::{
    EngineConfig, EngineStats, Error,
    engine::lock,
    executors::Executor,
    generation::{CancelFlag, TokenEvent},
    pace::Pace,
    prompt_share::PromptShare,
    scheduler::{Progress, Scheduler, SchedulerConfig},
    sequence::{NewSequence, SeqId},
};

/// Step sizes kept for whoever asks.
const MAX_STEP_SIZES: usize = 1 << 16;

/// One sequence on its way to the loop.
pub(crate) struct Arrival {
    pub(crate) sequence: NewSequence,
    /// Which of its request's sequences it is.
    pub(crate) index: usize,
    pub(crate) events: UnboundedSender<TokenEvent>,
    pub(crate) cancel: CancelFlag,
    pub(crate) arrived: Instant,
}

/// What the loop shows to other threads.
pub(crate) struct Shared {
    stats: Mutex<EngineStats>,
    /// Tokens of each step that nobody asked for yet, the latest [`MAX_STEP_SIZES`].
    step_sizes: Mutex<VecDeque<u32>>,
    failure: Mutex<Option<Error>>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self { stats: Mutex::default(), step_sizes: Mutex::default(), failure: Mutex::default() }
    }

    pub(crate) fn stats(&self) -> EngineStats {
        *lock(&self.stats)
    }

    /// Tokens of each step since the last call.
    pub(crate) fn take_step_sizes(&self) -> Vec<u32> {
        lock(&self.step_sizes).drain(..).collect()
    }

    fn push_step_size(&self, n_tokens: usize) {
        let mut sizes = lock(&self.step_sizes);
        if sizes.len() == MAX_STEP_SIZES {
            sizes.pop_front();
        }
        sizes.push_back(n_tokens as u32);
    }

    /// Why the loop ended, if it failed.
    pub(crate) fn failure(&self) -> Option<Error> {
        lock(&self.failure).clone()
    }
}

/// A caller of a sequence in the loop.
struct Caller {
    index: usize,
    events: UnboundedSender<TokenEvent>,
    cancel: CancelFlag,
    arrived: Instant,
    /// When it first came into the batch.
    started: Option<Instant>,
}

impl Caller {
    fn is_gone(&self) -> bool {
        self.events.is_closed() || self.cancel.is_cancelled()
    }
}

/// A step in flight.
struct Launched {
    at: Instant,
    n_decoding: usize,
    n_prompt_tokens: usize,
}

pub(crate) struct Serving {
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    callers: HashMap<SeqId, Caller>,
    max_in_flight: usize,
    /// The steps in flight, oldest first.
    launched: VecDeque<Launched>,
    pace: Pace,
    prompt_share: PromptShare,
    shared: Arc<Shared>,
}

impl Serving {
    pub(crate) fn new(executor: Box<dyn Executor>, config: &EngineConfig, shared: Arc<Shared>) -> Self {
        let capacity = executor.capacity();
        let scheduler = Scheduler::new(SchedulerConfig {
            n_pages: capacity.n_pages,
            max_num_seqs: capacity.max_num_seqs,
            max_num_batched_tokens: capacity.max_num_batched_tokens,
            enable_prefix_caching: config.enable_prefix_caching,
        });
        let serving = Self {
            max_in_flight: capacity.max_in_flight,
            prompt_share: PromptShare::new(capacity.mixed_steps),
            executor,
            scheduler,
            callers: HashMap::new(),
            launched: VecDeque::new(),
            pace: Pace::default(),
            shared,
        };
        serving.publish();
        serving
    }

    /// Serves until the inbox is closed and empty, or the executor fails.
    pub(crate) fn run(mut self, inbox: &mpsc::Receiver<Arrival>) {
        // A panic (a bug, or a tensor library's way to report a device error) must answer the
        // requests in flight, not leave them waiting.
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| self.serve(inbox)));
        let error = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => {
                let what = panic
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned()))
                    .unwrap_or_else(|| "unknown panic".into());
                Error::Device(format!("the engine's thread panicked: {what}"))
            }
        };
        tracing::error!(%error, "the engine stops");
        *lock(&self.shared.failure) = Some(error.clone());
        for caller in self.callers.into_values() {
            let _ = caller.events.send(TokenEvent::Failed(error.clone()));
        }
        for arrival in inbox.try_iter() {
            let _ = arrival.events.send(TokenEvent::Failed(error.clone()));
        }
    }

    fn serve(&mut self, inbox: &mpsc::Receiver<Arrival>) -> Result<(), Error> {
        loop {
            if self.scheduler.is_idle() {
                self.publish();
                match inbox.recv() {
                    Ok(arrival) => self.admit(arrival),
                    Err(mpsc::RecvError) => return Ok(()),
                }
            }
            loop {
                match self.next_arrival(inbox) {
                    Ok(arrival) => self.admit(arrival),
                    Err(RecvTimeoutError::Timeout) => break,
                    // The engine was dropped: nobody can be listening.
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
            self.drop_cancelled();
            while self.scheduler.n_in_flight() < self.max_in_flight {
                let budget = self.prompt_share.budget(self.scheduler.demand());
                self.scheduler.set_prompt_budget(budget);
                let Some(step) = self.scheduler.plan() else {
                    break;
                };
                let now = Instant::now();
                for id in self.scheduler.take_admitted() {
                    if let Some(caller) = self.callers.get_mut(&id) {
                        caller.started = Some(now);
                    }
                }
                self.shared.push_step_size(step.n_tokens());
                let n_decoding = step.seqs.iter().filter(|seq| seq.query_len == 1).count();
                self.launched.push_back(Launched {
                    at: now,
                    n_decoding,
                    n_prompt_tokens: step.n_tokens() - n_decoding,
                });
                self.executor.launch(step)?;
            }
            if self.scheduler.n_in_flight() > 0 {
                let output = self.executor.collect()?;
                self.collected();
                let progress = self.scheduler.complete(output);
                self.emit(progress);
            }
            self.publish();
        }
    }

    /// Takes note of how long the oldest step in flight took.
    fn collected(&mut self) {
        let Some(Launched { at, n_decoding, n_prompt_tokens }) = self.launched.pop_front() else {
            return;
        };
        let now = Instant::now();
        self.pace.collected(now, n_prompt_tokens == 0, self.scheduler.n_in_flight() > 1);
        self.prompt_share.ran(now - at, n_decoding, n_prompt_tokens);
    }

    /// The next arrival that is here, or comes before the next step has to be planned.
    fn next_arrival(&self, inbox: &mpsc::Receiver<Arrival>) -> Result<Arrival, RecvTimeoutError> {
        let deadline = self.pace.deadline().filter(|_| self.scheduler.n_in_flight() > 0);
        inbox.recv_timeout(deadline.map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now())))
    }

    fn admit(&mut self, arrival: Arrival) {
        let Arrival { sequence, index, events, cancel, arrived } = arrival;
        let id = self.scheduler.add(sequence);
        self.callers.insert(id, Caller { index, events, cancel, arrived, started: None });
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SeqId> = self.callers.iter().filter(|(_, c)| c.is_gone()).map(|(&id, _)| id).collect();
        for id in gone {
            self.callers.remove(&id);
            self.scheduler.abort(id);
        }
    }

    fn emit(&mut self, progress: Vec<Progress>) {
        for Progress { id, prompt, token_id, logprobs, end, grammar_error } in progress {
            let Some(caller) = self.callers.get(&id) else {
                continue;
            };
            // A closed channel is noticed in the next turn.
            if let Some(prompt) = prompt {
                let started = caller.started.unwrap_or(caller.arrived);
                let event = TokenEvent::Prompt {
                    n_cached: prompt.n_cached,
                    logprobs: prompt.logprobs,
                    queue_time: started - caller.arrived,
                    prefill_time: started.elapsed(),
                };
                let _ = caller.events.send(event);
            }
            let _ = caller.events.send(match grammar_error {
                None => TokenEvent::Token { index: caller.index, token_id, logprobs, end },
                Some(message) => TokenEvent::Failed(Error::invalid(
                    "structured_outputs",
                    format!("The output's form is too complex: {message}"),
                )),
            });
            if end.is_some() {
                self.callers.remove(&id);
            }
        }
    }

    fn publish(&self) {
        let (pool, counters) = (self.scheduler.pool(), self.scheduler.counters());
        *lock(&self.shared.stats) = EngineStats {
            n_running: self.scheduler.n_running(),
            n_waiting: self.scheduler.n_waiting(),
            n_pages_in_use: pool.n_pages() - pool.n_free(),
            n_pages: pool.n_pages(),
            n_prefix_queries: counters.n_prefix_queries,
            n_prefix_hits: counters.n_prefix_hits,
            n_preemptions: counters.n_preemptions,
            n_prompt_tokens: counters.n_prompt_tokens,
            n_generation_tokens: counters.n_generation_tokens,
        };
    }
}

#[cfg(test)]
#[path = "serving_tests.rs"]
mod tests;
