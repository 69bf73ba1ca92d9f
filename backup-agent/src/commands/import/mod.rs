//! `import`: the first snapshot of an instance, out of the folders that another set-up keeps (docs/migration.md).
//!
//! They are brought into a staging directory, to the places where this gateway looks for them, and an ordinary backup of
//! that is taken. Neither the root nor the source is written to. What the old set-up called things is known here only.

mod layout;
mod transfer;

use std::{path::PathBuf, time::Duration};

use serde_json::json;
use tokio::sync::mpsc;

use self::{
    layout::{Planned, plan},
    transfer::{fetch_all, write},
};
use super::{Answer, backup, human_bytes};
use crate::{
    cli::Backup,
    config::Config,
    error::Error,
    snapshot::{head, record},
    state::State,
    store::{self, Store},
    tree::{identity::with_identity, remove::remove, staging::Staging},
};

/// Imports into an instance that was never used.
pub async fn run(config: &Config, store: &dyn Store, bound: Duration) -> Result<Answer, Error> {
    // Held to the end: another import or a restore would use the same staging directory.
    let _lock = State::open(config).await?;
    refuse_used(config, store).await?;
    let location = config.source.as_ref().ok_or(Error::Internal("flag"))?;
    let source = store::open_at(location, "", bound, false)?;
    let from = location.to_string();
    let from = from.trim_end_matches('/');
    let (plan, workspace) = plan(source.as_ref(), from).await?;
    let databases = plan.iter().filter(|file| file.is_database()).count();
    let bytes: u64 = plan.iter().map(|file| file.object.size).sum();

    let (root, identity) = (config.root.clone(), config.identity);
    let staging = tokio::task::spawn_blocking(move || Staging::open(&root, identity, None));
    let staging = staging
        .await
        .map_err(|_| Error::Internal("root's thread"))??;
    let taken = async {
        fetch(config, source.as_ref(), from, plan, &staging).await?;
        let mut staged = config.clone();
        staged.root = staging.path().to_owned();
        // What the backup remembers is about a tree that will be gone.
        let scratch = Scratch::new(config.state.join("import"))?;
        staged.state.clone_from(&scratch.0);
        staged.boot_id = None;
        backup::run(&staged, store, &Backup::default(), bound).await
    };
    let taken = taken.await;
    staging.give_up().await;
    let mut answer = taken?;
    let advice = if databases > 0 {
        "the SQLite databases are as the old tool copied them, perhaps in the middle of a write: \
         check them with `openclaw doctor`\n"
    } else {
        ""
    };
    answer.text = format!(
        "{}imported {} from {from}, the workspace to ~/{workspace}\n{advice}",
        answer.text,
        human_bytes(bytes)
    );
    answer.json["from"] = json!(from);
    answer.json["bytes"] = json!(bytes);
    answer.json["workspace"] = json!(workspace);
    answer.json["databases"] = json!(databases);
    Ok(answer)
}

/// Brings the files to the places where this gateway looks for them.
async fn fetch(
    config: &Config,
    source: &dyn Store,
    from: &str,
    plan: Vec<Planned>,
    staging: &Staging,
) -> Result<(), Error> {
    let (sender, receiver) = mpsc::channel(1);
    let home = staging.fd()?;
    let writing = with_identity(config.identity, "writer", move || write(&home, receiver));
    let (fetched, written) = tokio::join!(fetch_all(source, from, plan, sender), writing);
    written??;
    fetched
}

/// A first snapshot must not follow another, nor come between a runtime and the store that it found empty.
async fn refuse_used(config: &Config, store: &dyn Store) -> Result<(), Error> {
    let head = head::read(store).await?;
    let reason = match record::list(store).await?.pop() {
        Some(id) => format!("it has snapshot {id}"),
        None if head.is_some() => "a runtime has started on it".to_owned(),
        None => return Ok(()),
    };
    Err(Error::Settings(vec![format!(
        "cannot import into {}: {reason}; choose an instance that was never used (--instance), \
         and start its runtime after the import",
        config.place()
    )]))
}

/// A directory of this run alone.
struct Scratch(PathBuf);

impl Scratch {
    /// The next user of the directory makes it; what a killed run has left is removed.
    fn new(path: PathBuf) -> Result<Self, Error> {
        remove(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The next run removes what stays.
        let _ = remove(&self.0);
    }
}
