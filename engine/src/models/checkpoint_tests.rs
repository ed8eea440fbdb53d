//! Tiny random checkpoints of every architecture, written as other programs write them, through both executors of the
//! CPU, against a decoder of plain loops that is given the weights themselves.

#[path = "../../tests/oracle/mod.rs"]
mod oracle;

use std::{borrow::Cow, collections::HashMap};

use burn::tensor::Device;
use oracle::Oracle;
use serde_json::{Value, json};

use super::Model;
use crate::{
    EngineConfig, LoadFormat,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Rope, RopeScaling, Weight},
    executors::{
        burn::BurnExecutor,
        comparison::{Batch, Choice, Scores, prompt_token, run},
        cpu::CpuExecutor,
    },
    quant,
    weights::{DType, TensorView, gguf::writer::GgufWriter},
};

/// Greatest difference of a log-probability in float32.
const TOLERANCE: f32 = 1e-4;
/// The same with half-precision keys and values and 16-bit activations.
const TUNED_TOLERANCE: f32 = 4e-3;

/// Names of a layer's tensors in transformers and in llama.cpp.
const NAMES: [(LayerWeight, &str, &str); 19] = [
    (LayerWeight::InputNorm, "input_layernorm.weight", "attn_norm.weight"),
    (LayerWeight::QProj, "self_attn.q_proj.weight", "attn_q.weight"),
    (LayerWeight::KProj, "self_attn.k_proj.weight", "attn_k.weight"),
    (LayerWeight::VProj, "self_attn.v_proj.weight", "attn_v.weight"),
    (LayerWeight::QBias, "self_attn.q_proj.bias", "attn_q.bias"),
    (LayerWeight::KBias, "self_attn.k_proj.bias", "attn_k.bias"),
    (LayerWeight::VBias, "self_attn.v_proj.bias", "attn_v.bias"),
    (LayerWeight::QNorm, "self_attn.q_norm.weight", "attn_q_norm.weight"),
    (LayerWeight::KNorm, "self_attn.k_norm.weight", "attn_k_norm.weight"),
    (LayerWeight::OProj, "self_attn.o_proj.weight", "attn_output.weight"),
    (LayerWeight::PostAttentionNorm, "post_attention_layernorm.weight", "ffn_norm.weight"),
    (LayerWeight::GateProj, "mlp.gate_proj.weight", "ffn_gate.weight"),
    (LayerWeight::UpProj, "mlp.up_proj.weight", "ffn_up.weight"),
    (LayerWeight::DownProj, "mlp.down_proj.weight", "ffn_down.weight"),
    (LayerWeight::Router, "mlp.gate.weight", "ffn_gate_inp.weight"),
    (LayerWeight::SharedGateProj, "mlp.shared_expert.gate_proj.weight", "ffn_gate_shexp.weight"),
    (LayerWeight::SharedUpProj, "mlp.shared_expert.up_proj.weight", "ffn_up_shexp.weight"),
    (LayerWeight::SharedDownProj, "mlp.shared_expert.down_proj.weight", "ffn_down_shexp.weight"),
    (LayerWeight::SharedRouter, "mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight"),
];

/// Names of an expert's tensors: in transformers, in Mixtral's own, in llama.cpp's for all experts.
const EXPERT_NAMES: [(ExpertWeight, &str, &str, &str); 3] = [
    (ExpertWeight::Gate, "gate_proj", "w1", "ffn_gate_exps.weight"),
    (ExpertWeight::Up, "up_proj", "w3", "ffn_up_exps.weight"),
    (ExpertWeight::Down, "down_proj", "w2", "ffn_down_exps.weight"),
];

/// A name in transformers and in llama.cpp.
fn names(weight: Weight, is_mixtral: bool) -> (String, String) {
    match weight {
        Weight::Layer(layer, LayerWeight::Router) if is_mixtral => {
            let (_, gguf) = names(weight, false);
            (format!("model.layers.{layer}.block_sparse_moe.gate.weight"), gguf)
        }
        Weight::Expert(layer, expert, weight) => {
            let (_, hf, mixtral, gguf) = EXPERT_NAMES.iter().find(|(w, ..)| *w == weight).expect("a name");
            let hf = match is_mixtral {
                true => format!("block_sparse_moe.experts.{expert}.{mixtral}.weight"),
                false => format!("mlp.experts.{expert}.{hf}.weight"),
            };
            (format!("model.layers.{layer}.{hf}"), format!("blk.{layer}.{gguf}"))
        }
        Weight::Embedding => ("model.embed_tokens.weight".into(), "token_embd.weight".into()),
        Weight::FinalNorm => ("model.norm.weight".into(), "output_norm.weight".into()),
        Weight::LmHead => ("lm_head.weight".into(), "output.weight".into()),
        Weight::Layer(layer, weight) => {
            let (_, hf, gguf) = NAMES.iter().find(|(w, ..)| *w == weight).expect("a name");
            (format!("model.layers.{layer}.{hf}"), format!("blk.{layer}.{gguf}"))
        }
    }
}

