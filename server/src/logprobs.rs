//! The engine's log-probabilities in their wire shapes.

use ember_common::openai::{
    ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, MIN_LOGPROB, OrderedMap, PromptLogprob, PromptLogprobs,
    TopLogprob,
};
use ember_engine::{SamplingParams, TokenLogprobs};

use crate::Backend;

/// How tokens are shown.
#[derive(Clone, Copy)]
pub struct TokenNames<'a> {
    /// Knows the tokens' bytes.
    pub backend: &'a dyn Backend,
    /// Show `token_id:N` instead of text.
    pub as_ids: bool,
}

impl TokenNames<'_> {
    fn name(&self, id: u32) -> String {
        if self.as_ids { format!("token_id:{id}") } else { self.text(id) }
    }

    fn text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.backend.token_bytes(id)).into_owned()
    }

    fn candidate(&self, (id, logprob): (u32, f32)) -> TopLogprob {
        TopLogprob {
            token: self.name(id),
            logprob: logprob.max(MIN_LOGPROB),
            bytes: Some(self.backend.token_bytes(id)),
        }
    }
}

/// Candidates shown of each token of an output, the sampled one first; `None` if there are no log-probabilities.
pub fn n_shown(params: &SamplingParams) -> Option<usize> {
    // Chosen tokens are shown whatever the number of best ones.
    params.n_logprobs().map(|n| if params.logprob_token_ids.is_empty() { n } else { n + 1 })
}

/// The sampled token, then the best others.
fn candidates(token: &TokenLogprobs) -> impl Iterator<Item = (u32, f32)> {
    let others = token.top.iter().copied().filter(|&(id, _)| id != token.token_id);
    std::iter::once((token.token_id, token.logprob)).chain(others)
}

/// A chat choice's tokens with `n_top` candidates each.
pub fn chat(names: TokenNames<'_>, tokens: &[TokenLogprobs], n_top: usize) -> ChatLogprobs {
    let content = tokens.iter().map(|token| {
        let TopLogprob { token: name, logprob, bytes } = names.candidate((token.token_id, token.logprob));
        let top_logprobs = candidates(token).take(n_top).map(|candidate| names.candidate(candidate)).collect();
        ChatTokenLogprob { token: name, logprob, bytes, top_logprobs }
    });
    ChatLogprobs { content: content.collect() }
}

/// Appends tokens of a completion choice, each with up to `n_top + 1` candidates. `offset` is the
/// length of the choice's text so far in characters. Only the first token of an echoed prompt
/// has no log-probability.
pub fn push_completion(
    names: TokenNames<'_>,
    out: &mut CompletionLogprobs,
    offset: &mut usize,
    tokens: impl Iterator<Item = (u32, Option<TokenLogprobs>)>,
    n_top: usize,
) {
    for (id, token) in tokens {
        let name = names.name(id);
        out.text_offset.push(*offset);
        *offset += name.chars().count();
        out.tokens.push(name);
        out.token_logprobs.push(token.as_ref().map(|token| token.logprob.max(MIN_LOGPROB)));
        out.top_logprobs.push(token.map(|token| {
            candidates(&token).take(n_top + 1).map(|(id, lp)| (names.name(id), lp.max(MIN_LOGPROB))).collect()
        }));
    }
}

/// A prompt's tokens; candidates by id.
pub fn prompt(names: TokenNames<'_>, tokens: &[Option<TokenLogprobs>]) -> PromptLogprobs {
    let entry = |token: &TokenLogprobs| -> OrderedMap<PromptLogprob> {
        let best = token.top.iter().zip(1..).map(|(&(id, logprob), rank)| (id, logprob, rank));
        std::iter::once((token.token_id, token.logprob, token.rank))
            .chain(best.filter(|&(id, ..)| id != token.token_id))
            .map(|(id, logprob, rank)| {
                let decoded_token = names.text(id);
                (id.to_string(), PromptLogprob { logprob: logprob.max(MIN_LOGPROB), rank, decoded_token })
            })
            .collect()
    };
    tokens.iter().map(|token| token.as_ref().map(entry)).collect()
}
