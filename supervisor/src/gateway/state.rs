//! The life of the gateway as a table: `next(state, event)` is the next state and at most one thing to do.
//!
//! No clock, process or socket: time and randomness are arguments. The invariant that everything else leans on: a start
//! (`Prepare`, `Spawn`) follows a restore or a finished sweep only, so two gateways never run on one tree.

use std::time::Duration;

use super::backoff;
use crate::clock::Moment;

/// Ready for this long, and earlier crashes are forgotten.
const STABLE_AFTER: Duration = Duration::from_mins(1);

/// Exit 78 (`EX_CONFIG`): the gateway refuses its configuration or database. Only a person or an update changes that.
const REFUSED_RETRY: Duration = Duration::from_mins(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub phase: Phase,
    /// Crashes, or failed restores while restoring, in a row.
    pub failures: u32,
    /// Whether the prepare step has run since the restore (or there is none).
    pub prepared: bool,
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
    /// Everything that is left of the gateway is being killed.
    Sweeping {
        then: Then,
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

/// What follows once nothing of the gateway is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Start,
    Wait,
    GiveUp,
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
    /// Time has passed; `deadline` says when this is due.
    Tick,
    Restart,
    /// SIGTERM or SIGINT; a second one cuts the wait for the gateway.
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
}

impl State {
    /// At boot, with the restore under way.
    pub fn boot(has_prepare: bool) -> Self {
        Self {
            phase: Phase::Restoring,
            failures: 0,
            prepared: !has_prepare,
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
            Phase::Restoring | Phase::Running { .. } | Phase::Sweeping { .. } | Phase::Down => None,
        }
    }

    /// `gateway.status` of the API.
    pub fn word(&self) -> &'static str {
        match self.phase {
            Phase::Restoring | Phase::Held { .. } => "restoring",
            Phase::Preparing { .. } | Phase::Starting { .. } => "starting",
            Phase::Running { .. } => "running",
            Phase::Stopping { .. } | Phase::Sweeping { .. } | Phase::Down => "stopping",
            Phase::Backoff { .. } => "backoff",
            Phase::Failed { .. } => "failed",
        }
    }
}

