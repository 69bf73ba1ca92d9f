//! The one place that waits for children: ours, and the orphans that arrive at PID 1.
//!
//! Invariant: a child is known before it can be reaped, because it is started and entered under the same lock that reaping
//! takes. `tokio::process` is not used anywhere: two waiters would steal each other's statuses.

use std::collections::HashMap;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::log::log;
use crate::signals::Wakeups;

/// How a process ended: by itself with a code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
}

type Children = HashMap<i32, oneshot::Sender<Exit>>;

#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Children>>);

impl Reaper {
    /// Starts a child. Its exit comes through the receiver, once.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Child, oneshot::Receiver<Exit>)> {
        let mut children = self.children();
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        children.insert(pid(&child).as_raw(), sender);
        Ok((child, receiver))
    }

    /// Reaps at every SIGCHLD, for ever.
    pub async fn run(self, mut wakeups: Wakeups) {
        loop {
            wakeups.next().await;
            self.reap();
        }
    }

    /// Reaps everything that has ended: one SIGCHLD may stand for many.
    fn reap(&self) {
        let mut children = self.children();
        while let Some((pid, exit)) = wait() {
            match children.remove(&pid) {
                // The receiver is gone when nobody cares any more.
                Some(known) => drop(known.send(exit)),
                None => log!(Debug, "orphan reaped", pid = pid),
            }
        }
    }

    fn children(&self) -> MutexGuard<'_, Children> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("the kernel's pids are positive and fit"))
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
    /// The name of the signal, as `kill -l` knows it.
    pub fn signal_name(self) -> Option<String> {
        self.signal.map(|number| {
            nix::sys::signal::Signal::try_from(number).map_or_else(
                |_| format!("SIG{number}"),
                |signal| signal.as_str().to_owned(),
            )
        })
    }
}
