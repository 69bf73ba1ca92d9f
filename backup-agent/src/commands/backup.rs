//! `backup`: one snapshot of the root.
//!
//! The order on the store is layer, record, head, so that a kill anywhere leaves either nothing visible or a whole
//! snapshot. Nothing is requested when the tree is what the last snapshot has.

use std::{path::PathBuf, time::Instant};

use serde_json::json;
use tokio::sync::mpsc;

use super::{
    Answer, claimed, describe, fenced, human_bytes, trust,
    unpack::{fetch_indexes, reindex},
};
use crate::{
    archive::{
        entry::{Entry, Kind, display},
        parts::{PartWriter, part_size},
        tarball::TRAILER,
        writer::{Halt, LayerWriter},
    },
    config::Config,
    error::Error,
    local_index::{
        Known, LocalIndex, Racy, Survey, Trust, Unreadable, Walk, is_changed, is_tree_same, survey,
    },
    log, progress,
    snapshot::{
        head::{self, Seen, Swap},
        id,
        layers::taken_over,
        record::{self, Consistency, FORMAT, Layer, Record, Totals},
        sealed,
    },
    state::{Described, State, Which},
    store::{Store, StoreError},
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
    let known = state.facts.snapshot.clone();
    let mut base = match &known {
        Some(known) => compare(config, &state, &known.id, &known.layers).await?,
        None => None,
    };
    if let (Some(known), Some(base)) = (&known, &base)
        && base.survey.changes == 0
    {
        let newest = (state.facts.head.as_ref()).and_then(|head| head.snapshot.as_ref());
        if known.fork == fork && (fork || newest == Some(&known.id)) {
            return Ok(answer(known, None, begun));
        }
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
            && base.survey.changes == 0
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
    let taken = upload(config, store, &state, &snapshot, base).await?;
    let record = Record {
        format: FORMAT,
        id: snapshot.clone(),
        sequence: parent.as_ref().map_or(1, |(_, sequence)| sequence + 1),
        parent: parent.map(|(id, _)| id),
        time,
        writer: writer.clone(),
        tool: env!("CARGO_PKG_VERSION").to_owned(),
        consistency: taken.consistency,
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
struct Base {
    snapshot: String,
    layers: Vec<Layer>,
    survey: Survey,
}

/// What changed since a snapshot, by the local index; `None` when that is not of this snapshot or damaged.
async fn compare(
    config: &Config,
    state: &State,
    snapshot: &str,
    layers: &[Layer],
) -> Result<Option<Base>, Error> {
    let Some(file) = state.index(Which::Last) else {
        return Ok(None);
    };
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let base = (snapshot.to_owned(), layers.to_vec());
    let surveyed = with_identity(config.identity, "walk", move || {
        let (snapshot, layers) = base;
        let known = Known::open(file, &snapshot, layers.len())?;
        let survey = survey(&root, &excludes, known, &layers)?;
        Ok(Base {
            snapshot,
            layers,
            survey,
        })
    });
    match surveyed.await? {
        Ok(base) => Ok(Some(base)),
        Err(Walk::Failed(error)) => Err(error),
        Err(Walk::Differs | Walk::Unreadable) => Ok(None),
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

/// What a backup made before it is given a name.
struct Taken {
    layers: Vec<Layer>,
    totals: Totals,
    consistency: Consistency,
}

/// Reads what changed into one layer and uploads it at the same time.
async fn upload(
    config: &Config,
    store: &dyn Store,
    state: &State,
    snapshot: &str,
    base: Option<Base>,
) -> Result<Taken, Error> {
    let base = match base {
        Some(base) => base,
        None => from_nothing(config).await?,
    };
    let known = match (state.index(Which::Last), base.layers.len()) {
        (_, 0) => Ok(Known::nothing()),
        (Some(file), layers) => Known::open(file, &base.snapshot, layers),
        (None, _) => Err(Unreadable),
    };
    let changed = base.survey.changed.saturating_add(TRAILER.len() as u64);
    let taken = taken_over(&base.survey.layers, changed);
    let live = base.survey.layers.iter().zip(&taken);
    let size = live.fold(changed, |sum, (layer, taken)| {
        sum.saturating_add(if *taken { layer.live } else { 0 })
    });
    let (layer_id, _) = id::new().map_err(Error::local("read", "random bytes"))?;
    let key = record::layer_key(&layer_id);
    let (sender, receiver) = mpsc::channel(WAITING_PARTS);
    let pass = Pass {
        root: config.root.clone(),
        excludes: config.excludes.clone(),
        known: known?,
        words: Words::new(&taken),
        layer: LayerWriter::new(
            &layer_id,
            PartWriter::new(sender, part_size(size)),
            state.nameless()?,
            config.effort,
        )?,
        index: LocalIndex::new(state.index_under_way()?, snapshot)?,
        totals: Totals::default(),
    };
    progress::begin("backing up", size);
    let read = with_identity(config.identity, "reader", move || pass.run());
    let (uploaded, read) = tokio::join!(store.upload(&key, receiver), read);
    let (layer, totals) = match (uploaded, read?) {
        (_, Err(Halt::Failed(error))) => return Err(error),
        (Err(error), _) => return Err(Error::store("write", key)(error)),
        (Ok(()), Err(Halt::Stopped)) => return Err(Error::Internal("upload")),
        (Ok(()), Ok(read)) => read,
    };
    let kept = base.layers.into_iter().zip(taken);
    let mut layers: Vec<Layer> = kept
        .filter_map(|(layer, taken)| (!taken).then_some(layer))
        .collect();
    layers.push(layer);
    Ok(Taken {
        consistency: consistency(config, state, snapshot, layers.len()).await?,
        layers,
        totals,
    })
}

async fn from_nothing(config: &Config) -> Result<Base, Error> {
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let surveyed = with_identity(config.identity, "walk", move || {
        survey(&root, &excludes, Known::nothing(), &[])
    });
    match surveyed.await? {
        Ok(survey) => Ok(Base {
            snapshot: String::new(),
            layers: Vec::new(),
            survey,
        }),
        Err(Walk::Failed(error)) => Err(error),
        Err(Walk::Differs | Walk::Unreadable) => Err(Unreadable.into()),
    }
}

/// If nothing changed since the walk began, then the tree was at any moment in between what the snapshot has.
async fn consistency(
    config: &Config,
    state: &State,
    snapshot: &str,
    layers: usize,
) -> Result<Consistency, Error> {
    let index = state.index(Which::UnderWay);
    let Some(known) = index.and_then(|file| Known::open(file, snapshot, layers).ok()) else {
        return Err(Unreadable.into());
    };
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let is_same = with_identity(config.identity, "walk", move || {
        is_tree_same(&root, &excludes, known, Racy::Changed)
    })
    .await??;
    Ok(if is_same {
        Consistency::Instant
    } else {
        Consistency::PerFile
    })
}

/// Which layers have a word on a path, in the numbers of the new snapshot.
struct Words {
    /// For each layer of the old snapshot; none if it is taken over.
    numbers: Vec<Option<u32>>,
    /// Of the layer that is being written.
    own: u32,
}

impl Words {
    fn new(taken: &[bool]) -> Self {
        let mut own = 0;
        let numbers = taken.iter().map(|taken| {
            let number = (!taken).then_some(own);
            own += u32::from(!taken);
            number
        });
        let numbers = numbers.collect();
        Self { numbers, own }
    }

    /// The layers that go on having a word on it.
    fn left(&self, entry: &Entry) -> Vec<u32> {
        let number = |old: &u32| self.numbers.get(*old as usize).copied().flatten();
        entry.layers.iter().filter_map(number).collect()
    }

    /// Whether the layer that decides about it stays.
    fn is_kept(&self, entry: &Entry) -> bool {
        let last = entry.layers.last();
        last.is_some_and(|old| self.numbers.get(*old as usize).copied().flatten().is_some())
    }
}

/// One reading of the tree, on a thread with the gateway user's rights; its files were opened before.
struct Pass {
    root: PathBuf,
    excludes: Excludes,
    known: Known,
    words: Words,
    layer: LayerWriter,
    index: LocalIndex,
    totals: Totals,
}

impl Pass {
    fn run(mut self) -> Result<(Layer, Totals), Halt> {
        let (root, excludes) = (self.root.clone(), self.excludes.clone());
        let mut skipped = 0;
        let visit = |found: Found<'_>| self.visit(found);
        scan::walk(&root, &excludes, visit, |path, reason| {
            skipped += 1;
            let path = display(path);
            log::warn(
                "entry left out",
                &[("path", path.into()), ("reason", reason.into())],
            );
        })?;
        while let Some(gone) = self.known.rest()? {
            self.gone(gone)?;
        }
        self.index.finish()?;
        let layer = self.layer.finish()?;
        self.totals.skipped = skipped;
        self.totals.stored_bytes = layer.size;
        Ok((layer, self.totals))
    }

    fn visit(&mut self, found: Found<'_>) -> Result<Verdict, Halt> {
        while let Some(gone) = self.known.before(&found.entry.path)? {
            self.gone(gone)?;
        }
        let known = self.known.at(&found.entry.path)?;
        let mut layers = Vec::new();
        if let Some(mut known) = known {
            layers = self.words.left(&known);
            if self.words.is_kept(&known)
                && !is_changed(&found, &known, self.known.started, Racy::Read)
            {
                known.layers = layers;
                self.count(&known);
                self.index.entry(&known)?;
                return Ok(Verdict::Taken);
            }
        }
        let path = found.entry.path.clone();
        let Some(mut entry) = self.write(found)? else {
            // As if it were not there: an older layer must not fill in for it.
            self.hide(path, layers)?;
            return Ok(Verdict::Skipped);
        };
        layers.push(self.words.own);
        entry.layers = layers;
        self.count(&entry);
        self.index.entry(&entry)?;
        Ok(Verdict::Taken)
    }

    /// Puts an entry into the layer; `None` when it cannot be read.
    fn write(&mut self, found: Found<'_>) -> Result<Option<Entry>, Halt> {
        let mut entry = found.entry;
        if entry.kind == Kind::File {
            let Ok(Some(mut content)) = read::open(found.parent, found.name) else {
                return Ok(None);
            };
            // What is recorded is the file that was opened, not the one that was listed.
            entry = scan::entry(&entry.path, Kind::File, content.status());
            let Ok(xattrs) = read::xattrs(content.file()) else {
                return Ok(None);
            };
            entry.xattrs = xattrs;
            self.layer.add_file(&mut entry, &mut content)?;
        } else {
            if let Some(directory) = found.directory {
                entry.xattrs = read::xattrs(directory)
                    .map_err(Error::local("read the attributes of", entry.display()))?;
            }
            self.layer.add(&entry)?;
        }
        Ok(Some(entry))
    }

    /// A path that the last snapshot has a word on and the tree has not.
    fn gone(&mut self, mut known: Entry) -> Result<(), Halt> {
        let layers = self.words.left(&known);
        if known.kind == Kind::Deleted && self.words.is_kept(&known) {
            known.layers = layers;
            return Ok(self.index.entry(&known)?);
        }
        self.hide(known.path, layers)
    }

    /// Deletes a path, if any of the older layers has it.
    fn hide(&mut self, path: Vec<u8>, mut layers: Vec<u32>) -> Result<(), Halt> {
        if layers.is_empty() {
            return Ok(());
        }
        self.layer.delete(&path)?;
        layers.push(self.words.own);
        Ok(self.index.entry(&Entry {
            layers,
            ..Entry::deleted(path)
        })?)
    }

    fn count(&mut self, entry: &Entry) {
        self.totals.entries += 1;
        if entry.kind == Kind::File {
            self.totals.files += 1;
            self.totals.bytes += entry.data();
        }
    }
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
    Answer::new(text, json)
}
