//! Every architecture against what `transformers` computes from the same tiny checkpoint: engine/tests/golden/, made by
//! xtask/reference/golden.py, which says how a checkpoint's values follow from its tensors' names.

mod checkpoint;

use burn::tensor::Device;
use checkpoint::Golden;
use ember_engine::{
    DeviceChoice, EngineConfig, LoadFormat, TokenLogprobs,
    embedding::EmbeddingEngine,
    executors::{Executor, burn::BurnExecutor, cpu::CpuExecutor},
    models::Model,
    step::{PAGE_SIZE, PromptLogprobs, StepInput, StepSeq},
};

/// Greatest difference of a log-probability in float32.
const TOLERANCE: f32 = 1e-4;
/// The same with half-precision keys and values. Logits of these models are within 20 of each other.
const TUNED_TOLERANCE: f32 = 2e-2;
/// Pages for each prompt.
const PAGES: usize = 8;
const N_TOP: u32 = 8;

/// A step of the tokens from `start` on, `chunk` at most, of each of `prompts`.
fn step(prompts: &[&[u32]], start: usize, chunk: usize) -> StepInput {
    let mut step = StepInput::default();
    for (seq, prompt) in prompts.iter().enumerate().filter(|(_, prompt)| prompt.len() > start) {
        let end = prompt.len().min(start + chunk);
        let query_start = step.token_ids.len() as u32;
        step.token_ids.extend(prompt[start..end].iter().map(|&id| id as i32));
        step.positions.extend(start as u32..end as u32);
        let first = (seq * PAGES * PAGE_SIZE) as u32;
        step.slot_mapping.extend(first + start as u32..first + end as u32);
        let block_start = step.block_tables.len();
        let first_page = (seq * PAGES) as u32;
        step.block_tables.extend(first_page..first_page + end.div_ceil(PAGE_SIZE) as u32);
        let targets = prompt[start + 1..(end + 1).min(prompt.len())].to_vec();
        step.seqs.push(StepSeq {
            slot: seq as u32,
            query_start,
            query_len: (end - start) as u32,
            context_len: end as u32,
            block_table: block_start..step.block_tables.len(),
            prompt_logprobs: Some(PromptLogprobs { n_top: N_TOP, targets }),
        });
    }
    step
}

/// Log-probabilities of each prompt's tokens but the first. All prompts run together, `chunk` tokens of each in a step.
fn scores(executor: &mut dyn Executor, prompts: &[&[u32]], chunk: usize) -> Vec<Vec<TokenLogprobs>> {
    let mut scores = vec![Vec::new(); prompts.len()];
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    for start in (0..longest).step_by(chunk) {
        let step = step(prompts, start, chunk);
        let seqs: Vec<usize> = step.seqs.iter().map(|seq| seq.slot as usize).collect();
        executor.launch(step).expect("launched");
        for (seq, entries) in seqs.into_iter().zip(executor.collect().expect("collected").prompt_logprobs) {
            scores[seq].extend(entries);
        }
    }
    scores
}

/// Differences of the log-probabilities from the golden ones.
fn differences(golden: &Golden, scores: &[Vec<TokenLogprobs>]) -> Vec<f32> {
    let mut differences = Vec::new();
    let mut compare = |got: f32, want: f32| {
        differences.push(if got.is_finite() { (got - want).abs() } else { f32::INFINITY });
    };
    for (prompt, scores) in golden.prompts.iter().zip(scores) {
        assert_eq!(prompt.targets.len(), scores.len());
        for ((entry, &want), &id) in scores.iter().zip(&prompt.targets).zip(&prompt.ids[1..]) {
            assert_eq!(entry.token_id, id);
            compare(entry.logprob, want);
        }
        assert!(!prompt.top.is_empty());
        for (position, top) in &prompt.top {
            let entry = &scores[*position];
            for (id, want) in top {
                // More were asked for than are golden, for ties.
                compare(entry.top.iter().find(|(other, _)| other == id).map_or(f32::NAN, |found| found.1), *want);
            }
        }
    }
    differences
}

fn greatest(differences: &[f32]) -> f32 {
    differences.iter().copied().fold(0.0, f32::max)
}

