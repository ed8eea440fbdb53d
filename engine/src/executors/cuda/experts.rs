//! [`Experts`]: the mixture of experts of a step on the device (`kernels/moe_route.cu`, `kernels/moe_gemm.cu`). Which
//! experts a token goes to is never known to the host: grids are for the most tiles that there can be, and blocks without
//! one leave.

use super::{
    compile::{self, Plan, Planned},
    device::Gpu,
    gemm::{Gemm, GemmOutput, GemmShape, Operands, padded_rows},
    kernel::{
        Arg::{Int, Ptr},
        Kernel, Launch,
    },
    load::ExpertWeights,
    memory::DeviceBuffer,
};
use crate::{
    Error,
    decoder::{DecoderSpec, Moe},
};

/// Most tokens that go through the experts at once: what they leave behind is `n_experts_per_token` times as long.
const MAX_TOKENS: usize = 4096;
/// Most experts that the kernels choose from, and choose.
const MAX_EXPERTS: usize = 1024;
const MAX_TOP_K: usize = 32;
/// Threads of a block of `moe_group`.
const GROUP_THREADS: u32 = 512;

/// How `moe_gemm` is cut. See the kernel's header.
#[derive(Debug, Clone, Copy)]
struct Tile {
    /// Rows of tokens.
    tokens: usize,
    /// Rows of weights.
    weights: usize,
    warps_t: usize,
    n_stages: usize,
    /// Largest mean number of an expert's tokens for which it is taken.
    max_mean: usize,
}

const WARPS_W: usize = 4;
const TILES: [Tile; 3] = [
    Tile { tokens: 8, weights: 64, warps_t: 1, n_stages: 6, max_mean: 8 },
    Tile { tokens: 32, weights: 64, warps_t: 1, n_stages: 5, max_mean: 48 },
    Tile { tokens: 128, weights: 128, warps_t: 2, n_stages: 3, max_mean: usize::MAX },
];

impl Tile {
    fn shared_bytes(self) -> u32 {
        (self.n_stages * (self.weights + self.tokens) * 128) as u32
    }

    /// Adds its kernel to `plan`.
    fn plan(self, plan: &mut Plan, moe: &Moe, (k, is_gated): (usize, bool)) -> Planned {
        let macros = [
            ("GATED", usize::from(is_gated)),
            ("K", k),
            ("TOP_K", moe.n_experts_per_token),
            ("TILE_T", self.tokens),
            ("TILE_W", self.weights),
            ("WARPS_W", WARPS_W),
            ("WARPS_T", self.warps_t),
            ("STAGES", self.n_stages),
        ];
        plan.add(&compile::MOE_GEMM, &macros)
    }

    fn launch(self, n_out: usize, (is_gated, n_tiles): (bool, usize), dependent: bool) -> Launch {
        let columns = if is_gated { self.weights / 2 } else { self.weights };
        Launch {
            grid: [n_out.div_ceil(columns) as u32, n_tiles as u32, 1],
            block: (WARPS_W * self.warps_t * 32) as u32,
            shared_bytes: self.shared_bytes(),
            dependent,
        }
    }
}

/// Rows of the router's weights: a multiple that its product is fast for. Those past the experts' (and the shared
/// expert's) are zero.
pub(super) fn router_rows(moe: &Moe) -> usize {
    (moe.n_experts + usize::from(moe.shared_intermediate_size.is_some())).next_multiple_of(16)
}

/// Refuses what the kernels cannot do.
///
/// # Errors
/// What they need.
pub(super) fn check(moe: &Moe) -> Result<(), String> {
    if !moe.dense_layers.is_empty() {
        return Err("needs experts in all layers or none".into());
    }
    if moe.n_experts > MAX_EXPERTS || moe.n_experts_per_token > MAX_TOP_K {
        return Err(format!("has kernels for up to {MAX_TOP_K} of {MAX_EXPERTS} experts"));
    }
    let sizes = [moe.intermediate_size, moe.shared_intermediate_size.unwrap_or(0)];
    if !sizes.iter().all(|size| size.is_multiple_of(8)) {
        return Err("needs widths of the experts that are multiples of 8".into());
    }
    Ok(())
}

/// The kernels, before there is anything to run them on.
pub(super) struct ExpertKernels {
    moe: Moe,
    route: Kernel,
    group: Kernel,
    combine: Kernel,
    /// For each of [`TILES`].
    gate_up: Vec<Kernel>,
    down: Vec<Kernel>,
}

