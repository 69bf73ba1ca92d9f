//! Reads the tree until what is read is of one instant, or says that it is not.
//!
//! A round is a look at what changed and a layer of it. Where that is little enough to be copied in one moment, the gateway
//! is stopped, the tree is looked at again and what changed is captured, and the gateway goes on. Where it is more, it is read
//! while the gateway works, and what changed meanwhile is left for the next round. That is how virtual machines are moved live.

use std::{
    collections::HashSet,
    fs::File,
    io::Seek,
    thread,
    time::{Duration, Instant},
};

use super::{
    changes::{Capture, Changes, Look, Stop, scan},
    layer::{End, Inputs, Manner, Pass, UNKNOWN, Words, Written},
    plan::Base,
};
use crate::{
    archive::{
        parts::{PartWriter, part_size},
        spool::Spool,
        tarball::TRAILER,
        writer::{Halt, LayerWriter},
    },
    capabilities,
    config::Config,
    error::Error,
    local_index::{Known, LocalIndex, Racy, Unreadable, could_repeat, file_clock},
    log, progress,
    snapshot::{
        id,
        layers::taken_over,
        record::{self, Consistency, Layer, Totals},
    },
    state::{State, Which},
    store::Store,
    tree::{
        exclude::Excludes,
        freeze::{Freezer, NotFrozen},
        identity::with_identity,
        miss::Unread,
        scan::{self, Met, Verdict},
        writers::{self, LONGEST_LOOK, Unseen, Watch},
    },
};

/// Rounds that are read while the gateway works. Each is shorter than the one before unless the gateway writes faster than
/// it can be read, and then more of them change nothing.
const MOST_ROUNDS: u32 = 4;

/// What is surely copied to a working file within a millisecond, in bytes: disks behind their cache are faster.
const COPIED_IN_A_MILLISECOND: u64 = 200 << 10;

/// How often the bytes are halved that a run reads before any has arrived, one time for each try that could keep nothing.
const MOST_BYTES_HALVED: u32 = 6;

/// Between two looks at the clock that waits for its next tick.
const CLOCK_AGAIN: Duration = Duration::from_micros(200);

/// What a backup made before it is given a name.
pub struct Taken {
    pub layers: Vec<Layer>,
    pub totals: Totals,
    pub consistency: Consistency,
    /// Why it is not of one instant.
    pub reason: Option<String>,
    pub unread: Unread,
    /// Times that the tree was read.
    pub rounds: u32,
    /// The longest time for which the gateway was held.
    pub pause: Option<Duration>,
    /// The time was up before all of it was read: what is there is for the next run to go on from.
    pub is_part: bool,
}

impl Taken {
    /// Whether the tree was read as it was at one instant. `again`: what the last look could not see once more, so that nobody
    /// knows whether it has changed meanwhile.
    fn judge(&mut self, again: &Unread, doubt: Option<String>) {
        let paths = |count| match count {
            1 => "1 path".to_owned(),
            count => format!("{count} paths"),
        };
        self.reason = match (self.unread.count, again.count) {
            (0, 0) => doubt,
            (0, again) => Some(format!("{} cannot be looked at once more", paths(again))),
            (unread, _) => Some(format!("{} cannot be read", paths(unread))),
        };
        self.consistency = match self.reason {
            None => Consistency::Instant,
            Some(_) => Consistency::PerFile,
        };
    }
}

