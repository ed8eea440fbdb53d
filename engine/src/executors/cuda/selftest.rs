//! [`self_test`]: whether this device, its driver and its libraries compute what they should.
//!
//! A tiny random model runs on the device and on the portable executor in float32. Both are made to take the same
//! tokens, so that every log-probability can be compared: prompts of awkward lengths, whole and in chunks, alone and
//! in batches that take each path (GEMV, cuBLASLt, mixed steps).

use std::{
    fmt,
    time::{Duration, Instant},
};

use burn::tensor::Device;

use super::{
    device::{Event, Gpu},
    executor::CudaExecutor,
    experts_selftest,
    gemm::{Gemm, GemmOutput, GemmShape, Operands},
    memory::DeviceBuffer,
    packed_kv_selftest, packed_weights_selftest,
    status::Check,
};
use crate::{
    EngineConfig, Error,
    decoder::{DecoderSpec, Moe, Rope, RopeScaling},
    embedding::prompt_step,
    executors::{
        Executor,
        burn::BurnExecutor,
        comparison::{Batch, Choice, prompt_token, run},
    },
    weights::{DType, dummy::DummySource},
};

/// Greatest difference of a log-probability that bfloat16 explains in the tiny models, over some 10,000 positions of a
/// batch.
const TOLERANCE: f32 = 0.04;

/// How much [`self_test`] runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// One model and the batches that take the most kernels: a second or two once the kernels are compiled.
    Quick,
    /// All.
    Full,
    /// Models' batches (`MODEL: BATCH`) and groups of cases whose names contain one of these, without the measurements:
    /// what a sanitizer has time for, or can follow.
    Only {
        /// Parts of names.
        names: Vec<String>,
        /// Fewer and shorter runs, which in all still take every kernel: under a sanitizer a step takes seconds.
        is_brief: bool,
    },
}

impl Extent {
    /// Every part, one by one.
    fn every_part(is_brief: bool) -> Self {
        Self::Only { names: vec![String::new()], is_brief }
    }

    /// Whether a case, or any case of a group, is run.
    fn has(&self, name: &str) -> bool {
        match self {
            Self::Quick | Self::Full => true,
            Self::Only { names, .. } => names.iter().any(|part| name.contains(part.as_str())),
        }
    }

    fn is_brief(&self) -> bool {
        matches!(self, Self::Only { is_brief: true, .. })
    }
}

/// Tokens after each prompt in a brief run: one of a prompt's step, one of a decode step.
const N_BRIEF_OUTPUTS: usize = 2;
/// Most prompt tokens whose log-probabilities a brief run computes, a second for each 32 of them.
const MOST_BRIEF_TOKENS: usize = 64;
/// The batches that draw at random in a brief run: under a sanitizer that takes half a minute for each step. One has few
/// enough rows for clusters of blocks, the other has more.
const DRAWING: [&str; 2] = ["four short ones", "thirty short ones"];
/// The batch of the longest contexts.
const LONG: &str = "sixteen, to 1,390 tokens";
/// The model with as many tokens as sampling's blocks share among them, in rows that are not all aligned.
const WIDE: &str = "llama, 32,002 tokens";
/// The model with the widths of one that is served, whose products go round their rings of shared memory many times.
const FULL_WIDTH: &str = "llama, an 8B model's widths";
/// The model whose decode attention has enough to read that each warp goes round its ring.
const MANY_KV_HEADS: &str = "llama, 16 kv heads";
/// For a step under a sanitizer.
const BRIEF_TIMEOUT: Duration = Duration::from_secs(600);

/// Further cases of [`Extent::Full`], by what all of their names begin with.
type Group = fn(&Gpu, &DecoderSpec) -> Result<Vec<(String, f32)>, Error>;
const GROUPS: [(&str, Group); 3] = [
    ("experts, ", experts_selftest::compare),
    ("packed KV cache, ", packed_kv_selftest::compare),
    ("packed weights: ", |gpu, _| packed_weights_selftest::compare(gpu)),
];

/// What [`self_test`] found.
#[derive(Debug, Clone)]
pub struct SelfTestReport {
    /// The device's name.
    pub device: String,
    /// Name of each case and its greatest difference of a log-probability to float32 on the CPU.
    pub cases: Vec<(String, f32)>,
    /// The difference that is allowed.
    pub tolerance: f32,
    /// How fast the device is; not of [`Extent::Only`].
    pub rates: Option<Rates>,
    /// Time for all of it.
    pub seconds: f32,
}

