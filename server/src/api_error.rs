//! [`ApiError`]: a failed request as clients see it, and the one mapping from engine errors.

use std::borrow::Cow;

use bytes::Bytes;
use ember_common::{
    anthropic::{MessageError, MessageErrorResponse},
    openai::{ErrorBody, ErrorResponse},
};
use hyper::{Response, StatusCode, header};
use serde_json::value::RawValue;

use crate::app::{Body, full_body};

/// Longest rendering of an input value inside a message, in characters.
const MAX_VALUE_CHARS: usize = 200;

/// A failed request as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, also `error.code`.
    pub status: StatusCode,
    /// `error.type`.
    pub kind: &'static str,
    /// `error.message`.
    pub message: String,
    /// `error.param`: the field at fault.
    pub param: Option<Cow<'static, str>>,
}

impl ApiError {
    /// A field of the right type with a value that cannot be.
    pub fn invalid(param: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "BadRequestError",
            message: message.into(),
            param: Some(param.into()),
        }
    }

    /// A field that would change the output in a way that this server cannot.
    pub fn unsupported(param: &'static str) -> Self {
        Self::invalid(param, format!("`{param}` is not supported by this server; leave it out."))
    }

    /// A body that does not have the endpoint's shape. `field` is a dotted path.
    pub fn schema(field: &str, message: impl std::fmt::Display) -> Self {
        let param = if field.is_empty() { "body".to_owned() } else { format!("body.{field}") };
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "Bad Request",
            message: format!("1 validation error:\n  {param}: {message}"),
            param: Some(param.into()),
        }
    }

    /// A name that is not served.
    pub fn unknown_model(model: &str, served: &[String]) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            kind: "NotFoundError",
            message: format!("The model `{model}` does not exist. Valid aliases: {}", served.join(", ")),
            param: Some("model".into()),
        }
    }

    /// An endpoint that the model cannot serve.
    pub fn not_implemented(message: impl Into<String>) -> Self {
        Self { status: StatusCode::NOT_IMPLEMENTED, kind: "NotImplementedError", message: message.into(), param: None }
    }

    /// A failure of the HTTP layer itself; the status's phrase is both type and message.
    pub fn http(status: StatusCode) -> Self {
        let phrase = status.canonical_reason().unwrap_or("Error");
        Self { status, kind: phrase, message: phrase.into(), param: None }
    }

    /// The same with a message of its own.
    pub fn http_with(status: StatusCode, message: impl Into<String>) -> Self {
        Self { message: message.into(), ..Self::http(status) }
    }

    /// A request that took longer than the server lets it.
    pub fn timed_out() -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            kind: "ServiceUnavailableError",
            message: "The request took longer than this server allows (--request-timeout).".into(),
            param: None,
        }
    }

    /// A failure of the server, not of the request.
    pub fn internal(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            kind: "InternalServerError",
            message: message.into(),
            param: None,
        }
    }

    /// The same about `to` if it is about `from`: what the engine calls a field is not always what the client did.
    #[must_use]
    pub fn rename(mut self, from: &str, to: &'static str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.into());
        }
        self
    }

    /// As [`Self::rename`], in the message too.
    #[must_use]
    pub fn rename_field(mut self, from: &str, to: &'static str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.message = self.message.replacen(from, to, 1);
            self.param = Some(to.into());
        }
        self
    }

    /// Ends the message with the value that `body` has for the field at fault, as vLLM does.
    #[must_use]
    pub fn with_value_from(mut self, body: &[u8]) -> Self {
        if self.kind == "BadRequestError"
            && let Some(param) = self.param.as_deref()
            && let Ok(fields) = serde_json::from_slice::<std::collections::HashMap<String, &RawValue>>(body)
            && let Some(value) = fields.get(param)
        {
            let value: String = value.get().chars().take(MAX_VALUE_CHARS).collect();
            self.message.push_str(&format!(" (parameter={param}, value={value})"));
        }
        self
    }

    /// The JSON body.
    pub fn to_json(&self) -> Vec<u8> {
        let error = ErrorBody {
            message: self.message.clone(),
            kind: self.kind.into(),
            param: self.param.as_deref().map(str::to_owned),
            code: self.status.as_u16(),
        };
        serde_json::to_vec(&ErrorResponse { error }).expect("an error body has no map with odd keys")
    }

    /// What went wrong in Anthropic's words.
    pub fn to_anthropic(&self) -> MessageError {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
            StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "api_error",
        };
        MessageError { kind: kind.into(), message: self.message.clone() }
    }

    /// The HTTP response.
    pub fn into_response(self) -> Response<Body> {
        let body = self.to_json();
        self.response(body)
    }

    /// The HTTP response of Anthropic's endpoints.
    pub fn into_anthropic_response(self) -> Response<Body> {
        let body = MessageErrorResponse { kind: "error".into(), error: self.to_anthropic() };
        let body = serde_json::to_vec(&body).expect("an error body has no map with odd keys");
        self.response(body)
    }

    fn response(self, body: Vec<u8>) -> Response<Body> {
        let mut response = Response::builder().status(self.status).header(header::CONTENT_TYPE, "application/json");
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response = response.header(header::RETRY_AFTER, "1");
        }
        response.body(full_body(Bytes::from(body))).expect("constant header names and values are valid")
    }
}

impl From<ember_engine::Error> for ApiError {
    fn from(error: ember_engine::Error) -> Self {
        use ember_engine::Error;
        match error {
            Error::InvalidRequest { param, message } => Self::invalid(param, message),
            Error::Stopped(_) => Self { kind: "InternalServerError", ..Self::internal(error.to_string()) },
            // Paths and device details are for the log, not for clients.
            Error::Device(_) => Self::internal("The device failed while the request was running."),
            _ => Self::internal("The engine failed while the request was running."),
        }
    }
}
