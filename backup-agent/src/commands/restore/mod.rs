//! `restore`: brings a snapshot back, whole or not at all.
//!
//! The tree grows beside the root, every hash is checked on the way, and only a complete one takes the root's place. A try
//! that ran out of time leaves what it has to the next one. Run by a runtime, the restore also claims the head: from then on the writer before it is fenced.

mod ask;
mod keep;
mod replace;

use std::{fs, path::Path, time::Instant};

use serde_json::json;

use self::{
    ask::ask,
    keep::{is_continued, is_there_already},
    replace::{New, fill_target, keep_or_give_up, replace_root, stage},
};
use super::{
    Answer,
    choose::{choose, no_snapshot, seen},
    claim::{claim, hold, take_over, trust},
    describe, human_bytes,
    unpack::{Unpacked, fetch_indexes, reindex, unpack},
};
use crate::{
    cli::Restore,
    config::Config,
    error::Error,
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
        staging,
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

async fn to_target(
    config: &Config,
    store: &dyn Store,
    state: &State,
    wanted: &str,
    target: &Path,
    selection: Option<Selection>,
    last: &Finality,
) -> Result<Done, Error> {
    // An earlier try may have left its working directory there.
    let is_other = |entry: std::io::Result<fs::DirEntry>| {
        entry.map_or(true, |entry| entry.file_name() != staging::INSIDE)
    };
    match fs::read_dir(target).map(|mut entries| entries.any(is_other)) {
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
    Ok(Done {
        warning: fill_target(staging, last).await?,
        ..Done::new(&record, unpacked)
    })
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
    let new = New {
        record: &record,
        indexes: &indexes,
        is_quiet,
    };
    let warning = replace_root(config, state, staging, &new, last, |state| {
        hold(state, seen, claimer);
    });
    Ok(Some(Done {
        warning: warning.await?,
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
