//! [`Ops`]: the kernels of a model, compiled for its dimensions, with the geometry each is launched with.

use super::{
    buffers::HEADS_PER_TILE,
    compile::{self, Compiled, Plan, Planned},
    device::Gpu,
    inputs::TILE_ROWS,
    kernel::{Kernel, Launch},
    product::Product,
};
use crate::{Error, decoder::DecoderSpec};

/// Threads of an elementwise block.
const ELEMENTWISE: u32 = 256;
/// 16-byte chunks of a row in a stage of a GEMV's ring.
const GEMV_CHUNKS: usize = 8;
/// Rows that a GEMV of one batch tile takes.
pub(super) const BATCH_TILE_ROWS: usize = 8;
/// Batch tiles of the sets of GEMVs. Hopper has a faster kernel for what the second set takes.
fn batch_tiles(hopper: bool) -> &'static [usize] {
    if hopper { &[1] } else { &[1, 2] }
}
/// Warps of a decode attention block.
const DECODE_WARPS: usize = 4;
/// Splits that are joined in a cluster, and the most sequences with short contexts for which that is the fastest on
/// Hopper (docs/log.md).
const DECODE_CLUSTERS: [(usize, usize); 2] = [(8, 2), (4, 8)];
/// Most rows for which the GEMVs are faster on Hopper than streaming GEMMs, for models of [`WIDE_HIDDEN`] and wider.
const HOPPER_GEMV_ROWS: usize = 3;
const WIDE_HIDDEN: usize = 2048;
/// Stages of Hopper prefill attention's ring, and its block.
const HOPPER_STAGES: usize = 3;
const HOPPER_BLOCK: u32 = 384;

/// How a GEMV is cut. See the kernel's header.
#[derive(Debug, Clone, Copy, PartialEq)]
struct GemvShape {
    warps: usize,
    /// Warps that share a row of weights.
    warps_k: usize,
    n_stages: usize,
    batch_tiles: usize,
}

impl GemvShape {
    /// For `n_out` rows of `k` weights: the fastest of those timed on an H100 (docs/log.md), as far as blocks of
    /// `max_shared` bytes can hold it.
    fn new((n_out, k): (usize, usize), batch_tiles: usize, max_shared: u32) -> Self {
        let units = k.div_ceil(8 * GEMV_CHUNKS);
        let fit = |warps: usize, n_stages: usize| {
            let mut warps_k = warps;
            while warps_k > 1 && units.div_ceil(warps_k) < n_stages {
                warps_k /= 2;
            }
            Self { warps, warps_k, n_stages, batch_tiles }
        };
        let holds = |shape: &Self| shape.shared_bytes(BATCH_TILE_ROWS * batch_tiles) <= max_shared;
        // A small matrix passes in one deep ring, one of a few tiles a block in a deeper one than large matrices need.
        let deep = Self { warps: 8, warps_k: 8, n_stages: 12, batch_tiles };
        let deeper = Self { warps: 16, warps_k: 16, n_stages: 5, batch_tiles };
        let is_small = n_out <= 4096 && (8 * 4..=8 * 12).contains(&units);
        let is_medium = (4097..=8192).contains(&n_out) && units >= 16 * 4;
        [is_small.then_some(deep), is_medium.then_some(deeper), Some(fit(16, 3))]
            .into_iter()
            .flatten()
            .find(holds)
            .unwrap_or_else(|| fit(8, 3))
    }

    /// Dynamic shared memory of a block.
    fn shared_bytes(self, n_rows: usize) -> u32 {
        (self.warps * (self.n_stages * GEMV_CHUNKS * 256 + 32 * self.batch_tiles + 128 * n_rows)) as u32
    }

    fn macros(self, kind: &str, k: usize) -> [(&str, usize); 6] {
        [
            (kind, 1),
            ("K", k),
            ("WARPS", self.warps),
            ("WARPS_K", self.warps_k),
            ("STAGES", self.n_stages),
            ("BATCH_TILES", self.batch_tiles),
        ]
    }
}

/// A GEMV and its grid.
pub(super) struct Gemv {
    pub(super) kernel: Kernel,
    n_blocks: u32,
    shape: GemvShape,
}

/// The GEMVs of a layer and of the output projection.
pub(super) struct Gemvs {
    pub(super) qkv: Gemv,
    pub(super) o: Gemv,
    pub(super) gate_up: Gemv,
    pub(super) down: Gemv,
    pub(super) logits: Gemv,
}

/// [`Gemvs`] before they are compiled.
struct PlannedGemvs {
    qkv: PlannedGemv,
    o: PlannedGemv,
    gate_up: PlannedGemv,
    down: PlannedGemv,
    logits: PlannedGemv,
}

