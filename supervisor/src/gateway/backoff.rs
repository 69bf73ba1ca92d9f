//! How long to wait before the next try. Randomness is an argument.

use std::time::Duration;

/// A wait that doubles from `initial` to `limit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    pub initial: Duration,
    pub limit: Duration,
}

/// Restarts after a crash. Above 30 s the platform's own probe replaces us first.
pub const RESTART: Backoff = Backoff {
    initial: Duration::from_millis(250),
    limit: Duration::from_secs(30),
};

/// Restarts after clean exits that come too soon: the gateway asks for them, so they wait less than after a crash.
pub const FRESH: Backoff = Backoff {
    initial: Duration::from_millis(250),
    limit: Duration::from_secs(5),
};

/// Tries of a restore that failed: each may load a store that is in trouble already.
pub const RESTORE: Backoff = Backoff {
    initial: Duration::from_secs(1),
    limit: Duration::from_mins(1),
};

impl Backoff {
    /// The wait after `failures` failures in a row (1 is the first), shortened by up to a quarter: many instances that fail
    /// together do not come back together, and the limit stays one. `jitter` is in 0..1.
    pub fn delay(self, failures: u32, jitter: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        let full = self.initial.saturating_mul(1 << doublings).min(self.limit);
        full.mul_f64(1.0 - 0.25 * jitter.clamp(0.0, 1.0))
    }
}

/// `interval` moved by up to ten per cent either way, so that instances started together do not back up together.
pub fn spread(interval: Duration, jitter: f64) -> Duration {
    interval.mul_f64(0.9 + 0.2 * jitter.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restarts_double_from_a_quarter_second_to_half_a_minute() {
        let waits: Vec<u128> = [1, 2, 3, 7, 8, 9, 1000]
            .iter()
            .map(|&failures| RESTART.delay(failures, 0.0).as_millis())
            .collect();
        assert_eq!(waits, [250, 500, 1000, 16_000, 30_000, 30_000, 30_000]);
    }

    #[test]
    fn jitter_only_shortens_and_by_a_quarter_at_most() {
        assert_eq!(RESTART.delay(1, 1.0).as_micros(), 187_500);
        assert_eq!(RESTORE.delay(100, 0.0).as_secs(), 60);
    }

    #[test]
    fn a_schedule_is_spread_by_a_tenth_either_way() {
        let five_minutes = Duration::from_mins(5);
        assert!(
            spread(five_minutes, 0.0).abs_diff(Duration::from_secs(270)) < Duration::from_millis(1)
        );
        assert!(
            spread(five_minutes, 1.0).abs_diff(Duration::from_secs(330)) < Duration::from_millis(1)
        );
    }
}
