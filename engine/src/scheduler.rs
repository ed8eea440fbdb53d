//! Which tokens run in the next step: continuous batching under a token budget, chunked prefill,
//! preemption by recompute, first come first served or by priority. Pure: no tensors, no clock, no IO.
//!
//! A step first takes one token of every decoding sequence, then prompt chunks of running
//! sequences, then new sequences, until the budget is spent: a smaller one, if the caller has set it,
//! for prompts beside decoding sequences. When pages run out, the sequence that
//! is last in the order of (priority, arrival) gives its pages back and is computed again later.

use std::{
    cmp::Reverse,
    collections::{HashMap, VecDeque},
};

use crate::{
    kv_pool::KvPool,
    request::TokenLogprobs,
    sequence::{NewSequence, SeqId, Sequence, SequenceEnd},
    step::{PAGE_SIZE, PromptLogprobs, SampleRow, StepInput, StepOutput, StepSeq, TokenHistory},
};

/// Pages kept free for each running sequence when a new one is admitted, up to a small share of all.
const RESERVED_PAGES: usize = 8;

/// Limits of a [`Scheduler`].
#[derive(Debug, Clone)]
pub struct SchedulerConfig {
    /// KV pages.
    pub n_pages: usize,
    /// Most sequences in a step.
    pub max_num_seqs: usize,
    /// Most tokens in a step.
    pub max_num_batched_tokens: usize,
    /// Reuse KV pages of equal prefixes.
    pub enable_prefix_caching: bool,
}

/// What a step has to choose from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Demand {
    /// Sequences that would decode.
    pub n_decoding: usize,
    /// Those whose prompts are not computed, in the batch or waiting for it.
    pub n_prompts: usize,
    /// What is not computed of them.
    pub n_prompt_tokens: usize,
}

impl Demand {
    fn add_prompt(&mut self, n_tokens: usize) {
        self.n_prompts += 1;
        self.n_prompt_tokens += n_tokens;
    }
}

/// Counters since start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerCounters {
    /// Prompt tokens looked up in the prefix cache.
    pub n_prefix_queries: u64,
    /// Prompt tokens found there.
    pub n_prefix_hits: u64,
    /// Sequences put back to recompute.
    pub n_preemptions: u64,
    /// Prompt tokens computed.
    pub n_prompt_tokens: u64,
    /// Tokens sampled and delivered.
    pub n_generation_tokens: u64,
}

/// News of one sequence after a step.
#[derive(Debug)]
pub struct Progress {
    /// Which sequence.
    pub id: SeqId,
    /// With the sequence's first token: what its prompt gave.
    pub prompt: Option<PromptProgress>,
    /// The new token.
    pub token_id: u32,
    /// Its log-probabilities, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Set if it was the last; the sequence is then forgotten.
    pub end: Option<SequenceEnd>,
    /// Why its grammar could not go on, if that is what ended it.
    pub grammar_error: Option<String>,
}

/// What a prompt gave.
#[derive(Debug)]
pub struct PromptProgress {
    /// Tokens that came from the prefix cache.
    pub n_cached: usize,
    /// Log-probabilities of prompt tokens 1.., if asked for.
    pub logprobs: Vec<TokenLogprobs>,
}

/// A sequence's part of a step in flight.
#[derive(Debug)]
struct InFlight {
    id: SeqId,
    samples: bool,
    has_prompt_logprobs: bool,
    /// The sequence's preemptions when the step was planned.
    n_preemptions: u32,
}

/// All sequences and their pages.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: KvPool,
    seqs: HashMap<SeqId, Sequence>,
    /// In order of (priority, arrival).
    waiting: VecDeque<SeqId>,
    /// In order of (priority, arrival).
    running: Vec<SeqId>,
    /// Came into the batch for the first time and were not asked for yet.
    admitted: Vec<SeqId>,
    free_slots: Vec<u32>,
    /// Most prompt tokens beside decoding sequences.
    prompt_budget: usize,
    in_flight: VecDeque<Vec<InFlight>>,
    next_id: SeqId,
    counters: SchedulerCounters,
}

