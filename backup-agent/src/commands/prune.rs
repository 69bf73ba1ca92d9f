//! `prune`: removes the snapshots that no rule keeps, then the layers that no snapshot names any more.
//!
//! The order is records, then layers, so that a kill anywhere leaves snapshots that are whole, and layers that a later run
//! finds again. It is safe beside a backup, here or elsewhere: a layer that no record has named yet stays for as long as
//! a backup may go on from it, and the records are listed once more between the two steps, so that one which came meanwhile
//! keeps its layers. Nothing is removed where a listing leaves out what the head or a record names.

use std::collections::{HashMap, HashSet};

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde_json::json;

use super::{Answer, claim::fenced, human_bytes};
use crate::{
    config::Config,
    error::{Chain, Error},
    log,
    snapshot::{
        head::{self, Seen},
        history::{self, AT_ONCE},
        id,
        record::{self, Record},
        retention::{self, ABANDONED, Verdict, YOUNG},
    },
    state::State,
    store::Store,
    tree::{identity::with_identity, staging},
};

/// Removes what the policy does not keep, or says what it would remove.
pub async fn run(config: &Config, store: &dyn Store, is_dry_run: bool) -> Result<Answer, Error> {
    let state = State::open(config).await?;
    // Before the records: each head's record was written before the head.
    let seen = head::read(store).await?;
    check_writer(config, &state, seen.as_ref())?;
    let head = seen.as_ref().and_then(|seen| seen.head.snapshot.as_deref());

    let now = Timestamp::now();
    let ids = record::list(store).await?;
    let records = read(store, &ids).await?;
    check_listing(store, &ids, &records, head).await?;
    if let Some(head) = head
        && !records.iter().any(|record| record.id == head)
    {
        return Err(Error::Damaged {
            key: record::key(head),
            reason: "the head names it, and it is not there".to_owned(),
        });
    }
    let verdicts = retention::judge(&records, head, &config.retention, now);
    let judged = || records.iter().zip(&verdicts);
    let doomed = || judged().filter(|(_, verdict)| !verdict.keep);
    // What a record has named is nobody's part of a backup.
    let once_named: HashSet<String> = doomed().flat_map(|(record, _)| layers(record)).collect();
    let mut named: HashSet<String> = judged()
        .filter(|(_, verdict)| verdict.keep)
        .flat_map(|(record, _)| layers(record))
        .collect();

    if !is_dry_run {
        let keys = doomed().map(|(record, _)| record::key(&record.id));
        remove(store, keys.collect()).await?;
    }
    let stored = store.list("layers/").await;
    let stored = stored.map_err(Error::store("list", "layers/"))?;
    if !is_dry_run {
        let known: HashSet<&String> = ids.iter().collect();
        let mut since = record::list(store).await?;
        since.retain(|id| !known.contains(id));
        let younger = read(store, &since).await?;
        since.extend(ids);
        check_listing(store, &since, &younger, None).await?;
        named.extend(younger.iter().flat_map(layers));
    }
    let unnamed = |key: &String| {
        let layer = key.strip_prefix("layers/")?.strip_suffix(".tar.zst")?;
        let age = if once_named.contains(layer) {
            YOUNG
        } else {
            ABANDONED
        };
        let is_old = id::time(layer).is_some_and(|time| now.duration_since(time) >= age);
        let is_settled = head.is_none_or(|head| layer < head);
        let is_unnamed = id::is_valid(layer) && !named.contains(layer);
        (is_old && is_settled && is_unnamed).then(|| layer.to_owned())
    };
    let unnamed: Vec<String> = stored.iter().filter_map(unnamed).collect();
    // A store that has lost its records, or shows none, must not lose what they were about, too.
    let unnamed = if records.is_empty() && !unnamed.is_empty() {
        log::warn(
            "there is no snapshot, so nobody knows what these layers are for: none is removed",
            &[("count", unnamed.len().into())],
        );
        Vec::new()
    } else {
        unnamed
    };
    if !is_dry_run {
        let keys = unnamed.iter().map(|layer| record::layer_key(layer));
        remove(store, keys.collect()).await?;
        report(state.sweep());
        let root = config.root.clone();
        let swept = with_identity(None, "remover", move || staging::sweep(&root));
        report(swept.await.flatten());
        report(store.sweep(now - YOUNG, now - ABANDONED).await);
    }

    let sizes: HashMap<&str, u64> = records
        .iter()
        .flat_map(|record| &record.layers)
        .map(|layer| (layer.id.as_str(), layer.size))
        .collect();
    // A layer that an interrupted run left behind has no record that says its size.
    let freed = unnamed
        .iter()
        .filter_map(|layer| sizes.get(layer.as_str()))
        .sum();
    let done = Done {
        layers: unnamed.len(),
        freed,
        is_dry_run,
    };
    Ok(answer(&records, &verdicts, &done))
}

