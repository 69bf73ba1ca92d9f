//! What can end the supervisor before or while it runs, and the exit code of each.
//!
//! Requests have errors of their own (`api::envelope::Problem`): nothing that a request does ends up here.

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
    /// A sentence for each bad one.
    #[error("{}", .0.join("\nsupervisor: "))]
    Settings(Vec<String>),
    #[error("cannot understand {0:?}: see supervisor --help")]
    Usage(String),
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    /// By whoever listens there already. It would be given the service token, so nothing starts.
    #[error(
        "cannot listen on {address}: another process has this port, perhaps one of the gateway's from before; end it \
         (ss -ltnp shows its pid), or set another port in RUNTIME_LISTEN"
    )]
    PortTaken { address: SocketAddr },
    #[error("cannot start: {action} failed")]
    Start {
        action: &'static str,
        source: io::Error,
    },
    #[error("cannot execute {executable}, which belongs beside the supervisor")]
    NoAgent {
        executable: PathBuf,
        source: io::Error,
    },
    #[error("cannot check the settings: {executable} {reason}")]
    NoCheck { executable: PathBuf, reason: String },
    #[error(
        "cannot start: another supervisor (process {holder}) works with the state {}; stop it, or set another RUNTIME_STATE",
        .state.display()
    )]
    Another { state: PathBuf, holder: String },
    #[error("cannot read {what} in time")]
    Hung {
        what: &'static str,
        source: io::Error,
    },
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
