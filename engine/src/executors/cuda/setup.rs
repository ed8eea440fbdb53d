//! Start of the executor: checks, loading, tuning, the memory plan, graphs.

use std::time::Instant;

use super::{
    attention_work::AttentionWork,
    buckets::buckets,
    buffers::{KvCache, StepBuffers, StepLimits, page_bytes},
    device::Gpu,
    experts::{self, ExpertKernels, Experts},
    forward::{Forward, Pending},
    gemm::{Gemm, padded_rows},
    graph::Graph,
    inputs::{Layout, StepShape},
    load::{self, Origin},
    long_attention::LongAttention,
    memory::DeviceBuffer,
    ops::{self, Contexts, Ops},
    plan::{self, MemoryInputs},
    product::Product,
    prompt_contexts::PromptContexts,
    side_stream::SideStream,
    stream_gemm::{StreamGemm, StreamKernels},
};
use crate::{
    DTypeChoice, EngineConfig, Error, LoadFormat,
    decoder::DecoderSpec,
    executors::{Capacity, MixedSteps},
    step::PAGE_SIZE,
    weights::WeightSource,
};

/// Most query rows of a step, unless asked otherwise: more are no faster for dense models, keep arrivals waiting and take
/// memory from the KV cache (docs/log.md).
const DEFAULT_MAX_TOKENS: usize = 2048;
/// Most query rows of a step in which sequences decode, by the number of prompts that wait: multiples of the products'
/// tiles, from those that cost least beside the weights to those that cost least each (docs/log.md).
const MIXED_ROWS: &[(usize, usize)] = &[(1, 256), (2, 512), (4, 1024), (16, 2048)];
/// Most sequences of a step, unless asked otherwise.
const DEFAULT_MAX_SEQS: usize = 256;
/// Device memory that a CUDA graph is counted for before it exists.
const GRAPH_BYTES: usize = 4 << 20;

/// A model ready to run.
pub(super) struct Setup {
    pub(super) forward: Forward,
    pub(super) limits: StepLimits,
    pub(super) capacity: Capacity,
    /// Graphs of each bucket, for each of [`Contexts`].
    pub(super) graphs: Vec<[Graph; 3]>,
    pub(super) buckets: Vec<usize>,
    /// The memory plan in one line.
    pub(super) description: String,
}

/// Refuses what the kernels cannot do.
///
/// # Errors
/// [`Error::Config`] saying what can.
fn check(spec: &DecoderSpec, config: &EngineConfig) -> Result<(), Error> {
    if !matches!(config.dtype, DTypeChoice::Auto | DTypeChoice::BFloat16) {
        return Err(Error::config("--dtype", "the CUDA executor computes in bfloat16; use auto or bfloat16"));
    }
    let unsupported =
        |what: String| Err(Error::config("--device", format!("the CUDA executor {what}; use --device cpu")));
    if ![64, 96, 128].contains(&spec.head_dim) {
        return unsupported(format!("has kernels for head_dim 64, 96 and 128, not {}", spec.head_dim));
    }
    if !spec.hidden_size.is_multiple_of(8)
        || !spec.intermediate_size.is_multiple_of(8)
        || !spec.vocab_size.is_multiple_of(2)
    {
        return unsupported(
            "needs hidden_size and intermediate_size that are multiples of 8 and an even vocab_size".into(),
        );
    }
    if spec.n_kv_heads == 0 || !spec.n_heads.is_multiple_of(spec.n_kv_heads) {
        return unsupported(format!(
            "needs n_heads ({}) to be a multiple of n_kv_heads ({})",
            spec.n_heads, spec.n_kv_heads
        ));
    }
    if let Some(Err(what)) = spec.moe.as_ref().map(experts::check) {
        return unsupported(what);
    }
    if spec.o_bias || spec.mlp_bias {
        return unsupported("has no biases on the attention output or in the MLP".into());
    }
    if !(config.gpu_memory_utilization > 0.0 && config.gpu_memory_utilization <= 1.0) {
        return Err(Error::config(
            "--gpu-memory-utilization",
            format!("must be in (0, 1], got {}", config.gpu_memory_utilization),
        ));
    }
    Ok(())
}

