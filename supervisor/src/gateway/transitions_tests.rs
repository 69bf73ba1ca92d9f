//! The table of `transitions::next`, row by row.

use super::*;

const POLICY: Policy = Policy {
    startup_timeout: Duration::from_mins(3),
    stop_grace: Duration::from_secs(30),
    hold: true,
    has_prepare: false,
};

const PREPARED: Policy = Policy {
    has_prepare: true,
    ..POLICY
};

/// Every row happens at this moment, without jitter.
const NOW: Moment = Duration::from_secs(1000);

const fn at(seconds: u64) -> Moment {
    Duration::from_secs(seconds)
}

fn row(phase: Phase, event: Event) -> (Phase, Option<Action>) {
    let (state, action) = next(prepared(phase, 0), event, NOW, 0.0, &POLICY);
    (state.phase, action)
}

const fn prepared(phase: Phase, failures: u32) -> State {
    State {
        phase,
        failures,
        losses: 0,
        prepared: true,
        early_exits: 0,
    }
}

fn restoring(policy: &Policy) -> State {
    next(State::boot(policy), Event::Swept, NOW, 0.0, policy).0
}

const STARTING: Phase = Phase::Starting { until: at(1180) };
const RUNNING: Phase = Phase::Running { since: at(990) };
const BACKOFF: Phase = Phase::Backoff { until: at(1001) };
const FAILED: Phase = Phase::Failed { until: at(1300) };
const HELD: Phase = Phase::Held { until: at(1001) };
const PREPARING: Phase = Phase::Preparing { until: at(1180) };

const fn stopping(then: Then) -> Phase {
    let until = at(1030);
    Phase::Stopping { until, then }
}

const fn sweeping(then: Then) -> Phase {
    let what = Swept::Gateway;
    let until = match then {
        Then::Down => Some(at(1010)),
        _ => None,
    };
    Phase::Sweeping { what, then, until }
}

const fn sweeping_up(then: Then) -> Phase {
    let what = Swept::Start;
    let until = None;
    Phase::Sweeping { what, then, until }
}

/// By a further signal, a moment ago.
fn cut(phase: Phase) -> Phase {
    match phase {
        Phase::Sweeping { what, then, .. } => {
            let until = Some(at(1002));
            Phase::Sweeping { what, then, until }
        }
        other => other,
    }
}

