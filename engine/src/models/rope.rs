//! Reads rotary embeddings from config.json and GGUF metadata.

use serde_json::Value;

use super::HfConfig;
use crate::{
    Error,
    decoder::{Rope, RopeScaling, Yarn},
    weights::gguf::Gguf,
};

/// Base of the frequencies where a file does not say.
const DEFAULT_THETA: f32 = 10_000.0;

/// The embedding of `rope_theta` and `rope_scaling` (whose `type` is the older spelling of `rope_type`), or of the
/// `rope_parameters` of transformers 5 that hold both, and the longest context in tokens. As in vLLM, that is `factor`
/// times `max_position_embeddings`, for YaRN `factor` times the context of pre-training.
///
/// # Errors
/// [`Error::Model`] naming the field that is missing or has a value that is not supported.
pub(super) fn from_config(config: &HfConfig, max_position: usize) -> Result<(Rope, usize), Error> {
    let parameters = config.get("rope_parameters");
    let field = if parameters.is_some() { "rope_parameters" } else { "rope_scaling" };
    let theta = match parameters.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64) {
        Some(theta) => theta as f32,
        None => config.number("rope_theta")?.unwrap_or(DEFAULT_THETA),
    };
    if !(theta.is_finite() && theta > 1.0) {
        return Err(config.error(format!("'rope_theta' must be above 1, not {theta}")));
    }
    let in_parameters = parameters.and_then(|p| p.get("partial_rotary_factor"));
    let rotated = in_parameters.or_else(|| config.get("partial_rotary_factor")).and_then(Value::as_f64);
    if let Some(share) = rotated.filter(|&share| share != 1.0) {
        return Err(config.error(format!("'partial_rotary_factor' is {share}, which is not supported; supported is 1")));
    }
    let Some(scaling) = parameters.or_else(|| config.get("rope_scaling")) else {
        return Ok((Rope { theta, scaling: RopeScaling::None }, max_position));
    };
    let fields = Fields { config, field, value: scaling };
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
    let (scaling, max_position) = match kind.map(|kind| kind.as_str().unwrap_or("not a string")) {
        None | Some("default") => (RopeScaling::None, max_position),
        Some("linear") => {
            let factor = fields.required("factor")?;
            (RopeScaling::Linear(factor), stretched(max_position, factor))
        }
        Some("dynamic") => {
            if scaling.get("alpha").is_some() {
                return Err(config.error(format!("'{field}.alpha' is not supported; supported is 'factor'")));
            }
            let factor = fields.required("factor")?;
            (RopeScaling::Dynamic(factor), stretched(max_position, factor))
        }
        Some("yarn") => {
            let yarn = yarn(&fields, max_position)?;
            let longest = stretched(yarn.original_max_position, yarn.factor);
            (RopeScaling::Yarn(yarn), longest)
        }
        Some("llama3") => {
            let scaling = RopeScaling::Llama3 {
                factor: fields.required("factor")?,
                low_freq_factor: fields.required("low_freq_factor")?,
                high_freq_factor: fields.required("high_freq_factor")?,
                original_max_position: fields.required("original_max_position_embeddings")? as usize,
            };
            (scaling, max_position)
        }
        Some(other) => {
            return Err(config.error(format!(
                "'{field}' is of type '{other}', which is not supported; supported are default, linear, dynamic, yarn, \
                 llama3"
            )));
        }
    };
    Ok((Rope { theta, scaling }, max_position))
}

/// YaRN's parameters as `transformers` reads them: with `mscale` and `mscale_all_dim` (DeepSeek) the attention factor is
/// the quotient of theirs.
fn yarn(fields: &Fields<'_>, max_position: usize) -> Result<Yarn, Error> {
    let original_max_position =
        fields.optional("original_max_position_embeddings")?.map_or(max_position, |n| n as usize);
    let factor = match fields.optional("factor")? {
        Some(factor) => factor,
        None => max_position as f32 / original_max_position as f32,
    };
    let mscale = |name: &str| {
        let value = fields.value.get(name).and_then(Value::as_f64).filter(|&m| m != 0.0);
        value.map(|m| Yarn::default_attention_factor(factor, m as f32))
    };
    let attention_factor = match (fields.optional("attention_factor")?, mscale("mscale"), mscale("mscale_all_dim")) {
        (Some(attention_factor), ..) => attention_factor,
        (None, Some(scale), Some(scale_all_dim)) => scale / scale_all_dim,
        _ => Yarn::default_attention_factor(factor, 1.0),
    };
    Ok(Yarn {
        factor,
        original_max_position,
        beta_fast: fields.optional("beta_fast")?.unwrap_or(32.0),
        beta_slow: fields.optional("beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate: fields.value.get("truncate").and_then(Value::as_bool).unwrap_or(true),
    })
}

/// `n` tokens times `factor`.
fn stretched(n: usize, factor: f32) -> usize {
    (n as f64 * f64::from(factor)) as usize
}

/// The numbers in a config's `rope_scaling` or `rope_parameters`.
struct Fields<'a> {
    config: &'a HfConfig,
    field: &'static str,
    value: &'a Value,
}

impl Fields<'_> {
    /// A positive number; `None` if it is missing or null.
    fn optional(&self, name: &str) -> Result<Option<f32>, Error> {
        let Some(value) = self.value.get(name).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let number = value.as_f64().filter(|x| x.is_finite() && *x > 0.0).map(|x| x as f32);
        number.map(Some).ok_or_else(|| self.error(name))
    }

    fn required(&self, name: &str) -> Result<f32, Error> {
        self.optional(name)?.ok_or_else(|| self.error(name))
    }

    fn error(&self, name: &str) -> Error {
        self.config.error(format!("'{}.{name}' must be a positive number", self.field))
    }
}