/// Reads what changed since `base` into layers of the new snapshot and uploads them; all has to be there by `until`.
pub async fn take(
    config: &Config,
    store: &dyn Store,
    state: &mut State,
    snapshot: &str,
    base: Base,
    until: Instant,
) -> Result<Taken, Error> {
    let Base {
        mut about,
        layers,
        mut index,
        mut changes,
        is_part,
        ..
    } = base;
    let mut done = Taken {
        layers,
        totals: Totals::default(),
        consistency: Consistency::PerFile,
        reason: None,
        unread: Unread::default(),
        rounds: 0,
        pause: None,
        is_part: false,
    };
    if let Some(end) = changes.racy_until.filter(|_| config.freezer.is_none()) {
        // Read while it can change without another time, a quiet tree could not be told from one that is being written.
        until_clock(end).await?;
        let known = Source {
            index: index.as_ref(),
            snapshot: &about,
            layers: &done.layers,
        };
        changes = known.look(config, state, Racy::Read).await?;
    }
    loop {
        done.rounds += 1;
        let is_first = done.rounds == 1;
        let known = Source {
            index: index.as_ref(),
            snapshot: &about,
            layers: &done.layers,
        };
        // Only the first round takes over: later ones would take what has just been written.
        let mut taken = if is_first && !is_part {
            to_take_over(&changes)
        } else {
            vec![false; done.layers.len()]
        };
        let (is_captured, mut doubt) = hold(
            config,
            state,
            &known,
            &mut changes,
            &mut taken,
            &mut done.pause,
        )
        .await?;
        if is_first || changes.count > 0 {
            let stored = done.totals.stored_bytes;
            let written = write(
                config, store, state, snapshot, &known, &changes, &mut taken, until,
            )
            .await?;
            done.totals = written.totals;
            done.totals.stored_bytes += stored;
            done.unread = std::mem::take(&mut changes.unread);
            done.unread.join(written.unread);
            let mut taken = taken.into_iter();
            done.layers.retain(|_| !taken.next().unwrap_or_default());
            done.layers.push(written.layer);
            if written.is_part {
                done.is_part = true;
                return Ok(done);
            }
        }
        if is_captured {
            done.judge(&changes.unread, doubt);
            return Ok(done);
        }

        let written = state.index(Which::UnderWay)?.ok_or(Unreadable)?;
        let known = Source {
            index: Some(&written),
            snapshot,
            layers: &done.layers,
        };
        changes = known.look(config, state, Racy::Changed).await?;
        if config.freezer.is_some() && !capabilities::can_trace() {
            // A process that nobody may look at may write without a trace.
            doubt = Some(NotFrozen::NoCapability.to_string());
        } else if changes.count == 0 {
            // Nothing changed since the walk began, so the tree was at any moment in between what was read.
            doubt.clone_from(&changes.doubt);
        }
        if changes.count == 0 || config.freezer.is_none() || done.rounds == MOST_ROUNDS {
            done.judge(&changes.unread, doubt);
            return Ok(done);
        }
        (index, about) = (Some(written), snapshot.to_owned());
    }
}

/// Why a snapshot that was read while the gateway ran is not of one instant.
const WRITTEN_MEANWHILE: &str = "files were written while they were read";

/// Captures what changed while the gateway is held, where that takes little time. Whether it did, and why what is read is not of one
/// instant.
async fn hold(
    config: &Config,
    state: &mut State,
    known: &Source<'_>,
    changes: &mut Changes,
    taken: &mut [bool],
    longest: &mut Option<Duration>,
) -> Result<(bool, Option<String>), Error> {
    while let Some(freezer) = config.freezer
        && is_short(freezer, changes, taken)
    {
        let (frozen, pause) = capture(config, state, freezer, known, changes, taken).await?;
        *longest = (*longest).max(pause);
        match frozen {
            Ok(frozen) => *changes = frozen,
            Err(reason) => {
                let message = "the gateway is not held for a snapshot of one instant";
                log::debug(message, &[("reason", reason.clone().into())]);
                return Ok((false, Some(reason)));
            }
        }
        // What cannot be read cannot be written again.
        if !leave_pinned(taken, changes) {
            return Ok((true, changes.doubt.clone()));
        }
    }
    Ok((false, Some(WRITTEN_MEANWHILE.to_owned())))
}

/// Which layers to take over.
fn to_take_over(changes: &Changes) -> Vec<bool> {
    let bytes = changes.bytes.saturating_add(TRAILER.len() as u64);
    taken_over(&changes.layers, bytes)
}