/// The largest step that `config` asks for.
fn limits(gpu: &Gpu, spec: &DecoderSpec, config: &EngineConfig) -> Result<(StepLimits, usize), Error> {
    let asked = |option: &'static str, value: Option<usize>, default: usize| match value {
        Some(0) => Err(Error::config(option, "must be at least 1")),
        value => Ok(value.unwrap_or(default)),
    };
    let max_seqs = asked("--max-num-seqs", config.max_num_seqs, DEFAULT_MAX_SEQS)?;
    let max_tokens = asked("--max-num-batched-tokens", config.max_num_batched_tokens, DEFAULT_MAX_TOKENS)?;
    let max_len = asked("--max-model-len", config.max_model_len, spec.max_position)?;
    if max_tokens < max_seqs {
        return Err(Error::config(
            "--max-num-batched-tokens",
            format!("must be at least --max-num-seqs ({max_seqs}), got {max_tokens}"),
        ));
    }
    if max_len > spec.max_position {
        return Err(Error::config(
            "--max-model-len",
            format!("the model was made for {} tokens, got {max_len}", spec.max_position),
        ));
    }
    let limits = StepLimits {
        max_seqs: *buckets(max_seqs).last().expect("at least one sequence"),
        max_tokens,
        max_blocks: max_len.div_ceil(PAGE_SIZE),
        max_seq_splits: ops::max_seq_splits(spec, *buckets(max_seqs).last().expect("one"), gpu.n_sms),
    };
    Ok((limits, max_len))
}

