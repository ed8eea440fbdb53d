//! Tests of the scheduler against a fake device that answers tokens only.

use std::{collections::HashMap, sync::Arc};

use ember_common::FinishReason;
use proptest::prelude::*;

use super::*;
use crate::{ThinkingBudget, request::SamplingParams, step::SampledToken};

const EOS: u32 = 1;

fn config(n_pages: usize) -> SchedulerConfig {
    SchedulerConfig { n_pages, max_num_seqs: 4, max_num_batched_tokens: 32, enable_prefix_caching: true }
}

fn sequence(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> NewSequence {
    NewSequence {
        prompt: prompt.into_iter().collect::<Vec<_>>().into(),
        params: Arc::new(SamplingParams { max_tokens: Some(max_tokens), ..Default::default() }),
        seed: 0,
        max_len: 96,
        eos_token_ids: [EOS, 2].as_slice().into(),
        cache_salt: None,
        priority: 0,
        grammar: None,
        bad_words: Arc::default(),
    }
}

/// Answers `token_of` each sampled row's position in its sequence.
fn run(step: &StepInput, token_of: impl Fn(&SampleRow, u32) -> u32) -> StepOutput {
    let tokens = step.samples.iter().map(|row| {
        let token_id = token_of(row, step.seqs[row.seq].context_len);
        SampledToken { token_id, logprobs: None }
    });
    StepOutput { tokens: tokens.collect(), prompt_logprobs: Vec::new() }
}

#[test]
fn a_prompt_is_cut_to_the_budget_and_then_decoded() {
    let mut scheduler = Scheduler::new(config(16));
    scheduler.add(sequence(10..60, 2));
    let mut lens = Vec::new();
    let mut ended = None;
    while let Some(step) = scheduler.plan() {
        lens.push((step.n_tokens(), step.samples.len()));
        ended = scheduler.complete(run(&step, |_, position| 100 + position)).into_iter().find_map(|p| p.end).or(ended);
    }
    assert_eq!(lens, [(32, 0), (18, 1), (1, 1)]);
    assert_eq!(ended, Some(SequenceEnd { reason: FinishReason::Length, stop_token: None, shows_token: true }));
    assert!(scheduler.is_idle());
    assert_eq!(scheduler.pool().n_free(), 16);
}

#[test]
fn decoding_sequences_and_unfinished_prompts_are_counted() {
    let mut scheduler = Scheduler::new(config(16));
    scheduler.add(sequence(10..30, 9));
    assert_eq!(scheduler.demand(), Demand { n_decoding: 0, n_prompts: 1, n_prompt_tokens: 20 });
    scheduler.plan().expect("work");
    scheduler.add(sequence(100..150, 9));
    scheduler.add(sequence(200..230, 9));
    assert_eq!(scheduler.demand(), Demand { n_decoding: 1, n_prompts: 2, n_prompt_tokens: 80 });
    let step = scheduler.plan().expect("work");
    assert_eq!(step.seqs.iter().map(|seq| seq.query_len).collect::<Vec<_>>(), [1, 31]);
    let expected = Demand { n_decoding: 1, n_prompts: 2, n_prompt_tokens: 49 };
    assert_eq!(scheduler.demand(), expected, "one prompt is half done");
}

#[test]
fn of_decoding_sequences_the_longest_contexts_come_first() {
    let mut scheduler = Scheduler::new(config(16));
    for n in [3, 9, 5] {
        scheduler.add(sequence(10..10 + n, 9));
    }
    let step = scheduler.plan().expect("work");
    scheduler.complete(run(&step, |_, _| 50));
    scheduler.add(sequence(60..72, 9));
    let step = scheduler.plan().expect("work");
    assert_eq!(step.seqs.iter().map(|seq| seq.context_len).collect::<Vec<_>>(), [10, 6, 4, 12]);
}

#[test]
fn decoding_comes_before_prompts_and_first_in_the_step() {
    let mut scheduler = Scheduler::new(config(16));
    scheduler.add(sequence(10..14, 9));
    let step = scheduler.plan().expect("work");
    scheduler.complete(run(&step, |_, _| 50));
    scheduler.add(sequence(20..70, 1));
    let step = scheduler.plan().expect("work");
    assert_eq!(step.seqs.iter().map(|s| s.query_len).collect::<Vec<_>>(), [1, 31]);
    assert_eq!(step.token_ids[0], 50);
}

#[test]
fn prompts_beside_decoding_sequences_have_a_budget_of_their_own() {
    let mut scheduler = Scheduler::new(config(16));
    scheduler.set_prompt_budget(3);
    let mut query_lens = Vec::new();
    scheduler.add(sequence(10..14, 4));
    for _ in 0..2 {
        let step = scheduler.plan().expect("work");
        query_lens.push(step.seqs.iter().map(|s| s.query_len).collect::<Vec<_>>());
        scheduler.complete(run(&step, |_, _| 50));
        scheduler.add(sequence(20..60, 1));
    }
    scheduler.set_prompt_budget(0);
    for _ in 0..3 {
        let step = scheduler.plan().expect("work");
        query_lens.push(step.seqs.iter().map(|s| s.query_len).collect::<Vec<_>>());
        scheduler.complete(run(&step, |_, _| 50));
    }
    // Alone it has the whole step; beside the prompt's chunk each token comes; then the decoding sequence has ended.
    assert_eq!(query_lens, [vec![4], vec![1, 3], vec![1], vec![1], vec![32]]);
}

#[test]
fn stop_tokens_end_a_sequence_and_primary_eos_has_no_reason() {
    for (token, params, end) in [
        (EOS, SamplingParams::default(), Some(None)),
        (2, SamplingParams::default(), Some(Some(2))),
        (7, SamplingParams { stop_token_ids: vec![7], ..Default::default() }, Some(Some(7))),
        (EOS, SamplingParams { ignore_eos: true, ..Default::default() }, None),
        (EOS, SamplingParams { min_tokens: 2, ..Default::default() }, None),
    ] {
        let mut scheduler = Scheduler::new(config(16));
        scheduler.add(NewSequence { params: Arc::new(params), ..sequence(10..14, 1) });
        let step = scheduler.plan().expect("work");
        let progress = scheduler.complete(run(&step, |_, _| token));
        assert_eq!(progress[0].end.map(|e| e.stop_token), end, "token {token}");
    }
}

#[test]
fn min_tokens_bans_the_stop_ids_until_then() {
    let mut scheduler = Scheduler::new(config(16));
    let params = SamplingParams { min_tokens: 1, stop_token_ids: vec![9], ..Default::default() };
    scheduler.add(NewSequence { params: Arc::new(params), ..sequence(10..14, 1) });
    let step = scheduler.plan().expect("work");
    assert_eq!(step.samples[0].banned.as_ref().map(|banned| &*banned.ids), Some([9, EOS, 2].as_slice()));
    scheduler.complete(run(&step, |_, _| 50));
    assert!(scheduler.plan().expect("work").samples[0].banned.is_none());
}

#[test]
fn a_second_step_in_flight_refers_to_the_unknown_token_by_slot() {
    let mut scheduler = Scheduler::new(config(16));
    scheduler.add(sequence(10..14, 3));
    let first = scheduler.plan().expect("work");
    let second = scheduler.plan().expect("the next token can be planned before this one is known");
    assert_eq!(second.token_ids, [-1 - first.seqs[0].slot as i32]);
    assert_eq!(second.samples[0].n_output, 1);
    let third = scheduler.plan().expect("work");
    assert!(scheduler.plan().is_none(), "three tokens are in flight, and no more are wanted");
    let mut tokens = Vec::new();
    for step in [first, second, third] {
        tokens.extend(scheduler.complete(run(&step, |_, position| position)).into_iter().map(|p| p.token_id));
    }
    assert_eq!(tokens, [4, 5, 6]);
    assert!(scheduler.is_idle());
}

#[test]
fn a_repeated_prompt_skips_its_cached_pages() {
    let mut scheduler = Scheduler::new(config(16));
    for expected in [32, 32 - 16] {
        scheduler.add(sequence(10..42, 1));
        let step = scheduler.plan().expect("work");
        assert_eq!(step.n_tokens(), expected);
        let progress = scheduler.complete(run(&step, |_, _| 50));
        assert_eq!(progress[0].prompt.as_ref().map(|p| p.n_cached), Some(32 - expected));
    }
    assert_eq!(scheduler.counters().n_prefix_hits, 16);
}

#[test]
fn prompt_logprobs_cover_every_prompt_token_once_across_chunks() {
    let mut scheduler = Scheduler::new(config(16));
    let params = SamplingParams { prompt_logprobs: Some(0), max_tokens: Some(1), ..Default::default() };
    scheduler.add(NewSequence { params: Arc::new(params), ..sequence(10..60, 1) });
    let mut seen = Vec::new();
    while let Some(step) = scheduler.plan() {
        let wanted = step.seqs[0].prompt_logprobs.clone().expect("asked for");
        let answer = |&target: &u32| TokenLogprobs { token_id: target, logprob: 0.0, rank: 1, top: Vec::new() };
        let mut output = run(&step, |_, _| 50);
        output.prompt_logprobs = vec![wanted.targets.iter().map(answer).collect()];
        for progress in scheduler.complete(output) {
            seen.extend(progress.prompt.expect("first token").logprobs.into_iter().map(|l| l.token_id));
        }
    }
    assert_eq!(seen, (11..60).collect::<Vec<u32>>());
}

/// What a test device remembers: which (sequence tokens so far) each KV slot was written for.
#[derive(Default)]
struct FakeDevice {
    /// Token last written to each KV slot.
    kv: HashMap<u32, u32>,
    last_tokens: HashMap<u32, u32>,
}

impl FakeDevice {
    /// The next token is a function of all tokens in the context, read through the block table, so
    /// that a page shared or reused wrongly changes the output.
    fn run(&mut self, step: &StepInput) -> StepOutput {
        for (i, &token) in step.token_ids.iter().enumerate() {
            let token = u32::try_from(token).unwrap_or_else(|_| self.last_tokens[&((-1 - token) as u32)]);
            self.kv.insert(step.slot_mapping[i], token);
        }
        let tokens = step.samples.iter().map(|row| {
            let seq = &step.seqs[row.seq];
            let pages = step.pages(seq);
            let context = (0..seq.context_len)
                .map(|t| self.kv[&(pages[t as usize / PAGE_SIZE] * PAGE_SIZE as u32 + t % PAGE_SIZE as u32)]);
            let token_id = next_token(context);
            self.last_tokens.insert(seq.slot, token_id);
            SampledToken { token_id, logprobs: None }
        });
        StepOutput { tokens: tokens.collect(), prompt_logprobs: Vec::new() }
    }
}

fn next_token(context: impl Iterator<Item = u32>) -> u32 {
    3 + context.fold(7u32, |hash, token| hash.wrapping_mul(31).wrapping_add(token)) % 40
}

/// The output of a sequence that runs alone.
fn alone(new: &NewSequence) -> Vec<u32> {
    let mut tokens = new.prompt.to_vec();
    let limit = (tokens.len() + new.params.max_tokens.unwrap_or(u32::MAX) as usize).min(new.max_len);
    while tokens.len() < limit {
        tokens.push(next_token(tokens.iter().copied()));
    }
    tokens.split_off(new.prompt.len())
}

proptest! {
    /// Over random arrivals, cancels and preemptions, with one or two steps in flight: every
    /// sequence gets the tokens it would get alone, and all pages come back.
    #[test]
    fn sequences_get_their_tokens_and_pages_come_back(
        n_pages in 6usize..14,
        max_in_flight in 1usize..3,
        arrivals in proptest::collection::vec((1u32..70, 1u32..40, 0u32..3, 0usize..6, proptest::option::of(0usize..30)), 1..12),
    ) {
        let mut scheduler = Scheduler::new(config(n_pages));
        let mut device = FakeDevice::default();
        let mut outputs = VecDeque::new();
        let mut expected: HashMap<SeqId, (Vec<u32>, Option<usize>)> = HashMap::new();
        let mut got: HashMap<SeqId, Vec<u32>> = HashMap::new();
        let mut pending: VecDeque<_> = arrivals.into();
        let mut turn = 0usize;
        while !pending.is_empty() || !scheduler.is_idle() {
            turn += 1;
            prop_assert!(turn < 20_000, "the scheduler makes no progress");
            if let Some(&(len, max_tokens, family, gap, cancel_at)) = pending.front()
                && (turn.is_multiple_of(gap + 1) || scheduler.is_idle())
            {
                pending.pop_front();
                // Few families of prompts, so that prefixes are shared.
                let new = sequence((0..len).map(|t| 100 + family + t / 40), max_tokens);
                let reference = alone(&new);
                let id = scheduler.add(new);
                expected.insert(id, (reference, cancel_at));
            }
            while outputs.len() < max_in_flight && let Some(step) = scheduler.plan() {
                prop_assert!(step.n_tokens() <= 32 && step.seqs.len() <= 4);
                outputs.push_back(device.run(&step));
            }
            if let Some(output) = outputs.pop_front() {
                for progress in scheduler.complete(output) {
                    let tokens = got.entry(progress.id).or_default();
                    tokens.push(progress.token_id);
                    if expected[&progress.id].1.is_some_and(|n| tokens.len() > n) {
                        scheduler.abort(progress.id);
                        expected.get_mut(&progress.id).expect("known").0.truncate(tokens.len());
                    }
                }
            }
        }
        prop_assert_eq!(scheduler.pool().n_free(), n_pages);
        prop_assert_eq!(scheduler.free_slots.len(), 4);
        for (id, (reference, _)) in expected {
            prop_assert_eq!(got.get(&id), Some(&reference));
        }
    }
}

#[test]
fn bad_words_ban_their_last_token_where_the_rest_has_come() {
    let mut scheduler = Scheduler::new(config(16));
    let bad_words: Arc<[Vec<u32>]> = [vec![7], vec![50, 51], vec![52, 50, 8]].into();
    scheduler.add(NewSequence { bad_words, ..sequence([10, 50], 9) });
    let mut bans = Vec::new();
    for token in [52, 50, 9] {
        let step = scheduler.plan().expect("work");
        assert!(scheduler.plan().is_none(), "the next bans depend on the token in flight");
        bans.push(step.samples[0].banned.as_ref().expect("a ban").ids.to_vec());
        scheduler.complete(run(&step, |_, _| token));
    }
    // The prompt's own end does not count.
    assert_eq!(bans, [vec![7], vec![7], vec![7, 51, 8]]);
}

#[test]
fn a_grammar_waits_for_each_token_and_ends_its_sequence() {
    use crate::{OutputForm, grammar::GrammarCompiler, text::Tokenizer};
    let compiler = GrammarCompiler::new(&Tokenizer::byte_level(256).expect("valid"), &[]);
    let grammar = compiler.compile(&OutputForm::Choice(vec!["ab".into()]).into()).expect("valid");
    let mut scheduler = Scheduler::new(config(16));
    scheduler.add(NewSequence { grammar: Some(grammar.fork()), ..sequence(10..14, 9) });
    let mut end = None;
    for token in *b"ab" {
        let step = scheduler.plan().expect("work");
        assert!(scheduler.plan().is_none());
        let mask = step.samples[0].banned.as_ref().and_then(|banned| banned.mask.clone()).expect("a mask");
        let allowed: Vec<u32> = (0..256).filter(|&id| mask.allows(id)).collect();
        assert_eq!(allowed.first(), Some(&u32::from(token)));
        end = scheduler.complete(run(&step, |_, _| u32::from(token)))[0].end;
    }
    assert_eq!(end, Some(SequenceEnd { reason: FinishReason::Stop, stop_token: None, shows_token: true }));
    assert!(scheduler.is_idle());

    scheduler.add(NewSequence { grammar: Some(grammar), ..sequence(10..14, 9) });
    let step = scheduler.plan().expect("work");
    let progress = scheduler.complete(run(&step, |_, _| u32::from(b'x')));
    assert!(progress[0].grammar_error.is_some() && scheduler.is_idle());
}

#[test]
fn a_thinking_budget_forces_its_end_and_waits_only_near_it() {
    let budget = ThinkingBudget { n_tokens: 3, start: vec![60], end: vec![61, 62], begins_inside: false };
    let params = SamplingParams { thinking_budget: Some(budget), max_tokens: Some(8), ..Default::default() };
    let mut scheduler = Scheduler::new(config(16));
    scheduler.add(NewSequence { params: Arc::new(params), ..sequence([10, 60], 8) });
    let mut forced = Vec::new();
    let mut runs_ahead = Vec::new();
    let mut steps = std::collections::VecDeque::new();
    steps.extend(scheduler.plan());
    while let Some(step) = steps.pop_front() {
        let ahead = scheduler.plan();
        runs_ahead.push(ahead.is_some());
        steps.extend(ahead);
        let mask = step.samples[0].banned.as_ref().and_then(|banned| banned.mask.clone());
        let only = mask.map(|mask| (0..100).filter(|&id| mask.allows(id)).collect::<Vec<u32>>());
        let token = only.as_ref().map_or(50, |only| only[0]);
        forced.push(only);
        scheduler.complete(run(&step, |_, _| token));
        if steps.is_empty() {
            steps.extend(scheduler.plan());
        }
    }
    let [end, rest] = [61, 62].map(|id| Some(vec![id]));
    assert_eq!(forced, [None, None, None, end, rest, None, None, None]);
    // The step that decides whether the budget is used up, those of the end, and the last run by themselves.
    assert_eq!(runs_ahead, [true, true, false, false, false, true, true, false]);
    assert!(scheduler.is_idle());
}

#[test]
fn lower_priorities_go_first_and_keep_their_pages() {
    let mut scheduler = Scheduler::new(SchedulerConfig { max_num_seqs: 2, ..config(6) });
    let with = |priority: i64| NewSequence { priority, ..sequence(10..26, 70) };
    let [late, first, second] = [5, -1, 0].map(|priority| scheduler.add(with(priority)));
    let mut preempted = Vec::new();
    let mut order = Vec::new();
    while let Some(step) = scheduler.plan() {
        order.extend(scheduler.take_admitted());
        preempted.push(scheduler.counters().n_preemptions);
        scheduler.complete(run(&step, |_, position| 100 + position));
    }
    assert_eq!(order, [first, second, late]);
    assert!(preempted.iter().any(|&n| n > 0), "the pages are too few for two");
    assert_eq!(scheduler.pool().n_free(), 6);
}