struct PlannedGemv {
    planned: Planned,
    name: &'static str,
    n_out: usize,
    shape: GemvShape,
}

impl PlannedGemvs {
    /// Adds those for up to `batch_tiles` batch tiles to `plan`.
    fn new(plan: &mut Plan, gpu: &Gpu, spec: &DecoderSpec, batch_tiles: usize) -> Self {
        let mut add = |product: Product, (kind, name): (&str, &'static str)| {
            let (n_out, k) = product.size(spec);
            let shape = GemvShape::new((n_out, k), batch_tiles, gpu.max_shared);
            PlannedGemv { planned: plan.add(&compile::GEMV, &shape.macros(kind, k)), name, n_out, shape }
        };
        Self {
            qkv: add(Product::Qkv, ("GEMV_NORM", "gemv_norm")),
            o: add(Product::O, ("GEMV_RESIDUAL", "gemv_residual")),
            gate_up: add(Product::GateUp, ("GEMV_GATE_UP", "gemv_gate_up")),
            down: add(Product::Down, ("GEMV_RESIDUAL", "gemv_residual")),
            logits: add(Product::Logits, ("GEMV_LOGITS", "gemv_logits")),
        }
    }

    fn load(self, compiled: &Compiled, gpu: &Gpu) -> Result<Gemvs, Error> {
        let load = |PlannedGemv { planned, name, n_out, shape }: PlannedGemv| -> Result<Gemv, Error> {
            let [kernel] = compiled.load(planned, [name])?;
            kernel.allow_shared(shape.shared_bytes(BATCH_TILE_ROWS * shape.batch_tiles))?;
            // A tile is 16 rows of weights.
            let n_tiles = n_out.div_ceil(16).div_ceil(shape.warps / shape.warps_k);
            Ok(Gemv { kernel, n_blocks: gpu.n_sms.min(n_tiles as u32), shape })
        };
        Ok(Gemvs {
            qkv: load(self.qkv)?,
            o: load(self.o)?,
            gate_up: load(self.gate_up)?,
            down: load(self.down)?,
            logits: load(self.logits)?,
        })
    }
}

/// All kernels of a model.
pub(super) struct Ops {
    pub(super) embed: Kernel,
    pub(super) rmsnorm: Kernel,
    /// The same without parts to add: in fewer registers, so more rows at a time.
    pub(super) rmsnorm_whole: Kernel,
    pub(super) rope_kv: Kernel,
    pub(super) silu_mul: Kernel,
    pub(super) decode_attention: Kernel,
    decode_attention_rope: Kernel,
    /// For each of [`DECODE_CLUSTERS`], on Hopper.
    decode_attention_clusters: Vec<Kernel>,
    pub(super) unpack_kv: Kernel,
    pub(super) gather_rows: Kernel,
    pub(super) prefill_attention: Kernel,
    /// For each of [`batch_tiles`].
    gemvs: Vec<Gemvs>,
    /// Whether kernels start before the one ahead of them has ended.
    dependent: bool,
    /// Whether prefill attention is the one written for Hopper.
    hopper: bool,
    n_sms: usize,
    hidden: usize,
    n_heads: usize,
    n_kv: usize,
    head_dim: usize,
}

/// Dynamic shared memory of a prefill attention block.
fn prefill_shared(head_dim: usize, hopper: bool) -> u32 {
    let row_bytes = if head_dim <= 64 { 128 } else { 256 };
    match hopper {
        true => 1024 + (TILE_ROWS + 2 * HOPPER_STAGES * 128) as u32 * row_bytes + 256,
        false => (128 + 2 * 64) * row_bytes,
    }
}

impl Ops {
    /// Compiles (or takes from the cache) and loads all kernels.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec) -> Result<Self, Error> {
        let hopper = gpu.is_hopper();
        let heads = [("HEAD_DIM", spec.head_dim), ("GROUP", spec.n_heads / spec.n_kv_heads)];
        let chunks = spec.hidden_size.div_ceil(8 * ELEMENTWISE as usize);
        let norm = [("BLOCK", ELEMENTWISE as usize), ("CHUNKS", chunks), ("MAX_PARTS", 0)];
        let decode = [heads[0], heads[1], ("WARPS", DECODE_WARPS)];

