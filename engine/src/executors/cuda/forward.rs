//! [`Forward`]: the launches of one step, from token ids to logits.
//!
//! Steps take norms, products and attention apart. On Hopper products stream their weights, which are packed; elsewhere, and
//! of matrices that cannot be packed, they are cuBLASLt's, and steps of a few decoding sequences read bf16 weights through
//! GEMV kernels that do the norms and activations on the way (not those of models with experts).

use std::ops::Range;

use cudarc::driver::sys;

use super::{
    attention_work::ROW_PAGES,
    buffers::{KvCache, StepBuffers, page_bytes},
    device::Gpu,
    experts::{ExpertRows, Experts},
    gemm::{Gemm, GemmOutput, GemmShape, Operands, padded_rows},
    inputs::{Layout, StepShape, TokenSections},
    kernel::{
        Arg::{self, Float, Int, Long, Ptr},
        Launch,
    },
    load::{LayerWeights, Weights},
    long_attention::LongAttention,
    memory::DeviceBuffer,
    ops::{Contexts, Gemv, Ops},
    packed_weights::MatrixAt,
    product::Product,
    prompt_contexts::{KEYS, PromptContexts, PromptGroup, VALUES},
    side_stream::{SideStream, decode_share},
    stream_gemm::StreamGemm,
};
use crate::{Error, decoder::DecoderSpec, step::PAGE_SIZE};

/// All that a step needs but its inputs.
pub(super) struct Forward {
    pub(super) spec: DecoderSpec,
    pub(super) ops: Ops,
    pub(super) gemm: Gemm,
    /// On Hopper.
    pub(super) stream_gemm: Option<StreamGemm>,
    /// On Hopper.
    pub(super) long_attention: Option<LongAttention>,
    /// For decode attention beside prefill attention.
    pub(super) side: SideStream,
    /// Of models that have them.
    pub(super) experts: Option<Experts>,
    pub(super) weights: Weights,
    /// Whether any of [`Self::weights`] has 12 bits: the GEMVs read bf16.
    pub(super) packed: bool,
    pub(super) buffers: StepBuffers,
    pub(super) layout: Layout,
    /// float32 `[max_position, head_dim]`: cosines, then sines.
    pub(super) cos_sin: DeviceBuffer,
    /// What prefill attention reads.
    pub(super) contexts: PromptContexts,
    /// Set once the memory plan is made; before, nothing reads or writes the cache.
    pub(super) kv: KvCache,
    /// Pages of a row of the block tables.
    pub(super) max_blocks: usize,
    pub(super) pending: Pending,
}

/// What the launches so far have left to be added to the residual stream: float32 `[parts, rows, hidden]` in
/// [`StepBuffers::parts`].
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pending {
    parts: usize,
    rows: usize,
}

/// Rows of a step, by the kernel that attends them.
#[derive(Debug, Clone, Copy)]
struct Rows<'a> {
    /// Query rows.
    n_tokens: usize,
    /// Leading rows that are one sequence each.
    n_decode: usize,
    /// The other ones.
    groups: &'a [PromptGroup],
    /// Only rows that are sampled are wanted.
    sampled_only: bool,
    /// Of the leading rows.
    contexts: Contexts,
    /// Blocks of [`LongAttention`].
    decode_blocks: usize,
}

