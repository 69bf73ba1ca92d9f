//! What can end the supervisor before or while it runs, and the exit code of each.
//!
//! Requests have errors of their own (`api::envelope::Problem`): nothing that a request does ends up here.

use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// One setting that cannot be used, in one sentence that names it. Never carries the value of a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot use {name}: {reason}")]
pub struct SettingError {
    pub name: &'static str,
    pub reason: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", lines(.0))]
    Settings(Vec<SettingError>),
    #[error("cannot understand {0:?}: see supervisor --help")]
    Usage(String),
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("cannot start: {action} failed")]
    Start {
        action: &'static str,
        source: io::Error,
    },
    #[error("cannot find the backup agent: there is no {executable}")]
    NoAgent { executable: PathBuf },
    #[error("cannot reach the supervisor on {address}: {reason}")]
    Unhealthy { address: SocketAddr, reason: String },
}

impl Error {
    /// 64 is `EX_USAGE` of sysexits.h; the contract promises it for settings.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Settings(_) | Self::Usage(_) => 64,
            _ => 1,
        }
    }
}

fn lines(errors: &[SettingError]) -> String {
    let mut text = String::new();
    for (position, error) in errors.iter().enumerate() {
        if position > 0 {
            text.push_str("\nsupervisor: ");
        }
        let _ = write!(text, "{error}");
    }
    text
}
