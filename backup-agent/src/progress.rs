//! How far the work is, on standard error: a bar when a person watches, a line a second when a program does. Without
//! either, all of this does nothing.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::log;

static SHOWN: OnceLock<Shown> = OnceLock::new();

enum Shown {
    Bar(ProgressBar),
    Lines(Mutex<Work>),
}

/// Between two lines, and before the first: short work has none.
const INTERVAL: Duration = Duration::from_secs(1);

struct Work {
    what: &'static str,
    total: u64,
    done: u64,
    /// When the last line was written, or the work began, and what was done then.
    told: (Instant, u64),
}

/// From now on there is a bar, whenever there is work to show.
pub fn show() {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style);
    }
    // There is only one; a second call changes nothing.
    let _ = SHOWN.set(Shown::Bar(bar));
}

/// From now on there are lines, for the supervisor to read.
pub fn tell() {
    let _ = SHOWN.set(Shown::Lines(Mutex::new(Work::new("", 0))));
}

/// Work of that many bytes begins.
pub fn begin(what: &'static str, bytes: u64) {
    match SHOWN.get() {
        Some(Shown::Bar(bar)) => {
            bar.reset();
            bar.set_length(bytes);
            bar.set_message(what);
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        Some(Shown::Lines(work)) => {
            *work.lock().unwrap_or_else(PoisonError::into_inner) = Work::new(what, bytes);
        }
        None => {}
    }
}

/// So much more of it is done.
pub fn add(bytes: u64) {
    match SHOWN.get() {
        Some(Shown::Bar(bar)) => bar.inc(bytes),
        Some(Shown::Lines(work)) => {
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(rate) = work.add(bytes, Instant::now()) {
                log::progress(work.what, work.done, work.total, rate);
            }
        }
        None => {}
    }
}

/// Takes the bar off the terminal.
pub fn end() {
    if let Some(Shown::Bar(bar)) = SHOWN.get() {
        bar.finish_and_clear();
    }
}

/// Prints something to the terminal without the bar getting into it.
pub fn beside<T>(print: impl FnOnce() -> T) -> T {
    match SHOWN.get() {
        Some(Shown::Bar(bar)) => bar.suspend(print),
        _ => print(),
    }
}

impl Work {
    fn new(what: &'static str, total: u64) -> Self {
        Self {
            what,
            total,
            done: 0,
            told: (Instant::now(), 0),
        }
    }

    /// Bytes per second since the last line, when the next one is due.
    fn add(&mut self, bytes: u64, now: Instant) -> Option<u64> {
        self.done += bytes;
        // A file that grows while it is read is more than was planned.
        self.total = self.total.max(self.done);
        let (at, before) = self.told;
        let passed = now.saturating_duration_since(at);
        if passed < INTERVAL {
            return None;
        }
        self.told = (now, self.done);
        let millis = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        Some((self.done - before).saturating_mul(1000) / millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_every_second_and_has_the_rate_since_the_last_one() {
        let mut work = Work::new("restoring", 100);
        let begun = work.told.0;
        let after = |millis| begun + Duration::from_millis(millis);
        assert_eq!(work.add(10, after(0)), None);
        assert_eq!(work.add(20, after(999)), None);
        assert_eq!(work.add(30, after(1500)), Some(40));
        assert_eq!(work.add(40, after(2000)), None);
        assert_eq!(work.add(50, after(2500)), Some(90));
        assert_eq!((work.done, work.total), (150, 150));
    }
}