/// The number of a type in GGUF files.
fn ggml_type(dtype: DType) -> u32 {
    match dtype {
        DType::Quant(format) => format.ggml_type(),
        _ => 0,
    }
}

/// Random weights, as transformers has them.
struct Checkpoint {
    spec: DecoderSpec,
    tensors: HashMap<Weight, TensorView<'static>>,
}

impl Checkpoint {
    /// Single precision, but `formats` for these weights of every layer; an expert's are as those of a plain MLP.
    fn random(spec: DecoderSpec, formats: &[(LayerWeight, &str)]) -> Self {
        use LayerWeight::{InputNorm, KBias, KNorm, PostAttentionNorm, QBias, QNorm, VBias};
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let tensor = |(i, weight): (usize, Weight)| {
            let shape = spec.shape(weight).expect("a weight of the model");
            let n: usize = shape.iter().product();
            let kind = match weight {
                Weight::Layer(_, weight) => Some(weight),
                Weight::Expert(.., ExpertWeight::Gate) => Some(LayerWeight::GateProj),
                Weight::Expert(.., ExpertWeight::Up) => Some(LayerWeight::UpProj),
                Weight::Expert(.., ExpertWeight::Down) => Some(LayerWeight::DownProj),
                _ => None,
            };
            let format = formats.iter().find(|(w, _)| Some(*w) == kind);
            if let Some((_, name)) = format {
                let format = *quant::FORMATS.iter().find(|format| format.name() == *name).expect("a format");
                let data = quant::sample::blocks(format, n / format.block_size(), i as u64);
                return (weight, TensorView { dtype: DType::Quant(format), shape, data: Cow::Owned(data) });
            }
            let (middle, spread) = match weight {
                Weight::FinalNorm | Weight::Layer(_, InputNorm | PostAttentionNorm | QNorm | KNorm) => (1.0, 0.4),
                Weight::Layer(_, QBias | KBias | VBias) => (0.0, 0.5),
                // Errors of log-probabilities are in proportion to the logits.
                Weight::LmHead | Weight::Embedding => (0.0, 1.0 / (shape[1] as f32).sqrt()),
                Weight::Layer(..) | Weight::Expert(..) => (0.0, 2.5 / (shape[1] as f32).sqrt()),
            };
            let data = (0..n).flat_map(|_| (middle + spread * noise()).to_le_bytes()).collect();
            (weight, TensorView { dtype: DType::F32, shape, data: Cow::Owned(data) })
        };
        let tensors = spec.weights().enumerate().map(tensor).collect();
        Self { spec, tensors }
    }

