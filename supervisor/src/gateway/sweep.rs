//! Kills every process of the gateway, until none is left and none can come.
//!
//! Its helpers have sessions of their own and outlive it, so no process group tells them. They may fork while we kill, faster
//! than anybody can look for them. So nothing rests on having seen them all:
//!
//! - A gateway with a user of its own is killed by one system call made as that user, `kill(-1)`. The kernel does not let
//!   anything fork meanwhile, nor what it has killed afterwards: whatever is left then is dying, and no other comes.
//! - Else its processes descend from us. An orphan comes to us as PID 1 or subreaper, so our own children are killed until
//!   there are none, the agent excepted. Only we reap, so each of these pids is still what it was.
//!
//! What cannot be read is never taken for clean. Which processes are the gateway's is told by `process_table`.

use std::io;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, setuid};
use tokio::time::{Instant, sleep, timeout};

use super::process_table::{Belongs, children, processes};
use crate::log::log;
use crate::reaper::{Exit, Reaper};

/// Between rounds of killing. A process needs a moment to die, a forking one must not get many.
const PAUSE: Duration = Duration::from_millis(2);
const MAX_PAUSE: Duration = Duration::from_millis(100);

/// Something that SIGKILL does not end within this hangs in the kernel: worth a line, each time.
const STUCK_AFTER: Duration = Duration::from_secs(5);

/// To fork, change the user and kill takes microseconds. What is killed last may have stopped us before.
const STRIKE_TIME_LIMIT: Duration = Duration::from_secs(1);

/// Returns when nothing of the gateway is left. That is the promise the next start relies on, so it never gives up.
pub async fn sweep(belongs: &Belongs, reaper: &Reaper) {
    let mut pause = PAUSE;
    let mut reported = Instant::now();
    loop {
        let left = kill_all(belongs, reaper).await;
        if matches!(left, Ok(0)) {
            return;
        }
        if reported.elapsed() >= STUCK_AFTER {
            log!(
                Warn,
                "the gateway's processes are not gone",
                count = left.as_ref().ok().copied(),
                reason = left.as_ref().err().map(ToString::to_string),
            );
            reported = Instant::now();
        }
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Whether nothing of the gateway is left, told by one short file: it descends from us, and what has lost its parent is our
/// child. When we have others, such as an agent at work, a sweep has to tell.
pub fn is_clean(belongs: &Belongs) -> bool {
    let except = match belongs {
        Belongs::ToUser(_) => &[][..],
        Belongs::ByDescent { except } => except,
    };
    children(except).is_ok_and(|left| left.is_empty())
}

/// Kills what there is and returns how many were there, at most a moment ago. After none, none will be.
async fn kill_all(belongs: &Belongs, reaper: &Reaper) -> io::Result<usize> {
    let user = match belongs {
        Belongs::ToUser(user) => *user,
        Belongs::ByDescent { except } => {
            let left = children(except)?;
            for pid in &left {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            return Ok(left.len());
        }
    };
    let struck = strike(user, reaper).await;
    let left = processes(belongs)?;
    if !matches!(struck, Ok(true)) {
        // No process to spare for the stroke, most likely: those that are seen make room.
        for (pid, _) in &left {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
    struck.map(|_| left.len())
}

/// One stroke at everything that runs as `user`, in a copy of us that is `user`. False when we may not become that user: then
/// we never started anything as that user either. Until it is done, another of them may kill the copy; its exit tells.
async fn strike(user: Uid, reaper: &Reaper) -> io::Result<bool> {
    let all = Pid::from_raw(-1);
    let exit = reaper.fork(|| {
        let is_user = setuid(user).is_ok();
        if is_user {
            // Fails where there is nobody else to signal.
            let _ = kill(all, Signal::SIGKILL);
        }
        is_user
    })?;
    match timeout(STRIKE_TIME_LIMIT, exit).await {
        Ok(Ok(Exit {
            code: Some(code), ..
        })) => Ok(code == 0),
        _ => Err(io::ErrorKind::Interrupted.into()),
    }
}
