//! [`Choices`]: one request in flight, whatever its endpoint. Knows nothing of JSON.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use ember_common::openai;
use ember_engine::{Delta, Event, GenerateRequest, PromptEvent, StopReason};
use futures_util::{
    Stream, StreamExt,
    future::Either,
    stream::{BoxStream, SelectAll},
};

use tokio::time::Sleep;

use crate::{ApiError, EventStream, Permit, app::App, beam_search::BeamSearch, tracker::Tracker};

/// Most choices of one request, over all its prompts.
const MAX_SEQUENCES: usize = 16_384;

type Numbered = (usize, Result<Event, ember_engine::Error>);

/// What a request in flight yields.
#[derive(Debug, Clone, PartialEq)]
pub enum ChoiceEvent {
    /// Prompt number `.0` has been processed; comes before its choices' output.
    Prompt(usize, PromptEvent),
    /// New output; `index` counts choices over all prompts (`prompt_idx * n + k`).
    Delta(Delta),
}

/// One request in flight: the events of all its prompts, merged. Dropping it cancels the request
/// and gives its permit back.
pub struct Choices {
    events: Either<BoxStream<'static, Numbered>, SelectAll<BoxStream<'static, Numbered>>>,
    /// Events taken before anyone asked for them.
    ahead: VecDeque<ChoiceEvent>,
    n: usize,
    n_prompts: usize,
    tracker: Tracker,
    /// When it has taken too long.
    deadline: Option<Pin<Box<Sleep>>>,
    _permit: Permit,
}

impl Choices {
    /// Submits one engine request per prompt; all have the same parameters. With `beams` their outputs are searched
    /// for. `id` is for the log.
    ///
    /// # Errors
    /// Status 503 when the queue is full, else what the engine says.
    pub(crate) async fn start(
        app: &Arc<App>,
        id: String,
        requests: Vec<GenerateRequest>,
        beams: Option<BeamSearch>,
    ) -> Result<Self, ApiError> {
        let params = requests.first().map(|request| &request.params);
        let n = beams.map(|beams| beams.width).or(params.map(|params| params.n)).unwrap_or(1).max(1) as usize;
        let max_tokens = params.and_then(|params| params.max_tokens);
        let n_prompts = requests.len();
        if n_prompts * n > MAX_SEQUENCES {
            return Err(ApiError::invalid(
                "n",
                format!("A request can have at most {MAX_SEQUENCES} choices in all, got {n_prompts} prompts of {n}."),
            ));
        }
        let permit =
            app.admission.admit(n_prompts * n).inspect_err(|_| app.metrics.admission_rejections.increment(1))?;
        let mut streams = Vec::with_capacity(n_prompts);
        for (idx, submitted) in submit(app, requests, beams).await?.into_iter().enumerate() {
            streams.push(submitted.map(move |event| (idx, event)).boxed());
        }
        let tracker = Tracker::start(app.clone(), id, n_prompts, n, max_tokens);
        let events = match streams.pop() {
            Some(only) if streams.is_empty() => Either::Left(only),
            last => Either::Right(streams.into_iter().chain(last).collect()),
        };
        let deadline = app.config.request_timeout.map(|limit| Box::pin(tokio::time::sleep(limit)));
        Ok(Self { events, ahead: VecDeque::new(), n, n_prompts, tracker, deadline, _permit: permit })
    }

    /// The server's shared state.
    pub fn app(&self) -> &App {
        self.tracker.app()
    }

    /// Choices in all.
    pub fn n_choices(&self) -> usize {
        self.n_prompts * self.n
    }

    /// Prompts in all.
    pub fn n_prompts(&self) -> usize {
        self.n_prompts
    }

