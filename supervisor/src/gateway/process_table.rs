//! Which processes are the gateway's, as /proc has it: those of its user, or those that descend from us.
//!
//! What cannot be read is an error, never a shorter list; only a process that ends meanwhile is left out. What is done to
//! those that are found is up to `sweep`.

use std::collections::HashMap;
use std::io;

use nix::unistd::{Pid, Uid};

#[derive(Clone, Debug)]
pub enum Belongs {
    ToUser(Uid),
    /// Descends from us, but not from these.
    ByDescent {
        except: Vec<Pid>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    parent: i32,
    /// `R`, `S`, `D`, `T`, `Z` … as in proc(5).
    state: u8,
    uids: [u32; 3],
    threads: u32,
}

/// Our children but `except`, the dead ones that nobody has reaped yet included.
///
/// The list is exact: nothing leaves it but what we reap, and what comes is put at its end.
pub(super) fn children(except: &[Pid]) -> io::Result<Vec<Pid>> {
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

pub(super) fn processes(belongs: &Belongs) -> io::Result<Vec<(Pid, Process)>> {
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