    /// A Hugging Face folder.
    fn folder(&self, config: &Value) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).expect("written");
        let spec = &self.spec;
        let mut all = json!({
            "architectures": [spec.architecture], "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size, "num_hidden_layers": spec.n_layers,
            "num_attention_heads": spec.n_heads, "num_key_value_heads": spec.n_kv_heads,
            "vocab_size": spec.vocab_size, "max_position_embeddings": spec.max_position,
            "rms_norm_eps": 1e-5, "rope_theta": spec.rope.theta, "tie_word_embeddings": spec.tie_embeddings,
        });
        if let (Some(all), Some(config)) = (all.as_object_mut(), config.as_object()) {
            all.extend(config.clone());
        }
        write("config.json", all.to_string());
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
        });
        write("tokenizer.json", tokenizer.to_string());
        let views = self.tensors.iter().map(|(weight, tensor)| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, tensor.shape.clone(), &tensor.data);
            (names(*weight, spec.architecture == "MixtralForCausalLM").0, view.expect("whole"))
        });
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).expect("written");
        folder
    }

    /// A GGUF file of the architecture `name`. With `interleaved`, rows of q and k as llama.cpp's converter stores
    /// those of Llama.
    fn gguf(&self, name: &str, interleaved: bool) -> tempfile::NamedTempFile {
        let spec = &self.spec;
        let mut w = GgufWriter::default();
        w.string("general.architecture", name);
        let mut count = |key: &str, n: usize| _ = w.u32(&format!("{name}.{key}"), n as u32);
        count("embedding_length", spec.hidden_size);
        count("feed_forward_length", spec.intermediate_size);
        count("block_count", spec.n_layers);
        count("attention.head_count", spec.n_heads);
        count("attention.head_count_kv", spec.n_kv_heads);
        count("attention.key_length", spec.head_dim);
        count("attention.value_length", spec.head_dim);
        count("context_length", spec.max_position);
        if let Some(moe) = &spec.moe {
            count("expert_count", moe.n_experts);
            count("expert_used_count", moe.n_experts_per_token);
        }
        w.f32(&format!("{name}.attention.layer_norm_rms_epsilon"), spec.norm_eps);
        w.f32(&format!("{name}.rope.freq_base"), spec.rope.theta);
        w.string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", &["a", "b"]);
        w.strings("tokenizer.ggml.merges", &[]);
        for (weight, tensor) in &self.tensors {
            use LayerWeight::{KBias, KProj, QBias, QProj, SharedRouter};
            let (mut shape, mut data) = (tensor.shape.clone(), tensor.data.to_vec());
            match *weight {
                Weight::Layer(_, QProj | KProj | QBias | KBias) if interleaved => data = self.interleave(tensor),
                Weight::Layer(_, SharedRouter) => _ = shape.remove(0),
                // The first stands for all.
                Weight::Expert(layer, 0, kind) => {
                    let moe = spec.moe_of(layer).expect("a mixture");
                    let of = |expert: usize| &*self.tensors[&Weight::Expert(layer, expert, kind)].data;
                    data = (0..moe.n_experts).flat_map(of).copied().collect();
                    shape.insert(0, moe.n_experts);
                }
                Weight::Expert(..) => continue,
                _ => (),
            }
            w.tensor(&names(*weight, false).1, &shape, ggml_type(tensor.dtype), data);
        }
        w.file()
    }

    /// Puts row `i` of a head's first half beside row `i` of its second.
    fn interleave(&self, tensor: &TensorView<'_>) -> Vec<u8> {
        let row_bytes = tensor.data.len() / tensor.shape[0];
        let row = |row: usize| &tensor.data[row * row_bytes..][..row_bytes];
        let half = self.spec.head_dim / 2;
        let heads = (0..tensor.shape[0]).step_by(2 * half);
        heads.flat_map(|head| (0..half).flat_map(move |i| [row(head + i), row(head + half + i)].concat())).collect()
    }

    fn oracle(&self, spec: &DecoderSpec) -> Oracle {
        Oracle::new(spec, |weight| self.tensors[&weight].to_f32().into_owned())
    }

    /// Runs `model` on both executors.
    fn check(&self, model: &Model) {
        let spec = &self.spec;
        assert_eq!(model.spec, *spec);
        let config = EngineConfig {
            max_num_seqs: Some(8),
            max_num_batched_tokens: Some(256),
            kv_cache_memory_bytes: Some(4 << 20),
            ..EngineConfig::default()
        };
        let batch = Batch::new("three in chunks", vec![45, 1, 17], 24);
        let mut portable = BurnExecutor::new(spec, &*model.weights, &config, Device::flex()).expect("loads");
        let scores = run(&mut portable, &batch, spec.vocab_size, Choice::Greedy).expect("runs");
        let oracle = self.oracle(spec);
        let difference = greatest(&distances(&oracle, &batch, &scores, spec.vocab_size));
        let mut tuned = CpuExecutor::new(spec, &*model.weights, &config).expect("loads");
        let forced = run(&mut tuned, &batch, spec.vocab_size, Choice::Forced(&scores.tokens)).expect("runs");
        let mut tuned_differences = distances(&oracle, &batch, &forced, spec.vocab_size);
        if spec.moe.is_some() {
            // Of two experts that are nearly equal, half precision may choose the other.
            tuned_differences.sort_by(f32::total_cmp);
            tuned_differences.truncate(tuned_differences.len() * 9 / 10);
        }
        let tuned_difference = greatest(&tuned_differences);
        println!(
            "{}, {}: {difference:.2e} portable, {tuned_difference:.2e} tuned",
            spec.architecture, model.file_dtype
        );
        assert!(difference < TOLERANCE, "portable: {difference}");
        assert!(tuned_difference < TUNED_TOLERANCE, "tuned: {tuned_difference}");

        // The comparison notices every option.
        let moe = spec.moe.clone();
        for without in [
            DecoderSpec {
                moe: moe.clone().map(|moe| Moe { norm_topk_prob: !moe.norm_topk_prob, ..moe }),
                ..spec.clone()
            },
            DecoderSpec { moe: moe.clone().map(|moe| Moe { n_experts_per_token: 1, ..moe }), ..spec.clone() },
            DecoderSpec { moe: moe.map(|moe| Moe { shared_intermediate_size: None, ..moe }), ..spec.clone() },
            DecoderSpec { qk_norm: false, ..spec.clone() },
            DecoderSpec { qkv_bias: false, ..spec.clone() },
            DecoderSpec { sliding_window: None, ..spec.clone() },
        ] {
            let difference = greatest(&distances(&self.oracle(&without), &batch, &scores, spec.vocab_size));
            assert!(without == *spec || difference > 0.02, "{without:?}: {difference}");
        }
    }
}

