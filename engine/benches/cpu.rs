//! The CPU executor's kernels against what the machine can do: `cargo bench -p ember-engine [-- FILTER]`.
//!
//! Each case is run many times in turn with the others, so that a machine whose speed wanders treats all alike, and its
//! best time is shown. The floor of a case is the greater of bytes / measured read bandwidth and multiply-adds /
//! measured rate of `vpdpwssd`, or `vpmaddwd + vpaddd` where that is missing (quantised), or fused multiply-add
//! (floats), on all threads.

use std::{
    borrow::Cow,
    hint::black_box,
    time::{Duration, Instant},
};

use ember_engine::{
    decoder::{DecoderSpec, Rope, RopeScaling},
    executors::cpu::{
        arena::{Arena, Piece},
        attention::{Attention, AttentionInput, AttentionPlan},
        kernels::Kernels,
        kv_cache::{KvCache, KvLayout, KvType},
        linear::Linear,
        pool::{Pool, usable_cores},
    },
    quant,
    step::{PAGE_SIZE, StepInput, StepSeq},
    weights::{DType, StoredTensor, TensorView},
};

/// Time spent on each case.
const PER_CASE: Duration = Duration::from_millis(700);
/// Rounds over all cases.
const N_ROUNDS: u32 = 7;

/// What a case is measured against.
enum Unit {
    /// 16-bit integers, 32-bit sums.
    Integers,
    /// Single precision.
    Floats,
}

struct Case {
    name: String,
    /// Bytes that must come from memory.
    n_bytes: usize,
    /// Multiply-adds.
    n_macs: usize,
    unit: Unit,
    run: Box<dyn FnMut(&mut Pool)>,
    best: Duration,
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let mut pool = Pool::new(usable_cores()).expect("threads");
    let mut cases: Vec<Case> = products().into_iter().chain(attentions()).collect();
    cases.retain(|case| case.name.contains(&filter));
    let mut limits = Limits::default();
    for _ in 0..N_ROUNDS {
        limits.measure(&mut pool);
        for case in &mut cases {
            let until = Instant::now() + PER_CASE / N_ROUNDS;
            loop {
                let start = Instant::now();
                (case.run)(&mut pool);
                case.best = case.best.min(start.elapsed());
                if Instant::now() > until {
                    break;
                }
            }
        }
    }
    println!(
        "{}, {} threads: read {:.1} GB/s, integers {:.0} GMAC/s, floats {:.0} GMAC/s\n",
        Kernels::best().name,
        pool.n_threads(),
        limits.bytes / 1e9,
        limits.integers / 1e9,
        limits.floats / 1e9
    );
    println!("{:<44} {:>10} {:>8} {:>8} {:>10} {:>6}", "case", "best us", "GB/s", "GMAC/s", "floor us", "share");
    for case in &cases {
        let seconds = case.best.as_secs_f64();
        let rate = match case.unit {
            Unit::Integers => limits.integers,
            Unit::Floats => limits.floats,
        };
        let floor = (case.n_bytes as f64 / limits.bytes).max(case.n_macs as f64 / rate);
        println!(
            "{:<44} {:>10.1} {:>8.1} {:>8.1} {:>10.1} {:>5.0}%",
            case.name,
            seconds * 1e6,
            case.n_bytes as f64 / seconds / 1e9,
            case.n_macs as f64 / seconds / 1e9,
            floor * 1e6,
            100.0 * floor / seconds
        );
    }
}

/// What the machine can do, per second, on all threads.
#[derive(Default)]
struct Limits {
    memory: Option<Piece>,
    bytes: f64,
    integers: f64,
    floats: f64,
}

impl Limits {
    fn measure(&mut self, pool: &mut Pool) {
        const N_BYTES: usize = 96 << 20;
        const N_LOOPS: usize = 20_000;
        let memory =
            self.memory.get_or_insert_with(|| Arena::default().piece(N_BYTES, |bytes| bytes.fill(1)).expect("memory"));
        let memory: &[[u64; 16]] = bytemuck::cast_slice(memory.bytes());
        let n_tasks = pool.n_threads() * 16;
        let rate = |pool: &mut Pool, n: f64, task: &(dyn Fn(usize) + Sync)| {
            let start = Instant::now();
            pool.run(n_tasks, task);
            n / start.elapsed().as_secs_f64()
        };
        let chunk = memory.len() / n_tasks;
        let read = rate(pool, N_BYTES as f64, &|i| {
            // Two cache lines a turn, in independent sums.
            let add = |sums: [u64; 16], values: &[u64; 16]| std::array::from_fn(|i| sums[i] ^ values[i]);
            black_box(memory[i * chunk..(i + 1) * chunk].iter().fold([0; 16], add));
        });
        let n_loops = (n_tasks * N_LOOPS) as f64;
        self.bytes = self.bytes.max(read);
        let (integers, floats) = (peak::integers(), peak::floats());
        self.integers = self.integers.max(rate(pool, integers.0 * n_loops, &|_| (integers.1)(N_LOOPS)));
        self.floats = self.floats.max(rate(pool, floats.0 * n_loops, &|_| (floats.1)(N_LOOPS)));
    }
}

