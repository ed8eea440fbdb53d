//! Owns the distributions that prompt and answer lengths are drawn from.

use rand::{Rng, RngExt, seq::SliceRandom};
use rand_distr::{Distribution, LogNormal};

use crate::{Error, Result};

/// Distribution of lengths in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Every length from `min` to `max` alike.
    Uniform { min: u32, max: u32 },
    /// Log-normal of this median and sigma, clipped.
    LogNormal { median: f64, sigma: f64, min: u32, max: u32 },
    /// One of two log-normals: the first with this probability.
    Mixture { share: f64, first: (f64, f64), second: (f64, f64), min: (u32, u32), max: u32 },
}

impl Lengths {
    /// Log-normal with its median at the bounds' geometric mean and the bounds at two sigma.
    pub fn log_normal_between(min: u32, max: u32) -> Self {
        let (low, high) = (f64::from(min.max(1)), f64::from(max.max(1)));
        Lengths::LogNormal { median: (low * high).sqrt(), sigma: (high / low).ln() / 4.0, min, max }
    }

    /// Draws one length.
    pub fn sample(&self, rng: &mut impl Rng) -> u32 {
        let log_normal = |rng: &mut _, median: f64, sigma: f64| {
            LogNormal::new(median.ln(), sigma).expect("sigma is finite").sample(rng).round() as u32
        };
        match *self {
            Lengths::Uniform { min, max } => rng.random_range(min..=max),
            Lengths::LogNormal { median, sigma, min, max } => log_normal(rng, median, sigma).clamp(min, max),
            Lengths::Mixture { share, first, second, min, max } => {
                if rng.random_bool(share) {
                    log_normal(rng, first.0, first.1).clamp(min.0.min(max), max)
                } else {
                    log_normal(rng, second.0, second.1).clamp(min.1.min(max), max)
                }
            }
        }
    }

    /// `n` lengths, one from each of `n` equally likely slices of the distribution, in random order: even a few requests
    /// have its mean and its tail (stratified sampling).
    pub fn stratified(&self, n: usize, rng: &mut impl Rng) -> Vec<u32> {
        const DRAWS_OF_A_SLICE: usize = 64;
        let mut draws: Vec<u32> = (0..n * DRAWS_OF_A_SLICE).map(|_| self.sample(rng)).collect();
        draws.sort_unstable();
        let mut lengths: Vec<u32> = draws.chunks(DRAWS_OF_A_SLICE).map(|slice| slice[slice.len() / 2]).collect();
        lengths.shuffle(rng);
        lengths
    }

    /// The same distribution with its clip narrowed to `min..=max`.
    pub fn clipped(self, min: u32, max: u32) -> Self {
        match self {
            Lengths::Uniform { min: low, max: high } => {
                Lengths::Uniform { min: low.clamp(min, max), max: high.clamp(min, max) }
            }
            Lengths::LogNormal { median, sigma, min: low, max: high } => {
                Lengths::LogNormal { median, sigma, min: low.clamp(min, max), max: high.clamp(min, max) }
            }
            Lengths::Mixture { share, first, second, min: (long, short), max: high } => {
                let min = (long.clamp(min, max), short.clamp(min, max));
                Lengths::Mixture { share, first, second, min, max: high.clamp(min.1, max) }
            }
        }
    }
}

/// Prompt and answer lengths of one load.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadShape {
    pub prompt: Lengths,
    pub output: Lengths,
}

/// Lengths of openqa's chat requests as served: about 65 prompt and 365 answer tokens on average. The answers' spread is
/// that of a published run whose latency was proportional to its answers: p50, p90 and p99 of 5.04, 7.88 and 10.66 s.
pub const OPENQA: LoadShape = LoadShape {
    prompt: Lengths::LogNormal { median: 58.0, sigma: 0.45, min: 10, max: 512 },
    output: Lengths::LogNormal { median: 345.0, sigma: 0.34, min: 32, max: 1024 },
};

/// Lengths of longalpaca's chat requests as served: about 9,700 prompt and 310 answer tokens on average.
pub const LONGALPACA: LoadShape = LoadShape {
    prompt: Lengths::Mixture {
        share: 0.75,
        first: (11_800.0, 0.45),
        second: (60.0, 0.7),
        min: (3_000, 4),
        max: 32_000,
    },
    output: Lengths::LogNormal { median: 280.0, sigma: 0.45, min: 32, max: 1024 },
};