#[test]
fn every_transition() {
    use Action::{Ask, Finish, Restore, Spawn, Sweep, Terminate};
    use Event::{Exited, Ready, Restart, RestoreFailed, Restored, RootLost, Shutdown, Swept};
    use Phase::{Down, Restoring};

    #[rustfmt::skip]
    let rows = [
        (Restoring, Restored, STARTING, Some(Spawn)),
        (Restoring, RestoreFailed, HELD, None),
        (Restoring, Restart, Restoring, None),
        (Restoring, Shutdown, Down, Some(Finish)),
        (HELD, Restart, Restoring, Some(Restore)),
        (HELD, Shutdown, Down, Some(Finish)),

        (PREPARING, Exited(Some(0)), sweeping_up(Then::Start), Some(Sweep)),
        (PREPARING, Exited(Some(1)), sweeping_up(Then::Wait), Some(Sweep)),
        (PREPARING, Exited(Some(78)), sweeping_up(Then::Wait), Some(Sweep)),
        (PREPARING, Restart, PREPARING, None),
        (PREPARING, Shutdown, stopping(Then::Down), Some(Terminate)),

        (STARTING, Ready, Phase::Running { since: NOW }, None),
        (STARTING, Exited(Some(0)), sweeping_up(Then::Wait), Some(Sweep)),
        (STARTING, Exited(Some(78)), sweeping_up(Then::GiveUp), Some(Sweep)),
        (STARTING, Exited(None), sweeping_up(Then::Wait), Some(Sweep)),
        (STARTING, Restart, STARTING, None),
        (STARTING, Shutdown, stopping(Then::Down), Some(Terminate)),

        (RUNNING, Exited(Some(0)), sweeping(Then::Start), Some(Sweep)),
        (RUNNING, Exited(Some(1)), sweeping(Then::Wait), Some(Sweep)),
        (RUNNING, Exited(Some(78)), sweeping(Then::GiveUp), Some(Sweep)),
        (RUNNING, Exited(None), sweeping(Then::Wait), Some(Sweep)),
        (RUNNING, Restart, stopping(Then::Start), Some(Ask)),
        (RUNNING, Shutdown, stopping(Then::Down), Some(Ask)),
        (RUNNING, Ready, RUNNING, None),

        (stopping(Then::Start), Exited(None), sweeping(Then::Start), Some(Sweep)),
        (stopping(Then::Start), Exited(Some(78)), sweeping(Then::Start), Some(Sweep)),
        (stopping(Then::Start), Restart, stopping(Then::Start), None),
        (stopping(Then::Start), Ready, stopping(Then::Start), None),
        (stopping(Then::Start), Shutdown, stopping(Then::Down), None),
        (stopping(Then::Wait), Restart, stopping(Then::Start), None),
        (stopping(Then::Down), Restart, stopping(Then::Down), None),
        (stopping(Then::Down), Exited(Some(0)), sweeping(Then::Down), Some(Sweep)),
        (stopping(Then::Down), Shutdown, sweeping(Then::Down), Some(Sweep)),

        (sweeping(Then::Start), Swept, STARTING, Some(Spawn)),
        (sweeping(Then::GiveUp), Swept, FAILED, None),
        (sweeping(Then::Down), Swept, Down, Some(Finish)),
        (sweeping(Then::Wait), Restart, sweeping(Then::Start), None),
        (sweeping_up(Then::Wait), Restart, sweeping_up(Then::Start), None),
        (sweeping(Then::Down), Shutdown, cut(sweeping(Then::Down)), None),
        (cut(sweeping(Then::Down)), Shutdown, cut(sweeping(Then::Down)), None),
        (sweeping(Then::GiveUp), Restart, sweeping(Then::Start), None),
        (sweeping(Then::Down), Restart, sweeping(Then::Down), None),
        (sweeping(Then::Start), Shutdown, sweeping(Then::Down), None),
        (sweeping(Then::Start), Exited(None), sweeping(Then::Start), None),

        (BACKOFF, Restart, STARTING, Some(Spawn)),
        (BACKOFF, Shutdown, Down, Some(Finish)),
        (FAILED, Restart, STARTING, Some(Spawn)),
        (FAILED, Shutdown, Down, Some(Finish)),
        (BACKOFF, RootLost, Restoring, Some(Restore)),
        (FAILED, RootLost, Restoring, Some(Restore)),

        (PREPARING, RootLost, stopping(Then::Restore), Some(Terminate)),
        (STARTING, RootLost, stopping(Then::Restore), Some(Terminate)),
        (RUNNING, RootLost, stopping(Then::Restore), Some(Ask)),
        (stopping(Then::Start), RootLost, stopping(Then::Restore), None),
        (stopping(Then::Wait), RootLost, stopping(Then::Restore), None),
        (stopping(Then::GiveUp), RootLost, stopping(Then::Restore), None),
        (stopping(Then::Restore), RootLost, stopping(Then::Restore), None),
        (stopping(Then::Restore), Exited(None), sweeping(Then::Restore), Some(Sweep)),
        (stopping(Then::Restore), Restart, stopping(Then::Restore), None),
        (stopping(Then::Restore), Shutdown, stopping(Then::Down), None),
        (stopping(Then::Down), RootLost, stopping(Then::Down), None),
        (sweeping(Then::Start), RootLost, sweeping(Then::Restore), None),
        (sweeping(Then::Wait), RootLost, sweeping(Then::Restore), None),
        (sweeping(Then::GiveUp), RootLost, sweeping(Then::Restore), None),
        (sweeping(Then::Restore), RootLost, sweeping(Then::Restore), None),
        (sweeping(Then::Restore), Swept, Restoring, Some(Restore)),
        (sweeping(Then::Restore), Restart, sweeping(Then::Restore), None),
        (sweeping(Then::Restore), Shutdown, sweeping(Then::Down), None),
        (sweeping(Then::Down), RootLost, sweeping(Then::Down), None),
        (Restoring, RootLost, Restoring, None),
        (HELD, RootLost, HELD, None),
        (Down, RootLost, Down, None),
        (Down, Restart, Down, None),
        (Down, Shutdown, Down, None),
        (Down, Restored, Down, None),
    ];
    for (phase, event, expected, action) in rows {
        assert_eq!(row(phase, event), (expected, action), "{phase:?} {event:?}");
    }
}

