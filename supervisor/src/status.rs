//! What `GET /v1/status` tells, published by the owner and read by everyone else.

use std::time::SystemTime;

use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::config::Config;
use crate::reaper::Exit;

#[derive(Clone, Debug)]
pub struct Status {
    pub gateway: &'static str,
    pub pid: Option<i32>,
    /// Since when `gateway` is what it is.
    pub since: SystemTime,
    pub restarts: u64,
    pub last_exit: Option<LastExit>,
    /// RFC 3339, as the agent gave it.
    pub last_backup: Option<String>,
    pub backup: &'static str,
    pub snapshot: Option<String>,
    pub backup_error: Option<(String, SystemTime)>,
    pub next_backup: Option<SystemTime>,
    pub restore: &'static str,
    pub restored: Option<String>,
    pub restore_error: Option<String>,
    pub openclaw: Option<String>,
}

#[derive(Clone, Copy, Debug)]
pub struct LastExit {
    pub exit: Exit,
    /// Whether the kernel killed it because memory ran out.
    pub is_oom: bool,
    pub at: SystemTime,
}

impl LastExit {
    pub fn now(exit: Exit, is_oom: bool) -> Self {
        let at = SystemTime::now();
        Self { exit, is_oom, at }
    }

    fn render(self) -> Value {
        json!({
            "code": self.exit.code,
            "signal": self.exit.signal_name(),
            "reason": self.is_oom.then_some("oom"),
            "at": rfc3339(self.at),
        })
    }
}

impl Status {
    pub fn boot() -> Self {
        Self {
            gateway: "restoring",
            pid: None,
            since: SystemTime::now(),
            restarts: 0,
            last_exit: None,
            last_backup: None,
            backup: "disabled",
            snapshot: None,
            backup_error: None,
            next_backup: None,
            restore: "running",
            restored: None,
            restore_error: None,
            openclaw: None,
        }
    }

    /// `data` of the answer.
    pub fn render(&self, config: &Config, uptime_seconds: u64) -> Value {
        let (error, error_at) = match &self.backup_error {
            Some((error, at)) => (Some(error), Some(rfc3339(*at))),
            None => (None, None),
        };
        json!({
            "gateway": {
                "status": self.gateway,
                "pid": self.pid,
                "since": rfc3339(self.since),
                "restarts": self.restarts,
                "lastExit": self.last_exit.map(LastExit::render),
            },
            "lastBackup": self.last_backup,
            "backup": {
                "status": self.backup,
                "store": config.store.word(),
                "snapshot": self.snapshot,
                "lastError": error,
                "lastErrorAt": error_at,
                "nextAt": self.next_backup.map(rfc3339),
            },
            "restore": {
                "status": self.restore,
                "snapshot": self.restored,
                "error": self.restore_error,
            },
            "instance": { "id": config.instance_id, "type": config.instance_type },
            "container": { "instanceType": config.instance_type },
            "version": { "runtime": env!("CARGO_PKG_VERSION"), "openclaw": self.openclaw },
            "uptimeSeconds": uptime_seconds,
        })
    }
}
