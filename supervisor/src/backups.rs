//! When a backup or a prune runs, and who waits for it. Pure: the owner starts the runs, time is an argument.
//!
//! Invariants: at most one run at a time (single flight); none at all before a restore has succeeded or the store is known
//! to be empty, nor once the root is lost; none after another writer has taken the head. A prune follows a backup and is cut short for one that somebody
//! waits for.

use std::time::Duration;

use crate::agent::Verb;
use crate::clock::Moment;
use crate::gateway::backoff::spread;

/// From one prune to the next. Snapshots pile up by the dozen in an hour, and that costs next to nothing.
const PRUNE_INTERVAL: Duration = Duration::from_hours(1);

/// `R` is whom to answer.
#[derive(Debug)]
pub struct Backups<R> {
    mode: Mode,
    interval: Duration,
    running: Option<Verb>,
    /// Whom the run under way answers. They all asked before it began, or while another call's run was under way.
    waiting: Vec<R>,
    /// Asked while a scheduled run was under way, which may have passed what they want saved: theirs is the next.
    queued: Vec<R>,
    /// The last one of this life, taken when the gateway is down.
    last: Last,
    next: Option<Moment>,
    is_prune_due: bool,
    /// When the last prune began.
    pruned: Option<Moment>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Disabled,
    Enabled(Verb),
    Fenced,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    NotDue,
    Due,
    Begun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Disabled,
    Fenced,
}

impl<R> Backups<R> {
    pub fn new(interval: Duration) -> Self {
        Self {
            mode: Mode::Disabled,
            interval,
            running: None,
            waiting: Vec::new(),
            queued: Vec::new(),
            last: Last::NotDue,
            next: None,
            is_prune_due: false,
            pruned: None,
        }
    }

    /// After a restore, with what to run from now on.
    pub fn enable(&mut self, verb: Verb, now: Moment, jitter: f64) {
        self.mode = Mode::Enabled(verb);
        self.schedule(now, jitter);
    }

    /// Another writer has the head: for good, until the next boot decides anew.
    pub fn fence(&mut self) {
        self.mode = Mode::Fenced;
        self.next = None;
    }

    /// The root is lost: nothing is saved before a restore succeeds. Returns whom to refuse; a run under way has its own end.
    pub fn disable(&mut self) -> Vec<R> {
        if self.mode != Mode::Fenced {
            self.mode = Mode::Disabled;
        }
        self.next = None;
        self.is_prune_due = false;
        std::mem::take(&mut self.queued)
    }

    /// A call. Whoever is refused is handed back.
    pub fn ask(&mut self, reply: R) -> Result<(), (R, Refusal)> {
        match self.mode {
            Mode::Disabled => return Err((reply, Refusal::Disabled)),
            Mode::Fenced => return Err((reply, Refusal::Fenced)),
            Mode::Enabled(_) => {}
        }
        let is_shared = match self.last {
            Last::NotDue => !self.waiting.is_empty(),
            Last::Due => false,
            Last::Begun => true,
        };
        if self.is_running() && is_shared {
            self.waiting.push(reply);
        } else {
            self.queued.push(reply);
        }
        Ok(())
    }

    /// Asks for the final snapshot.
    pub fn ask_last(&mut self) {
        self.last = Last::Due;
        self.next = None;
        self.is_prune_due = false;
    }

    /// What to start now, if anything.
    pub fn begin(&mut self, now: Moment) -> Option<Verb> {
        let Mode::Enabled(verb) = self.mode else {
            return None;
        };
        let is_due = self.next.is_some_and(|next| now >= next);
        if self.running.is_some() {
            return None;
        }
        if !(is_due || self.is_awaited()) {
            self.running = std::mem::take(&mut self.is_prune_due).then_some(Verb::Prune);
            self.pruned = self.running.map_or(self.pruned, |_| Some(now));
            return self.running;
        }
        if self.last == Last::Due {
            self.last = Last::Begun;
        }
        self.running = Some(verb);
        self.next = None;
        self.waiting.append(&mut self.queued);
        Some(verb)
    }

    /// The run under way has made a snapshot: old ones may go, from the writer of the head, while life goes on.
    pub fn saved(&mut self, now: Moment) {
        let is_time = self
            .pruned
            .is_none_or(|last| now.saturating_sub(last) >= PRUNE_INTERVAL);
        self.is_prune_due =
            is_time && self.last == Last::NotDue && self.mode == Mode::Enabled(Verb::Backup);
    }

    /// A prune has ended.
    pub fn end_prune(&mut self) {
        self.running = None;
    }

    /// A backup has ended; returns whom to tell. Follow it with `begin`: more may have been asked meanwhile.
    pub fn end(&mut self, now: Moment, jitter: f64) -> Vec<R> {
        self.running = None;
        self.schedule(now, jitter);
        let mut told = std::mem::take(&mut self.waiting);
        if self.mode == Mode::Fenced {
            told.append(&mut self.queued);
        }
        told
    }

