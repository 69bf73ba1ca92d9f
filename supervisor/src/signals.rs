//! Signals become bytes on sockets: the handlers do nothing else, and nothing is lost between boot and the event loop.
//!
//! SIGHUP is caught and ignored: it tells daemons to read their settings again, and ours are fixed at exec. (Caught, not
//! set to ignore: children would inherit that.)

use std::io;
use std::os::fd::IntoRawFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::sys::signal::SigSet;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::{flag, low_level};
use tokio::io::AsyncReadExt as _;

/// How service managers and container engines say "stop": SIGQUIT where an image asks for it (`STOPSIGNAL`), SIGPWR by LXC,
/// SIGRTMIN+3 by Podman and nspawn. That one counts from 34 whatever the C library (signal(7)): it is sent from outside.
const TERMINATION: [i32; 5] = [SIGTERM, SIGINT, SIGQUIT, libc::SIGPWR, 34 + 3];

/// The reading ends, ready before anything else is.
pub struct Signals {
    children: UnixStream,
    termination: UnixStream,
}

impl Signals {
    /// To be called first in `main`.
    pub fn register() -> io::Result<Self> {
        let children = woken_by(&[SIGCHLD])?;
        let termination = woken_by(&TERMINATION)?;
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

/// The reading end of a socket into which each of these signals writes a byte. All of them have one descriptor.
#[allow(unsafe_code)]
fn woken_by(signals: &[i32]) -> io::Result<UnixStream> {
    let (reading, writing) = UnixStream::pair()?;
    // The handlers have it for ever.
    let writing = writing.into_raw_fd();
    for signal in signals {
        let send = move || {
            // SAFETY: sends a byte of static memory to a descriptor that is never closed. A socket that is full has others.
            unsafe { libc::send(writing, b"x".as_ptr().cast(), 1, libc::MSG_DONTWAIT) };
        };
        // SAFETY: the action makes one system call, which is safe in a handler (signal-safety(7)), and nothing else.
        unsafe { low_level::register(*signal, send) }?;
    }
    Ok(reading)
}

pub struct Wakeups(tokio::net::UnixStream);

impl Wakeups {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(stream).map(Self)
    }

    /// Waits for a signal and says how many came. Signals of one kind merge in the kernel, so "at least" is meant.
    pub async fn next(&mut self) -> usize {
        let mut bytes = [0; 64];
        match self.0.read(&mut bytes).await {
            Ok(count) if count > 0 => count,
            // The writing end lives in the handler, for ever; were it ever lost, waiting is better than a hot loop.
            _ => std::future::pending().await,
        }
    }
}
