//! Grammars that an output must follow, on `llguidance`: which tokens may come next.
//!
//! A request's [`StructuredOutputs`] are compiled once, on the caller's side; each of its sequences gets a [`Grammar`]
//! of its own, which takes in every sampled token. For the next one it makes a [`TokenMask`], computed only when the
//! sampler asks: on the CPU that is in parallel over the rows of a step, and an executor that samples on a device can
//! ask while the device still runs the forward pass.

mod gbnf;

use std::{
    fmt,
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock},
};

use llguidance::{
    Matcher, ParserFactory,
    api::TopLevelGrammar,
    toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie},
};
use serde_json::{Value, json};

use crate::{
    Error,
    engine::lock,
    text::{TokenTable, Tokenizer},
};

/// Between two JSON tokens if the request does not say otherwise: any whitespace, but not endless.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";
/// Compiled grammars kept for requests that ask for the same again.
const CACHE_SIZE: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");
/// Longest error message of a grammar's compiler, in characters.
const MAX_MESSAGE_CHARS: usize = 400;

/// What an output must look like.
#[derive(Debug, Clone, PartialEq)]
pub struct StructuredOutputs {
    /// The form.
    pub form: OutputForm,
    /// Only for JSON: no whitespace between its tokens.
    pub disable_any_whitespace: bool,
    /// Only for JSON schemas: objects have no properties but those that are named.
    pub disable_additional_properties: bool,
    /// Only for JSON: a regular expression of what may be between its tokens.
    pub whitespace_pattern: Option<String>,
    /// The output is free up to and including this token, such as the one that ends a reasoning part.
    pub begins_after: Option<u32>,
}

/// The form of an output.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputForm {
    /// JSON of this schema.
    JsonSchema(Value),
    /// A JSON object.
    JsonObject,
    /// A text that the regular expression matches in full.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's or GBNF's notation.
    Grammar(String),
}

impl From<OutputForm> for StructuredOutputs {
    fn from(form: OutputForm) -> Self {
        Self {
            form,
            disable_any_whitespace: false,
            disable_additional_properties: false,
            whitespace_pattern: None,
            begins_after: None,
        }
    }
}

impl StructuredOutputs {
    fn to_llguidance(&self) -> Result<TopLevelGrammar, String> {
        let json = |mut schema: Value| {
            if self.disable_additional_properties {
                close_objects(&mut schema);
            }
            if let Value::Bool(true) = schema {
                schema = json!({});
            }
            let Value::Object(fields) = &mut schema else {
                return Err("a JSON schema is an object".to_owned());
            };
            let options = match &self.whitespace_pattern {
                _ if self.disable_any_whitespace => json!({"whitespace_flexible": false}),
                Some(pattern) => json!({"whitespace_pattern": pattern}),
                None => json!({"whitespace_pattern": WHITESPACE}),
            };
            fields.insert("x-guidance".into(), options);
            Ok(TopLevelGrammar::from_json_schema(schema))
        };
        match &self.form {
            OutputForm::JsonSchema(schema) => json(schema.clone()),
            OutputForm::JsonObject => json(json!({"type": "object"})),
            OutputForm::Regex(pattern) => Ok(TopLevelGrammar::from_regex(pattern)),
            OutputForm::Choice(texts) if texts.is_empty() => Err("there must be at least one choice".into()),
            OutputForm::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | "))))
            }
            OutputForm::Grammar(text) if gbnf::is_gbnf(text) => {
                gbnf::to_lark(text).map(TopLevelGrammar::from_lark).map_err(|message| format!("GBNF: {message}"))
            }
            OutputForm::Grammar(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
        }
    }
}

/// Adds `"additionalProperties": false` to every object schema that names properties.
fn close_objects(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.values_mut().for_each(close_objects);
            if fields.get("properties").is_some_and(Value::is_object) {
                fields.entry("additionalProperties").or_insert(Value::Bool(false));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close_objects),
        _ => {}
    }
}

/// Compiles grammars for one tokenizer.
pub struct GrammarCompiler {
    vocabulary: Vocabulary,
    /// Made at the first grammar: servers that see none need no trie of the vocabulary.
    factory: OnceLock<Result<ParserFactory, String>>,
    /// The latest last.
    cache: Mutex<Vec<(StructuredOutputs, Matcher)>>,
}

/// What a trie is made of.
struct Vocabulary {
    table: Arc<TokenTable>,
    eos_token_ids: Vec<u32>,
}

impl GrammarCompiler {
    /// A compiler for `tokenizer`'s tokens, with `eos_token_ids` as the ends of an output.
    pub fn new(tokenizer: &Tokenizer, eos_token_ids: &[u32]) -> Self {
        Self {
            vocabulary: Vocabulary { table: tokenizer.table().clone(), eos_token_ids: eos_token_ids.to_vec() },
            factory: OnceLock::new(),
            cache: Mutex::new(Vec::new()),
        }
    }

