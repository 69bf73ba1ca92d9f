//! Tries again what may succeed later: exponential backoff with full jitter, the service's own wish first.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::StoreError;
use crate::{error::Error, log};

/// Attempts in all. With the delays below, a store that is down is given up after about 15 s, well within every bound.
const ATTEMPTS: u32 = 8;
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// Runs `attempt` until it succeeds, fails for good, or has no time left before `deadline`.
pub async fn retry<T, F>(deadline: Instant, mut attempt: impl FnMut() -> F) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut tries = 0;
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        tries += 1;
        if !error.is_transient() || tries == ATTEMPTS {
            return Err(error);
        }
        let delay = match &error {
            StoreError::Status {
                retry_after: Some(wish),
                ..
            } => *wish,
            _ => jittered(tries, random()),
        };
        // Waiting past the end would only trade a good error for a worse one.
        if Instant::now() + delay >= deadline {
            return Err(error);
        }
        log::debug(
            "store request failed, trying again",
            &[
                ("error", error.to_string().into()),
                (
                    "delay_ms",
                    u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).into(),
                ),
            ],
        );
        sleep(delay).await;
    }
}

/// Fetches and judges a second time what the first time was damaged: bytes that were altered on their way are not what the
/// store has.
pub async fn twice<T>(mut fetch: impl AsyncFnMut() -> Result<T, Error>) -> Result<T, Error> {
    match fetch().await {
        Err(Error::Damaged { key, reason }) => {
            log::debug(
                "fetching once more",
                &[("key", key.into()), ("reason", reason.into())],
            );
            fetch().await
        }
        other => other,
    }
}

/// The delay after `tries` failures; `random` is uniform over its type.
fn jittered(tries: u32, random: u16) -> Duration {
    let full = FIRST_DELAY
        .saturating_mul(1 << (tries - 1).min(16))
        .min(LONGEST_DELAY);
    full.mul_f64(f64::from(random) / f64::from(u16::MAX))
}

fn random() -> u16 {
    let mut bytes = [0; 2];
    // Without random bytes the delay is none: a worse spread, not a failure.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u16::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_a_limit_and_are_jittered_from_zero() {
        let longest: Vec<u64> = (1..8)
            .map(|tries| u64::try_from(jittered(tries, u16::MAX).as_millis()).expect("seconds"))
            .collect();
        assert_eq!(longest, [200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(jittered(7, 0), Duration::ZERO);
    }

    fn slow_down(retry_after: Option<Duration>) -> StoreError {
        StoreError::Status {
            status: 503,
            code: "SlowDown".to_owned(),
            retry_after,
            hint: None,
        }
    }

    fn run(bound: Duration, error: impl Fn() -> StoreError) -> u32 {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without input and output");
        let tries = std::cell::Cell::new(0);
        runtime.block_on(async {
            let outcome: Result<(), _> = retry(Instant::now() + bound, || {
                tries.set(tries.get() + 1);
                std::future::ready(Err(error()))
            })
            .await;
            assert!(outcome.is_err());
        });
        tries.get()
    }

    #[test]
    fn what_is_transient_is_tried_eight_times_and_the_rest_once() {
        let hour = Duration::from_hours(1);
        assert_eq!(run(hour, || slow_down(None)), 8);
        assert_eq!(run(hour, || StoreError::NotFound), 1);
        assert_eq!(
            run(hour, || StoreError::Status {
                status: 403,
                code: "AccessDenied".to_owned(),
                retry_after: None,
                hint: None,
            }),
            1
        );
    }

    #[test]
    fn a_wish_to_wait_past_the_deadline_ends_it() {
        let wish = Some(Duration::from_mins(1));
        assert_eq!(run(Duration::from_secs(30), || slow_down(wish)), 1);
        assert_eq!(run(Duration::from_secs(90), || slow_down(wish)), 2);
    }
}
