//! From a snapshot on the store to a tree on the disk: plan, download, check, unpack.
//!
//! The indexes are merged first: that says which paths there are, which layer has each, and so which parts of the layers
//! are needed. Directories are made on the way. Then every layer is read once, forward, and at last links and the status
//! of directories are put on top.

use std::{collections::HashSet, path::Path};

use nix::unistd::Uid;

use crate::{
    archive::{
        download::Start,
        entry::{Entry, Kind, compare, display},
        extents::Extent,
        layer_index::LayerIndex,
        merge::{Merge, Source},
        reader::{Check, RawStream, stream},
        writer::Halt,
    },
    config::Config,
    error::Error,
    local_index::{self, Trust, adopt},
    progress,
    snapshot::record::{self, Record},
    state::{State, Which},
    store::Store,
    tree::{
        apply::Applier,
        cursor::{Cursor, is_above},
        exclude::{Excludes, Selection},
        identity::with_identity,
        miss::Unread,
        old::Old,
        remove::remove_at,
        scan::{self, Met, Verdict},
        staging::Staging,
    },
};

/// What it took.
#[derive(Clone)]
pub struct Unpacked {
    pub files: u64,
    pub bytes: u64,
    pub downloaded: u64,
    /// What came back without a part of its status.
    pub lost: Unread,
}

/// Fetches the indexes of all layers of a snapshot, oldest first.
pub async fn fetch_indexes(
    store: &dyn Store,
    state: &State,
    record: &Record,
) -> Result<Vec<LayerIndex>, Error> {
    let mut indexes = Vec::with_capacity(record.layers.len());
    for layer in &record.layers {
        indexes.push(LayerIndex::fetch(store, layer, state.nameless()?).await?);
    }
    Ok(indexes)
}

/// Downloads, checks and unpacks what is selected of a snapshot. What `old` has already is taken from there.
pub async fn unpack(
    config: &Config,
    store: &dyn Store,
    record: &Record,
    indexes: &[LayerIndex],
    staging: &Staging,
    selection: Option<Selection>,
    old: Option<Old>,
) -> Result<Unpacked, Error> {
    let is_owner_kept = Uid::effective().is_root() && config.identity.is_none();
    let source = record::key(&record.id);
    let is_resumed = staging.is_resumed();
    if is_resumed {
        weed(config, staging, indexes).await?;
    }
    let start = if is_resumed { Start::Slow } else { Start::Full };
    let mut applier = Applier::new(staging.fd()?, is_resumed, is_owner_kept, old, source)?;
    let mut merge = Merge::new(indexes)?;
    let mut plan = Plan::new(indexes);
    if let Some(selection) = selection {
        plan.select(indexes, selection)?;
    }
    let damaged = |reason: &str| Error::Damaged {
        key: record::key(&record.id),
        reason: reason.to_owned(),
    };
    let no_root = damaged("its first path is not the root directory");
    let prepare = move || {
        let mut is_first = true;
        while let Some(word) = merge.next()? {
            let is_root = word.entry.path.is_empty() && word.entry.kind == Kind::Dir;
            if std::mem::take(&mut is_first) && !is_root {
                return Err(no_root);
            }
            plan.add(&word.entry, word.layer, word.ordinal, &mut applier)?;
        }
        Ok::<_, Error>((plan, applier))
    };
    let (plan, mut applier) = with_identity(config.identity, "planner", prepare).await??;
    if plan.live.iter().all(Marks::is_empty) {
        if plan.selected.is_some() {
            let problem = format!("cannot use --path: nothing in {} matches", record.id);
            return Err(Error::Settings(vec![problem]));
        }
        return Err(damaged("its indexes have no paths"));
    }

    progress::begin("restoring", plan.bytes);
    let mut downloaded = indexes.iter().map(|index| index.layer.index_size).sum();
    let mut live = plan.live;
    for ((index, wanted), live) in indexes.iter().zip(&plan.wanted).zip(&mut live) {
        // Without frames too: some files have no data.
        let Some(wanted) = wanted else { continue };
        let (download, raw) = stream(index, wanted, Check::Unpack, start)?;
        let entries = Source::new(index)?;
        let marks = std::mem::take(live);
        let write = with_identity(config.identity, "writer", move || {
            let written = files(entries, &marks, raw, &mut applier);
            written.map(|()| (marks, applier))
        });
        let (fetched, written) = tokio::join!(download.run(store), write);
        (*live, applier) = match (fetched, written?) {
            (Ok(bytes), Ok(done)) => {
                downloaded += bytes;
                done
            }
            (_, Err(Halt::Failed(error))) | (Err(error), _) => return Err(error),
            (Ok(_), Err(Halt::Stopped)) => return Err(Error::Internal("download")),
        };
    }

    let mut merge = Merge::new(indexes)?;
    let complete = move || {
        while let Some(word) = merge.next()? {
            if live[word.layer].has(word.ordinal) {
                applier.complete(word.entry)?;
            }
        }
        applier.finish()
    };
    let (files, bytes, lost) = with_identity(config.identity, "writer", complete).await??;
    Ok(Unpacked {
        files,
        bytes,
        downloaded,
        lost,
    })
}

