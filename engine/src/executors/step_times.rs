//! [`step_times`]: how long an executor takes for steps of chosen shapes, without a scheduler or a server around it.

use std::{fmt, path::Path, str::FromStr, sync::Arc, time::Instant};

use super::{Capacity, Executor, create};
use crate::{
    EngineConfig, Error, SamplingParams,
    models::Model,
    step::{PAGE_SIZE, SampleRow, StepInput, StepSeq},
};

/// Tokens whose keys and values fill the cache before the first load.
const N_CONTEXT: usize = 512;
/// Steps run before the clock starts.
const N_WARMUP: usize = 4;

/// The sequences of a step, for example `128@280` (128 sequences that decode at 280 tokens), `16@64..640` (at contexts
/// spread evenly), `128@280+64/64` (and a whole prompt of 64 tokens) or `2048/8192` (the last 2,048 tokens of 8,192).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepLoad {
    text: String,
    /// Query and context length of each sequence, decoding ones first, of these the longest first.
    seqs: Vec<(u32, u32)>,
}

impl fmt::Display for StepLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for StepLoad {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |part: &str| match part.parse::<u32>() {
            Ok(n) if n > 0 => Ok(n),
            _ => Err(format!("`{part}` is no positive number; write for example 16@64..640 or 128@280+64/64")),
        };
        let mut seqs = Vec::new();
        for part in text.split('+') {
            if let Some((query, context)) = part.split_once('/') {
                let (query, context) = (number(query)?, number(context)?);
                if query > context {
                    return Err(format!("`{part}`: a prompt chunk is not longer than its context"));
                }
                seqs.push((query, context));
                continue;
            }
            let (n, contexts) = part.split_once('@').ok_or_else(|| format!("`{part}` has neither @ nor /"))?;
            let n = number(n)?;
            let (low, high) = contexts.split_once("..").unwrap_or((contexts, contexts));
            let (low, high) = (number(low)?, number(high)?);
            seqs.extend((0..n).map(|i| (1, low + (high.max(low) - low) * i / (n - 1).max(1))));
        }
        seqs.sort_by_key(|&(query, context)| (query != 1, std::cmp::Reverse(context)));
        Ok(Self { text: text.to_owned(), seqs })
    }
}

/// How long a step took.
#[derive(Debug, Clone)]
pub struct StepTime {
    /// Its shape.
    pub load: StepLoad,
    /// Milliseconds from step to step, with as many in flight as the executor takes.
    pub milliseconds: f64,
}

/// Loads the model at `source` and runs each of `loads` `n_steps` times, greedy, every sequence with pages of its own.
///
/// # Errors
/// Those of loading; [`Error::Config`] naming the load that does not fit.
pub fn step_times(
    source: &Path,
    config: &EngineConfig,
    loads: &[StepLoad],
    n_steps: usize,
) -> Result<Vec<StepTime>, Error> {
    let model = Model::open(source, config.load_format, config.seed)?;
    let mut executor = create(&model.spec, &*model.weights, config)?;
    fill_cache(&mut *executor, model.spec.vocab_size)?;
    loads.iter().map(|load| time(&mut *executor, load, model.spec.vocab_size, n_steps)).collect()
}

/// Puts keys and values as they come in use into the cache: multiplying zeros takes less power, so that a device at its
/// limit would be faster than it is in use.
fn fill_cache(executor: &mut dyn Executor, vocab: usize) -> Result<(), Error> {
    let &Capacity { n_pages, max_num_batched_tokens, max_model_len, .. } = executor.capacity();
    let n_tokens = N_CONTEXT.min(max_num_batched_tokens).min(max_model_len).min(n_pages * PAGE_SIZE) as u32;
    executor.fill_cache(step(&StepLoad { text: String::new(), seqs: vec![(n_tokens, n_tokens)] }, vocab))
}

fn time(executor: &mut dyn Executor, load: &StepLoad, vocab: usize, n_steps: usize) -> Result<StepTime, Error> {
    let step = step(load, vocab);
    let capacity = executor.capacity();
    let in_flight = capacity.max_in_flight;
    let longest = step.seqs.iter().map(|seq| seq.context_len as usize).max().unwrap_or(0);
    if step.block_tables.len() > capacity.n_pages
        || longest > capacity.max_model_len
        || step.seqs.len() > capacity.max_num_seqs
        || step.n_tokens() > capacity.max_num_batched_tokens
    {
        return Err(Error::config("--load", format!("`{load}` does not fit: {capacity:?}")));
    }
    let mut run = |n: usize| -> Result<(), Error> {
        for i in 0..n + in_flight {
            if i >= in_flight {
                executor.collect()?;
            }
            if i < n {
                executor.launch(step.clone())?;
            }
        }
        Ok(())
    };
    run(N_WARMUP)?;
    let started = Instant::now();
    run(n_steps)?;
    let milliseconds = started.elapsed().as_secs_f64() * 1e3 / n_steps as f64;
    Ok(StepTime { load: load.clone(), milliseconds })
}

/// The step of `load`.
fn step(load: &StepLoad, vocab: usize) -> StepInput {
    let params = Arc::new(SamplingParams { temperature: 0.0, ..SamplingParams::default() });
    let mut step = StepInput::default();
    for (i, &(query_len, context_len)) in load.seqs.iter().enumerate() {
        let query_start = step.token_ids.len() as u32;
        let first_page = step.block_tables.len();
        for position in context_len - query_len..context_len {
            step.token_ids.push(((i * 7919 + position as usize * 104_729) % vocab) as i32);
            step.positions.push(position);
            step.slot_mapping.push((first_page * PAGE_SIZE) as u32 + position);
        }
        let end = first_page + (context_len as usize).div_ceil(PAGE_SIZE);
        step.block_tables.extend(first_page as u32..end as u32);
        step.seqs.push(StepSeq {
            slot: i as u32,
            query_start,
            query_len,
            context_len,
            block_table: first_page..end,
            prompt_logprobs: None,
        });
        step.samples.push(SampleRow {
            seq: i,
            seq_id: i as u64,
            params: params.clone(),
            seed: 0,
            n_output: 0,
            banned: None,
            history: None,
        });
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_read() {
        let seqs = |text: &str| text.parse::<StepLoad>().map(|load| load.seqs);
        assert_eq!(seqs("2@7"), Ok(vec![(1, 7), (1, 7)]));
        assert_eq!(seqs("3@10..20"), Ok(vec![(1, 20), (1, 15), (1, 10)]));
        assert_eq!(seqs("1@10..20"), Ok(vec![(1, 10)]));
        assert_eq!(seqs("8/16+1@5"), Ok(vec![(1, 5), (8, 16)]));
        for wrong in ["", "4", "0@5", "4@", "9/8", "a@5", "4@5+"] {
            assert!(seqs(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn steps_hold_what_their_load_says() {
        let step = step(&"8/16+2@17".parse().expect("a load"), 100);
        assert_eq!(step.positions[..2], [16, 16]);
        assert_eq!(step.slot_mapping[..3], [16, 48, 64 + 8]);
        assert_eq!((step.n_tokens(), step.block_tables.len(), step.samples.len()), (10, 5, 3));
    }
}
