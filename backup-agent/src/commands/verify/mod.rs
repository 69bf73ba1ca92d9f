//! `verify`: whether everything that snapshots name is there and what it was written as, and which paths damage costs.

mod layer;

use std::collections::BTreeMap;

use serde_json::json;
use tokio::task::yield_now;

use self::layer::{Checked, check};
use super::{
    Answer,
    choose::{choose, seen},
    human_bytes,
};
use crate::{
    archive::{entry::Kind, layer_index::LayerIndex, merge::Merge},
    config::Config,
    error::{Error, mend},
    progress,
    snapshot::{
        head, history,
        record::{Record, layer_key},
    },
    state::State,
    store::Store,
};

/// Paths that are named for each snapshot; the rest is counted.
const MOST_PATHS: usize = 100;

/// Paths that are looked at before a time limit or a signal gets its turn.
const TURN: u64 = 4096;

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
    let mut costs = Vec::new();
    for record in &records {
        costs.push(cost(record, &layers).await?);
    }
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
        let seen = seen(store, wanted, false).await?;
        return Ok(vec![choose(config, store, wanted, seen.as_ref()).await?]);
    }
    let mut note = |error| match error {
        Error::Damaged { key, reason } => {
            damaged.insert(key, vec![reason]);
            Ok(())
        }
        other => Err(other),
    };
    let mut newest = None;
    match head::read(store).await {
        Ok(seen) => newest = seen.and_then(|seen| seen.head.snapshot),
        Err(error) => note(error)?,
    }
    let mut records = Vec::new();
    for read in history::all(store, newest.as_deref()).await? {
        match read {
            Ok(record) => records.push(record),
            Err(error) => note(error)?,
        }
    }
    Ok(records)
}

/// The paths of a snapshot that cannot be restored any more.
async fn cost(record: &Record, layers: &BTreeMap<String, Checked>) -> Result<Cost, Error> {
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
    if checked.iter().all(|checked| checked.is_whole()) {
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
    for met in 1_u64.. {
        let Some(word) = merge.next()? else { break };
        if met.is_multiple_of(TURN) {
            yield_now().await;
        }
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
    for key in damaged.keys() {
        // Once for each kind of object.
        let advice = mend(key).filter(|advice| !text.contains(advice));
        if let Some(advice) = advice {
            let _ = writeln!(text, "{advice}");
        }
    }
    if let Some((key, problems)) = damaged.iter().next() {
        let error = Error::Damaged {
            key: key.clone(),
            reason: problems.join("; "),
        };
        let (code, word) = error.code();
        exit = code;
        json["error"] = error.sentence().into();
        json["code"] = word.into();
    }
    Answer { text, json, exit }
}
