//! Owns the arrival times of an open-loop run.

use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp};

/// Seconds after the start at which each of `n_requests` is due: a Poisson process of `rate` arrivals a second.
///
/// The gaps are exponential and summed; the sum is left as it falls. (EvalScope stretches it to exactly
/// `n / rate`, which takes away part of the variance that makes arrivals Poisson.) Times are absolute, so a late
/// send never delays the ones after it.
pub fn poisson_arrivals(n_requests: usize, rate: f64, seed: u64) -> Vec<f64> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5EED_0A22_17A1);
    let gaps = Exp::new(rate).expect("the rate is positive");
    let mut due = 0.0;
    (0..n_requests)
        .map(|_| {
            due += gaps.sample(&mut rng);
            due
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_poisson_and_seeded() {
        let arrivals = poisson_arrivals(20_000, 50.0, 1);
        assert_eq!(arrivals, poisson_arrivals(20_000, 50.0, 1));
        assert_ne!(arrivals, poisson_arrivals(20_000, 50.0, 2));
        let gaps: Vec<f64> = arrivals.windows(2).map(|w| w[1] - w[0]).collect();
        assert!(gaps.iter().all(|gap| *gap >= 0.0));
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((mean - 0.02).abs() < 0.0006, "{mean}");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.05, "exponential gaps have a deviation equal to their mean");
    }
}
