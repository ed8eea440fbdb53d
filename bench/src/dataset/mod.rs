//! Owns the table of datasets and what they have in common: reading, length filter, order. One file per dataset.

mod custom;
mod line_by_line;
mod longalpaca;
mod openqa;
mod random;

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::{Error, Result, synthetic};

/// Every dataset that `--dataset` knows, by name.
pub const TABLE: &[&dyn Dataset] =
    &[&custom::Custom, &line_by_line::LineByLine, &longalpaca::LongAlpaca, &openqa::OpenQa, &random::Random];

/// A source of prompts.
pub trait Dataset: Sync + Send {
    /// Value of `--dataset`.
    fn name(&self) -> &'static str;

    /// What a file of it looks like, for error messages.
    fn format(&self) -> &'static str;

    /// It sends token ids, which need a raw completions endpoint.
    fn sends_token_ids(&self) -> bool {
        false
    }

    /// The generator of files of this format; None if there is none.
    fn synthetic(&self) -> Option<&'static synthetic::Kind> {
        None
    }

    /// The prompts of a file's text, in order.
    ///
    /// # Errors
    /// The line (from 1) that is wrong, and how.
    fn parse(&self, text: &str) -> Result<Vec<Prompt>, (usize, String)>;

    /// Makes `n` samples without a file; None if the dataset comes from files.
    fn generate(&self, n: usize, options: &DataOptions) -> Option<Result<Vec<Sample>>> {
        let _ = (n, options);
        None
    }
}

/// The dataset called `name`.
///
/// # Errors
/// If there is none: the error lists those that exist.
pub fn find(name: &str) -> Result<&'static dyn Dataset> {
    TABLE.iter().copied().find(|dataset| dataset.name() == name).ok_or_else(|| {
        let names: Vec<&str> = TABLE.iter().map(|dataset| dataset.name()).collect();
        Error::flag("--dataset", format!("no dataset {name:?}; there are {}", names.join(", ")))
    })
}

/// What a request asks.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// One user message, or the raw prompt.
    Text(String),
    /// A JSON array of chat messages.
    Messages(Value),
    TokenIds(Vec<u32>),
    /// A whole request body: its fields win over the flags.
    Body(Map<String, Value>),
}

/// A prompt, and the answer length that goes with it where the dataset decides it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub prompt: Prompt,
    /// Exact number of tokens to generate.
    pub output_tokens: Option<u32>,
}

/// What the flags say about prompts.
#[derive(Default)]
pub struct DataOptions {
    pub path: Option<PathBuf>,
    /// The same prompt for all requests, in place of a dataset.
    pub prompt: Option<String>,
    pub min_prompt_length: usize,
    pub max_prompt_length: usize,
    pub tokenizer: Option<Tokenizer>,
    pub random_vocab_size: Option<u32>,
    pub length_distribution: String,
    pub seed: u64,
    /// Bounds of `--max-tokens`, if given.
    pub max_tokens: Option<(u32, u32)>,
    pub min_tokens: Option<u32>,
}

/// The prompts of a run and where they come from.
#[derive(Debug)]
pub struct Loaded {
    /// Never empty; taken in order and from the start again when they run out.
    pub samples: Vec<Sample>,
    pub path: Option<PathBuf>,
    pub synthetic: bool,
}

