//! `restore`: brings a snapshot back, whole or not at all.
//!
//! The tree grows beside the root, every hash is checked on the way, and only a complete one takes the root's place. Run
//! by a runtime, the restore also claims the head: from then on the writer before it is fenced.

use std::{
    fs,
    io::{IsTerminal, stderr, stdin},
    path::Path,
    time::Instant,
};

use serde_json::json;

use super::{
    Answer, claimed, describe, human_bytes, trust,
    unpack::{Unpacked, fetch_indexes, reindex, unpack},
};
use crate::{
    archive::entry::Kind,
    cli::Restore,
    config::Config,
    error::Error,
    local_index::{Known, Racy, Trust, is_tree_same},
    log,
    snapshot::{
        head::{self, Seen, Swap},
        id,
        record::{self, Record},
    },
    state::{Described, State, Which},
    store::Store,
    tree::{
        apply::Old,
        exclude::Selection,
        identity::with_identity,
        scan::{self, Found, Verdict, open_root},
        swap::Staging,
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
}

impl Done {
    fn new(record: &Record, unpacked: Unpacked) -> Self {
        Self {
            described: describe(record),
            unchanged: false,
            files: unpacked.files,
            bytes: unpacked.bytes,
            downloaded: unpacked.downloaded,
        }
    }
}

/// Restores a snapshot to the root, or to a target without touching root, state or head.
pub async fn run(config: &Config, store: &dyn Store, options: &Restore) -> Result<Answer, Error> {
    let begun = Instant::now();
    let wanted = &options.snapshot;
    if wanted != "latest" && !id::is_valid(wanted) {
        let problem = format!("cannot use {wanted:?}: a snapshot is `latest` or an id from `list`");
        return Err(Error::Settings(vec![problem]));
    }
    let mut state = State::open(config).await?;
    if let Some(target) = &options.target {
        let paths = &options.paths;
        let selection = (!paths.is_empty())
            .then(|| Selection::new(paths))
            .transpose();
        let selection = selection
            .map_err(|problem| Error::Settings(vec![format!("cannot use --path: {problem}")]))?;
        let done = to_target(config, store, &state, wanted, target, selection).await?;
        return Ok(answer(&done, target, begun));
    }
    if options.dry_run {
        let seen = head::read(store).await?;
        let record = choose(config, store, wanted, seen.as_ref()).await?;
        let indexes = fetch_indexes(store, &state, &record).await?;
        return super::compare::run(config, &record, &indexes).await;
    }
    for _ in 0..ROUNDS {
        if let Some(done) = to_root(config, store, &mut state, options).await? {
            return Ok(answer(&done, &config.root, begun));
        }
        log::info("a newer snapshot came meanwhile, restoring that one", &[]);
    }
    Err(Error::Damaged {
        key: head::KEY.to_owned(),
        reason: "another instance keeps moving it".to_owned(),
    })
}

/// Asks a person at a terminal before the root is replaced. A script is not asked: it knows what it does.
async fn ask(config: &Config, record: &Record) -> Result<(), Error> {
    let is_empty = fs::read_dir(&config.root).map_or(true, |mut found| found.next().is_none());
    if is_empty || !stdin().is_terminal() || !stderr().is_terminal() {
        return Ok(());
    }
    eprint!(
        "This replaces everything in {} with snapshot {} of {}: {} files, {}.\n\
         `restore --dry-run` shows the differences. Replace it? [y/N] ",
        config.root.display(),
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
) -> Result<Done, Error> {
    let target = std::path::absolute(target).map_err(Error::local("find", target))?;
    match fs::read_dir(&target).map(|mut entries| entries.next().is_some()) {
        Ok(true) => {
            let problem = format!("cannot use --target: {} is not empty", target.display());
            return Err(Error::Settings(vec![problem]));
        }
        Ok(false) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::local("list", target)(error)),
    }
    let seen = head::read(store).await?;
    let record = choose(config, store, wanted, seen.as_ref()).await?;
    let staging = Staging::new(&target, config.identity)?;
    let indexes = fetch_indexes(store, state, &record).await?;
    let unpacked = unpack(config, store, &record, &indexes, &staging, selection, None).await?;
    staging.put_in_place(&target)?;
    Ok(Done::new(&record, unpacked))
}

/// One round; `None` when the head moved while it ran.
async fn to_root(
    config: &Config,
    store: &dyn Store,
    state: &mut State,
    options: &Restore,
) -> Result<Option<Done>, Error> {
    let wanted = &options.snapshot;
    let claimer = config.boot_id.as_deref();
    let seen = head::read(store).await?;
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
                state.remember_tree(&config.root, None)?;
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
        state.remember_tree(&config.root, Some(described.clone()))?;
        return Ok(Some(Done {
            described,
            unchanged: true,
            files: record.totals.files,
            bytes: record.totals.bytes,
            downloaded: 0,
        }));
    }

    if claimer.is_none() && !options.yes {
        ask(config, &record).await?;
    }
    let staging = Staging::new(&config.root, config.identity)?;
    let indexes = fetch_indexes(store, state, &record).await?;
    // Only a runtime knows that nobody works in the old tree.
    let old = open_root(&config.root).map(|root| Old::new(root, claimer.is_some()));
    let unpacked = unpack(config, store, &record, &indexes, &staging, None, old.ok()).await?;
    let Some(seen) = take_over(store, seen, &record, claimer).await? else {
        return Ok(None);
    };
    state.forget_tree()?;
    staging.put_in_place(&config.root)?;
    reindex(config, state, &record, &indexes, Trust::Restored).await?;
    hold(state, seen, claimer);
    state.remember_tree(&config.root, Some(describe(&record)))?;
    Ok(Some(Done::new(&record, unpacked)))
}