        let mut plan = Plan::default();
        let embed = plan.add(&compile::EMBED, &[]);
        let rmsnorm = plan.add(&compile::RMSNORM, &norm[..2]);
        let rmsnorm_whole = plan.add(&compile::RMSNORM, &norm);
        let qk_norm = [heads[0], ("QK_NORM", 1)];
        let rope_kv = plan.add(&compile::ROPE_KV, if spec.qk_norm { &qk_norm } else { &heads[..1] });
        let silu_mul = plan.add(&compile::SILU_MUL, &[]);
        let decode_attention = plan.add(&compile::DECODE_ATTENTION, &decode);
        let clusters: Vec<_> = DECODE_CLUSTERS
            .iter()
            .filter(|_| hopper)
            .map(|&(n, _)| plan.add(&compile::DECODE_ATTENTION, &[decode[0], decode[1], decode[2], ("CLUSTER", n)]))
            .collect();
        let unpack_kv = plan.add(&compile::UNPACK_KV, &heads[..1]);
        let gather_rows = plan.add(&compile::GATHER_ROWS, &[]);
        let prefill_attention = match hopper {
            true => plan.add(&compile::PREFILL_ATTENTION_SM90, &[heads[0], heads[1], ("STAGES", HOPPER_STAGES)]),
            false => plan.add(&compile::PREFILL_ATTENTION, &heads),
        };
        let gemvs: Vec<_> = batch_tiles(hopper).iter().map(|&n| PlannedGemvs::new(&mut plan, gpu, spec, n)).collect();