impl Scheduler {
    /// A scheduler with no sequences.
    pub fn new(config: SchedulerConfig) -> Self {
        Self {
            pool: KvPool::new(config.n_pages, config.enable_prefix_caching),
            seqs: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            admitted: Vec::new(),
            free_slots: (0..config.max_num_seqs as u32).rev().collect(),
            prompt_budget: usize::MAX,
            in_flight: VecDeque::new(),
            next_id: 0,
            counters: SchedulerCounters::default(),
            config,
        }
    }

    /// From now on a step in which sequences decode takes at most so many prompt tokens along.
    pub fn set_prompt_budget(&mut self, n_tokens: usize) {
        self.prompt_budget = n_tokens;
    }

    /// Queues a sequence. `new.max_len` must not exceed what all pages together hold.
    pub fn add(&mut self, new: NewSequence) -> SeqId {
        debug_assert!(!new.prompt.is_empty() && new.prompt.len() < new.max_len);
        debug_assert!(new.max_len <= self.config.n_pages * PAGE_SIZE);
        let id = self.next_id;
        self.next_id += 1;
        self.seqs.insert(id, Sequence::new(new));
        self.queue(id);
        id
    }

    /// Puts a sequence to its place among those that wait.
    fn queue(&mut self, id: SeqId) {
        let rank = |id: SeqId| (self.seqs[&id].new.priority, id);
        let at = self.waiting.partition_point(|&other| rank(other) < rank(id));
        self.waiting.insert(at, id);
    }

    /// Forgets a sequence and frees its pages; its tokens in flight are dropped when they come.
    /// Unknown ids are ignored.
    pub fn abort(&mut self, id: SeqId) {
        if let Some(mut seq) = self.seqs.remove(&id) {
            self.waiting.retain(|&w| w != id);
            self.running.retain(|&r| r != id);
            self.free_slots.extend(seq.slot.take());
            self.pool.release(&mut seq.table);
        }
    }

    /// The sequences that came into the batch for the first time since the last call.
    pub fn take_admitted(&mut self) -> Vec<SeqId> {
        std::mem::take(&mut self.admitted)
    }

    /// Whether no sequence is left and no step is in flight.
    pub fn is_idle(&self) -> bool {
        self.seqs.is_empty() && self.in_flight.is_empty()
    }

    /// Steps planned and not completed.
    pub fn n_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Sequences in the batch.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences waiting for a place in the batch.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// What a step planned now would have to choose from.
    pub fn demand(&self) -> Demand {
        let mut demand = Demand::default();
        let to_schedule = |id: &SeqId| self.seqs[id].n_to_schedule();
        for n in self.running.iter().map(to_schedule).filter(|&n| n > 0) {
            match n {
                1 => demand.n_decoding += 1,
                _ => demand.add_prompt(n),
            }
        }
        self.waiting.iter().map(to_schedule).for_each(|n| demand.add_prompt(n));
        demand
    }

    /// The page pool.
    pub fn pool(&self) -> &KvPool {
        &self.pool
    }

    /// Counters since start.
    pub fn counters(&self) -> SchedulerCounters {
        self.counters
    }

    /// Plans the next step; `None` if nothing can run before a step in flight completes.
    pub fn plan(&mut self) -> Option<StepInput> {
        let mut budget = self.config.max_num_batched_tokens;
        let mut planned: Vec<(SeqId, usize)> = Vec::new();
        let preempted = self.plan_running(&mut budget, &mut planned);
        if !preempted {
            self.plan_waiting(&mut budget, &mut planned);
        }
        if planned.is_empty() {
            return None;
        }
        // Executors want decoding sequences first, those of the longest contexts ahead: a device that begins with the
        // shortest ends with a few long ones.
        let context = |id: SeqId| self.seqs[&id].n_scheduled;
        planned.sort_by_key(|&(id, n_tokens)| (n_tokens != 1, Reverse(if n_tokens == 1 { context(id) } else { 0 })));
        Some(self.build(&planned))
    }

