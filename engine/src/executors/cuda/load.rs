//! [`Weights`]: the model's weights on the device in bf16, with q/k/v and gate/up in one matrix each.
//!
//! Tensors stream through two pinned buffers: while one is copied, all threads convert into the other. Dummy weights
//! are made on the device.

use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::{
    compile::{self, Variant},
    device::{Event, Gpu},
    experts::router_rows,
    kernel::{Arg, Kernel, Launch},
    memory::{DeviceBuffer, PinnedBuffer},
    status::Check,
};
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Weight},
    weights::WeightSource,
};

/// Bytes of a pinned buffer.
const STAGING_BYTES: usize = 64 << 20;

/// All weights; `[rows, columns]` row-major bf16.
pub(super) struct Weights {
    /// `[vocab_size, hidden_size]`.
    pub(super) embedding: DeviceBuffer,
    /// `[hidden_size]`.
    pub(super) final_norm: DeviceBuffer,
    /// `[vocab_size, hidden_size]`; `None` when it is the embedding.
    lm_head: Option<DeviceBuffer>,
    /// One per block.
    pub(super) layers: Vec<LayerWeights>,
}

/// The weights of one block.
pub(super) struct LayerWeights {
    /// `[hidden_size]`.
    pub(super) input_norm: DeviceBuffer,
    /// q, k, v: `[(n_heads + 2 n_kv_heads) * head_dim, hidden_size]`.
    pub(super) qkv: DeviceBuffer,
    /// q, k, v: `[(n_heads + 2 n_kv_heads) * head_dim]`.
    qkv_bias: Option<DeviceBuffer>,
    /// `[head_dim]`.
    q_norm: Option<DeviceBuffer>,
    /// `[head_dim]`.
    k_norm: Option<DeviceBuffer>,
    /// `[hidden_size, n_heads * head_dim]`.
    pub(super) o: DeviceBuffer,
    /// `[hidden_size]`.
    pub(super) post_attention_norm: DeviceBuffer,
    /// Of the MLP, or of the shared expert; a model of experts alone has one byte here and in `down`. gate, up:
    /// `[2 * intermediate_size, hidden_size]`.
    pub(super) gate_up: DeviceBuffer,
    /// `[hidden_size, intermediate_size]`.
    pub(super) down: DeviceBuffer,
    /// `None` if the model has none.
    pub(super) experts: Option<ExpertWeights>,
}

/// The experts of one block.
pub(super) struct ExpertWeights {
    /// `[router_rows, hidden_size]`: the experts' logits, that of the shared expert's share, zeros.
    pub(super) router: DeviceBuffer,
    /// Of each expert gate, up: `[n_experts, 2 * intermediate_size, hidden_size]`.
    pub(super) gate_up: DeviceBuffer,
    /// `[n_experts, hidden_size, intermediate_size]`.
    pub(super) down: DeviceBuffer,
}

/// The address, or null.
fn ptr_or_null(buffer: Option<&DeviceBuffer>) -> u64 {
    buffer.map_or(0, DeviceBuffer::ptr)
}

impl Weights {
    /// Address of the output projection.
    pub(super) fn lm_head(&self) -> u64 {
        self.lm_head.as_ref().unwrap_or(&self.embedding).ptr()
    }
}

impl LayerWeights {
    /// Address of the q/k/v bias, or null.
    pub(super) fn qkv_bias(&self) -> u64 {
        ptr_or_null(self.qkv_bias.as_ref())
    }

    /// Addresses of the q and k norms, or null.
    pub(super) fn qk_norms(&self) -> (u64, u64) {
        (ptr_or_null(self.q_norm.as_ref()), ptr_or_null(self.k_norm.as_ref()))
    }
}

impl ExpertWeights {
    /// Those of layer `layer`; `get` puts weights one after the other in a new buffer.
    fn load(
        gpu: &Gpu,
        (layer, moe): (usize, &Moe),
        get: &mut impl FnMut(&[Weight]) -> Result<Option<DeviceBuffer>, Error>,
    ) -> Result<Self, Error> {
        let mut required = |weights: &[Weight]| Ok::<_, Error>(get(weights)?.expect("every mixture has this weight"));
        let routers = [LayerWeight::Router, LayerWeight::SharedRouter].map(|w| Weight::Layer(layer, w));
        let logits = required(&routers)?;
        let n_logits = moe.n_experts + usize::from(moe.shared_intermediate_size.is_some());
        let n_bytes = logits.n_bytes() / n_logits * router_rows(moe);
        let router = DeviceBuffer::zeroed(gpu, n_bytes, "a router")?;
        // SAFETY: the source is not longer than the destination; both live until the stream is synchronised.
        unsafe { sys::cuMemcpyDtoDAsync_v2(router.ptr(), logits.ptr(), logits.n_bytes(), gpu.cu_stream()) }
            .check("cuMemcpyDtoDAsync")?;
        gpu.synchronize()?;
        let of_all = |kinds: &[ExpertWeight]| -> Vec<Weight> {
            let of = |expert: usize| kinds.iter().map(move |&w| Weight::Expert(layer, expert, w));
            (0..moe.n_experts).flat_map(of).collect()
        };
        Ok(Self {
            router,
            gate_up: required(&of_all(&[ExpertWeight::Gate, ExpertWeight::Up]))?,
            down: required(&of_all(&[ExpertWeight::Down]))?,
        })
    }
}

