//! `restore`: brings a snapshot back, whole or not at all.
//!
//! The tree grows beside the root, every hash is checked on the way, and only a complete one takes the root's place. A try
//! that ran out of time leaves what it has to the next one. Run by a runtime, the restore also claims the head: from then on the writer before it is fenced.

mod keep;

use std::{
    fs,
    io::{IsTerminal, stderr, stdin},
    path::Path,
    time::Instant,
};

use serde_json::json;

use self::keep::{is_continued, is_there_already};
use super::{
    Answer,
    choose::{choose, no_snapshot, seen},
    claim::{claim, hold, take_over, trust},
    describe, human_bytes,
    unpack::{Unpacked, fetch_indexes, reindex, restamp, unpack},
};
use crate::{
    cli::Restore,
    config::Config,
    error::{Chain, Error},
    interrupt::Finality,
    local_index::Trust,
    log,
    snapshot::{
        head::{self, Seen},
        id,
        record::{self, Record},
    },
    state::{Described, State},
    store::Store,
    tree::{
        exclude::Selection,
        miss::Unread,
        old::Old,
        root::{RootId, settle},
        scan::open_root,
        staging::Staging,
        users::users,
    },
};

/// How often a runtime starts over because the old writer's last snapshot came in between. Each round needs another new
/// snapshot, and a writer takes minutes from one to the next.
const ROUNDS: u32 = 5;

/// What a restore did.
struct Done {
    described: Described,
    /// Nothing had to be written.
    unchanged: bool,
    files: u64,
    bytes: u64,
    downloaded: u64,
    /// What is left to do by the next run.
    warning: Option<String>,
    /// What came back without a part of its status.
    lost: Unread,
}

impl Done {
    fn new(record: &Record, unpacked: Unpacked) -> Self {
        Self {
            described: describe(record),
            unchanged: false,
            files: unpacked.files,
            bytes: unpacked.bytes,
            downloaded: unpacked.downloaded,
            warning: None,
            lost: unpacked.lost,
        }
    }
}

/// Restores a snapshot to the root, or to a target without touching root, state or head.
pub async fn run(
    config: &Config,
    store: &dyn Store,
    options: &Restore,
    last: &Finality,
) -> Result<Answer, Error> {
    let begun = Instant::now();
    let wanted = &options.snapshot;
    if wanted != "latest" && !id::is_valid(wanted) {
        let problem = format!("cannot use {wanted:?}: a snapshot is `latest` or an id from `list`");
        return Err(Error::Settings(vec![problem]));
    }
    let mut state = State::open(config).await?;
    if let Some(target) = &config.target {
        let paths = &options.paths;
        let selection = (!paths.is_empty())
            .then(|| Selection::new(paths))
            .transpose();
        let selection = selection
            .map_err(|problem| Error::Settings(vec![format!("cannot use --path: {problem}")]))?;
        let done = to_target(config, store, &state, wanted, target, selection, last).await?;
        return Ok(answer(&done, target, begun));
    }
    if options.dry_run {
        let seen = seen(store, wanted, false).await?;
        let record = choose(config, store, wanted, seen.as_ref()).await?;
        let indexes = fetch_indexes(store, &state, &record).await?;
        return super::compare::run(config, &record, &indexes).await;
    }
    for _ in 0..ROUNDS {
        if let Some(done) = to_root(config, store, &mut state, options, last).await? {
            return Ok(answer(&done, &config.root, begun));
        }
        log::info("a newer snapshot came meanwhile, restoring that one", &[]);
    }
    Err(Error::Damaged {
        key: head::KEY.to_owned(),
        reason: "another instance keeps moving it; stop that one".to_owned(),
    })
}

/// Asks a person at a terminal before the root is replaced. A script is not asked: it knows what it does. But neither knows
/// what others do in the root.
async fn ask(config: &Config, record: &Record) -> Result<(), Error> {
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

async fn to_target(
    config: &Config,
    store: &dyn Store,
    state: &State,
    wanted: &str,
    target: &Path,
    selection: Option<Selection>,
    last: &Finality,
) -> Result<Done, Error> {
    match fs::read_dir(target).map(|mut entries| entries.next().is_some()) {
        Ok(true) => {
            let problem = format!("cannot use --target: {} is not empty", target.display());
            return Err(Error::Settings(vec![problem]));
        }
        Ok(false) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::local("list", target)(error)),
    }
    let seen = seen(store, wanted, false).await?;
    let record = choose(config, store, wanted, seen.as_ref()).await?;
    // Of a selection, nobody goes on with a part.
    let source = selection.is_none().then(|| record.id.clone());
    let staging = stage(target, config, source).await?;
    let unpacked = async {
        let indexes = fetch_indexes(store, state, &record).await?;
        unpack(config, store, &record, &indexes, &staging, selection, None).await
    };
    let unpacked = unpacked.await;
    let (staging, unpacked) = keep_or_give_up(staging, unpacked).await?;
    last.reach();
    let (staging, filled) = on_thread(staging, Staging::fill).await?;
    let (staging, ()) = keep_or_give_up(staging, filled).await?;
    Ok(Done {
        warning: staging.finish(last).await,
        ..Done::new(&record, unpacked)
    })
}

