//! SmolLM2-135M-Instruct through the whole engine, against an independent float32 decoder.

mod cache;
mod oracle;

use std::path::PathBuf;

use ember_engine::{
    DeviceChoice, Engine, EngineConfig, GenerateRequest, LoadFormat, Output, SamplingParams, ThinkingBudget,
    models::Model,
};
use oracle::Oracle;

const PROMPTS: [&str; 8] = [
    "The capital of France is",
    "Hello, my name is",
    "The future of AI is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who",
    "Die Hauptstadt von Deutschland ist",
    "1, 1, 2, 3, 5, 8, 13,",
];
const N_TOKENS: u32 = 24;
/// Two tokens whose log-probabilities differ by less may change places between implementations.
const NEAR_TIE: f32 = 2e-3;

fn model_path() -> PathBuf {
    cache::model("smollm2", "SmolLM2-135M-Instruct-Q4_1.gguf")
}

fn config() -> EngineConfig {
    EngineConfig { device: DeviceChoice::Cpu, kv_cache_memory_bytes: Some(64 << 20), ..Default::default() }
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens: Some(N_TOKENS), ignore_eos: true, ..Default::default() }
}

fn token_ids(outputs: &[Output]) -> Vec<Vec<u32>> {
    outputs.iter().map(|output| output.token_ids.clone()).collect()
}

/// Compares `ids` with the oracle's greedy choice, token by token, up to the first near-tie.
/// Returns how many tokens were compared.
fn check_against_oracle(oracle: &Oracle, output: &Output) -> usize {
    let mut cache = oracle.cache();
    let mut hidden = Vec::new();
    for &token in output.prompt_token_ids.iter() {
        hidden = oracle.forward(token, &mut cache);
    }
    for (i, &id) in output.token_ids.iter().enumerate() {
        let log_probs = oracle.log_probs(&hidden);
        let mut order: Vec<u32> = (0..log_probs.len() as u32).collect();
        order.sort_unstable_by(|&a, &b| log_probs[b as usize].total_cmp(&log_probs[a as usize]));
        if i == 0 {
            for &(id, logprob) in &output.logprobs[0].top {
                let wanted = log_probs[id as usize];
                assert!((logprob - wanted).abs() < 0.02, "log-probability of {id}: {logprob} instead of {wanted}");
            }
        }
        if log_probs[order[0] as usize] - log_probs[order[1] as usize] < NEAR_TIE {
            return i;
        }
        assert_eq!(id, order[0], "token {i} of {:?}", output.text);
        hidden = oracle.forward(id, &mut cache);
    }
    output.token_ids.len()
}

#[test]
fn greedy_ids_equal_the_oracles() {
    let model = Model::open(&model_path(), LoadFormat::Auto, 0).expect("the model opens");
    let read = |weight| model.weights.get(weight).expect("the model is whole").to_f32().into_owned();
    let oracle = Oracle::new(&model.spec, read);
    let engine = Engine::load(model_path(), config()).expect("the model loads");
    let params = SamplingParams { logprobs: Some(5), ..greedy() };
    let outputs = engine.generate(PROMPTS, &params).expect("generates");
    let n_compared: Vec<usize> = outputs.iter().map(|output| check_against_oracle(&oracle, output)).collect();
    println!("tokens compared before a near-tie: {n_compared:?}");
    assert!(n_compared.iter().sum::<usize>() >= PROMPTS.len() * N_TOKENS as usize / 2, "near-ties hid the comparison");
}

#[test]
fn neither_batching_nor_caching_nor_preemption_changes_the_ids() {
    let engine = Engine::load(model_path(), config()).expect("the model loads");
    let alone: Vec<Vec<u32>> = PROMPTS
        .iter()
        .flat_map(|&prompt| token_ids(&engine.generate([prompt], &greedy()).expect("generates")))
        .collect();
    let together = token_ids(&engine.generate(PROMPTS, &greedy()).expect("generates"));
    assert_eq!(alone, together, "in a batch of {}", PROMPTS.len());

    // The longest prompt again and again: its pages come from the prefix cache.
    let long = format!("{} {}", PROMPTS[5], PROMPTS[5]);
    let first = token_ids(&engine.generate([long.as_str()], &greedy()).expect("generates"));
    let hits_before = engine.stats().n_prefix_hits;
    let again = token_ids(&engine.generate([long.as_str()], &greedy()).expect("generates"));
    assert_eq!(first, again, "with a cached prefix");
    assert!(engine.stats().n_prefix_hits >= hits_before + 32);
    drop(engine);

    let uncached = EngineConfig { enable_prefix_caching: false, ..config() };
    let engine = Engine::load(model_path(), uncached).expect("the model loads");
    assert_eq!(first, token_ids(&engine.generate([long.as_str()], &greedy()).expect("generates")), "without the cache");
    drop(engine);

    // 12 pages for eight sequences of two to four pages each: some must be put back and computed again.
    // Half-precision keys and values.
    let page_bytes = 16 * 2 * 30 * 3 * 64 * 2;
    let scarce = EngineConfig { kv_cache_memory_bytes: Some(12 * page_bytes), max_model_len: Some(128), ..config() };
    let engine = Engine::load(model_path(), scarce).expect("the model loads");
    let preempted = token_ids(&engine.generate(PROMPTS, &greedy()).expect("generates"));
    assert!(engine.stats().n_preemptions > 0, "the test preempts nothing");
    assert_eq!(alone, preempted, "after preemption");
}