/// Where values come from.
pub(super) enum Origin<'a> {
    /// A model file.
    Source(&'a dyn WeightSource),
    /// Random numbers with this seed.
    Dummy(u64),
}

/// Loads all weights of `spec`.
///
/// # Errors
/// [`Error::Model`] about a missing tensor, [`Error::Device`] if they do not fit.
pub(super) fn load(gpu: &Gpu, spec: &DecoderSpec, origin: Origin<'_>) -> Result<Weights, Error> {
    let n_bytes = spec.n_parameters() * 2;
    let (free, total) = gpu.memory()?;
    if free < n_bytes {
        let gib = |n: usize| n as f64 / (1u64 << 30) as f64;
        return Err(Error::Device(format!(
            "out of memory: the weights need {:.2} GiB in bfloat16, {:.2} GiB of {:.2} GiB are free; {:.2} GiB are \
             missing. End other programs on {}, or choose a smaller model",
            gib(n_bytes),
            gib(free),
            gib(total),
            gib(n_bytes - free),
            gpu.name
        )));
    }
    let mut loader = match origin {
        Origin::Source(source) => Loader::Copy(Staging::new(gpu, source, n_bytes)?),
        Origin::Dummy(seed) => Loader::Dummy(DummyFill::new(gpu, seed)?),
    };
    let mut get = |weights: &[Weight]| loader.load(gpu, spec, weights);
    let required = |buffer: Option<DeviceBuffer>| buffer.expect("every model has this weight");
    let embedding = required(get(&[Weight::Embedding])?);
    let mut layers = Vec::with_capacity(spec.n_layers);
    for layer in 0..spec.n_layers {
        use LayerWeight::*;
        let experts = match spec.moe_of(layer) {
            Some(moe) => Some(ExpertWeights::load(gpu, (layer, moe), &mut get)?),
            None => None,
        };
        let mut get = |weights: &[LayerWeight]| {
            let weights: Vec<_> = weights.iter().map(|&w| Weight::Layer(layer, w)).collect();
            get(&weights)
        };
        let (gate_up, down): (&[LayerWeight], &[LayerWeight]) = match experts {
            None => (&[GateProj, UpProj], &[DownProj]),
            Some(_) => (&[SharedGateProj, SharedUpProj], &[SharedDownProj]),
        };
        let or_empty = |buffer: Option<DeviceBuffer>| match buffer {
            Some(buffer) => Ok(buffer),
            None => DeviceBuffer::new(gpu, 1, "no weight"),
        };
        layers.push(LayerWeights {
            input_norm: required(get(&[InputNorm])?),
            qkv: required(get(&[QProj, KProj, VProj])?),
            qkv_bias: get(&[QBias, KBias, VBias])?,
            q_norm: get(&[QNorm])?,
            k_norm: get(&[KNorm])?,
            o: required(get(&[OProj])?),
            post_attention_norm: required(get(&[PostAttentionNorm])?),
            gate_up: or_empty(get(gate_up)?)?,
            down: or_empty(get(down)?)?,
            experts,
        });
    }
    let final_norm = required(get(&[Weight::FinalNorm])?);
    let lm_head = get(&[Weight::LmHead])?;
    gpu.synchronize()?;
    Ok(Weights { embedding, final_norm, lm_head, layers })
}

/// The two ways to fill a buffer.
enum Loader<'a> {
    Copy(Staging<'a>),
    Dummy(DummyFill),
}

impl Loader<'_> {
    /// `weights` one after the other in a new buffer; `None` if the model has none of them.
    fn load(&mut self, gpu: &Gpu, spec: &DecoderSpec, weights: &[Weight]) -> Result<Option<DeviceBuffer>, Error> {
        let shapes: Vec<_> = weights.iter().filter_map(|&w| spec.shape(w).map(|shape| (w, shape))).collect();
        if shapes.is_empty() {
            return Ok(None);
        }
        let n_elements = |shape: &[usize]| shape.iter().product::<usize>();
        let total: usize = shapes.iter().map(|(_, shape)| n_elements(shape)).sum();
        let buffer = DeviceBuffer::new(gpu, total * 2, "a weight")?;
        let mut to = buffer.ptr();
        for (weight, shape) in &shapes {
            match self {
                Self::Copy(staging) => staging.copy(gpu, *weight, to)?,
                Self::Dummy(dummy) => dummy.fill(gpu, *weight, shape, to)?,
            }
            to += n_elements(shape) as u64 * 2;
        }
        Ok(Some(buffer))
    }
}