/// Differences of the log-probabilities from the oracle's.
fn distances(oracle: &Oracle, batch: &Batch, scores: &Scores, vocab: usize) -> Vec<f32> {
    let mut differences = Vec::new();
    for (seq, &n_prompt) in batch.prompts.iter().enumerate() {
        let mut cache = oracle.cache();
        let mut token = prompt_token(seq, 0, vocab);
        let entries: Vec<_> = scores.prompts[seq].iter().chain(&scores.outputs[seq]).collect();
        assert_eq!(entries.len(), n_prompt - 1 + scores.outputs[seq].len());
        for (i, entry) in entries.into_iter().enumerate() {
            let log_probs = oracle.log_probs(&oracle.forward(token, &mut cache));
            if i + 1 < n_prompt {
                assert_eq!(entry.token_id, prompt_token(seq, i + 1, vocab));
            }
            token = entry.token_id;
            let difference = (log_probs[token as usize] - entry.logprob).abs();
            differences.push(if difference.is_finite() { difference } else { f32::INFINITY });
        }
    }
    differences
}

fn greatest(differences: &[f32]) -> f32 {
    differences.iter().copied().fold(0.0, f32::max)
}

fn llama() -> DecoderSpec {
    DecoderSpec {
        architecture: "LlamaForCausalLM".into(),
        hidden_size: 64,
        intermediate_size: 96,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        head_dim: 16,
        vocab_size: 300,
        max_position: 256,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        moe: None,
    }
}

fn mistral() -> DecoderSpec {
    DecoderSpec { architecture: "MistralForCausalLM".into(), head_dim: 32, sliding_window: Some(20), ..llama() }
}

fn qwen2() -> DecoderSpec {
    let rope = Rope { theta: 1e6, ..llama().rope };
    DecoderSpec { architecture: "Qwen2ForCausalLM".into(), qkv_bias: true, tie_embeddings: true, rope, ..llama() }
}

fn qwen3() -> DecoderSpec {
    let rope = Rope { theta: 1e6, ..llama().rope };
    DecoderSpec { architecture: "Qwen3ForCausalLM".into(), qk_norm: true, head_dim: 32, rope, ..llama() }
}

/// Every second layer has experts.
fn qwen2_moe() -> DecoderSpec {
    let moe = Moe {
        n_experts: 7,
        n_experts_per_token: 3,
        intermediate_size: 48,
        shared_intermediate_size: Some(80),
        norm_topk_prob: false,
        dense_layers: vec![0],
    };
    DecoderSpec { architecture: "Qwen2MoeForCausalLM".into(), n_layers: 2, moe: Some(moe), ..qwen2() }
}

fn qwen3_moe() -> DecoderSpec {
    let moe = Moe {
        n_experts: 8,
        n_experts_per_token: 2,
        intermediate_size: 32,
        shared_intermediate_size: None,
        norm_topk_prob: true,
        dense_layers: vec![],
    };
    DecoderSpec { architecture: "Qwen3MoeForCausalLM".into(), moe: Some(moe), ..qwen3() }
}

fn mixtral() -> DecoderSpec {
    let moe = Moe {
        n_experts: 4,
        n_experts_per_token: 2,
        intermediate_size: llama().intermediate_size,
        shared_intermediate_size: None,
        norm_topk_prob: true,
        dense_layers: vec![],
    };
    DecoderSpec { architecture: "MixtralForCausalLM".into(), moe: Some(moe), ..llama() }
}

