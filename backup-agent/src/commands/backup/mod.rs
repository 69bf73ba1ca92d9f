//! `backup`: one snapshot of the root.
//!
//! The order on the store is layer, record, head, so that a kill anywhere leaves either nothing visible or a whole
//! snapshot. Nothing is requested when the tree is what the last snapshot has.

mod changes;
mod layer;
mod rounds;

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use serde_json::json;
use tokio::time::timeout_at;

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
    cli::{Backup, Verb},
    config::Config,
    error::Error,
    interrupt::longer,
    local_index::{Racy, Trust},
    log,
    snapshot::{
        head::{self, Seen, Swap},
        history::AT_ONCE,
        id,
        record::{self, FORMAT, Layer, Record, Totals},
        retention, sealed,
    },
    state::{Described, Part, State, Which},
    store::{Store, StoreError},
    tree::{miss::Unread, root::RootId},
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
        Planned::Snapshot(plan) => plan,
    };
    let (snapshot, time) = id::new().map_err(Error::local("read", "random bytes"))?;
    let (before, root) = (plan.base.totals, plan.base.changes.root);
    let built_on = plan.base.built_on.clone();
    let goes_on = plan.base.is_part;
    // The last tenth is for the record and the head; more, where that was not enough for the tries before.
    let until = begun + bound.mul_f32(0.9) / (1 << state.facts.late_tries.min(MOST_HALVED));
    let last = (begun + bound.mul_f32(0.98)).into();
    let taken = take(config, store, &mut state, &snapshot, plan.base, until);
    let Ok(taken) = timeout_at(last, taken).await else {
        return Err(late(&mut state, bound, options));
    };
    let taken = taken?;
    if taken.is_part {
        let part = Part {
            name: snapshot,
            built_on,
            layers: taken.layers,
        };
        let bytes = taken.totals.stored_bytes;
        return Err(leave(&mut state, part, bytes, bound, options));
    }
    let was_shrunken = state.facts.shrunken.take().is_some();
    let is_shrunken = plan.place == Place::Head && !was_shrunken && shrank(before, taken.totals);
    let record = Record {
        format: FORMAT,
        id: snapshot.clone(),
        sequence: plan.parent.as_ref().map_or(1, |(_, sequence)| sequence + 1),
        parent: plan.parent.map(|(id, _)| id),
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

/// Where a snapshot goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It is the newest of the history.
    Head,
    /// Beside the history, as it was asked for.
    Beside,
    /// Beside the history, because another writer holds the head.
    Lost,
}

/// What a new snapshot is made from.
struct Plan {
    writer: String,
    /// The head as it was seen.
    seen: Option<Seen>,
    /// The snapshot that it follows, and that one's sequence.
    parent: Option<(String, u64)>,
    place: Place,
    base: Base,
    /// The store was found to have all that the base is made of, if it is made of anything.
    is_confirmed: bool,
}

enum Planned {
    Unchanged(Described),
    Snapshot(Plan),
}