/// Removes from a tree that an earlier run has begun what the snapshot does not have: somebody else made it.
async fn weed(config: &Config, staging: &Staging, indexes: &[LayerIndex]) -> Result<(), Error> {
    let mut merge = Merge::new(indexes)?;
    let (tree, path) = (staging.fd()?, staging.path().to_owned());
    let remove = move || {
        let mut next = merge.next()?;
        let mut foreign: Vec<Vec<u8>> = Vec::new();
        let visit = |met: Met<'_>| {
            let (found, kind) = match &met {
                Met::Entry(found) => (&found.entry.path[..], Some(found.entry.kind)),
                Met::Missed(path, _) => (*path, None),
            };
            while next
                .as_ref()
                .is_some_and(|word| compare(&word.entry.path, found).is_lt())
            {
                next = merge.next()?;
            }
            let word = next.as_ref().filter(|word| word.entry.path == found);
            let is_own = word.is_some_and(|word| match word.entry.kind {
                Kind::Deleted => false,
                Kind::File | Kind::Hardlink => {
                    matches!(kind, Some(Kind::File | Kind::Hardlink))
                }
                wanted => kind == Some(wanted),
            });
            if is_own {
                return Ok(Verdict::Taken);
            }
            foreign.push(found.to_vec());
            Ok::<_, Error>(Verdict::Skipped)
        };
        scan::walk(&path, &Excludes::none(), visit)?;
        let mut tree = Cursor::new(tree);
        for path in foreign {
            if let Ok((parent, name)) = tree.parent(&path) {
                remove_at(parent, &name, Path::new(&display(&path)))?;
            }
        }
        Ok(())
    };
    with_identity(config.identity, "weeder", remove).await?
}

/// Writes the files of one layer.
fn files(
    mut entries: Source,
    marks: &Marks,
    mut raw: RawStream,
    applier: &mut Applier,
) -> Result<(), Halt> {
    let mut ordinal = 0;
    while let Some(entry) = entries.take()? {
        if entry.kind == Kind::File && marks.has(ordinal) {
            applier.file(&entry, &mut raw)?;
        }
        ordinal += 1;
    }
    Ok(())
}

/// One bit for each entry of a layer.
#[derive(Default)]
struct Marks(Vec<u64>);

impl Marks {
    fn set(&mut self, ordinal: u64) {
        let word = usize::try_from(ordinal / 64).unwrap_or(usize::MAX);
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        self.0[word] |= 1 << (ordinal % 64);
    }

