//! Reads embedding models from disk: Hugging Face folders and GGUF files.

use std::{fs, path::Path};

use burn::tensor::Device;

use super::{BATCH_TOKENS, Bert, BertFiles, BertSpec, EmbeddingInfo, Encoder, Head, Pooling, decoder::DecoderEncoder};
use crate::{
    EngineConfig, Error, executors,
    models::{self, HfConfig, Location, Model},
    text::Tokenizer,
    weights::{gguf::Gguf, safetensors::SafetensorsFolder},
};

/// Values of config.json's `architectures` that are encoders.
const ENCODERS: &[&str] = &["BertModel", "BertForMaskedLM"];
/// The same of GGUF's `general.architecture`.
const GGUF_ENCODER: &str = "bert";

/// A model that was read.
pub(super) struct Loaded {
    pub(super) info: EmbeddingInfo,
    pub(super) encoder: Box<dyn Encoder>,
    pub(super) tokenizer: Tokenizer,
    pub(super) head: Head,
}

/// See [`super::EmbeddingEngine::is_for`].
pub(super) fn is_for(path: &Path) -> Result<bool, Error> {
    match models::locate(path) {
        Ok(Location::Folder) => {
            let config = HfConfig::open(&path.join("config.json"))?;
            let name = config.architecture()?;
            let is_bare = models::generating_name(name).is_some();
            Ok(ENCODERS.contains(&name) || is_bare || path.join("modules.json").is_file())
        }
        Ok(Location::Gguf(file)) => {
            let gguf = Gguf::open(&file)?;
            Ok(gguf.string("general.architecture")? == Some(GGUF_ENCODER) || Head::from_gguf(&gguf)?.is_some())
        }
        // Whoever opens the model says what is wrong.
        Err(_) => Ok(false),
    }
}

/// See [`super::EmbeddingEngine::load`].
pub(super) fn load(path: &Path, config: &EngineConfig) -> Result<Loaded, Error> {
    match models::locate(path)? {
        Location::Folder => load_folder(path, config),
        Location::Gguf(file) => load_gguf(path, &file, config),
    }
}

fn load_folder(path: &Path, config: &EngineConfig) -> Result<Loaded, Error> {
    #[derive(serde::Deserialize)]
    struct SentenceConfig {
        max_seq_length: Option<usize>,
    }
    let hf_config = HfConfig::open(&path.join("config.json"))?;
    let architecture = hf_config.architecture()?;
    let head = Head::from_folder(path)?;
    let longest: Option<SentenceConfig> = read_json(&path.join("sentence_bert_config.json"))?;
    let mut loaded = if ENCODERS.contains(&architecture) {
        let (files, spec) = (SafetensorsFolder::open(path)?, BertSpec::from_config(&hf_config)?);
        let head = head.unwrap_or(Head { pooling: Pooling::Mean, normalizes: false });
        let tokenizer = Tokenizer::from_folder(path)?;
        let mut loaded = load_encoder(path, (spec, BertFiles::Folder(&files)), (tokenizer, head), config)?;
        loaded.info.architecture = architecture.to_owned();
        loaded
    } else {
        if hf_config.optional_flag("is_causal")? == Some(false) {
            return Err(hf_config.error("'is_causal' is false: decoders that look ahead are not supported"));
        }
        load_decoder(path, head, config)?
    };
    if let Some(longest) = longest.and_then(|config| config.max_seq_length) {
        loaded.info.max_model_len = loaded.info.max_model_len.min(longest);
    }
    Ok(loaded)
}

fn load_gguf(path: &Path, file: &Path, config: &EngineConfig) -> Result<Loaded, Error> {
    let gguf = Gguf::open(file)?;
    let pooling = Head::from_gguf(&gguf)?;
    if gguf.string("general.architecture")? != Some(GGUF_ENCODER) {
        if models::is_causal(&gguf)? == Some(false) {
            return Err(gguf.error("decoders that look ahead ('attention.causal' is false) are not supported"));
        }
        return load_decoder(path, pooling, config);
    }
    let head = pooling.unwrap_or(Head { pooling: Pooling::Mean, normalizes: true });
    let (spec, tokenizer) = (BertSpec::from_gguf(&gguf)?, Tokenizer::from_gguf(&gguf)?);
    load_encoder(path, (spec, BertFiles::Gguf(&gguf)), (tokenizer, head), config)
}

fn load_encoder(
    path: &Path,
    (spec, files): (BertSpec, BertFiles<'_>),
    (tokenizer, head): (Tokenizer, Head),
    config: &EngineConfig,
) -> Result<Loaded, Error> {
    let max_model_len = match config.max_model_len {
        Some(len) if !(1..=spec.max_position).contains(&len) => {
            let message = format!("{len} is not between 1 and the model's {} positions", spec.max_position);
            return Err(Error::config("--max-model-len", message));
        }
        len => len.unwrap_or(spec.max_position),
    };
    let info = EmbeddingInfo {
        path: path.to_owned(),
        architecture: "BertModel".into(),
        n_parameters: spec.n_parameters(),
        file_dtype: files.element_type(),
        vocab_size: spec.vocab_size,
        n_dimensions: spec.hidden_size,
        max_model_len,
        max_num_batched_tokens: BATCH_TOKENS,
        executor: format!("device cpu, float32, embeddings of {} dimensions", spec.hidden_size),
    };
    let encoder = Box::new(Bert::load(spec, files, &Device::flex())?);
    Ok(Loaded { info, encoder, tokenizer, head })
}

fn load_decoder(path: &Path, head: Option<Head>, config: &EngineConfig) -> Result<Loaded, Error> {
    let model = Model::open_headless(path, config.load_format, config.seed)?;
    let executor = executors::create(&model.spec, &*model.weights, config)?;
    let capacity = executor.capacity();
    let n_dimensions = model.spec.hidden_size;
    let info = EmbeddingInfo {
        path: path.to_owned(),
        architecture: model.spec.architecture.clone(),
        n_parameters: model.spec.n_parameters(),
        file_dtype: model.file_dtype,
        vocab_size: model.spec.vocab_size,
        n_dimensions,
        max_model_len: capacity.max_model_len,
        max_num_batched_tokens: capacity.max_num_batched_tokens,
        executor: format!("{}, embeddings of {n_dimensions} dimensions", executor.describe()),
    };
    let encoder = Box::new(DecoderEncoder::new(executor, n_dimensions));
    let head = head.unwrap_or(Head { pooling: Pooling::Last, normalizes: true });
    Ok(Loaded { info, encoder, tokenizer: model.tokenizer, head })
}

/// The file's content, if there is one.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|e| Error::model(path, format!("cannot read the file: {e}")))?;
    serde_json::from_str(&text).map(Some).map_err(|e| Error::model(path, format!("not what was expected: {e}")))
}
