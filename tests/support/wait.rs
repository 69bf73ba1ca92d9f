//! Waiting for what another process does, with a deadline and without a guess how long it takes.

use std::time::{Duration, Instant};

/// Far longer than anything takes on a machine that works, so that only a missing event fails a test.
const DEADLINE: Duration = Duration::from_mins(4);

const INTERVAL: Duration = Duration::from_millis(5);

/// Between two looks that cost what is waited for its time: a request to a server that is starting, a program.
const SLOW_INTERVAL: Duration = Duration::from_millis(200);

/// Returns what `look` finds as soon as it finds something.
pub fn until_some<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    every(INTERVAL, what, look)
}

/// Likewise, looking less often.
pub fn slowly_until_some<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    every(SLOW_INTERVAL, what, look)
}

fn every<T>(interval: Duration, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < DEADLINE, "never came: {what}");
        std::thread::sleep(interval);
    }
}

/// Returns as soon as `is_so`.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    until_some(what, || is_so().then_some(()));
}

/// Likewise, looking less often.
pub fn slowly_until(what: &str, mut is_so: impl FnMut() -> bool) {
    slowly_until_some(what, || is_so().then_some(()));
}