/// The embedding of a GGUF file with the metadata prefix `prefix`, and the longest context in tokens: that of the file,
/// or the context of pre-training times the factor if the file names both and they give more.
///
/// # Errors
/// [`Error::Model`] naming the key that is missing or has a value that is not supported.
pub(super) fn from_gguf(
    gguf: &Gguf,
    prefix: &str,
    (head_dim, max_position): (usize, usize),
) -> Result<(Rope, usize), Error> {
    let key = |name: &str| format!("{prefix}.rope.{name}");
    let positive = |name: &str| match gguf.float(&key(name))? {
        Some(value) if !(value.is_finite() && value > 0.0) => {
            Err(gguf.error(format!("'{}' must be positive, not {value}", key(name))))
        }
        value => Ok(value.map(|value| value as f32)),
    };
    let theta = positive("freq_base")?.unwrap_or(DEFAULT_THETA);
    if gguf.tensor_shape("rope_freqs.weight").is_some() {
        let factors = gguf.tensor("rope_freqs.weight")?.to_f32().into_owned();
        if factors.len() != head_dim / 2 || !factors.iter().all(|f| f.is_finite() && *f > 0.0) {
            return Err(gguf.error(format!("tensor 'rope_freqs.weight' must hold {} positive numbers", head_dim / 2)));
        }
        return Ok((Rope { theta, scaling: RopeScaling::Factors(factors) }, max_position));
    }
    let factor = || {
        let missing = || gguf.error(format!("metadata key '{}' is missing", key("scaling.factor")));
        positive("scaling.factor")?.ok_or_else(missing)
    };
    let original = gguf.integer(&key("scaling.original_context_length"))?.filter(|&n| n > 0);
    let (scaling, factor) = match gguf.string(&key("scaling.type"))? {
        None | Some("none") => (RopeScaling::None, 1.0),
        Some("linear") => {
            let factor = factor()?;
            (RopeScaling::Linear(factor), factor)
        }
        Some("yarn") => {
            let factor = factor()?;
            // llama.cpp multiplies the paper's attention factor with the file's.
            let attention_factor = positive("scaling.yarn_attn_factor")?.or(positive("scaling.attn_factor")?);
            let yarn = Yarn {
                factor,
                original_max_position: original.unwrap_or(max_position),
                beta_fast: positive("scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: positive("scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: attention_factor.unwrap_or(1.0) * Yarn::default_attention_factor(factor, 1.0),
                truncate: true,
            };
            (RopeScaling::Yarn(yarn), factor)
        }
        Some(other) => {
            let name = key("scaling.type");
            return Err(
                gguf.error(format!("'{name}' is '{other}', which is not supported; supported are none, linear, yarn"))
            );
        }
    };
    let longest = original.map_or(max_position, |n| max_position.max(stretched(n, factor)));
    Ok((Rope { theta, scaling }, longest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::gguf::writer::GgufWriter;

    fn of(write: impl Fn(&mut GgufWriter)) -> Result<(Rope, usize), Error> {
        let mut w = GgufWriter::default();
        w.f32("x.rope.freq_base", 1e6);
        write(&mut w);
        let file = w.file();
        from_gguf(&Gguf::open(file.path())?, "x", (64, 4096))
    }

    #[test]
    fn gguf_scalings_are_those_of_llama_cpp() {
        let check = |write: &dyn Fn(&mut GgufWriter), scaling: RopeScaling, longest: usize| {
            assert_eq!(of(write).expect("valid"), (Rope { theta: 1e6, scaling }, longest));
        };
        check(&|_| (), RopeScaling::None, 4096);
        check(&|w| _ = w.string("x.rope.scaling.type", "none"), RopeScaling::None, 4096);
        let linear =
            |w: &mut GgufWriter| _ = w.string("x.rope.scaling.type", "linear").f32("x.rope.scaling.factor", 2.0);
        check(&linear, RopeScaling::Linear(2.0), 4096);
        let yarn = |w: &mut GgufWriter| _ = w.string("x.rope.scaling.type", "yarn").f32("x.rope.scaling.factor", 4.0);
        let paper = Yarn {
            factor: 4.0,
            original_max_position: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.138_629_4,
            truncate: true,
        };
        check(&yarn, RopeScaling::Yarn(paper.clone()), 4096);
        let changed = |w: &mut GgufWriter| {
            yarn(w);
            w.u32("x.rope.scaling.original_context_length", 2048).f32("x.rope.scaling.attn_factor", 0.5);
            w.f32("x.rope.scaling.yarn_beta_fast", 16.0);
        };
        let expected = Yarn { original_max_position: 2048, attention_factor: 0.569_314_7, beta_fast: 16.0, ..paper };
        check(&changed, RopeScaling::Yarn(expected), 8192);
        let message = |write: &dyn Fn(&mut GgufWriter)| of(write).err().map(|e| e.to_string()).unwrap_or_default();
        let longrope = message(&|w| _ = w.string("x.rope.scaling.type", "longrope"));
        assert!(longrope.contains("'x.rope.scaling.type' is 'longrope'"), "{longrope}");
        let missing = message(&|w| _ = w.string("x.rope.scaling.type", "yarn"));
        assert!(missing.contains("'x.rope.scaling.factor' is missing"), "{missing}");
        let zero = message(&|w| _ = w.string("x.rope.scaling.type", "linear").f32("x.rope.scaling.factor", 0.0));
        assert!(zero.contains("'x.rope.scaling.factor' must be positive"), "{zero}");
    }
}