/// How fast a device is.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Copies within the device, bytes read and written, in GB/s.
    pub copy_gb_per_s: f32,
    /// bfloat16 products of 8192 x 8192 matrices, in TFLOP/s.
    pub matmul_tflop_per_s: f32,
}

impl SelfTestReport {
    /// Whether every case is within the tolerance.
    pub fn passed(&self) -> bool {
        self.cases.iter().all(|(_, difference)| *difference <= self.tolerance)
    }
}

impl fmt::Display for SelfTestReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.device)?;
        for (name, difference) in &self.cases {
            let verdict = if *difference <= self.tolerance { "ok" } else { "FAILED" };
            writeln!(f, "  {name:<40} difference {difference:.4} (at most {}) {verdict}", self.tolerance)?;
        }
        if let Some(rates) = self.rates {
            writeln!(f, "  copy within the device {:.0} GB/s", rates.copy_gb_per_s)?;
            writeln!(f, "  bfloat16 matrix product {:.0} TFLOP/s", rates.matmul_tflop_per_s)?;
        }
        write!(f, "  {:.1} s in all", self.seconds)
    }
}

/// Tests CUDA device `device`.
///
/// # Errors
/// [`Error::Device`] if a library is missing, a kernel does not compile or a call fails; [`Error::Config`] if there is
/// nothing of [`Extent::Only`]. Wrong results are no error but in the report.
pub fn self_test(device: usize, extent: &Extent) -> Result<SelfTestReport, Error> {
    let started = Instant::now();
    let models = models();
    let mut cases = Vec::new();
    let n_models = if *extent == Extent::Quick { 1 } else { models.len() };
    for (i, (name, spec)) in models[..n_models].iter().enumerate() {
        let batches = batches(extent, name, i == 0);
        if batches.is_empty() {
            continue;
        }
        for (case, difference) in compare(spec, device, &batches, extent.is_brief())? {
            cases.push((format!("{name}: {case}"), difference));
        }
    }
    let gpu = Gpu::open(device)?;
    if *extent != Extent::Quick {
        for (name, compare) in GROUPS {
            if extent.has(name) {
                cases.extend(compare(&gpu, &models[0].1)?);
            }
        }
    }
    if cases.is_empty() {
        let names: Vec<String> = self_test_parts(extent.is_brief()).iter().map(|name| format!("{name:?}")).collect();
        let message =
            format!("no model's batch and no group of cases has that in its name; there are {}", names.join(", "));
        return Err(Error::config("--only", message));
    }
    let rates = if matches!(extent, Extent::Only { .. }) { None } else { Some(measure(&gpu)?) };
    let seconds = started.elapsed().as_secs_f32();
    Ok(SelfTestReport { device: gpu.name.clone(), cases, tolerance: TOLERANCE, rates, seconds })
}

/// Names for [`Extent::Only`], each of a batch of a model or of a group of further cases, which make up all of
/// [`self_test`]'s, or all that brief runs have.
pub fn self_test_parts(is_brief: bool) -> Vec<String> {
    let extent = Extent::every_part(is_brief);
    let of_model = |(i, (name, _)): (usize, (&str, DecoderSpec))| {
        let batches = batches(&extent, name, i == 0);
        batches.into_iter().map(|batch| format!("{name}: {}", batch.name)).collect::<Vec<_>>()
    };
    let models = models().into_iter().enumerate().flat_map(of_model);
    models.chain(GROUPS.iter().map(|&(name, _)| name.to_owned())).collect()
}

