//! Reads the tree until what is read is of one instant, or says that it is not.
//!
//! A round is a look at what changed and a layer of it. Where that is little enough to be copied in one moment, the gateway
//! is stopped, the tree is looked at again and what changed is captured, and the gateway goes on. Where it is more, it is read
//! while the gateway works, and what changed meanwhile is left for the next round. That is how virtual machines are moved live.

use std::time::Duration;

use super::{
    Base,
    changes::{Capture, Changes, Stop, scan},
    layer::{Inputs, Pass, Words},
};
use crate::{
    archive::{
        parts::{PartWriter, part_size},
        spool::Spool,
        tarball::TRAILER,
        writer::{Halt, LayerWriter},
    },
    config::Config,
    error::Error,
    local_index::{Known, LocalIndex, Racy, Unreadable, file_clock},
    log, progress,
    snapshot::{
        id,
        layers::taken_over,
        record::{self, Consistency, Layer, Totals},
    },
    state::{State, Which},
    store::Store,
    tree::{
        freeze::{Freezer, NotFrozen},
        identity::with_identity,
    },
};

/// Rounds that are read while the gateway works. Each is shorter than the one before unless the gateway writes faster than
/// it can be read, and then more of them change nothing.
const MOST_ROUNDS: u32 = 4;

/// What is surely copied to a working file within a millisecond, in bytes: disks behind their cache are faster.
const COPIED_IN_A_MILLISECOND: u64 = 200 << 10;

/// What a backup made before it is given a name.
pub struct Taken {
    pub layers: Vec<Layer>,
    pub totals: Totals,
    pub consistency: Consistency,
    /// Times that the tree was read.
    pub rounds: u32,
    /// The longest time for which the gateway was stopped.
    pub pause: Option<Duration>,
}

/// Reads what changed since `base` into layers of the new snapshot and uploads them.
pub async fn take(
    config: &Config,
    store: &dyn Store,
    state: &State,
    snapshot: &str,
    base: Base,
) -> Result<Taken, Error> {
    let Base {
        snapshot: mut about,
        layers,
        mut index,
        mut changes,
    } = base;
    let mut done = Taken {
        layers,
        totals: Totals::default(),
        consistency: Consistency::PerFile,
        rounds: 0,
        pause: None,
    };
    if config.freezer.is_none() && changes.is_racy {
        // Read in the same tick, a quiet tree could not be told from one that is being written.
        next_tick().await?;
        let known = Source {
            index: index.as_ref(),
            snapshot: &about,
            layers: &done.layers,
        };
        changes = known.look(config, state, Racy::Read).await?;
    }
    loop {
        done.rounds += 1;
        // Only the first round takes over: later ones would take what has just been written.
        let is_first = done.rounds == 1;
        let taken = if is_first {
            let changed = changes.bytes.saturating_add(TRAILER.len() as u64);
            taken_over(&changes.layers, changed)
        } else {
            vec![false; done.layers.len()]
        };
        let known = Source {
            index: index.as_ref(),
            snapshot: &about,
            layers: &done.layers,
        };
        if let Some(freezer) = config.freezer
            && is_short(freezer, &changes, &taken)
        {
            let (frozen, pause) = capture(config, state, freezer, &known, &taken).await?;
            done.pause = done.pause.max(pause);
            if let Some(frozen) = frozen {
                changes = frozen;
                done.consistency = Consistency::Instant;
            }
        }
        if is_first || changes.count > 0 {
            let stored = done.totals.stored_bytes;
            let (layer, totals) =
                write(config, store, state, snapshot, &known, &changes, &taken).await?;
            done.totals = totals;
            done.totals.stored_bytes += stored;
            let mut taken = taken.into_iter();
            done.layers.retain(|_| !taken.next().unwrap_or_default());
            done.layers.push(layer);
        }
        if done.consistency == Consistency::Instant {
            return Ok(done);
        }

        let written = state.index(Which::UnderWay).ok_or(Unreadable)?;
        let known = Source {
            index: Some(&written),
            snapshot,
            layers: &done.layers,
        };
        changes = known.look(config, state, Racy::Changed).await?;
        if changes.count == 0 {
            // Nothing changed since the walk began, so the tree was at any moment in between what was read.
            done.consistency = Consistency::Instant;
        }
        if changes.count == 0 || config.freezer.is_none() || done.rounds == MOST_ROUNDS {
            return Ok(done);
        }
        (index, about) = (Some(written), snapshot.to_owned());
    }
}