    /// Takes tokens of running sequences, in their order. Returns whether any had to be preempted.
    fn plan_running(&mut self, budget: &mut usize, planned: &mut Vec<(SeqId, usize)>) -> bool {
        let mut preempted = false;
        // Decoding sequences before prompt chunks, so that long prompts never hold up a token.
        for decoding in [true, false] {
            let mut i = 0;
            while i < self.running.len() && *budget > 0 {
                let id = self.running[i];
                i += 1;
                let n_to_schedule = self.seqs[&id].n_to_schedule();
                if n_to_schedule == 0 || (n_to_schedule == 1) != decoding {
                    continue;
                }
                let n_tokens = n_to_schedule.min(*budget);
                let holds = loop {
                    let seq = self.seqs.get_mut(&id).expect("running sequences are known");
                    if self.pool.grow(&mut seq.table, seq.n_scheduled + n_tokens) {
                        break true;
                    }
                    preempted = true;
                    let victim = *self.running.last().expect("this sequence is running");
                    if let Some(at) = planned.iter().position(|&(p, _)| p == victim) {
                        *budget += planned.remove(at).1;
                    }
                    self.preempt_last();
                    if victim == id {
                        break false;
                    }
                };
                if holds {
                    *budget -= n_tokens;
                    planned.push((id, n_tokens));
                }
            }
            if decoding && !planned.is_empty() {
                *budget = (*budget).min(self.prompt_budget);
            }
        }
        preempted
    }

    /// Admits waiting sequences, in their order.
    fn plan_waiting(&mut self, budget: &mut usize, planned: &mut Vec<(SeqId, usize)>) {
        while *budget > 0
            && !self.free_slots.is_empty()
            && let Some(&id) = self.waiting.front()
        {
            let seq = self.seqs.get_mut(&id).expect("waiting sequences are known");
            if seq.n_in_flight > 0 {
                // Preempted while its next token was being sampled: that token must be known first.
                break;
            }
            // Cached pages hold no logits, so prompt log-probabilities need the whole prompt computed.
            let use_cache = seq.new.params.prompt_logprobs.is_none();
            if use_cache {
                let salt = seq.new.cache_salt.as_deref();
                seq.n_scheduled = self.pool.acquire_prefix(&mut seq.table, &seq.tokens, salt);
            }
            let n_cached = seq.n_scheduled;
            let n_tokens = (seq.tokens.len() - n_cached).min(*budget);
            // Admit only what can be computed whole, and only if the sequences already running keep room to
            // grow: a prompt that is preempted is work lost.
            let n_pages = seq.tokens.len().div_ceil(PAGE_SIZE) - seq.table.pages().len();
            let reserve = (self.running.len() * RESERVED_PAGES).min(self.config.n_pages / 32);
            if n_pages + reserve > self.pool.n_free() || !self.pool.grow(&mut seq.table, seq.tokens.len()) {
                self.pool.release(&mut seq.table);
                seq.n_scheduled = 0;
                break;
            }
            if use_cache {
                self.counters.n_prefix_queries += seq.tokens.len() as u64;
                self.counters.n_prefix_hits += n_cached as u64;
            }
            if seq.n_cached.is_none() {
                seq.n_cached = Some(n_cached);
                self.admitted.push(id);
            }
            seq.slot = self.free_slots.pop();
            self.waiting.pop_front();
            let rank = |id: SeqId| (self.seqs[&id].new.priority, id);
            let at = self.running.partition_point(|&other| rank(other) < rank(id));
            self.running.insert(at, id);
            *budget -= n_tokens;
            planned.push((id, n_tokens));
        }
    }

    /// Puts the last of the running sequences back to the queue.
    fn preempt_last(&mut self) {
        let id = self.running.pop().expect("a sequence is running");
        let seq = self.seqs.get_mut(&id).expect("running sequences are known");
        self.pool.release(&mut seq.table);
        self.free_slots.extend(seq.slot.take());
        seq.n_scheduled = 0;
        seq.n_preemptions += 1;
        seq.prompt_logprobs.clear();
        self.queue(id);
        self.counters.n_preemptions += 1;
    }

