//! [`StreamGemm`]: the products of a model on Hopper whose time is that of reading the weights
//! (`kernels/stream_gemm_sm90.cu`), and all products of weights in 12 bits each (`kernels/packed_gemm_sm90.cu`).

use std::collections::{BTreeMap, BTreeSet};

use super::{
    buffers::StepBuffers,
    compile::{self, Plan, Planned},
    device::Gpu,
    kernel::{Arg, Kernel, Launch},
    load::Weights,
    memory::DeviceBuffer,
    packed_weights::{BLOCK_BYTES, BLOCK_ROWS, MatrixAt},
    product::Product,
    tensor_map::{DeviceMaps, MapAt, TensorMap},
};
use crate::{Error, decoder::DecoderSpec};

/// Most rows of each kernel.
pub(super) const COLUMNS: [usize; 14] = [8, 16, 32, 48, 64, 96, 128, 160, 176, 192, 208, 224, 240, 256];
/// Most rows for which every product of bf16 weights is faster here than in cuBLASLt on an H100 (docs/log.md); the gate
/// and up projections, which cuBLASLt leaves to another kernel to multiply, are always, logits up to
/// [`MAX_LOGITS_ROWS`].
const MAX_ROWS: usize = 192;
const MAX_LOGITS_ROWS: usize = 64;
/// Most rows for which K of a product of packed weights is cut. More are a prompt's: they are taken in tiles, whose sums
/// are added to the residual stream at once.
const MAX_PACKED_ROWS: usize = 256;
/// Most parts of K.
const MAX_SPLIT: usize = 4;
/// Bytes of the ring of weights and activations: what leaves a block of attention room beside it.
const RING_BYTES: usize = 208_000;
/// The same of the fewest columns, which have no use for more, and so leave room to norms, too (docs/log.md).
const SMALL_RING_BYTES: usize = 136_000;
/// Tiles for more rows than [`MAX_PACKED_ROWS`], rows of packed weights and of activations, and microseconds that one
/// takes for 4,096 columns at an H100's power limit (docs/log.md).
const PROMPT_TILES: [((usize, usize), f64); 5] =
    [((128, 256), 52.0), ((128, 192), 42.5), ((192, 128), 43.0), ((128, 128), 30.5), ((64, 128), 20.8)];

/// One compiled kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Shape {
    /// Whether weights have 12 bits each.
    packed: bool,
    /// What it does with its result: its macro OUTPUT.
    output: usize,
    /// Most rows of activations of a tile, one of [`COLUMNS`].
    columns: usize,
    /// Rows of weights of a tile.
    tile_rows: usize,
}

impl Shape {
    const BF16: usize = 0;
    const F32: usize = 1;
    const GATED: usize = 2;
    const ADD: usize = 3;

    /// For `product` with up to `columns` rows.
    fn new(packed: bool, product: Product, columns: usize) -> Self {
        let tile_rows = if packed { packed_tile_rows(product, columns) } else { tile_rows(product, columns) };
        let output = match product {
            Product::Qkv => Self::BF16,
            Product::O | Product::Down | Product::Logits => Self::F32,
            Product::GateUp => Self::GATED,
        };
        Self { packed, output, columns, tile_rows }
    }

    /// For `product` of packed weights with more rows, in tiles of `tile_rows` and `columns`.
    fn of_prompts(product: Product, (tile_rows, columns): (usize, usize)) -> Self {
        let shape = Self { tile_rows, ..Self::new(true, product, columns) };
        match product {
            Product::O | Product::Down => Self { output: Self::ADD, ..shape },
            _ => shape,
        }
    }

    /// Whether the product adds to the residual stream itself, and leaves no parts.
    pub(super) fn adds(self) -> bool {
        self.output == Self::ADD
    }

    /// Warpgroups that take the stages of a tile in turns: one alone needs 450 cycles for a stage, its latencies. With
    /// many columns the tensor cores set the time.
    fn k_groups(self) -> usize {
        match self.columns {
            _ if !self.packed || self.tile_rows > 64 => 1,
            9..=16 => 4,
            ..=128 => 2,
            _ => 1,
        }
    }

