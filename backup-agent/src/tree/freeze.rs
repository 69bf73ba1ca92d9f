//! Stops every process of the gateway for a moment, so that what is read meanwhile is of one instant.
//!
//! Nobody is left stopped, however the agent ends: a guard, a process of its own, is told of each process before it is
//! stopped. When the agent ends without a word, or the time is over, the guard lets all of them go on.

use std::{
    collections::HashSet,
    fs,
    io::{self, BufRead, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};

/// The hidden verb of the guard.
pub const GUARD: &str = "hold-guard";

/// Between two looks at processes that have not stopped yet: most do within some ten microseconds.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Whom to stop, and for how long at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freezer {
    /// Every process of this user.
    pub user: Uid,
    pub limit: Duration,
}

/// Why nothing is read at one instant.
#[derive(Debug, thiserror::Error)]
pub enum NotFrozen {
    #[error("its processes did not stop in time")]
    Late,
    #[error("its processes cannot be stopped: {0}; root needs the capability KILL for that")]
    Refused(Errno),
    #[error("there is no way to stop it safely: {0}")]
    Unguarded(#[from] io::Error),
}

/// A process, told from a later one with the same number by when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Process {
    pid: Pid,
    /// Clock ticks since boot, as in proc(5).
    started: u64,
}

impl Freezer {
    /// Stops all of them.
    pub fn freeze(self) -> Result<Frozen, NotFrozen> {
        let guard = Guard::start(self.limit)?;
        let mut frozen = Frozen {
            freezer: self,
            stopped: HashSet::new(),
            guard,
            begun: Instant::now(),
        };
        // Half of the time, at most, is for stopping. A process that forks may hide its child from one look, so it takes
        // two in a row.
        let late = frozen.begun + self.limit / 2;
        let mut quiet_looks = 0;
        while quiet_looks < 2 {
            let running = self.running()?;
            if running.is_empty() {
                quiet_looks += 1;
                continue;
            }
            quiet_looks = 0;
            for process in running {
                if frozen.stopped.insert(process) {
                    frozen.guard.tell(process)?;
                    match kill(process.pid, Signal::SIGSTOP) {
                        // It ended meanwhile.
                        Ok(()) | Err(Errno::ESRCH) => {}
                        Err(error) => return Err(NotFrozen::Refused(error)),
                    }
                }
            }
            if Instant::now() >= late {
                return Err(NotFrozen::Late);
            }
            thread::sleep(LOOK_AGAIN);
        }
        Ok(frozen)
    }

    /// Processes of the user that could do something now.
    fn running(self) -> io::Result<Vec<Process>> {
        let mut running = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(pid) = pid.map(Pid::from_raw) else {
                continue;
            };
            if belongs_to(pid, self.user)
                && is_running(pid)
                && let Some(started) = started(pid)
            {
                running.push(Process { pid, started });
            }
        }
        Ok(running)
    }
}

/// For as long as it lives, the processes are stopped.
pub struct Frozen {
    freezer: Freezer,
    stopped: HashSet<Process>,
    guard: Guard,
    begun: Instant,
}

impl Frozen {
    /// When they go on, whatever is done by then.
    pub fn until(&self) -> Instant {
        self.begun + self.freezer.limit
    }

    /// Whether nobody of them could do anything until now: the guard may have let them go on, others may have come.
    pub fn is_whole(&self) -> bool {
        self.freezer
            .running()
            .is_ok_and(|running| running.is_empty())
    }

    /// Lets them go on; gives the time that they were stopped.
    pub fn thaw(mut self) -> Duration {
        self.let_go();
        self.begun.elapsed()
    }

    fn let_go(&mut self) {
        for process in self.stopped.drain() {
            process.go_on();
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.let_go();
        self.guard.dismiss();
    }
}

impl Process {
    fn go_on(self) {
        if started(self.pid) == Some(self.started) {
            // It may end at any moment, and then nothing is left to do.
            let _ = kill(self.pid, Signal::SIGCONT);
        }
    }
}

/// The agent's end of the guard.
struct Guard {
    child: Child,
    orders: ChildStdin,
}

const DISMISSED: &str = "dismissed";

impl Guard {
    fn start(limit: Duration) -> io::Result<Self> {
        // The very program that runs, even if another one has its name by now.
        let mut child = Command::new("/proc/self/exe")
            .args([GUARD, &limit.as_millis().to_string()])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // What a terminal sends to the agent is not for the guard.
            .process_group(0)
            .spawn()?;
        let orders = child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { child, orders })
    }

    fn tell(&mut self, process: Process) -> io::Result<()> {
        writeln!(self.orders, "{} {}", process.pid, process.started)
    }

    fn dismiss(&mut self) {
        // A guard that is gone has been there long enough: all of them go on.
        let _ = writeln!(self.orders, "{DISMISSED}");
        let _ = self.child.wait();
    }
}

/// The guard itself: reads whom it is responsible for, until it is dismissed or alone.
pub fn guard(limit: Duration) {
    let held: Arc<Mutex<Vec<Process>>> = Arc::default();
    let let_go = |held: &Mutex<Vec<Process>>| {
        let held = held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().for_each(|process| process.go_on());
    };
    let mut clock = None;
    for line in io::stdin().lock().lines().map_while(Result::ok) {
        if line == DISMISSED {
            return;
        }
        let numbers = line.split_once(' ');
        let process = numbers.and_then(|(pid, started)| {
            Some(Process {
                pid: Pid::from_raw(pid.parse().ok()?),
                started: started.parse().ok()?,
            })
        });
        held.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(process);
        let held = held.clone();
        clock.get_or_insert_with(|| {
            thread::spawn(move || {
                thread::sleep(limit);
                let_go(&held);
            })
        });
    }
    let_go(&held);
}

/// Whether a process runs as the user, really or effectively.
fn belongs_to(pid: Pid, user: Uid) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    let mut ids = ids.unwrap_or_default().split_ascii_whitespace();
    ids.any(|id| id.parse() == Ok(user.as_raw()))
}

/// Whether any thread of a process is neither stopped nor dead.
fn is_running(pid: Pid) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    let mut states = threads.flatten().filter_map(|thread| {
        let status = fs::read_to_string(thread.path().join("stat")).ok()?;
        fields(&status)?.next()?.chars().next()
    });
    states.any(|state| !matches!(state, 'T' | 't' | 'Z' | 'X' | 'x'))
}

fn started(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The state is the third field, the start the 22nd.
    fields(&status)?.nth(19)?.parse().ok()
}

/// The fields of a `stat` behind the name, which may have anything in it: the first one is the state.
fn fields(stat: &str) -> Option<impl Iterator<Item = &str>> {
    let (_, rest) = stat.rsplit_once(") ")?;
    Some(rest.split_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_pass_for_the_fields_behind_it() {
        let stat = "7 (a) S 1 (b) T 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 4242 0";
        let mut all = fields(stat).expect("there is a name");
        assert_eq!(all.next(), Some("T"));
        assert_eq!(all.nth(18), Some("4242"));
        assert!(fields("7 (a").is_none());
    }

    #[test]
    fn we_run_as_ourselves_and_have_started() {
        let us = Pid::this();
        assert!(belongs_to(us, Uid::effective()) && is_running(us));
        assert!(!belongs_to(us, Uid::from_raw(54_321)));
        assert!(started(us).is_some_and(|started| started > 0));
    }
}
