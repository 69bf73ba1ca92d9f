//! How many descriptors PID 1 may have open, and how many of them connections get.
//!
//! Invariants: connections never take those that PID 1 needs for the gateway and the agent; children get back the limit that
//! PID 1 was started with.

use std::sync::OnceLock;

use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use crate::log::log;

/// Enough for every connection and for all that PID 1 does at once.
const WANTED: rlim_t = 1024;

/// Kept from connections: the pipes of gateway and agent (5), the start of another program (6), a call to the gateway and a
/// probe (2), a look through `/proc` (3), and one.
const RESERVE: usize = 17;

/// Open before the first connection, where that cannot be counted.
const OPEN: usize = 16;

/// For the request under way and for the next one.
const LEAST_PLACES: usize = 2;

/// Soft and hard, as they were at our own start.
static INHERITED: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Raises our own limit, as far as anybody may raise it and as we need it.
pub fn raise() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    if soft < WANTED.min(hard) && setrlimit(Resource::RLIMIT_NOFILE, WANTED.min(hard), hard).is_ok()
    {
        // A second call would keep ours.
        let _ = INHERITED.set((soft, hard));
    }
}

/// For a child between fork and exec: the limit that we were started with. It makes one system call at most.
pub fn give_back() -> nix::Result<()> {
    match INHERITED.get() {
        Some((soft, hard)) => setrlimit(Resource::RLIMIT_NOFILE, *soft, *hard),
        None => Ok(()),
    }
}

/// How many connections there may be, at most `most`. To be called when everything else that stays open is.
pub fn places(most: usize) -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(WANTED, |(soft, _)| soft);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    // One of them is the folder's own.
    let open = std::fs::read_dir("/proc/self/fd").map_or(OPEN, |all| all.count() - 1);
    let needed = open + RESERVE + LEAST_PLACES;
    if limit < needed {
        log!(
            Warn,
            "the limit on descriptors is too low: backups and starts of the gateway may fail",
            limit = limit,
            needed = needed
        );
    }
    limit
        .saturating_sub(open + RESERVE)
        .clamp(LEAST_PLACES, most)
}