/// The instructions that the kernels are made of, in independent chains: multiply-adds of a turn, and a loop of turns.
#[cfg(target_arch = "x86_64")]
mod peak {
    use std::{arch::x86_64::*, hint::black_box};

    /// In assembly: compilers see that the products are all the same.
    macro_rules! loop_of {
        ($n:ident, $($line:expr),*) => {
            // SAFETY: the caller has checked that the machine has the instructions; only these registers change.
            unsafe {
                std::arch::asm!(
                    "2:", $($line,)* "dec {n}", "jnz 2b",
                    n = inout(reg) $n => _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    options(nomem, nostack),
                );
            }
        };
    }

    fn vnni(n: usize) {
        macro_rules! products {
            ($($sum:literal)*) => { loop_of!(n, $(concat!("vpdpwssd zmm", $sum, ", zmm14, zmm15")),*) };
        }
        products!(0 1 2 3 4 5 6 7 8 9 10 11);
    }

    fn products_and_sums(n: usize) {
        macro_rules! products {
            ($($product:literal, $sum:literal);*) => {
                loop_of!(n, $(concat!("vpmaddwd ymm", $product, ", ymm8, ymm9"),
                              concat!("vpaddd ymm", $sum, ", ymm", $sum, ", ymm", $product)),*)
            };
        }
        products!(0, 10; 1, 11; 2, 12; 3, 13; 4, 14; 5, 15; 6, 10; 7, 11);
    }

    fn wide_floats(n: usize) {
        macro_rules! products {
            ($($sum:literal)*) => { loop_of!(n, $(concat!("vfmadd231ps zmm", $sum, ", zmm14, zmm15")),*) };
        }
        products!(0 1 2 3 4 5 6 7 8 9 10 11);
    }

    fn narrow_floats(n: usize) {
        #[target_feature(enable = "avx2,fma")]
        fn run(n: usize) {
            let (mut sums, factor) = ([_mm256_setzero_ps(); 8], black_box(_mm256_set1_ps(1.5)));
            for _ in 0..n {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(factor, factor, *sum);
                }
            }
            black_box(sums);
        }
        // SAFETY: the caller has checked that the machine has AVX2 and FMA.
        unsafe { run(n) }
    }

    pub fn integers() -> (f64, fn(usize)) {
        match () {
            () if is_x86_feature_detected!("avx512vnni") => (12.0 * 32.0, vnni),
            () if is_x86_feature_detected!("avx2") => (8.0 * 16.0, products_and_sums),
            () => (f64::INFINITY, |_| ()),
        }
    }

    pub fn floats() -> (f64, fn(usize)) {
        match () {
            () if is_x86_feature_detected!("avx512vnni") => (12.0 * 16.0, wide_floats),
            () if is_x86_feature_detected!("fma") => (8.0 * 8.0, narrow_floats),
            () => (f64::INFINITY, |_| ()),
        }
    }
}

/// Elsewhere rates are not known: endless ones leave the floor to the memory.
#[cfg(not(target_arch = "x86_64"))]
mod peak {
    pub fn integers() -> (f64, fn(usize)) {
        (f64::INFINITY, |_| ())
    }
    pub fn floats() -> (f64, fn(usize)) {
        (f64::INFINITY, |_| ())
    }
}

/// Products of SmolLM2's shapes.
fn products() -> Vec<Case> {
    let format =
        |name: &str| DType::Quant(quant::FORMATS.iter().copied().find(|f| f.name() == name).expect("a format"));
    let shapes = [
        ("gate_up", format("Q4_1"), 3072, 576),
        ("down", format("Q4_1"), 576, 1536),
        ("gate_up", format("Q4_0"), 3072, 576),
        ("gate_up", format("Q4_K"), 3072, 768),
        ("gate_up", format("Q5_K"), 3072, 768),
        ("gate_up", format("Q6_K"), 3072, 768),
        ("lm_head", format("Q8_0"), 49_152, 576),
        ("gate_up", DType::BF16, 3072, 576),
    ];
    let mut cases = Vec::new();
    for (name, dtype, n_rows, n_cols) in shapes {
        for n_tokens in [1, 4, 6, 8, 12, 16, 64, 512] {
            if n_rows * n_tokens > 1 << 21 {
                continue;
            }
            cases.push(product(name, dtype, (n_rows, n_cols), n_tokens));
        }
    }
    cases
}

