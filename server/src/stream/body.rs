//! [`SseBody`]: the response body that owns a request in flight.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use ember_common::openai::StreamUsage;
use ember_engine::{Delta, PromptEvent};
use futures_util::StreamExt;
use http_body_util::BodyExt;
use hyper::{Response, body::Frame, header};
use tokio::time::{Instant, Sleep, sleep};

use super::{ChunkWriter, UsageMeter};
use crate::{
    ApiError,
    app::Body,
    generation::{ChoiceEvent, Choices, append},
};

/// How an endpoint writes its chunks.
pub trait Frames: Send + Unpin + 'static {
    /// A prompt has been processed; comes before its choices' output.
    fn prompt(&mut self, prompt_idx: usize, prompt: PromptEvent);
    /// Writes the chunks for new output.
    fn delta(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter, delta: Delta);
    /// Tokens so far that were reasoning; `None` if it is not told apart.
    fn n_reasoning_tokens(&self) -> Option<usize> {
        None
    }
    /// The answer's fingerprint, for the usage chunk.
    fn system_fingerprint(&self) -> &str;
    /// Writes what comes after all output.
    fn end(&mut self, writer: &mut ChunkWriter, usage: &UsageMeter) {
        if usage.at_end {
            let usage = StreamUsage::from(usage.total());
            writer.begin().raw(r#"],"usage":"#).value(&usage).raw(r#","system_fingerprint":"#);
            writer.value(self.system_fingerprint()).end();
        }
        writer.frame(DONE);
    }
    /// Writes what comes instead of more output.
    fn error(&mut self, writer: &mut ChunkWriter, error: &ApiError) {
        writer.frame(&error.to_json());
        writer.frame(DONE);
    }
}

/// Chunks that are ready together leave together, up to about this many bytes.
const MAX_FRAME_BYTES: usize = 8 << 10;

/// The last frame of completions and chat.
const DONE: &[u8] = b"[DONE]";

/// A stream of events. Owns the request: dropping it, as hyper does when the client hangs up,
/// cancels the sequences and frees the permit.
pub struct SseBody<F> {
    /// `None` after the last frame.
    choices: Option<Choices>,
    frames: F,
    writer: ChunkWriter,
    usage: UsageMeter,
    /// Tokens per chunk.
    interval: usize,
    /// Output kept back until there are `interval` tokens, by choice; `None` before the first.
    held: Vec<Option<Delta>>,
    /// Sends a comment when the stream has been silent for so long.
    keep_alive: Option<KeepAlive>,
}

struct KeepAlive {
    interval: Duration,
    next: Pin<Box<Sleep>>,
}

impl<F: Frames> SseBody<F> {
    /// A body that streams `choices`, `interval` tokens a chunk; the first is never kept back.
    pub fn new(choices: Choices, frames: F, writer: ChunkWriter, usage: UsageMeter, interval: usize) -> Self {
        let held = vec![None; choices.n_choices()];
        let keep_alive = choices.app().config.sse_keep_alive_interval;
        let keep_alive = keep_alive.map(|interval| KeepAlive { interval, next: Box::pin(sleep(interval)) });
        Self { choices: Some(choices), frames, writer, usage, interval, held, keep_alive }
    }

    /// The response.
    pub fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::new(self.map_err(|never: Infallible| match never {})));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-cache"));
        // Keeps nginx from buffering the stream.
        headers.insert("x-accel-buffering", header::HeaderValue::from_static("no"));
        response
    }

    fn delta(&mut self, delta: Delta) {
        self.usage.output(delta.index, delta.token_ids.len());
        let delta = if self.interval > 1 { self.hold(delta) } else { Some(delta) };
        if let Some(delta) = delta {
            self.frames.delta(&mut self.writer, &self.usage, delta);
        }
    }

    /// Keeps output back until there is a chunk of it.
    fn hold(&mut self, delta: Delta) -> Option<Delta> {
        let empty = Delta { index: delta.index, ..Delta::default() };
        match &mut self.held[delta.index] {
            first @ None => {
                *first = Some(empty);
                Some(delta)
            }
            Some(held) => {
                append(held, delta);
                (held.finish.is_some() || held.token_ids.len() >= self.interval).then(|| std::mem::replace(held, empty))
            }
        }
    }

    fn poll_keep_alive(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let Some(KeepAlive { interval, next }) = &mut self.keep_alive else {
            return Poll::Pending;
        };
        ready!(next.as_mut().poll(cx));
        next.as_mut().reset(Instant::now() + *interval);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b": keep-alive\n\n")))))
    }

    /// What was written since the last frame; `None` if that is nothing.
    fn take_frame(&mut self) -> Option<Result<Frame<Bytes>, Infallible>> {
        if self.writer.is_empty() {
            return None;
        }
        if let Some(keep_alive) = &mut self.keep_alive {
            keep_alive.next.as_mut().reset(Instant::now() + keep_alive.interval);
        }
        Some(Ok(Frame::data(self.writer.take())))
    }

    fn finish(&mut self) {
        self.usage.n_reasoning = self.frames.n_reasoning_tokens();
        self.frames.end(&mut self.writer, &self.usage);
        self.choices = None;
    }
}

impl<F: Frames> hyper::body::Body for SseBody<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        loop {
            let Some(choices) = this.choices.as_mut().filter(|_| this.writer.len() < MAX_FRAME_BYTES) else {
                return Poll::Ready(this.take_frame());
            };
            let Poll::Ready(event) = choices.poll_next_unpin(cx) else {
                return match this.take_frame() {
                    None => this.poll_keep_alive(cx),
                    frame => Poll::Ready(frame),
                };
            };
            match event {
                Some(Ok(ChoiceEvent::Prompt(idx, prompt))) => {
                    this.usage.prompt(idx, &prompt);
                    this.frames.prompt(idx, prompt);
                }
                Some(Ok(ChoiceEvent::Delta(delta))) => this.delta(delta),
                Some(Err(error)) => {
                    this.frames.error(&mut this.writer, &error);
                    this.choices = None;
                }
                None => this.finish(),
            }
        }
    }
}
