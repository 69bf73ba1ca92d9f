//! The life of the gateway as a table: `next(state, event)` is the next state and at most one thing to do.
//!
//! No clock, process or socket: time and randomness are arguments. The invariant that everything else leans on: a start
//! (`Prepare`, `Spawn`) follows a restore or a finished sweep only, so two gateways never run on one tree. So does a restore: no
//! gateway runs on a tree that is being replaced.

use std::time::Duration;

use super::backoff;
use super::state::{Action, Event, Phase, Policy, State, Swept, Then};
use crate::clock::Moment;

/// Ready for this long, and earlier crashes are forgotten.
const STABLE_AFTER: Duration = Duration::from_mins(1);

/// A clean exit sooner than this after readiness is early. So many in a row may be changes of its configuration; each further one
/// waits.
const EARLY: Duration = Duration::from_secs(10);
const MAX_EARLY: u32 = 3;

/// A sweep whose processes do not die holds up our own end for so long, and after a further signal only for so long.
const LAST_SWEEP: Duration = Duration::from_secs(10);
const CUT_SWEEP: Duration = Duration::from_secs(2);

/// Exit 78 (`EX_CONFIG`): the gateway refuses its configuration or database. Only a person or an update changes that.
const REFUSED_RETRY: Duration = Duration::from_mins(5);

#[allow(clippy::too_many_lines)] // one table reads best in one piece
pub fn next(
    state: State,
    event: Event,
    now: Moment,
    jitter: f64,
    policy: &Policy,
) -> (State, Option<Action>) {
    let state = State {
        losses: if is_stable(state.phase, now) {
            0
        } else {
            state.losses
        },
        ..state
    };
    let to = |phase| State { phase, ..state };
    let sweeping = |what, then| {
        let until = (then == Then::Down).then_some(now + LAST_SWEEP);
        Phase::Sweeping { what, then, until }
    };
    let sweep = |then| {
        let what = match state.phase {
            Phase::Preparing { .. } | Phase::Starting { .. } => Swept::Start,
            _ => Swept::Gateway,
        };
        (to(sweeping(what, then)), Some(Action::Sweep))
    };
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
            let (swept, action) = sweep(Then::Start);
            let prepared = true;
            (State { prepared, ..swept }, action)
        }
        (Phase::Starting { .. }, Event::Ready) => (to(Phase::Running { since: now }), None),

        // A clean exit of a ready gateway asks for a fresh process; one before readiness would loop hot, so it is a crash.
        (Phase::Running { since }, Event::Exited(Some(0))) => {
            let is_early = now.saturating_sub(since) < EARLY;
            let early_exits = if is_early { state.early_exits + 1 } else { 0 };
            let is_loop = early_exits > MAX_EARLY;
            let (swept, action) = sweep(if is_loop { Then::Wait } else { Then::Start });
            (
                State {
                    early_exits,
                    ..swept
                },
                action,
            )
        }
        (Phase::Starting { .. } | Phase::Running { .. }, Event::Exited(Some(78))) => {
            sweep(Then::GiveUp)
        }
        (Phase::Running { .. }, Event::Exited(_)) if is_stable(state.phase, now) => {
            let (swept, action) = sweep(Then::Wait);
            (
                State {
                    failures: 0,
                    early_exits: 0,
                    ..swept
                },
                action,
            )
        }
        (
            Phase::Preparing { .. } | Phase::Starting { .. } | Phase::Running { .. },
            Event::Exited(_),
        ) => {
            let (swept, action) = sweep(Then::Wait);
            let early_exits = 0;
            (
                State {
                    early_exits,
                    ..swept
                },
                action,
            )
        }
        (Phase::Preparing { until } | Phase::Starting { until }, Event::Tick) if now >= until => {
            stop(Then::Wait, Action::Terminate)
        }

        (_, Event::RootLost) => lost(state, now, jitter, policy),

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
        (
            Phase::Sweeping {
                what,
                then: Then::Down,
                until: Some(until),
            },
            Event::Shutdown,
        ) => {
            let until = Some(until.min(now + CUT_SWEEP));
            let then = Then::Down;
            (to(Phase::Sweeping { what, then, until }), None)
        }
        (Phase::Sweeping { what, .. }, Event::Shutdown) => (to(sweeping(what, Then::Down)), None),
        (
            Phase::Sweeping {
                what,
                then: Then::Wait | Then::GiveUp,
                ..
            },
            Event::Restart,
        ) => (to(sweeping(what, Then::Start)), None),
        (Phase::Sweeping { then, .. }, Event::Swept) => swept(state, then, now, jitter, policy),
        (
            Phase::Sweeping {
                then: Then::Down,
                until: Some(until),
                ..
            },
            Event::Tick,
        ) if now >= until => (to(Phase::Down), Some(Action::Finish)),

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

/// The gateway goes first, if it is up: it works in a tree that is not there any more. A restore or a shutdown that is under way
/// goes on as it is.
fn lost(state: State, now: Moment, jitter: f64, policy: &Policy) -> (State, Option<Action>) {
    let then = Then::Restore;
    let stopping = |until| Phase::Stopping { until, then };
    let grace = now + policy.stop_grace;
    let lost = State {
        failures: 0,
        losses: state.losses.saturating_add(1),
        prepared: !policy.has_prepare,
        ..state
    };
    let (phase, action) = match state.phase {
        Phase::Restoring
        | Phase::Held { .. }
        | Phase::Down
        | Phase::Stopping {
            then: Then::Restore | Then::Down,
            ..
        }
        | Phase::Sweeping {
            then: Then::Restore | Then::Down,
            ..
        } => return (state, None),
        Phase::Preparing { .. } | Phase::Starting { .. } => {
            (stopping(grace), Some(Action::Terminate))
        }
        Phase::Running { .. } => (stopping(grace), Some(Action::Ask)),
        Phase::Stopping { until, .. } => (stopping(until), None),
        Phase::Sweeping { what, until, .. } => (Phase::Sweeping { what, then, until }, None),
        Phase::Backoff { .. } | Phase::Failed { .. } => return restore(lost, now, jitter),
    };
    (State { phase, ..lost }, action)
}

/// At once after the first loss. A gateway that removes its own root is not to load the store without end.
fn restore(state: State, now: Moment, jitter: f64) -> (State, Option<Action>) {
    let (phase, action) = match state.losses {
        0 | 1 => (Phase::Restoring, Some(Action::Restore)),
        losses => {
            let until = now + backoff::RESTORE.delay(losses - 1, jitter);
            (Phase::Held { until }, None)
        }
    };
    (State { phase, ..state }, action)
}

fn is_stable(phase: Phase, now: Moment) -> bool {
    matches!(phase, Phase::Running { since } if now.saturating_sub(since) >= STABLE_AFTER)
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
        Then::Wait if state.early_exits > MAX_EARLY => {
            let wait = backoff::FRESH.delay(state.early_exits - MAX_EARLY, jitter);
            let until = now + wait;
            let phase = Phase::Backoff { until };
            (State { phase, ..state }, None)
        }
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
        Then::Restore => restore(state, now, jitter),
        Then::Down => {
            let phase = Phase::Down;
            (State { phase, ..state }, Some(Action::Finish))
        }
    }
}

#[cfg(test)]
#[path = "transitions_tests.rs"]
mod tests;
