//! The states of the gateway, what may happen in them and what there is to do: the words that `transitions` is written in.
//!
//! To the outside a state is a word of the API and the moment at which something is due.

use std::time::Duration;

use crate::clock::Moment;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub phase: Phase,
    /// Crashes, or failed restores while restoring, in a row.
    pub failures: u32,
    /// Roots lost in a row, forgotten like crashes.
    pub losses: u32,
    /// Whether the prepare step has run since the restore (or there is none).
    pub prepared: bool,
    /// Clean exits shortly after readiness, in a row.
    pub early_exits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Restoring,
    /// The restore failed; nothing starts before one succeeds.
    Held {
        until: Moment,
    },
    Preparing {
        until: Moment,
    },
    Starting {
        until: Moment,
    },
    Running {
        since: Moment,
    },
    /// Asked to go; at `until` it is made to.
    Stopping {
        until: Moment,
        then: Then,
    },
    /// Everything that is left of the gateway is being killed. At `until`, if there is one, we leave without having seen its end.
    Sweeping {
        what: Swept,
        then: Then,
        until: Option<Moment>,
    },
    Backoff {
        until: Moment,
    },
    Failed {
        until: Moment,
    },
    /// For good: the supervisor is on its way out.
    Down,
}

/// Whose processes a sweep kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swept {
    /// A gateway's that another supervisor has left, before the first restore.
    Earlier,
    /// What a start that came to nothing, or a prepare step, has left behind.
    Start,
    Gateway,
}

/// What follows once nothing of the gateway is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Start,
    Wait,
    GiveUp,
    Restore,
    Down,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Restored,
    RestoreFailed,
    /// The process in hand (gateway or prepare script) ended or could not be executed; `None` is a signal.
    Exited(Option<i32>),
    Ready,
    Swept,
    /// The root is not the directory that the last restore left: only a restore helps.
    RootLost,
    /// Time has passed; `deadline` says when this is due.
    Tick,
    Restart,
    /// SIGTERM or its like; a second one cuts the wait for the gateway.
    Shutdown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Restore,
    Prepare,
    Spawn,
    /// Ask a ready gateway to go, through its own bounded request.
    Ask,
    /// SIGTERM: it is not ready, so it serves no request.
    Terminate,
    /// Kill whatever is left, until nothing is.
    Sweep,
    /// Nothing runs any more: final snapshot, then exit.
    Finish,
}

/// The settings that decide.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    pub startup_timeout: Duration,
    pub stop_grace: Duration,
    /// `RUNTIME_ON_RESTORE_FAILURE=hold`
    pub hold: bool,
    pub has_prepare: bool,
}

impl State {
    /// At boot: the first action is a sweep, then comes the restore.
    pub fn boot(policy: &Policy) -> Self {
        Self {
            phase: Phase::Sweeping {
                what: Swept::Earlier,
                then: Then::Restore,
                until: None,
            },
            failures: 0,
            losses: 0,
            prepared: !policy.has_prepare,
            early_exits: 0,
        }
    }

    /// When `Tick` is due.
    pub fn deadline(&self) -> Option<Moment> {
        match self.phase {
            Phase::Held { until }
            | Phase::Preparing { until }
            | Phase::Starting { until }
            | Phase::Stopping { until, .. }
            | Phase::Backoff { until }
            | Phase::Failed { until } => Some(until),
            Phase::Sweeping { until, .. } => until,
            Phase::Restoring | Phase::Running { .. } | Phase::Down => None,
        }
    }

    /// `gateway.status` of the API.
    pub fn word(&self) -> &'static str {
        match self.phase {
            Phase::Restoring
            | Phase::Held { .. }
            | Phase::Sweeping {
                what: Swept::Earlier,
                ..
            } => "restoring",
            Phase::Preparing { .. }
            | Phase::Starting { .. }
            | Phase::Sweeping {
                what: Swept::Start,
                then: Then::Start | Then::Wait | Then::GiveUp,
                ..
            } => "starting",
            Phase::Running { .. } => "running",
            Phase::Stopping { .. } | Phase::Sweeping { .. } | Phase::Down => "stopping",
            Phase::Backoff { .. } => "backoff",
            Phase::Failed { .. } => "failed",
        }
    }
}