    /// Waits until there is output, without taking it: until then an error can still be a status.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn wait_for_output(&mut self) -> Result<(), ApiError> {
        while !matches!(self.ahead.back(), Some(ChoiceEvent::Delta(_))) {
            match std::future::poll_fn(|cx| self.poll_engine(cx)).await {
                Some(event) => self.ahead.push_back(event?),
                None => break,
            }
        }
        Ok(())
    }

    /// Runs to the end; `each` sees every piece of output as it comes.
    ///
    /// # Errors
    /// What the engine says.
    pub async fn collect(mut self, mut each: impl FnMut(&Delta)) -> Result<Finished, ApiError> {
        let mut finished = Finished {
            prompts: (0..self.n_prompts).map(|_| None).collect(),
            choices: (0..self.n_choices()).map(|index| Delta { index, ..Delta::default() }).collect(),
        };
        while let Some(event) = self.next().await {
            match event? {
                ChoiceEvent::Prompt(idx, prompt) => finished.prompts[idx] = Some(prompt),
                ChoiceEvent::Delta(delta) => {
                    each(&delta);
                    append(&mut finished.choices[delta.index], delta);
                }
            }
        }
        Ok(finished)
    }

    fn poll_engine(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<ChoiceEvent, ApiError>>> {
        let Poll::Ready(next) = self.events.poll_next_unpin(cx) else {
            ready!(self.deadline.as_mut().map_or(Poll::Pending, |deadline| deadline.as_mut().poll(cx)));
            self.deadline = None;
            self.tracker.fail();
            return Poll::Ready(Some(Err(ApiError::timed_out())));
        };
        let Some((prompt_idx, event)) = next else {
            return Poll::Ready(None);
        };
        Poll::Ready(Some(match event {
            Ok(Event::Prompt(prompt)) => {
                self.tracker.prompt(prompt_idx, &prompt);
                Ok(ChoiceEvent::Prompt(prompt_idx, prompt))
            }
            Ok(Event::Delta(mut delta)) => {
                delta.index += prompt_idx * self.n;
                self.tracker.delta(delta.index, &delta);
                Ok(ChoiceEvent::Delta(delta))
            }
            Err(error) => {
                tracing::warn!(%error, "a request failed");
                self.tracker.fail();
                Err(error.into())
            }
        }))
    }
}

impl Stream for Choices {
    type Item = Result<ChoiceEvent, ApiError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.ahead.pop_front() {
            Some(event) => Poll::Ready(Some(Ok(event))),
            None => self.poll_engine(cx),
        }
    }
}

async fn submit(
    app: &Arc<App>,
    requests: Vec<GenerateRequest>,
    beams: Option<BeamSearch>,
) -> Result<Vec<EventStream>, ApiError> {
    if let Some(beams) = beams {
        let searches = requests.into_iter().map(|request| beams.submit(app.backend.clone(), request));
        return Ok(searches.collect::<Result<_, _>>()?);
    }
    let submit = |app: &App, requests: Vec<GenerateRequest>| {
        requests.into_iter().map(|request| app.backend.submit(request)).collect::<Result<Vec<_>, _>>()
    };
    if requests.iter().all(|request| request.params.structured_outputs.is_none()) {
        return Ok(submit(app, requests)?);
    }
    // Grammars are compiled on a thread of their own: it can take long.
    let app = app.clone();
    let submitted = tokio::task::spawn_blocking(move || submit(&app, requests)).await;
    Ok(submitted.map_err(|error| ApiError::internal(format!("compiling a grammar failed: {error}")))??)
}

/// A request at its end.
pub struct Finished {
    /// By prompt; `None` only if the engine ended early.
    pub prompts: Vec<Option<PromptEvent>>,
    /// The whole output of each choice.
    pub choices: Vec<Delta>,
}

/// Appends `delta` to the earlier output `whole` of the same choice.
pub fn append(whole: &mut Delta, delta: Delta) {
    let Delta { index: _, text, token_ids, logprobs, finish } = delta;
    whole.text.push_str(&text);
    whole.token_ids.extend(token_ids);
    whole.logprobs.extend(logprobs);
    whole.finish = finish.or(whole.finish.take());
}

/// The engine's stop reason on the wire.
pub fn wire_stop_reason(reason: StopReason) -> openai::StopReason {
    match reason {
        StopReason::Token(id) => openai::StopReason::Token(id),
        StopReason::Text(text) => openai::StopReason::Text(text),
    }
}
