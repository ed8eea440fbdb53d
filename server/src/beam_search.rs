//! [`BeamSearch`]: the best outputs of a search instead of sampled ones. Every step asks the engine for the best next
//! tokens of each beam, as vLLM's frontend does; the prefix cache keeps that cheap.

use std::{cmp::Ordering, sync::Arc};

use ember_common::FinishReason;
use ember_engine::{Delta, Error, Event, Finish, GenerateRequest, Prompt, PromptEvent, SamplingParams, TokenLogprobs};
use futures_util::{StreamExt, future::try_join_all, stream};

use crate::{Backend, EventStream};

/// What is searched for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BeamSearch {
    /// Beams that are kept at each step, and outputs that are given back.
    pub width: u32,
    /// Scores are divided by the length to this power.
    pub length_penalty: f64,
}

/// One output as far as it has come.
#[derive(Debug, Clone, Default)]
struct Beam {
    /// One per output token.
    tokens: Vec<TokenLogprobs>,
    /// Sum of the tokens' log-probabilities.
    cumulative: f64,
    is_ended: bool,
}

impl Beam {
    fn with(&self, token: TokenLogprobs, is_ended: bool) -> Self {
        let cumulative = self.cumulative + f64::from(token.logprob);
        Self { tokens: self.tokens.iter().cloned().chain([token]).collect(), cumulative, is_ended }
    }

    fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.tokens.iter().map(|token| token.token_id)
    }
}

impl BeamSearch {
    /// Log-probabilities per position that the search needs from the engine: with the end among them there are still
    /// enough to go on with.
    fn n_candidates(self) -> u32 {
        2 * self.width
    }

    /// Better is higher. As in vLLM the prompt counts in the length, the end-of-sequence token does not.
    fn score(self, beam: &Beam, prompt_len: usize) -> f64 {
        let len = prompt_len + beam.tokens.len() - usize::from(beam.is_ended);
        beam.cumulative / (len as f64).powf(self.length_penalty)
    }

    /// The best first, at most `width`.
    fn keep_best(self, beams: &mut Vec<Beam>, prompt_len: usize) {
        beams.sort_by(|a, b| {
            self.score(b, prompt_len).partial_cmp(&self.score(a, prompt_len)).unwrap_or(Ordering::Equal)
        });
        beams.truncate(self.width as usize);
    }

    /// The events of one prompt; output comes at the end of the search, best first. Dropping it ends the search.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] if the engine does not give as many log-probabilities as the search needs.
    pub fn submit(self, backend: Arc<dyn Backend>, request: GenerateRequest) -> Result<EventStream, Error> {
        let most = backend.info().max_logprobs;
        if self.n_candidates() as usize > most {
            let message = format!("n must be at most {} with use_beam_search on this device.", most / 2);
            return Err(Error::invalid("n", message));
        }
        let Prompt::Tokens(prompt) = &request.prompt else {
            return Err(Error::invalid("prompt", "Beam search needs a prompt of token ids."));
        };
        let prompt = prompt.clone();
        let found = async move {
            match self.run(&*backend, &prompt, &request).await {
                Ok(events) => events.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            }
        };
        Ok(stream::once(found).flat_map(stream::iter).boxed())
    }

    async fn run(self, backend: &dyn Backend, prompt: &[u32], request: &GenerateRequest) -> Result<Vec<Event>, Error> {
        let params = &request.params;
        let eos_token_ids = &backend.info().eos_token_ids;
        // At least one, so that the engine says what is wrong with a prompt that is too long.
        let room = backend.info().max_model_len.saturating_sub(prompt.len()).max(1);
        let max_tokens = params.max_tokens.map_or(room, |n| room.min(n as usize));
        let mut prompt_event = None;
        let (mut beams, mut ended) = (vec![Beam::default()], Vec::new());
        for _ in 0..max_tokens {
            let next =
                try_join_all(beams.iter().map(|beam| self.next_tokens(backend, (prompt, beam), request))).await?;
            let mut grown = Vec::new();
            for (beam, (prompt, candidates)) in beams.iter().zip(next) {
                prompt_event.get_or_insert(prompt);
                for token in candidates {
                    let is_end = !params.ignore_eos && eos_token_ids.contains(&token.token_id);
                    let beam = beam.with(token, is_end);
                    if is_end { ended.push(beam) } else { grown.push(beam) }
                }
            }
            self.keep_best(&mut grown, prompt.len());
            beams = grown;
            if beams.is_empty() {
                break;
            }
        }
        ended.extend(beams);
        self.keep_best(&mut ended, prompt.len());
        let prompt = prompt_event.map(|event| Event::Prompt(PromptEvent { token_ids: prompt.into(), ..event }));
        let deltas = ended.into_iter().enumerate().map(|(index, beam)| delta(backend, params, (index, beam)));
        prompt.into_iter().map(Ok).chain(deltas.map(|delta| delta.map(Event::Delta))).collect()
    }

    /// The best tokens after `beam`, each with the log-probabilities that it is chosen from.
    async fn next_tokens(
        self,
        backend: &dyn Backend,
        (prompt, beam): (&[u32], &Beam),
        request: &GenerateRequest,
    ) -> Result<(PromptEvent, Vec<TokenLogprobs>), Error> {
        let is_first = beam.tokens.is_empty();
        let params = SamplingParams {
            max_tokens: Some(1),
            logprobs: Some(self.n_candidates()),
            prompt_logprobs: request.params.prompt_logprobs.filter(|_| is_first),
            // What ends a beam is decided here.
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let ids: Vec<u32> = prompt.iter().copied().chain(beam.ids()).collect();
        let request = GenerateRequest { prompt: Prompt::Tokens(ids), params, ..request.clone() };
        let mut events = backend.submit(request)?;
        let (mut prompt, mut candidates) = (None, Vec::new());
        while let Some(event) = events.next().await {
            match event? {
                Event::Prompt(event) => prompt = Some(event),
                Event::Delta(delta) => candidates.extend(delta.logprobs),
            }
        }
        let (Some(prompt), Some(TokenLogprobs { top, .. })) = (prompt, candidates.pop()) else {
            return Err(Error::Stopped("a step of the search gave no token".into()));
        };
        let token = |(rank, &(token_id, logprob)): (usize, &(u32, f32))| TokenLogprobs {
            token_id,
            logprob,
            rank: rank as u32 + 1,
            top: top.clone(),
        };
        Ok((prompt, top.iter().enumerate().map(token).collect()))
    }
}

/// What a request sees of `beam`.
fn delta(backend: &dyn Backend, params: &SamplingParams, (index, beam): (usize, Beam)) -> Result<Delta, Error> {
    let token_ids: Vec<u32> = beam.ids().collect();
    let shows_end = params.include_stop_str_in_output;
    let shown = &token_ids[..token_ids.len() - usize::from(beam.is_ended && !shows_end)];
    let text = backend.decode(shown, params.skip_special_tokens && !shows_end)?;
    let reason = if beam.is_ended { FinishReason::Stop } else { FinishReason::Length };
    let logprobs = params.logprobs.map(|n_top| {
        let cut =
            |token: TokenLogprobs| TokenLogprobs { top: token.top.into_iter().take(n_top as usize).collect(), ..token };
        beam.tokens.into_iter().map(cut).collect()
    });
    Ok(Delta {
        index,
        text,
        token_ids,
        logprobs: logprobs.unwrap_or_default(),
        finish: Some(Finish { reason, stop_reason: None }),
    })
}
