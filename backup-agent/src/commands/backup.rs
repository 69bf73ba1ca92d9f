//! `backup`: one snapshot of the root.
//!
//! The order on the store is layer, record, head, so that a kill anywhere leaves either nothing visible or a whole
//! snapshot. Nothing is requested when the tree is what the last snapshot has.

use std::{path::PathBuf, time::Instant};

use serde_json::json;
use tokio::sync::mpsc;

use super::{Answer, fenced, human_bytes, trust};
use crate::{
    archive::{
        entry::{Kind, display},
        parts::{PartWriter, part_size},
        writer::{Halt, LayerWriter},
    },
    config::Config,
    error::Error,
    local_index::{LocalIndex, Racy, file_clock, is_tree_same},
    log,
    snapshot::{
        head::{self, Head, Seen, Swap},
        id,
        record::{self, Consistency, FORMAT, Layer, Record, Totals},
        sealed,
    },
    state::{Described, State},
    store::{Part, Store, StoreError},
    tree::{
        exclude::Excludes,
        identity::with_identity,
        read,
        scan::{self, Found, Verdict},
    },
};

/// Parts that wait between compression and upload. One, because each costs its size in memory.
const WAITING_PARTS: usize = 1;

/// Takes a snapshot, if anything changed.
pub async fn run(config: &Config, store: &dyn Store, fork: bool) -> Result<Answer, Error> {
    let begun = Instant::now();
    let mut state = State::open(config).await?;
    if !fork && state.facts.is_fenced {
        let writer = state.facts.writer.clone().unwrap_or_default();
        return Err(fenced(head::read(store).await?.as_ref(), &writer, None));
    }
    if let Some(known) = unchanged(config, &state, fork).await? {
        return Ok(answer(&known, None, begun));
    }

    let writer = match config.boot_id.clone().or(state.facts.writer.clone()) {
        Some(writer) => writer,
        None => id::random_hex::<16>().map_err(Error::local("read", "random bytes"))?,
    };
    if state.facts.writer.as_ref() != Some(&writer) {
        // Before anything is written in that name: a head that moved without our learning of it has to be known as ours.
        state.facts.writer = Some(writer.clone());
        state.save()?;
    }
    trust(config, store, &mut state).await?;
    let seen = head::read(store).await?;
    let is_ours = fork || may_follow(seen.as_ref(), &state, &writer);

    let (snapshot, time) = id::new().map_err(Error::local("read", "random bytes"))?;
    let (layer, totals, consistency) = upload(config, store, &state, &snapshot).await?;
    let parent = if is_ours && !fork {
        seen.as_ref()
            .and_then(|seen| Some((seen.head.snapshot.clone()?, seen.head.sequence)))
    } else {
        let known = state.facts.snapshot.as_ref();
        known.map(|known| (known.id.clone(), known.sequence))
    };
    let record = Record {
        format: FORMAT,
        id: snapshot.clone(),
        sequence: parent.as_ref().map_or(1, |(_, sequence)| sequence + 1),
        parent: parent.map(|(id, _)| id),
        time,
        writer: writer.clone(),
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        consistency,
        fork: fork || !is_ours,
        totals,
        layers: vec![layer],
    };
    let key = record::key(&snapshot);
    match store.put_if(&key, sealed::seal(&record), None).await {
        // Its name is new: what is there is what a try whose answer was lost has written.
        Ok(_) | Err(StoreError::Conflict) => {}
        Err(error) => return Err(Error::store("write", key)(error)),
    }

    if !is_ours {
        return Err(lose(&mut state, &writer, seen.as_ref(), &snapshot));
    }
    if !fork {
        let next = Head {
            format: FORMAT,
            snapshot: Some(snapshot.clone()),
            sequence: record.sequence,
            writer: writer.clone(),
        };
        match head::swap(store, seen.as_ref(), &next).await? {
            Swap::Moved(etag) => state.facts.hold(Seen { head: next, etag }),
            Swap::Lost(now) => return Err(lose(&mut state, &writer, now.as_ref(), &snapshot)),
        }
    }
    state.keep_index()?;
    let described = Described {
        id: snapshot,
        time: record.time.clone(),
        sequence: record.sequence,
        files: totals.files,
        fork,
    };
    state.remember_tree(&config.root, Some(described.clone()))?;
    Ok(answer(&described, Some(&record), begun))
}

/// The last snapshot, if the tree still equals it and it is what the store would give back.
async fn unchanged(config: &Config, state: &State, fork: bool) -> Result<Option<Described>, Error> {
    let Some(known) = state.facts.snapshot.clone() else {
        return Ok(None);
    };
    let newest = state
        .facts
        .head
        .as_ref()
        .and_then(|head| head.snapshot.as_ref());
    if known.fork != fork || (!fork && newest != Some(&known.id)) {
        return Ok(None);
    }
    let Some(index) = state.index() else {
        return Ok(None);
    };
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let snapshot = known.id.clone();
    let is_same = with_identity(config.identity, "walk", move || {
        is_tree_same(&root, &excludes, index, &snapshot, Racy::Read)
    })
    .await??;
    Ok(is_same.then_some(known))
}

/// Whether a snapshot of ours may follow the head: it is ours, nobody's, or as we left it. A runtime has claimed the head
/// when it restored; a person without any state of this instance has to restore first.
fn may_follow(seen: Option<&Seen>, state: &State, writer: &str) -> bool {
    match (seen, state.facts.seen()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some(now), last) => {
            now.head.writer == writer || last.is_some_and(|last| last.etag == now.etag)
        }
    }
}

