//! Sampling on the CPU: the definition that device kernels follow.
//!
//! Order: log-probabilities of the raw logits; penalties over prompt and output; logit bias,
//! allowed and banned ids; then greedy, or temperature, min-p, top-k, top-p and a Gumbel-max draw
//! (the best of `logit / temperature + noise` is a draw from the softmax). The noise of a token is a
//! pure function of (seed, index in the output, token id), so a seed gives the same text whatever
//! else runs.

use std::collections::HashMap;

use crate::{
    request::{SamplingParams, TokenLogprobs},
    step::{Banned, SampleRow, SampledToken, TokenHistory},
};

/// Samples from `logits`, `[vocab_size]`, which are changed.
pub fn sample_row(logits: &mut [f32], row: &SampleRow) -> SampledToken {
    let params = &*row.params;
    let raw = params.logprobs.map(|n_top| (LogSoftmax::new(logits), n_top));
    let raw_top = raw.as_ref().map(|(softmax, n_top)| match params.logprob_token_ids.as_slice() {
        [] => (*softmax, top_n(logits, *n_top as usize)),
        ids => (*softmax, ids.to_vec()),
    });
    let raw_logits = raw.is_some().then(|| logits.to_vec());

    if let Some(history) = &row.history {
        apply_penalties(logits, params, history);
    }
    for &(id, bias) in &params.logit_bias {
        logits[id as usize] += bias;
    }
    if let Some(allowed) = &params.allowed_token_ids {
        let kept: Vec<f32> = allowed.iter().map(|&id| logits[id as usize]).collect();
        logits.fill(f32::NEG_INFINITY);
        for (&id, value) in allowed.iter().zip(kept) {
            logits[id as usize] = value;
        }
    }
    if let Some(banned) = &row.banned {
        ban(logits, banned);
    }

    let token_id = if params.is_greedy() { argmax(logits) } else { draw(logits, row) };
    let logprobs = raw_top.zip(raw_logits).map(|((softmax, top), raw)| logprobs_of(&raw, softmax, top, token_id));
    SampledToken { token_id, logprobs }
}

/// Log-probabilities of `target` and of the `n_top` best tokens under `logits`, `[vocab_size]`.
pub fn token_logprobs(logits: &[f32], target: u32, n_top: u32) -> TokenLogprobs {
    logprobs_of(logits, LogSoftmax::new(logits), top_n(logits, n_top as usize), target)
}

fn logprobs_of(logits: &[f32], softmax: LogSoftmax, top: Vec<u32>, target: u32) -> TokenLogprobs {
    let value = logits[target as usize];
    TokenLogprobs {
        token_id: target,
        logprob: softmax.of(value),
        rank: 1 + logits.iter().filter(|&&l| l > value).count() as u32,
        top: top.into_iter().map(|id| (id, softmax.of(logits[id as usize]))).collect(),
    }
}

#[derive(Clone, Copy)]
struct LogSoftmax {
    /// Logarithm of the sum of exponentials.
    log_sum: f32,
}

impl LogSoftmax {
    fn new(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|&l| f64::from((l - max).exp())).sum();
        Self { log_sum: max + sum.ln() as f32 }
    }

    fn of(self, logit: f32) -> f32 {
        logit - self.log_sum
    }
}

