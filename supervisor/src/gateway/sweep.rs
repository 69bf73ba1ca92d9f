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
//! What cannot be read is never taken for clean.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, setuid};
use tokio::time::{Instant, sleep, timeout};

use crate::log::log;
use crate::reaper::{Exit, Reaper};

#[derive(Clone, Debug)]
pub enum Belongs {
    ToUser(Uid),
    /// Descends from us, but not from these.
    ByDescent {
        except: Vec<Pid>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    parent: i32,
    /// `R`, `S`, `D`, `T`, `Z` … as in proc(5).
    state: u8,
    uids: [u32; 3],
    threads: u32,
}

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

/// Lets every process of the gateway go on, in case the agent ended while it held them for a snapshot. All of them: one that
/// does not look stopped yet may be about to.
pub async fn resume(belongs: Belongs) {
    let mut pause = PAUSE;
    loop {
        match processes(&belongs) {
            Ok(all) => {
                for (pid, _) in all {
                    let _ = kill(pid, Signal::SIGCONT);
                }
                return;
            }
            Err(error) => log!(
                Warn,
                "cannot look for processes",
                reason = error.to_string()
            ),
        }
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
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

/// Our children but `except`, the dead ones that nobody has reaped yet included.
///
/// The list is exact: nothing leaves it but what we reap, and what comes is put at its end.
fn children(except: &[Pid]) -> io::Result<Vec<Pid>> {
    let us = Pid::this().as_raw();
    let pids: Vec<i32> = match std::fs::read_to_string("/proc/thread-self/children") {
        Ok(list) => {
            let pids = list.split_whitespace().map(str::parse);
            pids.collect::<Result<_, _>>().map_err(io::Error::other)?
        }
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let all = table()?.into_iter();
            all.filter(|(_, process)| process.parent == us)
                .map(|(pid, _)| pid)
                .collect()
        }
        Err(error) => return Err(error),
    };
    let pids = pids.into_iter().map(Pid::from_raw);
    Ok(pids.filter(|pid| !except.contains(pid)).collect())
}

fn processes(belongs: &Belongs) -> io::Result<Vec<(Pid, Process)>> {
    let all = table()?;
    let us = Pid::this().as_raw();
    let is_ours = |pid: i32, process: &Process| match belongs {
        Belongs::ToUser(uid) => process.uids.contains(&uid.as_raw()),
        Belongs::ByDescent { except } => descends(&all, pid, us, except),
    };
    Ok(all
        .iter()
        .filter(|(pid, process)| **pid != us && process.is_alive() && is_ours(**pid, process))
        .map(|(pid, process)| (Pid::from_raw(*pid), *process))
        .collect())
}

fn descends(all: &HashMap<i32, Process>, pid: i32, ancestor: i32, except: &[Pid]) -> bool {
    let mut current = pid;
    // The table is not read at one instant, so links may even form a ring; no chain is longer than the table.
    for _ in 0..=all.len() {
        if current == ancestor {
            return true;
        }
        if except.contains(&Pid::from_raw(current)) {
            return false;
        }
        match all.get(&current) {
            Some(process) => current = process.parent,
            None => return false,
        }
    }
    false
}

impl Process {
    /// A zombie runs nothing, unless only its first thread has ended.
    fn is_alive(&self) -> bool {
        self.state != b'X' && (self.state != b'Z' || self.threads > 1)
    }

    fn parse(status: &str) -> Option<Self> {
        let mut process = Self {
            parent: 0,
            state: 0,
            uids: [0; 3],
            threads: 1,
        };
        let mut has_uids = false;
        for line in status.lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name {
                "State" => process.state = *value.as_bytes().first()?,
                "PPid" => process.parent = value.parse().ok()?,
                "Threads" => process.threads = value.parse().ok()?,
                "Uid" => {
                    has_uids = true;
                    for (uid, text) in process.uids.iter_mut().zip(value.split_whitespace()) {
                        *uid = text.parse().ok()?;
                    }
                }
                _ => {}
            }
        }
        (has_uids && process.state != 0).then_some(process)
    }
}

/// Every process by pid. Those that end meanwhile are left out.
fn table() -> io::Result<HashMap<i32, Process>> {
    let mut table = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        match std::fs::read_to_string(entry.path().join("status")) {
            Ok(status) => {
                let process = Process::parse(&status).ok_or(io::ErrorKind::InvalidData)?;
                table.insert(pid, process);
            }
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(table)
}

/// Before it was opened, or before it was read.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(parent: i32) -> Process {
        Process {
            parent,
            state: b'S',
            uids: [0; 3],
            threads: 1,
        }
    }

    #[test]
    fn a_status_of_proc_is_understood() {
        let status = "Name:\tnode\nUmask:\t0022\nState:\tT (stopped)\nPPid:\t7\nUid:\t1\t2\t3\t4\nThreads:\t11\n";
        let expected = Process {
            parent: 7,
            state: b'T',
            uids: [1, 2, 3],
            threads: 11,
        };
        assert_eq!(Process::parse(status), Some(expected));
        assert_eq!(Process::parse("Name:\tx\n"), None);
    }

    #[test]
    fn descent_leaves_out_the_agent_and_strangers() {
        // 1 is us; 2 the gateway with 3 and 4 below it; 5 the agent with 6; 7 a stranger; 8 and 9 a ring.
        let links = [
            (1, 0),
            (2, 1),
            (3, 2),
            (4, 3),
            (5, 1),
            (6, 5),
            (7, 0),
            (8, 9),
            (9, 8),
        ];
        let all = links.map(|(pid, parent)| (pid, process(parent))).into();
        let found: Vec<i32> = (2..=9)
            .filter(|pid| descends(&all, *pid, 1, &[Pid::from_raw(5)]))
            .collect();
        assert_eq!(found, [2, 3, 4]);
    }

    #[test]
    fn a_zombie_counts_only_while_it_has_threads() {
        let mut zombie = process(1);
        zombie.state = b'Z';
        assert!(!zombie.is_alive());
        zombie.threads = 2;
        assert!(zombie.is_alive());
    }

    #[test]
    fn we_are_in_our_own_table() {
        let us = table().expect("can be read")[&Pid::this().as_raw()];
        assert_eq!(us.parent, Pid::parent().as_raw());
        assert!(us.is_alive());
    }
}
