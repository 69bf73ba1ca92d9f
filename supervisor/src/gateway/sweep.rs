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
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, geteuid, setuid};
use tokio::time::{Instant, sleep, timeout};

use super::process_table::{children, earlier, of_user};
use crate::blocking;
use crate::log::log;
use crate::only::Gateway;
use crate::reaper::{Exit, Reaper, Side};

/// Between rounds of killing. A process needs a moment to die, a forking one must not get many.
const PAUSE: Duration = Duration::from_millis(2);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Something that SIGKILL does not end within this hangs in the kernel: worth a line, then further ones at twice the distance.
const STUCK_AFTER: Duration = Duration::from_secs(5);
const MAX_REPORT_PAUSE: Duration = Duration::from_mins(5);

/// For a look at the environment of every process.
const LOOK_TIME_LIMIT: Duration = Duration::from_secs(1);

/// To fork, change the user and kill takes microseconds. What is killed last may have stopped us before.
const STRIKE_TIME_LIMIT: Duration = Duration::from_secs(1);

/// Named in one line at most.
const MAX_NAMED: usize = 16;

/// How the gateway's processes are told from all others.
#[derive(Clone, Debug)]
pub enum Belongs {
    ToUser(Uid),
    /// They descend from us, as the agent does.
    ByDescent,
    /// Their user is ours and their supervisor is gone: they are of the session of the gateway that it has noted, or have the
    /// environment of a gateway on this root.
    ToEarlier(PathBuf, Option<Gateway>),
}

/// Returns when nothing of the gateway is left. That is the promise the next start relies on, so it never gives up; `tell` gets
/// what each round has left.
pub async fn sweep(belongs: &Belongs, reaper: &Reaper, tell: impl Fn(Vec<Pid>)) {
    let begun = Instant::now();
    let mut pause = PAUSE;
    let mut report_after = STUCK_AFTER;
    let mut is_first = true;
    loop {
        let left = kill_all(belongs, reaper, is_first).await;
        is_first = false;
        if left.as_ref().is_ok_and(Vec::is_empty) {
            return;
        }
        if begun.elapsed() >= report_after {
            report_after = begun.elapsed() + report_after.min(MAX_REPORT_PAUSE);
            report(&left, begun.elapsed());
        }
        tell(left.unwrap_or_default());
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

fn report(left: &io::Result<Vec<Pid>>, since: Duration) {
    match left {
        Ok(left) => log!(
            Warn,
            "killed processes of the gateway do not end: they hang in the kernel, as on a dead disk",
            pids = named(left),
            count = left.len(),
            since_s = since.as_secs(),
        ),
        Err(error) => log!(
            Warn,
            "cannot kill the gateway's processes",
            reason = error.to_string(),
            since_s = since.as_secs(),
        ),
    }
}

/// The first of these pids.
pub fn named(pids: &[Pid]) -> Vec<i32> {
    let pids = pids.iter().take(MAX_NAMED);
    pids.map(|pid| pid.as_raw()).collect()
}

/// Kills what there is and returns what was there, at most a moment ago. After none, none will be.
async fn kill_all(belongs: &Belongs, reaper: &Reaper, is_first: bool) -> io::Result<Vec<Pid>> {
    match belongs {
        Belongs::ToUser(user) => kill_user(*user, reaper, is_first).await,
        Belongs::ByDescent => Ok(reaper.kill_gateways(children()?)),
        Belongs::ToEarlier(root, noted) => {
            let (root, noted) = (root.clone(), noted.clone());
            // The kernel may wait for a process before it shows its environment.
            let left = move || earlier(geteuid(), &root, noted.as_ref());
            let (left, unread) = blocking::within(LOOK_TIME_LIMIT, left).await??;
            if is_first && !unread.is_empty() {
                log!(
                    Warn,
                    "cannot look at processes of our user: one may be of an earlier gateway, end it by hand then",
                    pids = named(&unread)
                );
            }
            for pid in &left {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            Ok(left)
        }
    }
}

async fn kill_user(user: Uid, reaper: &Reaper, is_first: bool) -> io::Result<Vec<Pid>> {
    let struck = strike(user, reaper).await;
    let (left, unread) = of_user(user)?;
    // Once a sweep.
    if is_first && !unread.is_empty() {
        log!(
            Warn,
            "cannot look at processes: they are not taken for the gateway's",
            pids = named(&unread)
        );
    }
    if !matches!(struck, Ok(true)) {
        // No process to spare for the stroke, most likely: those that are seen make room.
        for pid in &left {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
    struck.map(|_| left)
}

/// One stroke at everything that runs as `user`, in a copy of us that is `user`. False when we may not become that user: then
/// we never started anything as that user either. Until it is done, another of them may kill the copy; its exit tells.
async fn strike(user: Uid, reaper: &Reaper) -> io::Result<bool> {
    let all = Pid::from_raw(-1);
    let copy = reaper.fork(Side::Runtime, || {
        let is_user = setuid(user).is_ok();
        if is_user {
            // Fails where there is nobody else to signal.
            let _ = kill(all, Signal::SIGKILL);
        }
        i32::from(!is_user)
    })?;
    match timeout(STRIKE_TIME_LIMIT, copy.exit).await {
        Ok(Ok(Exit {
            code: Some(code), ..
        })) => Ok(code == 0),
        _ => Err(io::Error::other(
            "the process that kills them was killed or held up",
        )),
    }
}
