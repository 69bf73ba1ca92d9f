//! `backup`: one snapshot of the root.
//!
//! The order on the store is layer, record, head, so that a kill anywhere leaves either nothing visible or a whole
//! snapshot. Nothing is requested when the tree is what the last snapshot has.

mod changes;
mod layer;
mod rounds;

use std::time::{Duration, Instant};

use serde_json::json;

use self::{
    changes::Changes,
    rounds::{LookError, Source, take},
};
use super::{
    Answer,
    claim::{claimed, fenced, trust},
    describe, human_bytes,
    unpack::{fetch_indexes, reindex},
};
use crate::{
    archive::spool::Spool,
    config::Config,
    error::Error,
    local_index::{Racy, Trust},
    log,
    snapshot::{
        head::{self, Seen, Swap},
        id,
        record::{self, FORMAT, Layer, Record},
        sealed,
    },
    state::{Described, State, Which},
    store::{Store, StoreError},
};

/// Takes a snapshot, if anything changed.
pub async fn run(config: &Config, store: &dyn Store, fork: bool) -> Result<Answer, Error> {
    let begun = Instant::now();
    let mut state = State::open(config).await?;
    if !fork && state.facts.is_fenced {
        let writer = state.facts.writer.clone().unwrap_or_default();
        return Err(fenced(head::read(store).await?.as_ref(), &writer, None));
    }
    let known = state.facts.snapshot.clone();
    let mut base = match &known {
        Some(known) => compare(config, &state, &known.id, &known.layers).await?,
        None => None,
    };
    if let (Some(known), Some(base)) = (&known, &base)
        && base.changes.count == 0
    {
        let newest = (state.facts.head.as_ref()).and_then(|head| head.snapshot.as_ref());
        if known.fork == fork && (fork || newest == Some(&known.id)) {
            return Ok(answer(known, None, begun));
        }
    }

    let writer = name_of_writer(config, &mut state)?;
    trust(config, store, &mut state).await?;
    let seen = head::read(store).await?;
    let is_ours = fork || may_follow(seen.as_ref(), &state, &writer);
    let parent = if is_ours && !fork {
        seen.as_ref()
            .and_then(|seen| Some((seen.head.snapshot.clone()?, seen.head.sequence)))
    } else {
        known.map(|known| (known.id.clone(), known.sequence))
    };

    base = base.filter(|base| parent.as_ref().is_some_and(|(id, _)| *id == base.snapshot));
    if let (None, Some((id, _))) = (&base, &parent) {
        base = rebuild(config, store, &state, id).await?;
        if let Some(base) = &base
            && base.changes.count == 0
            && is_ours
            && !fork
        {
            // The index was lost, and nothing else.
            let described = describe(&record::read(store, &base.snapshot).await?);
            if let Some(seen) = seen {
                state.facts.hold(seen);
            }
            state.remember_tree(&config.root, Some(described.clone()))?;
            return Ok(answer(&described, None, begun));
        }
    }

    // What the head leads to stays. Beside it, somebody else's prune may remove what this is built on.
    let is_beside = fork || !is_ours;
    if let Some(known) = base.as_ref().filter(|_| is_beside)
        && !is_there(store, &known.snapshot).await?
    {
        base = None;
    }
    let built_on = base.as_ref().filter(|_| is_beside);
    let built_on = built_on.map(|base| base.snapshot.clone());

    let (snapshot, time) = id::new().map_err(Error::local("read", "random bytes"))?;
    let base = match base {
        Some(base) => base,
        None => Base::nothing(config, &state).await?,
    };
    let taken = take(config, store, &state, &snapshot, base).await?;
    let record = Record {
        format: FORMAT,
        id: snapshot.clone(),
        sequence: parent.as_ref().map_or(1, |(_, sequence)| sequence + 1),
        parent: parent.map(|(id, _)| id),
        time,
        writer: writer.clone(),
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        consistency: taken.consistency,
        rounds: taken.rounds,
        pause_ms: taken.pause.map(millis),
        fork: is_beside,
        totals: taken.totals,
        layers: taken.layers,
    };
    publish(store, &record, built_on.as_deref()).await?;
    if !is_ours {
        return Err(lose(&mut state, &writer, seen.as_ref(), &snapshot));
    }
    if !fork {
        let next = claimed(Some((&snapshot, record.sequence)), &writer);
        match head::swap(store, seen.as_ref(), &next).await? {
            Swap::Moved(etag) => state.facts.hold(Seen { head: next, etag }),
            Swap::Lost(now) => return Err(lose(&mut state, &writer, now.as_ref(), &snapshot)),
        }
    }
    state.keep_index()?;
    let described = Described {
        fork,
        ..describe(&record)
    };
    state.remember_tree(&config.root, Some(described.clone()))?;
    Ok(answer(&described, Some(&record), begun))
}

