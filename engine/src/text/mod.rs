//! Text to tokens and back, on the caller's side of the engine's channel.

mod chat_template;
mod detokenize;
mod gguf_tokenizer;
mod sentencepiece;
mod stop;
#[cfg(test)]
pub(crate) mod test_model;
mod tojson;
mod token_table;
mod tokenizer;
mod wordpiece;

pub use chat_template::{ChatOptions, ChatTemplate};
pub use detokenize::Detokenizer;
pub use stop::StopMatcher;
pub(crate) use token_table::TokenTable;
pub use tokenizer::Tokenizer;
