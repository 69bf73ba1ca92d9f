//! `verify`: whether everything that snapshots name is there and what it was written as, and which paths damage costs.

use std::collections::BTreeMap;

use serde_json::json;
use sha2::{Digest, Sha256};

use super::{Answer, choose::choose, human_bytes};
use crate::{
    archive::{
        download::range,
        entry::{Entry, Kind},
        extents::Extent,
        footer::{self, Footer},
        layer_index::LayerIndex,
        merge::{Merge, Source},
        reader::{Check, RawStream, stream},
        writer::Halt,
    },
    config::Config,
    error::Error,
    log, progress,
    snapshot::{
        head,
        id::hex,
        record::{self, Layer, Record, layer_key},
    },
    state::State,
    store::{Store, twice},
};

/// Paths that are named for each snapshot; the rest is counted.
const MOST_PATHS: usize = 100;

/// What was found out about one layer.
#[derive(Default)]
struct Checked {
    /// None when nothing in it can be read.
    index: Option<LayerIndex>,
    /// What is wrong with it.
    problems: Vec<String>,
    /// The parts of its raw stream that are lost.
    lost: Vec<(u64, u64)>,
    bytes: u64,
}

/// What damage costs a snapshot.
struct Cost {
    snapshot: String,
    /// The first ones.
    paths: Vec<String>,
    count: u64,
}

/// Checks one snapshot, the latest, or all.
pub async fn run(
    config: &Config,
    store: &dyn Store,
    wanted: &str,
    is_deep: bool,
) -> Result<Answer, Error> {
    let state = State::open(config).await?;
    let mut damaged: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let records = records(config, store, wanted, &mut damaged).await?;
    let mut layers: BTreeMap<String, Checked> = BTreeMap::new();
    let mut sizes: BTreeMap<&str, u64> = BTreeMap::new();
    for layer in records.iter().flat_map(|record| &record.layers) {
        sizes.insert(&layer.id, layer.raw_size);
    }
    progress::begin("checking", sizes.values().sum());
    for layer in records.iter().flat_map(|record| &record.layers) {
        if !layers.contains_key(&layer.id) {
            let checked = check(store, &state, layer, is_deep).await?;
            if !checked.problems.is_empty() {
                damaged.insert(layer_key(&layer.id), checked.problems.clone());
            }
            layers.insert(layer.id.clone(), checked);
        }
    }
    let costs = records.iter().map(|record| cost(record, &layers));
    let costs = costs.collect::<Result<Vec<_>, _>>()?;
    let bytes = layers.values().map(|checked| checked.bytes).sum();
    Ok(report(&costs, &damaged, layers.len(), bytes))
}

/// The records that were asked for. One that is damaged does not hide the others when all were.
async fn records(
    config: &Config,
    store: &dyn Store,
    wanted: &str,
    damaged: &mut BTreeMap<String, Vec<String>>,
) -> Result<Vec<Record>, Error> {
    if wanted != "all" {
        let seen = head::read(store).await?;
        return Ok(vec![choose(config, store, wanted, seen.as_ref()).await?]);
    }
    let mut note = |error| match error {
        Error::Damaged { key, reason } => {
            damaged.insert(key, vec![reason]);
            Ok(())
        }
        other => Err(other),
    };
    if let Err(error) = head::read(store).await {
        note(error)?;
    }
    let mut records = Vec::new();
    for id in record::list(store).await? {
        match record::read(store, &id).await {
            Ok(record) => records.push(record),
            Err(error) => note(error)?,
        }
    }
    Ok(records)
}

/// Checks a layer: its footer, its index, every frame; deep, also what the frames unpack to and the files in that.
async fn check(
    store: &dyn Store,
    state: &State,
    layer: &Layer,
    is_deep: bool,
) -> Result<Checked, Error> {
    log::debug("checking a layer", &[("layer", layer.id.clone().into())]);
    let mut checked = Checked::default();
    checked.note(twice(|| check_footer(store, layer)).await)?;
    let index = LayerIndex::fetch(store, layer, state.nameless()?).await;
    let Some(index) = checked.note(index)? else {
        return Ok(checked);
    };
    let all = vec![true; index.frames.len()];
    let mode = if is_deep { Check::Unpack } else { Check::Hash };
    let (download, raw) = stream(&index, &all, mode)?;
    let entries = is_deep.then(|| Source::new(&index)).transpose();
    let entries = checked.note(entries)?.flatten();
    let sweep = tokio::task::spawn_blocking(move || sweep(entries, raw));
    let (fetched, swept) = tokio::join!(download.run(store), sweep);
    progress::add(layer.raw_size);
    let (problems, lost) = swept.map_err(|_| Error::Internal("check"))?;
    checked.problems.extend(problems);
    checked.lost.extend(lost);
    // What ends in the middle is lost as a whole: nobody looks for what is left of it.
    if let Some(bytes) = checked.note(fetched)? {
        checked.bytes = bytes + layer.index_size;
        checked.index = Some(index);
    }
    Ok(checked)
}

impl Checked {
    /// Keeps what is damage, and passes on what is not.
    fn note<T>(&mut self, result: Result<T, Error>) -> Result<Option<T>, Error> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Error::Damaged { reason, .. }) => {
                if !self.problems.contains(&reason) {
                    self.problems.push(reason);
                }
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    /// Whether damage costs this entry.
    fn loses(&self, entry: &Entry) -> bool {
        let hits = |&(from, to): &(u64, u64)| overlaps(entry, from, to);
        self.index.is_none() || self.lost.iter().any(hits)
    }
}