/// Tiny models that take every branch of the kernels.
pub(super) fn models() -> Vec<(&'static str, DecoderSpec)> {
    let llama = DecoderSpec {
        architecture: "LlamaForCausalLM".into(),
        hidden_size: 256,
        intermediate_size: 512,
        n_layers: 2,
        n_heads: 8,
        n_kv_heads: 2,
        head_dim: 128,
        vocab_size: 2048,
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
    };
    let qwen2 = DecoderSpec {
        architecture: "Qwen2ForCausalLM".into(),
        hidden_size: 448,
        n_heads: 14,
        head_dim: 64,
        qkv_bias: true,
        tie_embeddings: true,
        rope: Rope { theta: 1_000_000.0, scaling: RopeScaling::None },
        ..llama.clone()
    };
    // All experts compute each token: which ones are chosen may differ where two are nearly equal.
    let moe = Moe {
        n_experts: 4,
        n_experts_per_token: 4,
        intermediate_size: 192,
        shared_intermediate_size: Some(320),
        norm_topk_prob: false,
        dense_layers: vec![],
    };
    let all_experts = Moe { n_experts: 3, n_experts_per_token: 3, shared_intermediate_size: None, ..moe.clone() };
    let qwen2_moe =
        DecoderSpec { architecture: "Qwen2MoeForCausalLM".into(), qkv_bias: true, moe: Some(moe), ..llama.clone() };
    let qwen3_moe = DecoderSpec {
        architecture: "Qwen3MoeForCausalLM".into(),
        qk_norm: true,
        moe: Some(Moe { norm_topk_prob: true, ..all_experts }),
        ..llama.clone()
    };
    // Sizes that are not whole blocks of packed weights.
    let unpacked = DecoderSpec { hidden_size: 264, intermediate_size: 520, ..llama.clone() };
    let partly_packed = DecoderSpec { intermediate_size: 520, ..llama.clone() };
    // Padded in the KV cache; the query heads of a kv head are two tiles.
    let padded = DecoderSpec { head_dim: 96, n_heads: 12, n_kv_heads: 1, ..llama.clone() };
    let wide = DecoderSpec { vocab_size: 32_002, ..llama.clone() };
    let many_kv_heads = DecoderSpec { n_layers: 1, n_heads: 16, n_kv_heads: 16, ..llama.clone() };
    let full_width = DecoderSpec {
        hidden_size: 4096,
        intermediate_size: 14_336,
        n_layers: 1,
        n_heads: 32,
        n_kv_heads: 8,
        ..llama.clone()
    };
    vec![
        ("llama, head_dim 128", llama),
        ("llama, no weight packed", unpacked),
        ("llama, down not packed", partly_packed),
        ("llama, head_dim 96", padded),
        (WIDE, wide),
        (MANY_KV_HEADS, many_kv_heads),
        (FULL_WIDTH, full_width),
        ("qwen2, head_dim 64, biases, tied", qwen2),
        ("qwen2-moe, shared expert", qwen2_moe),
        ("qwen3-moe", qwen3_moe),
    ]
}

/// The batches that a model runs; the first one also runs steps of every width that products have kernels for.
fn batches(extent: &Extent, model: &str, is_first: bool) -> Vec<Batch> {
    let mut batches = vec![
        Batch::new("one sequence", vec![37], 512),
        Batch::new("five, awkward lengths", vec![1, 15, 16, 17, 300], 512),
        Batch::new("five in chunks", vec![1, 15, 16, 17, 300], 61),
        Batch::new("twelve", (0..12).map(|i| 5 + 7 * i).collect(), 512),
        Batch::new("twenty", (0..20).map(|i| 3 + 11 * i).collect(), 512),
        Batch::new(LONG, (0..16).map(|i| 40 + 90 * i).collect(), 1024),
    ];
    if *extent == Extent::Quick {
        batches.drain(..2);
        batches.truncate(1);
    } else if is_first {
        let widths = [
            ("steps of 43 rows", 43),
            ("steps of 90 rows", 90),
            ("steps of 123 rows", 123),
            ("steps of 150 rows", 150),
            ("steps of 165 rows", 165),
            ("steps of 190 rows", 190),
            ("steps of 200 rows", 200),
            ("steps of 220 rows", 220),
            ("steps of 230 rows", 230),
            ("steps of 250 rows", 250),
        ];
        batches.extend(widths.map(|(name, chunk)| Batch::new(name, vec![2 * chunk], chunk)));
        // Together longer than a context may be: more than prefill attention reads at a time.
        batches.push(Batch::new("two of 1,700 tokens in chunks", vec![1700, 1700], 1024));
    }
    match model {
        WIDE => {
            batches.retain(|batch| batch.name == "twelve");
            batches.push(Batch::new(DRAWING[0], vec![5, 9, 13, 17], 512));
            batches.push(Batch::new(DRAWING[1], (0..30).map(|i| 1 + i % 3).collect(), 512));
        }
        MANY_KV_HEADS => batches.retain(|batch| batch.name == LONG),
        // Its weights' copies are too many for a sanitizer that follows each of them.
        FULL_WIDTH if extent.is_brief() => batches.clear(),
        FULL_WIDTH => {
            batches.retain(|batch| matches!(batch.name, "one sequence" | "twelve"));
            batches.push(Batch::new("steps of 123 rows", vec![246], 123));
        }
        _ => {}
    }
    if extent.is_brief() {
        for batch in &mut batches {
            (batch.n_outputs, batch.draws) = (N_BRIEF_OUTPUTS, DRAWING.contains(&batch.name));
        }
    }
    batches.retain(|batch| extent.has(&format!("{model}: {}", batch.name)));
    batches
}

