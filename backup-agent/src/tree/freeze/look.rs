//! Looks at who of a user's processes is held. What counts as held can do nothing until it is let go.

use std::collections::{HashMap, HashSet};

use nix::{
    errno::Errno,
    libc::{self, c_long},
    unistd::{Pid, Uid},
};

use super::NotFrozen;
use crate::tree::process::{self, Error};

/// A thread in one of them, while another one of its process is traced, keeps a tracer waiting that wants to hold it
/// (`cred_guard_mutex` of the kernel); so does one that waits for the disk to give it the program.
const EXECUTES: [c_long; 2] = [libc::SYS_execve, libc::SYS_execveat];

/// A thread in one of them may wait for its child to execute a program (vfork(2)). No tracer can stop it then; it does nothing
/// as long as the child is held.
#[cfg(target_arch = "x86_64")]
const WAITS: [c_long; 3] = [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
#[cfg(not(target_arch = "x86_64"))]
const WAITS: [c_long; 2] = [libc::SYS_clone, libc::SYS_clone3];

/// A thread by its process and its own number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thread {
    pub process: Pid,
    pub id: Pid,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The tracer was told.
    Told,
    Held,
    /// In one of [`WAITS`].
    Waits,
    Gone,
}

/// What is known of one process.
#[derive(Default)]
struct Process {
    threads: HashMap<Pid, State>,
    /// Nobody of it can do anything, so it need not be looked at again.
    is_held: bool,
}

/// Everybody who was found so far.
pub struct Known {
    user: Uid,
    tracer: Pid,
    processes: HashMap<Pid, Process>,
    refused: HashSet<Pid>,
}

/// What one look found.
#[derive(Default)]
pub struct Found {
    /// The tracer is to hold these.
    pub new: Vec<Thread>,
    /// One that is not held yet, and what it does.
    pub runs: Option<(Pid, u8)>,
    /// Somebody ended during the look, and may have left a child where this look had been already.
    is_restless: bool,
}

impl Found {
    /// Whether everybody was held before this look began.
    pub fn is_quiet(&self) -> bool {
        self.new.is_empty() && self.runs.is_none() && !self.is_restless
    }
}

impl Known {
    pub fn new(user: Uid, tracer: Pid) -> Self {
        Self {
            user,
            tracer,
            processes: HashMap::new(),
            refused: HashSet::new(),
        }
    }

    pub fn look(&mut self) -> Result<Found, NotFrozen> {
        let mut found = Found::default();
        for pid in process::others()? {
            if !self.processes.contains_key(&pid) {
                let Some(status) = process::status(pid, pid)? else {
                    found.is_restless = true;
                    continue;
                };
                if !status.is_of(self.user) {
                    continue;
                }
                if status.tracer != 0 && status.tracer != self.tracer.as_raw() {
                    let by = Pid::from_raw(status.tracer);
                    return Err(NotFrozen::Traced { pid, by });
                }
            }
            let process = self.processes.entry(pid).or_default();
            if !process.is_held {
                process.look(pid, &mut found)?;
            }
        }
        Ok(found)
    }

    /// Takes note of what became of an order to hold a thread: whether it is held soon.
    pub fn told(&mut self, thread: Thread, answer: Result<(), Errno>) -> Result<bool, NotFrozen> {
        let Thread { process: pid, id } = thread;
        let is_told = match answer {
            Ok(()) => true,
            Err(Errno::ESRCH) => false,
            Err(Errno::EPERM) => match process::status(pid, id)? {
                None => false,
                // It has executed a program, and has the number of its first thread since.
                Some(status) if status.tracer == self.tracer.as_raw() => true,
                Some(status) if status.tracer != 0 => {
                    let by = Pid::from_raw(status.tracer);
                    return Err(NotFrozen::Traced { pid: id, by });
                }
                // One that ends at this moment, or whose tracer went, may be looked at once more.
                Some(_) if self.refused.insert(id) => false,
                Some(_) => return Err(NotFrozen::Refused(id, Errno::EPERM)),
            },
            Err(errno) => return Err(NotFrozen::Refused(id, errno)),
        };
        let threads = &mut self.processes.entry(pid).or_default().threads;
        if is_told {
            threads.insert(id, State::Told);
        } else {
            threads.remove(&id);
        }
        Ok(is_told)
    }

    /// Whether nobody was found who could do anything, and nobody who waits for a child has come back from that.
    pub fn is_still_held(&mut self) -> Result<bool, NotFrozen> {
        for (pid, process) in &self.processes {
            for (id, state) in &process.threads {
                if *state == State::Waits && state_of(*pid, *id)? != Some(Now::Waits) {
                    return Ok(false);
                }
            }
        }
        for pid in process::others()? {
            if self.processes.contains_key(&pid) {
                continue;
            }
            // One that has ended is no proof that somebody wrote; a user that cannot be told is.
            if process::status(pid, pid)?.is_some_and(|status| status.is_of(self.user)) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Process {
    /// It is held if all of its threads were held before they were listed, and are still: nobody was there to start another
    /// one, or to execute a program, which gives the first thread's number to another thread.
    fn look(&mut self, pid: Pid, found: &mut Found) -> Result<(), NotFrozen> {
        let Some(threads) = process::threads(pid)? else {
            found.is_restless = true;
            return Ok(());
        };
        let mut is_held = true;
        for id in threads {
            let Some(now) = state_of(pid, id)? else {
                found.is_restless = true;
                is_held = false;
                self.threads.remove(&id);
                continue;
            };
            let before = self.threads.get(&id).copied();
            let state = match (before, now) {
                (_, Now::Gone) => State::Gone,
                (_, Now::Executes(letter)) => {
                    found.runs = Some((id, letter));
                    is_held = false;
                    continue;
                }
                // Nobody was told of it, or another thread has its number since it executed a program.
                (None | Some(State::Gone), _) | (Some(State::Held), Now::Waits | Now::Runs(_)) => {
                    found.new.push(Thread { process: pid, id });
                    is_held = false;
                    continue;
                }
                (Some(_), Now::Held) => State::Held,
                (Some(_), Now::Waits) => State::Waits,
                (Some(_), Now::Runs(letter)) => {
                    found.runs = Some((id, letter));
                    State::Told
                }
            };
            is_held &= before == Some(state) && state != State::Told;
            self.threads.insert(id, state);
        }
        self.is_held = is_held;
        // It takes at least one more look then.
        found.is_restless |= !is_held;
        Ok(())
    }
}

/// What a thread does at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Now {
    Held,
    Waits,
    Executes(u8),
    Runs(u8),
    Gone,
}

fn state_of(pid: Pid, id: Pid) -> Result<Option<Now>, Error> {
    let Some(letter) = process::state(pid, id)? else {
        return Ok(None);
    };
    Ok(Some(match letter {
        b't' => Now::Held,
        b'Z' | b'X' => Now::Gone,
        b'S' | b'D' => match process::call(pid, id)?.flatten() {
            Some(call) if EXECUTES.contains(&call) => Now::Executes(letter),
            Some(call) if letter == b'D' && WAITS.contains(&call) => Now::Waits,
            _ => Now::Runs(letter),
        },
        _ => Now::Runs(letter),
    }))
}
