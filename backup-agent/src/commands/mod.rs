//! The verbs. Each takes the settings and the store and gives an answer for people and one for programs.

mod backup;
pub mod check;
mod choose;
mod claim;
mod compare;
mod import;
mod list;
mod prune;
mod restore;
mod unpack;
mod verify;

use std::sync::Arc;

use clap::CommandFactory;
use clap_complete::{generate, shells};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::Value;

use crate::{
    cli::{Cli, Shell, Verb},
    config::Config,
    error::Error,
    interrupt::Finality,
    snapshot::record::Record,
    state::Described,
    store::Store,
    tree::identity,
};

/// What a verb has to say when it succeeded.
pub struct Answer {
    /// For people, with a newline at the end.
    pub text: String,
    /// For programs.
    pub json: Value,
    /// The exit code: 0, but for a verb that found what it looked for and that is bad.
    pub exit: u8,
}

impl Answer {
    /// The answer of a verb that did what it was told.
    pub fn new(text: String, json: Value) -> Self {
        Self {
            text,
            json,
            exit: 0,
        }
    }
}

/// Runs one verb to its end.
pub async fn run(
    config: &Config,
    store: &Arc<dyn Store>,
    verb: &Verb,
    last: &Finality,
) -> Result<Answer, Error> {
    // A walk holds one descriptor for each level of the tree.
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    raised.map_err(Error::local("raise", "the limit of open files"))?;
    if config.identity.is_some() {
        identity::drop_groups().map_err(Error::local("drop", "supplementary groups"))?;
    }
    match verb {
        Verb::Backup(options) => {
            backup::run(config, store.as_ref(), options, config.bound(verb)).await
        }
        Verb::Restore(options) => restore::run(config, store.as_ref(), options, last).await,
        Verb::Verify { snapshot, deep } => {
            verify::run(config, store.as_ref(), snapshot, *deep).await
        }
        Verb::List => list::run(config, store.as_ref()).await,
        Verb::Prune { dry_run } => prune::run(config, store.as_ref(), *dry_run).await,
        Verb::Import { .. } => import::run(config, store.as_ref(), config.bound(verb)).await,
        // Neither has to do with the store; both have been done.
        Verb::Check | Verb::Completions { .. } => Ok(Answer::new(String::new(), Value::Null)),
    }
}

/// A script that completes commands in a shell.
pub fn completions(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    let (mut command, name) = (Cli::command(), "backup-agent");
    match shell {
        Shell::Bash => generate(shells::Bash, &mut command, name, &mut script),
        Shell::Fish => generate(shells::Fish, &mut command, name, &mut script),
        Shell::Zsh => generate(shells::Zsh, &mut command, name, &mut script),
    }
    script
}

/// Sizes for people.
fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut whole = bytes;
    while whole >= 1024 && unit + 1 < UNITS.len() {
        whole /= 1024;
        unit += 1;
    }
    if unit == 0 {
        return format!("{bytes} B");
    }
    let tenths = (u128::from(bytes) * 10) >> (10 * unit);
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A snapshot of the history in a few words.
fn describe(record: &Record) -> Described {
    Described {
        id: record.id.clone(),
        time: record.time.clone(),
        sequence: record.sequence,
        files: record.totals.files,
        bytes: record.totals.bytes,
        skipped: record.totals.skipped,
        unread: record.unread.clone(),
        consistency: record.consistency,
        reason: record.reason.clone(),
        fork: false,
        layers: record.layers.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_down_to_one_decimal() {
        for (bytes, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_572_864, "1.5 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(human_bytes(bytes), want);
        }
    }
}
