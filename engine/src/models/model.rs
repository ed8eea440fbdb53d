//! [`Model`]: everything that is read from a model folder or GGUF file.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{ARCHITECTURES, Architecture, GenerationDefaults, HfConfig, quantization};
use crate::{
    Error, LoadFormat,
    decoder::DecoderSpec,
    text::{ChatTemplate, Tokenizer},
    weights::{
        DType, WeightSource,
        dummy::DummySource,
        gguf::{Gguf, GgufSource, PartName},
        safetensors::{Layout, SafetensorsFolder, SafetensorsSource},
    },
};

/// A model on disk, opened and checked; weights are mapped, not read.
pub struct Model {
    /// The folder or file that was opened.
    pub path: PathBuf,
    /// Its dimensions and options.
    pub spec: DecoderSpec,
    /// Its weights.
    pub weights: Box<dyn WeightSource>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template, if it has one.
    pub chat_template: Option<ChatTemplate>,
    /// What it says of how to generate.
    pub generation: GenerationDefaults,
    /// Stored element type of most weights, such as `BF16` or `Q4_1`; `dummy` for random weights.
    pub file_dtype: String,
}

impl Model {
    /// Opens the model at `path`: a folder with config.json, a GGUF file, or a folder with one GGUF file; of a
    /// split file, any part.
    /// With [`LoadFormat::Dummy`] weights are random, from `seed`, and neither weights nor tokenizer need
    /// be there.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file that is missing, broken or not supported, and what to do.
    pub fn open(path: &Path, load_format: LoadFormat, seed: u64) -> Result<Self, Error> {
        match locate(path)? {
            Location::Folder => Self::open_folder(path, load_format, seed),
            Location::Gguf(file) => Self::open_gguf(path, &file, load_format, seed),
        }
    }

    /// Opens the model at `path` for its hidden states: the output projection need not be there, nor a Hugging Face
    /// class's name be that of a generating model.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn open_headless(path: &Path, load_format: LoadFormat, seed: u64) -> Result<Self, Error> {
        if let Location::Gguf(file) = locate(path)? {
            return Self::open_gguf(path, &file, load_format, seed);
        }
        let config = HfConfig::open(&path.join("config.json"))?;
        let name = config.architecture()?;
        let generating = super::generating_name(name);
        let architecture = find(&config, generating.as_deref().unwrap_or(name))?;
        // No output projection is looked for.
        let spec = DecoderSpec { tie_embeddings: true, ..architecture.spec_from_config(&config)? };
        Self::from_folder(path, &config, (architecture, spec), (load_format, seed))
    }

    fn open_folder(path: &Path, load_format: LoadFormat, seed: u64) -> Result<Self, Error> {
        let config = HfConfig::open(&path.join("config.json"))?;
        let architecture = find(&config, config.architecture()?)?;
        let spec = architecture.spec_from_config(&config)?;
        Self::from_folder(path, &config, (architecture, spec), (load_format, seed))
    }

    fn from_folder(
        path: &Path,
        config: &HfConfig,
        (architecture, spec): (&'static dyn Architecture, DecoderSpec),
        (load_format, seed): (LoadFormat, u64),
    ) -> Result<Self, Error> {
        let fp8_block = quantization::fp8_block(config)?;
        let (weights, file_dtype): (Box<dyn WeightSource>, _) = match load_format {
            LoadFormat::Dummy => dummy(&spec, seed)?,
            LoadFormat::Auto => {
                let files = SafetensorsFolder::open(path)?;
                // Saved without the output projection, tensors lack this prefix.
                let prefix = if files.contains("embed_tokens.weight") { "model." } else { "" };
                let tensor_name = Box::new(move |weight| {
                    let name = architecture.hf_weight_name(weight);
                    name.strip_prefix(prefix).map_or(name.clone(), str::to_owned)
                });
                stored(SafetensorsSource::new(files, spec.clone(), Layout { tensor_name, fp8_block })?, &spec)?
            }
        };
        let tokenizer = if load_format == LoadFormat::Dummy && !path.join("tokenizer.json").is_file() {
            Tokenizer::byte_level(spec.vocab_size)?
        } else {
            Tokenizer::from_folder(path)?
        };
        let chat_template = ChatTemplate::from_folder(path, &tokenizer)?;
        let generation = GenerationDefaults::from_folder(path, config, &tokenizer)?;
        Ok(Self { path: path.to_owned(), spec, weights, tokenizer, chat_template, generation, file_dtype })
    }

    fn open_gguf(path: &Path, file: &Path, load_format: LoadFormat, seed: u64) -> Result<Self, Error> {
        let gguf = Arc::new(Gguf::open(file)?);
        let name = gguf.string("general.architecture")?;
        let name = name.ok_or_else(|| gguf.error("metadata key 'general.architecture' is missing"))?;
        let architecture = ARCHITECTURES.iter().find(|a| a.gguf_names().contains(&name)).ok_or_else(|| {
            let hint = if name == "bert" { "; it makes embeddings, with --runner pooling" } else { "" };
            gguf.error(unsupported_architecture(name, |a| a.gguf_names()) + hint)
        })?;
        let spec = architecture.spec_from_gguf(&gguf)?;
        let (weights, file_dtype) = match load_format {
            LoadFormat::Dummy => dummy(&spec, seed)?,
            LoadFormat::Auto => {
                stored(GgufSource::new(gguf.clone(), spec.clone(), architecture.gguf_interleaved_rope())?, &spec)?
            }
        };
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let chat_template = ChatTemplate::from_gguf(&gguf, &tokenizer)?;
        let generation = GenerationDefaults::from_tokenizer(&tokenizer);
        Ok(Self { path: path.to_owned(), spec, weights, tokenizer, chat_template, generation, file_dtype })
    }
}

