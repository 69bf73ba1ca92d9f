//! The owner's hands on the agent: restores, backups, prunes, and what their outcomes mean.

use std::time::SystemTime;

use serde_json::{Value, json};

use super::{Event, Owner, jitter};
use crate::agent::{self, Failure, Outcome, Progress, Verb, code};
use crate::api::envelope::Problem;
use crate::gateway::state::{self, Phase};
use crate::gateway::sweep;
use crate::log::log;

impl Owner {
    pub(super) fn cancel_agent(&mut self) {
        let cancel = self.run.as_mut().and_then(|run| run.cancel.take());
        if let Some(cancel) = cancel {
            let _ = cancel.send(());
        }
    }

    pub(super) fn start_agent(&mut self, verb: Verb) {
        let events = self.events.clone();
        let told = self.events.clone();
        let tell = move |progress| drop(told.send(Event::AgentProgressed(verb, progress)));
        let done = move |outcome| drop(events.send(Event::AgentEnded(verb, outcome)));
        self.run = Some(agent::start(
            &self.config,
            &self.reaper,
            &self.agent,
            verb,
            tell,
            done,
        ));
    }

    /// Comes before the end of the run that it is about.
    pub(super) fn progressed(&mut self, verb: Verb, progress: Progress) {
        match verb {
            Verb::Restore => self.status.restore_progress = Some(progress),
            Verb::Backup | Verb::Fork => self.status.backup_progress = Some(progress),
            Verb::Prune => {}
        }
    }

    pub(super) fn restored(&mut self, outcome: Outcome) {
        self.run = None;
        self.status.restore_progress = None;
        if self.state.phase == Phase::Down {
            return;
        }
        let event = match outcome {
            Ok(answer) => {
                self.status.restore = "done";
                self.status.restored = text(&answer["snapshot"]);
                self.status.snapshot = text(&answer["snapshot"]);
                self.status.last_backup = text(&answer["time"]);
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
            Err(Failure { code, error }) => {
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

    /// Starts the run that is due. Not during a sweep: that might take the young agent for one of the gateway's.
    pub(super) fn begin_backup(&mut self) {
        if self.backups.is_pruning() && self.backups.is_awaited() {
            // Whatever it has not removed is removed by the next one.
            self.cancel_agent();
        }
        if self.is_sweeping() {
            return;
        }
        if let Some(verb) = self.backups.begin(self.now()) {
            self.start_agent(verb);
        }
    }

    pub(super) fn backed_up(&mut self, outcome: Outcome) {
        self.run = None;
        self.status.backup_progress = None;
        let answer = match outcome {
            Ok(answer) => {
                let known = (self.status.last_backup.take(), self.status.snapshot.take());
                self.status.last_backup = text(&answer["time"]).or(known.0);
                self.status.snapshot = text(&answer["snapshot"]).or(known.1);
                self.status.backup_error = None;
                if answer["unchanged"] != true {
                    self.status.pause = (answer["pauseMs"].clone(), answer["rounds"].clone());
                }
                log!(
                    Info,
                    "backed up",
                    snapshot = self.status.snapshot.clone(),
                    unchanged = answer["unchanged"].clone(),
                    files = answer["files"].clone(),
                    bytes_uploaded = answer["bytesUploaded"].clone(),
                    duration_ms = answer["durationMs"].clone(),
                    pause_ms = answer["pauseMs"].clone(),
                    rounds = answer["rounds"].clone(),
                );
                self.backups.saved(self.now());
                Ok(json!({
                    "lastBackup": self.status.last_backup,
                    "snapshot": self.status.snapshot,
                    "unchanged": answer["unchanged"],
                    "bytesUploaded": answer["bytesUploaded"],
                    "files": answer["files"],
                    "durationMs": answer["durationMs"],
                    "pauseMs": answer["pauseMs"],
                    "rounds": answer["rounds"],
                }))
            }
            Err(failure) => {
                log!(
                    Error,
                    "backup failed",
                    code = failure.code,
                    reason = failure.error.clone()
                );
                self.status.backup_error = Some((failure.error.clone(), SystemTime::now()));
                // It may have ended while it held the gateway still.
                tokio::spawn(sweep::resume(self.belongs()));
                if failure.code == code::FENCED {
                    self.backups.fence();
                }
                Err(Problem::from(failure))
            }
        };
        if self.state.phase == Phase::Down {
            self.is_final_snapshot_lost = answer.is_err() && self.backups.word() != "fenced";
        }
        for reply in self.backups.end(self.now(), jitter()) {
            let _ = reply.send(answer.clone());
        }
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
            Err(Failure { code, error }) => {
                log!(Warn, "prune failed", code = code, reason = error);
            }
        }
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}