#[test]
fn log_probabilities_of_chosen_tokens_are_those_of_the_best_of_all() {
    let engine = Engine::load(model_path(), config()).expect("the model loads");
    let all = SamplingParams { logprobs: Some(20), ..greedy() };
    let all = engine.generate([PROMPTS[0]], &all).expect("generates").remove(0);
    // The 20th, the first and the 10th of the first position, whose order stays.
    let chosen = [19, 0, 9].map(|rank: usize| all.logprobs[0].top[rank]);
    let ids: Vec<u32> = chosen.iter().map(|&(id, _)| id).collect();
    let params = SamplingParams { logprobs: Some(0), logprob_token_ids: ids.clone(), ..greedy() };
    let outputs = engine.generate([PROMPTS[0], PROMPTS[1]], &params).expect("generates");
    assert_eq!(outputs[0].token_ids, all.token_ids);
    assert_eq!(outputs[0].logprobs[0].top, chosen);
    for token in outputs.iter().flat_map(|output| &output.logprobs) {
        assert_eq!(token.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), ids);
        assert!(token.top.iter().all(|&(_, logprob)| logprob.is_finite() && logprob < 0.0));
    }
}

#[test]
fn reasoning_ends_with_the_budget() {
    let engine = Engine::load(model_path(), config()).expect("the model loads");
    let tag = |text: &str| engine.tokenizer().encode_with_special(text).expect("encodes");
    let prompt = "<think>One, two, three, four,";
    let n_thought = engine.tokenizer().encode(prompt, true).expect("encodes").len() - tag("<think>").len();
    let free = engine.generate([prompt], &greedy()).expect("generates").remove(0);
    assert!(!free.text.contains("</think>"), "{}", free.text);
    for n_more in [0, 1, 7] {
        let budget = ThinkingBudget {
            n_tokens: (n_thought + n_more) as u32,
            start: tag("<think>"),
            end: tag("</think>"),
            begins_inside: false,
        };
        let params = SamplingParams { thinking_budget: Some(budget), ..greedy() };
        let output = engine.generate([prompt], &params).expect("generates").remove(0);
        let end = tag("</think>");
        assert_eq!(output.token_ids[..n_more], free.token_ids[..n_more]);
        assert_eq!(output.token_ids[n_more..n_more + end.len()], end, "{}", output.text);
        assert_eq!(output.token_ids.len(), N_TOKENS as usize);
    }
}

#[test]
fn a_seed_gives_the_same_text_whatever_else_runs() {
    let engine = Engine::load(model_path(), config()).expect("the model loads");
    let params =
        SamplingParams { temperature: 0.8, top_p: 0.95, seed: Some(42), max_tokens: Some(16), ..Default::default() };
    let alone = token_ids(&engine.generate([PROMPTS[0]], &params).expect("generates"));
    let others = [PROMPTS[1], PROMPTS[0], PROMPTS[2]];
    let together = token_ids(&engine.generate(others, &params).expect("generates"));
    assert_eq!(alone[0], together[1]);
    let other_seed = SamplingParams { seed: Some(43), ..params };
    assert_ne!(alone, token_ids(&engine.generate([PROMPTS[0]], &other_seed).expect("generates")));
}

#[test]
fn dropped_generations_give_their_pages_back() {
    let engine = Engine::load(model_path(), config()).expect("the model loads");
    let params = SamplingParams { max_tokens: Some(1000), ignore_eos: true, ..greedy() };
    let mut kept = engine.submit(GenerateRequest::new(PROMPTS[0], greedy())).expect("starts");
    for prompt in PROMPTS {
        let mut generation = engine.submit(GenerateRequest::new(prompt, params.clone())).expect("starts");
        generation.blocking_next().expect("an event").expect("no error");
    }
    while let Some(event) = kept.blocking_next() {
        event.expect("no error");
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while engine.stats().n_pages_in_use > 0 || engine.stats().n_running > 0 {
        assert!(std::time::Instant::now() < deadline, "pages are still in use: {:?}", engine.stats());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
