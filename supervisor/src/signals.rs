//! Signals become counts in eventfds: the handlers do nothing else, and nothing is lost between boot and the event loop.
//!
//! SIGHUP is caught and ignored: it tells daemons to read their settings again, and ours are fixed at exec. (Caught, not
//! set to ignore: children would inherit that.)

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::signal::SigSet;
use rustix::event::{EventfdFlags, eventfd};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::{flag, low_level};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How service managers and container engines say "stop": SIGQUIT where an image asks for it (`STOPSIGNAL`), SIGPWR by LXC,
/// SIGRTMIN+3 by Podman and nspawn. That one counts from 34 whatever the C library (signal(7)): it is sent from outside.
const TERMINATION: [i32; 5] = [SIGTERM, SIGINT, SIGQUIT, libc::SIGPWR, 34 + 3];

/// The counters, ready before anything else is.
pub struct Signals {
    children: BorrowedFd<'static>,
    termination: BorrowedFd<'static>,
}

impl Signals {
    /// To be called first in `main`.
    pub fn register() -> io::Result<Self> {
        let children = counted(&[SIGCHLD])?;
        let termination = counted(&TERMINATION)?;
        flag::register(SIGHUP, Arc::default())?;
        // Whoever started us may have blocked them, and a mask survives exec.
        SigSet::empty().thread_set_mask()?;
        Ok(Self {
            children,
            termination,
        })
    }

    /// SIGCHLD, and the signals that ask us to stop.
    pub fn listen(self) -> io::Result<(Wakeups, Wakeups)> {
        Ok((
            Wakeups::new(self.children)?,
            Wakeups::new(self.termination)?,
        ))
    }
}

/// Counts these signals (eventfd(2)): unlike a pipe it takes one descriptor, and is never full.
#[allow(unsafe_code)]
fn counted(signals: &[i32]) -> io::Result<BorrowedFd<'static>> {
    static ONE: u64 = 1;

    let counter = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    // Never closed: the handlers have it for ever.
    let counter: &'static OwnedFd = Box::leak(Box::new(counter));
    let counter = counter.as_fd();
    let descriptor = counter.as_raw_fd();
    for signal in signals {
        let count = move || {
            // SAFETY: reads eight bytes of static memory; the descriptor stays open.
            unsafe { libc::write(descriptor, (&raw const ONE).cast(), size_of_val(&ONE)) };
        };
        // SAFETY: the action makes one system call, which is safe in a handler (signal-safety(7)), and nothing else.
        unsafe { low_level::register(*signal, count) }?;
    }
    Ok(counter)
}

pub struct Wakeups(AsyncFd<BorrowedFd<'static>>);

impl Wakeups {
    #[allow(unsafe_code)]
    fn new(counter: BorrowedFd<'static>) -> io::Result<Self> {
        // SAFETY: the descriptor is never closed.
        let counter = unsafe { AsyncFd::register(counter) }?;
        Ok(Self(counter))
    }

    /// Waits for a signal and says how many came. Signals of one kind merge in the kernel, so "at least" is meant.
    pub async fn next(&mut self) -> u64 {
        let mut count = [0; size_of::<u64>()];
        let read = |counter: &BorrowedFd| Ok(rustix::io::read(*counter, &mut count)?);
        match self.0.async_io(Interest::READABLE, read).await {
            Ok(_) => u64::from_ne_bytes(count),
            // It cannot fail; were it ever to, waiting is better than a hot loop.
            Err(_) => std::future::pending().await,
        }
    }
}