fn product(name: &str, dtype: DType, (n_rows, n_cols): (usize, usize), n_tokens: usize) -> Case {
    // As many matrices as a model has, so that they come from memory.
    let n_bytes = dtype.size_of(n_rows * n_cols).expect("whole blocks");
    let n_matrices = (96usize << 20).div_ceil(n_bytes).min(if n_tokens > 16 { 1 } else { 64 });
    let mut arena = Arena::default();
    let linears: Vec<Linear> = (0..n_matrices)
        .map(|_| {
            // Small positive scales, whatever the format.
            let data = (0..n_bytes).map(|i| (i % 29) as u8).collect();
            let tensor = TensorView { dtype, shape: vec![n_rows, n_cols], data: Cow::Owned(data) };
            let tensor = StoredTensor::new(tensor, None);
            Linear::new(vec![tensor], None, (&mut arena, usable_cores())).expect("memory")
        })
        .collect();
    let mut x = Linear::inputs(&linears[..1], n_tokens, n_cols);
    let unit = if linears[0].wants_integers() { Unit::Integers } else { Unit::Floats };
    let mut out = vec![0.0; n_tokens * n_rows];
    let (mut turn, mut filled) = (0, false);
    let run = move |pool: &mut Pool| {
        if !filled {
            x.fill(pool, Kernels::best(), n_tokens, &|m, row| row.fill(m as f32 + 1.0));
            filled = true;
        }
        linears[turn % linears.len()].run(pool, Kernels::best(), &x, (&mut out, false));
        turn += 1;
    };
    Case {
        name: format!("{name} {} {n_rows}x{n_cols}, {n_tokens} rows", dtype.name()),
        n_bytes: if n_matrices > 1 { n_bytes } else { 0 },
        n_macs: n_rows * n_cols * n_tokens,
        unit,
        run: Box::new(run),
        best: Duration::MAX,
    }
}

fn smollm2() -> DecoderSpec {
    DecoderSpec {
        architecture: "LlamaForCausalLM".into(),
        hidden_size: 576,
        intermediate_size: 1536,
        n_layers: 30,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        vocab_size: 49_152,
        max_position: 8192,
        norm_eps: 1e-5,
        rope: Rope { theta: 100_000.0, scaling: RopeScaling::None },
        tie_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        moe: None,
    }
}

/// Attention of one layer: (sequences, query tokens each, context).
fn attentions() -> Vec<Case> {
    let shapes = [(1, 1, 300), (1, 1, 4000), (8, 1, 300), (16, 1, 300), (1, 512, 512), (1, 512, 4096)];
    [KvType::F16, KvType::Q8_0]
        .into_iter()
        .flat_map(|kv_type| shapes.into_iter().map(move |shape| attention(kv_type, shape)))
        .collect()
}

fn attention(kv_type: KvType, (n_seqs, query_len, context): (usize, usize, usize)) -> Case {
    let spec = smollm2();
    let pages_per_seq = context.div_ceil(PAGE_SIZE);
    let mut step = StepInput { token_ids: vec![0; n_seqs * query_len], ..StepInput::default() };
    for seq in 0..n_seqs {
        let first = step.block_tables.len();
        step.block_tables.extend((0..pages_per_seq).map(|page| (seq * pages_per_seq + page) as u32));
        step.seqs.push(StepSeq {
            slot: seq as u32,
            query_start: (seq * query_len) as u32,
            query_len: query_len as u32,
            context_len: context as u32,
            block_table: first..step.block_tables.len(),
            prompt_logprobs: None,
        });
    }
    let width = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim;
    let queries = vec![0.1; n_seqs * query_len * width];
    let mut out = vec![0.0; n_seqs * query_len * spec.n_heads * spec.head_dim];
    let cache = KvCache::new(KvLayout::new(&spec, kv_type), n_seqs * pages_per_seq);
    let plan = AttentionPlan::new(&spec, &step);
    let mut attention = Attention::new(&spec);
    // Query token i of a chunk sees the context before the chunk and i + 1 tokens of it.
    let n_pairs = n_seqs * (query_len * (context - query_len) + query_len * (query_len + 1) / 2);
    let run = move |pool: &mut Pool| {
        let input = AttentionInput { queries: &queries, q_stride: width, cache: &cache };
        attention.run((pool, Kernels::best()), (&plan, &step), &input, &mut out);
    };
    Case {
        name: format!("attention {}, {n_seqs} x {query_len} queries, {context} tokens", kv_type.name()),
        n_bytes: 0,
        n_macs: 2 * n_pairs * spec.n_heads * spec.head_dim,
        unit: Unit::Floats,
        run: Box::new(run),
        best: Duration::MAX,
    }
}
