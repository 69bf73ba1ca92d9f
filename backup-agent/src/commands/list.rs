//! `list`: the snapshots of an instance, newest first.

use std::collections::{HashMap, HashSet};

use serde_json::json;

use super::{Answer, human_bytes};
use crate::{
    config::Config,
    error::Error,
    log,
    snapshot::{
        head,
        record::{self, Consistency, Record},
    },
    store::Store,
};

/// Lists all snapshots; a damaged record is named in the log and does not hide the others.
pub async fn run(config: &Config, store: &dyn Store) -> Result<Answer, Error> {
    let head = head::read(store).await?;
    let newest = head.and_then(|seen| seen.head.snapshot);
    let mut records = Vec::new();
    for id in record::list(store).await? {
        match record::read(store, &id).await {
            Ok(record) => records.push(record),
            Err(error @ Error::Damaged { .. }) => log::warn(
                "snapshot left out of the list",
                &[("id", id.into()), ("error", error.to_string().into())],
            ),
            Err(error) => return Err(error),
        }
    }
    records.reverse();
    let history = history(&records, newest.as_deref());
    let is_fork = |record: &Record| !history.contains(&record.id);

    let mut rows = Vec::new();
    if records.is_empty() {
        rows.push(format!("no snapshots in {}\n", config.place()));
    } else {
        rows.push(row(["ID", "TIME", "FILES", "SIZE", "STORED", "NOTE"]));
    }
    let mut list = Vec::new();
    for record in &records {
        let is_head = newest.as_deref() == Some(&record.id);
        let consistency = match record.consistency {
            Consistency::Instant => "instant",
            Consistency::PerFile => "per-file",
        };
        let place = match (is_head, is_fork(record)) {
            (true, _) => ", head",
            (_, true) => ", fork",
            _ => "",
        };
        rows.push(row([
            &record.id,
            &record.time,
            &record.totals.files.to_string(),
            &human_bytes(record.totals.bytes),
            &human_bytes(record.totals.stored_bytes),
            &format!("{consistency}{place}"),
        ]));
        list.push(json!({
            "id": record.id,
            "time": record.time,
            "parent": record.parent,
            "sequence": record.sequence,
            "writer": record.writer,
            "tool": record.tool,
            "consistency": record.consistency,
            "files": record.totals.files,
            "entries": record.totals.entries,
            "bytes": record.totals.bytes,
            "storedBytes": record.totals.stored_bytes,
            "skipped": record.totals.skipped,
            "head": is_head,
            "fork": is_fork(record),
        }));
    }
    Ok(Answer::new(rows.concat(), json!({ "snapshots": list })))
}

fn row([id, time, files, size, stored, note]: [&str; 6]) -> String {
    format!("{id:28}  {time:24}  {files:>8}  {size:>11}  {stored:>11}  {note}\n")
}

/// The head and what it follows; every other snapshot is a fork.
fn history(records: &[Record], newest: Option<&str>) -> HashSet<String> {
    let parents: HashMap<&str, Option<&str>> = records
        .iter()
        .map(|record| (record.id.as_str(), record.parent.as_deref()))
        .collect();
    let mut seen = HashSet::new();
    let mut next = newest;
    while let Some(id) = next
        && seen.insert(id.to_owned())
    {
        next = parents.get(id).copied().flatten();
    }
    seen
}