    /// Bytes of its ring, at most.
    fn ring_bytes(self) -> usize {
        if self.packed && self.columns <= 8 { SMALL_RING_BYTES } else { RING_BYTES }
    }

    /// Most parts of K: their sums must be read again by the norm that follows.
    fn max_split(self) -> usize {
        if self.columns <= 64 || (self.packed && self.tile_rows == 128) { MAX_SPLIT } else { 2 }
    }

    /// Blocks that share the copies of activations: it takes less power, which is a prompt's limit.
    fn cluster(self) -> usize {
        let is_largest = self.packed && (self.tile_rows, self.columns) == (128, 256);
        if is_largest && self.output != Self::F32 { 2 } else { 1 }
    }

    /// Dynamic shared memory: the swizzle's alignment, stages with their barriers, sums of the second warpgroup, and what
    /// the last warpgroup, which takes 64 rows, reads past the tile's.
    fn shared_bytes(self) -> u32 {
        let past_end = self.tile_rows.next_multiple_of(64) - self.tile_rows;
        let sums = (self.k_groups() - 1) * self.tile_rows.next_multiple_of(64) * self.columns * 4;
        let (w_bytes, overrun) = match self.packed {
            true => (self.tile_rows / BLOCK_ROWS * BLOCK_BYTES, past_end / BLOCK_ROWS * BLOCK_BYTES),
            false => (self.tile_rows * 128, (past_end * 128).saturating_sub(self.columns * 128)),
        };
        let stage_bytes = w_bytes + self.columns * 128;
        (1024 + (self.ring_bytes() - sums) / stage_bytes * (stage_bytes + 16) + sums + overrun) as u32
    }

    /// Threads of a block: a warpgroup for each 64 rows of a tile, those of the other turns, and a warp that loads. With
    /// many sums in registers it takes a whole warpgroup, whose registers the others get.
    fn n_threads(self) -> u32 {
        let loading = if self.packed && (self.columns > 128 || self.tile_rows > 128) { 128 } else { 32 };
        (self.tile_rows.div_ceil(64) * self.k_groups() * 128 + loading) as u32
    }

    /// Adds its kernel to `plan`.
    fn plan(self, plan: &mut Plan) -> Planned {
        let macros = [
            ("OUTPUT", self.output),
            ("BN", self.columns),
            ("TILE_ROWS", self.tile_rows),
            ("RING_BYTES", self.ring_bytes()),
            ("K_GROUPS", self.k_groups()),
            ("CLUSTER", self.cluster()),
        ];
        match self.packed {
            true => plan.add(&compile::PACKED_GEMM_SM90, &macros),
            false => plan.add(&compile::STREAM_GEMM_SM90, &macros[..4]),
        }
    }
}

/// Rows of bf16 weights of a tile. A multiprocessor takes in some 85 bytes a nanosecond, weights and activations alike:
/// the more rows of activations there are, the more multiprocessors a product should be spread over, in equal shares
/// (docs/log.md).
fn tile_rows(product: Product, columns: usize) -> usize {
    match (product, columns) {
        (Product::Qkv, 96..=MAX_ROWS) => 48,
        (Product::Qkv | Product::O | Product::Down, 32..=MAX_ROWS) => 64,
        (Product::GateUp, ..=128) => 112,
        _ => 128,
    }
}

/// The same of packed weights, of which few are on their way to a multiprocessor at a time.
fn packed_tile_rows(product: Product, columns: usize) -> usize {
    match (product, columns) {
        (Product::Qkv, 48..) => 48,
        (Product::Down, 96..) => 128,
        (Product::Qkv | Product::O | Product::Down, _) => 64,
        (Product::GateUp, ..=128) => 112,
        _ => 128,
    }
}

/// The shapes that `product` takes.
fn shapes_of(packed: bool, product: Product) -> Vec<Shape> {
    let of_prompts = PROMPT_TILES.map(|(tile, _)| Shape::of_prompts(product, tile));
    match packed {
        true => COLUMNS.into_iter().map(|columns| Shape::new(true, product, columns)).chain(of_prompts).collect(),
        false => COLUMNS
            .into_iter()
            .filter(|&columns| takes_raw(product, columns))
            .map(|columns| Shape::new(false, product, columns))
            .collect(),
    }
}

