//! [`EmbeddingEngine`]: texts to vectors, for models that do nothing else.

mod bert;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Tensor};
use serde::Deserialize;

pub use bert::{Bert, BertSpec};

use crate::{Error, models::HfConfig, text::Tokenizer, weights::safetensors::SafetensorsFolder};

/// Values of config.json's `architectures` that are embedding models.
pub const ARCHITECTURES: &[&str] = &["BertModel", "BertForMaskedLM"];
/// Most tokens that run at once.
const BATCH_TOKENS: usize = 8192;

/// How a text's hidden states become its vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    Cls,
}

/// A loaded embedding model on the CPU.
pub struct EmbeddingEngine {
    path: PathBuf,
    architecture: String,
    model: Bert,
    tokenizer: Tokenizer,
    pooling: Pooling,
    /// Whether vectors have length 1.
    normalizes: bool,
    max_model_len: usize,
}

impl EmbeddingEngine {
    /// Whether the folder `path` holds an embedding model.
    ///
    /// # Errors
    /// [`Error::Model`] if there is a config.json that cannot be read.
    pub fn is_for(path: &Path) -> Result<bool, Error> {
        if !path.join("config.json").is_file() {
            return Ok(false);
        }
        let config = HfConfig::open(&path.join("config.json"))?;
        Ok(ARCHITECTURES.contains(&config.architecture()?))
    }

    /// Loads the Hugging Face folder `path`: config.json, tokenizer.json, safetensors, and what sentence-transformers
    /// adds (modules.json, 1_Pooling/config.json, sentence_bert_config.json). Without those: mean pooling, not
    /// normalised, the context of config.json.
    ///
    /// # Errors
    /// [`Error::Model`] for missing, broken or unsupported files.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let config = HfConfig::open(&path.join("config.json"))?;
        let architecture = config.architecture()?.to_owned();
        if !ARCHITECTURES.contains(&architecture.as_str()) {
            let message =
                format!("architectures: '{architecture}' makes no embeddings; {} do", ARCHITECTURES.join(", "));
            return Err(config.error(message));
        }
        let spec = BertSpec::from_config(&config)?;
        let tokenizer = Tokenizer::from_folder(path)?;
        let longest: Option<SentenceConfig> = read_json(&path.join("sentence_bert_config.json"))?;
        let longest = longest.and_then(|config| config.max_seq_length).unwrap_or(spec.max_position);
        let max_model_len = longest.min(spec.max_position);
        let model = Bert::load(spec, &SafetensorsFolder::open(path)?, &Device::flex())?;
        Ok(Self {
            pooling: pooling(&path.join("1_Pooling/config.json"))?,
            normalizes: normalizes(&path.join("modules.json"))?,
            path: path.to_owned(),
            architecture,
            model,
            tokenizer,
            max_model_len,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Upstream name, such as `BertModel`.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Longest text in tokens.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Parameters of the model.
    pub fn n_parameters(&self) -> usize {
        self.model.spec().n_parameters()
    }

    /// Numbers of a vector.
    pub fn n_dimensions(&self) -> usize {
        self.model.spec().hidden_size
    }

    /// The vectors of `texts`, token ids with their special tokens; blocks while they are computed.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] about `input` if a text is empty, too long or has an id past the vocabulary.
    pub fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
        let vocab_size = self.model.spec().vocab_size;
        for text in texts {
            if text.is_empty() {
                return Err(Error::invalid("input", "A text has no tokens."));
            }
            if text.len() > self.max_model_len {
                let message = format!(
                    "This model's maximum context length is {} tokens, but a text has {}. Shorten it, or set truncate_prompt_tokens.",
                    self.max_model_len,
                    text.len()
                );
                return Err(Error::invalid("input", message));
            }
            if let Some(id) = text.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(Error::invalid("input", format!("Token id {id} is out of vocabulary.")));
            }
        }
        let mut vectors = Vec::with_capacity(texts.len());
        let mut rest = texts;
        while !rest.is_empty() {
            let mut n_tokens = 0;
            let fits = |text: &&Vec<u32>| {
                n_tokens += text.len();
                n_tokens <= BATCH_TOKENS
            };
            let n = rest.iter().take_while(fits).count().max(1);
            let batch: Vec<&[u32]> = rest[..n].iter().map(Vec::as_slice).collect();
            for hidden in self.model.forward(&batch) {
                vectors.push(self.pool(hidden)?);
            }
            rest = &rest[n..];
        }
        Ok(vectors)
    }

    fn pool(&self, hidden: Tensor<2>) -> Result<Vec<f32>, Error> {
        let [_, h] = hidden.dims();
        let pooled = match self.pooling {
            Pooling::Mean => hidden.mean_dim(0),
            Pooling::Cls => hidden.slice([0..1, 0..h]),
        };
        let data = pooled.try_into_data().map_err(|e| Error::Device(e.to_string()))?;
        let mut vector: Vec<f32> =
            data.try_into_vec().map_err(|e| Error::Device(format!("embeddings are not float32: {e:?}")))?;
        if self.normalizes {
            let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
            vector.iter_mut().for_each(|x| *x /= length);
        }
        Ok(vector)
    }
}

#[derive(Deserialize)]
struct SentenceConfig {
    max_seq_length: Option<usize>,
}

/// The file's content, if there is one.
fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|e| Error::model(path, format!("cannot read the file: {e}")))?;
    serde_json::from_str(&text).map(Some).map_err(|e| Error::model(path, format!("not what was expected: {e}")))
}

fn pooling(path: &Path) -> Result<Pooling, Error> {
    let modes: serde_json::Map<String, serde_json::Value> = read_json(path)?.unwrap_or_default();
    let is_on = |mode: &str| modes.get(mode).and_then(serde_json::Value::as_bool) == Some(true);
    let known = ["pooling_mode_mean_tokens", "pooling_mode_cls_token"];
    if let Some(mode) =
        modes.keys().find(|mode| mode.starts_with("pooling_mode_") && is_on(mode) && !known.contains(&mode.as_str()))
    {
        return Err(Error::model(path, format!("{mode} is not supported; mean_tokens and cls_token are")));
    }
    Ok(if is_on("pooling_mode_cls_token") { Pooling::Cls } else { Pooling::Mean })
}

fn normalizes(path: &Path) -> Result<bool, Error> {
    #[derive(Deserialize)]
    struct Module {
        #[serde(rename = "type")]
        kind: String,
    }
    let modules: Vec<Module> = read_json(path)?.unwrap_or_default();
    Ok(modules.iter().any(|module| module.kind.ends_with(".Normalize")))
}
