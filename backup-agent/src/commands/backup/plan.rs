//! What a backup does: nothing, or a snapshot of what, on top of which one, and where to.
//!
//! A claim that nothing changed is one about the store, too: it holds for an hour after the store was asked.

use std::collections::HashSet;

use jiff::Timestamp;

use super::{
    changes::Changes,
    rounds::{LookError, Source},
};
use crate::{
    archive::spool::Spool,
    cli::Backup,
    commands::{
        claim::{fenced, trust},
        describe,
        unpack::{fetch_indexes, reindex},
    },
    config::Config,
    error::Error,
    local_index::{Racy, Trust},
    log,
    snapshot::{
        head::{self, Seen},
        id,
        record::{self, Layer},
        retention,
    },
    state::{Described, Part, State, Which},
    store::{Store, StoreError},
    tree::{
        miss::Unread,
        root::{RootId, settle},
    },
};

/// Where a snapshot goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It is the newest of the history.
    Head,
    /// Beside the history, as it was asked for.
    Beside,
    /// Beside the history, because another writer holds the head.
    Lost,
}

/// What a new snapshot is made from.
pub struct Plan {
    pub writer: String,
    /// The head as it was seen.
    pub seen: Option<Seen>,
    /// The snapshot that it follows, and that one's sequence.
    pub parent: Option<(String, u64)>,
    pub place: Place,
    pub base: Base,
    /// The store was found to have all that the base is made of, if it is made of anything.
    pub is_confirmed: bool,
}

pub enum Planned {
    Unchanged(Described),
    Snapshot(Box<Plan>),
}

/// Looks at the tree, and at the store unless it is known what that has.
pub async fn plan(
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
    let mut base = if options.whole {
        None
    } else {
        resume(config, state).await?
    };
    let is_confirmed = state.is_confirmed() && !options.confirm;
    if let Some(known) = known.as_ref().filter(|_| is_confirmed)
        && is_unchanged(known, base.as_ref(), state, fork)
    {
        state.settle()?;
        return Ok(Planned::Unchanged(known.clone()));
    }

    let writer = name_of_writer(config, state)?;
    trust(config, store, state).await?;
    let mut seen = head::look(store).await?;
    let is_unreadable = |seen: &Option<Seen>| {
        let seen = seen.as_ref();
        seen.is_some_and(|seen| seen.head.is_unreadable())
    };
    if !fork && is_unreadable(&seen) && seen != state.facts.seen() {
        // A damaged head is replaced by whoever restored beside it.
        seen = head::read(store).await?;
    }
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
        Place::Head if seen.is_some() && !is_unreadable(&seen) => on_head,
        Place::Head | Place::Beside | Place::Lost => known
            .filter(|_| base.is_some() || options.whole)
            .map(|known| (known.id, known.sequence)),
    };
    let follows = parent.as_ref().map(|(id, _)| id.clone());
    base = base.filter(|base| base.built_on == follows);
    if let (None, Some(id), false) = (&base, &follows, options.whole) {
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
        && !is_usable(store, built_on).await?
    {
        base = None;
    }
    let is_confirmed = is_asked || base.is_none();
    let base = match base {
        Some(base) => base,
        None => Base {
            // Whatever the store has lost, the tree must not shrink unnoticed.
            totals: (state.facts.snapshot.as_ref()).map(|known| (known.files, known.bytes)),
            ..Base::nothing(config, state).await?
        },
    };
    Ok(Planned::Snapshot(Box::new(Plan {
        writer,
        seen,
        parent,
        place,
        base,
        is_confirmed,
    })))
}

/// Refuses a root that is surely not the tree whose snapshots these are.
fn check_root(config: &Config, state: &mut State) -> Result<(), Error> {
    let root = config.root.clone();
    if let Some(doubt) = state.doubt.take() {
        return Err(doubt);
    }
    if state.facts.is_root_unfinished {
        return Err(Error::RootUnfinished { root });
    }
    // Whether it stays the same directory, each look says.
    match state.facts.root {
        Some(known) if RootId::at(&root)? != Some(known) => Err(Error::RootLost { root }),
        Some(_) => Ok(()),
        None => {
            settle(&root);
            Ok(())
        }
    }
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
        Some(id) if !is_usable(store, id).await? => Some(record::key(id)),
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
    state.facts.part = None;
    state.save()?;
    Ok(None)
}

/// The key of a layer that the store does not have to its last byte, if there is one.
pub async fn missing_layer(store: &dyn Store, layers: &[Layer]) -> Result<Option<String>, Error> {
    for layer in layers {
        let key = record::layer_key(&layer.id);
        match store.get_range(&key, layer.size.saturating_sub(1), 1).await {
            Ok(_) => {}
            Err(StoreError::NotFound | StoreError::TooShort) => return Ok(Some(key)),
            Err(error) => return Err(Error::store("look at", key)(error)),
        }
    }
    Ok(None)
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

pub async fn is_there(store: &dyn Store, snapshot: &str) -> Result<bool, Error> {
    match record::read(store, snapshot).await {
        Ok(_) => Ok(true),
        Err(Error::UnknownSnapshot { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether a snapshot can be built on this one.
async fn is_usable(store: &dyn Store, snapshot: &str) -> Result<bool, Error> {
    match is_there(store, snapshot).await {
        Err(Error::Damaged { .. }) => Ok(false),
        other => other,
    }
}

/// What a new snapshot is built on: the local index is about it.
pub struct Base {
    /// The snapshot that its layers are of, at first; none of a snapshot of nothing.
    pub built_on: Option<String>,
    /// What the index is called.
    pub about: String,
    pub layers: Vec<Layer>,
    pub index: Option<Spool>,
    pub changes: Changes,
    /// Layers of a backup that ran out of time are among its layers.
    pub is_part: bool,
    /// Files of that snapshot, and their bytes.
    pub totals: Option<(u64, u64)>,
    /// What it could not read.
    pub unread: Unread,
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
    reindex(
        config,
        state,
        &config.root,
        &record,
        &indexes,
        Trust::Compare,
    )
    .await?;
    state.keep_index()?;
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
        now.head.writer == writer || last.is_some_and(|last| last == *now)
    })
}