impl ExpertKernels {
    /// Compiles (or takes from the cache) and loads them; `None` if `spec` has no experts.
    pub(super) fn new(gpu: &Gpu, spec: &DecoderSpec) -> Result<Option<Self>, Error> {
        let Some(moe) = &spec.moe else {
            return Ok(None);
        };
        let macros = [
            ("EXPERTS", moe.n_experts),
            ("TOP_K", moe.n_experts_per_token),
            ("STRIDE", router_rows(moe)),
            ("SHARED", usize::from(moe.shared_intermediate_size.is_some())),
            ("NORM", usize::from(moe.norm_topk_prob)),
        ];
        let mut plan = Plan::default();
        let route = plan.add(&compile::MOE_ROUTE, &macros);
        let gate_up = TILES.map(|tile| tile.plan(&mut plan, moe, (spec.hidden_size, true)));
        let down = TILES.map(|tile| tile.plan(&mut plan, moe, (moe.intermediate_size, false)));

        let compiled = plan.compile(gpu)?;
        let [route, group, combine] = compiled.load(route, ["moe_route", "moe_group", "moe_combine"])?;
        let gemm = |(planned, tile): (Planned, Tile)| -> Result<Kernel, Error> {
            let [kernel] = compiled.load(planned, ["moe_gemm"])?;
            kernel.allow_shared(tile.shared_bytes())?;
            Ok(kernel)
        };
        let gate_up = gate_up.into_iter().zip(TILES).map(gemm).collect::<Result<_, _>>()?;
        let down = down.into_iter().zip(TILES).map(gemm).collect::<Result<_, _>>()?;
        Ok(Some(Self { moe: moe.clone(), route, group, combine, gate_up, down }))
    }
}

/// What the experts read and add to.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertRows {
    /// Their input, bf16 `[n, hidden]`, with rows to [`padded_rows`].
    pub(super) h: u64,
    /// The residual stream, float32 `[n, hidden]`.
    pub(super) x: u64,
    /// int32 `[n]`: negative for padding.
    pub(super) slots: u64,
    /// Activations of the shared expert, bf16 `[n, width]`, to be scaled by its share; 0 if there is none.
    pub(super) act: u64,
    /// Tokens.
    pub(super) n: usize,
}

/// The experts of a model's layers: kernels and what they compute with.
pub(super) struct Experts {
    kernels: ExpertKernels,
    hidden: usize,
    dependent: bool,
    /// float32 `[T, router_rows]`.
    logits: DeviceBuffer,
    /// int32 `[T, top_k]` each: experts of a token, `routes` ordered by expert, places of a token's in them.
    chosen: DeviceBuffer,
    routes: DeviceBuffer,
    places: DeviceBuffer,
    /// float32 `[T, top_k]`.
    weights: DeviceBuffer,
    /// float32 `[T]`.
    share: DeviceBuffer,
    /// int4 `[most tiles]`.
    tiles: DeviceBuffer,
    n_tiles: DeviceBuffer,
    /// bf16 `[T * top_k, intermediate_size]`.
    act: DeviceBuffer,
    /// bf16 `[T * top_k, hidden]`.
    out: DeviceBuffer,
}

impl Experts {
    /// For steps of up to `max_tokens` rows.
    pub(super) fn new(gpu: &Gpu, kernels: ExpertKernels, spec: &DecoderSpec, max_tokens: usize) -> Result<Self, Error> {
        let moe = &kernels.moe;
        let n = padded_rows(max_tokens.min(MAX_TOKENS));
        let n_routes = n * moe.n_experts_per_token;
        let buffer = |n_bytes: usize, what: &str| DeviceBuffer::zeroed(gpu, n_bytes, what);
        let most_tiles = TILES.map(|tile| most_tiles(moe, n_routes, tile)).into_iter().max().unwrap_or(0);
        Ok(Self {
            hidden: spec.hidden_size,
            dependent: gpu.capability.0 >= 9,
            logits: buffer(n * router_rows(moe) * 4, "the router's logits")?,
            chosen: buffer(n_routes * 4, "the tokens' experts")?,
            routes: buffer(n_routes * 4, "the tokens' experts")?,
            places: buffer(n_routes * 4, "the tokens' experts")?,
            weights: buffer(n_routes * 4, "the experts' weights")?,
            share: buffer(n * 4, "the shared expert's share")?,
            tiles: buffer(most_tiles * 16, "the experts' tiles")?,
            n_tiles: buffer(4, "the experts' tiles")?,
            act: buffer(n_routes * moe.intermediate_size * 2, "the experts' activations")?,
            out: buffer(n_routes * spec.hidden_size * 2, "the experts' outputs")?,
            kernels,
        })
    }

    /// Adds the outputs of the experts of each of `rows` to the residual stream, and scales the shared expert's
    /// activations.
    pub(super) fn run(&self, gpu: &Gpu, gemm: &mut Gemm, w: &ExpertWeights, rows: ExpertRows) -> Result<(), Error> {
        let width = self.kernels.moe.shared_intermediate_size.unwrap_or(0);
        for start in (0..rows.n).step_by(MAX_TOKENS) {
            let at = |address: u64, row_bytes: usize| address + (start * row_bytes) as u64;
            let part = ExpertRows {
                h: at(rows.h, self.hidden * 2),
                x: at(rows.x, self.hidden * 4),
                slots: at(rows.slots, 4),
                act: if rows.act == 0 { 0 } else { at(rows.act, width * 2) },
                n: MAX_TOKENS.min(rows.n - start),
            };
            self.run_part(gpu, gemm, w, part)?;
        }
        Ok(())
    }

