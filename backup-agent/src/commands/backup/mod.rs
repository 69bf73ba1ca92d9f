//! `backup`: one snapshot of the root.
//!
//! The order on the store is layer, record, head, so that a kill anywhere leaves either nothing visible or a whole
//! snapshot. Nothing is requested when the tree is what the last snapshot has.

mod changes;
mod layer;
mod plan;
mod rounds;

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::time::{sleep_until, timeout_at};

use self::{
    plan::{Place, Planned, is_there, missing_layer, plan},
    rounds::take,
};
use super::{
    Answer,
    claim::{claimed, fenced},
    describe, human_bytes,
};
use crate::{
    cli::{Backup, Verb},
    config::Config,
    error::Error,
    interrupt::longer,
    log,
    snapshot::{
        head::{self, Seen, Swap},
        id,
        record::{self, FORMAT, Record, Totals},
        sealed,
    },
    state::{Described, Part, State},
    store::{Store, StoreError},
};

/// Takes a snapshot, if anything changed, within `bound`.
pub async fn run(
    config: &Config,
    store: &dyn Store,
    options: &Backup,
    bound: Duration,
) -> Result<Answer, Error> {
    let begun = Instant::now();
    let mut state = State::open(config).await?;
    let plan = match plan(config, store, &mut state, options).await? {
        Planned::Unchanged(described) => return Ok(answer(&described, None, None, begun)),
        Planned::Snapshot(plan) => *plan,
    };
    let (snapshot, time) = id::new().map_err(Error::local("read", "random bytes"))?;
    let (before, root) = (plan.base.totals, plan.base.changes.root);
    let built_on = plan.base.built_on.clone();
    let goes_on = plan.base.is_part;
    // The last tenth is for the record and the head; more, where that was not enough for the tries before.
    let until = begun + bound.mul_f32(0.9) / (1 << state.facts.late_tries.min(MOST_TIME_HALVED));
    let last = (begun + bound.mul_f32(0.98)).into();
    let taken = take(config, store, &mut state, &snapshot, plan.base, until);
    let Ok(taken) = timeout_at(last, taken).await else {
        // The next run ends its upload earlier. This one is at its end: the bound says so.
        state.facts.late_tries += 1;
        state.save()?;
        return std::future::pending().await;
    };
    let taken = taken?;
    if taken.is_part && taken.layers.len() > MOST_KEPT {
        return std::future::pending().await;
    }
    if taken.is_part {
        let part = Part {
            name: snapshot,
            built_on,
            layers: taken.layers,
        };
        let error = leave(&mut state, part, taken.totals.stored_bytes, bound, options);
        // What is left of the time is too little for anything that could be kept.
        sleep_until((begun + bound.saturating_sub(TELLING)).into()).await;
        return Err(error);
    }
    let was_shrunken = state.facts.shrunken.take().is_some();
    let is_shrunken = plan.place == Place::Head && !was_shrunken && shrank(before, taken.totals);
    let record = Record {
        format: FORMAT,
        id: snapshot.clone(),
        sequence: plan.parent.as_ref().map_or(1, |(_, sequence)| sequence + 1),
        parent: plan.parent.as_ref().map(|(id, _)| id.clone()),
        time,
        writer: plan.writer.clone(),
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        consistency: taken.consistency,
        reason: taken.reason,
        unread: taken.unread,
        rounds: taken.rounds,
        pause_ms: taken.pause.map(millis),
        fork: plan.place != Place::Head || is_shrunken,
        totals: taken.totals,
        layers: taken.layers,
    };
    let beside = built_on.as_deref().filter(|_| plan.place != Place::Head);
    publish(store, &record, beside).await?;
    if goes_on || begun.elapsed() >= LONG {
        check_layers(store, &mut state, &record).await?;
    }
    let described = Described {
        fork: record.fork,
        ..describe(&record)
    };
    match plan.place {
        Place::Lost => {
            return Err(lose(
                &mut state,
                &plan.writer,
                plan.seen.as_ref(),
                &snapshot,
            ));
        }
        Place::Head if is_shrunken => {
            state.facts.shrunken = Some(snapshot);
            state.facts.part = None;
            state.save()?;
            let warning = shrunken(before, &record);
            log::warn(SHRUNKEN, &[("fork", record.id.clone().into())]);
            return Ok(answer(&described, Some(&record), Some(&warning), begun));
        }
        Place::Head => {
            let next = claimed(Some((&snapshot, record.sequence)), &plan.writer);
            match head::swap(store, plan.seen.as_ref(), &next).await? {
                Swap::Moved(etag) => {
                    state.facts.hold(Seen { head: next, etag });
                    if plan.is_confirmed {
                        state.facts.confirm();
                    }
                }
                Swap::Lost(now) => {
                    return Err(lose(&mut state, &plan.writer, now.as_ref(), &snapshot));
                }
            }
        }
        Place::Beside => {}
    }
    state.keep_index()?;
    state.remember_tree(root, Some(described.clone()))?;
    Ok(answer(&described, Some(&record), None, begun))
}

