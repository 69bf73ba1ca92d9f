//! What `GET /v1/status` tells, published by the owner and read by everyone else.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::agent::{Progress, Report};
use crate::clock::rfc3339;
use crate::config::Config;
use crate::gateway::files;
use crate::log::{SHOWN, Tail};
use crate::reaper::Exit;
use crate::redact::{is_secret, redact};
use crate::secret::Secret;

#[derive(Clone, Debug)]
pub struct Status {
    /// Another one each time that it is published.
    pub version: u64,
    pub gateway: &'static str,
    pub pid: Option<i32>,
    /// Since when `gateway` is what it is.
    pub since: SystemTime,
    pub restarts: u64,
    pub last_exit: Option<LastExit>,
    /// When the gateway, or a restore that failed, is tried again.
    pub next_attempt: Option<SystemTime>,
    /// The end of what the gateway wrote on its standard error, and whether that is of interest: it fails again and again.
    pub stderr: Tail,
    pub shows_stderr: bool,
    /// RFC 3339, as the agent gave it.
    pub last_backup: Option<String>,
    pub backup: &'static str,
    pub snapshot: Option<String>,
    pub backup_error: Option<(String, SystemTime)>,
    pub next_backup: Option<SystemTime>,
    /// Of the last snapshot of this boot. The pause and the rounds stay when a run found nothing changed.
    pub report: Report,
    /// No restore has succeeded: all snapshots go beside the head.
    pub is_forking: bool,
    pub backup_progress: Option<Progress>,
    pub restore_progress: Option<Progress>,
    pub restore: &'static str,
    pub restored: Option<String>,
    pub restore_error: Option<String>,
    /// What the restore under way waits for; shown before the error of an earlier one.
    pub restore_waiting: Option<String>,
    pub openclaw: Option<String>,
}

#[derive(Clone, Debug)]
pub struct LastExit {
    pub exit: Exit,
    pub reason: Option<ExitReason>,
    /// A sentence about the reason.
    pub message: Option<String>,
    pub at: SystemTime,
}

/// Why the gateway ended, where the code and the signal do not tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The kernel killed it because memory ran out.
    Oom,
    /// It was not ready in time.
    StartupTimeout,
    /// It was asked to end and did not.
    Killed,
    /// The prepare step failed.
    Prepare,
    /// A step before its exec failed, or the exec itself.
    Exec,
}

impl ExitReason {
    pub fn word(self) -> &'static str {
        match self {
            Self::Oom => "oom",
            Self::StartupTimeout => "startup_timeout",
            Self::Killed => "killed",
            Self::Prepare => "prepare",
            Self::Exec => "exec",
        }
    }
}

impl LastExit {
    pub fn now(exit: Exit, reason: Option<ExitReason>, message: Option<String>) -> Self {
        let at = SystemTime::now();
        Self {
            exit,
            reason,
            message,
            at,
        }
    }

    fn render(&self) -> Value {
        json!({
            "code": self.exit.code,
            "signal": self.exit.signal_name(),
            "reason": self.reason.map(ExitReason::word),
            "message": self.message,
            "at": rfc3339(self.at),
        })
    }
}

impl Status {
    pub fn boot() -> Self {
        Self {
            version: 0,
            gateway: "restoring",
            pid: None,
            since: SystemTime::now(),
            restarts: 0,
            last_exit: None,
            next_attempt: None,
            stderr: Tail::default(),
            shows_stderr: false,
            last_backup: None,
            backup: "disabled",
            snapshot: None,
            backup_error: None,
            next_backup: None,
            report: Report::default(),
            is_forking: false,
            backup_progress: None,
            restore_progress: None,
            restore: "running",
            restored: None,
            restore_error: None,
            restore_waiting: None,
            openclaw: None,
        }
    }

    /// `data` of the answer.
    pub fn render(&self, config: &Config, uptime_seconds: u64) -> Value {
        let (error, error_at) = match &self.backup_error {
            Some((error, at)) => (Some(error), Some(rfc3339(*at))),
            None => (None, None),
        };
        let mut data = json!({
            "gateway": {
                "status": self.gateway,
                "pid": self.pid,
                "since": rfc3339(self.since),
                "restarts": self.restarts,
                "lastExit": self.last_exit.as_ref().map(LastExit::render),
                "nextAttemptAt": self.next_attempt.map(rfc3339),
                "stderrTail": self.stderr_tail(config),
            },
            "lastBackup": self.last_backup,
            "backup": {
                "status": self.backup,
                "store": config.store.word(),
                "snapshot": self.snapshot,
                "lastError": error,
                "lastErrorAt": error_at,
                "nextAt": self.next_backup.map(rfc3339),
                "progress": self.backup_progress.map(Progress::render),
            },
            "restore": {
                "status": self.restore,
                "snapshot": self.restored,
                "error": self.restore_waiting.as_ref().or(self.restore_error.as_ref()),
                "progress": self.restore_progress.map(Progress::render),
            },
            "instance": { "id": config.instance_id, "type": config.instance_type },
            "container": { "instanceType": config.instance_type },
            "version": { "runtime": env!("CARGO_PKG_VERSION"), "openclaw": self.openclaw },
            "uptimeSeconds": uptime_seconds,
        });
        let backup = &mut data["backup"];
        self.report.add_to(backup);
        backup["fork"] = json!(self.report.fork || self.is_forking);
        data
    }

    /// Nobody has checked what the gateway writes, so it is shown without anything that may be a secret.
    fn stderr_tail(&self, config: &Config) -> Option<String> {
        if !self.shows_stderr {
            return None;
        }
        let own = config.secrets.0.iter().map(Secret::expose);
        let given = config.gateway_environment.iter();
        let given = given.filter_map(|(name, value)| {
            let value = value.to_str()?;
            is_secret(name.to_str()?, value).then_some(value)
        });
        let token = files::last_token();
        let known = own.chain(given).chain(token.as_ref().map(Secret::expose));
        let text = self.stderr.get();
        Some(redact(&text, SHOWN, &known.collect::<Vec<_>>()))
    }
}