    /// Whether nothing runs and nothing more will: the last snapshot is taken, or never to be.
    pub fn is_over(&self) -> bool {
        !self.is_running() && (self.last != Last::Due || !matches!(self.mode, Mode::Enabled(_)))
    }

    /// Whether a backup runs.
    pub fn is_running(&self) -> bool {
        matches!(self.running, Some(Verb::Backup | Verb::Fork))
    }

    /// Whether the backup that has just begun is not only a scheduled one: somebody waits for it, or it is the last.
    pub fn is_asked(&self) -> bool {
        self.is_running() && (!self.waiting.is_empty() || self.last == Last::Begun)
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub fn is_pruning(&self) -> bool {
        self.running == Some(Verb::Prune)
    }

    /// Whether somebody waits for a backup that has not begun.
    pub fn is_awaited(&self) -> bool {
        self.last == Last::Due || !self.queued.is_empty()
    }

    /// When the next periodic run is due.
    pub fn next(&self) -> Option<Moment> {
        self.next
    }

    /// `backup.status` of the API.
    pub fn word(&self) -> &'static str {
        match self.mode {
            Mode::Disabled => "disabled",
            Mode::Fenced => "fenced",
            Mode::Enabled(_) if self.is_running() => "running",
            Mode::Enabled(_) => "idle",
        }
    }