/// Loads at least `n` prompts where the dataset can make as many; a file gives what it has.
///
/// # Errors
/// If the file cannot be read, is of the wrong format, or no prompt passes the length filter; for a generator, if too
/// few do.
pub fn load(dataset: &dyn Dataset, n: usize, options: &DataOptions) -> Result<Loaded> {
    if let Some(text) = &options.prompt {
        let samples = vec![Sample { prompt: Prompt::Text(text.clone()), output_tokens: None }];
        return Ok(Loaded { samples, path: None, synthetic: false });
    }
    if let Some(samples) = dataset.generate(n, options) {
        return Ok(Loaded { samples: samples?, path: None, synthetic: true });
    }
    if let Some(path) = &options.path {
        let samples = read(dataset, path, options)?;
        if samples.is_empty() {
            return Err(Error::NoPrompts {
                source_name: path.display().to_string(),
                min: options.min_prompt_length,
                max: options.max_prompt_length,
                unit: if options.tokenizer.is_some() { "tokens" } else { "characters (tokens with --tokenizer-path)" },
            });
        }
        return Ok(Loaded { samples, path: Some(path.clone()), synthetic: false });
    }
    let Some(kind) = dataset.synthetic() else {
        let message = format!("--dataset {} needs a file of {}", dataset.name(), dataset.format());
        return Err(Error::flag("--dataset-path", message));
    };
    let mut path = synthetic::cached_file(kind, n, options.seed)?;
    let mut samples = read(dataset, &path, options)?;
    if samples.len() < n {
        // The limits keep few rows. Prompts that repeat would be answered from a server's prefix cache.
        let keeps = |text: &str| keeps(&Prompt::Text(text.trim().to_owned()), options);
        let filter = synthetic::Filter { tag: limits_tag(options)?, keeps: &keeps };
        path = synthetic::filtered_file(kind, n, options.seed, &filter)?;
        samples = read(dataset, &path, options)?;
    }
    Ok(Loaded { samples, path: Some(path), synthetic: true })
}

/// The length limits, for file names.
fn limits_tag(options: &DataOptions) -> Result<String> {
    let unit = match &options.tokenizer {
        None => "chars".to_owned(),
        Some(tokenizer) => {
            let text = tokenizer.to_string(false);
            let text = text.map_err(|error| Error::flag("--tokenizer-path", error.to_string()))?;
            let mut hasher = DefaultHasher::new();
            text.hash(&mut hasher);
            format!("tokens{:016x}", hasher.finish())
        }
    };
    Ok(format!("{}to{}{unit}", options.min_prompt_length, options.max_prompt_length))
}

/// The prompts of a file that the length filter keeps.
fn read(dataset: &dyn Dataset, path: &Path, options: &DataOptions) -> Result<Vec<Sample>> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let wrong = |line, message| Error::DatasetFormat {
        path: path.to_owned(),
        line,
        message,
        dataset: dataset.name(),
        expected: dataset.format(),
    };
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        wrong(valid.iter().filter(|&&byte| byte == b'\n').count() + 1, "not UTF-8 text".into())
    })?;
    let prompts = dataset.parse(&text).map_err(|(line, message)| wrong(line, message))?;
    let mut samples = Vec::new();
    for prompt in prompts {
        if keeps(&prompt, options)? {
            samples.push(Sample { prompt, output_tokens: None });
        }
    }
    Ok(samples)
}

/// Whether the length filter keeps a prompt. Whole bodies are sent as they are, whatever their length.
fn keeps(prompt: &Prompt, options: &DataOptions) -> Result<bool> {
    let Some(text) = prompt_text(prompt) else {
        return Ok(true);
    };
    let range = options.min_prompt_length..=options.max_prompt_length;
    let length = match &options.tokenizer {
        Some(tokenizer) => count_tokens(tokenizer, &text)?,
        None => text.chars().count(),
    };
    Ok(range.contains(&length))
}

/// The text of a prompt; None for token ids and whole bodies.
fn prompt_text(prompt: &Prompt) -> Option<Cow<'_, str>> {
    match prompt {
        Prompt::Text(text) => Some(text.into()),
        Prompt::Messages(messages) => {
            let contents = messages.as_array()?.iter().filter_map(|message| message.get("content")?.as_str());
            Some(contents.collect::<Vec<_>>().join("\n").into())
        }
        Prompt::TokenIds(_) | Prompt::Body(_) => None,
    }
}

/// Number of prompt tokens, without those that the server's chat template adds.
pub fn prompt_tokens(prompt: &Prompt, tokenizer: &Tokenizer) -> Option<i64> {
    let n_tokens = match prompt {
        Prompt::TokenIds(ids) => ids.len(),
        prompt => count_tokens(tokenizer, &prompt_text(prompt)?).ok()?,
    };
    Some(n_tokens as i64)
}

/// Number of tokens of a text, without special tokens.
///
/// # Errors
/// If the tokenizer refuses the text.
pub fn count_tokens(tokenizer: &Tokenizer, text: &str) -> Result<usize> {
    let encoding = tokenizer.encode_fast(text, false);
    let encoding = encoding.map_err(|error| Error::flag("--tokenizer-path", error.to_string()))?;
    Ok(encoding.len())
}

