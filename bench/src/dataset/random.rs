//! Owns the random dataset: token-id prompts of exact lengths, for measuring engines.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{DataOptions, Dataset, Prompt, Sample};
use crate::lengths::{self, Bounds};
use crate::{Error, Result};

/// `--dataset random`: random prompts whose lengths, and the answers' lengths, follow `--length-distribution`.
pub struct Random;

impl Dataset for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn format(&self) -> &'static str {
        "nothing: it takes no file"
    }

    fn sends_token_ids(&self) -> bool {
        true
    }

    fn parse(&self, _text: &str) -> Result<Vec<Prompt>, (usize, String)> {
        Err((1, "random prompts are not read from a file".into()))
    }

    fn generate(&self, n: usize, options: &DataOptions) -> Option<Result<Vec<Sample>>> {
        Some(samples(n, options))
    }
}

fn samples(n: usize, options: &DataOptions) -> Result<Vec<Sample>> {
    if options.path.is_some() {
        return Err(Error::flag("--dataset-path", "--dataset random takes no file"));
    }
    let vocab_size = match (options.random_vocab_size, &options.tokenizer) {
        (Some(size), _) => size,
        (None, Some(tokenizer)) => tokenizer.get_vocab_size(false) as u32,
        (None, None) => {
            return Err(Error::flag("--random-vocab-size", "--dataset random needs it, or --tokenizer-path"));
        }
    };
    if vocab_size < 2 {
        return Err(Error::flag("--random-vocab-size", "must be at least 2"));
    }
    let own_bounds = matches!(options.length_distribution.as_str(), "openqa" | "longalpaca");
    if options.max_prompt_length >= 131_072 && !own_bounds {
        return Err(Error::flag("--max-prompt-length", "--dataset random needs it, in tokens"));
    }
    let shape = lengths::load_shape(&options.length_distribution, bounds(options))?;
    let mut rng = StdRng::seed_from_u64(options.seed);
    // Prompts take their first tokens from a walk through the vocabulary that meets each id once per round, so no
    // two share even one page of a prefix cache.
    let start = rng.random_range(0..vocab_size);
    let first = |i: usize| ((u64::from(start) + i as u64) % u64::from(vocab_size)) as u32;
    let lengths = shape.prompt.stratified(n, &mut rng).into_iter().zip(shape.output.stratified(n, &mut rng));
    let samples = lengths.enumerate().map(|(i, (n_tokens, output_tokens))| {
        let n_tokens = n_tokens as usize;
        let mut ids = Vec::with_capacity(n_tokens);
        ids.push(first(i));
        ids.extend((1..n_tokens).map(|_| rng.random_range(0..vocab_size)));
        Sample { prompt: Prompt::TokenIds(ids), output_tokens: Some(output_tokens) }
    });
    Ok(samples.collect())
}

fn bounds(options: &DataOptions) -> Bounds {
    let to_u32 = |length: usize| length.clamp(1, u32::MAX as usize) as u32;
    let own_lengths = matches!(options.length_distribution.as_str(), "openqa" | "longalpaca");
    let output = match (options.min_tokens, options.max_tokens) {
        (Some(min), Some((_, high))) => Some((min.min(high), high)),
        // One --max-tokens asks for exactly that many, except where the load has lengths of its own.
        (None, Some((low, high))) if low == high && own_lengths => Some((1, high)),
        (None, Some((low, high))) => Some((low, high)),
        (Some(min), None) if own_lengths => Some((min, u32::MAX)),
        (_, None) => None,
    };
    Bounds { prompt: (to_u32(options.min_prompt_length), to_u32(options.max_prompt_length)), output }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn options() -> DataOptions {
        DataOptions {
            min_prompt_length: 3,
            max_prompt_length: 9,
            random_vocab_size: Some(500),
            length_distribution: "uniform".into(),
            max_tokens: Some((4, 4)),
            ..Default::default()
        }
    }

    #[test]
    fn prompts_have_their_lengths_and_start_differently() {
        let made = samples(500, &options()).unwrap();
        let mut firsts = HashSet::new();
        for sample in &made {
            let Prompt::TokenIds(ids) = &sample.prompt else { panic!("not token ids") };
            assert!((3..=9).contains(&ids.len()) && ids.iter().all(|&id| id < 500));
            assert!(firsts.insert(ids[0]));
            assert_eq!(sample.output_tokens, Some(4));
        }
        assert_eq!(made, samples(500, &options()).unwrap());
        assert_ne!(made, samples(500, &DataOptions { seed: 1, ..options() }).unwrap());
    }

    #[test]
    fn output_bounds_follow_the_flags() {
        let check = |distribution: &str, min_tokens, max_tokens, expected| {
            let options = DataOptions { length_distribution: distribution.into(), min_tokens, max_tokens, ..options() };
            assert_eq!(bounds(&options).output, expected);
        };
        check("uniform", None, Some((8, 8)), Some((8, 8)));
        check("uniform", Some(2), Some((8, 8)), Some((2, 8)));
        check("uniform", None, Some((2, 8)), Some((2, 8)));
        check("openqa", None, None, None);
        check("openqa", None, Some((200, 200)), Some((1, 200)));
        check("openqa", Some(200), Some((200, 200)), Some((200, 200)));
    }

    #[test]
    fn missing_flags_are_named() {
        let check = |change: fn(&mut DataOptions), flag: &str| {
            let mut options = options();
            change(&mut options);
            let message = samples(1, &options).unwrap_err().to_string();
            assert!(message.starts_with(flag), "{message}");
        };
        check(|options| options.random_vocab_size = None, "--random-vocab-size: ");
        check(|options| options.max_prompt_length = 131_072, "--max-prompt-length: ");
        check(|options| options.max_tokens = None, "--max-tokens: ");
        check(|options| options.path = Some("x".into()), "--dataset-path: ");
    }
}