    fn has(&self, ordinal: u64) -> bool {
        let word = usize::try_from(ordinal / 64).ok();
        let word = word.and_then(|word| self.0.get(word));
        word.is_some_and(|word| word & (1 << (ordinal % 64)) != 0)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What of each layer is needed.
struct Plan {
    /// The entries that become part of the tree and are not there yet.
    live: Vec<Marks>,
    /// The frames that have something of them, for layers with any files among them.
    wanted: Vec<Option<Vec<bool>>>,
    /// Bytes of the files that are still to come.
    bytes: u64,
    /// Where in the raw stream each frame ends.
    ends: Vec<Vec<u64>>,
    /// The entries that were asked for; all, without it.
    selected: Option<Vec<Marks>>,
}

impl Plan {
    fn new(indexes: &[LayerIndex]) -> Self {
        let ends = |index: &LayerIndex| {
            let mut end = 0_u64;
            let ends = index.frames.iter().map(|frame| {
                end = end.saturating_add(frame.raw);
                end
            });
            ends.collect::<Vec<u64>>()
        };
        Self {
            live: indexes.iter().map(|_| Marks::default()).collect(),
            wanted: indexes.iter().map(|_| None).collect(),
            bytes: 0,
            ends: indexes.iter().map(ends).collect(),
            selected: None,
        }
    }

    /// Marks what the selection takes, the directories on the way there, and the files that selected hard links are names
    /// of.
    fn select(&mut self, indexes: &[LayerIndex], selection: Selection) -> Result<(), Error> {
        let mut targets: HashSet<Vec<u8>> = HashSet::new();
        let mut links = selection.clone();
        let mut merge = Merge::new(indexes)?;
        while let Some(word) = merge.next()? {
            if links.takes(&word.entry) && word.entry.kind == Kind::Hardlink {
                targets.extend(word.entry.link);
            }
        }
        let mut selection = selection;
        let mut selected: Vec<Marks> = indexes.iter().map(|_| Marks::default()).collect();
        let mut around: Vec<(Vec<u8>, usize, u64)> = Vec::new();
        let mut merge = Merge::new(indexes)?;
        while let Some(word) = merge.next()? {
            let path = &word.entry.path;
            around.retain(|(outer, _, _)| is_above(outer, path));
            let place = (word.layer, word.ordinal);
            if selection.takes(&word.entry) || targets.contains(path) {
                selected[place.0].set(place.1);
                for (_, layer, ordinal) in around.drain(..) {
                    selected[layer].set(ordinal);
                }
            } else if word.entry.kind == Kind::Dir {
                around.push((path.clone(), place.0, place.1));
            }
        }
        self.selected = Some(selected);
        Ok(())
    }

    /// First pass over a path: directories are made, files are found in the old tree or marked.
    fn add(
        &mut self,
        entry: &Entry,
        layer: usize,
        ordinal: u64,
        applier: &mut Applier,
    ) -> Result<(), Error> {
        let is_selected = self
            .selected
            .as_ref()
            .is_none_or(|selected| selected[layer].has(ordinal));
        if entry.kind == Kind::Deleted || !is_selected {
            return Ok(());
        }
        match entry.kind {
            Kind::Dir => applier.directory(entry)?,
            Kind::File if applier.reuse(entry)? => return Ok(()),
            Kind::File => self.want(entry, layer, applier.written(entry)?),
            Kind::Symlink | Kind::Hardlink | Kind::Deleted => {}
        }
        self.live[layer].set(ordinal);
        Ok(())
    }

    /// Marks the frames that have something of a file of which an earlier run has written so much already.
    fn want(&mut self, entry: &Entry, layer: usize, mut written: u64) {
        let ends = &self.ends[layer];
        let wanted = self.wanted[layer].get_or_insert_with(|| vec![false; ends.len()]);
        for extent in &entry.extents {
            let (Extent::Data { length, .. } | Extent::Hole { length }) = *extent;
            let done = written.min(length);
            written -= done;
            let Extent::Data { offset, .. } = *extent else {
                continue;
            };
            if done == length {
                continue;
            }
            self.bytes = self.bytes.saturating_add(length - done);
            let first = ends.partition_point(|end| *end <= offset.saturating_add(done));
            let last = ends.partition_point(|end| *end < offset.saturating_add(length));
            // What points beyond the end is found by whoever reads it.
            for wanted in wanted.iter_mut().take(last + 1).skip(first) {
                *wanted = true;
            }
        }
    }
}

/// Writes the index under way of a snapshot's tree below `root`: words from the layers, stamps from the disk.
pub async fn reindex(
    config: &Config,
    state: &State,
    root: &Path,
    record: &Record,
    indexes: &[LayerIndex],
    trust: Trust,
) -> Result<(), Error> {
    let mut merge = Merge::new(indexes)?;
    let file = state.index_under_way()?;
    let (root, excludes) = (root.to_owned(), config.excludes.clone());
    let snapshot = record.id.clone();
    with_identity(config.identity, "walk", move || {
        adopt(&root, &excludes, &mut merge, &snapshot, file, trust)
    })
    .await?
}

/// Takes note in the index under way of what moving its entries has changed.
pub async fn restamp(config: &Config, state: &State) -> Result<(), Error> {
    let Some(index) = state.index(Which::UnderWay)? else {
        return Ok(());
    };
    let (file, root) = (state.index_under_way()?, config.root.clone());
    let copy = move || local_index::restamp(&index, &root, file);
    with_identity(config.identity, "walk", copy).await?
}