        let compiled = plan.compile(gpu)?;
        let one = |planned: Planned, name: &'static str| compiled.load(planned, [name]).map(|[kernel]| kernel);
        let [decode_attention, decode_attention_rope] =
            compiled.load(decode_attention, ["decode_attention", "decode_attention_rope"])?;
        let prefill_attention =
            one(prefill_attention, if hopper { "prefill_attention_sm90" } else { "prefill_attention" })?;
        prefill_attention.allow_shared(prefill_shared(spec.head_dim, hopper))?;
        let clusters = clusters.into_iter().map(|planned| one(planned, "decode_attention_rope"));
        Ok(Self {
            embed: one(embed, "embed_gather")?,
            rmsnorm: one(rmsnorm, "rmsnorm")?,
            rmsnorm_whole: one(rmsnorm_whole, "rmsnorm")?,
            rope_kv: one(rope_kv, "rope_kv_write")?,
            silu_mul: one(silu_mul, "silu_mul")?,
            decode_attention,
            decode_attention_rope,
            decode_attention_clusters: clusters.collect::<Result<_, _>>()?,
            unpack_kv: one(unpack_kv, "unpack_kv")?,
            gather_rows: one(gather_rows, "gather_rows")?,
            prefill_attention,
            gemvs: gemvs.into_iter().map(|planned| planned.load(&compiled, gpu)).collect::<Result<_, _>>()?,
            dependent: gpu.capability.0 >= 9,
            hopper,
            n_sms: gpu.n_sms as usize,
            hidden: spec.hidden_size,
            n_heads: spec.n_heads,
            n_kv: spec.n_kv_heads,
            head_dim: spec.head_dim,
        })
    }

    fn launch(&self, grid: [u32; 3], block: u32) -> Launch {
        Launch { grid, block, shared_bytes: 0, dependent: self.dependent }
    }

    /// For `embed_gather`, the first kernel of a step: it waits for all of the step before.
    pub(super) fn embed_launch(&self, n_tokens: usize) -> Launch {
        let block = (self.hidden / 8).next_multiple_of(32).min(256) as u32;
        Launch { dependent: false, ..self.launch([n_tokens as u32, 1, 1], block) }
    }

    /// For both `rmsnorm`s.
    pub(super) fn rmsnorm_launch(&self, n_rows: usize) -> Launch {
        self.launch([n_rows as u32, 1, 1], ELEMENTWISE)
    }

    /// For `rope_kv_write`.
    pub(super) fn rope_kv_launch(&self, n_tokens: usize) -> Launch {
        let lanes = if self.head_dim > 128 {
            16
        } else if self.head_dim > 64 {
            8
        } else {
            4
        };
        let n_threads = n_tokens * (self.n_heads + 2 * self.n_kv) * lanes;
        self.launch([n_threads.div_ceil(ELEMENTWISE as usize) as u32, 1, 1], ELEMENTWISE)
    }

    /// For `silu_mul`.
    pub(super) fn silu_mul_launch(&self, n_tokens: usize, inter: usize) -> Launch {
        self.launch([(inter / 8).div_ceil(ELEMENTWISE as usize) as u32, n_tokens.min(65_535) as u32, 1], ELEMENTWISE)
    }

    /// Most rows of a GEMV.
    pub(super) fn max_gemv_rows(&self) -> usize {
        match self.hopper && self.hidden >= WIDE_HIDDEN {
            true => HOPPER_GEMV_ROWS,
            false => self.gemvs.len() * BATCH_TILE_ROWS,
        }
    }

    /// The GEMVs for `n_rows` rows, [`Self::max_gemv_rows`] at most.
    pub(super) fn gemvs(&self, n_rows: usize) -> &Gemvs {
        &self.gemvs[usize::from(n_rows > BATCH_TILE_ROWS)]
    }

    /// For a GEMV of `n_rows` rows.
    pub(super) fn gemv_launch(&self, gemv: &Gemv, n_rows: usize) -> Launch {
        let shared_bytes = gemv.shape.shared_bytes(n_rows);
        Launch { shared_bytes, ..self.launch([gemv.n_blocks, 1, 1], gemv.shape.warps as u32 * 32) }
    }

    /// `decode_attention_rope` for `n_seqs` sequences.
    pub(super) fn decode_attention_rope(&self, n_seqs: usize, contexts: Contexts) -> &Kernel {
        let cluster = self.cluster(n_seqs, contexts).map(|i| &self.decode_attention_clusters[i]);
        cluster.unwrap_or(&self.decode_attention_rope)
    }

    /// For [`Self::decode_attention_rope`].
    pub(super) fn decode_attention_rope_launch(&self, n_seqs: usize, contexts: Contexts) -> Launch {
        let mut launch = self.decode_attention_launch(n_seqs, contexts);
        if let Some(i) = self.cluster(n_seqs, contexts) {
            launch.grid[0] = DECODE_CLUSTERS[i].0 as u32;
        }
        launch
    }

    /// Which of [`DECODE_CLUSTERS`] joins the splits of `n_seqs` sequences, if one does.
    fn cluster(&self, n_seqs: usize, contexts: Contexts) -> Option<usize> {
        let fits = |&(_, max_seqs): &(usize, usize)| n_seqs <= max_seqs;
        let found = DECODE_CLUSTERS.iter().take(self.decode_attention_clusters.len()).position(fits);
        found.filter(|_| contexts == Contexts::Short)
    }

    /// For `decode_attention`.
    pub(super) fn decode_attention_launch(&self, n_seqs: usize, contexts: Contexts) -> Launch {
        let kv_tiles = kv_tiles(self.n_heads, self.n_kv);
        let grid = [self.splits(n_seqs, contexts).n as u32, kv_tiles as u32, n_seqs as u32];
        self.launch(grid, DECODE_WARPS as u32 * 32)
    }

    /// Fewest pages of a split, for both decode attentions.
    pub(super) fn min_pages(&self, n_seqs: usize, contexts: Contexts) -> i32 {
        self.splits(n_seqs, contexts).min_pages as i32
    }

    fn splits(&self, n_seqs: usize, contexts: Contexts) -> Splits {
        splits((n_seqs, contexts), kv_tiles(self.n_heads, self.n_kv), self.n_sms)
    }

    /// For `gather_rows` of the residual stream and the attention output.
    pub(super) fn gather_rows_launch(&self) -> Launch {
        let n_columns = self.hidden / 4 + self.n_heads * self.head_dim / 8;
        self.launch([n_columns.div_ceil(128) as u32, 1, 1], 128)
    }

    /// For `unpack_kv` of `n_pages` pages.
    pub(super) fn unpack_kv_launch(&self, n_pages: usize) -> Launch {
        self.launch([n_pages as u32, self.n_kv as u32, 1], ELEMENTWISE)
    }

    /// For `prefill_attention`, on Hopper on `n_sms` multiprocessors.
    pub(super) fn prefill_attention_launch(&self, n_tiles: usize, n_sms: usize) -> Launch {
        let shared_bytes = prefill_shared(self.head_dim, self.hopper);
        let launch = match self.hopper {
            // Persistent blocks share the tiles out.
            true => self.launch([(n_tiles * self.n_kv).min(n_sms) as u32, 1, 1], HOPPER_BLOCK),
            false => self.launch([self.n_kv as u32, n_tiles as u32, 1], 128),
        };
        Launch { shared_bytes, ..launch }
    }
}

/// Tiles of up to [`HEADS_PER_TILE`] query heads that share a kv head.
pub(super) fn kv_tiles(n_heads: usize, n_kv: usize) -> usize {
    n_kv * (n_heads / n_kv).div_ceil(HEADS_PER_TILE)
}

/// How decode attention cuts each context.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Splits {
    /// Parts of a context, at most.
    n: usize,
    /// Pages of a part, at least.
    min_pages: usize,
}