impl Forward {
    /// A decode step of `bucket` sequences, logits included. Its launches depend on the arguments alone, so it can be
    /// captured.
    pub(super) fn decode(&mut self, gpu: &Gpu, bucket: usize, contexts: Contexts) -> Result<(), Error> {
        let tokens = self.layout.decode;
        let decode_blocks = gpu.n_sms as usize;
        let rows =
            Rows { n_tokens: bucket, n_decode: bucket, groups: &[], sampled_only: false, contexts, decode_blocks };
        self.embed(gpu, tokens, bucket)?;
        if !self.uses_gemv(bucket) {
            for layer in 0..self.spec.n_layers {
                self.gemm_layer(gpu, layer, rows, tokens)?;
            }
            return self.logits(gpu, 0, bucket);
        }
        for layer in 0..self.spec.n_layers {
            self.gemv_layer(gpu, layer, rows)?;
        }
        let s = &self.spec;
        let args = [
            Ptr(self.buffers.x.ptr()),
            Ptr(self.weights.final_norm.ptr()),
            Float(s.norm_eps),
            Ptr(self.raw((Product::Logits, 0))?),
            Ptr(self.buffers.logits.ptr()),
            Int(s.vocab_size as i32),
            Ptr(0),
            Int(bucket as i32),
        ];
        let gemv = &self.ops.gemvs(bucket).logits;
        gemv.kernel.launch(gpu.cu_stream(), self.ops.gemv_launch(gemv, bucket), &args)
    }

    /// Whether a decode step of `bucket` sequences runs through GEMV kernels.
    pub(super) fn uses_gemv(&self, bucket: usize) -> bool {
        self.experts.is_none() && !self.packed && bucket <= self.ops.max_gemv_rows()
    }

    /// Whether layers have an MLP, be it a shared expert.
    pub(super) fn has_mlp(&self) -> bool {
        self.spec.moe.as_ref().is_none_or(|moe| moe.shared_intermediate_size.is_some())
    }

    /// Any step, without its logits: all rows of the residual stream.
    pub(super) fn chunks(&mut self, gpu: &Gpu, shape: &StepShape) -> Result<(), Error> {
        self.chunk_layers(gpu, shape, 0..self.spec.n_layers)
    }

    /// Any step, with the logits of the rows to sample.
    pub(super) fn sampled_chunks(&mut self, gpu: &Gpu, shape: &StepShape) -> Result<(), Error> {
        let rows = self.input(self.layout.sample_rows);
        if self.experts.is_some() || !shape.samples_few() {
            self.chunks(gpu, shape)?;
            return self.logits(gpu, rows, shape.n_samples);
        }
        // Of the rows that are not sampled the last layer leaves nothing but keys and values.
        let (n, last) = (shape.n_samples, self.spec.n_layers - 1);
        self.chunk_layers(gpu, shape, 0..last)?;
        self.attend(gpu, last, Rows { sampled_only: true, ..self.chunk_rows(shape) }, self.layout.chunk)?;
        if n == 0 {
            return Ok(());
        }
        let (x, attn_out) = (self.buffers.x.ptr(), self.buffers.attn_out.ptr());
        let (hidden, width) = (self.spec.hidden_size as i32, (self.spec.n_heads * self.spec.head_dim) as i32);
        let args = [Ptr(rows), Int(n as i32), Ptr(x), Int(hidden), Ptr(attn_out), Int(width)];
        self.ops.gather_rows.launch(gpu.cu_stream(), self.ops.gather_rows_launch(), &args)?;
        self.after_attention(gpu, last, self.layout.chunk, n)?;
        self.logits(gpu, 0, n)
    }