/// Whether `product` of bf16 weights with `n` rows is one for these kernels.
fn takes_raw(product: Product, n: usize) -> bool {
    n <= match product {
        Product::GateUp => usize::MAX,
        Product::Logits => MAX_LOGITS_ROWS,
        _ => MAX_ROWS,
    }
}

/// Compiled kernels.
pub(super) struct StreamKernels {
    kernels: BTreeMap<Shape, Kernel>,
}

impl StreamKernels {
    /// Compiles (or takes from the cache) and loads those that a model needs whose matrices are all packed; `None` if the
    /// device is not a Hopper.
    pub(super) fn new(gpu: &Gpu) -> Result<Option<Self>, Error> {
        if !gpu.is_hopper() {
            return Ok(None);
        }
        let mut kernels = Self { kernels: BTreeMap::new() };
        kernels.add(gpu, Product::ALL.into_iter().flat_map(|product| shapes_of(true, product)))?;
        Ok(Some(kernels))
    }

    /// The same for `shapes`, as far as they are not there yet.
    fn add(&mut self, gpu: &Gpu, shapes: impl Iterator<Item = Shape>) -> Result<(), Error> {
        let shapes: BTreeSet<Shape> = shapes.filter(|shape| !self.kernels.contains_key(shape)).collect();
        let mut plan = Plan::default();
        let planned: Vec<_> = shapes.into_iter().map(|shape| (shape, shape.plan(&mut plan))).collect();
        let compiled = plan.compile(gpu)?;
        for (shape, planned) in planned {
            let [kernel] = compiled.load(planned, [if shape.packed { "packed_gemm" } else { "stream_gemm" }])?;
            kernel.allow_shared(shape.shared_bytes())?;
            self.kernels.insert(shape, kernel);
        }
        Ok(())
    }
}

/// Most rows of the kernel for `n` rows of bf16 weights' products, or of packed ones up to [`MAX_PACKED_ROWS`]. More rows
/// are taken in tiles: of the size with which `n_sms` blocks for `n_w` tiles of weights end together, or else the largest.
fn columns_for(n: usize, n_w: usize, n_sms: usize) -> usize {
    if let Some(&fits) = COLUMNS.iter().find(|&&columns| columns >= n) {
        return fits;
    }
    let time = |columns: &usize| (n_w * n.div_ceil(*columns)).div_ceil(n_sms) * columns;
    [256, 192].into_iter().min_by_key(time).expect("two sizes")
}

/// The tile for `n` rows of a prompt and `n_out` rows of packed weights: that with which the blocks end first.
fn prompt_tile(n: usize, n_out: usize, n_sms: usize) -> (usize, usize) {
    let time = |&((rows, columns), time): &((usize, usize), f64)| {
        (n_out.div_ceil(rows) * n.div_ceil(columns)).div_ceil(n_sms) as f64 * time
    };
    let fastest = PROMPT_TILES.into_iter().min_by(|a, b| time(a).total_cmp(&time(b)));
    fastest.expect("there are tiles").0
}

/// The maps of the activations for one of [`COLUMNS`].
struct ActivationMaps {
    h: MapAt,
    attn_out: MapAt,
    act: MapAt,
}

/// How the kernels find one product's weights.
struct WeightMaps {
    /// Its maps, by the rows of a tile.
    maps: BTreeMap<usize, MapAt>,
    /// Address of a packed matrix's extras.
    extras: Option<u64>,
}

/// The products of one model.
pub(super) struct StreamGemm {
    kernels: StreamKernels,
    /// For each of [`COLUMNS`].
    activations: Vec<ActivationMaps>,
    /// Of each layer, in the order of [`Product::LAYER`].
    layers: Vec<[WeightMaps; 4]>,
    lm_head: WeightMaps,
    maps: DeviceMaps,
    spec: DecoderSpec,
    n_sms: usize,
}

