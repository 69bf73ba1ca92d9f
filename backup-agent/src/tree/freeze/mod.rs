//! Holds every process of the gateway for a moment, so that what is read meanwhile is of one instant.
//!
//! They are held by ptrace(2): nobody is told of that, neither a shell that waits for its job nor a parent. The calling thread
//! looks who is held, another one holds them and lets all go on when the time is over.

mod look;
mod tracer;

use std::{
    io, thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    unistd::{Pid, Uid},
};

use self::{
    look::{Found, Known},
    tracer::Tracer,
};
use super::process;
use crate::capabilities;

/// Between two looks at threads that are not held yet: most are within some ten microseconds.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// The kernel needs a moment to let everybody go on, and a busy machine to let the tracer run; that is part of the pause.
const LONGEST_MARGIN: Duration = Duration::from_millis(25);

/// Whom to hold, and for how long at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freezer {
    /// Every process of this user.
    pub user: Uid,
    pub limit: Duration,
}

/// Why nothing is read at one instant.
#[derive(Debug, thiserror::Error)]
pub enum NotFrozen {
    #[error(
        "root lacks the capability SYS_PTRACE here, which it takes to hold the gateway (docker run --cap-add SYS_PTRACE)"
    )]
    NoCapability,
    #[error(
        "process {by} traces process {pid} of the gateway, which nobody else can hold then; end that debugger"
    )]
    Traced { pid: Pid, by: Pid },
    #[error(
        "cannot hold process {0} of the gateway: {1}; a seccomp profile or a security module may forbid ptrace"
    )]
    Refused(Pid, Errno),
    #[error(
        "thread {0} of the gateway (state {1}) was not held within half of the pause; where that happens often, make RUNTIME_MAX_PAUSE longer"
    )]
    Late(Pid, char),
    #[error(
        "processes of the gateway came and went for half of the pause; where that happens often, make RUNTIME_MAX_PAUSE longer"
    )]
    Restless,
    #[error("cannot tell which processes of the gateway run: {0}")]
    Unknown(#[from] process::Error),
    #[error("cannot start a thread that holds the gateway: {0}")]
    NoThread(io::Error),
    #[error(
        "a process of the gateway ran while the tree was read, or reading took longer than RUNTIME_MAX_PAUSE"
    )]
    Interrupted,
}

impl Freezer {
    /// Holds all of them.
    pub fn freeze(self) -> Result<Frozen, NotFrozen> {
        // A /proc that shows nothing says nothing about capabilities either.
        process::others()?;
        // Without it a /proc with hidepid shows none of them, and nobody would seem to be there.
        if !capabilities::can_trace() {
            return Err(NotFrozen::NoCapability);
        }
        let tracer = Tracer::start().map_err(NotFrozen::NoThread)?;
        let mut frozen = Frozen {
            limit: self.limit,
            known: Known::new(self.user, tracer.id),
            tracer,
            begun: None,
        };
        let start = Instant::now();
        // A process that forks may hide its child from one look, so it takes two in a row.
        let mut quiet_looks = 0;
        while quiet_looks < 2 {
            let found = frozen.known.look()?;
            if found.is_quiet() {
                quiet_looks += 1;
                continue;
            }
            quiet_looks = 0;
            let runs = found.runs;
            frozen.hold(found)?;
            if frozen.begun.unwrap_or(start).elapsed() >= self.limit / 2 {
                return Err(late(runs));
            }
            if runs.is_some() {
                thread::sleep(LOOK_AGAIN);
            }
        }
        frozen.begun.get_or_insert_with(Instant::now);
        Ok(frozen)
    }
}

fn late(runs: Option<(Pid, u8)>) -> NotFrozen {
    runs.map_or(NotFrozen::Restless, |(pid, state)| {
        NotFrozen::Late(pid, state.into())
    })
}

/// For as long as it lives, the processes are held, unless the time is over.
pub struct Frozen {
    limit: Duration,
    known: Known,
    tracer: Tracer,
    begun: Option<Instant>,
}

impl Frozen {
    /// When they go on, whatever is done by then.
    pub fn until(&self) -> Instant {
        let margin = (self.limit / 10).min(LONGEST_MARGIN);
        self.begun.unwrap_or_else(Instant::now) + self.limit.saturating_sub(margin)
    }

    fn hold(&mut self, found: Found) -> Result<(), NotFrozen> {
        if found.new.is_empty() {
            return Ok(());
        }
        self.begun.get_or_insert_with(Instant::now);
        let until = self.until();
        let threads = found.new.iter().map(|thread| thread.id).collect();
        let Some(answers) = self.tracer.hold(threads, until) else {
            return Err(late(found.runs));
        };
        for (thread, answer) in found.new.into_iter().zip(answers) {
            self.known.told(thread, answer)?;
        }
        Ok(())
    }

    /// Lets them go on: whether nobody of them could do anything until now, and for how long that was.
    pub fn thaw(mut self) -> (bool, Duration) {
        let is_held = self.known.is_still_held().unwrap_or_default();
        // In this order: nobody went on before the look was over.
        let is_whole = is_held && self.tracer.let_go().is_none();
        let begun = self.begun.unwrap_or_else(Instant::now);
        (is_whole, self.tracer.end().saturating_duration_since(begun))
    }
}