fn lose(state: &mut State, writer: &str, holder: Option<&Seen>, snapshot: &str) -> Error {
    state.facts.is_fenced = true;
    state.facts.writer = Some(writer.to_owned());
    if let Err(error) = state.save() {
        log::warn(
            "cannot remember that another instance took over",
            &[("error", error.to_string().into())],
        );
    }
    fenced(holder, writer, Some(snapshot))
}

/// Reads the tree into one layer and uploads it at the same time.
async fn upload(
    config: &Config,
    store: &dyn Store,
    state: &State,
    snapshot: &str,
) -> Result<(Layer, Totals, Consistency), Error> {
    let (layer_id, _) = id::new().map_err(Error::local("read", "random bytes"))?;
    let key = record::layer_key(&layer_id);
    let (sender, receiver) = mpsc::channel(WAITING_PARTS);
    let pass = Pass {
        root: config.root.clone(),
        excludes: config.excludes.clone(),
        snapshot: snapshot.to_owned(),
        layer: layer_id,
        spool: state.scratch("layer-index.new")?,
        index: state.index_under_way()?,
        sender,
    };
    let read = with_identity(config.identity, "reader", move || pass.run());
    let (uploaded, read) = tokio::join!(store.upload(&key, receiver), read);
    let (layer, totals) = match (uploaded, read?) {
        (_, Err(Halt::Failed(error))) => return Err(error),
        (Err(error), _) => return Err(Error::store("write", key)(error)),
        (Ok(()), Err(Halt::Stopped)) => return Err(Error::Internal("upload")),
        (Ok(()), Ok(read)) => read,
    };
    // If nothing changed since the walk began, then the tree was at any moment in between what the snapshot has.
    let index = state.read_index_under_way()?;
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let snapshot = snapshot.to_owned();
    let is_same = with_identity(config.identity, "walk", move || {
        is_tree_same(&root, &excludes, index, &snapshot, Racy::Changed)
    })
    .await??;
    let consistency = if is_same {
        Consistency::Instant
    } else {
        Consistency::PerFile
    };
    Ok((layer, totals, consistency))
}

/// One reading of the whole tree, on a thread with the gateway user's rights; its files were opened before.
struct Pass {
    root: PathBuf,
    excludes: Excludes,
    snapshot: String,
    layer: String,
    spool: std::fs::File,
    index: std::fs::File,
    sender: mpsc::Sender<Part>,
}

impl Pass {
    fn run(self) -> Result<(Layer, Totals), Halt> {
        let size = part_size(estimate(&self.root, &self.excludes)?);
        let mut layer =
            LayerWriter::new(&self.layer, PartWriter::new(self.sender, size), self.spool)?;
        let mut index = LocalIndex::new(self.index, &self.snapshot, file_clock()?)?;
        let mut totals = Totals::default();
        let mut skipped = 0;
        let visit = |found: Found<'_>| {
            let mut entry = found.entry;
            if entry.kind == Kind::File {
                let Ok(Some(mut content)) = read::open(found.parent, found.name) else {
                    return Ok::<_, Halt>(Verdict::Skipped);
                };
                // What is recorded is the file that was opened, not the one that was listed.
                entry = scan::entry(&entry.path, Kind::File, content.status());
                let Ok(xattrs) = read::xattrs(content.file()) else {
                    return Ok(Verdict::Skipped);
                };
                entry.xattrs = xattrs;
                layer.add_file(&mut entry, &mut content)?;
                totals.files += 1;
                totals.bytes += content
                    .segments()
                    .iter()
                    .map(|(_, length)| length)
                    .sum::<u64>();
            } else {
                if let Some(directory) = found.directory {
                    entry.xattrs = read::xattrs(directory)
                        .map_err(Error::local("read the attributes of", entry.display()))?;
                }
                layer.add(&entry)?;
            }
            totals.entries += 1;
            index.entry(&entry)?;
            Ok(Verdict::Taken)
        };
        scan::walk(&self.root, &self.excludes, visit, |path, reason| {
            skipped += 1;
            let path = display(path);
            log::warn(
                "entry left out",
                &[("path", path.into()), ("reason", reason.into())],
            );
        })?;
        index.finish()?;
        let layer = layer.finish()?;
        totals.skipped = skipped;
        totals.stored_bytes = layer.size;
        Ok((layer, totals))
    }
}

/// About how large the layer can become: parts have to have one size, chosen before the first.
fn estimate(root: &std::path::Path, excludes: &Excludes) -> Result<u64, Error> {
    /// Headers and an index line.
    const ENTRY: u64 = 2048;
    let mut bytes = 0_u64;
    let visit = |found: Found<'_>| {
        bytes = bytes.saturating_add(found.allocated + ENTRY);
        Ok::<_, Error>(Verdict::Taken)
    };
    scan::walk(root, excludes, visit, |_, _| ())?;
    Ok(bytes)
}

fn answer(described: &Described, record: Option<&Record>, begun: Instant) -> Answer {
    let took = begun.elapsed();
    let uploaded = record.map_or(0, |record| record.totals.stored_bytes);
    let text = match record {
        None => format!("unchanged since snapshot {}\n", described.id),
        Some(record) => format!(
            "snapshot {} of {} files, {} uploaded in {:.1} s{}\n",
            described.id,
            described.files,
            human_bytes(uploaded),
            took.as_secs_f64(),
            if record.totals.skipped > 0 {
                format!(", {} left out with a warning", record.totals.skipped)
            } else {
                String::new()
            },
        ),
    };
    let json = json!({
        "snapshot": described.id,
        "time": described.time,
        "unchanged": record.is_none(),
        "bytesUploaded": uploaded,
        "files": described.files,
        "durationMs": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "consistency": record.map(|record| record.consistency),
        "skipped": record.map_or(0, |record| record.totals.skipped),
        "fork": described.fork,
    });
    Answer { text, json }
}