/// Loads `--tokenizer-path`: a tokenizer.json, or a folder that has one.
///
/// # Errors
/// If there is none or it cannot be read.
pub fn load_tokenizer(path: &Path) -> Result<Tokenizer> {
    let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
    Tokenizer::from_file(&file).map_err(|error| Error::Tokenizer { path: file, message: error.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_sorted_and_unique() {
        assert!(TABLE.windows(2).all(|pair| pair[0].name() < pair[1].name()));
        assert!(find("alpaca").err().unwrap().to_string().contains("longalpaca, openqa"));
    }

    fn load_text(name: &str, text: &str, change: impl FnOnce(&mut DataOptions)) -> Result<Loaded> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, text).unwrap();
        let mut options = DataOptions { path: Some(path), max_prompt_length: 100, ..Default::default() };
        change(&mut options);
        load(find(name).unwrap(), 10, &options)
    }

    #[test]
    fn wrong_files_are_refused_with_file_line_and_format() {
        let check = |name: &str, text: &str, line: usize, parts: &[&str]| {
            let message = load_text(name, text, |_| {}).unwrap_err().to_string();
            assert!(message.contains(&format!("/data:{line}: ")), "{message}");
            for part in parts.iter().chain(&["expects", name]) {
                assert!(message.contains(part), "{message:?} lacks {part:?}");
            }
        };
        check("openqa", "{\"question\":\"a\"}\n\n{\"instruction\":\"b\"}\n", 3, &["question", "JSON object a line"]);
        check("openqa", "[\n{\"question\":\"a\"}]", 1, &["JSON object a line"]);
        check("openqa", "not json\n", 1, &[]);
        check("longalpaca", "{\"instruction\":\"a\"}\n{\"instruction\":\"b\"}\n", 1, &["array", "instruction"]);
        check("longalpaca", "[{\"instruction\":\"a\"},\n {\"question\":\"b\"}]", 2, &["row 2", "instruction"]);
        check("longalpaca", "[{\"instruction\":\"a\"},\n", 2, &[]);
        check("line_by_line", "plain\n{\"broken\": \n", 2, &["JSON"]);
        check("line_by_line", "[1, 2]\n", 1, &["messages"]);
    }

    #[test]
    fn bytes_that_are_not_text_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, b"ok\n\xff\xfe\n").unwrap();
        let options = DataOptions { path: Some(path), max_prompt_length: 100, ..Default::default() };
        let message = load(find("custom").unwrap(), 1, &options).unwrap_err().to_string();
        assert!(message.contains("/data:2: not UTF-8 text"), "{message}");
    }

    #[test]
    fn the_length_filter_counts_characters_and_includes_its_bounds() {
        let loaded = load_text("custom", "你\n你好\n你好吗\n你好世界\n", |options| {
            (options.min_prompt_length, options.max_prompt_length) = (2, 3);
        })
        .unwrap();
        let texts: Vec<_> = loaded.samples.iter().map(|sample| sample.prompt.clone()).collect();
        assert_eq!(texts, [Prompt::Text("你好".into()), Prompt::Text("你好吗".into())]);
        assert!(!loaded.synthetic);
        let message = load_text("custom", "abc\n", |options| options.max_prompt_length = 1).unwrap_err().to_string();
        assert!(message.contains("--max-prompt-length 1 characters"), "{message}");
    }

    #[test]
    fn a_missing_file_or_path_is_named() {
        let options = DataOptions { path: Some("/nowhere/x.jsonl".into()), ..Default::default() };
        let message = load(find("openqa").unwrap(), 1, &options).unwrap_err().to_string();
        assert!(message.contains("/nowhere/x.jsonl"), "{message}");
        let message = load(find("custom").unwrap(), 1, &DataOptions::default()).unwrap_err().to_string();
        assert!(message.starts_with("--dataset-path: "), "{message}");
    }

    #[test]
    fn one_prompt_can_stand_for_all() {
        let options = DataOptions { prompt: Some("hi".into()), ..Default::default() };
        let loaded = load(find("openqa").unwrap(), 5, &options).unwrap();
        assert_eq!(loaded.samples, [Sample { prompt: Prompt::Text("hi".into()), output_tokens: None }]);
    }
}