/// Leaves the layers alone that have something which cannot be read; whether one of them was to be taken over.
fn leave_pinned(taken: &mut [bool], changes: &Changes) -> bool {
    let mut has_pinned = false;
    for (taken, layer) in taken.iter_mut().zip(&changes.layers) {
        has_pinned |= *taken && layer.is_pinned;
        *taken &= !layer.is_pinned;
    }
    has_pinned
}

/// Waits until the file systems' clock has come to a time; a clock that is set back meanwhile is not waited for.
async fn until_clock(end: i64) -> Result<(), Error> {
    /// Two seconds is the largest unit of a file system's times.
    const LONGEST: Duration = Duration::from_millis(2_100);

    let start = Instant::now();
    while file_clock()? < end && start.elapsed() < LONGEST {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Whether it can all be captured in the time for which the gateway may be held. A quarter of it is left for holding it.
fn is_short(freezer: Freezer, changes: &Changes, taken: &[bool]) -> bool {
    let bytes = live(changes, taken).saturating_add(changes.bytes);
    let copying = Duration::from_millis(bytes / COPIED_IN_A_MILLISECOND);
    // The tree is walked twice: to read it, and to see that nothing was written meanwhile.
    changes.took * 2 + copying <= freezer.limit * 3 / 4
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
        state: &mut State,
        racy: Racy,
    ) -> Result<Changes, LookError> {
        // Refused here and not on the thread: an index that is no good is as good as none.
        self.open()?;
        let mut eyes = Eyes::new(self, config, state, racy)?;
        // What is mapped and written to after the look at the processes has a later time.
        let started = file_clock()?;
        let watch = writers::watch(config.gateway_user(), config.identity, LONGEST_LOOK);
        let walk = with_identity(config.identity, "walk", move || eyes.look(started, watch));
        match walk.await? {
            Ok(changes) => {
                state.saw(&changes.unseen, changes.root)?;
                Ok(changes)
            }
            Err(Stop::Failed(error)) => Err(LookError::Failed(error)),
            Err(Stop::Unreadable | Stop::Late) => Err(LookError::Unreadable),
        }
    }
}

/// A look at the tree, for the thread that does it.
struct Eyes {
    root: std::path::PathBuf,
    excludes: Excludes,
    index: Option<Spool>,
    snapshot: String,
    layers: Vec<Layer>,
    racy: Racy,
    ended: i64,
    /// Inodes that processes could change at the look before without the kernel setting a time.
    unseen: HashSet<u64>,
    held: HashSet<Vec<u8>>,
    /// The gateway has a user of its own.
    is_apart: bool,
    log: File,
}

impl Eyes {
    fn new(source: &Source<'_>, config: &Config, state: &State, racy: Racy) -> Result<Self, Error> {
        Ok(Self {
            root: config.root.clone(),
            excludes: config.excludes.clone(),
            index: source.index.cloned(),
            snapshot: source.snapshot.to_owned(),
            layers: source.layers.to_vec(),
            racy,
            ended: state.ended(),
            unseen: state.facts.unseen.clone(),
            held: HashSet::new(),
            is_apart: config.freezer.is_some() || config.identity.is_some(),
            log: state.nameless()?,
        })
    }

    /// Looks until nothing is left that has to be looked at in another way: files that processes can change unseen, and files
    /// that names which cannot be read are links of.
    fn look(&mut self, started: i64, watch: Watch) -> Result<Changes, Stop> {
        let mut changes = self.once(started, None)?;
        // It was under way at the same time as the walk.
        let now = watch.finish();
        loop {
            self.note(&mut changes, &now);
            if changes.unseen.is_subset(&self.unseen) && changes.needed.is_subset(&self.held) {
                return Ok(changes);
            }
            self.unseen.extend(changes.unseen);
            self.held.extend(changes.needed);
            let emptied = self.log.set_len(0).and_then(|()| self.log.rewind());
            emptied.map_err(Error::local("write", WORKING_FILE))?;
            changes = self.once(started, None)?;
        }
    }

    fn once(&self, started: i64, capture: Option<Capture>) -> Result<Changes, Stop> {
        let known = match &self.index {
            Some(index) => Known::open(index, &self.snapshot, self.layers.len())?,
            None => Known::nothing(),
        };
        let look = Look {
            root: &self.root,
            excludes: &self.excludes,
            layers: &self.layers,
            racy: self.racy,
            started,
            ended: self.ended,
            unseen: &self.unseen,
            held: &self.held,
        };
        let log = self.log.try_clone();
        let log = log.map_err(Error::local("write", WORKING_FILE))?;
        scan(&look, known, log, capture)
    }

    /// Says of changes what processes can change without the kernel setting a time, and what nobody can know of that.
    fn note(&self, changes: &mut Changes, now: &Unseen) {
        let unseen = |inode: &u64| now.inodes.contains(inode);
        let inodes = std::mem::take(&mut changes.inodes);
        changes.unseen = inodes.into_iter().filter(unseen).collect();
        let recent = std::mem::take(&mut changes.recent);
        if now.is_any_file_written {
            changes.unseen.extend(recent);
        }
        changes.held.clone_from(&self.held);
        changes.doubt = match now {
            Unseen {
                in_flight: Some(pid),
                ..
            } => Some(format!(
                "process {pid} may be writing past the cache (O_DIRECT), and such writes end after it is held"
            )),
            // Without a user of its own, the gateway cannot be told from strangers, whom nobody may look at.
            Unseen {
                is_complete: false, ..
            } if self.is_apart => {
                Some("it cannot be told which files processes of the gateway map".to_owned())
            }
            Unseen { .. } => None,
        };
    }
}

/// What errors call a file that the agent works with.
const WORKING_FILE: &str = "a working file in RUNTIME_STATE";

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

/// Looks at the tree while the gateway is held and captures what changed; or why that is not of one instant. And for how
/// long the gateway was held.
async fn capture(
    config: &Config,
    state: &mut State,
    freezer: Freezer,
    known: &Source<'_>,
    changes: &Changes,
    taken: &[bool],
) -> Result<(Result<Changes, String>, Option<Duration>), Error> {
    let mut eyes = Eyes::new(known, config, state, Racy::Read)?;
    eyes.held.clone_from(&changes.held);
    let (file, taken) = (state.nameless()?, taken.to_vec());
    let (user, identity) = (freezer.user, config.identity);
    // Whoever looks at processes is root: not every one of them may be looked at by its own user.
    let hold = with_identity(None, "hold", move || {
        let frozen = freezer.freeze()?;
        let left = frozen.until().saturating_duration_since(Instant::now());
        let now = writers::watch(user, identity, left).finish();
        Ok::<_, NotFrozen>((frozen, now))
    });
    let (frozen, now) = match hold.await? {
        Ok(frozen) => frozen,
        Err(reason) => return Ok((Err(reason.to_string()), None)),
    };
    let until = frozen.until();
    let capture = Capture { file, taken, until };
    let scanned = with_identity(config.identity, "capture", move || {
        while_held(&mut eyes, &now, capture)
    });
    let scanned = scanned.await?;
    let (is_whole, pause) = with_identity(None, "hold", move || frozen.thaw()).await?;
    let changes = match scanned {
        Ok(changes) if is_whole => {
            state.saw(&changes.unseen, changes.root)?;
            Ok(changes)
        }
        Ok(_) | Err(Torn::Late) => Err(NotFrozen::Interrupted.to_string()),
        Err(Torn::Written) => Err(WRITTEN_WHILE_HELD.to_owned()),
        Err(Torn::Failed(error)) => return Err(error),
    };
    Ok((changes, Some(pause)))
}

const WRITTEN_WHILE_HELD: &str = "something was written to the tree while the gateway was held: by somebody else, or by the \
     kernel, which ended a write";

/// Why what was read while the gateway was held is not of one instant.
enum Torn {
    Late,
    Written,
    Failed(Error),
}

impl From<Stop> for Torn {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Late => Self::Late,
            Stop::Unreadable => Self::Failed(Unreadable.into()),
            Stop::Failed(error) => Self::Failed(error),
        }
    }
}