/// Opens the working directory of a root or a target, on a thread: much may have to be looked at there.
async fn stage(root: &Path, config: &Config, source: Option<String>) -> Result<Staging, Error> {
    let (root, identity) = (root.to_owned(), config.identity);
    let staging = tokio::task::spawn_blocking(move || Staging::open(&root, identity, source));
    staging
        .await
        .map_err(|_| Error::Internal("root's thread"))?
}

/// Does file work of the swap on a thread. It is done to its end, whatever becomes of who waits for it.
async fn on_thread<T: Send + 'static>(
    staging: Staging,
    work: fn(&Staging) -> Result<T, Error>,
) -> Result<(Staging, Result<T, Error>), Error> {
    let done = tokio::task::spawn_blocking(move || {
        let done = work(&staging);
        (staging, done)
    });
    done.await.map_err(|_| Error::Internal("root's thread"))
}

/// Where the store did not answer, the next try goes on with what was unpacked, and half of two trees stays as it is. After any
/// other failure the new tree would only take room on a disk that may be full.
async fn keep_or_give_up<T>(
    staging: Staging,
    unpacked: Result<T, Error>,
) -> Result<(Staging, T), Error> {
    match unpacked {
        Ok(unpacked) => Ok((staging, unpacked)),
        Err(error @ (Error::Store { .. } | Error::RootHalf { .. })) => Err(error),
        Err(error) => {
            staging.give_up().await;
            Err(error)
        }
    }
}

/// One round; `None` when the head moved while it ran.
async fn to_root(
    config: &Config,
    store: &dyn Store,
    state: &mut State,
    options: &Restore,
    last: &Finality,
) -> Result<Option<Done>, Error> {
    let wanted = &options.snapshot;
    let claimer = config.boot_id.as_deref();
    let seen = seen(store, wanted, claimer.is_some()).await?;
    if claimer.is_some() {
        trust(config, store, state).await?;
        if wanted == "latest" && is_continued(config, state, seen.as_ref()).await? {
            return carry_on(config, store, state, seen).await;
        }
    }
    let record = match choose(config, store, wanted, seen.as_ref()).await {
        Ok(record) => record,
        Err(error @ Error::NoSnapshot { .. }) => {
            // A fresh start: the root stays as it is, and the instance is ours from now on.
            if let Some(writer) = claimer {
                let Some(seen) = claim(store, seen, None, writer).await? else {
                    return Ok(None);
                };
                state.facts.writer = Some(writer.to_owned());
                state.facts.hold(seen);
                settle(&config.root);
                state.remember_tree(RootId::at(&config.root)?, None)?;
            }
            return Err(error);
        }
        Err(error) => return Err(error),
    };

    if is_there_already(config, state, &record).await? {
        let Some(seen) = take_over(store, seen, &record, claimer).await? else {
            return Ok(None);
        };
        hold(state, seen, claimer);
        let described = describe(&record);
        state.remember_tree(RootId::at(&config.root)?, Some(described.clone()))?;
        return Ok(Some(Done {
            described,
            unchanged: true,
            files: record.totals.files,
            bytes: record.totals.bytes,
            downloaded: 0,
            warning: None,
            lost: Unread::default(),
        }));
    }

    if claimer.is_none() && !options.yes {
        ask(config, &record).await?;
    }
    let staging = stage(&config.root, config, Some(record.id.clone())).await?;
    // Only a runtime knows that nobody works in the old tree.
    let is_quiet = claimer.is_some();
    let unpacked = async {
        let indexes = fetch_indexes(store, state, &record).await?;
        let old = open_root(&config.root).map(|root| Old::new(root, is_quiet));
        let unpacked = unpack(config, store, &record, &indexes, &staging, None, old.ok()).await?;
        if !is_quiet {
            // Before anyone can write to the new tree: what is written once it is in place must be news to the next backup.
            let root = staging.path();
            reindex(config, state, root, &record, &indexes, Trust::Restored).await?;
        }
        Ok((unpacked, indexes))
    };
    let unpacked = unpacked.await;
    let (staging, (unpacked, indexes)) = keep_or_give_up(staging, unpacked).await?;
    let Some(seen) = take_over(store, seen, &record, claimer).await? else {
        return Ok(None);
    };
    let known = state.facts.clone();
    state.forget_tree()?;
    last.reach();
    let (staging, replaced) = on_thread(staging, Staging::replace).await?;
    if matches!(replaced, Err(ref error) if !matches!(error, Error::RootHalf { .. })) {
        // The old tree is there, and all that is known of it holds.
        state.facts = known;
        state.save()?;
    }
    let (staging, are_moved) = keep_or_give_up(staging, replaced).await?;
    if !is_quiet {
        if are_moved {
            restamp(config, state).await?;
        }
        state.keep_index()?;
    }
    hold(state, seen, claimer);
    state.remember_tree(RootId::at(&config.root)?, Some(describe(&record)))?;
    let mut warning = staging.finish(last).await;
    if is_quiet && warning.is_none() {
        // After the old tree is gone, of which files are part of the new one: that changes their stamps.
        let index = async {
            reindex(
                config,
                state,
                &config.root,
                &record,
                &indexes,
                Trust::Restored,
            )
            .await?;
            state.keep_index()
        };
        match last.unless_hurried(index).await {
            Some(Ok(())) => {
                state.remember_tree(RootId::at(&config.root)?, Some(describe(&record)))?
            }
            Some(Err(error)) => {
                warning = Some(format!(
                    "the next backup compares contents: {}",
                    Chain(&error)
                ))
            }
            None => {}
        }
    }
    Ok(Some(Done {
        warning,
        ..Done::new(&record, unpacked)
    }))
}