/// Runs the batches on both executors.
fn compare(spec: &DecoderSpec, device: usize, batches: &[Batch], is_brief: bool) -> Result<Vec<(String, f32)>, Error> {
    let source = DummySource::new(spec.clone(), 1, DType::BF16)?;
    let config = EngineConfig {
        max_num_seqs: Some(32),
        max_num_batched_tokens: Some(1024),
        kv_cache_memory_bytes: Some(512 << 20),
        ..EngineConfig::default()
    };
    let mut tuned = CudaExecutor::new(spec, &source, &config, device)?;
    let mut oracle = BurnExecutor::new(spec, &source, &config, Device::flex())?;
    let mut cases = Vec::new();
    if is_brief {
        tuned.set_timeout(BRIEF_TIMEOUT);
    }
    for batch in batches {
        let is_whole = !is_brief || batch.prompts.iter().sum::<usize>() <= MOST_BRIEF_TOKENS;
        let expected = run(&mut oracle, batch, spec.vocab_size, Choice::Greedy)?;
        if is_whole {
            let forced = run(&mut tuned, batch, spec.vocab_size, Choice::Forced(&expected.tokens))?;
            cases.push((batch.name.to_owned(), expected.difference(&forced)));
            // The device's own sampler against the host's, on the same logits.
            let greedy = run(&mut tuned, batch, spec.vocab_size, Choice::Greedy)?;
            let rescored = run(&mut tuned, batch, spec.vocab_size, Choice::Forced(&greedy.tokens))?;
            let best = rescored.outputs.iter().flatten().all(|entry| entry.rank == 1);
            let difference = if best { greedy.difference(&rescored) } else { f32::INFINITY };
            cases.push((format!("{}, sampled on the device", batch.name), difference));
        }
        // Logits edited and sampled on the device against the same on the host, for log-probabilities are wanted of them.
        let mut edited = |logprobs| run(&mut tuned, batch, spec.vocab_size, Choice::Edited { logprobs });
        let on_device = edited(false)?.tokens;
        if is_whole {
            let difference = if on_device == edited(true)?.tokens { 0.0 } else { f32::INFINITY };
            cases.push((format!("{}, edited on the device", batch.name), difference));
        }
        // Without the prompts' log-probabilities the last layer computes a few rows only.
        let outputs = run(&mut tuned, batch, spec.vocab_size, Choice::ForcedOutputs(&expected.tokens))?;
        let difference = expected.without_prompts().difference(&outputs);
        cases.push((format!("{}, outputs alone", batch.name), difference));
    }
    let difference = hidden_difference(&mut tuned, &mut oracle, spec)?;
    cases.push(("hidden states".into(), difference));
    Ok(cases)
}

/// Difference of the hidden states of a few prompts, over their length.
fn hidden_difference(tuned: &mut dyn Executor, oracle: &mut dyn Executor, spec: &DecoderSpec) -> Result<f32, Error> {
    let prompt = |(seq, n): (usize, usize)| (0..n).map(|i| prompt_token(seq, i, spec.vocab_size)).collect::<Vec<_>>();
    let prompts: Vec<Vec<u32>> = [37, 1, 150].into_iter().enumerate().map(prompt).collect();
    let texts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let (step, _) = prompt_step(&texts, 0..512);
    let (got, want) = (tuned.hidden_states(&step)?, oracle.hidden_states(&step)?);
    if got.len() != want.len() {
        return Ok(f32::INFINITY);
    }
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>();
    let error = squares(&mut got.iter().zip(&want).map(|(a, b)| a - b));
    Ok((error / squares(&mut want.iter().copied())).sqrt())
}