    fn build(&mut self, planned: &[(SeqId, usize)]) -> StepInput {
        let mut step = StepInput::default();
        let mut in_flight = Vec::with_capacity(planned.len());
        for &(id, n_tokens) in planned {
            let seq = self.seqs.get_mut(&id).expect("planned sequences are known");
            let slot = seq.slot.expect("planned sequences have a slot");
            let (start, end) = (seq.n_scheduled, seq.n_scheduled + n_tokens);
            let query_start = step.token_ids.len() as u32;
            for position in start..end {
                let token = seq.tokens.get(position).map_or(-1 - slot as i32, |&t| t as i32);
                step.token_ids.push(token);
                step.positions.push(position as u32);
                let page = seq.table.pages()[position / PAGE_SIZE];
                step.slot_mapping.push(page * PAGE_SIZE as u32 + (position % PAGE_SIZE) as u32);
            }
            let n_prompt = seq.new.prompt.len();
            self.counters.n_prompt_tokens += end.min(n_prompt).saturating_sub(start) as u64;
            let wants_prompt = seq.new.params.prompt_logprobs.filter(|_| seq.n_output() == 0 && start + 1 < n_prompt);
            let block_start = step.block_tables.len();
            step.block_tables.extend_from_slice(&seq.table.pages()[..end.div_ceil(PAGE_SIZE)]);
            step.seqs.push(StepSeq {
                slot,
                query_start,
                query_len: n_tokens as u32,
                context_len: end as u32,
                block_table: block_start..step.block_tables.len(),
                prompt_logprobs: wants_prompt.map(|n_top| PromptLogprobs {
                    n_top,
                    targets: seq.new.prompt[start + 1..(end + 1).min(n_prompt)].to_vec(),
                }),
            });
            let samples = end == seq.virtual_len();
            if samples {
                let params = seq.new.params.clone();
                step.samples.push(SampleRow {
                    seq: step.seqs.len() - 1,
                    seq_id: id,
                    seed: seq.new.seed,
                    n_output: seq.n_output() as u32,
                    banned: seq.banned(),
                    history: params.has_penalties().then(|| TokenHistory {
                        prompt: seq.new.prompt.clone(),
                        output: seq.tokens[n_prompt..].to_vec(),
                    }),
                    params,
                });
                seq.n_in_flight += 1;
            }
            seq.n_scheduled = end;
            in_flight.push(InFlight {
                id,
                samples,
                has_prompt_logprobs: wants_prompt.is_some(),
                n_preemptions: seq.n_preemptions,
            });
        }
        self.in_flight.push_back(in_flight);
        step
    }

    /// Takes in the output of the oldest step in flight.
    pub fn complete(&mut self, output: StepOutput) -> Vec<Progress> {
        let planned = self.in_flight.pop_front().expect("a step is in flight");
        let mut tokens = output.tokens.into_iter();
        let mut prompt_logprobs = output.prompt_logprobs.into_iter();
        let mut progress = Vec::new();
        for InFlight { id, samples, has_prompt_logprobs, n_preemptions } in planned {
            let prompt_part = has_prompt_logprobs.then(|| prompt_logprobs.next().unwrap_or_default());
            let sampled = samples.then(|| tokens.next().expect("one token per sampled row"));
            let Some(seq) = self.seqs.get_mut(&id) else {
                continue;
            };
            // What was computed before a preemption is computed again.
            if n_preemptions == seq.n_preemptions {
                seq.prompt_logprobs.extend(prompt_part.into_iter().flatten());
            }
            let end = sampled.map(|token| {
                let is_first = seq.tokens.len() == seq.new.prompt.len();
                let end = seq.push(token.token_id);
                progress.push(Progress {
                    id,
                    prompt: is_first.then(|| PromptProgress {
                        n_cached: seq.n_cached.unwrap_or(0),
                        logprobs: std::mem::take(&mut seq.prompt_logprobs),
                    }),
                    token_id: token.token_id,
                    logprobs: token.logprobs,
                    end,
                    grammar_error: seq.grammar_error.take(),
                });
                self.counters.n_generation_tokens += 1;
                end
            });
            let n_known = seq.n_scheduled.min(seq.tokens.len());
            self.pool.register(&mut seq.table, &seq.tokens, n_known);
            if end.flatten().is_some() {
                self.abort(id);
            }
        }
        progress
    }
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