/// In whose name the snapshot is written.
fn name_of_writer(config: &Config, state: &mut State) -> Result<String, Error> {
    let writer = match config.boot_id.clone().or(state.facts.writer.clone()) {
        Some(writer) => writer,
        None => id::random_hex::<16>().map_err(Error::local("read", "random bytes"))?,
    };
    if state.facts.writer.as_ref() != Some(&writer) {
        // Before anything is written in that name: a head that moved without our learning of it has to be known as ours.
        state.facts.writer = Some(writer.clone());
        state.save()?;
    }
    Ok(writer)
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

async fn is_there(store: &dyn Store, snapshot: &str) -> Result<bool, Error> {
    match record::read(store, snapshot).await {
        Ok(_) => Ok(true),
        Err(Error::UnknownSnapshot { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The snapshot that a new one is built on: the local index is about it.
pub struct Base {
    /// Its id; none of a snapshot of nothing.
    snapshot: String,
    layers: Vec<Layer>,
    index: Option<Spool>,
    changes: Changes,
}

impl Base {
    /// A snapshot of nothing.
    async fn nothing(config: &Config, state: &State) -> Result<Self, Error> {
        let nothing = Source {
            index: None,
            snapshot: "",
            layers: &[],
        };
        Ok(Self {
            snapshot: String::new(),
            layers: Vec::new(),
            index: None,
            changes: nothing.look(config, state, Racy::Read).await?,
        })
    }
}

/// What changed since a snapshot, by the local index; `None` when that is not of this snapshot or damaged.
async fn compare(
    config: &Config,
    state: &State,
    snapshot: &str,
    layers: &[Layer],
) -> Result<Option<Base>, Error> {
    let index = state.index(Which::Last);
    if index.is_none() {
        return Ok(None);
    }
    let source = Source {
        index: index.as_ref(),
        snapshot,
        layers,
    };
    match source.look(config, state, Racy::Read).await {
        Ok(changes) => Ok(Some(Base {
            snapshot: snapshot.to_owned(),
            layers: layers.to_vec(),
            index,
            changes,
        })),
        Err(LookError::Failed(error)) => Err(error),
        Err(LookError::Unreadable) => Ok(None),
    }
}

/// Makes the local index again from the layers of a snapshot, by comparing contents: nothing is uploaded that is there.
async fn rebuild(
    config: &Config,
    store: &dyn Store,
    state: &State,
    snapshot: &str,
) -> Result<Option<Base>, Error> {
    let found = match record::read(store, snapshot).await {
        Ok(record) => {
            let indexes = fetch_indexes(store, state, &record).await;
            indexes.map(|indexes| (record, indexes))
        }
        // It was removed.
        Err(Error::UnknownSnapshot { .. }) => return Ok(None),
        Err(error) => Err(error),
    };
    let (record, indexes) = match found {
        Ok(found) => found,
        Err(error @ Error::Damaged { .. }) => {
            // A snapshot that is whole by itself is worth more now than an error.
            log::warn(
                "the last snapshot is damaged; nothing is built on it",
                &[("error", error.to_string().into())],
            );
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    log::info(
        "there is no local index of the last snapshot; comparing contents",
        &[("snapshot", snapshot.into())],
    );
    reindex(config, state, &record, &indexes, Trust::Compare).await?;
    compare(config, state, snapshot, &record.layers).await
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
        "rounds": record.map_or(0, |record| record.rounds),
        "pauseMs": record.and_then(|record| record.pause_ms),
        "skipped": record.map_or(0, |record| record.totals.skipped),
        "fork": described.fork,
    });
    Answer::new(text, json)
}

/// Milliseconds, a part of one counted as a whole.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_micros().div_ceil(1000)).unwrap_or(u64::MAX)
}
