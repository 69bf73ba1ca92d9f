//! Everything that can go wrong, as sentences for people and exit codes for programs (docs/backup-agent.md, "Exit codes").

use std::{fmt, io, path::PathBuf, time::Duration};

use crate::{capabilities, store::StoreError};

/// What stops even a root that has all of its capabilities.
const IMMUTABLE: &str = "it may be immutable: see lsattr";

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One or more settings or flags cannot be used; every bad one has its line.
    #[error("{}", .0.join("\nbackup-agent: "))]
    Settings(Vec<String>),
    /// A local file or directory could not be used.
    #[error("cannot {op} {}", .path.display())]
    Local {
        op: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The store did not do what it was asked.
    #[error("cannot {op} {key} on the store")]
    Store {
        op: &'static str,
        key: String,
        source: StoreError,
    },
    /// The store takes every write whatever its condition, so two writers could destroy each other's snapshots.
    #[error(
        "cannot trust this store: it ignores conditional writes ({broken}); \
         use another one, or set RUNTIME_STORE_UNFENCED=allow if no second writer can ever exist"
    )]
    Unfenced { broken: &'static str },
    /// The store does not do what snapshots rest on, and nobody's word makes up for that.
    #[error("cannot use this store: {lacks}; use another one")]
    Unusable { lacks: &'static str },
    /// Reading a record shows that the list of records leaves it out.
    #[error(
        "cannot prune: the listing of snapshots/ leaves out {key}, which is there; try again later, and look after the \
         store if it stays so"
    )]
    LeftOut { key: String },
    /// There is nothing to restore.
    #[error("there is no snapshot of instance {instance} on {store}")]
    NoSnapshot { instance: String, store: String },
    /// The snapshot that was asked for does not exist.
    #[error("there is no snapshot {id}; `backup-agent list` shows those that exist")]
    UnknownSnapshot { id: String },
    /// Something on the store is not what was written there.
    #[error("cannot trust {key}: {reason}")]
    Damaged { key: String, reason: String },
    /// The root is not the directory that the last run left: it was removed, replaced, or its volume is detached.
    #[error(
        "cannot back up {}: it is not the directory that the last restore or backup left; it was removed or replaced, or \
         its volume is not mounted; mount it again, or run `backup-agent restore`",
        .root.display()
    )]
    RootLost { root: PathBuf },
    /// A restore was killed or failed while it put entries in their places.
    #[error(
        "cannot back up {}: a restore of it has not ended, so it may be half of two trees; run `backup-agent restore`",
        .root.display()
    )]
    RootUnfinished { root: PathBuf },
    /// Entries of two trees are in the root, because moving them failed, and moving them back, too.
    #[error(
        "cannot replace {}, nor put back all of the old tree: nothing is removed, and the next backup, restore, verify or prune goes on",
        .root.display()
    )]
    RootHalf { root: PathBuf, source: Box<Error> },
    /// The root cannot be replaced now.
    #[error("cannot replace {}: {reason}", .root.display())]
    InUse { root: PathBuf, reason: String },
    /// Another writer holds the head.
    #[error(
        "another instance took over: the head belongs to {holder}, this writer is {writer}; \
         {kept}`backup-agent restore` takes the head back with the newest snapshot"
    )]
    Fenced {
        holder: String,
        writer: String,
        /// Empty, or a sentence about the fork that was kept, with a trailing space.
        kept: String,
    },
    /// A person was asked, and did not say yes.
    #[error("nothing was changed: the answer was not yes")]
    Declined,
    /// The bound of the whole operation ran out.
    #[error("stopped after {}: the time bound ran out; {left}", Seconds(*.after))]
    Timeout { after: Duration, left: String },
    /// A signal asked to stop.
    #[error("stopped by {}; {left}", match *.signal { 1 => "SIGHUP", 2 => "SIGINT", _ => "SIGTERM" })]
    Interrupted { signal: i32, left: String },
    /// A thread of the agent ended without a word: a bug.
    #[error("internal error: the {0} ended without a result; please report it")]
    Internal(&'static str),
}