    fn chunk_rows<'a>(&self, shape: &'a StepShape) -> Rows<'a> {
        let &StepShape { n_tokens, n_decode, decode_blocks, .. } = shape;
        let contexts = Contexts::of(shape.n_blocks);
        Rows { n_tokens, n_decode, groups: &shape.groups, sampled_only: false, contexts, decode_blocks }
    }

    fn chunk_layers(&mut self, gpu: &Gpu, shape: &StepShape, layers: Range<usize>) -> Result<(), Error> {
        let (tokens, rows) = (self.layout.chunk, self.chunk_rows(shape));
        self.embed(gpu, tokens, rows.n_tokens)?;
        layers.into_iter().try_for_each(|layer| self.gemm_layer(gpu, layer, rows, tokens))
    }

    /// Logits of `n` rows of the residual stream, whose numbers are at address `rows` (0: the first `n`).
    pub(super) fn logits(&mut self, gpu: &Gpu, rows: u64, n: usize) -> Result<(), Error> {
        if n == 0 {
            return Ok(());
        }
        self.norm(gpu, self.weights.final_norm.ptr(), rows, n)?;
        self.product(gpu, (Product::Logits, 0), n)
    }

    /// The final norm of the first `n` rows, in [`StepBuffers::h`].
    pub(super) fn final_norm(&mut self, gpu: &Gpu, n: usize) -> Result<(), Error> {
        self.norm(gpu, self.weights.final_norm.ptr(), 0, n)
    }

    /// Whether a product, with its layer, is one for [`StreamGemm`].
    pub(super) fn streams(&self, product: (Product, usize), n: usize) -> bool {
        self.stream_gemm.as_ref().is_some_and(|stream_gemm| stream_gemm.shape(product, n).is_some())
    }

    /// The bf16 weights of a product that [`StreamGemm`] does not take.
    pub(super) fn raw(&self, product: (Product, usize)) -> Result<u64, Error> {
        match self.weights.matrix(product) {
            MatrixAt::Raw(w) => Ok(w),
            MatrixAt::Packed { .. } => Err(Error::Device(format!("no kernel for packed weights of {product:?}"))),
        }
    }

    /// `product` for `n` rows in cuBLASLt.
    pub(super) fn gemm_shape(&self, product: Product, n: usize) -> GemmShape {
        let (n_out, k) = product.size(&self.spec);
        let output = match product {
            Product::Qkv | Product::GateUp => GemmOutput::Bf16,
            Product::O | Product::Down => GemmOutput::AddF32,
            Product::Logits => GemmOutput::F32,
        };
        GemmShape { m: padded_rows(n), n: n_out, k, output }
    }

    /// Address of an input array.
    pub(super) fn input(&self, section: super::inputs::Section) -> u64 {
        self.buffers.inputs.ptr() + section.offset()
    }

    fn embed(&mut self, gpu: &Gpu, tokens: TokenSections, n: usize) -> Result<(), Error> {
        self.pending = Pending::default();
        let args = [
            Ptr(self.input(tokens.token_ids)),
            Ptr(self.buffers.last_tokens.ptr()),
            Ptr(self.weights.embedding.ptr()),
            Ptr(self.buffers.x.ptr()),
            Int(self.spec.hidden_size as i32),
        ];
        self.ops.embed.launch(gpu.cu_stream(), self.ops.embed_launch(n), &args)
    }

    /// Adds what is pending to the residual stream and normalises it to `h`. With `rows`, only theirs, and the stream
    /// stays as it is.
    fn norm(&mut self, gpu: &Gpu, weight: u64, rows: u64, n: usize) -> Result<(), Error> {
        let Pending { parts, rows: pending_rows } = self.pending;
        let x = self.buffers.x.ptr();
        let hidden = self.spec.hidden_size;
        let is_whole = rows == 0;
        let args = [
            Ptr(x),
            Ptr(self.buffers.parts.ptr()),
            Int(parts as i32),
            Long((pending_rows * hidden) as u64),
            Ptr(if is_whole && parts > 0 { x } else { 0 }),
            Ptr(weight),
            Ptr(self.buffers.h.ptr()),
            Int(hidden as i32),
            Float(self.spec.norm_eps),
            Ptr(rows),
        ];
        if is_whole {
            self.pending = Pending::default();
        }
        let kernel = if parts > 0 { &self.ops.rmsnorm } else { &self.ops.rmsnorm_whole };
        kernel.launch(gpu.cu_stream(), self.ops.rmsnorm_launch(n), &args)
    }

    /// A product of `n` rows, from buffer to buffer.
    fn product(&mut self, gpu: &Gpu, (product, layer): (Product, usize), n: usize) -> Result<(), Error> {
        let b = &self.buffers;
        let (x, h, act) = (b.x.ptr(), b.h.ptr(), b.act.ptr());
        if let Some(stream_gemm) = &self.stream_gemm
            && let Some(shape) = stream_gemm.shape((product, layer), n)
        {
            let out = match product {
                Product::Qkv => b.qkv.ptr(),
                Product::O | Product::Down if shape.adds() => x,
                Product::O | Product::Down => b.parts.ptr(),
                Product::GateUp => act,
                Product::Logits => b.logits.ptr(),
            };
            let parts = stream_gemm.run(gpu, (product, layer), (shape, n), out)?;
            if matches!(product, Product::O | Product::Down) && !shape.adds() {
                self.pending = Pending { parts, rows: n };
            }
            return Ok(());
        }
        let (x, y) = match product {
            Product::Qkv => (h, b.qkv.ptr()),
            Product::O => (b.attn_out.ptr(), x),
            Product::GateUp => (h, b.gate_up.ptr()),
            Product::Down => (act, x),
            Product::Logits => (h, b.logits.ptr()),
        };
        let w = self.raw((product, layer))?;
        self.gemm.run(gpu, self.gemm_shape(product, n), Operands { x, w, y })?;
        if product != Product::GateUp {
            return Ok(());
        }
        let inter = self.spec.intermediate_size;
        let args = [Ptr(self.buffers.gate_up.ptr()), Ptr(act), Int(n as i32), Int(inter as i32)];
        self.ops.silu_mul.launch(gpu.cu_stream(), self.ops.silu_mul_launch(n, inter), &args)
    }

    fn gemm_layer(&mut self, gpu: &Gpu, layer: usize, rows: Rows<'_>, tokens: TokenSections) -> Result<(), Error> {
        self.attend(gpu, layer, rows, tokens)?;
        self.after_attention(gpu, layer, tokens, rows.n_tokens)
    }

    /// A layer from the residual stream to the attention output.
    fn attend(&mut self, gpu: &Gpu, layer: usize, rows: Rows<'_>, tokens: TokenSections) -> Result<(), Error> {
        let n = rows.n_tokens;
        self.norm(gpu, self.weights.layers[layer].input_norm.ptr(), 0, n)?;
        self.product(gpu, (Product::Qkv, layer), n)?;
        if rows.n_decode == n && !self.spec.qk_norm {
            self.decode_attention_rope(gpu.cu_stream(), layer, rows)
        } else if rows.n_decode > 0 && !rows.groups.is_empty() && !self.spec.qk_norm {
            let stream = self.side.fork(gpu)?;
            self.decode_attention_rope(stream, layer, rows)?;
            self.rope_kv(gpu, layer, tokens, rows.n_decode..n)?;
            let n_sms = match self.long_attention_of(rows.contexts) {
                Some(_) => gpu.n_sms as usize - rows.decode_blocks,
                None => gpu.n_sms as usize,
            };
            self.prefill_attention(gpu, layer, rows, n_sms)?;
            self.side.join(gpu)
        } else {
            self.rope_kv(gpu, layer, tokens, 0..n)?;
            self.decode_attention(gpu, layer, rows)?;
            self.prefill_attention(gpu, layer, rows, gpu.n_sms as usize)
        }
    }

    /// The rest of a layer, for the first `n` rows.
    fn after_attention(&mut self, gpu: &Gpu, layer: usize, tokens: TokenSections, n: usize) -> Result<(), Error> {
        self.product(gpu, (Product::O, layer), n)?;
        self.norm(gpu, self.weights.layers[layer].post_attention_norm.ptr(), 0, n)?;
        if self.has_mlp() {
            self.product(gpu, (Product::GateUp, layer), n)?;
        }
        self.run_experts(gpu, layer, tokens, n)?;
        match self.has_mlp() {
            true => self.product(gpu, (Product::Down, layer), n),
            false => Ok(()),
        }
    }

    /// Adds the experts' outputs for `n` rows, if the model has experts, and scales the shared expert's activations.
    fn run_experts(&mut self, gpu: &Gpu, layer: usize, tokens: TokenSections, n: usize) -> Result<(), Error> {
        let rows = ExpertRows {
            h: self.buffers.h.ptr(),
            x: self.buffers.x.ptr(),
            slots: self.input(tokens.slot_mapping),
            act: if self.has_mlp() { self.buffers.act.ptr() } else { 0 },
            n,
        };
        match (&self.experts, &self.weights.layers[layer].experts) {
            (Some(experts), Some(weights)) => experts.run(gpu, &mut self.gemm, weights, rows),
            _ => Ok(()),
        }
    }

    fn gemv_layer(&self, gpu: &Gpu, layer: usize, rows: Rows<'_>) -> Result<(), Error> {
        let (s, ops, b) = (&self.spec, &self.ops, &self.buffers);
        let w = &self.weights.layers[layer];
        let n = rows.n_tokens;
        let n_qkv = (s.n_heads + 2 * s.n_kv_heads) * s.head_dim;
        let run = |gemv: &Gemv, args: &[Arg]| gemv.kernel.launch(gpu.cu_stream(), ops.gemv_launch(gemv, n), args);
        let gemvs = ops.gemvs(n);
        let (x, n_rows) = (Ptr(b.x.ptr()), Int(n as i32));
        // The bias is added where q and k are rotated.
        let qkv_args = [
            x,
            Ptr(w.input_norm.ptr()),
            Float(s.norm_eps),
            Ptr(self.raw((Product::Qkv, layer))?),
            Ptr(0),
            Ptr(b.qkv.ptr()),
            Int(n_qkv as i32),
            n_rows,
        ];
        run(&gemvs.qkv, &qkv_args)?;
        if s.qk_norm {
            self.rope_kv(gpu, layer, self.layout.decode, 0..n)?;
            self.decode_attention(gpu, layer, rows)?;
        } else {
            self.decode_attention_rope(gpu.cu_stream(), layer, rows)?;
        }
        let hidden = Int(s.hidden_size as i32);
        run(&gemvs.o, &[Ptr(b.attn_out.ptr()), Ptr(self.raw((Product::O, layer))?), x, hidden, n_rows])?;
        let gate_up_args = [
            x,
            Ptr(w.post_attention_norm.ptr()),
            Float(s.norm_eps),
            Ptr(self.raw((Product::GateUp, layer))?),
            Ptr(b.act.ptr()),
            Int(s.intermediate_size as i32),
            n_rows,
        ];
        run(&gemvs.gate_up, &gate_up_args)?;
        run(&gemvs.down, &[Ptr(b.act.ptr()), Ptr(self.raw((Product::Down, layer))?), x, hidden, n_rows])
    }

    fn rope_kv(&self, gpu: &Gpu, layer: usize, tokens: TokenSections, rows: Range<usize>) -> Result<(), Error> {
        let (first, n) = (rows.start as u64, rows.len());
        let row_bytes = 2 * (self.spec.n_heads + 2 * self.spec.n_kv_heads) * self.spec.head_dim;
        // Before the memory plan there is no cache, and no slot to write to.
        let cache = self.kv.layers.get(layer).map_or(0, DeviceBuffer::ptr);
        let w: &LayerWeights = &self.weights.layers[layer];
        let (q_norm, k_norm) = w.qk_norms();
        let args = [
            Ptr(self.buffers.qkv.ptr() + first * row_bytes as u64),
            Ptr(w.qkv_bias()),
            Ptr(self.cos_sin.ptr()),
            Ptr(self.input(tokens.positions) + first * 4),
            Ptr(self.input(tokens.slot_mapping) + first * 4),
            Ptr(cache),
            Int(n as i32),
            Int(self.spec.n_heads as i32),
            Int(self.spec.n_kv_heads as i32),
            Ptr(q_norm),
            Ptr(k_norm),
            Float(self.spec.norm_eps),
        ];
        self.ops.rope_kv.launch(gpu.cu_stream(), self.ops.rope_kv_launch(n), &args)
    }

    fn decode_attention_rope(&self, stream: sys::CUstream, layer: usize, rows: Rows<'_>) -> Result<(), Error> {
        // Beside prefill attention nothing of its own stream is ahead.
        let on_stream = |launch: Launch| Launch { dependent: launch.dependent && rows.groups.is_empty(), ..launch };
        if let Some(attention) = self.long_attention_of(rows.contexts) {
            let launch = on_stream(attention.launch(rows.n_decode, rows.decode_blocks));
            return attention.kernel().launch(stream, launch, &self.long_attention_args(layer, rows));
        }
        let args: Vec<_> = self.rope_args(layer).into_iter().chain(self.cache_args(layer, rows)).collect();
        let kernel = self.ops.decode_attention_rope(rows.n_decode, rows.contexts);
        let launch = on_stream(self.ops.decode_attention_rope_launch(rows.n_decode, rows.contexts));
        kernel.launch(stream, launch, &args)
    }

    /// The kernel for long contexts, if these are.
    fn long_attention_of(&self, contexts: Contexts) -> Option<&LongAttention> {
        self.long_attention.as_ref().filter(|_| LongAttention::takes(contexts) && !self.spec.qk_norm)
    }

    /// Multiprocessors for decode attention of a step of `shape`.
    pub(super) fn decode_blocks(&self, gpu: &Gpu, shape: &StepShape) -> usize {
        let n_sms = gpu.n_sms as usize;
        let is_beside = !shape.groups.is_empty() && shape.n_decode > 0;
        if !is_beside || self.long_attention_of(Contexts::of(shape.n_blocks)).is_none() {
            return n_sms;
        }
        let n_pages = shape.n_decode_context / PAGE_SIZE + shape.n_decode * ROW_PAGES;
        let bytes = n_pages * page_bytes(&self.spec);
        let flop = shape.n_chunk_pairs * 4 * self.spec.n_heads * self.spec.head_dim;
        decode_share(n_sms, bytes as f64, flop as f64)
    }

    fn long_attention_args(&self, layer: usize, rows: Rows<'_>) -> Vec<Arg> {
        let mut args = self.rope_args(layer).to_vec();
        args.extend(self.attention_buffers(layer));
        args.extend([
            Ptr(self.input(self.layout.unit_starts)),
            Ptr(self.input(self.layout.block_starts)),
            Int(rows.n_decode as i32),
            Int(self.spec.n_kv_heads as i32),
            Int(self.max_blocks as i32),
            Int(self.window()),
            Float(self.scale()),
        ]);
        args
    }

    fn decode_attention(&self, gpu: &Gpu, layer: usize, rows: Rows<'_>) -> Result<(), Error> {
        if rows.n_decode == 0 {
            return Ok(());
        }
        let mut args = vec![Ptr(self.buffers.qkv.ptr())];
        args.extend(self.cache_args(layer, rows));
        let kernel = &self.ops.decode_attention;
        kernel.launch(gpu.cu_stream(), self.ops.decode_attention_launch(rows.n_decode, rows.contexts), &args)
    }

    /// The arguments that attentions which rotate begin with.
    fn rope_args(&self, layer: usize) -> [Arg; 3] {
        [Ptr(self.buffers.qkv.ptr()), Ptr(self.weights.layers[layer].qkv_bias()), Ptr(self.cos_sin.ptr())]
    }

    /// What every decode attention reads and writes beside q, k and v.
    fn attention_buffers(&self, layer: usize) -> [Arg; 7] {
        let b = &self.buffers;
        [
            Ptr(b.block_tables.ptr()),
            Ptr(self.input(self.layout.context_lens)),
            Ptr(self.kv.layers[layer].ptr()),
            Ptr(b.attn_out.ptr()),
            Ptr(b.partial_out.ptr()),
            Ptr(b.partial_max_sum.ptr()),
            Ptr(b.counters.ptr()),
        ]
    }

    /// The arguments that decode_attention.cu's kernels end with.
    fn cache_args(&self, layer: usize, rows: Rows<'_>) -> impl Iterator<Item = Arg> {
        let cut = [
            Int(self.max_blocks as i32),
            Int(self.window()),
            Int(self.ops.min_pages(rows.n_decode, rows.contexts)),
            Float(self.scale()),
        ];
        self.attention_buffers(layer).into_iter().chain(cut)
    }

    /// Unpacks the contexts of prompts and attends them, group by group; on Hopper on `n_sms` multiprocessors.
    fn prefill_attention(&self, gpu: &Gpu, layer: usize, rows: Rows<'_>, n_sms: usize) -> Result<(), Error> {
        let sampled_only = rows.sampled_only;
        let mut tiles = self.input(if sampled_only { self.layout.sampled_tiles } else { self.layout.tiles });
        for group in rows.groups {
            let n_tiles = if sampled_only { group.n_sampled_tiles } else { group.n_tiles };
            if n_tiles == 0 {
                continue;
            }
            self.unpack_kv(gpu, layer, group)?;
            let launch = self.ops.prefill_attention_launch(n_tiles, n_sms);
            self.ops.prefill_attention.launch(gpu.cu_stream(), launch, &self.prefill_args(tiles, n_tiles))?;
            tiles += 8 * n_tiles as u64;
        }
        Ok(())
    }

    fn unpack_kv(&self, gpu: &Gpu, layer: usize, group: &PromptGroup) -> Result<(), Error> {
        let args = [
            Ptr(self.kv.layers[layer].ptr()),
            Ptr(self.buffers.block_tables.ptr()),
            Int(self.max_blocks as i32),
            Ptr(self.input(self.layout.context_lens)),
            Ptr(self.input(self.layout.cu_seqlens)),
            Ptr(self.input(self.layout.context_starts)),
            Ptr(self.contexts.keys.ptr()),
            Ptr(self.contexts.values.ptr()),
            Int(group.seqs.start as i32),
            Int(group.seqs.len() as i32),
            Int(self.contexts.n_tokens() as i32),
            Int(self.window()),
        ];
        self.ops.unpack_kv.launch(gpu.cu_stream(), self.ops.unpack_kv_launch(group.n_pages), &args)
    }

    /// The arguments of prefill attention for `n_tiles` tiles at address `tiles`.
    fn prefill_args(&self, tiles: u64, n_tiles: usize) -> Vec<Arg> {
        let b = &self.buffers;
        let (qkv, out) = (Ptr(b.qkv.ptr()), Ptr(b.attn_out.ptr()));
        let mut args = match &self.contexts.maps {
            Some(maps) => vec![Ptr(maps.ptr(KEYS)), Ptr(maps.ptr(VALUES)), qkv, out],
            None => vec![qkv, Ptr(self.contexts.keys.ptr()), Ptr(self.contexts.values.ptr()), out],
        };
        args.extend([
            Ptr(self.input(self.layout.cu_seqlens)),
            Ptr(self.input(self.layout.context_lens)),
            Ptr(self.input(self.layout.context_starts)),
            Int(self.contexts.n_tokens() as i32),
            Ptr(tiles),
        ]);
        if self.contexts.maps.is_some() {
            args.extend([Int(n_tiles as i32), Int(self.spec.n_kv_heads as i32)]);
        }
        args.extend([Float(self.scale()), Int(self.window())]);
        args
    }

    fn scale(&self) -> f32 {
        1.0 / (self.spec.head_dim as f32).sqrt()
    }

    /// Tokens that attention sees; 0 for all.
    fn window(&self) -> i32 {
        self.spec.sliding_window.unwrap_or(0) as i32
    }
}