impl From<Error> for Torn {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// Captures what changed, then looks once more at every status: the gateway is held, so nothing may have a later time.
fn while_held(eyes: &mut Eyes, now: &Unseen, capture: Capture) -> Result<Changes, Torn> {
    let until = capture.until;
    let held = file_clock()?;
    // What was written before has an earlier time from the next tick on.
    while file_clock()? == held {
        if Instant::now() >= until {
            return Err(Torn::Late);
        }
        thread::sleep(CLOCK_AGAIN);
    }
    let started = file_clock()?;
    eyes.unseen.extend(&now.inodes);
    let mut changes = eyes.once(started, Some(capture))?;
    if !changes.needed.is_subset(&eyes.held) {
        return Err(Torn::Written);
    }
    eyes.note(&mut changes, now);
    let visit = |met: Met<'_>| {
        if Instant::now() >= until {
            return Err(Torn::Late);
        }
        let stamp = match met {
            Met::Entry(found) => found.entry.stamp,
            Met::Missed(..) => None,
        };
        match stamp {
            Some(stamp) if could_repeat(stamp.ctime, changes.started, changes.started)? => {
                Err(Torn::Written)
            }
            _ => Ok(Verdict::Taken),
        }
    };
    scan::walk(&eyes.root, &eyes.excludes, visit)?;
    Ok(changes)
}