    fn run_part(&self, gpu: &Gpu, gemm: &mut Gemm, w: &ExpertWeights, rows: ExpertRows) -> Result<(), Error> {
        let (moe, stream, n) = (&self.kernels.moe, gpu.cu_stream(), rows.n);
        let n_routes = n * moe.n_experts_per_token;
        let launch = |blocks: usize, block: u32| Launch {
            grid: [blocks as u32, 1, 1],
            block,
            shared_bytes: 0,
            dependent: self.dependent,
        };
        let router = GemmShape { m: padded_rows(n), n: router_rows(moe), k: self.hidden, output: GemmOutput::F32 };
        gemm.run(gpu, router, Operands { x: rows.h, w: w.router.ptr(), y: self.logits.ptr() })?;
        let route_args = [
            Ptr(self.logits.ptr()),
            Ptr(rows.slots),
            Ptr(self.chosen.ptr()),
            Ptr(self.weights.ptr()),
            Ptr(self.share.ptr()),
            Int(n as i32),
        ];
        self.kernels.route.launch(stream, launch(n.div_ceil(4), 128), &route_args)?;

        let (index, tile) = tile_for(moe, n_routes);
        let group_args = [
            Ptr(self.chosen.ptr()),
            Ptr(self.routes.ptr()),
            Ptr(self.places.ptr()),
            Ptr(self.tiles.ptr()),
            Ptr(self.n_tiles.ptr()),
            Int(n_routes as i32),
            Int(tile.tokens as i32),
        ];
        self.kernels.group.launch(stream, launch(moe.n_experts, GROUP_THREADS), &group_args)?;

        let n_tiles = most_tiles(moe, n_routes, tile);
        let product = |kernel: &Kernel, (x, w, out): (u64, u64, u64), (n_out, is_gated): (usize, bool)| {
            let args = [
                Ptr(x),
                Ptr(w),
                Ptr(out),
                Ptr(self.tiles.ptr()),
                Ptr(self.n_tiles.ptr()),
                Ptr(self.routes.ptr()),
                Ptr(self.weights.ptr()),
                Int(n_out as i32),
            ];
            kernel.launch(stream, tile.launch(n_out, (is_gated, n_tiles), self.dependent), &args)
        };
        let (act, out) = (self.act.ptr(), self.out.ptr());
        product(&self.kernels.gate_up[index], (rows.h, w.gate_up.ptr(), act), (moe.intermediate_size, true))?;
        product(&self.kernels.down[index], (act, w.down.ptr(), out), (self.hidden, false))?;

        let combine_args = [
            Ptr(out),
            Ptr(self.places.ptr()),
            Ptr(rows.slots),
            Ptr(rows.x),
            Int(self.hidden as i32),
            Ptr(rows.act),
            Ptr(self.share.ptr()),
            Int(moe.shared_intermediate_size.unwrap_or(0) as i32),
        ];
        self.kernels.combine.launch(stream, launch(n, 256), &combine_args)
    }
}

/// Experts that `n_routes` routes can go to.
fn most_experts(moe: &Moe, n_routes: usize) -> usize {
    moe.n_experts.min(n_routes)
}

/// The tile for `n_routes` routes, and its index in [`TILES`].
fn tile_for(moe: &Moe, n_routes: usize) -> (usize, Tile) {
    let mean = n_routes.div_ceil(most_experts(moe, n_routes).max(1));
    let index = TILES.iter().position(|tile| mean <= tile.max_mean).unwrap_or(TILES.len() - 1);
    (index, TILES[index])
}

/// Most tiles of `n_routes` routes: each expert's last one may be short.
fn most_tiles(moe: &Moe, n_routes: usize, tile: Tile) -> usize {
    most_experts(moe, n_routes) + n_routes / tile.tokens
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moe() -> Moe {
        Moe {
            n_experts: 60,
            n_experts_per_token: 4,
            intermediate_size: 1408,
            shared_intermediate_size: Some(5632),
            norm_topk_prob: false,
            dense_layers: vec![],
        }
    }

    #[test]
    fn tiles_follow_the_number_of_an_experts_tokens() {
        let tokens = |n_tokens: usize| tile_for(&moe(), n_tokens * 4).1.tokens;
        assert_eq!([1, 32, 128, 720, 4096].map(tokens), [8, 8, 32, 32, 128]);
        assert_eq!(router_rows(&moe()), 64);
    }

    #[test]
    fn there_is_a_tile_for_every_route() {
        let moe = moe();
        for n_routes in [4, 8, 100, 4000, 16_384] {
            for tile in TILES {
                // All to one expert; spread as evenly as can be; one each, and the rest to one.
                let experts = moe.n_experts.min(n_routes);
                let even: usize = (0..experts)
                    .map(|e| (n_routes / experts + usize::from(e < n_routes % experts)).div_ceil(tile.tokens))
                    .sum();
                let most = most_tiles(&moe, n_routes, tile);
                let skewed = experts - 1 + (n_routes - (experts - 1)).div_ceil(tile.tokens);
                assert!(n_routes.div_ceil(tile.tokens) <= most && even <= most && skewed <= most);
            }
        }
        assert!(TILES.iter().all(|tile| tile.shared_bytes() <= 99 << 10));
    }
}