async fn carry_on(
    config: &Config,
    store: &dyn Store,
    state: &mut State,
    seen: Option<Seen>,
) -> Result<Option<Done>, Error> {
    let writer = config.boot_id.as_deref().unwrap_or_default();
    let snapshot = seen
        .as_ref()
        .and_then(|seen| Some((seen.head.snapshot.clone()?, seen.head.sequence)));
    let known = state.facts.snapshot.clone();
    let Some(seen) = claim(store, seen, snapshot.clone(), writer).await? else {
        return Ok(None);
    };
    state.facts.writer = Some(writer.to_owned());
    state.facts.hold(seen);
    state.facts.shrunken = None;
    state.save()?;
    let Some((snapshot, _)) = snapshot else {
        return Err(no_snapshot(config));
    };
    log::info(
        "the tree goes on from the newest snapshot and is left as it is",
        &[("snapshot", snapshot.clone().into())],
    );
    let described = match known.filter(|known| known.id == snapshot) {
        Some(known) => known,
        None => describe(&record::read(store, &snapshot).await?),
    };
    Ok(Some(Done {
        unchanged: true,
        files: described.files,
        bytes: 0,
        downloaded: 0,
        warning: None,
        lost: Unread::default(),
        described,
    }))
}

fn answer(done: &Done, place: &Path, begun: Instant) -> Answer {
    let took = begun.elapsed();
    let described = &done.described;
    let text = if done.unchanged {
        format!(
            "{} is up to date with snapshot {}\n",
            place.display(),
            described.id
        )
    } else {
        format!(
            "restored snapshot {} to {}: {} files, {} in {:.1} s\n",
            described.id,
            place.display(),
            done.files,
            human_bytes(done.bytes),
            took.as_secs_f64(),
        )
    };
    let text = text + &lacking(&done.lost);
    let json = json!({
        "snapshot": described.id,
        "time": described.time,
        "unchanged": done.unchanged,
        "files": done.files,
        "bytes": done.bytes,
        "bytesDownloaded": done.downloaded,
        "durationMs": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "warning": done.warning,
        "attributesLost": done.lost,
    });
    Answer::new(text, json)
}

/// What a restored tree does without, for people: the log has the reasons.
fn lacking(lost: &Unread) -> String {
    let line = |path: &String| {
        format!("{path} lacks a part of its status: this file system or user cannot give it\n")
    };
    let mut lines: Vec<String> = lost.paths.iter().map(line).collect();
    let unnamed = lost.count - lost.paths.len() as u64;
    if unnamed > 0 {
        lines.push(format!("and {unnamed} more\n"));
    }
    lines.concat()
}
