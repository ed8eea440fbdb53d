//! Tests of the serving loop with a device that takes time, answers tokens only, and checks what steps promise.

use std::{collections::HashSet, sync::Arc, thread};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;
use crate::{
    SamplingParams,
    executors::{Capacity, MixedSteps},
    step::{PAGE_SIZE, SampledToken, StepInput, StepOutput},
};

/// Nanoseconds that a row of a step and a token of a decoding sequence's context take.
const PER_ROW: u32 = 100;
const PER_CONTEXT_TOKEN: f64 = 0.2;
/// Rows of mixed steps, as of the CUDA executor, a sixteenth.
const ROWS: &[(usize, usize)] = &[(1, 16), (2, 32), (4, 64), (16, 128)];
const MAX_TOKENS: usize = 128;
const MAX_LEN: usize = 96 * PAGE_SIZE;

struct TimedDevice {
    capacity: Capacity,
    /// When each step in flight ends, and its samples.
    in_flight: VecDeque<(Instant, usize)>,
}

impl TimedDevice {
    fn new(n_pages: usize) -> Self {
        let capacity = Capacity {
            n_pages,
            max_num_seqs: 64,
            max_num_batched_tokens: MAX_TOKENS,
            max_model_len: MAX_LEN,
            max_in_flight: 2,
            mixed_steps: MixedSteps::Rows(ROWS),
            max_logprobs: 0,
        };
        Self { capacity, in_flight: VecDeque::new() }
    }

    fn check(&self, step: &StepInput) {
        let n_decoding = step.seqs.iter().take_while(|seq| seq.query_len == 1).count();
        assert!(step.n_tokens() <= MAX_TOKENS && self.in_flight.len() < 2);
        assert!(step.seqs[n_decoding..].iter().all(|seq| seq.query_len > 1), "decoding sequences come first");
        assert!(step.samples.is_sorted_by(|a, b| a.seq < b.seq), "rows that are sampled rise");
        let mut slots = HashSet::new();
        assert!(step.slot_mapping.iter().all(|slot| slots.insert(slot)), "no two tokens have one place");
        for seq in &step.seqs {
            assert!(step.pages(seq).len() >= (seq.context_len as usize).div_ceil(PAGE_SIZE));
        }
    }
}

impl Executor for TimedDevice {
    fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    fn describe(&self) -> String {
        "a timed device".into()
    }

    fn launch(&mut self, step: StepInput) -> Result<(), Error> {
        self.check(&step);
        let contexts: u32 = step.seqs.iter().filter(|seq| seq.query_len == 1).map(|seq| seq.context_len).sum();
        let nanos = step.n_tokens() as u32 * PER_ROW + (f64::from(contexts) * PER_CONTEXT_TOKEN) as u32;
        let starts = self.in_flight.back().map_or_else(Instant::now, |&(end, _)| end.max(Instant::now()));
        self.in_flight.push_back((starts + Duration::from_nanos(nanos.into()), step.samples.len()));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, Error> {
        let (end, n_samples) = self.in_flight.pop_front().expect("a step in flight");
        thread::sleep(end.saturating_duration_since(Instant::now()));
        let token = SampledToken { token_id: 7, logprobs: None };
        Ok(StepOutput { tokens: vec![token; n_samples], prompt_logprobs: Vec::new() })
    }

    fn hidden_states(&mut self, _: &StepInput) -> Result<Vec<f32>, Error> {
        unreachable!("nothing is embedded")
    }
}

/// A client that keeps `parallel` sequences on their way until `number` have been answered.
struct Client {
    arrivals: mpsc::Sender<Arrival>,
    events: UnboundedSender<TokenEvent>,
    answers: UnboundedReceiver<TokenEvent>,
    random: u64,
}

impl Client {
    fn next(&mut self, n: u64) -> usize {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.random >> 33) % n) as usize
    }

    /// A quarter of the prompts is short, the others are of some hundred tokens.
    fn send(&mut self, index: usize) {
        let n_prompt = if self.next(4) == 0 { 1 + self.next(8) } else { 200 + self.next(1200) };
        let max_tokens = Some(2 + self.next(30) as u32);
        let sequence = NewSequence {
            prompt: (0..n_prompt as u32).collect::<Vec<_>>().into(),
            params: Arc::new(SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() }),
            seed: 0,
            max_len: MAX_LEN,
            eos_token_ids: [1].as_slice().into(),
            cache_salt: None,
            priority: 0,
            grammar: None,
            bad_words: Arc::default(),
        };
        let (events, cancel) = (self.events.clone(), CancelFlag::default());
        self.arrivals
            .send(Arrival { sequence, index, events, cancel, arrived: Instant::now() })
            .expect("the loop runs");
    }

    fn run(&mut self, parallel: usize, number: usize) {
        (0..parallel.min(number)).for_each(|index| self.send(index));
        let (mut n_sent, mut n_ended) = (parallel.min(number), 0);
        while n_ended < number {
            match self.answers.blocking_recv().expect("the loop runs") {
                TokenEvent::Failed(error) => panic!("{error}"),
                TokenEvent::Token { end: Some(_), .. } => {
                    n_ended += 1;
                    if n_sent < number {
                        self.send(n_sent);
                        n_sent += 1;
                    }
                }
                _ => {}
            }
        }
    }
}

/// Runs loads, pairs of parallel and number, one after the other on one loop with `n_pages` pages.
fn serve(n_pages: usize, loads: &'static [(usize, usize)]) -> EngineStats {
    let shared = Arc::new(Shared::new());
    let config = EngineConfig { enable_prefix_caching: false, ..EngineConfig::default() };
    let serving = Serving::new(Box::new(TimedDevice::new(n_pages)), &config, shared.clone());
    let (arrivals, inbox) = mpsc::channel();
    let looping = thread::spawn(move || serving.run(&inbox));
    let (done, is_done) = mpsc::channel();
    let client = thread::spawn(move || {
        let (events, answers) = unbounded_channel();
        let mut client = Client { arrivals, events, answers, random: 1 };
        for &(parallel, number) in loads {
            client.run(parallel, number);
        }
        done.send(()).expect("the test waits");
    });
    is_done.recv_timeout(Duration::from_secs(60)).expect("every sequence is answered");
    client.join().expect("the client ends");
    looping.join().expect("the loop ends");
    shared.stats()
}

#[test]
fn deep_and_shallow_queues_in_turns_are_answered() {
    let stats = serve(4000, &[(1, 2), (128, 192), (1, 2), (16, 48), (128, 160), (16, 48), (1, 3)]);
    assert_eq!((stats.n_running, stats.n_waiting, stats.n_pages_in_use, stats.n_preemptions), (0, 0, 0, 0));
}

#[test]
fn a_cache_for_one_long_prompt_serves_many() {
    let stats = serve(96, &[(64, 96), (16, 32)]);
    assert_eq!((stats.n_running, stats.n_waiting, stats.n_pages_in_use), (0, 0, 0));
}
