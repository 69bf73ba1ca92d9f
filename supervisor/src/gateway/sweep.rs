//! Finds every process of the gateway, and kills until none is left.
//!
//! Its helpers have sessions of their own and outlive it, so no process group tells them. They are found by user when the
//! gateway has its own, else by descent from us (as PID 1 or subreaper we inherit their orphans), the agent's excepted.

use std::collections::HashMap;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use tokio::time::{Instant, sleep};

use crate::log::log;

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

/// Returns when nothing of the gateway is left. That is the promise the next start relies on, so it never gives up.
pub async fn sweep(belongs: Belongs) {
    let mut pause = PAUSE;
    let mut reported = Instant::now();
    let mut is_refused = false;
    loop {
        let left = processes(&belongs);
        if left.is_empty() {
            return;
        }
        if reported.elapsed() >= STUCK_AFTER {
            log!(
                Warn,
                "processes of the gateway do not die",
                count = left.len(),
                reason =
                    is_refused.then_some("we may not signal them: this needs the capability KILL"),
            );
            reported = Instant::now();
        }
        for (pid, _) in left {
            // Gone meanwhile is what we want; refused is worth knowing.
            if let Err(Errno::EPERM) = kill(pid, Signal::SIGKILL) {
                is_refused = true;
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Whether nothing of the gateway is left, here and now.
pub fn is_clean(belongs: &Belongs) -> bool {
    is_childless() || processes(belongs).is_empty()
}

/// Everything of the gateway descends from us, and what has lost its parent is our child: without a child there is nothing of
/// it, and one short file tells so. All of `/proc` takes milliseconds, in which no gateway runs.
///
/// The kernel lists children one by one, and those that go meanwhile may hide others; an empty list hides nobody.
fn is_childless() -> bool {
    let us = Pid::this();
    std::fs::read(format!("/proc/self/task/{us}/children")).is_ok_and(|list| list.is_empty())
}

/// Lets every process of the gateway go on, in case the agent ended while it held them for a snapshot. All of them: one that
/// does not look stopped yet may be about to.
pub fn resume(belongs: &Belongs) {
    for (pid, _) in processes(belongs) {
        let _ = kill(pid, Signal::SIGCONT);
    }
}

fn processes(belongs: &Belongs) -> Vec<(Pid, Process)> {
    let all = table();
    let us = Pid::this().as_raw();
    let is_ours = |pid: i32, process: &Process| match belongs {
        Belongs::ToUser(uid) => process.uids.contains(&uid.as_raw()),
        Belongs::ByDescent { except } => descends(&all, pid, us, except),
    };
    all.iter()
        .filter(|(pid, process)| **pid != us && process.is_alive() && is_ours(**pid, process))
        .map(|(pid, process)| (Pid::from_raw(*pid), *process))
        .collect()
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
fn table() -> HashMap<i32, Process> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        log!(Error, "/proc cannot be read");
        return HashMap::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
            Some((pid, Process::parse(&status)?))
        })
        .collect()
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
        let us = table()[&Pid::this().as_raw()];
        assert_eq!(us.parent, Pid::parent().as_raw());
        assert!(us.is_alive());
    }
}