#[test]
fn nothing_happens_before_a_deadline_and_the_right_thing_at_it() {
    use Action::{Restore, Spawn, Sweep, Terminate};

    let rows = [
        (HELD, Phase::Restoring, Restore),
        (PREPARING, stopping(Then::Wait), Terminate),
        (STARTING, stopping(Then::Wait), Terminate),
        (stopping(Then::Start), sweeping(Then::Start), Sweep),
        (stopping(Then::Down), sweeping(Then::Down), Sweep),
        (stopping(Then::Restore), sweeping(Then::Restore), Sweep),
        (BACKOFF, STARTING, Spawn),
        (FAILED, STARTING, Spawn),
        (sweeping(Then::Down), Phase::Down, Action::Finish),
    ];
    for (phase, expected, action) in rows {
        let state = prepared(phase, 0);
        let due = state.deadline().expect("has one");
        let early = due.saturating_sub(Duration::from_millis(1));
        assert_eq!(next(state, Event::Tick, early, 0.0, &POLICY), (state, None));
        let (state, done) = next(state, Event::Tick, due, 0.0, &POLICY);
        assert_eq!(without_time(state.phase), without_time(expected));
        assert_eq!(done, Some(action), "{phase:?}");
    }
    for phase in [Phase::Restoring, RUNNING, sweeping(Then::Wait), Phase::Down] {
        assert_eq!(prepared(phase, 0).deadline(), None);
        assert_eq!(row(phase, Event::Tick), (phase, None));
    }
}

fn without_time(phase: Phase) -> Phase {
    let until = Duration::ZERO;
    match phase {
        Phase::Stopping { then, .. } => Phase::Stopping { until, then },
        Phase::Starting { .. } => Phase::Starting { until },
        Phase::Sweeping { what, then, .. } => {
            let until = None;
            Phase::Sweeping { what, then, until }
        }
        other => other,
    }
}

#[test]
fn crashes_in_a_row_wait_longer_and_longer() {
    let mut state = prepared(STARTING, 0);
    for milliseconds in [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000] {
        state = crash(state);
        let until = NOW + Duration::from_millis(milliseconds);
        assert_eq!(state.phase, Phase::Backoff { until });
        let (started, _) = next(state, Event::Tick, until, 0.0, &POLICY);
        state = State {
            phase: STARTING,
            ..started
        };
    }
}

#[test]
fn a_minute_of_readiness_forgets_crashes_and_less_does_not() {
    for (since, failures) in [(at(940), 1), (at(941), 6)] {
        let state = crash(prepared(Phase::Running { since }, 5));
        assert_eq!(state.failures, failures);
    }
}

#[test]
fn a_clean_exit_or_a_request_does_not_wait_after_crashes() {
    let (state, _) = next(
        prepared(RUNNING, 7),
        Event::Exited(Some(0)),
        NOW,
        0.0,
        &POLICY,
    );
    let (state, action) = next(state, Event::Swept, NOW, 0.0, &POLICY);
    assert_eq!((state.phase, action), (STARTING, Some(Action::Spawn)));
    let (state, _) = next(prepared(BACKOFF, 7), Event::Restart, NOW, 0.0, &POLICY);
    assert_eq!(state.failures, 0);
}

#[test]
fn early_clean_exits_wait_from_the_fourth_one_on() {
    let ready = |state, since| State {
        phase: Phase::Running { since },
        ..state
    };
    let leave = |state| {
        let (left, _) = next(state, Event::Exited(Some(0)), NOW, 0.0, &POLICY);
        next(left, Event::Swept, NOW, 0.0, &POLICY).0
    };
    let mut state = prepared(STARTING, 0);
    for _ in 0..3 {
        state = leave(ready(state, at(991)));
        assert_eq!(state.phase, STARTING);
    }
    for milliseconds in [250, 500, 1000, 2000, 4000, 5000, 5000] {
        state = leave(ready(state, at(991)));
        let until = NOW + Duration::from_millis(milliseconds);
        assert_eq!(state.phase, Phase::Backoff { until });
    }
    // One that was ready for longer may leave, and so may the next.
    for since in [990, 999] {
        state = leave(ready(state, at(since)));
        assert_eq!(state.phase, STARTING);
    }
}

#[test]
fn the_first_restore_follows_a_sweep_and_is_all_that_is_shown() {
    let boot = State::boot(&POLICY);
    assert_eq!((boot.word(), boot.deadline()), ("restoring", None));
    let (state, action) = next(boot, Event::Swept, NOW, 0.0, &POLICY);
    let expected = (Phase::Restoring, Some(Action::Restore));
    assert_eq!((state.phase, action), expected);
    let (state, _) = next(boot, Event::Shutdown, NOW, 0.0, &POLICY);
    assert_eq!(state.deadline(), Some(at(1010)));
}

