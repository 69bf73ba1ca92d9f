//! A bar on standard error, when a person watches: bytes, rate, time left. Without one, all of this does nothing.

use std::sync::OnceLock;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

static BAR: OnceLock<ProgressBar> = OnceLock::new();

/// From now on there is a bar, whenever there is work to show.
pub fn show() {
    let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
    if let Ok(style) = ProgressStyle::with_template(
        "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    ) {
        bar.set_style(style);
    }
    // There is only one; a second call changes nothing.
    let _ = BAR.set(bar);
}

/// Work of that many bytes begins.
pub fn begin(what: &'static str, bytes: u64) {
    if let Some(bar) = BAR.get() {
        bar.reset();
        bar.set_length(bytes);
        bar.set_message(what);
        bar.set_draw_target(ProgressDrawTarget::stderr());
    }
}

/// So much more of it is done.
pub fn add(bytes: u64) {
    if let Some(bar) = BAR.get() {
        bar.inc(bytes);
    }
}

/// Takes the bar off the terminal.
pub fn end() {
    if let Some(bar) = BAR.get() {
        bar.finish_and_clear();
    }
}

/// Prints something to the terminal without the bar getting into it.
pub fn beside<T>(print: impl FnOnce() -> T) -> T {
    match BAR.get() {
        Some(bar) => bar.suspend(print),
        None => print(),
    }
}
