//! Checks one layer: its footer, its index, every frame, and deep also every file. It goes on behind what is damaged, so that
//! in the end the parts are known that are lost; whose paths these cost is for the caller to say.

use sha2::{Digest, Sha256};

use crate::{
    archive::{
        download::{Start, range},
        entry::{Entry, Kind},
        extents::Extent,
        footer::{self, Footer},
        layer_index::LayerIndex,
        merge::Source,
        reader::{Check, RawStream, stream},
        writer::Halt,
    },
    error::Error,
    log, progress,
    snapshot::record::{Layer, layer_key},
    state::State,
    store::{Store, twice},
};

/// What was found out about one layer.
#[derive(Default)]
pub struct Checked {
    /// None when nothing in it can be read.
    pub index: Option<LayerIndex>,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// The parts of its raw stream that are lost.
    lost: Vec<(u64, u64)>,
    /// How many came from the store.
    pub bytes: u64,
}

/// Checks a layer: its footer, its index, every frame; deep, also what the frames unpack to and the files in that.
pub async fn check(
    store: &dyn Store,
    state: &State,
    layer: &Layer,
    is_deep: bool,
) -> Result<Checked, Error> {
    log::debug("checking a layer", &[("layer", layer.id.clone().into())]);
    let mut checked = Checked::default();
    checked.note(twice(|| check_footer(store, layer)).await)?;
    let index = LayerIndex::fetch(store, layer, state.nameless()?).await;
    let Some(index) = checked.note(index)? else {
        return Ok(checked);
    };
    let all = vec![true; index.frames.len()];
    let mode = if is_deep { Check::Unpack } else { Check::Hash };
    let (download, raw) = stream(&index, &all, mode, Start::Full)?;
    let entries = is_deep.then(|| Source::new(&index)).transpose();
    let entries = checked.note(entries)?.flatten();
    let sweep = tokio::task::spawn_blocking(move || sweep(entries, raw));
    let (fetched, swept) = tokio::join!(download.run(store), sweep);
    progress::add(layer.raw_size);
    let (problems, lost) = swept.map_err(|_| Error::Internal("check"))?;
    checked.problems.extend(problems);
    checked.lost.extend(lost);
    // What ends in the middle is lost as a whole: nobody looks for what is left of it.
    if let Some(bytes) = checked.note(fetched)? {
        checked.bytes = bytes + layer.index_size;
        checked.index = Some(index);
    }
    Ok(checked)
}

impl Checked {
    /// Keeps what is damage, and passes on what is not.
    fn note<T>(&mut self, result: Result<T, Error>) -> Result<Option<T>, Error> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Error::Damaged { reason, .. }) => {
                if !self.problems.contains(&reason) {
                    self.problems.push(reason);
                }
                Ok(None)
            }
            Err(other) => Err(other),
        }
    }

    /// Whether damage costs nothing.
    pub fn is_whole(&self) -> bool {
        self.lost.is_empty() && self.index.is_some()
    }

    /// Whether damage costs this entry.
    pub fn loses(&self, entry: &Entry) -> bool {
        let hits = |&(from, to): &(u64, u64)| overlaps(entry, from, to);
        self.index.is_none() || self.lost.iter().any(hits)
    }
}

fn overlaps(entry: &Entry, from: u64, to: u64) -> bool {
    entry.extents.iter().any(|extent| match *extent {
        Extent::Data { offset, length, .. } => offset < to && from < offset.saturating_add(length),
        Extent::Hole { .. } => false,
    })
}

/// The footer is where the record says that the object ends, and says the same about the index.
async fn check_footer(store: &dyn Store, layer: &Layer) -> Result<(), Error> {
    let size = footer::SIZE as u64;
    let at = layer.size.checked_sub(size);
    let at = at.ok_or_else(|| layer.damaged("its record gives it less than a footer's size"))?;
    let found = range(store, &layer_key(&layer.id), at, size).await?;
    Footer::matches(&found, layer)
        .then_some(())
        .ok_or_else(|| layer.damaged("its footer is not what its record says"))
}

/// Lets all frames of a layer go by, and with `entries` compares the hash of every file.
fn sweep(entries: Option<Source>, mut raw: RawStream) -> (Vec<String>, Vec<(u64, u64)>) {
    let (mut problems, mut lost) = (Vec::new(), Vec::new());
    if let Some(mut entries) = entries {
        loop {
            let entry = match entries.take() {
                Ok(Some(entry)) => entry,
                Ok(None) => break,
                Err(error) => {
                    problems.push(error.to_string());
                    break;
                }
            };
            if entry.kind != Kind::File {
                continue;
            }
            match hash(&entry, &mut raw) {
                Ok(sum) if entry.sha256 == Some(sum) => {}
                Err(Halt::Stopped) => return (problems, lost),
                found => {
                    // The first file in a damaged frame says so; the others are lost with it.
                    if !lost.iter().any(|&(from, to)| overlaps(&entry, from, to)) {
                        problems.push(match found {
                            Err(Halt::Failed(Error::Damaged { reason, .. })) => reason,
                            _ => format!("{}: it has another sha256", entry.display()),
                        });
                    }
                    lost.extend(entry.extents.iter().filter_map(|extent| match *extent {
                        Extent::Data { offset, length, .. } => {
                            Some((offset, offset.saturating_add(length)))
                        }
                        Extent::Hole { .. } => None,
                    }));
                    if let Some(frame) = raw.broken() {
                        lost.push(frame);
                    }
                }
            }
        }
    }
    while let Ok(Some(frame)) = raw.next() {
        if let Err(error) = frame.sound {
            let Error::Damaged { reason, .. } = error else {
                continue;
            };
            problems.push(reason);
            lost.push((frame.start, frame.end));
        }
    }
    (problems, lost)
}

fn hash(entry: &Entry, raw: &mut RawStream) -> Result<[u8; 32], Halt> {
    let mut sum = Sha256::new();
    for extent in &entry.extents {
        if let Extent::Data { offset, length, .. } = *extent {
            raw.read(offset, length, |bytes| {
                sum.update(bytes);
                Ok(())
            })?;
        }
    }
    Ok(sum.finalize().into())
}