    fn schedule(&mut self, now: Moment, jitter: f64) {
        let is_on = matches!(self.mode, Mode::Enabled(_))
            && self.last == Last::NotDue
            && !self.interval.is_zero();
        self.next = is_on.then(|| now + spread(self.interval, jitter));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    fn enabled() -> Backups<u8> {
        let mut backups = Backups::new(MINUTE);
        backups.enable(Verb::Backup, Duration::ZERO, 0.5);
        backups
    }

    #[test]
    fn nothing_runs_before_a_restore() {
        let mut backups = Backups::new(MINUTE);
        assert_eq!(backups.word(), "disabled");
        assert_eq!(backups.ask(1), Err((1, Refusal::Disabled)));
        assert_eq!(backups.begin(MINUTE * 10), None);
        backups.ask_last();
        assert_eq!(backups.begin(MINUTE * 10), None);
        assert!(backups.is_over());
    }

    #[test]
    fn the_schedule_starts_a_run_and_the_next_counts_from_its_end() {
        let mut backups = enabled();
        assert_eq!(backups.begin(Duration::from_millis(59_999)), None);
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        assert_eq!((backups.word(), backups.next()), ("running", None));
        assert_eq!(backups.begin(MINUTE * 5), None);
        assert!(backups.end(MINUTE * 5, 0.5).is_empty());
        assert_eq!((backups.word(), backups.next()), ("idle", Some(MINUTE * 6)));
    }

    #[test]
    fn calls_at_once_share_one_run() {
        let mut backups = enabled();
        backups.ask(1).expect("is enabled");
        assert_eq!(backups.begin(Duration::ZERO), Some(Verb::Backup));
        backups.ask(2).expect("is enabled");
        assert_eq!(backups.begin(Duration::ZERO), None);
        assert_eq!(backups.end(Duration::ZERO, 0.5), [1, 2]);
        assert_eq!(backups.begin(Duration::ZERO), None);
    }

    #[test]
    fn a_call_during_a_scheduled_run_gets_a_run_of_its_own() {
        let mut backups = enabled();
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.ask(1).expect("is enabled");
        assert!(backups.end(MINUTE, 0.5).is_empty());
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        assert_eq!(backups.end(MINUTE, 0.5), [1]);
    }

    #[test]
    fn the_last_snapshot_follows_a_run_that_began_before_the_gateway_stopped() {
        let mut backups = enabled();
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.ask_last();
        assert!(!backups.is_over());
        backups.end(MINUTE, 0.5);
        assert!(!backups.is_over());
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.end(MINUTE, 0.5);
        assert!(backups.is_over());
        assert_eq!(backups.next(), None);
    }

    #[test]
    fn calls_during_the_last_run_share_it_and_cause_no_other() {
        let mut backups = enabled();
        backups.ask_last();
        assert_eq!(backups.begin(Duration::ZERO), Some(Verb::Backup));
        backups.ask(1).expect("is enabled");
        assert_eq!(backups.end(MINUTE, 0.5), [1]);
        assert_eq!(backups.begin(MINUTE), None);
        assert!(backups.is_over());
    }

    #[test]
    fn a_fence_ends_it_and_tells_everyone() {
        let mut backups = enabled();
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.ask(1).expect("is enabled");
        backups.fence();
        assert_eq!(backups.end(MINUTE, 0.5), [1]);
        assert_eq!(backups.ask(2), Err((2, Refusal::Fenced)));
        assert_eq!(backups.begin(MINUTE * 9), None);
        assert_eq!(backups.word(), "fenced");
    }

    #[test]
    fn a_lost_root_refuses_those_who_wait_until_a_restore_and_leaves_a_fence_alone() {
        let mut backups = enabled();
        backups.ask(1).expect("is enabled");
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.ask(2).expect("is enabled");
        let mut scheduled = enabled();
        assert_eq!(scheduled.begin(MINUTE), Some(Verb::Backup));
        scheduled.ask(3).expect("is enabled");
        assert_eq!(scheduled.disable(), [3]);

        assert!(backups.disable().is_empty());
        assert_eq!((backups.word(), backups.next()), ("disabled", None));
        assert_eq!(backups.ask(4), Err((4, Refusal::Disabled)));
        assert_eq!(backups.end(MINUTE, 0.5), [1, 2]);
        assert_eq!(backups.begin(MINUTE * 9), None);
        backups.enable(Verb::Backup, MINUTE * 9, 0.5);
        assert_eq!(backups.begin(MINUTE * 10), Some(Verb::Backup));

        let mut fenced = enabled();
        fenced.fence();
        fenced.disable();
        assert_eq!(fenced.word(), "fenced");
    }

    #[test]
    fn a_run_is_asked_for_by_a_call_or_by_the_end_and_not_by_the_schedule() {
        let mut backups = enabled();
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        assert!(!backups.is_asked());
        backups.ask(1).expect("is enabled");
        assert!(!backups.is_asked(), "its answer comes from the next run");
        backups.end(MINUTE, 0.5);
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        assert!(backups.is_asked());
        backups.end(MINUTE, 0.5);
        backups.ask_last();
        assert!(!backups.is_asked());
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        assert!(backups.is_asked());
    }

    #[test]
    fn a_prune_follows_a_backup_at_most_once_an_hour() {
        let mut backups = enabled();
        let mut prunes = Vec::new();
        for minute in 1..=130 {
            let now = MINUTE * minute;
            assert_eq!(backups.begin(now), Some(Verb::Backup), "{minute}");
            backups.saved(now);
            backups.end(now, 0.5);
            if let Some(verb) = backups.begin(now) {
                assert_eq!((verb, backups.word()), (Verb::Prune, "idle"));
                assert!(backups.is_pruning() && !backups.is_running());
                prunes.push(minute);
                backups.end_prune();
            }
            assert_eq!(backups.begin(now), None);
        }
        assert_eq!(prunes, [1, 61, 121]);
    }

    #[test]
    fn no_prune_follows_a_failure_a_fork_a_fence_or_the_last_snapshot() {
        let mut backups = enabled();
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.end(MINUTE, 0.5);
        assert_eq!(backups.begin(MINUTE), None);

        let mut forks = Backups::<u8>::new(MINUTE);
        forks.enable(Verb::Fork, Duration::ZERO, 0.5);
        assert_eq!(forks.begin(MINUTE), Some(Verb::Fork));
        forks.saved(MINUTE);
        forks.end(MINUTE, 0.5);
        assert_eq!(forks.begin(MINUTE), None);

        let mut fenced = enabled();
        assert_eq!(fenced.begin(MINUTE), Some(Verb::Backup));
        fenced.saved(MINUTE);
        fenced.fence();
        fenced.end(MINUTE, 0.5);
        assert_eq!(fenced.begin(MINUTE), None);

        let mut leaving = enabled();
        assert_eq!(leaving.begin(MINUTE), Some(Verb::Backup));
        leaving.saved(MINUTE);
        leaving.ask_last();
        leaving.end(MINUTE, 0.5);
        assert_eq!(leaving.begin(MINUTE), Some(Verb::Backup));
        leaving.saved(MINUTE);
        leaving.end(MINUTE, 0.5);
        assert_eq!(leaving.begin(MINUTE), None);
        assert!(leaving.is_over());
    }

    #[test]
    fn a_scheduled_backup_waits_for_a_prune_and_an_awaited_one_is_known() {
        let mut backups = enabled();
        assert_eq!(backups.begin(MINUTE), Some(Verb::Backup));
        backups.saved(MINUTE);
        backups.end(MINUTE, 0.5);
        assert_eq!(backups.begin(MINUTE), Some(Verb::Prune));
        assert_eq!(backups.begin(MINUTE * 9), None);
        assert!(!backups.is_awaited());
        backups.ask(1).expect("is enabled");
        assert!(backups.is_awaited());
        assert_eq!(backups.begin(MINUTE * 9), None);
        backups.end_prune();
        assert_eq!(backups.begin(MINUTE * 9), Some(Verb::Backup));
        assert_eq!(backups.end(MINUTE * 9, 0.5), [1]);
    }

    #[test]
    fn an_interval_of_zero_runs_on_request_only() {
        let mut backups = Backups::new(Duration::ZERO);
        backups.enable(Verb::Fork, Duration::ZERO, 0.5);
        assert_eq!((backups.next(), backups.begin(MINUTE)), (None, None));
        backups.ask(1).expect("is enabled");
        assert_eq!(backups.begin(MINUTE), Some(Verb::Fork));
    }
}
