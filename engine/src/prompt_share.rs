//! [`PromptShare`]: how many prompt tokens may go along in a step that also decodes.
//!
//! A prompt chunk holds up every sequence that decodes in its step. On a GPU the rows of such a step are bounded, by the
//! number of prompts that wait. On a host a chunk of a few hundred tokens takes ten times as long as the decoding itself,
//! so chunks are cut to what keeps the step below [`MAX_STRETCH`] times the time that decoding alone takes. Both times
//! are measured; steps without decoding sequences hold nobody up and are not cut.

use std::time::Duration;

use crate::{executors::MixedSteps, scheduler::Demand};

/// How much longer a step may take than one that only decodes. Below 3, so that the bound holds for the slow ones too.
const MAX_STRETCH: f64 = 2.4;
/// Fewer tokens cost nearly as much as these: prompts must get on.
const MIN_TOKENS: usize = 8;
/// Mixed steps after which one only decodes, so that the measured time is that of the present batch.
const MAX_MIXED_STEPS: u32 = 16;

/// Fewest prompt tokens that rows are bounded to, however many sequences decode.
const MIN_PROMPT_ROWS: usize = 128;
/// Steps of the fewest rows whose tokens may wait before a step gets more rows.
const SHORT_QUEUE_STEPS: usize = 2;

/// How an executor's prompt chunks are cut.
#[derive(Debug)]
pub(crate) enum PromptShare {
    /// As [`MixedSteps::Rows`].
    Rows(&'static [(usize, usize)]),
    /// As [`MixedSteps::Timed`].
    Timed(TimedShare),
}

impl PromptShare {
    pub(crate) fn new(mixed_steps: MixedSteps) -> Self {
        match mixed_steps {
            MixedSteps::Rows(rows) => Self::Rows(rows),
            MixedSteps::Timed => Self::Timed(TimedShare::default()),
        }
    }

    /// Most prompt tokens of the next step, if it decodes.
    pub(crate) fn budget(&self, demand: Demand) -> usize {
        match self {
            Self::Rows(rows) => {
                // Short prompts that a few steps of the fewest rows take in are no queue.
                let is_short = rows.first().is_some_and(|&(_, n)| demand.n_prompt_tokens <= SHORT_QUEUE_STEPS * n);
                let n_prompts = if is_short { 1 } else { demand.n_prompts.max(1) };
                let by_queue = rows.iter().rev().find(|&&(from, _)| from <= n_prompts);
                by_queue.map_or(usize::MAX, |(_, n)| n.saturating_sub(demand.n_decoding).max(MIN_PROMPT_ROWS))
            }
            Self::Timed(share) => share.budget(),
        }
    }

    /// A step of `n_decoding` sequences and `n_prompt` prompt tokens took so long.
    pub(crate) fn ran(&mut self, took: Duration, n_decoding: usize, n_prompt: usize) {
        if let Self::Timed(share) = self {
            share.ran(took, n_decoding, n_prompt);
        }
    }
}

/// The measured times and what follows from them.
#[derive(Debug)]
pub(crate) struct TimedShare {
    /// Of the last step that only decoded.
    decode: Option<Duration>,
    /// Mixed steps since.
    n_mixed: u32,
    /// Prompt tokens that fit.
    budget: usize,
}

impl Default for TimedShare {
    fn default() -> Self {
        Self { decode: None, n_mixed: 0, budget: MIN_TOKENS }
    }
}

impl TimedShare {
    /// Most prompt tokens of the next step, if it decodes.
    fn budget(&self) -> usize {
        if self.decode.is_none() || self.n_mixed >= MAX_MIXED_STEPS { 0 } else { self.budget }
    }

    fn ran(&mut self, took: Duration, n_decoding: usize, n_prompt: usize) {
        if n_decoding == 0 {
            return;
        }
        if n_prompt == 0 {
            self.decode = Some(took);
            self.n_mixed = 0;
            return;
        }
        self.n_mixed += 1;
        let Some(decode) = self.decode else {
            return;
        };
        // The rest of a prompt says little of how long a whole chunk takes.
        if n_prompt >= self.budget.div_ceil(2) {
            let allowed = decode.as_secs_f64() * (MAX_STRETCH - 1.0);
            let spent = took.saturating_sub(decode).as_secs_f64().max(1e-9);
            let fits = (n_prompt as f64 * allowed / spent) as usize;
            self.budget = fits.clamp(MIN_TOKENS, 2 * self.budget);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host on which a decoding sequence costs 2 ms and a prompt token so many.
    fn run_steps(share: &mut TimedShare, n_steps: usize, n_decoding: usize, ms_per_prompt_token: f64) -> Vec<f64> {
        let decode = 2.0 * n_decoding as f64;
        let steps = (0..n_steps).map(|_| {
            let n_prompt = share.budget();
            let took = decode + ms_per_prompt_token * n_prompt as f64;
            share.ran(Duration::from_secs_f64(took / 1e3), n_decoding, n_prompt);
            took / decode
        });
        steps.collect()
    }

    #[test]
    fn more_waiting_prompts_get_more_rows() {
        let share = PromptShare::new(MixedSteps::Rows(&[(1, 256), (2, 512), (4, 1024)]));
        let budget =
            |n_decoding, n_prompts, n_prompt_tokens| share.budget(Demand { n_decoding, n_prompts, n_prompt_tokens });
        assert_eq!([1, 2, 3, 4, 9].map(|n_prompts| budget(16, n_prompts, 5000)), [240, 496, 496, 1008, 1008]);
        assert_eq!(budget(16, 5, 400), 240, "short prompts are no queue");
        assert_eq!(budget(250, 1, 5000), MIN_PROMPT_ROWS, "prompts get on beside many decoding sequences");
        assert_eq!(budget(0, 0, 0), 256);
    }

    #[test]
    fn steps_are_stretched_as_far_as_is_allowed_and_no_further() {
        let mut share = TimedShare::default();
        assert_eq!(share.budget(), 0, "the first step is measured");
        let stretches = run_steps(&mut share, 64, 16, 1.4);
        assert!(stretches.iter().all(|&it| it < 2.5), "{stretches:?}");
        assert!(share.budget() > 28 && share.budget() <= 32, "{}", share.budget());
        // Attention to a longer context makes tokens dearer.
        let stretches = run_steps(&mut share, 64, 16, 2.8);
        assert!(stretches[1..].iter().all(|&it| it < 2.5), "{stretches:?}");
        assert!(share.budget() > 14 && share.budget() <= 16, "{}", share.budget());
    }

    #[test]
    fn a_growing_batch_is_measured_again() {
        let mut share = TimedShare::default();
        run_steps(&mut share, 64, 1, 1.4);
        assert_eq!(share.budget(), MIN_TOKENS);
        let stretches = run_steps(&mut share, 64, 16, 1.4);
        assert!(share.budget() > 28, "{}", share.budget());
        assert!(stretches.contains(&1.0));
    }

    #[test]
    fn the_rest_of_a_prompt_and_steps_without_decoding_change_nothing() {
        let mut share = TimedShare::default();
        run_steps(&mut share, 64, 16, 1.4);
        let before = share.budget();
        share.ran(Duration::from_millis(300), 16, 1);
        share.ran(Duration::from_millis(300), 0, 512);
        assert_eq!(share.budget(), before);
    }
}
