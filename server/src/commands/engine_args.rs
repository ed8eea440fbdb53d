//! Options of the engine, the same for every subcommand that loads a model.

use clap::{ArgAction, Args, ValueEnum};
use ember_engine::{DTypeChoice, DeviceChoice, EngineConfig, KvCacheDType, LoadFormat, Quantization, SchedulingPolicy};

use crate::Error;

/// Options of the engine, as typed.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// auto, cpu, cuda or cuda:N; indices count after CUDA_VISIBLE_DEVICES.
    #[arg(long, env = "EMBER_DEVICE", default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,

    /// Element type of weights and activations.
    #[arg(long, env = "EMBER_DTYPE", default_value = "auto", value_enum)]
    pub dtype: DType,

    /// auto reads the model's weights; dummy makes random ones of its dimensions, for benchmarks.
    #[arg(long, env = "EMBER_LOAD_FORMAT", default_value = "auto", value_enum)]
    pub load_format: Format,

    /// Round float weights to this GGUF format at load [default: keep them]. CPU only.
    #[arg(long, short = 'q', env = "EMBER_QUANTIZATION", value_enum)]
    pub quantization: Option<QuantizationFormat>,

    /// Longest prompt + output in tokens: a number, 8k (8000), 8K (8192), or auto for the model's
    /// own limit, lowered to what memory holds.
    #[arg(long, env = "EMBER_MAX_MODEL_LEN", default_value = "auto", value_parser = parse_auto_size, allow_hyphen_values = true)]
    pub max_model_len: AutoSize,

    /// Most sequences in one step [default: the device decides].
    #[arg(long, env = "EMBER_MAX_NUM_SEQS", value_parser = parse_size)]
    pub max_num_seqs: Option<usize>,

    /// Most tokens in one step, of prompts and outputs together [default: the device decides].
    #[arg(long, env = "EMBER_MAX_NUM_BATCHED_TOKENS", value_parser = parse_size)]
    pub max_num_batched_tokens: Option<usize>,

    /// Share of the GPU's memory to use, weights included.
    #[arg(long, env = "EMBER_GPU_MEMORY_UTILIZATION", default_value_t = 0.9)]
    pub gpu_memory_utilization: f32,

    /// Bytes for the KV cache, such as 4G; overrides --gpu-memory-utilization.
    #[arg(long, env = "EMBER_KV_CACHE_MEMORY_BYTES", value_parser = parse_size)]
    pub kv_cache_memory_bytes: Option<usize>,

    /// Element type of the KV cache; q8_0 (8-bit integers with a scale per 32) halves it. The choice is the CPU's.
    #[arg(long, env = "EMBER_KV_CACHE_DTYPE", default_value = "auto", value_enum)]
    pub kv_cache_dtype: KvDType,

    /// Reuse the KV cache of equal prompt prefixes (the default).
    #[arg(long, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,

    /// Compute every prompt in full.
    #[arg(long, env = "EMBER_NO_ENABLE_PREFIX_CACHING", action = ArgAction::SetTrue)]
    pub no_enable_prefix_caching: bool,

    /// A file with the chat template in Jinja, or the template itself [default: the model's].
    #[arg(long, env = "EMBER_CHAT_TEMPLATE", value_name = "TEMPLATE")]
    pub chat_template: Option<String>,

    /// Who goes first when there is not room for all: fcfs, or the requests' priority.
    #[arg(long, env = "EMBER_SCHEDULING_POLICY", default_value = "fcfs", value_enum)]
    pub scheduling_policy: Policy,

    /// Seeds dummy weights and requests that carry no seed.
    #[arg(long, env = "EMBER_SEED", default_value_t = 0)]
    pub seed: u64,
}

/// See [`DTypeChoice`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum DType {
    Auto,
    #[value(alias = "float")]
    Float32,
    #[value(alias = "half")]
    Float16,
    Bfloat16,
}

/// See [`Quantization`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum QuantizationFormat {
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_0")]
    Q4_0,
}

/// See [`KvCacheDType`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum KvDType {
    Auto,
    #[value(alias = "f16", alias = "half")]
    Float16,
    #[value(name = "q8_0")]
    Q8_0,
}

/// See [`LoadFormat`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Format {
    Auto,
    Dummy,
}

/// See [`SchedulingPolicy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Policy {
    Fcfs,
    Priority,
}

/// A size, or the one that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AutoSize {
    /// The one that fits.
    Auto,
    /// This one.
    Size(usize),
}