/// Waits until file systems give another time to what changes.
async fn next_tick() -> Result<(), Error> {
    let now = file_clock()?;
    while file_clock()? == now {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Whether it can all be captured in the time for which the gateway may be stopped. Half of it is left for stopping.
fn is_short(freezer: Freezer, changes: &Changes, taken: &[bool]) -> bool {
    let bytes = live(changes, taken).saturating_add(changes.bytes);
    let copying = Duration::from_millis(bytes / COPIED_IN_A_MILLISECOND);
    changes.took + copying <= freezer.limit / 2
}

/// Bytes of the layers that are taken over that are written again.
fn live(changes: &Changes, taken: &[bool]) -> u64 {
    let live = changes.layers.iter().zip(taken);
    live.fold(0, |sum, (layer, taken)| {
        sum.saturating_add(if *taken { layer.live } else { 0 })
    })
}

/// A snapshot by its local index.
pub struct Source<'a> {
    /// None for a snapshot of nothing.
    pub index: Option<&'a Spool>,
    pub snapshot: &'a str,
    pub layers: &'a [Layer],
}

impl Source<'_> {
    fn open(&self) -> Result<Known, Unreadable> {
        match self.index {
            Some(index) => Known::open(index, self.snapshot, self.layers.len()),
            None => Ok(Known::nothing()),
        }
    }

    /// What changed since.
    pub async fn look(
        &self,
        config: &Config,
        state: &State,
        racy: Racy,
    ) -> Result<Changes, LookError> {
        let known = self.open()?;
        let (root, excludes) = (config.root.clone(), config.excludes.clone());
        let (layers, log) = (self.layers.to_vec(), state.nameless()?);
        let walk = with_identity(config.identity, "walk", move || {
            scan(&root, &excludes, known, &layers, racy, log, None)
        });
        match walk.await? {
            Ok(changes) => Ok(changes),
            Err(Stop::Failed(error)) => Err(LookError::Failed(error)),
            Err(Stop::Unreadable | Stop::Late) => Err(LookError::Unreadable),
        }
    }
}

/// Why it is not known what changed.
pub enum LookError {
    /// The local index is as good as none.
    Unreadable,
    Failed(Error),
}

impl From<Unreadable> for LookError {
    fn from(_: Unreadable) -> Self {
        Self::Unreadable
    }
}

impl From<Error> for LookError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<LookError> for Error {
    fn from(error: LookError) -> Self {
        match error {
            LookError::Unreadable => Unreadable.into(),
            LookError::Failed(error) => error,
        }
    }
}

/// Looks at the tree while the gateway is stopped and captures what changed, and how long that took; no changes when it
/// could not be done in time.
async fn capture(
    config: &Config,
    state: &State,
    freezer: Freezer,
    known: &Source<'_>,
    taken: &[bool],
) -> Result<(Option<Changes>, Option<Duration>), Error> {
    let (root, excludes) = (config.root.clone(), config.excludes.clone());
    let (log, file) = (state.nameless()?, state.nameless()?);
    let (layers, taken) = (known.layers.to_vec(), taken.to_vec());
    let known = known.open()?;
    // Whoever looks at processes is root: not every one of them may be looked at by its own user.
    let frozen = match with_identity(None, "hold", move || freezer.freeze()).await? {
        Ok(frozen) => frozen,
        Err(reason) => {
            tell(&reason);
            return Ok((None, None));
        }
    };
    let capture = Capture {
        file,
        taken,
        until: frozen.until(),
    };
    let scanned = with_identity(config.identity, "capture", move || {
        let capture = Some(capture);
        scan(&root, &excludes, known, &layers, Racy::Read, log, capture)
    });
    let scanned = scanned.await?;
    let (is_whole, pause) = with_identity(None, "hold", move || frozen.thaw()).await?;
    match scanned {
        Ok(changes) if is_whole => return Ok((Some(changes), Some(pause))),
        Ok(_) | Err(Stop::Late) => tell(&NotFrozen::Interrupted),
        Err(Stop::Unreadable) => return Err(Unreadable.into()),
        Err(Stop::Failed(error)) => return Err(error),
    }
    Ok((None, Some(pause)))
}

fn tell(reason: &NotFrozen) {
    log::warn(
        "the gateway could not be stopped for a snapshot of one instant",
        &[("reason", reason.to_string().into())],
    );
}

/// Writes the changes as a layer and uploads it at the same time.
async fn write(
    config: &Config,
    store: &dyn Store,
    state: &State,
    snapshot: &str,
    known: &Source<'_>,
    changes: &Changes,
    taken: &[bool],
) -> Result<(Layer, Totals), Error> {
    let size = live(changes, taken).saturating_add(changes.bytes);
    let (layer_id, _) = id::new().map_err(Error::local("read", "random bytes"))?;
    let key = record::layer_key(&layer_id);
    let (sink, parts) = PartWriter::new(part_size(size));
    let inputs = Inputs {
        root: config.root.clone(),
        known: known.open()?,
        log: changes.log()?,
        captured: changes.captured().cloned(),
    };
    let layer = LayerWriter::new(&layer_id, sink, state.nameless()?, config.effort)?;
    let index = LocalIndex::new(state.index_under_way()?, snapshot, changes.started)?;
    let pass = Pass::new(inputs, Words::new(taken), layer, index);
    progress::begin("backing up", size);
    let read = with_identity(config.identity, "reader", move || pass.run());
    let (uploaded, read) = tokio::join!(store.upload(&key, parts), read);
    let (layer, mut totals, unread) = match (uploaded, read?) {
        (_, Err(Halt::Failed(error))) => return Err(error),
        (Err(error), _) => return Err(Error::store("write", key)(error)),
        (Ok(()), Err(Halt::Stopped)) => return Err(Error::Internal("upload")),
        (Ok(()), Ok(read)) => read,
    };
    for skipped in [&changes.skipped, &unread] {
        skipped.warn();
        totals.skipped += skipped.count;
    }
    Ok((layer, totals))
}
