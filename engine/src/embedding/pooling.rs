//! [`Pooling`]: how a text's hidden states become its vector, and what sentence-transformers' files say of it.

use std::path::Path;

use serde_json::{Map, Value};

use super::load::read_json;
use crate::{Error, weights::gguf::Gguf};

/// How a text's hidden states become its vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first token's.
    Cls,
    /// The last token's.
    Last,
}

/// Names of the modes in sentence-transformers' `config.json` of its module `Pooling`, after `pooling_mode_`.
const MODES: [(&str, Pooling); 3] =
    [("mean_tokens", Pooling::Mean), ("cls_token", Pooling::Cls), ("lasttoken", Pooling::Last)];

/// What comes after the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// How hidden states become a vector.
    pub pooling: Pooling,
    /// Whether vectors have length 1.
    pub normalizes: bool,
}

impl Head {
    /// The head that modules.json of `folder` describes; `None` if there is no such file.
    ///
    /// # Errors
    /// [`Error::Model`] about a file that cannot be read, or a module or mode that is not supported.
    pub(super) fn from_folder(folder: &Path) -> Result<Option<Self>, Error> {
        #[derive(serde::Deserialize)]
        struct Module {
            #[serde(rename = "type")]
            kind: String,
            path: Option<String>,
        }
        let file = folder.join("modules.json");
        let Some(modules) = read_json::<Vec<Module>>(&file)? else {
            return Ok(None);
        };
        let mut head = Self { pooling: Pooling::Mean, normalizes: false };
        for module in modules {
            match module.kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => (),
                "Pooling" => {
                    let path = module.path.as_deref().unwrap_or("1_Pooling");
                    head.pooling = pooling(&folder.join(path).join("config.json"))?;
                }
                "Normalize" => head.normalizes = true,
                _ => {
                    let kind = module.kind;
                    let message =
                        format!("module {kind} is not supported; supported are Transformer, Pooling and Normalize");
                    return Err(Error::model(file, message));
                }
            }
        }
        Ok(Some(head))
    }

    /// The head that `pooling_type` of a GGUF file says (llama.cpp's `llama_pooling_type`); `None` if it says none.
    ///
    /// # Errors
    /// [`Error::Model`] about a type that is not supported.
    pub(super) fn from_gguf(gguf: &Gguf) -> Result<Option<Self>, Error> {
        let key = format!("{}.pooling_type", gguf.string("general.architecture")?.unwrap_or_default());
        let pooling = match gguf.integer(&key)? {
            None | Some(0) => return Ok(None),
            Some(1) => Pooling::Mean,
            Some(2) => Pooling::Cls,
            Some(3) => Pooling::Last,
            Some(other) => {
                let message = format!(
                    "'{key}' is {other}, which is not supported; supported are 1 (mean), 2 (CLS) and 3 (last token)"
                );
                return Err(gguf.error(message));
            }
        };
        Ok(Some(Self { pooling, normalizes: true }))
    }
}

fn pooling(path: &Path) -> Result<Pooling, Error> {
    let fields: Map<String, Value> = read_json(path)?.unwrap_or_default();
    let is_on = |name: &&String| fields.get(*name).and_then(Value::as_bool) == Some(true);
    let on: Vec<&str> = fields.keys().filter(is_on).filter_map(|name| name.strip_prefix("pooling_mode_")).collect();
    match on[..] {
        [] => Ok(Pooling::Mean),
        [name] if let Some((_, pooling)) = MODES.iter().find(|(mode, _)| *mode == name) => Ok(*pooling),
        _ => {
            let supported = MODES.map(|(mode, _)| mode).join(", ");
            let message =
                format!("pooling_mode_{} is not supported; one of {supported} is", on.join(" with pooling_mode_"));
            Err(Error::model(path, message))
        }
    }
}

/// A text's hidden states on their way to its vector.
pub(super) struct Pool {
    pooling: Pooling,
    n_rows: usize,
    /// `[hidden_size]`.
    vector: Vec<f32>,
}

impl Pool {
    pub(super) fn new(pooling: Pooling, hidden_size: usize) -> Self {
        Self { pooling, n_rows: 0, vector: vec![0.0; hidden_size] }
    }

    /// Takes in the states of the next tokens, `[n, hidden_size]`.
    pub(super) fn add(&mut self, states: &[f32]) {
        for row in states.chunks_exact(self.vector.len()) {
            match self.pooling {
                Pooling::Mean => self.vector.iter_mut().zip(row).for_each(|(sum, x)| *sum += x),
                Pooling::Cls if self.n_rows > 0 => (),
                Pooling::Cls | Pooling::Last => self.vector.copy_from_slice(row),
            }
            self.n_rows += 1;
        }
    }

    /// The vector.
    pub(super) fn finish(mut self) -> Vec<f32> {
        if self.pooling == Pooling::Mean {
            let n = self.n_rows.max(1) as f32;
            self.vector.iter_mut().for_each(|sum| *sum /= n);
        }
        self.vector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_take_states_in_any_pieces() {
        let states = [1.0, 2.0, 3.0, 5.0, 8.0, 11.0];
        for (pooling, expected) in
            [(Pooling::Mean, [4.0, 6.0]), (Pooling::Cls, [1.0, 2.0]), (Pooling::Last, [8.0, 11.0])]
        {
            for cut in [0, 2, 4, 6] {
                let mut pool = Pool::new(pooling, 2);
                pool.add(&states[..cut]);
                pool.add(&states[cut..]);
                assert_eq!(pool.finish(), expected, "{pooling:?}, cut at {cut}");
            }
        }
    }

    #[test]
    fn files_say_how() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("written");
        let head = || Head::from_folder(folder.path());
        let message = || head().err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(head().expect("valid"), None);
        let kind =
            |name: &str, path: &str| format!(r#"{{"type": "sentence_transformers.models.{name}", "path": "{path}"}}"#);
        write("modules.json", &format!("[{}, {}]", kind("Transformer", ""), kind("Pooling", "pool")));
        std::fs::create_dir(folder.path().join("pool")).expect("created");
        write("pool/config.json", r#"{"pooling_mode_lasttoken": true, "pooling_mode_cls_token": false}"#);
        assert_eq!(head().expect("valid"), Some(Head { pooling: Pooling::Last, normalizes: false }));
        write("pool/config.json", r#"{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}"#);
        assert!(message().contains("pooling_mode_mean_tokens with pooling_mode_cls_token is not"), "{}", message());
        write("pool/config.json", r#"{"pooling_mode_max_tokens": true}"#);
        assert!(message().contains("pooling_mode_max_tokens is not supported"), "{}", message());
        write("modules.json", &format!("[{}]", kind("Dense", "2_Dense")));
        assert!(message().contains("models.Dense is not supported"), "{}", message());
    }
}