#[test]
fn the_end_of_a_prepare_step_is_no_stop() {
    for code in [0, 1] {
        let exited = Event::Exited(Some(code));
        let (state, _) = next(prepared(PREPARING, 0), exited, NOW, 0.0, &POLICY);
        assert_eq!(state.word(), "starting");
    }
    let (state, _) = next(prepared(RUNNING, 0), Event::Exited(None), NOW, 0.0, &POLICY);
    assert_eq!(state.word(), "stopping");
}

#[test]
fn the_prepare_step_runs_until_it_succeeds_and_then_no_more() {
    let (state, action) = next(restoring(&PREPARED), Event::Restored, NOW, 0.0, &POLICY);
    assert_eq!((state.phase, action), (PREPARING, Some(Action::Prepare)));
    let failed = crash(state);
    let (again, action) = next(failed, Event::Restart, NOW, 0.0, &POLICY);
    assert_eq!((again.phase, action), (PREPARING, Some(Action::Prepare)));
    let (swept, _) = next(again, Event::Exited(Some(0)), NOW, 0.0, &POLICY);
    let (started, action) = next(swept, Event::Swept, NOW, 0.0, &POLICY);
    assert_eq!((started.phase, action), (STARTING, Some(Action::Spawn)));
    let (_, action) = next(crash(started), Event::Restart, NOW, 0.0, &POLICY);
    assert_eq!(action, Some(Action::Spawn));
}

#[test]
fn a_failed_restore_holds_unless_told_to_start() {
    let mut state = restoring(&POLICY);
    for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
        let (held, action) = next(state, Event::RestoreFailed, NOW, 0.0, &POLICY);
        let until = NOW + at(seconds);
        assert_eq!((held.phase, action), (Phase::Held { until }, None));
        (state, _) = next(held, Event::Tick, until, 0.0, &POLICY);
    }
    // What failed until now were restores: the gateway begins with none.
    let (state, _) = next(state, Event::Restored, NOW, 0.0, &POLICY);
    assert_eq!(state.failures, 0);

    let start = Policy {
        hold: false,
        ..POLICY
    };
    let (state, action) = next(restoring(&POLICY), Event::RestoreFailed, NOW, 0.0, &start);
    assert_eq!((state.phase, action), (STARTING, Some(Action::Spawn)));
}

#[test]
fn a_root_that_is_lost_again_and_again_waits_longer_and_longer_for_its_restore() {
    let mut state = prepared(RUNNING, 3);
    let mut waits = Vec::new();
    for _ in 0..9 {
        let (stopping, _) = next(state, Event::RootLost, NOW, 0.0, &POLICY);
        let (sweeping, _) = next(stopping, Event::Exited(None), NOW, 0.0, &POLICY);
        let (again, action) = next(sweeping, Event::Swept, NOW, 0.0, &POLICY);
        waits.push(
            again
                .deadline()
                .map_or(0, |until| until.saturating_sub(NOW).as_secs()),
        );
        let again = if let Phase::Held { until } = again.phase {
            next(again, Event::Tick, until, 0.0, &POLICY).0
        } else {
            assert_eq!(action, Some(Action::Restore));
            again
        };
        let (started, _) = next(again, Event::Restored, NOW, 0.0, &POLICY);
        assert_eq!((started.phase, started.failures), (STARTING, 0));
        // It crashes, which is the gateway's own affair.
        state = crash(started);
    }
    assert_eq!(waits, [0, 1, 2, 4, 8, 16, 32, 60, 60]);

    // A minute of readiness forgets them, however it ends.
    for event in [Event::Exited(Some(0)), Event::Restart, Event::RootLost] {
        let ready = State {
            phase: Phase::Running { since: at(940) },
            ..state
        };
        let (left, _) = next(ready, event, NOW, 0.0, &POLICY);
        assert_eq!(
            left.losses,
            u32::from(event == Event::RootLost),
            "{event:?}"
        );
    }
}

#[test]
fn after_a_lost_root_the_prepare_step_runs_again() {
    for phase in [
        RUNNING,
        BACKOFF,
        sweeping(Then::Start),
        stopping(Then::Wait),
    ] {
        let (state, _) = next(prepared(phase, 0), Event::RootLost, NOW, 0.0, &PREPARED);
        let state = State {
            phase: Phase::Restoring,
            ..state
        };
        let (_, action) = next(state, Event::Restored, NOW, 0.0, &PREPARED);
        assert_eq!(action, Some(Action::Prepare), "{phase:?}");
    }
}

fn crash(state: State) -> State {
    let (state, action) = next(state, Event::Exited(Some(1)), NOW, 0.0, &POLICY);
    assert_eq!(action, Some(Action::Sweep));
    next(state, Event::Swept, NOW, 0.0, &POLICY).0
}