impl StreamGemm {
    /// For `weights`, with inputs from `buffers` of `n_rows` rows.
    pub(super) fn new(
        gpu: &Gpu,
        mut kernels: StreamKernels,
        spec: &DecoderSpec,
        weights: &Weights,
        buffers: &StepBuffers,
    ) -> Result<Self, Error> {
        gpu.bind()?;
        let n_rows = buffers.h.n_bytes() / (2 * spec.hidden_size);
        let mut all_maps = Vec::new();
        let mut add = |map: TensorMap| {
            all_maps.push(map);
            MapAt(all_maps.len() - 1)
        };
        let activations = COLUMNS.map(|columns| {
            let mut map = |x: &DeviceBuffer, product: Product| {
                let map = TensorMap::of_activations(x.ptr(), n_rows, product.size(spec).1, columns)?;
                Ok(add(map))
            };
            Ok(ActivationMaps {
                h: map(&buffers.h, Product::Qkv)?,
                attn_out: map(&buffers.attn_out, Product::O)?,
                act: map(&buffers.act, Product::Down)?,
            })
        });
        let mut maps_of = |product: Product, layer: usize| -> Result<WeightMaps, Error> {
            let size = product.size(spec);
            let at = weights.matrix((product, layer));
            let shapes = shapes_of(at.is_packed(), product);
            let map = |rows| match (at, product) {
                (MatrixAt::Packed { planes, .. }, _) => TensorMap::of_packed(planes, size, rows),
                (MatrixAt::Raw(w), Product::GateUp) => TensorMap::of_gated_weights(w, size, rows),
                (MatrixAt::Raw(w), _) => TensorMap::of_weights(w, size, rows),
            };
            let tile_rows: BTreeSet<usize> = shapes.iter().map(|shape| shape.tile_rows).collect();
            let maps = tile_rows.into_iter().map(|rows| Ok((rows, add(map(rows)?))));
            let maps = maps.collect::<Result<_, Error>>()?;
            kernels.add(gpu, shapes.into_iter())?;
            let extras = match at {
                MatrixAt::Packed { extras, .. } => Some(extras),
                MatrixAt::Raw(_) => None,
            };
            Ok(WeightMaps { maps, extras })
        };
        let mut layers = Vec::with_capacity(spec.n_layers);
        for layer in 0..spec.n_layers {
            let [qkv, o, gate_up, down] = Product::LAYER.map(|product| maps_of(product, layer));
            layers.push([qkv?, o?, gate_up?, down?]);
        }
        let lm_head = maps_of(Product::Logits, 0)?;
        Ok(Self {
            kernels,
            activations: activations.into_iter().collect::<Result<_, Error>>()?,
            layers,
            lm_head,
            maps: DeviceMaps::new(gpu, &all_maps)?,
            spec: spec.clone(),
            n_sms: gpu.n_sms as usize,
        })
    }

    fn weights(&self, (product, layer): (Product, usize)) -> &WeightMaps {
        match Product::LAYER.iter().position(|&it| it == product) {
            Some(i) => &self.layers[layer][i],
            None => &self.lm_head,
        }
    }

    /// Float32 numbers that the parts of [`Product::O`] and [`Product::Down`] take, at most.
    pub(super) fn max_part_numbers(spec: &DecoderSpec) -> usize {
        COLUMNS[COLUMNS.len() - 1] * MAX_SPLIT * spec.hidden_size
    }

    /// The kernel for `product`, with its layer, of `n` rows; `None` if that is not one for these kernels.
    pub(super) fn shape(&self, (product, layer): (Product, usize), n: usize) -> Option<Shape> {
        let n_out = product.size(&self.spec).0;
        let packed = self.weights((product, layer)).extras.is_some();
        if packed && n > MAX_PACKED_ROWS {
            return Some(Shape::of_prompts(product, prompt_tile(n, n_out, self.n_sms)));
        }
        // Prompts' tiles of bf16 weights are all alike.
        let columns = columns_for(n, n_out.div_ceil(tile_rows(product, usize::MAX)), self.n_sms);
        (packed || takes_raw(product, n)).then(|| Shape::new(packed, product, columns))
    }