fn overlaps(entry: &Entry, from: u64, to: u64) -> bool {
    entry.extents.iter().any(|extent| match *extent {
        Extent::Data { offset, length, .. } => offset < to && from < offset.saturating_add(length),
        Extent::Hole { .. } => false,
    })
}

/// The footer is where the record says that the object ends, and says the same about the index.
async fn check_footer(store: &dyn Store, layer: &Layer) -> Result<(), Error> {
    let size = footer::SIZE as u64;
    let at = layer.size.checked_sub(size);
    let at = at.ok_or_else(|| layer.damaged("its record gives it less than a footer's size"))?;
    let found = range(store, &layer_key(&layer.id), at, size).await?;
    Footer::matches(&found, layer)
        .then_some(())
        .ok_or_else(|| layer.damaged("its footer is not what its record says"))
}

/// Lets all frames of a layer go by, and with `entries` compares the hash of every file.
fn sweep(entries: Option<Source>, mut raw: RawStream) -> (Vec<String>, Vec<(u64, u64)>) {
    let (mut problems, mut lost) = (Vec::new(), Vec::new());
    if let Some(mut entries) = entries {
        loop {
            let entry = match entries.take() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(error) => {
                    problems.push(error.to_string());
                    break;
                }
            };
            if entry.kind != Kind::File {
                continue;
            }
            match hash(&entry, &mut raw) {
                Ok(sum) if entry.sha256.as_ref() == Some(&sum) => {}
                Err(Halt::Stopped) => return (problems, lost),
                found => {
                    // The first file in a damaged frame says so; the others are lost with it.
                    if !lost.iter().any(|&(from, to)| overlaps(&entry, from, to)) {
                        problems.push(match found {
                            Err(Halt::Failed(Error::Damaged { reason, .. })) => reason,
                            _ => format!("{}: it has another sha256", entry.display()),
                        });
                    }
                    lost.extend(entry.extents.iter().filter_map(|extent| match *extent {
                        Extent::Data { offset, length, .. } => {
                            Some((offset, offset.saturating_add(length)))
                        }
                        Extent::Hole { .. } => None,
                    }));
                    if let Some(frame) = raw.broken() {
                        lost.push(frame);
                    }
                }
            }
        }
    }
    while let Ok(Some(frame)) = raw.next() {
        if let Err(error) = frame.sound {
            let Error::Damaged { reason, .. } = error else {
                continue;
            };
            problems.push(reason);
            lost.push((frame.start, frame.end));
        }
    }
    (problems, lost)
}

fn hash(entry: &Entry, raw: &mut RawStream) -> Result<String, Halt> {
    let mut sum = Sha256::new();
    for extent in &entry.extents {
        if let Extent::Data { offset, length, .. } = *extent {
            raw.read(offset, length, |bytes| {
                sum.update(bytes);
                Ok(())
            })?;
        }
    }
    Ok(hex(&sum.finalize()))
}

/// The paths of a snapshot that cannot be restored any more.
fn cost(record: &Record, layers: &BTreeMap<String, Checked>) -> Result<Cost, Error> {
    let mut cost = Cost {
        snapshot: record.id.clone(),
        paths: Vec::new(),
        count: 0,
    };
    let checked: Vec<&Checked> = record
        .layers
        .iter()
        .filter_map(|layer| layers.get(&layer.id))
        .collect();
    if checked
        .iter()
        .all(|checked| checked.lost.is_empty() && checked.index.is_some())
    {
        return Ok(cost);
    }
    let indexes: Option<Vec<&LayerIndex>> = checked.iter().map(|c| c.index.as_ref()).collect();
    let Some(indexes) = indexes else {
        // Which paths there are can only be told by all indexes together.
        cost.count = record.totals.entries;
        cost.paths = vec!["everything: a layer cannot be read".to_owned()];
        return Ok(cost);
    };
    let mut merge = Merge::new(indexes)?;
    while let Some(word) = merge.next()? {
        if word.entry.kind == Kind::File && checked[word.layer].loses(&word.entry) {
            cost.count += 1;
            if cost.paths.len() < MOST_PATHS {
                cost.paths.push(word.entry.display());
            }
        }
    }
    Ok(cost)
}

fn report(
    costs: &[Cost],
    damaged: &BTreeMap<String, Vec<String>>,
    layers: usize,
    bytes: u64,
) -> Answer {
    use std::fmt::Write;

    let mut text = String::new();
    for (key, problems) in damaged {
        for problem in problems {
            let _ = writeln!(text, "damaged: {key}: {problem}");
        }
    }
    for cost in costs.iter().filter(|cost| cost.count > 0) {
        let _ = writeln!(
            text,
            "snapshot {} loses {} paths:",
            cost.snapshot, cost.count
        );
        for path in &cost.paths {
            let _ = writeln!(text, "  {path}");
        }
    }
    if damaged.is_empty() {
        let (count, bytes) = (costs.len(), human_bytes(bytes));
        let _ = writeln!(
            text,
            "{count} snapshots in {layers} layers, {bytes} read: all sound"
        );
    }
    let mut json = json!({
        "layers": layers,
        "bytesRead": bytes,
        "damaged": damaged,
        "snapshots": costs.iter().map(|cost| json!({
            "id": cost.snapshot,
            "lostPaths": cost.count,
            "paths": cost.paths,
        })).collect::<Vec<_>>(),
    });
    let mut exit = 0;
    if let Some((key, problems)) = damaged.iter().next() {
        let error = Error::Damaged {
            key: key.clone(),
            reason: problems.join("; "),
        };
        let (code, word) = error.code();
        exit = code;
        json["error"] = error.to_string().into();
        json["code"] = word.into();
    }
    Answer { text, json, exit }
}