#[allow(clippy::too_many_lines)] // one table reads best in one piece
pub fn next(
    state: State,
    event: Event,
    now: Moment,
    jitter: f64,
    policy: &Policy,
) -> (State, Option<Action>) {
    let to = |phase| State { phase, ..state };
    let sweep = |then| (to(Phase::Sweeping { then }), Some(Action::Sweep));
    let stop = |then, action| {
        let until = now + policy.stop_grace;
        (to(Phase::Stopping { until, then }), Some(action))
    };
    match (state.phase, event) {
        (Phase::Restoring, Event::RestoreFailed) if policy.hold => {
            let failures = state.failures.saturating_add(1);
            let until = now + backoff::RESTORE.delay(failures, jitter);
            let phase = Phase::Held { until };
            (
                State {
                    phase,
                    failures,
                    ..state
                },
                None,
            )
        }
        (Phase::Restoring, Event::Restored | Event::RestoreFailed) => start(state, now, policy),
        (Phase::Held { until }, Event::Tick) if now >= until => {
            (to(Phase::Restoring), Some(Action::Restore))
        }
        (Phase::Held { .. }, Event::Restart) => (to(Phase::Restoring), Some(Action::Restore)),

        (Phase::Preparing { .. }, Event::Exited(Some(0))) => {
            let phase = Phase::Sweeping { then: Then::Start };
            let prepared = true;
            (
                State {
                    phase,
                    prepared,
                    ..state
                },
                Some(Action::Sweep),
            )
        }
        (Phase::Starting { .. }, Event::Ready) => (to(Phase::Running { since: now }), None),

        // A clean exit of a ready gateway asks for a fresh process; one before readiness would loop hot, so it is a crash.
        (Phase::Running { .. }, Event::Exited(Some(0))) => sweep(Then::Start),
        (Phase::Starting { .. } | Phase::Running { .. }, Event::Exited(Some(78))) => {
            sweep(Then::GiveUp)
        }
        (Phase::Running { since }, Event::Exited(_))
            if now.saturating_sub(since) >= STABLE_AFTER =>
        {
            let phase = Phase::Sweeping { then: Then::Wait };
            (
                State {
                    phase,
                    failures: 0,
                    ..state
                },
                Some(Action::Sweep),
            )
        }
        (
            Phase::Preparing { .. } | Phase::Starting { .. } | Phase::Running { .. },
            Event::Exited(_),
        ) => sweep(Then::Wait),
        (Phase::Preparing { until } | Phase::Starting { until }, Event::Tick) if now >= until => {
            stop(Then::Wait, Action::Terminate)
        }

        (Phase::Stopping { then, .. }, Event::Exited(_)) => sweep(then),
        (Phase::Stopping { until, then }, Event::Tick) if now >= until => sweep(then),
        (
            Phase::Stopping {
                then: Then::Down, ..
            },
            Event::Shutdown,
        ) => sweep(Then::Down),
        (Phase::Stopping { until, .. }, Event::Shutdown) => (
            to(Phase::Stopping {
                until,
                then: Then::Down,
            }),
            None,
        ),
        (
            Phase::Stopping {
                until,
                then: Then::Wait,
            },
            Event::Restart,
        ) => (
            to(Phase::Stopping {
                until,
                then: Then::Start,
            }),
            None,
        ),
        (Phase::Sweeping { .. }, Event::Shutdown) => {
            (to(Phase::Sweeping { then: Then::Down }), None)
        }
        (
            Phase::Sweeping {
                then: Then::Wait | Then::GiveUp,
            },
            Event::Restart,
        ) => (to(Phase::Sweeping { then: Then::Start }), None),
        (Phase::Sweeping { then }, Event::Swept) => swept(state, then, now, jitter, policy),

        (Phase::Backoff { until } | Phase::Failed { until }, Event::Tick) if now >= until => {
            start(state, now, policy)
        }
        (Phase::Backoff { .. } | Phase::Failed { .. }, Event::Restart) => start(
            State {
                failures: 0,
                ..state
            },
            now,
            policy,
        ),
        (Phase::Running { .. }, Event::Restart) => stop(Then::Start, Action::Ask),

        (Phase::Running { .. }, Event::Shutdown) => stop(Then::Down, Action::Ask),
        (Phase::Preparing { .. } | Phase::Starting { .. }, Event::Shutdown) => {
            stop(Then::Down, Action::Terminate)
        }
        (
            Phase::Restoring | Phase::Held { .. } | Phase::Backoff { .. } | Phase::Failed { .. },
            Event::Shutdown,
        ) => (to(Phase::Down), Some(Action::Finish)),

        // Everything else joins what is under way (a restart while one restores, prepares or starts: that is the fresh
        // process already), or comes too late to matter.
        _ => (state, None),
    }
}

fn start(state: State, now: Moment, policy: &Policy) -> (State, Option<Action>) {
    let until = now + policy.startup_timeout;
    let restoring = matches!(state.phase, Phase::Restoring);
    let failures = if restoring { 0 } else { state.failures };
    let (phase, action) = if state.prepared {
        (Phase::Starting { until }, Action::Spawn)
    } else {
        (Phase::Preparing { until }, Action::Prepare)
    };
    (
        State {
            phase,
            failures,
            ..state
        },
        Some(action),
    )
}

fn swept(
    state: State,
    then: Then,
    now: Moment,
    jitter: f64,
    policy: &Policy,
) -> (State, Option<Action>) {
    match then {
        Then::Start => start(state, now, policy),
        Then::Wait => {
            let failures = state.failures.saturating_add(1);
            let until = now + backoff::RESTART.delay(failures, jitter);
            let phase = Phase::Backoff { until };
            (
                State {
                    phase,
                    failures,
                    ..state
                },
                None,
            )
        }
        Then::GiveUp => {
            let until = now + REFUSED_RETRY;
            let phase = Phase::Failed { until };
            (State { phase, ..state }, None)
        }
        Then::Down => {
            let phase = Phase::Down;
            (State { phase, ..state }, Some(Action::Finish))
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