    /// Enqueues `product` of `layer` for `n` rows by the kernel of `shape`, from its buffer to `out`. Returns the parts that
    /// its result is in: float32 `[parts, n, hidden]` for those that are added to the residual stream, unless it
    /// [`Shape::adds`] to it.
    pub(super) fn run(
        &self,
        gpu: &Gpu,
        (product, layer): (Product, usize),
        (shape, n): (Shape, usize),
        out: u64,
    ) -> Result<usize, Error> {
        let (n_out, k) = product.size(&self.spec);
        let missing = || Error::Device(format!("no kernel for {product:?} of {n} rows"));
        let cluster = shape.cluster();
        let x = COLUMNS.iter().position(|&columns| columns == shape.columns / cluster).ok_or_else(missing)?;
        let x = &self.activations[x];
        let x = match product {
            Product::Qkv | Product::GateUp | Product::Logits => x.h,
            Product::O => x.attn_out,
            Product::Down => x.act,
        };
        let weights = self.weights((product, layer));
        let kernel = self.kernels.kernels.get(&shape).ok_or_else(missing)?;
        let &w = weights.maps.get(&shape.tile_rows).ok_or_else(missing)?;
        let (w, x) = (self.maps.ptr(w), self.maps.ptr(x));
        let (n_tiles, k_blocks) = (n_out.div_ceil(shape.tile_rows), k.div_ceil(64));
        let split = match product {
            Product::O | Product::Down if shape.output == Shape::F32 => {
                split(n_tiles, k_blocks, shape.max_split(), self.n_sms)
            }
            _ => 1,
        };
        let n_tiles = n_tiles.next_multiple_of(cluster) * n.div_ceil(shape.columns);
        let launch = Launch {
            grid: [split as u32, n_tiles.min(self.n_sms / split / cluster * cluster) as u32, 1],
            block: shape.n_threads(),
            shared_bytes: shape.shared_bytes(),
            dependent: true,
        };
        let sizes = [n_out, n, k_blocks].map(|size| Arg::Int(size as i32));
        match weights.extras {
            Some(extras) => {
                let [w, extras, x, out] = [w, extras, x, out].map(Arg::Ptr);
                let args = [w, extras, x, out, sizes[0], sizes[1], sizes[2]];
                kernel.launch(gpu.cu_stream(), launch, &args)?;
            }
            None => {
                let args = [Arg::Ptr(w), Arg::Ptr(x), Arg::Ptr(out), sizes[0], sizes[1], sizes[2]];
                kernel.launch(gpu.cu_stream(), launch, &args)?;
            }
        }
        Ok(split)
    }
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
        let columns = |n| columns_for(n, 224, 132);
        assert_eq!([1, 9, 16, 17, 128, 129, 193, 256].map(columns), [8, 16, 16, 32, 128, 160, 208, 256]);
        // 896 tiles of 192 rows are 7 rounds of 132 blocks, 672 of 256 are 6.
        assert_eq!([512, 768, 1024, 4096].map(columns), [256, 192, 256, 256]);
    }

    #[test]
    fn prompts_take_the_tiles_that_end_together() {
        // Llama-3.1-8B's qkv in 1,024 rows: 192 of the largest tiles are two rounds, and so are 256 smaller ones.
        assert_eq!(prompt_tile(1024, 6144, 132), (192, 128));
        assert_eq!(prompt_tile(1024, 4096, 132), (128, 256));
        assert_eq!(prompt_tile(256, 4096, 132), (64, 128));
        assert_eq!(prompt_tile(2048, 28_672, 132), (128, 256));
    }

    #[test]
    fn rings_fit_the_multiprocessor() {
        let shapes = [true, false]
            .into_iter()
            .flat_map(|packed| Product::ALL.into_iter().flat_map(move |product| shapes_of(packed, product)));
        for shape in shapes {
            assert!(shape.shared_bytes() <= 227 << 10, "{shape:?} takes {} bytes", shape.shared_bytes());
        }
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