impl EngineArgs {
    /// Checks the options and brings them to the engine's form.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub fn resolve(&self, model_name: &str) -> Result<EngineConfig, Error> {
        check_device(self.device)?;
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            return Err(Error::config(
                "--gpu-memory-utilization",
                format!("{} is not above 0 and at most 1", self.gpu_memory_utilization),
            ));
        }
        for (flag, value) in [
            ("--max-num-seqs", self.max_num_seqs),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--kv-cache-memory-bytes", self.kv_cache_memory_bytes),
        ] {
            if value == Some(0) {
                return Err(Error::config(flag, "must be at least 1"));
            }
        }
        Ok(EngineConfig {
            device: self.device,
            dtype: match self.dtype {
                DType::Auto => DTypeChoice::Auto,
                DType::Float32 => DTypeChoice::Float32,
                DType::Float16 => DTypeChoice::Float16,
                DType::Bfloat16 => DTypeChoice::BFloat16,
            },
            load_format: match self.load_format {
                Format::Auto => LoadFormat::Auto,
                Format::Dummy => LoadFormat::Dummy,
            },
            quantization: self.quantization.map(|format| match format {
                QuantizationFormat::Q8_0 => Quantization::Q8_0,
                QuantizationFormat::Q4_0 => Quantization::Q4_0,
            }),
            max_model_len: match self.max_model_len {
                AutoSize::Auto => None,
                AutoSize::Size(0) => {
                    return Err(Error::config("--max-model-len", "must be at least 1"));
                }
                AutoSize::Size(n) => Some(n),
            },
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            gpu_memory_utilization: self.gpu_memory_utilization,
            kv_cache_memory_bytes: self.kv_cache_memory_bytes,
            kv_cache_dtype: match self.kv_cache_dtype {
                KvDType::Auto => KvCacheDType::Auto,
                KvDType::Float16 => KvCacheDType::Float16,
                KvDType::Q8_0 => KvCacheDType::Q8_0,
            },
            enable_prefix_caching: !self.no_enable_prefix_caching,
            chat_template: self.chat_template.clone(),
            scheduling_policy: match self.scheduling_policy {
                Policy::Fcfs => SchedulingPolicy::Fcfs,
                Policy::Priority => SchedulingPolicy::Priority,
            },
            seed: self.seed,
            model_name: model_name.to_owned(),
        })
    }
}

/// A build without CUDA says so before anything is loaded.
pub fn check_device(device: DeviceChoice) -> Result<(), Error> {
    if matches!(device, DeviceChoice::Cuda(_)) && !cfg!(feature = "cuda") {
        return Err(Error::config(
            "--device",
            "this build of ember has no CUDA. Build it with `cargo build --release -p ember-server --features cuda`, or use --device cpu",
        ));
    }
    Ok(())
}

/// `auto`, `cpu`, `cuda` or `cuda:N`.
pub fn parse_device(text: &str) -> Result<DeviceChoice, String> {
    match text.split_once(':') {
        None if text == "auto" => Ok(DeviceChoice::Auto),
        None if text == "cpu" => Ok(DeviceChoice::Cpu),
        None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
        Some(("cuda", index)) => {
            index.parse().map(DeviceChoice::Cuda).map_err(|_| format!("`{index}` is not the index of a CUDA device"))
        }
        _ => Err("expected auto, cpu, cuda or cuda:N".into()),
    }
}

/// A number with an optional suffix: k, m, g are powers of 1000 and may follow a fraction; K, M, G
/// are powers of 1024.
pub fn parse_size(text: &str) -> Result<usize, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (&text[..at], Some(unit)),
        _ => (text, None),
    };
    let wrong = || format!("`{text}` is not a number such as 8192, 8k (8000) or 8K (8192)");
    let scale: u64 = match unit {
        None => 1,
        Some('k') => 1000,
        Some('m') => 1_000_000,
        Some('g') => 1_000_000_000,
        Some('K') => 1 << 10,
        Some('M') => 1 << 20,
        Some('G') => 1 << 30,
        Some(_) => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).and_then(|size| size.try_into().ok()).ok_or_else(wrong);
    }
    match (number.parse::<f64>(), unit) {
        (Ok(number), Some('k' | 'm' | 'g')) if number.is_finite() && number >= 0.0 => {
            Ok((number * scale as f64).round() as usize)
        }
        _ => Err(wrong()),
    }
}

fn parse_auto_size(text: &str) -> Result<AutoSize, String> {
    match text {
        "auto" | "-1" => Ok(AutoSize::Auto),
        text => parse_size(text).map(AutoSize::Size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_decimal_and_binary_suffixes() {
        for (text, expected) in
            [("8192", 8192), ("8k", 8000), ("8K", 8192), ("25.6k", 25_600), ("4G", 4 << 30), ("1m", 1_000_000)]
        {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for text in ["", "k", "-1", "8x", "2.5K", "1e400k", "99999999999G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_auto_size("-1"), Ok(AutoSize::Auto));
    }

    #[test]
    fn devices_are_named_or_numbered() {
        assert_eq!(parse_device("cuda:3"), Ok(DeviceChoice::Cuda(3)));
        assert_eq!(parse_device("cuda"), Ok(DeviceChoice::Cuda(0)));
        assert!(parse_device("cuda:x").is_err() && parse_device("tpu").is_err());
    }
}
