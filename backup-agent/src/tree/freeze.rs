//! Stops every process of the gateway for a moment, so that what is read meanwhile is of one instant.
//!
//! Nobody is left stopped, however the agent ends: a guard, a process of its own, is told of each process before it is
//! stopped. When the agent ends without a word, or the time is over, the guard lets all of them go on.

use std::{
    collections::HashSet,
    fs,
    io::{self, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid, read},
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
    /// From a line of the guard's orders.
    fn parse(line: &str) -> Option<Self> {
        let (pid, started) = line.split_once(' ')?;
        Some(Self {
            pid: Pid::from_raw(pid.parse().ok()?),
            started: started.parse().ok()?,
        })
    }

    fn go_on(self) {
        // One that is surely another has its number. Where that cannot be told, going on harms nobody.
        if started(self.pid).is_none_or(|started| started == self.started) {
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
        let line = format!("{} {}\n", process.pid, process.started);
        self.orders.write_all(line.as_bytes())
    }

    fn dismiss(&mut self) {
        // A guard that is gone has been there long enough: all of them go on.
        let _ = writeln!(self.orders, "{DISMISSED}");
        let _ = self.child.wait();
    }
}

/// The guard itself: hears whom it is responsible for, until it is dismissed or alone. It starts no thread and no process,
/// because a machine that is short of everything is where it may be needed.
pub fn guard(limit: Duration) {
    let (mut held, mut heard) = (Vec::new(), Vec::new());
    let mut end: Option<Instant> = None;
    let orders = io::stdin();
    let mut buffer = [0; 4096];
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut orders_come = [PollFd::new(orders.as_fd(), PollFlags::POLLIN)];
        match poll(&mut orders_come, left) {
            // Time is over; there may be more to do once an agent that hangs goes on.
            Ok(0) => {
                go_on(&held);
                end = None;
                continue;
            }
            Err(Errno::EINTR) => continue,
            Ok(_) | Err(_) => {}
        }
        // Past the buffer of the standard library, which `poll` does not see.
        match read(&orders, &mut buffer) {
            Err(Errno::EINTR) => {}
            Ok(0) | Err(_) => break,
            Ok(length) => heard.extend_from_slice(&buffer[..length]),
        }
        while let Some(end_of_line) = heard.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = heard.drain(..=end_of_line).collect();
            let line = String::from_utf8_lossy(&line);
            if line.trim_end() == DISMISSED {
                return;
            }
            held.extend(Process::parse(line.trim_end()));
            end.get_or_insert_with(|| Instant::now() + limit);
        }
    }
    go_on(&held);
}

fn go_on(processes: &[Process]) {
    for process in processes {
        process.go_on();
    }
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
