//! Owns the arrival times of an open-loop run.

use std::time::{Duration, Instant};

use rand::{SeedableRng, rngs::StdRng};
use rand_distr::{Distribution, Exp};
use tokio::sync::mpsc;

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

/// Announces each arrival, by index, at its time: seconds after `start`.
///
/// A thread of its own sleeps with the kernel's timers, which are some 50 us late; those of the async runtime have
/// ticks of a millisecond, as long as the answer of a fast server. The thread ends when the receiver is dropped.
pub fn announce(arrivals: Vec<f64>, start: Instant) -> mpsc::Receiver<(usize, f64)> {
    let (sender, receiver) = mpsc::channel(arrivals.len().max(1));
    std::thread::spawn(move || {
        for (i, due_s) in arrivals.into_iter().enumerate() {
            std::thread::sleep(Duration::from_secs_f64(due_s).saturating_sub(start.elapsed()));
            if sender.blocking_send((i, due_s)).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn announcements_come_in_order_and_never_early() {
        let (arrivals, start) = (vec![0.0, 0.004, 0.004, 0.02], Instant::now());
        let mut receiver = announce(arrivals.clone(), start);
        for (i, due_s) in arrivals.into_iter().enumerate() {
            assert_eq!(receiver.recv().await, Some((i, due_s)));
            assert!(start.elapsed().as_secs_f64() >= due_s);
        }
        assert_eq!(receiver.recv().await, None);
    }

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