/// A run that takes longer looks whether its layers are still there: a prune elsewhere that is of an earlier version, or whose
/// clock is ahead, could have taken them for leftovers. In one that is shorter, a look costs more than it tells.
const LONG: Duration = Duration::from_mins(10);

/// Looks once more whether the layers are there, now that a record names them: a prune elsewhere could have taken those of
/// earlier runs, and those of a long one, for leftovers until then.
async fn check_layers(store: &dyn Store, state: &mut State, record: &Record) -> Result<(), Error> {
    let Some(missing) = missing_layer(store, &record.layers).await? else {
        return Ok(());
    };
    state.facts.part = None;
    state.save()?;
    let key = record::key(&record.id);
    let removed = store.delete(&key).await;
    removed.map_err(Error::store("delete", &key))?;
    Err(Error::Damaged {
        key: missing,
        reason: "it was removed while a snapshot was built on it; the next backup starts anew"
            .to_owned(),
    })
}

/// Keeps what has arrived on the store for the next run; gives the error of this one.
fn leave(state: &mut State, part: Part, bytes: u64, bound: Duration, options: &Backup) -> Error {
    if let Err(error) = state.keep_part(part) {
        return error;
    }
    let longer = longer(&Verb::Backup(options.clone()));
    Error::Timeout {
        after: bound,
        left: format!(
            "{} have arrived on the store, and the next backup goes on from there; {longer}",
            human_bytes(bytes)
        ),
    }
}

/// What a run that keeps a part needs of its bound to say so.
const TELLING: Duration = Duration::from_millis(2);

/// How often the time for uploading is halved: what is left of it is for the smallest part of a large backup.
const MOST_TIME_HALVED: u32 = 4;

/// Layers that are kept for the next run at most: a record has room for a few more than these.
const MOST_KEPT: usize = 100;

/// Whether less than a tenth of the files or of the bytes of the snapshot before is left.
fn shrank(before: Option<(u64, u64)>, now: Totals) -> bool {
    let is_tenth = |before: u64, now: u64| now.saturating_mul(10) < before;
    before.is_some_and(|(files, bytes)| is_tenth(files, now.files) || is_tenth(bytes, now.bytes))
}

const SHRUNKEN: &str = "the tree has shrunk to less than a tenth; its snapshot is a fork";

/// What an operator should know of a tree that shrank.
fn shrunken(before: Option<(u64, u64)>, record: &Record) -> String {
    let (files, bytes) = before.unwrap_or_default();
    format!(
        "the tree has shrunk from {files} files ({}) to {} ({}): snapshot {} is a fork until the next backup confirms it, \
         and the last whole one stays the newest",
        human_bytes(bytes),
        record.totals.files,
        human_bytes(record.totals.bytes),
        record.id,
    )
}

/// Writes the record, which makes the snapshot visible. `built_on`: a snapshot that is not safe from being removed.
async fn publish(store: &dyn Store, record: &Record, built_on: Option<&str>) -> Result<(), Error> {
    let key = record::key(&record.id);
    match store.put_if(&key, sealed::seal(record), None).await {
        // Its name is new: what is there is what a try whose answer was lost has written.
        Ok(_) | Err(StoreError::Conflict) => {}
        Err(error) => return Err(Error::store("write", &key)(error)),
    }
    // Prune removes records before it looks which layers are named: this one came in time if its base is still there now.
    if let Some(id) = built_on
        && !is_there(store, id).await?
    {
        let removed = store.delete(&key).await;
        removed.map_err(Error::store("delete", &key))?;
        return Err(Error::Damaged {
            key: record::key(id),
            reason: "it was removed while a snapshot was built on it; try again".to_owned(),
        });
    }
    Ok(())
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

fn answer(
    described: &Described,
    record: Option<&Record>,
    warning: Option<&str>,
    begun: Instant,
) -> Answer {
    let took = begun.elapsed();
    let uploaded = record.map_or(0, |record| record.totals.stored_bytes);
    let first = match record {
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
    let reason = described.reason.iter();
    let reason = reason.map(|reason| format!("each file is of its own instant: {reason}\n"));
    let unread = described.unread.paths.iter();
    let unread =
        unread.map(|path| format!("cannot read {path}: kept as the last snapshot has it\n"));
    let warning_line = warning.iter().map(|warning| format!("{warning}\n"));
    let rest = reason.chain(unread).chain(warning_line);
    let text = std::iter::once(first).chain(rest).collect();
    let json = json!({
        "snapshot": described.id,
        "time": described.time,
        "unchanged": record.is_none(),
        "bytesUploaded": uploaded,
        "files": described.files,
        "durationMs": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        "consistency": described.consistency,
        "consistencyReason": described.reason,
        "rounds": record.map_or(0, |record| record.rounds),
        "pauseMs": record.and_then(|record| record.pause_ms),
        "skipped": described.skipped,
        "unread": described.unread,
        "fork": described.fork,
        "warning": warning,
    });
    Answer::new(text, json)
}

/// Milliseconds, a part of one counted as a whole.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
