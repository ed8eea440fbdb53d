//! [`StreamGemm`]: the products of steps of a few rows on Hopper, whose time is that of reading the weights
//! (`kernels/stream_gemm_sm90.cu`).

use std::collections::{BTreeMap, BTreeSet};

use super::{
    buffers::StepBuffers,
    compile::{self, Variant},
    device::Gpu,
    kernel::{Arg, Kernel, Launch},
    load::Weights,
    memory::DeviceBuffer,
    product::Product,
    tensor_map::TensorMap,
};
use crate::{Error, decoder::DecoderSpec};

/// Most rows of each kernel.
const COLUMNS: [usize; 9] = [8, 16, 32, 48, 64, 96, 128, 192, 256];
/// Most rows for which every product is faster here than in cuBLASLt on an H100 (docs/log.md); the gate and up
/// projections, which cuBLASLt leaves to another kernel to multiply, are always, logits up to [`MAX_LOGITS_ROWS`].
const MAX_ROWS: usize = 192;
const MAX_LOGITS_ROWS: usize = 64;
/// Bytes of the ring of weights and activations: what leaves a block of attention room beside it.
const RING_BYTES: usize = 208_000;

/// One compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shape {
    /// What it does with its result: its macro OUTPUT.
    output: usize,
    /// Most rows of activations, one of [`COLUMNS`].
    columns: usize,
    /// Rows of weights of a tile.
    tile_rows: usize,
}

impl Shape {
    const BF16: usize = 0;
    const F32: usize = 1;
    const GATED: usize = 2;

    /// For `product` with up to `columns` rows.
    fn new(product: Product, columns: usize) -> Self {
        let output = match product {
            Product::Qkv => Self::BF16,
            Product::O | Product::Down | Product::Logits => Self::F32,
            Product::GateUp => Self::GATED,
        };
        Self { output, columns, tile_rows: tile_rows(product, columns) }
    }

    /// Dynamic shared memory.
    fn shared_bytes(self) -> u32 {
        let stage_bytes = (self.tile_rows + self.columns) * 128;
        // The last warpgroup multiplies 64 rows, be they the tile's or what follows it.
        let overrun = (self.tile_rows.next_multiple_of(64) * 128).saturating_sub(stage_bytes);
        (1024 + RING_BYTES / stage_bytes * (stage_bytes + 16) + overrun) as u32
    }

    /// Threads of a block: a warpgroup for each 64 rows of a tile, and a warp that loads.
    fn n_threads(self) -> u32 {
        (self.tile_rows.div_ceil(64) * 128 + 32) as u32
    }

    fn variant(self) -> Variant {
        let macros =
            [("OUTPUT", self.output), ("BN", self.columns), ("TILE_ROWS", self.tile_rows), ("RING_BYTES", RING_BYTES)];
        Variant::new(&compile::STREAM_GEMM_SM90, &macros)
    }
}

/// The kernels, before there is anything to run them on.
pub(super) struct StreamKernels {
    kernels: BTreeMap<Shape, Kernel>,
}

/// The shapes that `product` takes.
fn shapes_of(product: Product) -> impl Iterator<Item = Shape> {
    COLUMNS.into_iter().filter(move |&n| StreamGemm::takes(product, n)).map(move |n| Shape::new(product, n))
}

/// Those of all products.
fn shapes() -> BTreeSet<Shape> {
    Product::ALL.into_iter().flat_map(shapes_of).collect()
}

/// Rows of weights of a tile. A multiprocessor takes in some 85 bytes a nanosecond, weights and activations alike: the more
/// rows of activations there are, the more multiprocessors a product should be spread over, in equal shares
/// (docs/log.md).
fn tile_rows(product: Product, columns: usize) -> usize {
    match (product, columns) {
        (Product::Qkv, 96..=MAX_ROWS) => 48,
        (Product::Qkv | Product::O | Product::Down, 32..=MAX_ROWS) => 64,
        (Product::GateUp, ..=128) => 112,
        _ => 128,
    }
}

