//! The whole executor against the portable one, on tiny random models that take every branch.

use burn::tensor::Device;

use super::*;
use crate::{
    decoder::{ExpertWeight, LayerWeight, Moe, Rope, RopeScaling, Weight},
    executors::{
        burn::BurnExecutor,
        comparison::{Batch, Choice, Scores, run},
    },
    quant,
    weights::{DType, TensorView, dummy::DummySource},
};

/// Greatest difference of a log-probability: half-precision keys and values, 16-bit activations.
const TOLERANCE: f32 = 2e-3;
/// The same with 8-bit keys and values.
const TOLERANCE_Q8_0: f32 = 5e-2;

pub(super) fn llama() -> DecoderSpec {
    DecoderSpec {
        architecture: "LlamaForCausalLM".into(),
        hidden_size: 96,
        intermediate_size: 160,
        n_layers: 2,
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 32,
        vocab_size: 509,
        max_position: 2048,
        norm_eps: 1e-5,
        rope: Rope {
            theta: 500_000.0,
            scaling: RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 256,
            },
        },
        tie_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        moe: None,
    }
}

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: Some(32),
        max_num_batched_tokens: Some(1024),
        kv_cache_memory_bytes: Some(16 << 20),
        ..EngineConfig::default()
    }
}

fn batches() -> Vec<Batch> {
    vec![
        Batch::new("one sequence", vec![37], 512),
        Batch::new("five, awkward lengths", vec![1, 15, 16, 17, 300], 1024),
        Batch::new("five in chunks", vec![1, 15, 16, 17, 300], 61),
        // The context is cut into parts, the last of one token.
        Batch::new("past two parts", vec![510, 255], 200),
        Batch::new("twelve", (0..12).map(|i| 5 + 7 * i).collect(), 512),
    ]
}

/// Runs every batch on both executors, with every instruction set and type of keys and values.
fn compare(name: &str, spec: &DecoderSpec, source: &dyn WeightSource) {
    let mut oracle = BurnExecutor::new(spec, source, &config(), Device::flex()).expect("the oracle loads");
    let expected: Vec<Scores> =
        batches().iter().map(|batch| run(&mut oracle, batch, spec.vocab_size, Choice::Greedy).expect("runs")).collect();
    for kernels in Kernels::available() {
        for (kv_cache_dtype, tolerance) in [(KvCacheDType::Auto, TOLERANCE), (KvCacheDType::Q8_0, TOLERANCE_Q8_0)] {
            let config = EngineConfig { kv_cache_dtype, ..config() };
            let mut tuned = CpuExecutor::with_kernels(spec, source, &config, kernels).expect("loads");
            for (batch, expected) in batches().iter().zip(&expected) {
                let forced = run(&mut tuned, batch, spec.vocab_size, Choice::Forced(&expected.tokens)).expect("runs");
                let difference = expected.difference(&forced);
                let case = format!("{name}, {}, {kv_cache_dtype:?}, {}", kernels.name, batch.name);
                assert!(difference < tolerance, "{case}: {difference}");
            }
        }
    }
}

fn dummy(spec: &DecoderSpec, dtype: DType) -> DummySource {
    DummySource::new(spec.clone(), 1, dtype).expect("a float type")
}

#[test]
fn outputs_do_not_depend_on_whether_prompts_are_scored() {
    let spec = llama();
    let mut executor = CpuExecutor::new(&spec, &dummy(&spec, DType::BF16), &config()).expect("loads");
    for batch in batches() {
        let scored = run(&mut executor, &batch, spec.vocab_size, Choice::Greedy).expect("runs");
        let outputs = run(&mut executor, &batch, spec.vocab_size, Choice::ForcedOutputs(&scored.tokens)).expect("runs");
        assert!(outputs.prompts.iter().all(Vec::is_empty), "{}", batch.name);
        assert_eq!(scored.without_prompts().difference(&outputs), 0.0, "{}", batch.name);
    }
}

#[test]
fn a_batch_that_does_not_fit_is_an_error() {
    let spec = llama();
    let mut executor = CpuExecutor::new(&spec, &dummy(&spec, DType::BF16), &config()).expect("loads");
    let mut error = |prompts| {
        let batch = Batch::new("large", prompts, 512);
        run(&mut executor, &batch, spec.vocab_size, Choice::Greedy).err().expect("an error").to_string()
    };
    assert!(
        error(vec![1 << 20]).contains("the batch \"large\" takes 1 slots and 65537 pages"),
        "{}",
        error(vec![1 << 20])
    );
    assert!(error(vec![1; 5000]).contains("takes 5000 slots"), "{}", error(vec![1; 5000]));
}

