//! Processes that a gateway leaves behind, made with a bare `fork`: thousands a second, and hard to catch.
//!
//! Called before there are threads, so a copy may do what it likes.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::_exit;
use nix::sys::signal::{SigHandler, Signal, kill, raise, signal};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setpgid, setsid};

const BATCH: u64 = 1000;

/// So that nothing is left of a test that failed.
const LONGEST_LIFE: Duration = Duration::from_mins(1);

const REST: Duration = Duration::from_millis(1);

/// Makes `count` orphans that end at once. A batch follows when the last one has been reaped by whoever adopts them, so
/// that the machine does not run out of pids; after the last one nothing is waited for.
pub fn orphans(count: u64) {
    for batch in 0..count / BATCH {
        let parent = copy(|| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).expect("is no session's leader");
            for _ in 0..BATCH {
                copy(|| ());
            }
        });
        waitpid(parent, None).expect("is our child");
        let is_last = batch + 1 == count / BATCH;
        while !is_last && kill(Pid::from_raw(-parent.as_raw()), None) != Err(Errno::ESRCH) {
            std::thread::sleep(REST);
        }
    }
}

/// `count` processes in sessions of their own and deaf to SIGTERM, of which each rests for a while and then leaves another
/// one in its place.
pub fn rabbits(count: u64, rest: Duration) {
    let end = Instant::now() + LONGEST_LIFE;
    for _ in 0..count {
        copy(|| {
            while Instant::now() < end {
                be_deaf();
                std::thread::sleep(rest);
                // Goes on as a copy of itself.
                // SAFETY: there are no other threads, so the copy is whole.
                if let Ok(ForkResult::Parent { .. }) = unsafe { fork() } {
                    exit_at_once();
                }
            }
        });
    }
}

/// A process that has stopped itself.
pub fn stopped() {
    copy(|| {
        be_deaf();
        raise(Signal::SIGSTOP).expect("can be raised");
    });
}

/// A process that keeps what we have open, as a helper that inherited our listener does.
pub fn holder() {
    copy(|| {
        be_deaf();
        std::thread::sleep(LONGEST_LIFE);
    });
}

fn be_deaf() {
    let _ = setsid();
    for deaf in [Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: to ignore a signal runs no code.
        let _ = unsafe { signal(deaf, SigHandler::SigIgn) };
    }
}

/// A copy of us that does `work` and ends.
fn copy(work: impl FnOnce()) -> Pid {
    loop {
        // SAFETY: there are no other threads, so the copy is whole.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                work();
                exit_at_once();
            }
            Ok(ForkResult::Parent { child }) => return child,
            // No pid is free: some are on their way out.
            Err(_) => std::thread::sleep(REST),
        }
    }
}

fn exit_at_once() -> ! {
    // SAFETY: ends the process; nothing of it is used afterwards.
    unsafe { _exit(0) }
}