/// A width that holds whole blocks of every format.
fn wide(spec: DecoderSpec) -> DecoderSpec {
    let widen = |moe: Moe| Moe {
        intermediate_size: 256,
        shared_intermediate_size: moe.shared_intermediate_size.map(|_| 256),
        ..moe
    };
    let moe = spec.moe.map(widen);
    DecoderSpec { hidden_size: 256, intermediate_size: 512, head_dim: 64, moe, ..spec }
}

#[test]
fn folders_run_as_the_oracle_does() {
    let check = |spec: DecoderSpec, config: Value| {
        let checkpoint = Checkpoint::random(spec, &[]);
        let folder = checkpoint.folder(&config);
        checkpoint.check(&Model::open(folder.path(), LoadFormat::Auto, 0).expect("opens"));
    };
    check(llama(), json!({}));
    check(mistral(), json!({"head_dim": 32, "sliding_window": 20}));
    check(DecoderSpec { sliding_window: None, ..mistral() }, json!({"head_dim": 32, "sliding_window": null}));
    check(qwen2(), json!({"use_sliding_window": false, "sliding_window": 20}));
    check(qwen3(), json!({"head_dim": 32, "attention_bias": false}));
    let windowed = json!({"head_dim": 32, "use_sliding_window": true, "sliding_window": 9, "max_window_layers": 0});
    check(DecoderSpec { sliding_window: Some(9), ..qwen3() }, windowed);
    let qwen2_experts = json!({"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80, "norm_topk_prob": false, "decoder_sparse_step": 2});
    check(qwen2_moe(), qwen2_experts);
    let qwen3_experts = json!({"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "norm_topk_prob": true});
    check(qwen3_moe(), qwen3_experts);
    check(mixtral(), json!({"num_local_experts": 4, "num_experts_per_tok": 2}));
}

#[test]
fn gguf_files_run_as_the_oracle_does() {
    use LayerWeight::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
    let check = |name: &str, spec: DecoderSpec, formats: &[(LayerWeight, &str)]| {
        let checkpoint = Checkpoint::random(spec, formats);
        let file = checkpoint.gguf(name, name == "llama");
        checkpoint.check(&Model::open(file.path(), LoadFormat::Auto, 0).expect("opens"));
    };
    check("llama", llama(), &[]);
    check("qwen2", qwen2(), &[]);
    check("qwen3", qwen3(), &[]);
    // Between them, every format.
    let few_bits =
        [(QProj, "Q4_K"), (KProj, "Q5_K"), (VProj, "Q6_K"), (OProj, "Q3_K"), (GateProj, "Q2_K"), (UpProj, "IQ4_XS")];
    check("llama", wide(llama()), &few_bits);
    let small_blocks = [(QProj, "Q5_0"), (KProj, "IQ4_NL"), (VProj, "Q5_1"), (OProj, "Q4_0"), (DownProj, "Q4_1")];
    check("qwen2", wide(qwen2()), &[small_blocks.as_slice(), &[(UpProj, "Q8_0"), (GateProj, "Q4_K")]].concat());
    check("qwen3", wide(qwen3()), &few_bits);
    check("qwen2moe", qwen2_moe(), &[]);
    check("qwen3moe", qwen3_moe(), &[]);
    check("llama", mixtral(), &[]);
    let of_experts = [(GateProj, "Q4_0"), (UpProj, "Q4_1"), (DownProj, "Q8_0"), (QProj, "Q8_0")];
    check("qwen2moe", wide(qwen2_moe()), &of_experts);
    check("qwen3moe", wide(qwen3_moe()), &few_bits);
    check("llama", wide(mixtral()), &small_blocks);
}

#[test]
fn what_a_checkpoint_lacks_is_named() {
    let mut checkpoint = Checkpoint::random(qwen3(), &[]);
    checkpoint.tensors.remove(&Weight::Layer(1, LayerWeight::KNorm));
    let message = |model: Result<Model, crate::Error>| model.err().map(|e| e.to_string()).unwrap_or_default();
    let folder = checkpoint.folder(&json!({"head_dim": 32}));
    let from_folder = message(Model::open(folder.path(), LoadFormat::Auto, 0));
    assert!(from_folder.contains("model.layers.1.self_attn.k_norm.weight"), "{from_folder}");
    let file = checkpoint.gguf("qwen3", false);
    let from_gguf = message(Model::open(file.path(), LoadFormat::Auto, 0));
    assert!(from_gguf.contains("'blk.1.attn_k_norm.weight' is missing"), "{from_gguf}");
}
