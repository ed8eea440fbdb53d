//! `POST /tokenize`: a text or a conversation to token ids.

use std::sync::Arc;

use ember_common::openai::{TokenizeFields, Tokenized};
use hyper::Response;

use super::Call;
use crate::{
    ApiError,
    app::{App, Body},
    json,
    prompt::{self, Chat, TextEncoding},
};

pub async fn answer(app: Arc<App>, call: Call) -> Result<Response<Body>, ApiError> {
    let fields: TokenizeFields = json::parse(&call.body)?;
    app.model_name(fields.model.as_deref())?;
    let encoding = |add_special_tokens| TextEncoding { add_special_tokens, will_be_cut: false };
    let tokens = match (fields.prompt, fields.messages) {
        (Some(text), None) => {
            prompt::encode(app.clone(), text, encoding(fields.add_special_tokens.unwrap_or(true))).await?
        }
        (None, Some(messages)) => {
            if fields.chat_template.is_some() {
                return Err(ApiError::unsupported("chat_template"));
            }
            let chat = Chat {
                messages,
                tools: fields.tools,
                documents: None,
                kwargs: app.chat_template_kwargs(fields.chat_template_kwargs),
                add_generation_prompt: fields.add_generation_prompt,
                continue_final_message: fields.continue_final_message,
            };
            let text = chat.render(&app)?;
            prompt::encode_chat(app.clone(), text, encoding(fields.add_special_tokens.unwrap_or(false))).await?
        }
        _ => return Err(ApiError::schema("", "give either `prompt` or `messages`")),
    };
    let tokens = tokens.ids;
    let token_strs = fields
        .return_token_strs
        .unwrap_or(false)
        .then(|| tokens.iter().map(|&id| app.backend.token_piece(id).unwrap_or_default()).collect());
    json::response(&Tokenized {
        count: tokens.len(),
        max_model_len: app.backend.info().max_model_len,
        tokens,
        token_strs,
    })
}