fn measure(gpu: &Gpu) -> Result<Rates, Error> {
    const N: usize = 8192;
    const N_BYTES: usize = N * N * 2;
    const N_RUNS: usize = 20;
    gpu.bind()?;
    let [x, w, y] = [(); 3].map(|()| DeviceBuffer::zeroed(gpu, N_BYTES, "the measurement"));
    let (x, w, y) = (x?, w?, y?);
    let (start, end) = (Event::new(true)?, Event::new(true)?);
    let time = |enqueue: &mut dyn FnMut() -> Result<(), Error>| -> Result<f32, Error> {
        enqueue()?;
        start.record(gpu.cu_stream())?;
        (0..N_RUNS).try_for_each(|_| enqueue())?;
        end.record(gpu.cu_stream())?;
        end.wait()?;
        Ok(end.milliseconds_since(&start)? / 1000.0 / N_RUNS as f32)
    };
    let copy = time(&mut || {
        // SAFETY: both buffers have this size.
        unsafe { cudarc::driver::sys::cuMemcpyDtoDAsync_v2(y.ptr(), x.ptr(), N_BYTES, gpu.cu_stream()) }
            .check("cuMemcpyDtoDAsync")
    })?;
    let mut gemm = Gemm::new(gpu)?;
    let shape = GemmShape { m: N, n: N, k: N, output: GemmOutput::Bf16 };
    let operands = Operands { x: x.ptr(), w: w.ptr(), y: y.ptr() };
    let product = time(&mut || gemm.run(gpu, shape, operands))?;
    let flop = 2.0 * (N as f32).powi(3);
    Ok(Rates { copy_gb_per_s: 2.0 * N_BYTES as f32 / copy / 1e9, matmul_tflop_per_s: flop / product / 1e12 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executors::cuda::{sampling::most_cluster_rows, stream_gemm::COLUMNS};

    #[test]
    fn steps_of_every_width_are_run() {
        let chunks: Vec<usize> = batches(&Extent::Full, "llama", true).iter().map(|batch| batch.chunk).collect();
        // Decoding sequences make the narrower ones.
        for width in COLUMNS.windows(2).filter(|width| width[0] >= 32) {
            let is_run = chunks.iter().any(|chunk| (width[0] + 1..=width[1]).contains(chunk));
            assert!(is_run, "no batch has steps of {} to {} rows", width[0] + 1, width[1]);
        }
    }

    #[test]
    fn parts_are_chosen_one_by_one() {
        let parts = self_test_parts(false);
        for part in &parts {
            assert_eq!(parts.iter().filter(|other| other.contains(part.as_str())).count(), 1, "{part}");
        }
        let left_out: Vec<String> = parts.into_iter().filter(|it| !self_test_parts(true).contains(it)).collect();
        assert!(!left_out.is_empty() && left_out.iter().all(|part| part.starts_with(FULL_WIDTH)), "{left_out:?}");
    }

    #[test]
    fn both_kernels_of_thresholds_are_run() {
        let batches = batches(&Extent::every_part(true), WIDE, false);
        let drawing: Vec<&Batch> = batches.iter().filter(|batch| batch.draws).collect();
        let most = most_cluster_rows(132);
        assert!(drawing.iter().any(|batch| batch.prompts.len() <= most));
        assert!(drawing.iter().any(|batch| batch.prompts.len() > most));
    }

    fn only(part: &str) -> Extent {
        Extent::Only { names: vec![part.into()], is_brief: false }
    }

    #[test]
    fn cases_are_chosen_by_their_names() {
        let names = |part: &str, model| -> Vec<_> {
            batches(&only(part), model, false).iter().map(|batch| batch.name).collect()
        };
        assert_eq!(names("llama: five in", "llama"), ["five in chunks"]);
        assert_eq!(names("twe", "llama"), ["twelve", "twenty"]);
        assert_eq!(names("llama", "llama").len(), batches(&Extent::Full, "llama", false).len());
        assert!(names("llama", "qwen2").is_empty());
    }
}
