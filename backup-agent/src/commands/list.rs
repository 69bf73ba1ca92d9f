//! `list`: the snapshots of an instance, newest first, and what keeping them costs.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::{Answer, human_bytes};
use crate::{
    config::Config,
    error::Error,
    log,
    snapshot::{
        head, history, id,
        record::{Consistency, Record},
    },
    store::Store,
};

/// What is on the store.
struct Found {
    /// The snapshot that the head names.
    newest: Option<String>,
    /// Newest first.
    records: Vec<Record>,
    /// Sentences about what cannot be trusted, by keys.
    damaged: BTreeMap<String, String>,
}

/// Reads the head and all records; one that is damaged hides no other.
async fn find(store: &dyn Store) -> Result<Found, Error> {
    let mut damaged = BTreeMap::new();
    let mut note = |error: Error| {
        let sentence = error.sentence();
        let Error::Damaged { key, .. } = error else {
            return Err(error);
        };
        log::warn("damaged", &[("error", sentence.clone().into())]);
        damaged.insert(key, sentence);
        Ok(())
    };
    let head = match head::read(store).await {
        Ok(head) => head,
        Err(error) => note(error).map(|()| None)?,
    };
    let newest = head.and_then(|seen| seen.head.snapshot);
    let mut records = Vec::new();
    for read in history::all(store, newest.as_deref()).await? {
        match read {
            Ok(record) => records.push(record),
            Err(error) => note(error)?,
        }
    }
    records.reverse();
    Ok(Found {
        newest,
        records,
        damaged,
    })
}

/// Lists all snapshots; what is damaged is named and does not hide the others.
pub async fn run(config: &Config, store: &dyn Store) -> Result<Answer, Error> {
    let Found {
        newest,
        records,
        damaged,
    } = find(store).await?;
    let line: HashSet<&str> = history::line(&records, newest.as_deref())
        .into_iter()
        .map(|record| record.id.as_str())
        .collect();
    // Where it leads to nothing, nobody knows which of them it does not lead to.
    let is_fork = |record: &Record| {
        if line.is_empty() {
            record.fork
        } else {
            !line.contains(record.id.as_str())
        }
    };
    let now = Timestamp::now();

    let mut rows = Vec::new();
    if records.is_empty() {
        rows.push(format!("no snapshots in {}\n", config.place()));
    } else {
        rows.push(row([
            "ID", "TIME", "AGE", "PATHS", "SIZE", "STORED", "NOTE",
        ]));
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
        let age = id::time(&record.id).map(|time| now.duration_since(time));
        rows.push(row([
            &record.id,
            &record.time,
            &age.map_or_else(String::new, human_age),
            &record.totals.entries.to_string(),
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
    // Snapshots share layers: each is stored, and paid for, once.
    let layers: HashMap<&str, u64> = records
        .iter()
        .flat_map(|record| &record.layers)
        .map(|layer| (layer.id.as_str(), layer.size))
        .collect();
    let bytes = layers.values().sum();
    let usd = monthly_usd(bytes);
    if !records.is_empty() {
        rows.push(format!(
            "{} in {} layers: ${usd:.4} a month on R2\n",
            human_bytes(bytes),
            layers.len(),
        ));
    }
    rows.extend(damaged.values().map(|sentence| format!("{sentence}\n")));
    let json = json!({
        "snapshots": list,
        "layersBytes": bytes,
        "monthlyUsd": usd,
        "damaged": damaged,
    });
    Ok(Answer::new(rows.concat(), json))
}

fn row([id, time, age, paths, size, stored, note]: [&str; 7]) -> String {
    format!("{id:28}  {time:24}  {age:>10}  {paths:>8}  {size:>11}  {stored:>11}  {note}\n")
}

/// Time since then, in the largest unit that it fills.
fn human_age(age: SignedDuration) -> String {
    let seconds = age.as_secs();
    if age.is_negative() {
        return "to come".to_owned();
    }
    let units = [(86_400, "d"), (3600, "h"), (60, "min")];
    let unit = units.into_iter().find(|(size, _)| seconds >= *size);
    let (size, unit) = unit.unwrap_or((1, "s"));
    format!("{} {unit} ago", seconds / size)
}

/// What R2 takes for keeping so much, at $0.015 per GB (of 10^9 bytes) and month, in whole millionths.
fn monthly_usd(bytes: u64) -> f64 {
    let millionths = u128::from(bytes) * 15_000 / 1_000_000_000;
    #[expect(
        clippy::cast_precision_loss,
        reason = "nobody stores so much that a cent is lost"
    )]
    let millionths = millionths as f64;
    millionths / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_rounded_down_to_one_unit() {
        for (seconds, want) in [
            (-1, "to come"),
            (0, "0 s ago"),
            (59, "59 s ago"),
            (60, "1 min ago"),
            (3 * 3600 + 3599, "3 h ago"),
            (86_399, "23 h ago"),
            (400 * 86_400, "400 d ago"),
        ] {
            assert_eq!(human_age(SignedDuration::from_secs(seconds)), want);
        }
    }

    #[test]
    fn a_month_costs_what_the_price_list_says() {
        for (bytes, want) in [
            (0, "0"),
            (1_000_000_000, "0.015"),
            (10_000_000, "0.00015"),
            (1_000_000_000_000, "15"),
        ] {
            assert_eq!(monthly_usd(bytes).to_string(), want);
        }
    }
}
