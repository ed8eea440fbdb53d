//! [`Weights`]: the model's weights on the device in bf16, with q/k/v and gate/up in one matrix each.
//!
//! Tensors stream through two pinned buffers: while one is copied, all threads convert into the other. Dummy weights
//! are made on the device. On Hopper matrices are packed there, one after the other ([`Packer`]).

use std::time::{Duration, Instant};

use cudarc::driver::sys;

use super::{
    compile,
    device::{Event, Gpu},
    experts::router_rows,
    kernel::{Arg, Kernel, Launch},
    memory::{DeviceBuffer, PinnedBuffer},
    packed_weights::{Matrix, MatrixAt, Packer, packed_bytes},
    product::Product,
    status::Check,
};
use crate::{
    Error,
    decoder::{DecoderSpec, ExpertWeight, LayerWeight, Moe, Weight},
    weights::WeightSource,
};

/// Bytes of a pinned buffer.
const STAGING_BYTES: usize = 64 << 20;

/// All weights; `[rows, columns]` row-major bf16, or packed.
pub(super) struct Weights {
    /// `[vocab_size, hidden_size]`.
    pub(super) embedding: DeviceBuffer,
    /// `[hidden_size]`.
    pub(super) final_norm: DeviceBuffer,
    /// `[vocab_size, hidden_size]`; `None` when it is the embedding.
    lm_head: Option<Matrix>,
    /// One per block.
    pub(super) layers: Vec<LayerWeights>,
}

/// The weights of one block.
pub(super) struct LayerWeights {
    /// `[hidden_size]`.
    pub(super) input_norm: DeviceBuffer,
    /// q, k, v: `[(n_heads + 2 n_kv_heads) * head_dim, hidden_size]`.
    qkv: Matrix,
    /// q, k, v: `[(n_heads + 2 n_kv_heads) * head_dim]`.
    qkv_bias: Option<DeviceBuffer>,
    /// `[head_dim]`.
    q_norm: Option<DeviceBuffer>,
    /// `[head_dim]`.
    k_norm: Option<DeviceBuffer>,
    /// `[hidden_size, n_heads * head_dim]`.
    o: Matrix,
    /// `[hidden_size]`.
    pub(super) post_attention_norm: DeviceBuffer,
    /// Of the MLP, or of the shared expert; a model of experts alone has one byte here and in `down`. gate, up:
    /// `[2 * intermediate_size, hidden_size]`.
    gate_up: Matrix,
    /// `[hidden_size, intermediate_size]`.
    down: Matrix,
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
    /// The matrix of `product` of `layer`.
    pub(super) fn matrix(&self, (product, layer): (Product, usize)) -> MatrixAt {
        let w = &self.layers[layer];
        match product {
            Product::Qkv => w.qkv.at(),
            Product::O => w.o.at(),
            Product::GateUp => w.gate_up.at(),
            Product::Down => w.down.at(),
            Product::Logits => self.lm_head.as_ref().map_or(MatrixAt::Raw(self.embedding.ptr()), Matrix::at),
        }
    }

    /// Every product with its layer.
    fn products(&self) -> impl Iterator<Item = (Product, usize)> {
        let of_layer = |layer| Product::LAYER.map(move |product| (product, layer));
        (0..self.layers.len()).flat_map(of_layer).chain([(Product::Logits, 0)])
    }

    /// Whether any matrix has 12 bits a weight.
    pub(super) fn any_packed(&self) -> bool {
        self.products().any(|product| self.matrix(product).is_packed())
    }