impl StreamKernels {
    /// Compiles (or takes from the cache) and loads them; `None` if the device is not a Hopper.
    pub(super) fn new(gpu: &Gpu) -> Result<Option<Self>, Error> {
        if !gpu.is_hopper() {
            return Ok(None);
        }
        let shapes = shapes();
        let variants: Vec<Variant> = shapes.iter().map(|shape| shape.variant()).collect();
        let cubins = compile::compile(&variants, &gpu.arch())?;
        gpu.bind()?;
        let load = |(shape, cubin): (Shape, &Vec<u8>)| {
            let [kernel] = Kernel::load(cubin, ["stream_gemm"])?;
            kernel.allow_shared(shape.shared_bytes())?;
            Ok((shape, kernel))
        };
        let kernels = shapes.into_iter().zip(&cubins).map(load).collect::<Result<_, Error>>()?;
        Ok(Some(Self { kernels }))
    }
}

/// Index in [`COLUMNS`] of the kernel for `n` rows, `n_w` tiles of weights and `n_sms` blocks. More rows than the largest
/// are taken in tiles: of the size with which the blocks end together, or else the largest.
fn columns_for(n: usize, n_w: usize, n_sms: usize) -> usize {
    let fits = COLUMNS.partition_point(|&columns| columns < n);
    if fits < COLUMNS.len() {
        return fits;
    }
    let time = |&i: &usize| (n_w * n.div_ceil(COLUMNS[i])).div_ceil(n_sms) * COLUMNS[i];
    (COLUMNS.len() - 2..COLUMNS.len()).rev().min_by_key(time).expect("two sizes")
}

/// Maps of the activations for one of [`COLUMNS`].
struct ActivationMaps {
    h: TensorMap,
    attn_out: TensorMap,
    act: TensorMap,
}

/// Maps of one product's weights, by the rows of a tile.
type WeightMaps = BTreeMap<usize, TensorMap>;

/// Maps of a layer's weights.
struct LayerMaps {
    qkv: WeightMaps,
    o: WeightMaps,
    gate_up: WeightMaps,
    down: WeightMaps,
}

/// The products of one model.
pub(super) struct StreamGemm {
    kernels: StreamKernels,
    /// For each of [`COLUMNS`].
    activations: Vec<ActivationMaps>,
    layers: Vec<LayerMaps>,
    lm_head: WeightMaps,
    spec: DecoderSpec,
    n_sms: usize,
}

impl StreamGemm {
    /// For `weights`, with inputs from `buffers` of `n_rows` rows.
    pub(super) fn new(
        gpu: &Gpu,
        kernels: StreamKernels,
        spec: &DecoderSpec,
        weights: &Weights,
        buffers: &StepBuffers,
    ) -> Result<Self, Error> {
        gpu.bind()?;
        let n_rows = buffers.h.n_bytes() / (2 * spec.hidden_size);
        let activations = COLUMNS.map(|columns| {
            let map = |x: &DeviceBuffer, product: Product| {
                TensorMap::of_activations(x.ptr(), n_rows, product.size(spec).1, columns)
            };
            Ok(ActivationMaps {
                h: map(&buffers.h, Product::Qkv)?,
                attn_out: map(&buffers.attn_out, Product::O)?,
                act: map(&buffers.act, Product::Down)?,
            })
        });
        let weights_map = |w: u64, product: Product| -> Result<WeightMaps, Error> {
            let size = product.size(spec);
            let map = |rows| match product {
                Product::GateUp => TensorMap::of_gated_weights(w, size, rows),
                _ => TensorMap::of_weights(w, size, rows),
            };
            let tile_rows: BTreeSet<usize> = shapes_of(product).map(|shape| shape.tile_rows).collect();
            tile_rows.into_iter().map(|rows| Ok((rows, map(rows)?))).collect()
        };
        let layers = weights.layers.iter().map(|w| {
            Ok(LayerMaps {
                qkv: weights_map(w.qkv.ptr(), Product::Qkv)?,
                o: weights_map(w.o.ptr(), Product::O)?,
                gate_up: weights_map(w.gate_up.ptr(), Product::GateUp)?,
                down: weights_map(w.down.ptr(), Product::Down)?,
            })
        });
        Ok(Self {
            kernels,
            activations: activations.into_iter().collect::<Result<_, Error>>()?,
            layers: layers.collect::<Result<_, Error>>()?,
            lm_head: weights_map(weights.lm_head(), Product::Logits)?,
            spec: spec.clone(),
            n_sms: gpu.n_sms as usize,
        })
    }