/// Two pinned buffers between a source and the device.
struct Staging<'a> {
    source: &'a dyn WeightSource,
    buffers: [(PinnedBuffer, Event); 2],
    /// The buffer to fill next.
    next: usize,
    n_bytes_total: usize,
    n_bytes_done: usize,
    reported: Instant,
}

impl<'a> Staging<'a> {
    fn new(gpu: &Gpu, source: &'a dyn WeightSource, n_bytes_total: usize) -> Result<Self, Error> {
        gpu.bind()?;
        let buffer = || Ok::<_, Error>((PinnedBuffer::new(STAGING_BYTES)?, Event::new(false)?));
        Ok(Self {
            source,
            buffers: [buffer()?, buffer()?],
            next: 0,
            n_bytes_total,
            n_bytes_done: 0,
            reported: Instant::now(),
        })
    }

    fn copy(&mut self, gpu: &Gpu, weight: Weight, to: u64) -> Result<(), Error> {
        let tensor = self.source.get(weight)?;
        let n_rows = tensor.shape.first().copied().unwrap_or(1);
        let row_elements = tensor.n_elements() / n_rows.max(1);
        let rows_per_copy = (STAGING_BYTES / 2 / row_elements.max(1)).max(1);
        let mut to = to;
        for start in (0..n_rows).step_by(rows_per_copy) {
            let rows = start..n_rows.min(start + rows_per_copy);
            let n_elements = rows.len() * row_elements;
            let part = if rows.len() == n_rows { None } else { Some(tensor.rows(rows)) };
            let (buffer, copied) = &mut self.buffers[self.next];
            // Free again once its last copy is done; a fresh event counts as passed.
            copied.wait()?;
            part.as_ref().unwrap_or(&tensor).write_bf16_into(&mut buffer.as_mut_slice()[..n_elements]);
            // SAFETY: the destination is inside the tensor's buffer; the source stays until the event has passed.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, buffer.ptr().cast(), n_elements * 2, gpu.cu_stream()) }
                .check("cuMemcpyHtoDAsync")?;
            copied.record(gpu.cu_stream())?;
            self.next = 1 - self.next;
            to += n_elements as u64 * 2;
            self.n_bytes_done += n_elements * 2;
            if self.reported.elapsed() >= Duration::from_secs(1) {
                self.reported = Instant::now();
                let gib = |n: usize| n as f64 / (1u64 << 30) as f64;
                tracing::info!(
                    "loading weights: {:.1} of {:.1} GiB ({:.0} %)",
                    gib(self.n_bytes_done),
                    gib(self.n_bytes_total),
                    100.0 * self.n_bytes_done as f64 / self.n_bytes_total as f64
                );
            }
        }
        Ok(())
    }
}

/// Random weights made on the device: uniform in `±1/sqrt(columns)`, norms 1, biases uniform in ±0.01.
struct DummyFill {
    kernel: Kernel,
    seed: u64,
    n_filled: u64,
}

impl DummyFill {
    fn new(gpu: &Gpu, seed: u64) -> Result<Self, Error> {
        let cubins = compile::compile(&[Variant::new(&compile::DUMMY_WEIGHTS, &[])], &gpu.arch())?;
        let [kernel] = Kernel::load(&cubins[0], ["dummy_weights"])?;
        Ok(Self { kernel, seed, n_filled: 0 })
    }

    fn fill(&mut self, gpu: &Gpu, weight: Weight, shape: &[usize], to: u64) -> Result<(), Error> {
        use LayerWeight::*;
        let n: usize = shape.iter().product();
        self.n_filled += 1;
        let bound = match weight {
            Weight::FinalNorm | Weight::Layer(_, InputNorm | PostAttentionNorm | QNorm | KNorm) => {
                let one = half::bf16::ONE.to_bits();
                // SAFETY: the range is inside the tensor's buffer.
                return unsafe { sys::cuMemsetD16Async(to, one, n, gpu.cu_stream()) }.check("cuMemsetD16Async");
            }
            Weight::Layer(_, QBias | KBias | VBias | OBias | GateBias | UpBias | DownBias) => 0.01,
            _ => 1.0 / (shape[shape.len() - 1] as f32).sqrt(),
        };
        // Tensors are counted, and none has 2^40 elements.
        let seed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(self.n_filled << 40);
        let launch = Launch { grid: [gpu.n_sms * 8, 1, 1], block: 256, shared_bytes: 0, dependent: false };
        let args = [Arg::Ptr(to), Arg::Long(n as u64), Arg::Long(seed), Arg::Float(bound)];
        self.kernel.launch(gpu.cu_stream(), launch, &args)
    }
}
