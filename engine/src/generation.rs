//! [`Generation`]: the caller's end of a request. Turns tokens to text and finds stop strings, so
//! that neither costs the engine's thread anything.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use ember_common::FinishReason;
use futures_util::Stream;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::{
    Delta, Error, Event, Finish, PromptEvent, SamplingParams, StopReason, TokenLogprobs,
    sequence::SequenceEnd,
    text::{Detokenizer, StopMatcher, Tokenizer},
};

/// The stop reason of an output that went round in circles, in vLLM's words.
const REPETITION: &str = "repetition_detected";

/// What the engine's thread sends about one sequence.
#[derive(Debug)]
pub(crate) enum TokenEvent {
    /// Once per sequence, before its first token.
    Prompt { n_cached: usize, logprobs: Vec<TokenLogprobs>, queue_time: Duration, prefill_time: Duration },
    /// One token.
    Token { index: usize, token_id: u32, logprobs: Option<TokenLogprobs>, end: Option<SequenceEnd> },
    /// The request is lost.
    Failed(Error),
}

/// Tells the engine that nobody wants a sequence any more.
#[derive(Debug, Clone, Default)]
pub(crate) struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    pub(crate) fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The events of one request. Dropping it cancels its sequences and frees their KV pages.
pub struct Generation {
    prompt: Arc<[u32]>,
    wants_prompt_logprobs: bool,
    prompt_sent: bool,
    sequences: Vec<Sequence>,
    n_unfinished: usize,
    // The engine must never wait for a slow reader. What can pile up is bounded by max_tokens.
    events: UnboundedReceiver<TokenEvent>,
    ready: VecDeque<Event>,
}

/// One of the request's `n` sequences, as text.
struct Sequence {
    detokenizer: Detokenizer,
    stops: Option<StopMatcher>,
    cancel: CancelFlag,
    finished: bool,
}

impl Generation {
    pub(crate) fn new(
        prompt: Arc<[u32]>,
        params: &SamplingParams,
        tokenizer: &Tokenizer,
        cancels: Vec<CancelFlag>,
        events: UnboundedReceiver<TokenEvent>,
    ) -> Self {
        let stops: Arc<[String]> = params.stop.clone().into();
        let sequences: Vec<Sequence> = cancels
            .into_iter()
            .map(|cancel| Sequence {
                detokenizer: Detokenizer::new(tokenizer, params.skip_special_tokens),
                stops: (!stops.is_empty()).then(|| StopMatcher::new(stops.clone(), params.include_stop_str_in_output)),
                cancel,
                finished: false,
            })
            .collect();
        Self {
            prompt,
            wants_prompt_logprobs: params.prompt_logprobs.is_some(),
            prompt_sent: false,
            n_unfinished: sequences.len(),
            sequences,
            events,
            ready: VecDeque::new(),
        }
    }

    /// The prompt's tokens.
    pub fn prompt_token_ids(&self) -> &Arc<[u32]> {
        &self.prompt
    }

    /// The next event; `None` after every sequence has finished or failed. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    /// [`Generation::next`] for callers outside an async runtime. Blocks.
    pub fn blocking_next(&mut self) -> Option<Result<Event, Error>> {
        loop {
            if let Some(known) = self.known_next() {
                return known;
            }
            let event = self.events.blocking_recv();
            if let Err(error) = self.take_in(event) {
                return Some(Err(error));
            }
        }
    }

    /// What comes next, unless the engine has to say more first.
    fn known_next(&mut self) -> Option<Option<Result<Event, Error>>> {
        match self.ready.pop_front() {
            Some(event) => Some(Some(Ok(event))),
            None if self.n_unfinished == 0 => Some(None),
            None => None,
        }
    }

    fn take_in(&mut self, event: Option<TokenEvent>) -> Result<(), Error> {
        match event {
            Some(TokenEvent::Prompt { n_cached, logprobs, queue_time, prefill_time }) => {
                if !std::mem::replace(&mut self.prompt_sent, true) {
                    let logprobs = self
                        .wants_prompt_logprobs
                        .then(|| std::iter::once(None).chain(logprobs.into_iter().map(Some)).collect());
                    self.ready.push_back(Event::Prompt(PromptEvent {
                        token_ids: self.prompt.clone(),
                        n_cached,
                        queue_time,
                        prefill_time,
                        logprobs,
                    }));
                }
                Ok(())
            }
            Some(TokenEvent::Token { index, token_id, logprobs, end }) => {
                let sequence = &mut self.sequences[index];
                if !sequence.finished {
                    let delta = sequence.push(index, token_id, logprobs, end);
                    self.n_unfinished -= usize::from(delta.finish.is_some());
                    self.ready.push_back(Event::Delta(delta));
                }
                Ok(())
            }
            Some(TokenEvent::Failed(error)) => {
                self.n_unfinished = 0;
                Err(error)
            }
            None => {
                self.n_unfinished = 0;
                Err(Error::Stopped("the engine's thread ended".into()))
            }
        }
    }
}

impl Sequence {
    fn push(
        &mut self,
        index: usize,
        token_id: u32,
        logprobs: Option<TokenLogprobs>,
        end: Option<SequenceEnd>,
    ) -> Delta {
        let mut text = String::new();
        // A stop token ends the text without being part of it.
        if end.is_none_or(|end| end.shows_token) {
            self.detokenizer.push(token_id, &mut text);
        }
        if end.is_some() {
            self.detokenizer.finish(&mut text);
        }
        let mut stopped_by = None;
        if let Some(stops) = &mut self.stops {
            let mut safe = String::new();
            stopped_by = stops.push(&text, &mut safe).map(str::to_owned);
            if stopped_by.is_none() && end.is_some() {
                stops.finish(&mut safe);
            }
            text = safe;
        }
        let finish = match (stopped_by, end) {
            (Some(stop), _) => Some(Finish { reason: FinishReason::Stop, stop_reason: Some(StopReason::Text(stop)) }),
            (None, Some(end)) => {
                let repetition = || (end.reason == FinishReason::Repetition).then(|| REPETITION.to_owned());
                let stop_reason = end.stop_token.map(StopReason::Token).or_else(|| repetition().map(StopReason::Text));
                Some(Finish { reason: end.reason, stop_reason })
            }
            (None, None) => None,
        };
        if finish.is_some() {
            self.finished = true;
            self.cancel.cancel();
        }
        Delta { index, text, token_ids: vec![token_id], logprobs: logprobs.into_iter().collect(), finish }
    }
}

impl Stream for Generation {
    type Item = Result<Event, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(known) = self.known_next() {
                return Poll::Ready(known);
            }
            let event = ready!(self.events.poll_recv(cx));
            if let Err(error) = self.take_in(event) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}