/// A runtime that lost the head must not remove what belongs to its successor.
fn check_writer(config: &Config, state: &State, seen: Option<&Seen>) -> Result<(), Error> {
    let Some(writer) = &config.boot_id else {
        return Ok(());
    };
    let is_ours = match seen {
        Some(seen) => seen.head.writer == *writer,
        None => state.facts.seen().is_none(),
    };
    if is_ours && !state.facts.is_fenced {
        Ok(())
    } else {
        Err(fenced(seen, writer, None))
    }
}

/// All of these records. One that cannot be read ends it: its layers are not known, so none can be removed.
async fn read(store: &dyn Store, ids: &[String]) -> Result<Vec<Record>, Error> {
    let records = history::read_listed(store, ids).await?;
    records.into_iter().collect()
}

/// Stops where the listing left records out: their layers are nobody's in what was read.
async fn check_listing(
    store: &dyn Store,
    listed: &[String],
    records: &[Record],
    head: Option<&str>,
) -> Result<(), Error> {
    match history::left_out(store, listed, records, head).await.pop() {
        None => Ok(()),
        Some(Ok(record)) => Err(Error::LeftOut {
            key: record::key(&record.id),
        }),
        Some(Err(Error::Damaged { key, .. })) => Err(Error::LeftOut { key }),
        Some(Err(error)) => Err(error),
    }
}

fn layers(record: &Record) -> impl Iterator<Item = String> {
    record.layers.iter().map(|layer| layer.id.clone())
}

async fn remove(store: &dyn Store, keys: Vec<String>) -> Result<(), Error> {
    stream::iter(keys)
        .map(Ok)
        .try_for_each_concurrent(AT_ONCE, |key| async move {
            let deleted = store.delete(&key).await;
            deleted.map_err(Error::store("delete", key))
        })
        .await
}

/// What runs that died left, on the disk or on the store, is no part of any snapshot, so a failure here is none of the whole.
fn report<E: std::error::Error + 'static>(swept: Result<u64, E>) {
    match swept {
        Ok(0) => {}
        Ok(count) => log::info("leftovers removed", &[("count", count.into())]),
        Err(error) => log::warn(
            "leftovers cannot be removed",
            &[("error", Chain(&error).to_string().into())],
        ),
    }
}

/// What was removed, or would be.
struct Done {
    layers: usize,
    freed: u64,
    is_dry_run: bool,
}

fn answer(records: &[Record], verdicts: &[Verdict], done: &Done) -> Answer {
    let mut removed = Vec::new();
    let mut list = Vec::new();
    let mut rows = Vec::new();
    if done.is_dry_run && !records.is_empty() {
        rows.push(row(["ID", "TIME", "VERDICT", "REASON"]));
    }
    // Newest first, as `list` shows them.
    for (record, verdict) in records.iter().zip(verdicts).rev() {
        if !verdict.keep {
            removed.push(record.id.as_str());
        }
        if done.is_dry_run {
            let word = if verdict.keep { "keep" } else { "remove" };
            rows.push(row([&record.id, &record.time, word, &verdict.reason]));
        }
        list.push(json!({
            "id": record.id,
            "keep": verdict.keep,
            "reason": verdict.reason,
        }));
    }
    let word = if done.is_dry_run {
        "would remove"
    } else {
        "removed"
    };
    let kept = records.len() - removed.len();
    rows.push(format!(
        "{word} {} snapshots and {} layers, {}; {kept} snapshots stay\n",
        removed.len(),
        done.layers,
        human_bytes(done.freed),
    ));
    let json = json!({
        "removed": removed,
        "kept": kept,
        "layersRemoved": done.layers,
        "bytesFreed": done.freed,
        "dryRun": done.is_dry_run,
        "verdicts": list,
    });
    Answer::new(rows.concat(), json)
}

fn row([id, time, verdict, reason]: [&str; 4]) -> String {
    format!("{id:28}  {time:24}  {verdict:7}  {reason}\n")
}