/// Looks at the tree, and at the store unless it is known what that has.
async fn plan(
    config: &Config,
    store: &dyn Store,
    state: &mut State,
    options: &Backup,
) -> Result<Planned, Error> {
    let fork = options.fork;
    if !fork && state.facts.is_fenced {
        let writer = state.facts.writer.clone().unwrap_or_default();
        return Err(fenced(head::read(store).await?.as_ref(), &writer, None));
    }
    check_root(config, state)?;
    let known = state.facts.snapshot.clone();
    let mut base = resume(config, state).await?;
    let is_confirmed = state.is_confirmed() && !options.confirm;
    if let Some(known) = known.as_ref().filter(|_| is_confirmed)
        && is_unchanged(known, base.as_ref(), state, fork)
    {
        state.settle()?;
        return Ok(Planned::Unchanged(known.clone()));
    }

    let writer = name_of_writer(config, state)?;
    trust(config, store, state).await?;
    let seen = head::read(store).await?;
    let place = match may_follow(seen.as_ref(), state, &writer) {
        _ if fork => Place::Beside,
        true => Place::Head,
        false => Place::Lost,
    };
    // A head that is gone makes everything doubtful that is remembered of the store, and nothing but this run needs the
    // layers of one that ran out of time.
    let is_lost = seen.is_none() && state.facts.head.is_some();
    let is_part = base.as_ref().is_some_and(|base| base.is_part);
    let is_asked = !is_confirmed || is_lost || is_part;
    if is_asked {
        base = confirm(store, state, base).await?;
        if let Some(known) = known.as_ref().filter(|_| place != Place::Lost)
            && is_unchanged(known, base.as_ref(), state, fork)
            && (fork || seen == state.facts.seen())
        {
            state.settle()?;
            state.facts.confirm();
            state.save()?;
            return Ok(Planned::Unchanged(known.clone()));
        }
    }
    let on_head = seen
        .as_ref()
        .and_then(|seen| Some((seen.head.snapshot.clone()?, seen.head.sequence)));
    let parent = match place {
        Place::Head if seen.is_some() => on_head,
        Place::Head | Place::Beside | Place::Lost => known
            .filter(|_| base.is_some())
            .map(|known| (known.id, known.sequence)),
    };
    let follows = parent.as_ref().map(|(id, _)| id.clone());
    base = base.filter(|base| base.built_on == follows);
    if let (None, Some(id)) = (&base, &follows) {
        base = rebuild(config, store, state, id).await?;
        if let (Some(base), Some(seen)) = (&base, seen.as_ref().filter(|_| place == Place::Head))
            && base.changes.count == 0
            && base.changes.unread == base.unread
        {
            // The index was lost, and nothing else.
            let described = describe(&record::read(store, id).await?);
            state.facts.hold(seen.clone());
            state.facts.confirm();
            state.remember_tree(base.changes.root, Some(described.clone()))?;
            return Ok(Planned::Unchanged(described));
        }
    }
    // What the head leads to stays. Beside it, somebody else's prune may remove what this is built on.
    if let Some(built_on) = base.as_ref().and_then(|base| base.built_on.as_ref())
        && place != Place::Head
        && !is_there(store, built_on).await?
    {
        base = None;
    }
    let is_confirmed = is_asked || base.is_none();
    let base = match base {
        Some(base) => base,
        None => Base::nothing(config, state).await?,
    };
    Ok(Planned::Snapshot(Plan {
        writer,
        seen,
        parent,
        place,
        base,
        is_confirmed,
    }))
}

/// Refuses a root that is surely not the tree whose snapshots these are.
fn check_root(config: &Config, state: &State) -> Result<(), Error> {
    let root = config.root.clone();
    if state.facts.is_root_unfinished {
        return Err(Error::RootUnfinished { root });
    }
    // Whether it is another directory, each look says.
    if state.facts.root.is_some() && RootId::at(&root)?.is_none() {
        return Err(Error::RootLost { root });
    }
    Ok(())
}

/// What a backup that ran out of time left, else the last snapshot; with what changed since.
async fn resume(config: &Config, state: &mut State) -> Result<Option<Base>, Error> {
    let known = state.facts.snapshot.clone();
    let totals = known.as_ref().map(|known| (known.files, known.bytes));
    let last = known.as_ref().map(|known| known.id.clone());
    let is_usable = |part: &Part| {
        let named = known.iter().flat_map(|known| &known.layers);
        let named: HashSet<&str> = named.map(|layer| layer.id.as_str()).collect();
        let own = part.layers.iter().map(|layer| layer.id.as_str());
        let own = own.filter(|id| !named.contains(id));
        part.built_on == last && retention::may_be_named(own, Timestamp::now())
    };
    if let Some(part) = state.facts.part.clone().filter(is_usable) {
        let base = compare(config, state, Which::Part, &part.name, &part.layers).await?;
        if let Some(base) = base {
            return Ok(Some(Base {
                built_on: part.built_on,
                is_part: true,
                totals,
                ..base
            }));
        }
    }
    let Some(known) = known else { return Ok(None) };
    let base = compare(config, state, Which::Last, &known.id, &known.layers).await?;
    Ok(base.map(|base| Base {
        totals,
        unread: known.unread,
        ..base
    }))
}

/// Whether the tree is what the last snapshot has, and that one is the newest.
fn is_unchanged(known: &Described, base: Option<&Base>, state: &State, fork: bool) -> bool {
    let newest = (state.facts.head.as_ref()).and_then(|head| head.snapshot.as_ref());
    let is_same = base.is_some_and(|base| {
        !base.is_part && base.changes.count == 0 && base.changes.unread == known.unread
    });
    is_same && known.fork == fork && (fork || newest == Some(&known.id))
}

/// Gives a base back if the store still has all that it is built on: a snapshot on top of it could not be restored else.
async fn confirm(
    store: &dyn Store,
    state: &mut State,
    base: Option<Base>,
) -> Result<Option<Base>, Error> {
    let Some(base) = base else { return Ok(None) };
    let missing = match &base.built_on {
        Some(id) if !is_there(store, id).await? => Some(record::key(id)),
        _ => missing_layer(store, &base.layers).await?,
    };
    let Some(missing) = missing else {
        return Ok(Some(base));
    };
    log::warn(
        "the store has lost a part of the last snapshot; a whole new one is taken",
        &[("missing", missing.into())],
    );
    // Until that is there, each run has to find it out.
    state.facts.confirmed = None;
    state.save()?;
    Ok(None)
}