/// Loads and prepares the model.
pub(super) fn run(
    gpu: &Gpu,
    spec: &DecoderSpec,
    weights: &dyn WeightSource,
    config: &EngineConfig,
) -> Result<Setup, Error> {
    // The MLP of a model with experts is the shared one. Without one, none runs, but kernels are compiled for a width.
    let mlp_size = spec.moe.as_ref().map(|moe| moe.shared_intermediate_size.unwrap_or(moe.intermediate_size));
    let spec = &DecoderSpec { intermediate_size: mlp_size.unwrap_or(spec.intermediate_size), ..spec.clone() };
    check(spec, config)?;
    let (limits, max_len) = limits(gpu, spec, config)?;
    let started = Instant::now();
    let origin = match config.load_format {
        LoadFormat::Dummy => Origin::Dummy(config.seed),
        LoadFormat::Auto => Origin::Source(weights),
    };
    // Kernels compile and the rotation table is made while the weights load.
    let (ops, stream_kernels, long_attention, expert_kernels, table, weights) = std::thread::scope(|scope| {
        let ops = scope.spawn(|| Ops::new(gpu, spec));
        let stream_kernels = scope.spawn(|| StreamKernels::new(gpu));
        let long_attention = scope.spawn(|| LongAttention::new(gpu, spec, limits.max_seqs));
        let expert_kernels = scope.spawn(|| ExpertKernels::new(gpu, spec));
        let table = scope.spawn(|| cos_sin(spec, max_len));
        let weights = load::load(gpu, spec, origin);
        let panicked = || Error::Device("a thread panicked while the model was prepared".into());
        Ok::<_, Error>((
            ops.join().map_err(|_| panicked())??,
            stream_kernels.join().map_err(|_| panicked())??,
            long_attention.join().map_err(|_| panicked())??,
            expert_kernels.join().map_err(|_| panicked())??,
            table.join().map_err(|_| panicked())?,
            weights?,
        ))
    })?;
    tracing::info!("weights loaded and kernels ready in {:.1} s", started.elapsed().as_secs_f32());

    let group = spec.n_heads / spec.n_kv_heads;
    let layout = Layout::new(limits.max_seqs, limits.max_tokens, group, AttentionWork::new(spec, gpu.n_sms));
    let buffers = StepBuffers::new(gpu, spec, limits, &layout)?;
    let cos_sin = DeviceBuffer::new(gpu, table.len() * 4, "the rotation table")?;
    cos_sin.write(gpu, 0, &table)?;
    let stream_gemm = stream_kernels.map(|kernels| StreamGemm::new(gpu, kernels, spec, &weights, &buffers));
    let experts =
        expert_kernels.map(|kernels| Experts::new(gpu, kernels, spec, limits.max_tokens.max(limits.max_seqs)));
    let mut forward = Forward {
        spec: spec.clone(),
        ops,
        gemm: Gemm::new(gpu)?,
        stream_gemm: stream_gemm.transpose()?,
        long_attention,
        side: SideStream::new(gpu)?,
        experts: experts.transpose()?,
        packed: weights.any_packed(),
        weights,
        buffers,
        layout,
        cos_sin,
        contexts: PromptContexts::new(gpu, spec, limits)?,
        kv: KvCache { layers: Vec::new() },
        max_blocks: limits.max_blocks,
        pending: Pending::default(),
    };
    tune(gpu, &mut forward, limits)?;
    run_largest_step(gpu, &mut forward, limits)?;

    let sizes = buckets(limits.max_seqs);
    let (free, total) = gpu.memory()?;
    let inputs = MemoryInputs {
        total,
        used: total - free,
        reserved: sizes.len() * Contexts::ALL.len() * GRAPH_BYTES,
        page: spec.n_layers * page_bytes(spec),
        utilization: config.gpu_memory_utilization,
        kv_bytes: config.kv_cache_memory_bytes,
    };
    let n_pages = plan::n_pages(inputs, config.max_model_len.unwrap_or(PAGE_SIZE))?;
    forward.kv = KvCache::new(gpu, spec, n_pages)?;
    let graphs = capture(gpu, &mut forward, &sizes)?;
    gpu.synchronize()?;

    let max_model_len = max_len.min(n_pages * PAGE_SIZE);
    let capacity = Capacity {
        n_pages,
        max_num_seqs: config.max_num_seqs.unwrap_or(DEFAULT_MAX_SEQS),
        max_num_batched_tokens: limits.max_tokens,
        max_model_len,
        max_in_flight: 2,
        mixed_steps: MixedSteps::Rows(MIXED_ROWS),
        max_logprobs: super::sampling::MAX_TOP.min(spec.vocab_size),
    };
    let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
    let (free, _) = gpu.memory()?;
    let description = format!(
        "{}, bfloat16: {:.2} GiB for weights ({:.2} GiB unpacked) and step buffers, KV cache {:.2} GiB ({} tokens); \
         {:.2} of {:.2} GiB in use",
        gpu.name,
        gib(inputs.used),
        gib(spec.n_parameters() * 2),
        gib(n_pages * inputs.page),
        n_pages * PAGE_SIZE,
        gib(total - free),
        gib(total),
    );
    tracing::info!("ready after {:.1} s", started.elapsed().as_secs_f32());
    Ok(Setup { forward, limits, capacity, graphs, buckets: sizes, description })
}

/// float32 `[n_positions, head_dim]`: cosines, then sines.
fn cos_sin(spec: &DecoderSpec, n_positions: usize) -> Vec<f32> {
    let (cos, sin) = spec.rope.cos_sin(spec.head_dim, n_positions);
    let half = spec.head_dim / 2;
    cos.chunks(half).zip(sin.chunks(half)).flat_map(|(cos, sin)| cos.iter().chain(sin)).copied().collect()
}