/// How long a step's longest context is: decides how decode attention cuts them all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Contexts {
    /// Up to [`Contexts::SHORT_BLOCKS`] pages.
    Short,
    /// Up to [`Contexts::MEDIUM_BLOCKS`] pages.
    Medium,
    /// Any.
    Long,
}

impl Contexts {
    /// Pages of the longest context that is short.
    pub(super) const SHORT_BLOCKS: usize = 32;
    /// Pages of the longest context that is medium.
    const MEDIUM_BLOCKS: usize = 80;
    /// All, in order.
    pub(super) const ALL: [Self; 3] = [Self::Short, Self::Medium, Self::Long];

    /// Of a step whose longest block table has `n_blocks` pages.
    pub(super) fn of(n_blocks: usize) -> Self {
        if n_blocks <= Self::SHORT_BLOCKS {
            Self::Short
        } else if n_blocks <= Self::MEDIUM_BLOCKS {
            Self::Medium
        } else {
            Self::Long
        }
    }
}

/// Enough parts to fill the device with few sequences; with many, only long contexts are cut, so that one of them
/// among short ones does not keep the others waiting, and without long ones there are no blocks that would find nothing
/// to do. The fastest of those timed on an H100 (docs/log.md).
fn splits((n_seqs, contexts): (usize, Contexts), kv_tiles: usize, n_sms: usize) -> Splits {
    let fill = (2 * n_sms / (n_seqs * kv_tiles)).clamp(4, 64);
    let of = |n: usize, min_pages: usize| Splits { n, min_pages };
    match (contexts, n_seqs) {
        (Contexts::Short, ..=8) => of(fill.min(8), DECODE_WARPS),
        (Contexts::Short, 9..=16) => of(8, 8),
        (Contexts::Short, _) => of(1, 1),
        (Contexts::Medium, ..=8) => of(8, DECODE_WARPS),
        (Contexts::Medium, 9..=16) => of(8, 8),
        (Contexts::Medium, 17..=64) => of(4, 16),
        (Contexts::Medium, _) => of(2, 32),
        (Contexts::Long, ..=2) => of(fill, DECODE_WARPS),
        (Contexts::Long, 3..=8) => of(16, 16),
        (Contexts::Long, 9..=32) => of(16, 64),
        (Contexts::Long, 33..=64) => of(8, 64),
        (Contexts::Long, _) => of(4, 32),
    }
}

/// Most splits of all sequences together, for batches to `max_seqs`.
pub(super) fn max_seq_splits(spec: &DecoderSpec, max_seqs: usize, n_sms: u32) -> usize {
    let kv_tiles = kv_tiles(spec.n_heads, spec.n_kv_heads);
    let n_splits = |n: usize| Contexts::ALL.map(|contexts| splits((n, contexts), kv_tiles, n_sms as usize).n);
    (1..=max_seqs).flat_map(|n| n_splits(n).map(|splits| n * splits)).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_device_and_no_more() {
        let n = |contexts| [1, 4, 8, 16, 256].map(|n| splits((n, contexts), 8, 132).n);
        assert_eq!(n(Contexts::Long), [33, 16, 16, 16, 4]);
        assert_eq!(n(Contexts::Short), [8, 8, 4, 8, 1]);
        assert_eq!(n(Contexts::Medium), [8, 8, 8, 8, 2]);
        let classes = [Contexts::Short, Contexts::Short, Contexts::Medium, Contexts::Medium, Contexts::Long];
        assert_eq!([1, 32, 33, 80, 81].map(Contexts::of), classes);
    }

    #[test]
    fn warps_share_long_rows_only() {
        let warps_k = |k| GemvShape::new((6144, k), 1, 227 << 10).warps_k;
        // 576 is 9 units of 64: four warps get up to three each, as many as their rings have stages; eight would not.
        assert_eq!([64, 576, 896, 4096, 4864, 14336].map(warps_k), [1, 4, 4, 16, 16, 16]);
    }

    #[test]
    fn small_matrices_get_deep_rings_where_they_fit() {
        let stages = |n_out, k, max_shared: u32| GemvShape::new((n_out, k), 1, max_shared << 10).n_stages;
        assert_eq!(stages(4096, 4096, 227), 12);
        assert_eq!([stages(4096, 4096, 99), stages(6144, 4096, 99), stages(4096, 14336, 227)], [3, 3, 3]);
        assert_eq!([stages(6144, 4096, 227), stages(6144, 2048, 227)], [5, 3]);
        assert_eq!(stages(896, 896, 227), 3);
    }
}
