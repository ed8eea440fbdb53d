//! [`Pace`]: how late the next step may be planned.
//!
//! With two steps in flight the next one could be planned as soon as the running one has begun; but
//! then whatever arrives while that one runs has to wait for two steps. Planned shortly before the
//! device needs it, it takes those arrivals along.

use std::time::{Duration, Instant};

/// Left for planning and launching, beside a tenth of the step.
const MARGIN: Duration = Duration::from_micros(300);
/// How much longer than the one before a step may be taken to be. A step that the host was late to collect, or to plan,
/// seems longer than it was; if the next one were planned by that time, it would be late, too, and so on.
const MAX_GROWTH: f32 = 1.05;

/// When the running step began, and how long such steps take.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Of the last step that only decoded; others take longer.
    step: Duration,
    began: Option<Instant>,
}

impl Pace {
    /// A step was collected at `now`. `only_decoded`: it had one token a sequence; `next_runs`: another one was queued
    /// behind it.
    pub(crate) fn collected(&mut self, now: Instant, only_decoded: bool, next_runs: bool) {
        if let Some(began) = self.began
            && only_decoded
        {
            let took = now - began;
            self.step = if self.step.is_zero() { took } else { took.min(self.step.mul_f32(MAX_GROWTH)) };
        }
        self.began = next_runs.then_some(now);
    }

    /// Until when the step after the running one need not be planned; `None` if it is needed now.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let wait = self.step.mul_f32(0.9).checked_sub(MARGIN)?;
        self.began.map(|began| began + wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_step_waits_for_most_of_the_running_one() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.deadline(), None);
        pace.collected(start, true, true);
        assert_eq!(pace.deadline(), None, "no step was timed yet");
        pace.collected(start + ms(10), true, true);
        let wait = pace.deadline().expect("a deadline") - (start + ms(10));
        assert!(wait > ms(8) && wait < ms(9), "{wait:?}");
    }

    #[test]
    fn a_step_that_was_collected_late_does_not_make_the_next_ones_late() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut pace = Pace::default();
        pace.collected(start, true, true);
        pace.collected(start + ms(10), true, true);
        pace.collected(start + ms(40), true, true);
        assert!(pace.deadline().expect("a deadline") < start + ms(50));
    }

    #[test]
    fn prompts_do_not_count_and_an_idle_device_is_not_kept_waiting() {
        let ms = Duration::from_millis;
        let start = Instant::now();
        let mut pace = Pace::default();
        pace.collected(start, true, true);
        pace.collected(start + ms(5), true, true);
        pace.collected(start + ms(105), false, true);
        assert!(pace.deadline().expect("a deadline") < start + ms(110));
        pace.collected(start + ms(110), true, false);
        assert_eq!(pace.deadline(), None);
        let mut short = Pace::default();
        short.collected(start, true, true);
        short.collected(start + Duration::from_micros(300), true, true);
        assert_eq!(short.deadline(), None);
    }
}