/// Whether the tree on the disk goes on from the newest snapshot, with nobody else's in between: then it is the same or
/// newer, and replacing it would lose what was written since (a restart after a crash, with the disk still there).
///
/// A tree that lost more than half of its files while nobody was looking is taken for damage, not for news.
async fn is_continued(config: &Config, state: &State, seen: Option<&Seen>) -> Result<bool, Error> {
    let is_ours = seen.is_some_and(|seen| {
        // The last run may have been killed between moving the head and writing that down.
        Some(&seen.etag) == state.facts.etag.as_ref()
            || Some(&seen.head.writer) == state.facts.writer.as_ref()
    });
    if !is_ours || state.facts.is_fenced || !state.is_root_known(&config.root) {
        return Ok(false);
    }
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let files = with_identity(config.identity, "walk", move || {
        let mut files = 0;
        let visit = |found: Found<'_>| {
            files += u64::from(found.entry.kind == Kind::File);
            Ok::<_, Error>(Verdict::Taken)
        };
        scan::walk(&root, &excludes, visit, |_, _| ()).map(|()| files)
    })
    .await??;
    let known = state.facts.snapshot.as_ref().map_or(0, |known| known.files);
    Ok(files * 2 >= known)
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
        described,
    }))
}

/// The record that was asked for.
pub async fn choose(
    config: &Config,
    store: &dyn Store,
    wanted: &str,
    seen: Option<&Seen>,
) -> Result<Record, Error> {
    if wanted != "latest" {
        return record::read(store, wanted).await;
    }
    if let Some(snapshot) = seen.and_then(|seen| seen.head.snapshot.as_deref()) {
        return record::read(store, snapshot)
            .await
            .map_err(|error| match error {
                Error::UnknownSnapshot { id } => Error::Damaged {
                    key: record::key(&id),
                    reason: "the head names it, and it is not there".to_owned(),
                },
                other => other,
            });
    }
    // Without a word of the head, the newest record is the latest: its writer was killed before the head moved.
    match record::list(store).await?.last() {
        Some(newest) => record::read(store, newest).await,
        None => Err(no_snapshot(config)),
    }
}

fn no_snapshot(config: &Config) -> Error {
    Error::NoSnapshot {
        instance: config.instance.clone(),
        store: config.location.to_string(),
    }
}

/// Makes the head ours after a restore; a person's restore only remembers it. `None`: it moved.
async fn take_over(
    store: &dyn Store,
    seen: Option<Seen>,
    record: &Record,
    claimer: Option<&str>,
) -> Result<Option<Option<Seen>>, Error> {
    let Some(writer) = claimer else {
        return Ok(Some(seen));
    };
    // An older snapshot that was asked for by name does not become the newest one by being restored.
    let newest = match &seen {
        Some(seen) if seen.head.snapshot.is_some() => {
            (seen.head.snapshot.clone()).map(|id| (id, seen.head.sequence))
        }
        _ => Some((record.id.clone(), record.sequence)),
    };
    Ok(claim(store, seen, newest, writer).await?.map(Some))
}

/// Writes our name into the head. `None`: somebody moved it since it was seen.
async fn claim(
    store: &dyn Store,
    seen: Option<Seen>,
    snapshot: Option<(String, u64)>,
    writer: &str,
) -> Result<Option<Seen>, Error> {
    let snapshot = snapshot.as_ref();
    let next = claimed(
        snapshot.map(|(id, sequence)| (id.as_str(), *sequence)),
        writer,
    );
    if let Some(seen) = &seen
        && seen.head == next
    {
        return Ok(Some(seen.clone()));
    }
    Ok(match head::swap(store, seen.as_ref(), &next).await? {
        Swap::Moved(etag) => Some(Seen { head: next, etag }),
        Swap::Lost(_) => None,
    })
}

fn hold(state: &mut State, seen: Option<Seen>, claimer: Option<&str>) {
    if let Some(writer) = claimer {
        state.facts.writer = Some(writer.to_owned());
    }
    if let Some(seen) = seen {
        state.facts.hold(seen);
    } else {
        state.facts.head = None;
        state.facts.etag = None;
        state.facts.is_fenced = false;
    }
}

async fn is_there_already(config: &Config, state: &State, record: &Record) -> Result<bool, Error> {
    let is_known = |known: &Described| known.id == record.id;
    if !state.facts.snapshot.as_ref().is_some_and(is_known) || !state.is_root_known(&config.root) {
        return Ok(false);
    }
    let index = state.index(Which::Last);
    let known = index.and_then(|index| Known::open(&index, &record.id, record.layers.len()).ok());
    let Some(known) = known else {
        return Ok(false);
    };
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    with_identity(config.identity, "walk", move || {
        is_tree_same(&root, &excludes, known, Racy::Read)
    })
    .await?
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
    let json = json!({
        "snapshot": described.id,
        "time": described.time,
        "unchanged": done.unchanged,
        "files": done.files,
        "bytes": done.bytes,
        "bytesDownloaded": done.downloaded,
        "durationMs": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    });
    Answer::new(text, json)
}
