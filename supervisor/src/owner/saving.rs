//! The owner's hands on the agent: restores, backups, prunes, and what their outcomes mean.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::{Event, Owner, jitter};
use crate::agent::{self, Failure, News, Outcome, Report, Verb, code};
use crate::api::envelope::Problem;
use crate::backups::Mode;
use crate::blocking;
use crate::gateway::root;
use crate::gateway::state::{self, Phase};
use crate::log::log;

/// For an id or a time that the agent gives.
const MAX_TEXT: usize = 1024;

/// A restore claims the head, and whoever holds it would be fenced in turn.
const HELD_BY_ANOTHER: &str =
    "the root is lost and another instance holds the head: only a new boot may take that over";

impl Owner {
    pub(super) fn cancel_agent(&mut self) {
        let cancel = self.run.as_mut().and_then(|run| run.cancel.take());
        if let Some(cancel) = cancel {
            let _ = cancel.send(());
        }
    }

    /// Begins as soon as the run under way has ended: a backup may hold what the root had a moment ago.
    pub(super) fn restore(&mut self) -> Option<state::Event> {
        if self.backups.mode() == Mode::Fenced {
            log!(Error, "restore refused", reason = HELD_BY_ANOTHER);
            self.root = None;
            self.status.restore = "failed";
            self.status.restore_error = Some(HELD_BY_ANOTHER.to_owned());
            return Some(state::Event::RestoreFailed);
        }
        self.status.restore = "running";
        self.is_restore_due = true;
        if self.backups.is_pruning() {
            self.cancel_agent();
        }
        None
    }

    /// From here until a restore succeeds nothing is saved; the event `RootLost` is to follow.
    pub(super) fn lose_root(&mut self, reason: &str) {
        log!(
            Error,
            "the root is lost: stopping and restoring",
            root = self.config.root.display().to_string(),
            reason = reason
        );
        self.status.restore = "running";
        self.status.restore_error = Some(format!("the root is lost: {reason}"));
        for reply in self.backups.disable() {
            let _ = reply.send(Err(Problem::not_restored()));
        }
    }

    fn start_agent(&mut self, verb: Verb) {
        let events = self.events.clone();
        if let Some(pid) = self.stuck {
            let failure = Failure::stuck(pid);
            let _ = events.send(Event::AgentEnded(verb, Err(failure)));
            return;
        }
        let told = self.events.clone();
        let tell = move |news| drop(told.send(Event::AgentTold(verb, news)));
        let done = move |outcome| drop(events.send(Event::AgentEnded(verb, outcome)));
        if verb == Verb::Restore {
            log!(Info, "restoring", store = self.config.store.word());
        }
        self.run = Some(agent::start(
            &self.config,
            &self.reaper,
            &self.agent,
            verb,
            self.backups.is_asked(),
            tell,
            done,
        ));
    }

    pub(super) fn told(&mut self, verb: Verb, news: News) {
        let status = &mut self.status;
        match (news, verb) {
            (News::Progress(progress), Verb::Restore) => {
                status.restore_progress = Some(progress);
                status.restore_waiting = None;
            }
            (News::Progress(progress), Verb::Backup | Verb::Fork) => {
                status.backup_progress = Some(progress);
            }
            (News::Waiting(what), Verb::Restore) => status.restore_waiting = Some(what),
            (News::Progress(_) | News::Waiting(_), _) => {}
            (News::Stuck(pid), _) => self.stuck = Some(pid),
            (News::Gone, _) => self.stuck = None,
        }
    }

    pub(super) fn restored(&mut self, outcome: Outcome) {
        self.run = None;
        self.status.restore_progress = None;
        self.status.restore_waiting = None;
        if self.state.phase == Phase::Down {
            return;
        }
        self.root = None;
        let event = match outcome {
            Ok(answer) => {
                self.status.restore = "done";
                self.status.restored = self.text(&answer["snapshot"]);
                self.status.snapshot = self.status.restored.clone();
                self.status.last_backup = self.text(&answer["time"]);
                self.status.report = Report::default();
                log!(
                    Info,
                    "restored",
                    snapshot = self.status.restored.clone(),
                    files = answer["files"].clone(),
                    bytes = answer["bytes"].clone(),
                    duration_ms = answer["durationMs"].clone(),
                );
                state::Event::Restored
            }
            Err(Failure { code, .. }) if code == code::NO_SNAPSHOT => {
                self.status.restore = "empty";
                log!(Info, "the store is empty, starting fresh");
                state::Event::Restored
            }
            Err(Failure { code, error, .. }) => {
                log!(Error, "restore failed", code = code, reason = error.clone());
                self.status.restore = "failed";
                self.status.restore_error = Some(error);
                state::Event::RestoreFailed
            }
        };
        if event == state::Event::Restored {
            self.status.restore_error = None;
            self.backups.enable(Verb::Backup, self.now(), jitter());
        } else if !self.config.hold {
            self.backups.enable(Verb::Fork, self.now(), jitter());
        }
        self.step(event);
    }

    /// Starts the run that is due.
    pub(super) fn begin_run(&mut self) {
        if self.state.phase == Phase::Restoring && self.is_restore_due && self.run.is_none() {
            self.is_restore_due = false;
            self.start_agent(Verb::Restore);
        }
        if self.backups.is_pruning() && self.backups.is_awaited() {
            // Whatever it has not removed is removed by the next one.
            self.cancel_agent();
        }
        if let Some(verb) = self.backups.begin(self.now()) {
            self.start_agent(verb);
        }
    }

