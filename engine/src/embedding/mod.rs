//! [`EmbeddingEngine`]: texts to vectors, for models that do nothing else.

mod bert;
mod decoder;
mod pooling;
mod worker;

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::Device;

pub use bert::{Bert, BertSpec};
use decoder::DecoderEncoder;
#[cfg(feature = "cuda")]
pub(crate) use decoder::step as prompt_step;
pub use pooling::{Head, Pooling};
use worker::Worker;

use crate::{
    EngineConfig, Error, executors,
    models::{self, HfConfig, Model},
    text::Tokenizer,
    weights::safetensors::SafetensorsFolder,
};

/// Values of config.json's `architectures` that are encoders.
const ENCODERS: &[&str] = &["BertModel", "BertForMaskedLM"];
/// Most tokens that run at once on the CPU.
const BATCH_TOKENS: usize = 8192;

/// A model that turns token ids into vectors.
trait Encoder: Send {
    /// The vectors of `texts`, none of them empty or longer than the model's context, with ids of its vocabulary.
    ///
    /// # Errors
    /// [`Error::Device`]; the encoder must not be used again after it.
    fn encode(&mut self, texts: &[&[u32]], pooling: Pooling) -> Result<Vec<Vec<f32>>, Error>;
}

/// What was loaded.
#[derive(Debug, Clone)]
pub struct EmbeddingInfo {
    /// The model folder.
    pub path: PathBuf,
    /// Upstream name, such as `BertModel`.
    pub architecture: String,
    /// Parameters of the model.
    pub n_parameters: usize,
    /// Stored element type of most weights.
    pub file_dtype: String,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Numbers of a vector.
    pub n_dimensions: usize,
    /// Longest text in tokens.
    pub max_model_len: usize,
    /// Most tokens that run at once.
    pub max_num_batched_tokens: usize,
    /// Device, element type and memory plan, in one line.
    pub executor: String,
}

/// A loaded embedding model.
pub struct EmbeddingEngine {
    info: EmbeddingInfo,
    tokenizer: Tokenizer,
    head: Head,
    worker: Worker,
}

impl EmbeddingEngine {
    /// Whether the folder `path` holds an embedding model: an encoder, a decoder without its output projection
    /// (`LlamaModel`), or one with sentence-transformers' modules.json.
    ///
    /// # Errors
    /// [`Error::Model`] if there is a config.json that cannot be read.
    pub fn is_for(path: &Path) -> Result<bool, Error> {
        if !path.join("config.json").is_file() {
            return Ok(false);
        }
        let config = HfConfig::open(&path.join("config.json"))?;
        let name = config.architecture()?;
        let is_bare = models::generating_name(name).is_some();
        Ok(ENCODERS.contains(&name) || is_bare || path.join("modules.json").is_file())
    }

    /// Loads the Hugging Face folder `path`: config.json, tokenizer.json, safetensors, and what sentence-transformers
    /// adds (modules.json, its pooling's config.json, sentence_bert_config.json). Without those, encoders take the mean,
    /// decoders the last token's state at length 1, as vLLM does; the context is that of config.json. Encoders run on
    /// the CPU, decoders on `config`'s device.
    ///
    /// # Errors
    /// [`Error::Model`] for missing, broken or unsupported files, those of [`executors::create`].
    pub fn load(path: &Path, config: EngineConfig) -> Result<Self, Error> {
        if !path.join("config.json").is_file() {
            return Err(Error::model(
                path,
                "no config.json; embedding models are read from Hugging Face folders alone",
            ));
        }
        let hf_config = HfConfig::open(&path.join("config.json"))?;
        let is_encoder = ENCODERS.contains(&hf_config.architecture()?);
        let (mut info, encoder, tokenizer) =
            if is_encoder { load_encoder(path, &hf_config)? } else { load_decoder(path, &hf_config, &config)? };
        let head = Head::from_folder(path)?.unwrap_or(match is_encoder {
            true => Head { pooling: Pooling::Mean, normalizes: false },
            false => Head { pooling: Pooling::Last, normalizes: true },
        });
        let longest: Option<SentenceConfig> = read_json(&path.join("sentence_bert_config.json"))?;
        if let Some(longest) = longest.and_then(|config| config.max_seq_length) {
            info.max_model_len = info.max_model_len.min(longest);
        }
        let worker = Worker::new(encoder, head.pooling, info.max_num_batched_tokens)?;
        Ok(Self { info, tokenizer, head, worker })
    }