    /// Says how many matrices have 12 bits a weight.
    fn report(&self) {
        let n_packed = self.products().filter(|&product| self.matrix(product).is_packed()).count();
        if n_packed > 0 {
            let n_products = self.products().count();
            tracing::info!("{n_packed} of {n_products} matrices of weights hold their bfloat16 in 12 bits a weight");
        }
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

    /// Those of layer `layer`.
    fn load(loader: &mut Loader<'_>, layer: usize) -> Result<Self, Error> {
        use LayerWeight::*;
        let (gpu, spec) = (loader.gpu, loader.spec);
        let of_layer = |weights: &[LayerWeight]| -> Vec<Weight> {
            weights.iter().map(|&weight| Weight::Layer(layer, weight)).collect()
        };
        let experts = match spec.moe_of(layer) {
            Some(moe) => Some(ExpertWeights::load(loader, layer, moe)?),
            None => None,
        };
        let (gate_up, down): (&[LayerWeight], &[LayerWeight]) = match experts {
            None => (&[GateProj, UpProj], &[DownProj]),
            Some(_) => (&[SharedGateProj, SharedUpProj], &[SharedDownProj]),
        };
        let mut matrix = |product, weights: &[LayerWeight]| match loader.matrix(product, &of_layer(weights))? {
            Some(matrix) => Ok(matrix),
            None => DeviceBuffer::new(gpu, 1, "no weight").map(Matrix::raw),
        };
        let (qkv, o) = (matrix(Product::Qkv, &[QProj, KProj, VProj])?, matrix(Product::O, &[OProj])?);
        let (gate_up, down) = (matrix(Product::GateUp, gate_up)?, matrix(Product::Down, down)?);
        Ok(Self {
            input_norm: loader.required(&of_layer(&[InputNorm]))?,
            qkv,
            qkv_bias: loader.buffer(&of_layer(&[QBias, KBias, VBias]))?,
            q_norm: loader.buffer(&of_layer(&[QNorm]))?,
            k_norm: loader.buffer(&of_layer(&[KNorm]))?,
            o,
            post_attention_norm: loader.required(&of_layer(&[PostAttentionNorm]))?,
            gate_up,
            down,
            experts,
        })
    }
}

impl ExpertWeights {
    /// Those of layer `layer`.
    fn load(loader: &mut Loader<'_>, layer: usize, moe: &Moe) -> Result<Self, Error> {
        let gpu = loader.gpu;
        let mut required =
            |weights: &[Weight]| Ok::<_, Error>(loader.buffer(weights)?.expect("every mixture has this weight"));
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
    let needed = if gpu.is_hopper() { packed_bytes(spec).min(n_bytes) } else { n_bytes };
    let (free, total) = gpu.memory()?;
    if free < needed {
        let gib = |n: usize| n as f64 / (1u64 << 30) as f64;
        return Err(Error::Device(format!(
            "out of memory: the weights need {:.2} GiB, {:.2} GiB of {:.2} GiB are free; {:.2} GiB are \
             missing. End other programs on {}, or choose a smaller model",
            gib(needed),
            gib(free),
            gib(total),
            gib(needed - free),
            gpu.name
        )));
    }
    let filler = match origin {
        Origin::Source(source) => Filler::Copy(Staging::new(gpu, source, n_bytes)?),
        Origin::Dummy(seed) => Filler::Dummy(DummyFill::new(gpu, seed)?),
    };
    let mut loader = Loader { gpu, spec, filler, packer: Packer::new(gpu, spec)? };
    let embedding = loader.required(&[Weight::Embedding])?;
    let layers = (0..spec.n_layers).map(|layer| LayerWeights::load(&mut loader, layer)).collect::<Result<_, _>>()?;
    let final_norm = loader.required(&[Weight::FinalNorm])?;
    let lm_head = loader.matrix(Product::Logits, &[Weight::LmHead])?;
    gpu.synchronize()?;
    let weights = Weights { embedding, final_norm, lm_head, layers };
    weights.report();
    Ok(weights)
}

/// Puts weights on the device.
struct Loader<'a> {
    gpu: &'a Gpu,
    spec: &'a DecoderSpec,
    filler: Filler<'a>,
    packer: Option<Packer>,
}

impl Loader<'_> {
    /// `weights` one after the other in a new buffer; `None` if the model has none of them.
    fn buffer(&mut self, weights: &[Weight]) -> Result<Option<DeviceBuffer>, Error> {
        let n_elements = self.n_elements(weights);
        if n_elements == 0 {
            return Ok(None);
        }
        let buffer = DeviceBuffer::new(self.gpu, n_elements * 2, "a weight")?;
        self.fill(weights, buffer.ptr())?;
        Ok(Some(buffer))
    }

    /// [`Self::buffer`] of weights that every model has.
    fn required(&mut self, weights: &[Weight]) -> Result<DeviceBuffer, Error> {
        Ok(self.buffer(weights)?.expect("every model has this weight"))
    }

    /// `weights` one below the other, as the matrix of `product`.
    fn matrix(&mut self, product: Product, weights: &[Weight]) -> Result<Option<Matrix>, Error> {
        let size = product.size(self.spec);
        match &self.packer {
            Some(packer) if packer.takes(size) && self.n_elements(weights) == size.0 * size.1 => {
                let raw = packer.raw();
                self.fill(weights, raw)?;
                let packer = self.packer.as_ref().expect("it was there");
                packer.pack(self.gpu, size, product == Product::GateUp).map(Some)
            }
            _ => Ok(self.buffer(weights)?.map(Matrix::raw)),
        }
    }

    /// Numbers that those of `weights` that the model has consist of.
    fn n_elements(&self, weights: &[Weight]) -> usize {
        weights.iter().filter_map(|&weight| self.spec.shape(weight)).map(|shape| shape.iter().product::<usize>()).sum()
    }

    /// `weights` one after the other from address `to` on.
    fn fill(&mut self, weights: &[Weight], mut to: u64) -> Result<(), Error> {
        for &weight in weights {
            let Some(shape) = self.spec.shape(weight) else { continue };
            match &mut self.filler {
                Filler::Copy(staging) => staging.copy(self.gpu, weight, to)?,
                Filler::Dummy(dummy) => dummy.fill(self.gpu, weight, &shape, to)?,
            }
            to += shape.iter().product::<usize>() as u64 * 2;
        }
        Ok(())
    }
}

/// The two ways to fill a buffer.
enum Filler<'a> {
    Copy(Staging<'a>),
    Dummy(DummyFill),
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
        let [kernel] = compile::load(gpu, &compile::DUMMY_WEIGHTS, &[], ["dummy_weights"])?;
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