/// Bounds of prompts and answers, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub prompt: (u32, u32),
    /// None: not given, the distribution's own bounds hold.
    pub output: Option<(u32, u32)>,
}

/// The load called `name` within `bounds`.
///
/// # Errors
/// If there is none, or it needs bounds that were not given.
pub fn load_shape(name: &str, bounds: Bounds) -> Result<LoadShape> {
    let (min, max) = bounds.prompt;
    let output = |make: fn(u32, u32) -> Lengths| match bounds.output {
        Some((min, max)) => Ok(make(min, max)),
        None => Err(Error::flag("--max-tokens", format!("--length-distribution {name} needs the answers' lengths"))),
    };
    let fitted = |shape: LoadShape| LoadShape {
        prompt: shape.prompt.clipped(min, max),
        output: bounds.output.map_or(shape.output, |(min, max)| shape.output.clipped(min, max)),
    };
    match name {
        "uniform" => Ok(LoadShape {
            prompt: Lengths::Uniform { min, max },
            output: output(|min, max| Lengths::Uniform { min, max })?,
        }),
        "lognormal" => Ok(LoadShape {
            prompt: Lengths::log_normal_between(min, max),
            output: output(Lengths::log_normal_between)?,
        }),
        "openqa" => Ok(fitted(OPENQA)),
        "longalpaca" => Ok(fitted(LONGALPACA)),
        _ => Err(Error::flag(
            "--length-distribution",
            format!("no distribution {name:?}; there are uniform, lognormal, openqa, longalpaca"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    fn mean(lengths: Lengths) -> f64 {
        let mut rng = StdRng::seed_from_u64(3);
        (0..40_000).map(|_| f64::from(lengths.sample(&mut rng))).sum::<f64>() / 40_000.0
    }

    #[test]
    fn loads_have_the_means_they_promise() {
        let check = |lengths, expected: f64| {
            let mean = mean(lengths);
            assert!((mean / expected - 1.0).abs() < 0.03, "{mean} is not near {expected}");
        };
        check(OPENQA.prompt, 65.0);
        check(OPENQA.output, 365.0);
        check(LONGALPACA.prompt, 9_700.0);
        check(LONGALPACA.output, 310.0);
        check(Lengths::Uniform { min: 10, max: 30 }, 20.0);
    }

    #[test]
    fn few_lengths_have_the_mean_of_many() {
        let mut rng = StdRng::seed_from_u64(5);
        for (lengths, mean) in [(OPENQA.output, 365.0), (LONGALPACA.prompt, 9_700.0)] {
            for n in [5, 64] {
                let sum: u32 = lengths.stratified(n, &mut rng).iter().sum();
                let got = f64::from(sum) / n as f64;
                assert!((got / mean - 1.0).abs() < 0.1, "{n} lengths have the mean {got}, not {mean}");
            }
        }
        let spread = LONGALPACA.prompt.stratified(20, &mut rng);
        assert_eq!(spread.iter().filter(|&&length| length < 3_000).count(), 5);
        assert_ne!(spread, LONGALPACA.prompt.stratified(20, &mut rng));
    }

    #[test]
    fn bounds_hold_for_every_distribution() {
        for name in ["uniform", "lognormal", "openqa", "longalpaca"] {
            for (prompt, output) in [((5, 40), (2, 8)), ((7, 7), (3, 3)), ((1, 100_000), (1, 1))] {
                let shape = load_shape(name, Bounds { prompt, output: Some(output) }).unwrap();
                let mut rng = StdRng::seed_from_u64(1);
                for _ in 0..500 {
                    let (input, out) = (shape.prompt.sample(&mut rng), shape.output.sample(&mut rng));
                    assert!((prompt.0..=prompt.1).contains(&input), "{name}: {input}");
                    assert!((output.0..=output.1).contains(&out), "{name}: {out}");
                }
            }
        }
    }

    #[test]
    fn unknown_and_incomplete_loads_say_what_is_missing() {
        let bounds = Bounds { prompt: (1, 2), output: None };
        assert!(load_shape("zipf", bounds).unwrap_err().to_string().contains("lognormal"));
        assert!(load_shape("uniform", bounds).unwrap_err().to_string().starts_with("--max-tokens"));
    }
}