/// Writes the changes as a layer and uploads it at the same time. Layers with something that cannot be read are struck from
/// `taken` on the way.
#[expect(clippy::too_many_arguments, reason = "each is about another thing")]
async fn write(
    config: &Config,
    store: &dyn Store,
    state: &State,
    snapshot: &str,
    known: &Source<'_>,
    changes: &Changes,
    taken: &mut [bool],
    until: Instant,
) -> Result<Written, Error> {
    /// A disk that goes on failing at other places is no disk to read a snapshot from.
    const MOST_CAREFUL_TRIES: u32 = 3;

    let mut careful_tries = 0;
    loop {
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
        let manner = Manner {
            is_careful: careful_tries > 0,
            until,
            most_unknown: UNKNOWN >> state.facts.late_tries.min(MOST_BYTES_HALVED),
        };
        let layer = LayerWriter::new(&layer_id, sink, state.nameless()?, config.effort)?;
        let index = LocalIndex::new(state.index_under_way()?, snapshot, changes.started)?;
        let pass = Pass::new(inputs, manner, Words::new(taken), layer, index);
        progress::begin("backing up", size);
        let read = with_identity(config.identity, "reader", move || pass.run());
        let (uploaded, read) = tokio::join!(store.upload(&key, parts), read);
        match (uploaded, read?) {
            (_, Err(End::Halt(Halt::Failed(error)))) => return Err(error),
            (
                _,
                Err(End::Again {
                    pinned: Some(layer),
                }),
            ) => {
                taken[layer as usize] = false;
            }
            (_, Err(End::Again { pinned: None })) if careful_tries < MOST_CAREFUL_TRIES => {
                careful_tries += 1;
            }
            (_, Err(End::Again { pinned: None })) => {
                let error = std::io::Error::from_raw_os_error(nix::libc::EIO);
                return Err(Error::local("read", &config.root)(error));
            }
            (Err(error), _) => return Err(Error::store("write", key)(error)),
            (Ok(()), Err(End::Halt(Halt::Stopped))) => return Err(Error::Internal("upload")),
            (Ok(()), Ok(mut written)) => {
                for skipped in [&changes.skipped, &written.skipped] {
                    skipped.warn();
                    written.totals.skipped += skipped.count;
                }
                return Ok(written);
            }
        }
        // What the try brought to the store is no layer. A failure here leaves it to the next prune.
        let _ = store.abort_uploads().await;
    }
}
