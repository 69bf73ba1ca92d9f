//! The one place that waits for children: ours, and the orphans that arrive at PID 1.
//!
//! Invariants: a child is known before it can be reaped, because it is started and entered under the same lock that reaping
//! takes; from the wait to the hand-over nothing is allocated, so no exit is lost for lack of memory. `tokio::process` is not
//! used anywhere: two waiters would steal each other's statuses.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};
use tokio::sync::oneshot;
use tokio::task::yield_now;

use crate::log::log;
use crate::signals::Wakeups;
use crate::spawn::{ParentEnds, Program, pipes};

/// Reaped in one go, before everything else gets a turn: orphans that never end must not keep PID 1 from its work.
const BATCH: usize = 256;

/// How a process ended: by itself with a code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
}

/// Whose a child is. A sweep of the gateway spares the runtime's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Gateway,
    Runtime,
}

/// A child that was started.
pub struct Child {
    pub pid: Pid,
    pub exit: oneshot::Receiver<Exit>,
}

type Children = HashMap<i32, (Side, oneshot::Sender<Exit>)>;

#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Children>>);

impl Reaper {
    /// Starts a program. Its exit comes through the receiver, once; what comes through the other ends is told in `spawn`.
    ///
    /// # Errors
    /// No descriptor or no process is left.
    pub fn spawn(&self, program: &Program, side: Side) -> io::Result<(Child, ParentEnds)> {
        let (ends, child_ends) = pipes(side)?;
        let child = self.fork(side, program.child(child_ends))?;
        Ok((child, ends))
    }

    /// Runs `work` in a copy of us, which then exits with the code that `work` returns.
    ///
    /// `work` may make system calls that are safe in a signal handler, and nothing else.
    ///
    /// # Errors
    /// No process is left.
    #[allow(unsafe_code)]
    pub fn fork(&self, side: Side, work: impl FnOnce() -> i32) -> io::Result<Child> {
        let mut children = self.children();
        // All that can fail is done before there is a child.
        children.reserve(1);
        let (sender, exit) = oneshot::channel();
        // Our handlers write to pipes that the copy shares with us: a signal to it would be taken for one to us.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        // SAFETY: the copy does `work`, which keeps to what is allowed here, and leaves without unwinding or clean-up.
        let forked = unsafe { fork() };
        if let Ok(ForkResult::Child) = forked {
            let code = work();
            // SAFETY: ends the process at once; no memory is involved.
            unsafe { libc::_exit(code) }
        }
        mask.thread_set_mask()?;
        match forked? {
            ForkResult::Parent { child: pid } => {
                children.insert(pid.as_raw(), (side, sender));
                Ok(Child { pid, exit })
            }
            ForkResult::Child => unreachable!("it has left"),
        }
    }

    /// Kills those of these children that are not the runtime's own, and says which they are.
    pub fn kill_gateways(&self, pids: Vec<Pid>) -> Vec<Pid> {
        let children = self.children();
        let mut pids = pids;
        pids.retain(|pid| !matches!(children.get(&pid.as_raw()), Some((Side::Runtime, _))));
        for pid in &pids {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        pids
    }

    /// Signals a child that has not been reaped, so that the pid is still its own; any other is left alone.
    pub fn signal(&self, pid: Pid, signal: Signal) {
        if self.children().contains_key(&pid.as_raw()) {
            let _ = kill(pid, signal);
        }
    }

    /// Reaps at every SIGCHLD, for ever.
    pub async fn run(self, mut wakeups: Wakeups) {
        loop {
            wakeups.next().await;
            while self.reap() {
                yield_now().await;
            }
        }
    }

    /// Reaps what has ended, for one SIGCHLD may stand for many; returns whether there may be more.
    fn reap(&self) -> bool {
        let mut children = self.children();
        for _ in 0..BATCH {
            let Some((pid, exit)) = wait() else {
                return false;
            };
            match children.remove(&pid) {
                // The receiver is gone when nobody cares any more.
                Some((_, known)) => drop(known.send(exit)),
                None => log!(Debug, "orphan reaped", pid = pid),
            }
        }
        true
    }

    fn children(&self) -> MutexGuard<'_, Children> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One child that has ended, if there is one.
///
/// `nix` would refuse the status of a child that died of a real-time signal after having reaped it, so the call is raw.
#[allow(unsafe_code)]
fn wait() -> Option<(i32, Exit)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int to `status`, which outlives the call; no child is waited for elsewhere.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        match pid {
            1.. => {
                let status = ExitStatus::from_raw(status);
                let exit = Exit {
                    code: status.code(),
                    signal: status.signal(),
                };
                return Some((pid, exit));
            }
            0 => return None,
            _ if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => return None,
        }
    }
}

impl Exit {
    /// For a sentence that says how a process ended.
    pub fn describe(self) -> String {
        match (self.code, self.signal_name()) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => signal,
            (None, None) => "an unknown status".to_owned(),
        }
    }

    /// The name of the signal, as `kill -l` knows it.
    pub fn signal_name(self) -> Option<String> {
        self.signal.map(|number| {
            Signal::try_from(number).map_or_else(
                |_| format!("SIG{number}"),
                |signal| signal.as_str().to_owned(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;
    use std::thread::yield_now;

    use super::{Reaper, Side};

    /// The system's allocator, which counts the requests of each thread.
    struct Counting;

    thread_local! {
        static REQUESTS: Cell<usize> = const { Cell::new(0) };
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    // SAFETY: everything is passed on as it is.
    #[allow(unsafe_code)]
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            REQUESTS.set(REQUESTS.get() + 1);
            // SAFETY: as the caller promises.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            // SAFETY: as the caller promises.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    #[test]
    fn from_the_wait_to_the_hand_over_nothing_is_allocated() {
        let reaper = Reaper::default();
        let mut known = reaper.fork(Side::Runtime, || 0).expect("runs").exit;
        drop(reaper.fork(Side::Runtime, || 1).expect("runs"));
        let before = REQUESTS.get();
        while !reaper.children().is_empty() {
            reaper.reap();
            yield_now();
        }
        let exit = known.try_recv();
        assert_eq!(REQUESTS.get(), before);
        let exit = exit.expect("was handed over");
        assert_eq!((exit.code, exit.signal), (Some(0), None));
        assert!(before > 0, "it counts");
    }
}