/// The architecture of the class `name`.
fn find(config: &HfConfig, name: &str) -> Result<&'static dyn Architecture, Error> {
    super::by_hf_name(name).ok_or_else(|| {
        let hint = match super::generating_name(name) {
            Some(_) => "; it makes embeddings, with --runner pooling",
            None => "",
        };
        config.error(unsupported_architecture(name, |a| a.hf_names()) + hint)
    })
}

/// Random weights of `spec`.
fn dummy(spec: &DecoderSpec, seed: u64) -> Result<(Box<dyn WeightSource>, String), Error> {
    Ok((Box::new(DummySource::new(spec.clone(), seed, DType::BF16)?), "dummy".into()))
}

/// The weights of `spec` in `source`, and the name of their typical element type.
fn stored(source: impl WeightSource + 'static, spec: &DecoderSpec) -> Result<(Box<dyn WeightSource>, String), Error> {
    let dtype = source.typical_type(spec)?;
    Ok((Box::new(source), dtype))
}

/// What a model path turned out to be.
pub(crate) enum Location {
    /// A folder with config.json.
    Folder,
    /// This GGUF file.
    Gguf(PathBuf),
}

/// Looks what is at `path`.
///
/// # Errors
/// [`Error::Model`] if it is no model.
pub(crate) fn locate(path: &Path) -> Result<Location, Error> {
    let has_gguf_suffix = |p: &Path| p.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if path.is_file() {
        // Caches of other tools store GGUF files without the suffix; the reader checks the first bytes.
        return Ok(Location::Gguf(path.to_owned()));
    }
    if !path.is_dir() {
        return Err(Error::model(
            path,
            "no such file or folder; give a model folder with config.json, or a .gguf file",
        ));
    }
    if path.join("config.json").is_file() {
        return Ok(Location::Folder);
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::model(path, format!("cannot read the folder: {e}")))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| has_gguf_suffix(file) && file.is_file());
    files.sort();
    // The other parts of a split file are found from one of them.
    let mut models: Vec<Option<String>> = Vec::new();
    files.retain(|file| {
        let model = PartName::of(file).map(|name| name.sibling(1));
        let is_new = model.is_none() || !models.contains(&model);
        models.push(model);
        is_new
    });
    match files.as_slice() {
        [file] => Ok(Location::Gguf(file.clone())),
        [] => Err(Error::model(path, "neither config.json nor a .gguf file is in this folder")),
        _ => {
            let names: Vec<_> =
                files.iter().filter_map(|f| Some(f.file_name()?.to_string_lossy().into_owned())).collect();
            Err(Error::model(path, format!("several .gguf files; name one of them: {}", names.join(", "))))
        }
    }
}

