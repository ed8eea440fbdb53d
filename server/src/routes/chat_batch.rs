//! `POST /v1/chat/completions/batch`: several conversations in one request, one choice for each.

use std::sync::Arc;

use ember_common::openai::{ChatCompletion, ChatFields, SamplingFields};
use futures_util::future::try_join_all;
use hyper::Response;
use serde_json::Value;

use super::{Call, chat_completions};
use crate::{
    ApiError,
    app::{App, Body},
    json,
};

/// Most conversations of a request.
const MAX_CONVERSATIONS: usize = 1024;

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: SamplingFields = json::parse(&call.body)?;
    let mut own: ChatFields = json::parse(&call.body)?;
    refuse_unsupported(&fields, &own)?;
    let conversations = conversations(std::mem::take(&mut own.messages))?;
    let answers = conversations.into_iter().map(|messages| {
        let own = ChatFields { messages, ..own.clone() };
        chat_completions::complete(&app, &call.parts.headers, &fields, own)
    });
    json::response(&joined(try_join_all(answers).await?)?)
}

fn refuse_unsupported(fields: &SamplingFields, own: &ChatFields) -> Result<(), ApiError> {
    for (field, is_set) in [
        ("stream", fields.stream == Some(true)),
        ("n", fields.n.is_some_and(|n| n != 1)),
        ("use_beam_search", fields.use_beam_search == Some(true)),
        ("tools", own.tools.is_some()),
        // There is one place for them, and several prompts.
        ("prompt_logprobs", fields.prompt_logprobs.is_some()),
        ("return_token_ids", fields.return_token_ids == Some(true)),
        ("return_prompt_text", own.return_prompt_text == Some(true)),
    ] {
        if is_set {
            let message = format!("`{field}` is not available for several conversations; leave it out.");
            return Err(ApiError::invalid(field, message));
        }
    }
    Ok(())
}

fn conversations(lists: Vec<Value>) -> Result<Vec<Vec<Value>>, ApiError> {
    match lists.len() {
        1..=MAX_CONVERSATIONS => (),
        n => {
            let message = format!("messages must have 1 to {MAX_CONVERSATIONS} conversations, not {n}.");
            return Err(ApiError::invalid("messages", message));
        }
    }
    let conversation = |(idx, list)| match list {
        Value::Array(messages) => Ok(messages),
        _ => Err(ApiError::schema(&format!("messages.{idx}"), "expected a conversation, a list of messages")),
    };
    lists.into_iter().enumerate().map(conversation).collect()
}

/// One answer with the choices of all, in their order.
fn joined(answers: Vec<ChatCompletion>) -> Result<ChatCompletion, ApiError> {
    let usage = answers.iter().map(|answer| answer.usage.clone()).sum();
    let mut answers = answers.into_iter();
    let mut first = answers.next().ok_or_else(|| ApiError::internal("a batch without answers"))?;
    first.choices.extend(answers.flat_map(|answer| answer.choices));
    first.choices.iter_mut().enumerate().for_each(|(index, choice)| choice.index = index);
    first.usage = usage;
    Ok(first)
}
