//! From a snapshot on the store to a tree on the disk: download, check, unpack, all at once and as a stream.

use std::io::{Seek, SeekFrom};

use nix::unistd::Uid;
use tokio::sync::mpsc;

use crate::{
    archive::{
        entry::compare,
        index::IndexReader,
        reader::{RawStream, check_header, fetch_frames, fetch_index},
        writer::Halt,
    },
    config::Config,
    error::Error,
    local_index::{LocalIndex, file_clock},
    snapshot::record::{self, Layer, Record},
    state::State,
    store::Store,
    tree::{
        apply::Applier,
        identity::with_identity,
        scan::{self, Found, Verdict},
        swap::Staging,
    },
};

/// Frames that wait between download and unpacking.
const WAITING_FRAMES: usize = 2;

/// What it took.
#[derive(Clone, Copy)]
pub struct Unpacked {
    pub files: u64,
    pub bytes: u64,
    pub downloaded: u64,
}

/// Downloads, checks and unpacks a snapshot.
pub async fn unpack(
    config: &Config,
    store: &dyn Store,
    state: &State,
    record: &Record,
    staging: &Staging,
) -> Result<Unpacked, Error> {
    let layer = only_layer(record)?;
    let mut index = state.scratch("layer-index.new")?;
    fetch_index(store, &layer, &mut index).await?;
    index
        .seek(SeekFrom::Start(0))
        .map_err(Error::local("read", "the index under way"))?;
    let unreadable = {
        let key = record::layer_key(&layer.id);
        move |error: std::io::Error| Error::Damaged {
            key: key.clone(),
            reason: format!("its index cannot be read: {error}"),
        }
    };
    let mut lines = IndexReader::new(index).map_err(&unreadable)?;
    let table = check_header(&layer, lines.line().map_err(&unreadable)?)?.frames;

    let (sender, receiver) = mpsc::channel(WAITING_FRAMES);
    let mut raw = RawStream::new(layer.clone(), table.clone(), receiver)?;
    let is_owner_kept = Uid::effective().is_root() && config.identity.is_none();
    let mut applier = Applier::new(staging.fd()?, is_owner_kept, record::layer_key(&layer.id));
    let write = with_identity(config.identity, "writer", move || {
        while let Some(entry) = lines.entry().map_err(&unreadable)? {
            applier.apply(entry, &mut raw)?;
        }
        Ok::<_, Halt>(applier.finish()?)
    });
    let (fetched, written) = tokio::join!(fetch_frames(store, &layer, &table, sender), write);
    let (files, bytes) = match (fetched.as_ref(), written?) {
        (_, Ok(done)) => done,
        (_, Err(Halt::Failed(error))) => return Err(error),
        (Err(_), Err(Halt::Stopped)) => (0, 0),
        (Ok(_), Err(Halt::Stopped)) => return Err(Error::Internal("download")),
    };
    Ok(Unpacked {
        files,
        bytes,
        downloaded: fetched? + layer.index_size,
    })
}

/// The layer of a snapshot; this version writes and reads snapshots of one whole layer.
fn only_layer(record: &Record) -> Result<Layer, Error> {
    match &record.layers[..] {
        [layer] => Ok(layer.clone()),
        layers => Err(Error::Damaged {
            key: record::key(&record.id),
            reason: format!("it has {} layers, this version reads one", layers.len()),
        }),
    }
}

/// Writes the local index of the tree that was just restored: hashes from the layer, stamps from the disk.
pub async fn reindex(config: &Config, state: &State, record: &Record) -> Result<(), Error> {
    let layer_index = state.read_scratch("layer-index.new")?;
    let index = state.index_under_way()?;
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let snapshot = record.id.clone();
    with_identity(config.identity, "walk", move || {
        let cannot_read = || Error::local("read", "the index under way");
        let mut lines = IndexReader::new(layer_index).map_err(cannot_read())?;
        // The header was judged before the restore.
        lines.line().map_err(cannot_read())?;
        let mut index = LocalIndex::new(index, &snapshot, file_clock()?)?;
        let mut line = lines.entry().map_err(cannot_read())?;
        let visit = |found: Found<'_>| {
            let mut entry = found.entry;
            while let Some(known) = line.take_if(|known| compare(&known.path, &entry.path).is_le())
            {
                line = lines.entry().map_err(cannot_read())?;
                if known.path == entry.path {
                    entry.sha256 = known.sha256;
                    entry.extents = known.extents;
                    entry.xattrs = known.xattrs;
                }
            }
            index.entry(&entry)?;
            Ok::<_, Error>(Verdict::Taken)
        };
        scan::walk(&root, &excludes, visit, |_, _| ())?;
        index.finish()
    })
    .await??;
    state.keep_index()
}
