//! [`SamplingDefaults`]: what holds for sampling fields that a request leaves open.

use std::path::Path;

use ember_engine::SamplingParams;
use serde::Deserialize;
use serde_json::Value;

use crate::Error;

/// Names that `--override-generation-config` takes.
const FIELDS: [&str; 6] = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens"];

/// Where the defaults come from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingDefaults {
    /// Leave the model's own (generation_config.json) aside.
    pub ignores_model: bool,
    /// Over those, the later first.
    overrides: Vec<Overrides>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
struct Overrides {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    max_new_tokens: Option<u32>,
}

impl SamplingDefaults {
    /// From `--generation-config` (auto, vllm or a folder) and `--override-generation-config` (JSON).
    ///
    /// # Errors
    /// [`Error::Config`] naming the option whose value cannot be.
    pub fn new(source: &str, overriding: Option<&str>) -> Result<Self, Error> {
        let mut defaults = Self { ignores_model: source != "auto", overrides: Vec::new() };
        if let Some(text) = overriding {
            let flag = "--override-generation-config";
            let value: Value = serde_json::from_str(text).map_err(|error| Error::config(flag, error.to_string()))?;
            if let Some(unknown) = value
                .as_object()
                .into_iter()
                .flat_map(|fields| fields.keys())
                .find(|key| !FIELDS.contains(&key.as_str()))
            {
                return Err(Error::config(flag, format!("no field `{unknown}`: {}", FIELDS.join(", "))));
            }
            defaults.overrides.push(Overrides::checked(flag, value)?);
        }
        if !matches!(source, "auto" | "vllm") {
            let flag = "--generation-config";
            let path = Path::new(source).join("generation_config.json");
            let text = std::fs::read_to_string(&path).map_err(|error| {
                Error::config(flag, format!("{}: {error}. It is auto, vllm or a folder with that file", path.display()))
            })?;
            let value = serde_json::from_str(&text)
                .map_err(|error| Error::config(flag, format!("{}: {error}", path.display())))?;
            defaults.overrides.push(Overrides::checked(flag, value)?);
        }
        Ok(defaults)
    }

    /// The defaults, given the model's own.
    pub fn over(&self, model: &SamplingParams) -> SamplingParams {
        let base = if self.ignores_model { SamplingParams::default() } else { model.clone() };
        self.overrides.iter().rev().fold(base, |params, overrides| overrides.over(params))
    }

    /// Output tokens that no request may exceed, if the operator says so.
    pub fn max_tokens(&self) -> Option<u32> {
        self.overrides.iter().find_map(|overrides| overrides.max_new_tokens)
    }
}

impl Overrides {
    fn checked(flag: &'static str, value: Value) -> Result<Self, Error> {
        let overrides: Self = serde_path_to_error::deserialize(value)
            .map_err(|error| Error::config(flag, format!("`{}`: {}", error.path(), error.inner())))?;
        if overrides.top_k.is_some_and(|k| k < -1) {
            return Err(Error::config(flag, "top_k must be -1 or 0 (disable), or at least 1"));
        }
        let params = overrides.over(SamplingParams::default());
        params.validate(usize::MAX).map_err(|error| Error::config(flag, error.to_string()))?;
        Ok(overrides)
    }

    fn over(&self, params: SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(params.temperature),
            top_p: self.top_p.unwrap_or(params.top_p),
            top_k: self.top_k.map_or(params.top_k, |k| u32::try_from(k).unwrap_or(0)),
            min_p: self.min_p.unwrap_or(params.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(params.repetition_penalty),
            max_tokens: self.max_new_tokens.or(params.max_tokens),
            ..params
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> SamplingParams {
        SamplingParams { temperature: 0.6, top_p: 0.9, ..SamplingParams::default() }
    }

    #[test]
    fn later_sources_win_and_open_fields_stay() {
        let auto = SamplingDefaults::new("auto", None).unwrap();
        assert_eq!(auto.over(&model()), model());
        assert_eq!(SamplingDefaults::new("vllm", None).unwrap().over(&model()), SamplingParams::default());
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("generation_config.json");
        std::fs::write(file, r#"{"temperature": 0.2, "top_k": 5, "max_new_tokens": 7, "eos_token_id": 1}"#).unwrap();
        let both = SamplingDefaults::new(folder.path().to_str().unwrap(), Some(r#"{"top_k": -1, "min_p": 0.1}"#));
        let both = both.unwrap();
        let got = both.over(&model());
        assert_eq!((got.temperature, got.top_p, got.top_k, got.min_p), (0.2, 1.0, 0, 0.1));
        assert_eq!((both.max_tokens(), auto.max_tokens()), (Some(7), None));
    }

    #[test]
    fn wrong_values_name_their_option() {
        for (source, overriding, part) in [
            ("/nowhere", None, "--generation-config: /nowhere/generation_config.json: "),
            ("auto", Some("{"), "--override-generation-config: EOF"),
            ("auto", Some(r#"{"top_q": 1}"#), "no field `top_q`: temperature, top_p"),
            ("auto", Some(r#"{"top_p": "x"}"#), "`top_p`: invalid type"),
            ("auto", Some(r#"{"top_p": 2}"#), "top_p must be in (0, 1]"),
            ("auto", Some(r#"{"top_k": -2}"#), "top_k must be"),
            ("auto", Some("[1]"), "--override-generation-config"),
        ] {
            let error = SamplingDefaults::new(source, overriding).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