impl Error {
    /// A closure for `map_err` on input and output with local files.
    pub fn local<S: Into<io::Error>>(
        op: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(S) -> Self {
        move |source| Self::Local {
            op,
            path: path.into(),
            source: source.into(),
        }
    }

    /// A closure for `map_err` on calls of the store.
    pub fn store(op: &'static str, key: impl Into<String>) -> impl FnOnce(StoreError) -> Self {
        move |source| Self::Store {
            op,
            key: key.into(),
            source,
        }
    }

    /// What to do about it, where that is known.
    pub fn advice(&self) -> Option<String> {
        use io::ErrorKind as Kind;

        use nix::errno::Errno;

        if let Self::Damaged { key, reason } = self {
            // Some reasons say it themselves.
            let is_said = reason.contains("; ");
            return mend(key).filter(|_| !is_said).map(str::to_owned);
        }
        if let Self::Store {
            op,
            source: StoreError::Status { code, .. },
            ..
        } = self
            && code == "AccessDenied"
        {
            return Some(format!("these credentials need {}", rights(op)));
        }
        let (Self::Local { source, .. }
        | Self::Store {
            source: StoreError::Io(source),
            ..
        }) = self
        else {
            return None;
        };
        match (self, source.raw_os_error()) {
            (_, Some(nix::libc::ELOOP)) => {
                return Some(
                    "a symbolic link is never followed here: see who made it, and remove it".into(),
                );
            }
            (Self::Local { op: "lock", .. }, Some(nix::libc::ENOLCK | nix::libc::EOPNOTSUPP)) => {
                return Some(
                    "that file system keeps no locks: use a folder on a local disk for RUNTIME_STATE, or mount it with a \
                     lock service (for NFS rpc.statd, or the option nolock on one host alone)"
                        .into(),
                );
            }
            _ => {}
        }
        let advice = match source.kind() {
            Kind::StorageFull | Kind::QuotaExceeded => {
                "make room on that file system, then run it again; nothing was lost"
            }
            Kind::AlreadyExists if matches!(self, Self::Store { .. }) => {
                "its file system cannot replace a file by rename (sshfs: mount it with -o workaround=rename)"
            }
            _ if matches!(
                source.raw_os_error().map(Errno::from_raw),
                Some(Errno::EMFILE | Errno::ENFILE)
            ) =>
            {
                "raise the limit of open files (ulimit -n): each level of the tree takes one"
            }
            Kind::ReadOnlyFilesystem => "that file system is mounted read-only",
            Kind::ResourceBusy => "it is in use or a mount point: unmount it first",
            Kind::PermissionDenied if nix::unistd::geteuid().is_root() => {
                let is_immutable = source.raw_os_error() == Some(nix::libc::EPERM);
                return capabilities::advice().or_else(|| is_immutable.then(|| IMMUTABLE.into()));
            }
            _ => return None,
        };
        Some(advice.to_owned())
    }

    /// All of it, for a person: what failed, why, and what to do.
    pub fn sentence(&self) -> String {
        let sentence = Chain(self).to_string();
        match self.advice() {
            Some(advice) => format!("{sentence}; {advice}"),
            None => sentence,
        }
    }

    /// The exit code and the word that names it in JSON.
    pub fn code(&self) -> (u8, &'static str) {
        match self {
            Self::Internal(_) => (1, "internal"),
            Self::Declined => (1, "declined"),
            Self::NoSnapshot { .. } | Self::UnknownSnapshot { .. } => (10, "no_snapshot"),
            Self::Damaged { .. } => (11, "damaged"),
            Self::Fenced { .. } => (12, "fenced"),
            Self::Settings(_)
            | Self::Unfenced { .. }
            | Self::Unusable { .. }
            | Self::Store {
                source: StoreError::NoLocks(_),
                ..
            } => (64, "usage"),
            Self::Local { .. } => (74, "local"),
            Self::RootLost { .. } => (74, "root_lost"),
            Self::RootUnfinished { .. } | Self::RootHalf { .. } => (74, "restore_unfinished"),
            Self::InUse { .. } => (74, "in_use"),
            Self::Store { .. } | Self::LeftOut { .. } => (75, "store_unavailable"),
            Self::Timeout { .. } => (124, "timeout"),
            Self::Interrupted { signal, .. } => {
                // As of a program that the signal ended: 129, 130 and 143.
                (128 + u8::try_from(*signal).unwrap_or(15), "interrupted")
            }
        }
    }
}

/// What helps when an object of an instance is damaged.
pub fn mend(key: &str) -> Option<&'static str> {
    match key.split_once('/').map_or(key, |(folder, _)| folder) {
        "head.json" => Some(
            "`backup-agent list` shows the snapshots, `backup-agent restore ID` brings one back, and `backup-agent backup` \
             after that writes a new head; or delete it: the newest snapshot is the latest then",
        ),
        "snapshots" => Some(
            "`backup-agent list` shows the others, and `backup-agent restore ID` brings one of them back",
        ),
        "layers" => Some(
            "`backup-agent verify all` says what that costs, `backup-agent restore ID` brings a whole snapshot back, and \
             `backup-agent backup --whole` takes a new one that needs no earlier layer",
        ),
        _ => None,
    }
}

/// What a request to S3 takes (docs/backup-agent.md, "Rights").
fn rights(op: &str) -> &'static str {
    match op {
        "list" => "the right to list the bucket (s3:ListBucket)",
        "delete" => "the right to delete (s3:DeleteObject), which only `prune` cannot do without",
        "read" | "look at" => {
            "the rights to read and to list (s3:GetObject, s3:ListBucket): without the second, an object that is missing is \
             answered so, too"
        }
        _ => "the rights to write and to read (s3:PutObject, s3:GetObject)",
    }
}

/// An error with its causes, in one line.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.subsec_millis() == 0 {
            write!(f, "{} s", self.0.as_secs())
        } else {
            write!(f, "{} ms", self.0.as_millis())
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    #[test]
    fn a_place_without_locks_and_a_link_have_their_remedy() {
        for (op, errno, part) in [
            (
                "lock",
                Errno::ENOLCK,
                Some("a local disk for RUNTIME_STATE"),
            ),
            (
                "lock",
                Errno::EOPNOTSUPP,
                Some("a local disk for RUNTIME_STATE"),
            ),
            (
                "lock",
                Errno::ELOOP,
                Some("a symbolic link is never followed"),
            ),
            ("lock", Errno::ENOSPC, Some("make room")),
            ("read", Errno::ENOLCK, None),
        ] {
            let advice = Error::local(op, "/state/lock")(errno).advice();
            let is_given =
                part.map(|part| advice.as_ref().is_some_and(|advice| advice.contains(part)));
            assert!(
                is_given.unwrap_or(advice.is_none()),
                "{op} {errno}: {advice:?}"
            );
        }
    }
}