    pub(super) fn backed_up(&mut self, verb: Verb, outcome: Outcome) {
        self.run = None;
        self.status.backup_progress = None;
        let says_lost = match &outcome {
            Err(failure) if failure.word.is_some() => Some(failure.error.clone()),
            _ => None,
        };
        let (answer, ended) = match outcome {
            Ok(answer) => {
                let mut report = Report::read(&answer, &self.config.secrets);
                report.fork |= verb == Verb::Fork;
                let fork = report.fork;
                (Ok(self.saved(&answer, report)), Ok(fork))
            }
            Err(failure) => {
                self.not_saved(&failure);
                (Err(Problem::from(failure.clone())), Err(failure))
            }
        };
        if self.state.phase == Phase::Down {
            self.last_ended = Some(ended);
        }
        for reply in self.backups.end(self.now(), jitter()) {
            let _ = reply.send(answer.clone());
        }
        if let Some(reason) = says_lost {
            self.check_root(reason);
        }
    }

    /// What is kept and told of a run that succeeded.
    fn saved(&mut self, answer: &Value, report: Report) -> Value {
        self.status.last_backup = self
            .text(&answer["time"])
            .or(self.status.last_backup.take());
        self.status.snapshot = self
            .text(&answer["snapshot"])
            .or(self.status.snapshot.take());
        self.status.backup_error = None;
        let unchanged = answer["unchanged"].as_bool();
        let number = |name: &str| answer[name].as_u64();
        let mut told = json!({
            "lastBackup": self.status.last_backup,
            "snapshot": self.status.snapshot,
            "unchanged": unchanged,
            "bytesUploaded": number("bytesUploaded"),
            "files": number("files"),
            "durationMs": number("durationMs"),
        });
        report.add_to(&mut told);
        log!(
            Info,
            "backed up",
            snapshot = self.status.snapshot.clone(),
            unchanged = unchanged,
            files = number("files"),
            bytes_uploaded = number("bytesUploaded"),
            duration_ms = number("durationMs"),
            consistency = report.consistency.clone(),
            skipped = report.skipped,
            unread = report.unread(),
            fork = report.fork,
            pause_ms = report.pause_ms,
            rounds = report.rounds,
        );
        self.warn(&report);
        let last = std::mem::replace(&mut self.status.report, report);
        if unchanged == Some(true) {
            self.status.report.pause_ms = last.pause_ms;
            self.status.report.rounds = last.rounds;
        }
        self.backups.saved(self.now());
        told
    }

    /// Once, and not again before it is another one: backups come every few seconds.
    fn warn(&self, report: &Report) {
        let last = &self.status.report;
        if let Some(reason) = &report.consistency_reason
            && last.consistency_reason.as_ref() != Some(reason)
        {
            log!(
                Warn,
                "snapshots are not of one instant",
                reason = reason.as_str()
            );
        }
        if let Some(warning) = &report.warning
            && last.warning.as_ref() != Some(warning)
        {
            log!(
                Warn,
                "the snapshot needs attention",
                warning = warning.as_str()
            );
        }
    }

    fn not_saved(&mut self, failure: &Failure) {
        log!(
            Error,
            "backup failed",
            code = failure.code,
            reason = failure.error.clone()
        );
        self.status.backup_error = Some((failure.error.clone(), SystemTime::now()));
        if failure.code == code::FENCED {
            self.backups.fence();
        }
    }

    /// Whether only a restore helps. Forks are taken of a tree that no restore made: there our own eyes decide, or the gateway
    /// would be stopped after each of them.
    fn check_root(&self, reason: String) {
        let events = self.events.clone();
        if self.backups.mode() == Mode::Enabled(Verb::Backup) {
            let _ = events.send(Event::RootChecked(reason, true));
            return;
        }
        let (Some(known), root) = (self.root, self.config.root.clone()) else {
            return;
        };
        tokio::spawn(async move {
            let look = move || root::identify(&root);
            let look = blocking::within(super::LAST_LOOK, look).await;
            // What cannot be looked at may be the same.
            if let Ok(Ok(found)) = look {
                let is_another = !found.is_some_and(|found| known.is_same(&found));
                let _ = events.send(Event::RootChecked(reason, is_another));
            }
        });
    }

    /// A prune that fails is tried again in an hour, and no backup is the worse for it.
    pub(super) fn pruned(&mut self, outcome: Outcome) {
        self.run = None;
        self.backups.end_prune();
        match outcome {
            Ok(answer) => log!(
                Info,
                "pruned",
                removed = answer["removed"].as_array().map(Vec::len),
                bytes_freed = answer["bytesFreed"].clone()
            ),
            Err(Failure { code, .. }) if code == code::INTERRUPTED => {
                log!(Info, "prune cut short");
            }
            Err(Failure { code, error, .. }) => {
                log!(Warn, "prune failed", code = code, reason = error);
            }
        }
    }

    fn text(&self, value: &Value) -> Option<String> {
        Some(self.config.secrets.take_out(value.as_str()?, MAX_TEXT))
    }
}