/// The key of a layer that the store does not have, if there is one.
async fn missing_layer(store: &dyn Store, layers: &[Layer]) -> Result<Option<String>, Error> {
    let looked = stream::iter(layers)
        .map(|layer| async move {
            let key = record::layer_key(&layer.id);
            match store.stat(&key).await {
                Ok(_) => Ok(None),
                Err(StoreError::NotFound) => Ok(Some(key)),
                Err(error) => Err(Error::store("look at", key)(error)),
            }
        })
        .buffered(AT_ONCE);
    let missing: Vec<Option<String>> = looked.try_collect().await?;
    Ok(missing.into_iter().flatten().next())
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

/// How often the time for uploading is halved: what is left of it is for the smallest part of a large backup.
const MOST_HALVED: u32 = 4;

/// Remembers that nothing of a backup could be kept in time, so that the next one ends its upload earlier.
fn late(state: &mut State, bound: Duration, options: &Backup) -> Error {
    state.facts.late_tries += 1;
    if let Err(error) = state.save() {
        return error;
    }
    let longer = longer(&Verb::Backup(options.clone()));
    Error::Timeout {
        after: bound,
        left: format!("the store holds what it held before; {longer}"),
    }
}

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

/// What a new snapshot is built on: the local index is about it.
pub struct Base {
    /// The snapshot that its layers are of, at first; none of a snapshot of nothing.
    built_on: Option<String>,
    /// What the index is called.
    about: String,
    layers: Vec<Layer>,
    index: Option<Spool>,
    changes: Changes,
    /// Layers of a backup that ran out of time are among its layers.
    is_part: bool,
    /// Files of that snapshot, and their bytes.
    totals: Option<(u64, u64)>,
    /// What it could not read.
    unread: Unread,
}

impl Base {
    /// A snapshot of nothing.
    async fn nothing(config: &Config, state: &mut State) -> Result<Self, Error> {
        let nothing = Source {
            index: None,
            snapshot: "",
            layers: &[],
        };
        Ok(Self {
            built_on: None,
            about: String::new(),
            layers: Vec::new(),
            index: None,
            changes: nothing.look(config, state, Racy::Read).await?,
            is_part: false,
            totals: None,
            unread: Unread::default(),
        })
    }
}

/// What changed since a snapshot, by the local index; `None` when that is not of this snapshot or damaged.
async fn compare(
    config: &Config,
    state: &mut State,
    which: Which,
    about: &str,
    layers: &[Layer],
) -> Result<Option<Base>, Error> {
    let index = state.index(which)?;
    if index.is_none() {
        return Ok(None);
    }
    let source = Source {
        index: index.as_ref(),
        snapshot: about,
        layers,
    };
    match source.look(config, state, Racy::Read).await {
        Ok(changes) => Ok(Some(Base {
            built_on: Some(about.to_owned()),
            about: about.to_owned(),
            layers: layers.to_vec(),
            index,
            changes,
            is_part: false,
            totals: None,
            unread: Unread::default(),
        })),
        Err(LookError::Failed(error)) => Err(error),
        Err(LookError::Unreadable) => Ok(None),
    }
}

/// Makes the local index again from the layers of a snapshot, by comparing contents: nothing is uploaded that is there.
async fn rebuild(
    config: &Config,
    store: &dyn Store,
    state: &mut State,
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
    let base = compare(config, state, Which::Last, snapshot, &record.layers).await?;
    Ok(base.map(|base| Base {
        totals: Some((record.totals.files, record.totals.bytes)),
        unread: record.unread,
        ..base
    }))
}

/// Whether a snapshot of ours may follow the head: it is ours, nobody's, or as we left it. A runtime has claimed the head
/// when it restored; a person without any state of this instance has to restore first.
fn may_follow(seen: Option<&Seen>, state: &State, writer: &str) -> bool {
    seen.is_none_or(|now| {
        let last = state.facts.seen();
        now.head.writer == writer || last.is_some_and(|last| last.etag == now.etag)
    })
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
    let mut text = match record {
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
    if let Some(reason) = &described.reason {
        text.push_str(&format!("each file is of its own instant: {reason}\n"));
    }
    for path in &described.unread.paths {
        text.push_str(&format!(
            "cannot be read, kept as the last snapshot has it: {path}\n"
        ));
    }
    if let Some(warning) = warning {
        text.push_str(&format!("{warning}\n"));
    }
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