fn unsupported_architecture(name: &str, names: impl Fn(&dyn Architecture) -> &'static [&'static str]) -> String {
    let supported: Vec<_> = ARCHITECTURES.iter().flat_map(|a| names(*a)).copied().collect();
    format!("architecture '{name}' is not supported; supported are {}", supported.join(", "))
}

/// Checks that the numbers of `spec` go together and that sizes cannot overflow.
pub(super) fn check_dimensions(spec: &DecoderSpec) -> Result<(), String> {
    const MAX: usize = 1 << 24;
    let sizes = [
        ("hidden size", spec.hidden_size),
        ("MLP size", spec.intermediate_size),
        ("number of heads", spec.n_heads),
        ("number of key/value heads", spec.n_kv_heads),
        ("head width", spec.head_dim),
        ("vocabulary size", spec.vocab_size),
    ];
    for (what, n) in sizes {
        if n == 0 || n > MAX {
            return Err(format!("the {what} is {n}; it must be between 1 and {MAX}"));
        }
    }
    if spec.n_layers == 0 || spec.n_layers > 4096 {
        return Err(format!("the number of layers is {}; it must be between 1 and 4096", spec.n_layers));
    }
    if !spec.n_heads.is_multiple_of(spec.n_kv_heads) {
        return Err(format!("{} heads cannot share {} key/value heads evenly", spec.n_heads, spec.n_kv_heads));
    }
    if !spec.head_dim.is_multiple_of(2) || spec.n_heads * spec.head_dim > MAX {
        return Err(format!("{} heads of width {} are not supported", spec.n_heads, spec.head_dim));
    }
    if let Some(moe) = &spec.moe {
        let sizes = [
            ("number of experts", moe.n_experts),
            ("width of an expert", moe.intermediate_size),
            ("width of the shared expert", moe.shared_intermediate_size.unwrap_or(1)),
            ("number of a token's experts", moe.n_experts_per_token),
        ];
        if let Some((what, n)) = sizes.into_iter().find(|&(_, n)| n == 0 || n > MAX) {
            return Err(format!("the {what} is {n}; it must be between 1 and {MAX}"));
        }
        if moe.n_experts_per_token > moe.n_experts {
            return Err(format!("{} of {} experts cannot be chosen", moe.n_experts_per_token, moe.n_experts));
        }
    }
    if spec.max_position == 0 || !spec.norm_eps.is_finite() || spec.norm_eps < 0.0 {
        return Err(format!(
            "the context length ({}) must be positive and the norm's epsilon ({}) not negative",
            spec.max_position, spec.norm_eps
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        decoder::{LayerWeight, Rope, RopeScaling, Weight, Yarn},
        text::{ChatOptions, test_model::smollm2_path},
    };

    fn llama_config() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "eos_token_id": [7, 8], "bos_token_id": 1,
        })
    }

    fn with(mut config: Value, changes: Value) -> Value {
        if let (Some(config), Value::Object(changes)) = (config.as_object_mut(), changes) {
            config.extend(changes);
        }
        config
    }

    fn folder(config: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
        folder
    }

    fn open_dummy(config: &Value) -> Result<Model, Error> {
        Model::open(folder(config).path(), LoadFormat::Dummy, 0)
    }

    fn error_of(config: &Value) -> String {
        open_dummy(config).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn smollm2_opens_as_it_is() {
        let model = Model::open(&smollm2_path(), LoadFormat::Auto, 0).expect("valid");
        let expected = DecoderSpec {
            architecture: "LlamaForCausalLM".into(),
            hidden_size: 576,
            intermediate_size: 1536,
            n_layers: 30,
            n_heads: 9,
            n_kv_heads: 3,
            head_dim: 64,
            vocab_size: 49_152,
            max_position: 8192,
            norm_eps: 1e-5,
            rope: Rope { theta: 100_000.0, scaling: RopeScaling::None },
            tie_embeddings: true,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            moe: None,
        };
        assert_eq!(model.spec, expected);
        assert_eq!(model.spec.n_parameters(), 134_515_008);
        assert_eq!(model.file_dtype, "Q4_1");
        assert_eq!((model.generation.eos_token_ids, model.generation.bos_token_id), (vec![2, 0], Some(1)));
        let template = model.chat_template.expect("there");
        let text = template.render(&[json!({"role": "user", "content": "Hi"})], &ChatOptions::default());
        assert!(text.expect("rendered").contains("<|im_start|>user\nHi<|im_end|>"));
        // Values from PyPI's gguf: row 33 of head 1's q in rotate-half order is stored row 64 + 2 * 1 + 1.
        let q = model.weights.get(Weight::Layer(0, LayerWeight::QProj)).expect("there");
        let row = q.rows(64 + 33..64 + 34);
        let expected = [
            -0.004_882_812_5,
            0.047_729_492,
            -0.057_495_117,
            0.363_403_32,
            -0.110_107_42,
            -0.425_781_25,
            0.047_729_492,
        ];
        for (value, expected) in row.to_f32().iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{value} is not {expected}");
        }
    }

    #[test]
    fn a_folder_of_config_alone_runs_on_random_weights() {
        let model = open_dummy(&llama_config()).expect("valid");
        assert_eq!(model.spec.head_dim, 16);
        assert_eq!(model.spec.rope.theta, 500_000.0);
        assert_eq!((model.file_dtype.as_str(), model.tokenizer.vocab_size()), ("dummy", 300));
        assert_eq!((model.generation.eos_token_ids, model.generation.bos_token_id), (vec![7, 8], Some(1)));
        assert!(model.chat_template.is_none());
        for weight in model.spec.weights() {
            assert_eq!(Some(model.weights.get(weight).expect("there").shape), model.spec.shape(weight));
        }
    }

    #[test]
    fn generation_config_is_read() {
        let folder = folder(&llama_config());
        let generation = json!({"eos_token_id": 9, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 64,
            "repetition_penalty": 1.05, "min_p": null, "do_sample": true});
        std::fs::write(folder.path().join("generation_config.json"), generation.to_string()).expect("written");
        let generation = Model::open(folder.path(), LoadFormat::Dummy, 0).expect("valid").generation;
        let expected = GenerationDefaults {
            eos_token_ids: vec![9, 7, 8],
            bos_token_id: Some(1),
            temperature: Some(0.6),
            top_p: Some(0.9),
            top_k: Some(20),
            min_p: None,
            repetition_penalty: Some(1.05),
            max_new_tokens: Some(64),
        };
        assert_eq!(generation, expected);
    }

    #[test]
    fn architectures_differ_where_they_should() {
        let spec = |changes: Value| open_dummy(&with(llama_config(), changes)).map(|model| model.spec).expect("valid");
        let biased = spec(json!({"attention_bias": true, "mlp_bias": true, "tie_word_embeddings": true}));
        assert!(biased.qkv_bias && biased.o_bias && biased.mlp_bias && biased.tie_embeddings);
        let qwen =
            spec(json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": false}));
        assert!(qwen.qkv_bias && !qwen.o_bias && qwen.sliding_window.is_none());
        let mistral = spec(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 128, "head_dim": 32}));
        assert_eq!((mistral.sliding_window, mistral.head_dim), (Some(128), 32));
        assert_eq!(spec(json!({"architectures": ["MistralForCausalLM"]})).sliding_window, Some(4096));
        let qwen3 = spec(json!({"architectures": ["Qwen3ForCausalLM"], "attention_bias": true}));
        assert!(qwen3.qk_norm && qwen3.qkv_bias && qwen3.o_bias && qwen3.head_dim == 128);

        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        assert_eq!(spec(json!({"rope_scaling": llama3})).rope.scaling, scaling);
        let newer = spec(json!({"rope_theta": null, "rope_parameters": with(llama3, json!({"rope_theta": 1e6}))}));
        assert_eq!(newer.rope, Rope { theta: 1e6, scaling });
        let linear = spec(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}));
        assert_eq!(linear.rope.scaling, RopeScaling::Linear(2.0));
        assert_eq!(linear.max_position, 1024);
        assert_eq!(spec(json!({"rope_parameters": {"rope_type": "default"}})).rope.scaling, RopeScaling::None);
        let dynamic = spec(json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}));
        assert_eq!((dynamic.rope.scaling, dynamic.max_position), (RopeScaling::Dynamic(4.0), 2048));
        let yarn = |fields: Value| spec(json!({"rope_scaling": with(json!({"type": "yarn", "factor": 4.0}), fields)}));
        let default = yarn(json!({}));
        let paper = Yarn {
            factor: 4.0,
            original_max_position: 512,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.138_629_4,
            truncate: true,
        };
        assert_eq!((default.rope.scaling, default.max_position), (RopeScaling::Yarn(paper.clone()), 2048));
        let changed = yarn(json!({"original_max_position_embeddings": 100, "mscale": 1.0, "mscale_all_dim": 1.0,
            "truncate": false, "beta_fast": 16}));
        let expected =
            Yarn { original_max_position: 100, attention_factor: 1.0, truncate: false, beta_fast: 16.0, ..paper };
        assert_eq!((changed.rope.scaling, changed.max_position), (RopeScaling::Yarn(expected), 400));
    }

    #[test]
    fn config_errors_name_the_field() {
        let check = |changes: Value, expected: &str| {
            let message = error_of(&with(llama_config(), changes));
            assert!(message.contains("config.json: ") && message.contains(expected), "{message:?} lacks {expected:?}");
        };
        check(
            json!({"architectures": ["BloomForCausalLM"]}),
            "'BloomForCausalLM' is not supported; supported are LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, \
             Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM",
        );
        check(json!({"architectures": null}), "'architectures' must name");
        check(json!({"hidden_size": "big"}), "'hidden_size' must be a positive integer");
        check(json!({"num_hidden_layers": null}), "'num_hidden_layers' is missing");
        check(json!({"num_key_value_heads": 3}), "4 heads cannot share 3");
        check(json!({"hidden_act": "gelu"}), "'hidden_act' is 'gelu'");
        check(json!({"rope_scaling": {"rope_type": "longrope"}}), "'rope_scaling' is of type 'longrope'");
        check(
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2, "alpha": 1}}),
            "'rope_scaling.alpha' is not",
        );
        check(json!({"partial_rotary_factor": 0.5}), "'partial_rotary_factor' is 0.5");
        let experts = json!({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 5,
            "moe_intermediate_size": 32});
        check(experts.clone(), "5 of 4 experts cannot be chosen");
        check(with(experts.clone(), json!({"mlp_only_layers": 3})), "'mlp_only_layers' must be a list");
        check(with(experts.clone(), json!({"num_experts": null})), "'num_local_experts' is missing");
        check(with(experts, json!({"moe_intermediate_size": 0})), "'moe_intermediate_size' must be a positive integer");
        check(json!({"rope_scaling": {"rope_type": "linear"}}), "'rope_scaling.factor' must be");
        check(json!({"quantization_config": {"quant_method": "awq"}}), "quantised (awq), which is not");
        let gptq = json!({"quant_method": "compressed-tensors", "format": "pack-quantized"});
        check(json!({"quantization_config": gptq}), "quantised (compressed-tensors, format pack-quantized)");
        check(
            json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}),
            "'quantization_config.weight_block_size' must be two positive integers",
        );
        check(json!({"eos_token_id": "x"}), "'eos_token_id' must be a token id");
        check(json!({"num_hidden_layers": 1u64 << 40}), "'num_hidden_layers' must be");
    }

    #[test]
    fn path_errors_say_what_to_do() {
        let open =
            |path: &Path| Model::open(path, LoadFormat::Auto, 0).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(open(Path::new("/no/such/model")).contains("/no/such/model: no such file or folder"));
        let folder = folder(&llama_config());
        assert!(open(folder.path()).contains("no weights"), "{}", open(folder.path()));
        std::fs::remove_file(folder.path().join("config.json")).expect("removed");
        assert!(open(folder.path()).contains("neither config.json nor a .gguf file"));
        std::fs::write(folder.path().join("a.gguf"), "GGUF").expect("written");
        assert!(open(folder.path()).contains("a.gguf: "));
        std::fs::remove_file(folder.path().join("a.gguf")).expect("removed");
        for part in ["b-00002-of-00003.gguf", "b-00003-of-00003.gguf"] {
            std::fs::write(folder.path().join(part), "GGUF").expect("written");
        }
        assert!(open(folder.path()).contains("b-00002-of-00003.gguf: "), "{}", open(folder.path()));
        std::fs::write(folder.path().join("a.gguf"), "GGUF").expect("written");
        assert!(open(folder.path()).contains("several .gguf files; name one of them: a.gguf, b-00002-of-00003.gguf"));
    }
}