fn ban(logits: &mut [f32], banned: &Banned) {
    let before: Vec<f32> = banned.ids.iter().map(|&id| logits[id as usize]).collect();
    for &id in banned.ids.iter() {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    let Some(mask) = &banned.mask else { return };
    let forbid = |logits: &mut [f32]| {
        let mut n_left = 0;
        for (id, logit) in logits.iter_mut().enumerate() {
            if !mask.allows(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
            n_left += usize::from(*logit > f32::NEG_INFINITY);
        }
        n_left
    };
    if forbid(logits) == 0 {
        for (&id, logit) in banned.ids.iter().zip(before) {
            logits[id as usize] = logit;
        }
        if forbid(logits) == 0 {
            // The request's own lists leave nothing that the grammar allows.
            (0..).zip(logits.iter_mut()).filter(|&(id, _)| mask.allows(id)).for_each(|(_, logit)| *logit = 0.0);
        }
    }
}

/// The best token; the lowest id among equals.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// Ids of the `n` best tokens, best first, the lowest id first among equals.
fn top_n(logits: &[f32], n: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if n == 0 {
        return Vec::new();
    }
    if n < ids.len() {
        ids.select_nth_unstable_by(n - 1, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

fn apply_penalties(logits: &mut [f32], params: &SamplingParams, history: &TokenHistory) {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    for &id in &history.output {
        *counts.entry(id).or_default() += 1;
    }
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = history.prompt.iter().chain(&history.output).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        }
    }
    for (id, count) in counts {
        logits[id as usize] -= params.frequency_penalty * count as f32 + params.presence_penalty;
    }
}

/// Draws a token by Gumbel-max among those that min-p, top-k and top-p keep.
fn draw(logits: &[f32], row: &SampleRow) -> u32 {
    let params = &*row.params;
    let inv_temperature = 1.0 / params.temperature;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // Tempered logits relative to the best: 0 and below.
    let tempered = |id: u32| (logits[id as usize] - max) * inv_temperature;
    let floor = if params.min_p > 0.0 { params.min_p.ln() } else { f32::NEG_INFINITY };
    let mut kept: Vec<u32> = (0..logits.len() as u32)
        .filter(|&id| logits[id as usize] > f32::NEG_INFINITY && tempered(id) >= floor)
        .collect();
    let order = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let k = params.top_k as usize;
    if k > 0 && k < kept.len() {
        kept.select_nth_unstable_by(k - 1, order);
        kept.truncate(k);
    }
    if params.top_p < 1.0 {
        keep_nucleus(&mut kept, params.top_p, tempered, order);
    }
    let noise = GumbelNoise::new(row.seed, row.n_output);
    let score = |id: u32| tempered(id) + noise.of(id);
    kept.into_iter()
        .map(|id| (id, score(id)))
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
        .map_or_else(|| argmax(logits), |(id, _)| id)
}

/// Cuts `kept` down to the smallest set of best tokens whose probabilities add up to `top_p`.
fn keep_nucleus(
    kept: &mut Vec<u32>,
    top_p: f32,
    tempered: impl Fn(u32) -> f32,
    order: impl Fn(&u32, &u32) -> std::cmp::Ordering + Copy,
) {
    let total: f64 = kept.iter().map(|&id| f64::from(tempered(id).exp())).sum();
    let wanted = f64::from(top_p) * total;
    let (mut sorted, mut mass) = (0, 0.0);
    // The nucleus is usually small: sort ever larger heads instead of the whole vocabulary.
    let mut head = 64;
    while sorted < kept.len() {
        let end = head.min(kept.len());
        if end < kept.len() {
            kept[sorted..].select_nth_unstable_by(end - sorted - 1, order);
        }
        kept[sorted..end].sort_unstable_by(order);
        for i in sorted..end {
            mass += f64::from(tempered(kept[i]).exp());
            if mass >= wanted {
                kept.truncate(i + 1);
                return;
            }
        }
        sorted = end;
        head *= 8;
    }
}

/// Gumbel noise from Philox4x32-10 (Salmon et al. 2011), keyed by the seed; the counter is
/// (token id / 4, index in the output, 0, 0) and the token id picks one of the four words.
#[derive(Clone, Copy)]
struct GumbelNoise {
    seed: u64,
    n_output: u32,
}

impl GumbelNoise {
    fn new(seed: u64, n_output: u32) -> Self {
        Self { seed, n_output }
    }

    fn of(self, token_id: u32) -> f32 {
        let words = philox4x32([token_id / 4, self.n_output, 0, 0], [self.seed as u32, (self.seed >> 32) as u32]);
        // In (0, 1): the top 23 bits, in the middle of their interval.
        let uniform = ((words[(token_id % 4) as usize] >> 9) as f32 + 0.5) * (1.0 / (1 << 23) as f32);
        -(-uniform.ln()).ln()
    }
}

fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn row(params: SamplingParams) -> SampleRow {
        SampleRow { seq: 0, seq_id: 0, params: Arc::new(params), seed: 7, n_output: 0, banned: None, history: None }
    }

    fn sampled(logits: &[f32], row: &SampleRow) -> u32 {
        sample_row(&mut logits.to_vec(), row).token_id
    }

    /// How often each token comes in 20,000 draws.
    fn frequencies(logits: &[f32], params: SamplingParams) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        let mut row = row(params);
        for n in 0..20_000 {
            row.n_output = n;
            counts[sampled(logits, &row) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn draws_follow_the_tempered_softmax() {
        let logits = [1.0, 2.0, 0.5, -1.0];
        let temperature = 0.7;
        let exp: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature).exp()).collect();
        let total: f64 = exp.iter().sum();
        let got = frequencies(&logits, SamplingParams { temperature, ..Default::default() });
        for (got, want) in got.iter().zip(exp.iter().map(|e| e / total)) {
            assert!((got - want).abs() < 0.015, "{got} instead of {want}");
        }
    }

    #[test]
    fn filters_keep_what_they_say() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let kept = |params: SamplingParams| -> Vec<usize> {
            let got = frequencies(&logits, params);
            (0..4).filter(|&i| got[i] > 0.0).collect()
        };
        assert_eq!(kept(SamplingParams { top_k: 2, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.69, ..Default::default() }), [0, 1]);
        assert_eq!(kept(SamplingParams { top_p: 0.71, ..Default::default() }), [0, 1, 2]);
        assert_eq!(kept(SamplingParams { min_p: 0.45, ..Default::default() }), [0, 1, 2]);
        // top-p applies to what top-k left, renormalised: 0.4 / 0.7 < 0.6.
        assert_eq!(kept(SamplingParams { top_k: 2, top_p: 0.5, ..Default::default() }), [0]);
        let allowed = Some(vec![3]);
        assert_eq!(kept(SamplingParams { allowed_token_ids: allowed, ..Default::default() }), [3]);
    }

    #[test]
    fn a_nucleus_larger_than_the_first_head_is_exact() {
        let logits = vec![0.0; 1000];
        let mut ids: Vec<u32> = (0..1000).collect();
        keep_nucleus(&mut ids, 0.7, |id| logits[id as usize], |a, b| a.cmp(b));
        assert_eq!(ids.len(), 700);
    }

    #[test]
    fn penalties_follow_openai_and_ctrl() {
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        let logits = [1.0, 0.9, -1.0];
        let with = |params: SamplingParams| {
            let mut row = row(params);
            row.history = Some(TokenHistory { prompt: [2].as_slice().into(), output: vec![0, 0] });
            let mut logits = logits.to_vec();
            sample_row(&mut logits, &row);
            logits
        };
        assert_eq!(with(SamplingParams { presence_penalty: 0.5, ..greedy.clone() }), [0.5, 0.9, -1.0]);
        assert_eq!(with(SamplingParams { frequency_penalty: 0.5, ..greedy.clone() }), [0.0, 0.9, -1.0]);
        assert_eq!(with(SamplingParams { repetition_penalty: 2.0, ..greedy }), [0.5, 0.9, -2.0]);
    }

    #[test]
    fn bans_and_biases_change_the_best_token() {
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        let logits = [1.0, 3.0, 2.0];
        assert_eq!(sampled(&logits, &row(greedy.clone())), 1);
        let mut banned = row(greedy.clone());
        banned.banned = Some(Banned::of([1]));
        assert_eq!(sampled(&logits, &banned), 2);
        assert_eq!(sampled(&logits, &row(SamplingParams { logit_bias: vec![(0, 5.0)], ..greedy })), 0);
    }

    #[test]
    fn logprobs_are_of_the_raw_logits() {
        let params =
            SamplingParams { temperature: 0.0, logit_bias: vec![(0, 100.0)], logprobs: Some(2), ..Default::default() };
        let logits: Vec<f32> = [0.2f32, 0.5, 0.3].iter().map(|p| p.ln()).collect();
        let got = sample_row(&mut logits.clone(), &row(params)).logprobs.expect("asked for");
        assert_eq!((got.token_id, got.rank), (0, 3));
        assert!((got.logprob - 0.2f32.ln()).abs() < 1e-5);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn logprobs_of_chosen_tokens_come_in_their_order() {
        let params = SamplingParams {
            temperature: 0.0,
            allowed_token_ids: Some(vec![2]),
            logprobs: Some(1),
            logprob_token_ids: vec![0, 2],
            ..Default::default()
        };
        let logits: Vec<f32> = [0.2f32, 0.5, 0.3].iter().map(|p| p.ln()).collect();
        let got = sample_row(&mut logits.clone(), &row(params)).logprobs.expect("asked for");
        assert_eq!((got.token_id, got.rank), (2, 2));
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 2]);
        for ((_, logprob), expected) in got.top.iter().zip([0.2f32, 0.3]) {
            assert!((logprob - expected.ln()).abs() < 1e-5);
        }
    }

    #[test]
    fn a_grammar_outranks_bans_that_leave_nothing() {
        use crate::{OutputForm, grammar::GrammarCompiler, text::Tokenizer};
        let compiler = GrammarCompiler::new(&Tokenizer::byte_level(256).expect("valid"), &[]);
        let grammar = compiler.compile(&OutputForm::Choice(vec!["a".into(), "b".into()]).into()).expect("valid");
        let mut logits = vec![0.0; 256];
        logits[usize::from(b'b')] = 1.0;
        logits[usize::from(b'c')] = 2.0;
        let with = |ids: &[u32], allowed: Option<Vec<u32>>| {
            let mut row = row(SamplingParams { temperature: 0.0, allowed_token_ids: allowed, ..Default::default() });
            row.banned = Some(Banned { ids: ids.into(), mask: Some(Arc::new(grammar.mask())) });
            sampled(&logits, &row) as u8
        };
        assert_eq!(with(&[], None), b'b');
        assert_eq!(with(&[u32::from(b'b')], None), b'a');
        assert_eq!(with(&[u32::from(b'a'), u32::from(b'b')], None), b'b');
        assert_eq!(with(&[], Some(vec![u32::from(b'z')])), b'a');
    }
}