    /// Whether `product` of `n` rows is one for these kernels.
    pub(super) fn takes(product: Product, n: usize) -> bool {
        n <= match product {
            Product::GateUp => usize::MAX,
            Product::Logits => MAX_LOGITS_ROWS,
            _ => MAX_ROWS,
        }
    }

    /// Float32 numbers that the parts of [`Product::O`] and [`Product::Down`] take, at most.
    pub(super) fn max_part_numbers(spec: &DecoderSpec) -> usize {
        COLUMNS.iter().filter(|&&n| n <= MAX_ROWS).map(|&n| n * max_split(n)).max().unwrap_or(0) * spec.hidden_size
    }

    /// Enqueues `product` of `layer` for `n` rows, from its buffer to `out`. Returns the parts that its result is in:
    /// float32 `[parts, n, hidden]` for those that are added to the residual stream.
    pub(super) fn run(
        &self,
        gpu: &Gpu,
        (product, layer): (Product, usize),
        n: usize,
        out: u64,
    ) -> Result<usize, Error> {
        let (n_out, k) = product.size(&self.spec);
        // Prompts' tiles of weights are all alike.
        let columns = columns_for(n, n_out.div_ceil(tile_rows(product, usize::MAX)), self.n_sms);
        let shape = Shape::new(product, COLUMNS[columns]);
        let x = &self.activations[columns];
        let w = &self.layers[layer];
        let (w, x) = match product {
            Product::Qkv => (&w.qkv, &x.h),
            Product::O => (&w.o, &x.attn_out),
            Product::GateUp => (&w.gate_up, &x.h),
            Product::Down => (&w.down, &x.act),
            Product::Logits => (&self.lm_head, &x.h),
        };
        let missing = || Error::Device(format!("no kernel for {product:?} of {n} rows"));
        let kernel = self.kernels.kernels.get(&shape).ok_or_else(missing)?;
        let w = w.get(&shape.tile_rows).ok_or_else(missing)?;
        let (n_tiles, k_blocks) = (n_out.div_ceil(shape.tile_rows), k.div_ceil(64));
        let split = match product {
            Product::O | Product::Down => split(n_tiles, k_blocks, max_split(shape.columns), self.n_sms),
            _ => 1,
        };
        let launch = Launch {
            grid: [split as u32, (n_tiles * n.div_ceil(shape.columns)).min(self.n_sms / split) as u32, 1],
            block: shape.n_threads(),
            shared_bytes: shape.shared_bytes(),
            dependent: true,
        };
        let args = [
            Arg::Map(w),
            Arg::Map(x),
            Arg::Ptr(out),
            Arg::Int(n_out as i32),
            Arg::Int(n as i32),
            Arg::Int(k_blocks as i32),
        ];
        kernel.launch(gpu.cu_stream(), launch, &args)?;
        Ok(split)
    }
}

/// Most parts for a kernel of `columns` rows: their sums must be read again by the norm that follows.
fn max_split(columns: usize) -> usize {
    if columns <= 64 { 4 } else { 2 }
}

/// Parts to cut K into, so that few tiles still occupy the device.
fn split(n_tiles: usize, k_blocks: usize, most: usize, n_sms: usize) -> usize {
    let fits = |split: usize| split <= most && n_tiles * split <= n_sms && k_blocks / split >= 4;
    [4, 2].into_iter().find(|&split| fits(split)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_batch_has_its_kernel() {
        let columns = |n| COLUMNS[columns_for(n, 224, 132)];
        assert_eq!([1, 9, 16, 17, 128, 129, 256].map(columns), [8, 16, 16, 32, 128, 192, 256]);
        // 896 tiles of 192 rows are 7 rounds of 132 blocks, 672 of 256 are 6.
        assert_eq!([512, 768, 1024, 4096].map(columns), [256, 192, 256, 256]);
    }

    #[test]
    fn rings_fit_the_multiprocessor() {
        assert!(shapes().into_iter().all(|shape| shape.shared_bytes() <= 227 << 10));
    }

    #[test]
    fn k_is_cut_while_the_device_has_room() {
        // Llama-3.1-8B's o and down, Qwen2-0.5B's.
        assert_eq!(split(32, 64, 4, 132), 4);
        assert_eq!(split(32, 224, 2, 132), 2);
        assert_eq!(split(7, 14, 4, 132), 2);
        assert_eq!(split(7, 3, 4, 132), 1);
        assert_eq!(split(100, 224, 4, 132), 1);
    }
}
