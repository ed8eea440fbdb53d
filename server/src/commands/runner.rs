//! `--runner` and `--convert`, with vLLM's names: whether a model generates text or makes vectors.

use std::path::Path;

use clap::{Args, ValueEnum};
use ember_engine::embedding::EmbeddingEngine;

use crate::Error;

/// What the model is for, as typed.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Engine")]
pub struct RunnerArgs {
    /// generate serves text, pooling vectors; auto looks at the model's class and whether sentence-transformers'
    /// modules.json, or a GGUF file's pooling_type, is there.
    #[arg(long, env = "EMBER_RUNNER", default_value = "auto", value_enum)]
    pub runner: Runner,

    /// embed makes vectors with a model that was made to generate; auto does so where --runner is pooling.
    #[arg(long, env = "EMBER_CONVERT", default_value = "auto", value_enum)]
    pub convert: Convert,
}

/// See [`RunnerArgs::runner`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Runner {
    #[default]
    Auto,
    Generate,
    Pooling,
}

/// See [`RunnerArgs::convert`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Convert {
    #[default]
    Auto,
    None,
    Embed,
}

impl RunnerArgs {
    /// Checks that the two go together.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn check(self) -> Result<(), Error> {
        match (self.runner, self.convert) {
            (Runner::Generate, Convert::Embed) => {
                Err(Error::config("--convert", "embed makes no text; use --runner pooling, or leave --runner off"))
            }
            _ => Ok(()),
        }
    }

    /// Whether the model at `path` is to make vectors.
    ///
    /// # Errors
    /// [`ember_engine::Error`] if its config.json cannot be read, or it makes none and must not be converted.
    pub fn makes_vectors(self, path: &Path) -> Result<bool, ember_engine::Error> {
        if self.runner == Runner::Generate {
            return Ok(false);
        }
        let is_for_vectors = EmbeddingEngine::is_for(path)?;
        if self.runner == Runner::Pooling && self.convert == Convert::None && !is_for_vectors {
            let message =
                "none leaves a model that generates text, which --runner pooling cannot serve; use embed or auto";
            return Err(ember_engine::Error::config("--convert", message));
        }
        Ok(is_for_vectors || self.runner == Runner::Pooling || self.convert == Convert::Embed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_decides_unless_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let makes = |runner, convert| RunnerArgs { runner, convert }.makes_vectors(folder.path());
        let of = |class: &str| {
            std::fs::write(folder.path().join("config.json"), format!(r#"{{"architectures": ["{class}"]}}"#))
                .expect("written");
        };
        for (class, expected) in [("BertModel", true), ("Qwen3Model", true), ("Qwen3ForCausalLM", false)] {
            of(class);
            assert_eq!(makes(Runner::Auto, Convert::Auto).expect("valid"), expected, "{class}");
            assert!(!makes(Runner::Generate, Convert::Auto).expect("valid"));
            assert!(makes(Runner::Pooling, Convert::Auto).expect("valid"));
            assert!(makes(Runner::Auto, Convert::Embed).expect("valid"));
            assert_eq!(makes(Runner::Auto, Convert::None).expect("valid"), expected, "{class}");
            assert_eq!(makes(Runner::Pooling, Convert::None).is_ok(), expected, "{class}");
        }
        std::fs::write(folder.path().join("modules.json"), "[]").expect("written");
        assert!(makes(Runner::Auto, Convert::Auto).expect("valid"));
        assert!(RunnerArgs { runner: Runner::Generate, convert: Convert::Embed }.check().is_err());
    }
}