/// Finds the fastest algorithm of every product of a decode step, and of prompt chunks of usual sizes.
fn tune(gpu: &Gpu, forward: &mut Forward, limits: StepLimits) -> Result<(), Error> {
    let started = Instant::now();
    let decode = (8..=limits.max_seqs.min(256)).step_by(8);
    let chunks = (320..=1024).step_by(64).chain([2048, 4096, 8192, limits.max_tokens]);
    let max_rows = padded_rows(limits.max_tokens);
    let sizes: std::collections::BTreeSet<_> =
        decode.clone().chain(chunks).map(padded_rows).filter(|&m| m <= max_rows).collect();
    let layers = [0, 1, 2].map(|i| i * forward.spec.n_layers / 3);
    let b = &forward.buffers;
    let xy = [
        (b.h.ptr(), b.qkv.ptr()),
        (b.attn_out.ptr(), b.x.ptr()),
        (b.h.ptr(), b.gate_up.ptr()),
        (b.act.ptr(), b.x.ptr()),
    ];
    let (h, logits) = (b.h.ptr(), b.logits.ptr());
    for &m in &sizes {
        for (product, xy) in Product::LAYER.into_iter().zip(xy) {
            let runs = forward.has_mlp() || !matches!(product, Product::GateUp | Product::Down);
            let is_for_gemm = |&layer: &usize| !forward.streams((product, layer), m);
            let raw = layers.iter().copied().filter(is_for_gemm).map(|layer| forward.raw((product, layer)));
            let weights = raw.collect::<Result<Vec<_>, _>>()?;
            if runs && !weights.is_empty() {
                let shape = forward.gemm_shape(product, m);
                forward.gemm.tune(gpu, shape, &weights, xy)?;
            }
        }
        if m <= limits.logits_rows() && !forward.streams((Product::Logits, 0), m) {
            let shape = forward.gemm_shape(Product::Logits, m);
            let weights = [forward.raw((Product::Logits, 0))?];
            forward.gemm.tune(gpu, shape, &weights, (h, logits))?;
        }
    }
    forward.gemm.save();
    tracing::info!("matrix products tuned in {:.1} s", started.elapsed().as_secs_f32());
    Ok(())
}

/// Runs the largest step without a KV cache, so that all memory that a step takes is in use.
fn run_largest_step(gpu: &Gpu, forward: &mut Forward, limits: StepLimits) -> Result<(), Error> {
    let slots = forward.layout.chunk.slot_mapping;
    let nowhere = vec![-1i32; limits.max_tokens];
    forward.buffers.inputs.write(gpu, slots.offset() as usize, &nowhere)?;
    let shape = StepShape { n_tokens: limits.max_tokens, group: 1, ..StepShape::default() };
    forward.chunks(gpu, &shape)?;
    forward.logits(gpu, 0, limits.max_seqs)?;
    gpu.synchronize()
}

/// Captures a decode step of every bucket.
fn capture(gpu: &Gpu, forward: &mut Forward, sizes: &[usize]) -> Result<Vec<[Graph; 3]>, Error> {
    let started = Instant::now();
    let slots = forward.layout.decode.slot_mapping;
    let nowhere = vec![-1i32; *sizes.last().expect("at least one bucket")];
    forward.buffers.inputs.write(gpu, slots.offset() as usize, &nowhere)?;
    let graphs = sizes
        .iter()
        .map(|&bucket| {
            // Once without capturing: libraries load their kernels at first use.
            if bucket == 1 || !forward.uses_gemv(bucket) {
                forward.decode(gpu, bucket, Contexts::Long)?;
                gpu.synchronize()?;
            }
            let mut graph = |contexts| Graph::capture(gpu, || forward.decode(gpu, bucket, contexts));
            Ok([graph(Contexts::Short)?, graph(Contexts::Medium)?, graph(Contexts::Long)?])
        })
        .collect::<Result<_, Error>>()?;
    tracing::info!(
        "{} CUDA graphs captured in {:.1} s",
        sizes.len() * Contexts::ALL.len(),
        started.elapsed().as_secs_f32()
    );
    Ok(graphs)
}