    /// What was loaded.
    pub fn info(&self) -> &EmbeddingInfo {
        &self.info
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// False once the device has failed.
    pub fn is_healthy(&self) -> bool {
        self.worker.is_running()
    }

    /// The vectors of `texts`, token ids with their special tokens; blocks while they are computed, together with those
    /// of other calls.
    ///
    /// # Errors
    /// [`Error::InvalidRequest`] about `input` if a text is empty, too long or has an id past the vocabulary;
    /// [`Error::Device`] and [`Error::Stopped`] if the device fails or has failed.
    pub fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
        let EmbeddingInfo { vocab_size, max_model_len, .. } = self.info;
        for text in texts {
            if text.is_empty() {
                return Err(Error::invalid("input", "A text has no tokens."));
            }
            if text.len() > max_model_len {
                let message = format!(
                    "This model's maximum context length is {max_model_len} tokens, but a text has {}. Shorten it, or \
                     set truncate_prompt_tokens.",
                    text.len()
                );
                return Err(Error::invalid("input", message));
            }
            if let Some(id) = text.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(Error::invalid("input", format!("Token id {id} is out of vocabulary.")));
            }
        }
        let mut vectors = self.worker.embed(texts.to_vec())?;
        if self.head.normalizes {
            for vector in &mut vectors {
                let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
                vector.iter_mut().for_each(|x| *x /= length);
            }
        }
        Ok(vectors)
    }
}

type Loaded = (EmbeddingInfo, Box<dyn Encoder>, Tokenizer);

fn load_encoder(path: &Path, config: &HfConfig) -> Result<Loaded, Error> {
    let spec = BertSpec::from_config(config)?;
    let tokenizer = Tokenizer::from_folder(path)?;
    let info = EmbeddingInfo {
        path: path.to_owned(),
        architecture: config.architecture()?.to_owned(),
        n_parameters: spec.n_parameters(),
        file_dtype: "F32".into(),
        vocab_size: spec.vocab_size,
        n_dimensions: spec.hidden_size,
        max_model_len: spec.max_position,
        max_num_batched_tokens: BATCH_TOKENS,
        executor: format!("device cpu, float32, embeddings of {} dimensions", spec.hidden_size),
    };
    let model = Bert::load(spec, &SafetensorsFolder::open(path)?, &Device::flex())?;
    Ok((info, Box::new(model), tokenizer))
}

fn load_decoder(path: &Path, hf_config: &HfConfig, config: &EngineConfig) -> Result<Loaded, Error> {
    if hf_config.optional_flag("is_causal")? == Some(false) {
        return Err(hf_config.error("'is_causal' is false: decoders that look ahead are not supported"));
    }
    let model = Model::open_headless(path, config.load_format, config.seed)?;
    let executor = executors::create(&model.spec, &*model.weights, config)?;
    let capacity = executor.capacity();
    let info = EmbeddingInfo {
        path: path.to_owned(),
        architecture: model.spec.architecture.clone(),
        n_parameters: model.spec.n_parameters(),
        file_dtype: model.file_dtype,
        vocab_size: model.spec.vocab_size,
        n_dimensions: model.spec.hidden_size,
        max_model_len: capacity.max_model_len,
        max_num_batched_tokens: capacity.max_num_batched_tokens,
        executor: format!("{}, embeddings of {} dimensions", executor.describe(), model.spec.hidden_size),
    };
    Ok((info, Box::new(DecoderEncoder::new(executor, model.spec.hidden_size)), model.tokenizer))
}

#[derive(serde::Deserialize)]
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