#[test]
fn float_models_agree_with_the_portable_executor() {
    let plain = llama();
    compare("llama bf16", &plain, &dummy(&plain, DType::BF16));
    let qwen2 = DecoderSpec {
        hidden_size: 112,
        n_heads: 14,
        head_dim: 8,
        qkv_bias: true,
        tie_embeddings: true,
        rope: Rope { theta: 1_000_000.0, scaling: RopeScaling::None },
        ..llama()
    };
    compare("biases, tied, f16", &qwen2, &dummy(&qwen2, DType::F16));
}

#[test]
fn every_option_agrees_with_the_portable_executor() {
    let spec = DecoderSpec {
        n_heads: 4,
        n_kv_heads: 4,
        head_dim: 40,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        sliding_window: Some(50),
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::Linear(2.0) },
        ..llama()
    };
    compare("all options, f32", &spec, &dummy(&spec, DType::F32));
}

/// Dummy weights whose projections are quantised, each projection in another format.
struct QuantisedSource {
    floats: DummySource,
}

impl WeightSource for QuantisedSource {
    fn get(&self, weight: Weight) -> Result<TensorView<'_>, Error> {
        use LayerWeight::{DownProj, GateProj, KProj, OProj, QProj, SharedDownProj, SharedUpProj, UpProj, VProj};
        let name = match weight {
            Weight::Embedding | Weight::LmHead | Weight::Layer(_, VProj | DownProj | SharedUpProj) => "Q8_0",
            Weight::Layer(_, QProj | GateProj | SharedDownProj) | Weight::Expert(.., ExpertWeight::Gate) => "Q4_0",
            Weight::Layer(_, KProj | OProj | UpProj) | Weight::Expert(.., ExpertWeight::Up) => "Q4_1",
            Weight::Expert(.., ExpertWeight::Down) => "Q8_0",
            _ => return self.floats.get(weight),
        };
        let floats = self.floats.get(weight)?;
        let format = quant::FORMATS.iter().copied().find(|format| format.name() == name).expect("a format");
        let data = floats.to_f32().chunks(quant::GROUP).flat_map(|values| quantise(name, values)).collect();
        Ok(TensorView { dtype: DType::Quant(format), shape: floats.shape, data: std::borrow::Cow::Owned(data) })
    }
}

/// A block of `values`, roughly: what matters is that both executors read the same block.
fn quantise(name: &str, values: &[f32]) -> Vec<u8> {
    let largest = values.iter().fold(0f32, |max, v| max.max(v.abs()));
    let half = |v: f32| half::f16::from_f32(v).to_le_bytes();
    let nibbles = |scale: f32, minimum: f32| -> Vec<u8> {
        let code = |v: f32| ((v - minimum) / scale).round().clamp(0.0, 15.0) as u8;
        (0..16).map(|i| code(values[i]) | code(values[i + 16]) << 4).collect()
    };
    match name {
        "Q8_0" => {
            let scale = largest / 127.0;
            half(scale).into_iter().chain(values.iter().map(|v| (v / scale).round() as i8 as u8)).collect()
        }
        "Q4_0" => [half(largest / 8.0).to_vec(), nibbles(largest / 8.0, -largest)].concat(),
        _ => [half(largest / 7.5).to_vec(), half(-largest).to_vec(), nibbles(largest / 7.5, -largest)].concat(),
    }
}

#[test]
fn quantised_models_agree_with_the_portable_executor() {
    for tie_embeddings in [false, true] {
        let spec = DecoderSpec { tie_embeddings, n_heads: 3, n_kv_heads: 1, head_dim: 64, vocab_size: 512, ..llama() };
        let source = QuantisedSource { floats: dummy(&spec, DType::F32) };
        compare(if tie_embeddings { "quantised, tied" } else { "quantised" }, &spec, &source);
    }
}

/// `n_experts` with a shared one, of which `n_experts_per_token` compute a token; the first layer has none.
fn with_experts(n_experts: usize, n_experts_per_token: usize) -> DecoderSpec {
    let moe = Moe {
        n_experts,
        n_experts_per_token,
        intermediate_size: 64,
        shared_intermediate_size: Some(96),
        norm_topk_prob: false,
        dense_layers: vec![0],
    };
    DecoderSpec { moe: Some(moe), ..llama() }
}

