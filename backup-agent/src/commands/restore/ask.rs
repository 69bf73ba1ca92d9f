//! Whether the root may be replaced: a person at a terminal is asked, and whoever uses the root is named.

use std::{
    fs,
    io::{IsTerminal, stderr, stdin},
};

use crate::{
    commands::human_bytes, config::Config, error::Error, log, snapshot::record::Record,
    tree::users::users,
};

/// Asks a person at a terminal before the root is replaced. A script is not asked: it knows what it does. But neither knows
/// what others do in the root.
pub async fn ask(config: &Config, record: &Record) -> Result<(), Error> {
    let root = &config.root;
    let is_empty = fs::read_dir(root).map_or(true, |mut found| found.next().is_none());
    if is_empty {
        return Ok(());
    }
    let found = root.clone();
    let users = tokio::task::spawn_blocking(move || users(&found)).await;
    let users = users.map_err(|_| Error::Internal("look at processes"))?;
    if let Some(doubt) = users.doubt.filter(|_| users.named.is_empty()) {
        log::warn(
            "cannot tell of every process whether it uses the root",
            &[("error", doubt.to_string().into())],
        );
    }
    let users = users.named.join(", ");
    if !stdin().is_terminal() || !stderr().is_terminal() {
        return if users.is_empty() {
            Ok(())
        } else {
            Err(Error::InUse {
                root: root.clone(),
                reason: format!(
                    "it is in use by {users}, and what they write meanwhile would be lost; stop them, or pass --yes"
                ),
            })
        };
    }
    if !users.is_empty() {
        eprintln!("It is in use by {users}. What they write meanwhile is lost: stop them first.");
    }
    eprint!(
        "This replaces everything in {} with snapshot {} of {}: {} files, {}.\n\
         `restore --dry-run` shows the differences. Replace it? [y/N] ",
        root.display(),
        record.id,
        record.time,
        record.totals.files,
        human_bytes(record.totals.bytes),
    );
    let answer = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        stdin().read_line(&mut line).map(|_| line)
    });
    let line = answer.await.map_err(|_| Error::Internal("question"))?;
    let line = line.map_err(Error::local("read", "the answer"))?;
    match line.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Error::Declined),
    }
}