    /// Compiles what `outputs` says; takes milliseconds, for large schemas more.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] for a form that is wrong or not supported.
    pub fn compile(&self, outputs: &StructuredOutputs) -> Result<Grammar, Error> {
        let known = lock(&self.cache).iter().find(|(known, _)| known == outputs).map(|(_, matcher)| matcher.clone());
        let matcher = match known {
            Some(matcher) => matcher,
            None => {
                let matcher = self.compile_anew(outputs).map_err(|message| {
                    let message: String = message.chars().take(MAX_MESSAGE_CHARS).collect();
                    Error::invalid("structured_outputs", format!("The output's form cannot be used: {message}"))
                })?;
                let mut cache = lock(&self.cache);
                if cache.len() == CACHE_SIZE.get() {
                    cache.remove(0);
                }
                cache.push((outputs.clone(), matcher.clone()));
                matcher
            }
        };
        // A copy that shares nothing: threads that mask at the same time must not wait for each other.
        Ok(Grammar::new(matcher.deep_clone(), outputs.begins_after))
    }

    fn compile_anew(&self, outputs: &StructuredOutputs) -> Result<Matcher, String> {
        let grammar = outputs.to_llguidance()?;
        let factory = self.factory.get_or_init(|| self.vocabulary.factory()).as_ref().map_err(Clone::clone)?;
        let matcher = Matcher::new(factory.create_parser(grammar));
        match matcher.get_error() {
            Some(error) => Err(error),
            None => Ok(matcher),
        }
    }
}

impl Vocabulary {
    fn factory(&self) -> Result<ParserFactory, String> {
        let n_tokens = self.table.len() as u32;
        let mut eos_token_ids: Vec<u32> = self.eos_token_ids.iter().copied().filter(|&id| id < n_tokens).collect();
        // So marked, no text matches a token.
        let marked = |bytes: &[u8]| [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat();
        let word = |id: u32| match self.table.is_special(id) || eos_token_ids.contains(&id) {
            true => marked(self.table.bytes(id)),
            false => self.table.bytes(id).to_vec(),
        };
        let mut words: Vec<Vec<u8>> = (0..n_tokens).map(word).collect();
        if eos_token_ids.is_empty() {
            // One past the vocabulary, so that it is never sampled.
            words.push(marked(b"<end>"));
            eos_token_ids.push(n_tokens);
        }
        let info = TokRxInfo::new(words.len() as u32, eos_token_ids[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos_token_ids);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(|error| error.to_string())?;
        factory.quiet().limits_mut().verbose_errors = false;
        Ok(factory)
    }
}

/// The state of one sequence's grammar. Clones share it.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<State>>);

struct State {
    matcher: Matcher,
    /// The output is free until this token has come.
    begins_after: Option<u32>,
}

impl Grammar {
    fn new(matcher: Matcher, begins_after: Option<u32>) -> Self {
        Self(Arc::new(Mutex::new(State { matcher, begins_after })))
    }

    /// A copy in the same state that shares nothing.
    #[must_use]
    pub fn fork(&self) -> Self {
        let state = lock(&self.0);
        Self::new(state.matcher.deep_clone(), state.begins_after)
    }

    /// Takes in a token of the output and says whether the grammar ends with it.
    ///
    /// # Errors
    /// If the grammar does not allow the token or has become too complex; it must not be used any more.
    pub fn push(&self, token: u32) -> Result<bool, String> {
        let mut state = lock(&self.0);
        if let Some(begin) = state.begins_after {
            state.begins_after = (token != begin).then_some(begin);
            return Ok(false);
        }
        state.matcher.consume_token(token).map_err(|error| error.to_string())?;
        Ok(state.matcher.is_stopped())
    }

    /// The mask of the next token.
    pub fn mask(&self) -> TokenMask {
        TokenMask { grammar: Some(self.clone()), bits: OnceLock::new() }
    }

    /// Bit `id % 32` of word `id / 32` for each token that may come next; empty if all may.
    fn compute_mask(&self) -> Vec<u32> {
        let mut state = lock(&self.0);
        if state.begins_after.is_some() {
            return Vec::new();
        }
        match state.matcher.compute_mask_or_eos() {
            Ok(mask) => mask.as_slice().to_vec(),
            // The matcher keeps the error and says it when the next token is pushed.
            Err(_) => Vec::new(),
        }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Grammar")
    }
}

/// The tokens that a grammar allows next, computed when they are first asked for.
#[derive(Debug)]
pub struct TokenMask {
    /// Whose next tokens these are; `None` if the bits are given.
    grammar: Option<Grammar>,
    bits: OnceLock<Vec<u32>>,
}

impl TokenMask {
    /// A mask of these [`Self::bits`].
    pub fn of_bits(bits: Vec<u32>) -> Self {
        Self { grammar: None, bits: OnceLock::from(bits) }
    }

    /// A mask that allows token `id` alone.
    pub fn only(id: u32) -> Self {
        let mut bits = vec![0; id as usize / 32 + 1];
        bits[id as usize / 32] = 1 << (id % 32);
        Self::of_bits(bits)
    }

    /// Bit `id % 32` of word `id / 32` for each token that may come next. Tokens past its end may not; an empty mask
    /// allows all.
    pub fn bits(&self) -> &[u32] {
        self.bits.get_or_init(|| self.grammar.as_ref().map(Grammar::compute_mask).unwrap_or_default())
    }

    /// Whether token `id` may come next.
    pub fn allows(&self, id: u32) -> bool {
        let bits = self.bits();
        bits.is_empty() || bits.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }
}

#[cfg(test)]
mod tests;