fn check(name: &str) {
    let golden = Golden::read(name);
    let folder = golden.folder();
    let model = Model::open(folder.path(), LoadFormat::Auto, 0).expect("opens");
    let config = EngineConfig {
        max_num_seqs: Some(4),
        max_num_batched_tokens: Some(256),
        kv_cache_memory_bytes: Some(4 << 20),
        ..EngineConfig::default()
    };
    let prompts: Vec<&[u32]> = golden.prompts.iter().map(|prompt| prompt.ids.as_slice()).collect();
    assert!(!prompts.is_empty());
    let mut portable = BurnExecutor::new(&model.spec, &*model.weights, &config, Device::flex()).expect("loads");
    let mut tuned = CpuExecutor::new(&model.spec, &*model.weights, &config).expect("loads");
    // Whole, in chunks, and token by token, as when decoding.
    for chunk in [64, 10, 1] {
        let difference = greatest(&differences(&golden, &scores(&mut portable, &prompts, chunk)));
        let mut tuned_differences = differences(&golden, &scores(&mut tuned, &prompts, chunk));
        if model.spec.moe.is_some() {
            // Of two experts that are nearly equal, half precision may choose the other.
            tuned_differences.sort_by(f32::total_cmp);
            tuned_differences.truncate(tuned_differences.len() * 9 / 10);
        }
        let tuned_difference = greatest(&tuned_differences);
        println!("{name}, chunks of {chunk}: {difference:.1e} portable, {tuned_difference:.1e} tuned");
        assert!(difference < TOLERANCE, "{name}, chunks of {chunk}, portable: {difference}");
        assert!(tuned_difference < TUNED_TOLERANCE, "{name}, chunks of {chunk}, tuned: {tuned_difference}");
    }
}

macro_rules! golden {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*

        /// The files of generating models.
        const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

golden! {
    llama
    llama_dynamic
    llama_fp8_block
    llama_fp8_channel
    llama_fp8_tensor
    llama_linear
    llama_tied
    llama_yarn_mscale
    mistral
    mixtral
    qwen2
    qwen2_moe
    qwen2_moe_norm
    qwen2_yarn
    qwen2_yarn_beta
    qwen3
    qwen3_moe
}

/// The files of embedding models, and whether they are decoders.
const EMBEDDING: [(&str, bool); 3] = [("bert", false), ("llama_mean", true), ("qwen3_last", true)];

#[test]
fn embedding_models_give_the_vectors_of_transformers() {
    for (name, is_decoder) in EMBEDDING {
        let golden = Golden::read(name);
        let folder = golden.folder();
        assert!(EmbeddingEngine::is_for(folder.path()).expect("a model"), "{name}");
        let texts: Vec<Vec<u32>> = golden.texts.iter().map(|text| text.ids.clone()).collect();
        // All in one step, and in steps that some texts do not fit into.
        for max_num_batched_tokens in [None, Some(18), Some(7)] {
            let config = EngineConfig {
                device: DeviceChoice::Cpu,
                max_num_batched_tokens,
                max_num_seqs: Some(7),
                kv_cache_memory_bytes: Some(4 << 20),
                ..EngineConfig::default()
            };
            let engine = EmbeddingEngine::load(folder.path(), config).expect("loads");
            let vectors = engine.embed(&texts).expect("embeds");
            assert_eq!(vectors.len(), golden.texts.len());
            for (vector, text) in vectors.iter().zip(&golden.texts) {
                let difference = greatest_difference(vector, &text.vector);
                let tolerance = if is_decoder { TUNED_TOLERANCE } else { TOLERANCE };
                assert!(difference < tolerance, "{name}, {max_num_batched_tokens:?}: {difference}");
            }
        }
        if is_decoder {
            let model = Model::open_headless(folder.path(), LoadFormat::Auto, 0).expect("opens");
            let config = EngineConfig { kv_cache_memory_bytes: Some(4 << 20), ..EngineConfig::default() };
            let mut portable = BurnExecutor::new(&model.spec, &*model.weights, &config, Device::flex()).expect("loads");
            for text in &golden.texts {
                let states = portable.hidden_states(&step(&[&text.ids], 0, text.ids.len())).expect("runs");
                let difference = greatest_difference(&pooled(&states, model.spec.hidden_size, name), &text.vector);
                assert!(difference < TOLERANCE, "{name}, portable: {difference}");
            }
        }
    }
}

fn greatest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// The vector of `states`, `[n_tokens, hidden_size]`, as the file's name says.
fn pooled(states: &[f32], hidden_size: usize, name: &str) -> Vec<f32> {
    let rows = states.chunks_exact(hidden_size);
    if name.ends_with("mean") {
        let n = rows.len() as f32;
        return (0..hidden_size).map(|i| rows.clone().map(|row| row[i]).sum::<f32>() / n).collect();
    }
    let last = rows.last().expect("a token");
    let length = last.iter().map(|x| x * x).sum::<f32>().sqrt();
    last.iter().map(|x| x / length).collect()
}

#[test]
fn no_file_is_left_out() {
    for entry in std::fs::read_dir(checkpoint::FOLDER).expect("the folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let golden = Golden::read(&name);
        assert!(golden.prompts.is_empty() || NAMES.contains(&name.as_str()), "{name}");
        assert!(golden.texts.is_empty() || EMBEDDING.iter().any(|(other, _)| *other == name), "{name}");
    }
}
