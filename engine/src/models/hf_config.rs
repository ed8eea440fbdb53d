//! [`HfConfig`]: a config.json whose fields are read with errors that name them.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    Error,
    decoder::{DecoderSpec, Moe},
};

/// A Hugging Face config.json.
#[derive(Debug, Clone)]
pub struct HfConfig {
    path: PathBuf,
    value: Value,
}

impl HfConfig {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`Error::Model`] if it cannot be read or is no JSON object.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read(path).map_err(|e| Error::model(path, format!("cannot read the file: {e}")))?;
        let value: Value =
            serde_json::from_slice(&text).map_err(|e| Error::model(path, format!("not valid JSON: {e}")))?;
        Self::from_value(path, value)
    }

    /// The config `value`, said to come from `path`.
    ///
    /// # Errors
    /// [`Error::Model`] if it is no JSON object.
    pub fn from_value(path: &Path, value: Value) -> Result<Self, Error> {
        if !value.is_object() {
            return Err(Error::model(path, "must be a JSON object"));
        }
        Ok(Self { path: path.to_owned(), value })
    }

    /// An [`Error::Model`] about this file.
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::model(&self.path, message)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `field`; `None` if it is missing or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.value.get(field).filter(|value| !value.is_null())
    }

    /// Whether `field` is there, null or not.
    pub fn has(&self, field: &str) -> bool {
        self.value.get(field).is_some()
    }

    /// The value of `field` as `read` understands it.
    fn optional<T>(&self, field: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, Error> {
        self.get(field)
            .map(|value| read(value).ok_or_else(|| self.error(format!("'{field}' must be {what}, not {value}"))))
            .transpose()
    }

    /// A positive integer.
    ///
    /// # Errors
    /// [`Error::Model`] if it is something else.
    pub fn count(&self, field: &str) -> Result<Option<usize>, Error> {
        self.optional(field, "a positive integer", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..=1 << 32).contains(n))
        })
    }

    /// A positive integer that must be there.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing or something else.
    pub fn required_count(&self, field: &str) -> Result<usize, Error> {
        self.count(field)?.ok_or_else(|| self.error(format!("'{field}' is missing")))
    }

    /// A truth value, false if missing.
    ///
    /// # Errors
    /// [`Error::Model`] if it is something else.
    pub fn flag(&self, field: &str) -> Result<bool, Error> {
        Ok(self.optional_flag(field)?.unwrap_or(false))
    }

    /// A truth value.
    ///
    /// # Errors
    /// [`Error::Model`] if it is something else.
    pub fn optional_flag(&self, field: &str) -> Result<Option<bool>, Error> {
        self.optional(field, "true or false", Value::as_bool)
    }

    /// A number.
    ///
    /// # Errors
    /// [`Error::Model`] if it is something else.
    pub fn number(&self, field: &str) -> Result<Option<f32>, Error> {
        self.optional(field, "a number", |v| v.as_f64().map(|x| x as f32))
    }

    /// A text.
    ///
    /// # Errors
    /// [`Error::Model`] if it is something else.
    pub fn text(&self, field: &str) -> Result<Option<&str>, Error> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.error(format!("'{field}' must be a string, not {value}"))),
        }
    }

    /// The first of `architectures`.
    ///
    /// # Errors
    /// [`Error::Model`] if it is missing.
    pub fn architecture(&self) -> Result<&str, Error> {
        let first = self.get("architectures").and_then(|names| names.get(0)).and_then(Value::as_str);
        first.ok_or_else(|| self.error("'architectures' must name the model's class, such as [\"LlamaForCausalLM\"]"))
    }

    /// What the families of the Llama line have in common: RMSNorm, gated SiLU MLP, rotary embedding. Biases and
    /// the sliding window are left off.
    ///
    /// # Errors
    /// [`Error::Model`] naming a field that is missing or not supported.
    pub fn llama_like_spec(&self, architecture: &str) -> Result<DecoderSpec, Error> {
        let activation = self.text("hidden_act")?.unwrap_or("silu");
        if activation != "silu" {
            return Err(
                self.error(format!("'hidden_act' is '{activation}', which is not supported; supported is 'silu'"))
            );
        }
        let hidden_size = self.required_count("hidden_size")?;
        let n_heads = self.required_count("num_attention_heads")?;
        let max_position = self.count("max_position_embeddings")?.unwrap_or(2048);
        let (rope, max_position) = super::rope::from_config(self, max_position)?;
        let spec = DecoderSpec {
            architecture: architecture.to_owned(),
            hidden_size,
            intermediate_size: self.required_count("intermediate_size")?,
            n_layers: self.required_count("num_hidden_layers")?,
            n_heads,
            n_kv_heads: self.count("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim: self.count("head_dim")?.unwrap_or(hidden_size / n_heads),
            vocab_size: self.required_count("vocab_size")?,
            max_position,
            norm_eps: self.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope,
            tie_embeddings: self.flag("tie_word_embeddings")?,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            moe: None,
        };
        super::model::check_dimensions(&spec).map_err(|message| self.error(message))?;
        Ok(spec)
    }

    /// The sliding window of a model of `n_layers` that names it as Qwen2 does: layers from `max_window_layers` on have
    /// it if `use_sliding_window` says so.
    ///
    /// # Errors
    /// [`Error::Model`] if only some layers have it.
    pub fn window_of_layers(&self, n_layers: usize) -> Result<Option<usize>, Error> {
        if !self.flag("use_sliding_window")? {
            return Ok(None);
        }
        let first = self.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28) as usize;
        match self.count("sliding_window")? {
            window if first == 0 => Ok(window),
            Some(_) if first < n_layers => Err(self.error(format!(
                "'max_window_layers' is {first} of {n_layers} layers: a sliding window in only some layers is not \
                 supported"
            ))),
            _ => Ok(None),
        }
    }

    /// `spec` with the experts `moe`.
    ///
    /// # Errors
    /// [`Error::Model`] if their numbers do not go together.
    pub fn with_experts(&self, spec: DecoderSpec, moe: Moe) -> Result<DecoderSpec, Error> {
        let spec = DecoderSpec { moe: Some(moe), ..spec };
        super::model::check_dimensions(&spec).map_err(|message| self.error(message))?;
        Ok(spec)
    }
}
