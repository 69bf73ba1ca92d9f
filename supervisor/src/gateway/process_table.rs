//! Which processes are the gateway's, as /proc has it.
//!
//! Invariants: a list that cannot be read is an error, never a shorter list; one process that cannot be read counts when its owner
//! is the gateway's user, and holds nothing up otherwise. Text in /proc is bytes: names are chosen by whoever runs there.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use nix::unistd::{Pid, Uid};

use crate::only::{Gateway, started};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    parent: i32,
    /// `R`, `S`, `D`, `T`, `Z` … as in proc(5).
    state: u8,
    uids: [u32; 3],
    threads: u32,
    session: i32,
}

/// Our children, the dead ones that nobody has reaped yet included.
///
/// The list is exact: nothing leaves it but what we reap, and what comes is put at its end.
pub(super) fn children() -> io::Result<Vec<Pid>> {
    let us = Pid::this().as_raw();
    let pids: Vec<i32> = match fs::read_to_string("/proc/thread-self/children") {
        Ok(list) => {
            let pids = list.split_whitespace().map(str::parse);
            pids.collect::<Result<_, _>>().map_err(io::Error::other)?
        }
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let table = Table::read()?;
            let ours = table.processes.iter();
            ours.filter(|(_, process)| process.parent == us)
                .map(|(pid, _)| *pid)
                .collect()
        }
        Err(error) => return Err(error),
    };
    Ok(pids.into_iter().map(Pid::from_raw).collect())
}

/// The living processes of `user`, and those of others that could not be read.
pub(super) fn of_user(user: Uid) -> io::Result<(Vec<Pid>, Vec<Pid>)> {
    Ok(of_user_in(&Table::read()?, user))
}

fn of_user_in(table: &Table, user: Uid) -> (Vec<Pid>, Vec<Pid>) {
    // Real and saved, as for kill(2): whoever is the user in effect only is somebody else who plays it for a moment.
    let is_of_user = |process: &Process| {
        let [real, _, saved] = process.uids;
        process.is_alive() && [real, saved].contains(&user.as_raw())
    };
    let known = table.processes.iter();
    let known = known.filter(|(_, process)| is_of_user(process));
    let mut own: Vec<i32> = known.map(|(pid, _)| *pid).collect();
    let mut others = Vec::new();
    for (pid, owner) in &table.unread {
        if *owner == Some(user.as_raw()) {
            own.push(*pid);
        } else {
            others.push(*pid);
        }
    }
    let us = Pid::this();
    let pids = |list: Vec<i32>| {
        let pids = list.into_iter().map(Pid::from_raw);
        pids.filter(|pid| *pid != us).collect()
    };
    (pids(own), pids(others))
}

/// Processes of `user` that an earlier supervisor has started as a gateway's on `root`: those of the session of the gateway that it
/// has noted, and those that have its environment. And those of which neither can be told. A gateway that has our own user has
/// no better mark.
pub(super) fn earlier(
    user: Uid,
    root: &Path,
    noted: Option<&Gateway>,
) -> io::Result<(Vec<Pid>, Vec<Pid>)> {
    let table = Table::read()?;
    // Another process may have its number by now.
    let noted = noted.filter(|noted| {
        !table.processes.contains_key(&noted.pid)
            || started(noted.pid).is_ok_and(|started| started == noted.started)
    });
    let is_of_session = |pid: &Pid| {
        let session = table.processes.get(&pid.as_raw());
        session.map(|process| process.session) == noted.map(|noted| noted.pid)
    };
    let mut home = b"HOME=".to_vec();
    home.extend_from_slice(root.as_os_str().as_encoded_bytes());
    let (mut found, mut unread) = (Vec::new(), Vec::new());
    for pid in of_user_in(&table, user).0 {
        if noted.is_some() && is_of_session(&pid) {
            found.push(pid);
            continue;
        }
        match fs::read(format!("/proc/{pid}/environ")) {
            Ok(environment) => {
                let mut variables = environment.split(|byte| *byte == 0);
                let mode: &[u8] = b"OPENCLAW_SUPERVISOR_MODE=external";
                if variables.clone().any(|one| one == mode) && variables.any(|one| one == home) {
                    found.push(pid);
                }
            }
            Err(error) if is_gone(&error) => {}
            Err(_) => unread.push(pid),
        }
    }
    Ok((found, unread))
}

impl Process {
    /// A zombie runs nothing, unless only its first thread has ended.
    fn is_alive(&self) -> bool {
        self.state != b'X' && (self.state != b'Z' || self.threads > 1)
    }

    fn parse(status: &[u8]) -> Option<Self> {
        let mut process = Self {
            parent: 0,
            state: 0,
            uids: [0; 3],
            threads: 1,
            session: 0,
        };
        let mut has_uids = false;
        for line in status.split(|byte| *byte == b'\n') {
            // The name of the program need not be UTF-8.
            let Ok(line) = std::str::from_utf8(line) else {
                continue;
            };
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let value = value.trim();
            match name {
                "State" => process.state = *value.as_bytes().first()?,
                "PPid" => process.parent = value.parse().ok()?,
                // In each of the namespaces, ours first. Kernels before 4.1 do not tell it.
                "NSsid" => process.session = value.split_whitespace().next()?.parse().ok()?,
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
#[derive(Default)]
struct Table {
    processes: HashMap<i32, Process>,
    /// With the owner of its folder, where that can be told.
    unread: Vec<(i32, Option<u32>)>,
}

impl Table {
    fn read() -> io::Result<Self> {
        let mut table = Self::default();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let status = match fs::read(entry.path().join("status")) {
                Ok(status) => Process::parse(&status),
                Err(error) if is_gone(&error) => continue,
                // Not the process's doing.
                Err(error) if is_for_lack(&error) => return Err(error),
                Err(_) => None,
            };
            match status {
                Some(process) => drop(table.processes.insert(pid, process)),
                None => match entry.metadata() {
                    Ok(found) => table.unread.push((pid, Some(found.uid()))),
                    Err(error) if is_gone(&error) => {}
                    Err(_) => table.unread.push((pid, None)),
                },
            }
        }
        Ok(table)
    }
}

/// Before it was opened, or before it was read.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// We lack memory or descriptors.
fn is_for_lack(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_of_proc_is_understood_whatever_the_name_is() {
        let status = b"Name:\to\xc3\nUmask:\t0022\nState:\tT (stopped)\nPPid:\t7\nUid:\t1\t2\t3\t4\nNSsid:\t9\t1\nThreads:\t11\n";
        let expected = Process {
            parent: 7,
            state: b'T',
            uids: [1, 2, 3],
            threads: 11,
            session: 9,
        };
        assert_eq!(Process::parse(status), Some(expected));
        assert_eq!(Process::parse(b"Name:\tx\n"), None);
    }

    #[test]
    fn a_zombie_counts_only_while_it_has_threads() {
        let mut zombie = Process {
            parent: 1,
            state: b'Z',
            uids: [0; 3],
            threads: 1,
            session: 0,
        };
        assert!(!zombie.is_alive());
        zombie.threads = 2;
        assert!(zombie.is_alive());
    }

    #[test]
    fn we_are_in_our_own_table() {
        let us = Table::read().expect("can be read").processes[&Pid::this().as_raw()];
        assert_eq!(us.parent, Pid::parent().as_raw());
        assert!(us.is_alive());
    }
}
