//! [`EmbeddingEngine`]: texts to vectors, for models that do nothing else.

mod bert;
mod bert_files;
mod decoder;
#[cfg(test)]
mod gguf_tests;
mod load;
mod pooling;
mod worker;

use std::path::{Path, PathBuf};

pub use bert::{Bert, BertSpec};
pub use bert_files::BertFiles;
#[cfg(feature = "cuda")]
pub(crate) use decoder::step as prompt_step;
use load::Loaded;
pub use pooling::{Head, Pooling};
use worker::Worker;

use crate::{EngineConfig, Error, text::Tokenizer};

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
    /// The model folder or file.
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
    /// Whether `path` holds an embedding model: a folder with an encoder, a decoder without its output projection
    /// (`LlamaModel`), or sentence-transformers' modules.json; or a GGUF file with an encoder, or with a `pooling_type`.
    ///
    /// # Errors
    /// [`Error::Model`] if there is a file that cannot be read.
    pub fn is_for(path: &Path) -> Result<bool, Error> {
        load::is_for(path)
    }

    /// Loads a Hugging Face folder (config.json, tokenizer.json, safetensors, and what sentence-transformers adds:
    /// modules.json, its pooling's config.json, sentence_bert_config.json) or a GGUF file. Where the files do not say,
    /// encoders take the mean, decoders the last token's state at length 1, as vLLM does; vectors of GGUF files are
    /// always of length 1, as llama.cpp's are. The context is the model's, unless `config` says less. Encoders run on
    /// the CPU, decoders on `config`'s device.
    ///
    /// # Errors
    /// [`Error::Model`] for missing, broken or unsupported files, [`Error::Config`] for a context that is too long,
    /// those of [`crate::executors::create`].
    pub fn load(path: &Path, config: EngineConfig) -> Result<Self, Error> {
        let Loaded { info, encoder, tokenizer, head } = load::load(path, &config)?;
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
    /// [`Error::InvalidRequest`] about `input` if a text is empty or has an id past the vocabulary, about `input_tokens` if
    /// it is too long;
    /// [`Error::Device`] and [`Error::Stopped`] if the device fails or has failed.
    pub fn embed(&self, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>, Error> {
        let EmbeddingInfo { vocab_size, max_model_len, .. } = self.info;
        for text in texts {
            if text.is_empty() {
                return Err(Error::invalid("input", "A text has no tokens."));
            }
            if text.len() > max_model_len {
                let message = format!(
                    "This model's maximum context length is {max_model_len} tokens. However, your prompt contains {} \
                     input tokens. Please shorten it, or set truncate_prompt_tokens.",
                    text.len()
                );
                return Err(Error::invalid("input_tokens", message));
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