#[test]
fn experts_agree_with_the_portable_executor() {
    // All of them compute each token: which ones are chosen may differ where two are nearly equal.
    let spec = with_experts(5, 5);
    compare("experts, bf16", &spec, &dummy(&spec, DType::BF16));
    compare("experts, quantised", &spec, &QuantisedSource { floats: dummy(&spec, DType::F32) });
    let alone = DecoderSpec {
        moe: spec.moe.clone().map(|moe| Moe {
            shared_intermediate_size: None,
            norm_topk_prob: true,
            dense_layers: vec![],
            ..moe
        }),
        ..spec
    };
    compare("experts alone, quantised", &alone, &QuantisedSource { floats: dummy(&alone, DType::F32) });
}

/// Dummy weights whose projections are rounded to a format.
struct RoundedSource {
    floats: DummySource,
    format: &'static dyn quant::QuantFormat,
}

impl WeightSource for RoundedSource {
    fn get(&self, weight: Weight) -> Result<TensorView<'_>, Error> {
        let floats = self.floats.get(weight)?;
        if weight == Weight::Embedding || floats.shape.len() == 1 {
            return Ok(floats);
        }
        Ok(floats.quantize(self.format).expect("whole blocks"))
    }
}

#[test]
fn weights_rounded_at_load_are_those_of_a_rounded_file() {
    let spec = llama();
    let batch = Batch::new("", vec![37, 5], 512);
    for (quantization, name) in [(Quantization::Q8_0, "Q8_0"), (Quantization::Q4_0, "Q4_0")] {
        let scores = |quantization, source: &dyn WeightSource| {
            let config = EngineConfig { quantization, ..config() };
            let mut executor = CpuExecutor::new(&spec, source, &config).expect("loads");
            run(&mut executor, &batch, spec.vocab_size, Choice::Greedy).expect("runs")
        };
        let floats = dummy(&spec, DType::BF16);
        let at_load = scores(Some(quantization), &floats);
        assert!(scores(None, &floats).difference(&at_load) > 0.0, "{name}");
        let source = RoundedSource { floats, format: quant::by_name(name).expect("a format") };
        assert_eq!(scores(None, &source).difference(&at_load), 0.0, "{name}");
    }
}

#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    [llama(), with_experts(9, 3)].iter().for_each(check_independence);
}

fn check_independence(spec: &DecoderSpec) {
    let source = QuantisedSource { floats: dummy(spec, DType::F32) };
    for kernels in Kernels::available() {
        let mut executor = CpuExecutor::with_kernels(spec, &source, &config(), kernels).expect("loads");
        let mut scores = |n| {
            let batch = Batch::new("", vec![300; n], 1024);
            run(&mut executor, &batch, spec.vocab_size, Choice::Greedy).expect("runs")
        };
        let (alone, together) = (scores(1), scores(3));
        let of = |scores: &Scores| -> Vec<(u32, f32)> {
            scores.prompts[0].iter().chain(&scores.outputs[0]).map(|entry| (entry.token_id, entry.logprob)).collect()
        };
        assert_eq!(of(&alone), of(&together), "{}", kernels.name);
    }
}

#[test]
fn edits_hold_with_log_probabilities_and_without() {
    let spec = DecoderSpec { vocab_size: 2048, ..llama() };
    let mut executor = CpuExecutor::new(&spec, &dummy(&spec, DType::F32), &config()).expect("loads");
    let batch = Batch::new("twelve", (0..12).map(|i| 5 + 7 * i).collect(), 512);
    let mut tokens = |choice| run(&mut executor, &batch, spec.vocab_size, choice).expect("runs").tokens;
    let (plain, edited) = (tokens(Choice::Greedy), tokens(Choice::Edited { logprobs: true }));
    assert_eq!(edited, tokens(Choice::Edited { logprobs: false }));
    assert_ne!(edited, plain);
    for (seq, tokens) in edited.iter().enumerate() {
        for (step, &id) in (0u32..).zip(tokens) {
            let holds = match seq % 6 {
                3 => id < 1000 && id % 5 == 1,
                4 => !(id >= step && id < step + 200 && (id - step).is_multiple_of(2)),
                5 => id < 60 * 32 && id % 4 == id / 32 % 4,
                _ => true,
            };
            assert!(holds, "token {id} of sequence {seq}");
        }
    }
}
