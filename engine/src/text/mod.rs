//! Text to tokens and back.

use crate::Error;

/// placeholder
pub struct Tokenizer {}
/// placeholder
pub struct ChatTemplate {}
#[allow(missing_docs)]
impl Tokenizer {
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> { let _ = (text, add_special_tokens); unimplemented!() }
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, Error> { let _ = text; unimplemented!() }
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, Error> { let _ = (ids, skip_special_tokens); unimplemented!() }
    pub fn token_bytes(&self, id: u32) -> Vec<u8> { let _ = id; unimplemented!() }
    pub fn token_piece(&self, id: u32) -> Option<String> { let _ = id; unimplemented!() }
    pub fn vocab_size(&self) -> usize { unimplemented!() }
    pub fn byte_level(_: usize) -> Result<Self, Error> { unimplemented!() }
    pub fn from_folder(_: &std::path::Path) -> Result<Self, Error> { unimplemented!() }
    pub fn from_gguf(_: &crate::weights::gguf::Gguf) -> Result<Self, Error> { unimplemented!() }
    pub fn eos_token_ids(&self) -> &[u32] { unimplemented!() }
    pub fn bos_token_id(&self) -> Option<u32> { unimplemented!() }
}
#[allow(missing_docs)]
impl ChatTemplate {
    pub fn from_folder(_: &std::path::Path, _: &Tokenizer) -> Result<Option<Self>, Error> { unimplemented!() }
    pub fn from_gguf(_: &crate::weights::gguf::Gguf, _: &Tokenizer) -> Result<Option<Self>, Error> { unimplemented!() }
    pub fn render(&self, messages: &[serde_json::Value], options: &ChatOptions<'_>) -> Result<String, Error> { let _ = (messages, options); unimplemented!() }
}
/// What a template sees beside the messages.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions<'a> {
    /// End with the assistant's header.
    pub add_generation_prompt: bool,
    /// Leave the last message open so that it is continued.
    pub continue_final_message: bool,
    /// Tool definitions in OpenAI's shape.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Documents (`[{title, text}]`) for retrieval templates.
    pub documents: Option<&'a [serde_json::Value]>,
    /// Extra variables (`chat_template_kwargs`).
    pub kwargs: Option<&'a serde_json::Map<String, serde_json::Value>>,
}
