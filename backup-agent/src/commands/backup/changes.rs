//! What changed in the tree since an index was made: one walk beside it, and a log of every path that is new, changed or gone.
//!
//! A layer is written from the log, so the tree is not walked again for that. The log is a file, since a first backup changes
//! everything. A walk can also capture the content of what it logs: then all of it is of the time of the walk.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::{errno::Errno, unistd::Uid};

use crate::{
    archive::{
        ahead::Ahead,
        entry::{Entry, Kind, display, weight},
        extents::{Extents, extents},
        index::{IndexReader, IndexWriter},
        line::Scope,
        spool::Spool,
    },
    error::Error,
    local_index::{Doubts, Judgement, Known, Racy, Unreadable, could_repeat, unit},
    log,
    snapshot::{layers::Size, record::Layer},
    tree::{
        cursor::is_above,
        exclude::Excludes,
        holes, identity,
        miss::{Miss, Unread},
        read::{self, Content},
        root::RootId,
        scan::{self, Found, Met, Verdict},
    },
};

/// Paths that are named in the log of the program when they are left out. A tree that is hostile may have millions.
const MOST_NAMED: usize = 100;

/// A write gives its file a time when the kernel takes it. This long afterwards it has surely ended, in nanoseconds: disks that
/// do not answer are given up sooner.
const LATEST: i64 = 300 * 1_000_000_000;

/// What changed.
pub struct Changes {
    /// Paths that are new, changed or gone.
    pub count: u64,
    /// About the bytes that they take in a tar stream.
    pub bytes: u64,
    /// What the tree still needs of each layer.
    pub layers: Vec<Size>,
    /// The directory that was walked.
    pub root: Option<RootId>,
    /// The file systems' clock when the look began.
    pub started: i64,
    /// Until then by that clock, what changes can get the time of something that was found.
    pub racy_until: Option<i64>,
    /// Inodes of all files that were met.
    pub inodes: Vec<u64>,
    /// Those whose times are so late that a write may not have ended since.
    pub recent: Vec<u64>,
    /// Those that processes can change without the kernel setting a time.
    pub unseen: HashSet<u64>,
    /// How long the walk took.
    pub took: Duration,
    pub skipped: Skipped,
    pub unread: Unread,
    /// Files that names which cannot be read are hard links of, and the directories around them. They have to stay as they
    /// were, or those names would lead nowhere: the walk has to be done again with them in [`Look::held`].
    pub needed: HashSet<Vec<u8>>,
    /// Those that the walk left as they were for that reason.
    pub held: HashSet<Vec<u8>>,
    /// Why files may have changed that seem not to have.
    pub doubt: Option<String>,
    log: Option<Spool>,
    captured: Option<Spool>,
}

impl Changes {
    /// The log, from its start.
    pub fn log(&self) -> Result<Log, Unreadable> {
        let open = |log: &Spool| Ahead::new(IndexReader::new(log.reader())?);
        let entries = self.log.as_ref().map(open);
        let entries = entries.transpose().map_err(|_| Unreadable)?;
        Ok(Log { entries })
    }

    /// The contents of the logged files, if they were captured: their extents point in there.
    pub fn captured(&self) -> Option<&Spool> {
        self.captured.as_ref()
    }
}

/// Entries in the order of the walk, with their stamps. What is gone is a deletion.
pub struct Log {
    entries: Option<Ahead>,
}

impl Log {
    pub fn next(&mut self) -> Result<Option<Entry>, Unreadable> {
        match &mut self.entries {
            Some(entries) => entries.next().map_err(|_| Unreadable),
            None => Ok(None),
        }
    }
}

/// What a walk left out with a warning.
#[derive(Default)]
pub struct Skipped {
    pub count: u64,
    /// The first of them.
    named: Vec<(String, &'static str)>,
}

impl Skipped {
    pub fn add(&mut self, path: &[u8], reason: &'static str) {
        self.count += 1;
        if self.named.len() < MOST_NAMED {
            self.named.push((display(path), reason));
        }
    }

    /// The attributes of an entry, as far as a snapshot can have them.
    pub fn attributes(
        &mut self,
        of: impl AsFd,
        entry: &Entry,
    ) -> Result<BTreeMap<String, Vec<u8>>, Miss> {
        let found = read::xattrs(of)?;
        if found.is_cut {
            self.add(&entry.path, "only its attributes: too many, or unreadable");
        }
        Ok(found.all)
    }

    /// Says what was left out.
    pub fn warn(&self) {
        for (path, reason) in &self.named {
            log::warn(
                "entry left out",
                &[("path", path.as_str().into()), ("reason", (*reason).into())],
            );
        }
        let unnamed = self.count - self.named.len() as u64;
        if unnamed > 0 {
            log::warn("more entries left out", &[("count", unnamed.into())]);
        }
    }
}

/// Why a walk ended early.
pub enum Stop {
    /// The index cannot be read: it is as good as none.
    Unreadable,
    /// It had no more time.
    Late,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Unreadable> for Stop {
    fn from(_: Unreadable) -> Self {
        Self::Unreadable
    }
}

/// Where the contents of what is logged go.
pub struct Capture {
    pub file: File,
    /// The layers that will be taken over: what is live in them is captured, too.
    pub taken: Vec<bool>,
    /// The walk ends here, complete or not.
    pub until: Instant,
}

/// How to look at the tree.
pub struct Look<'a> {
    pub root: &'a Path,
    pub excludes: &'a Excludes,
    /// Layers of the snapshot that the index is of.
    pub layers: &'a [Layer],
    pub racy: Racy,
    /// The file systems' clock before the look at what processes can change unseen.
    pub started: i64,
    /// The file systems' clock when the walk of the index had ended, or later.
    pub ended: i64,
    /// Inodes of files that may have changed without the kernel setting a time.
    pub unseen: &'a HashSet<u64>,
    /// Paths that keep what the index has, whatever is found there.
    pub held: &'a HashSet<Vec<u8>>,
}

/// Compares the tree with an index. `log` is an empty file.
pub fn scan(
    look: &Look<'_>,
    known: Known,
    log: File,
    capture: Option<Capture>,
) -> Result<Changes, Stop> {
    let begun = Instant::now();
    let sizes = look.layers.iter().map(|layer| Size {
        whole: layer.raw_size,
        live: 0,
        is_pinned: false,
    });
    let mut scan = Scan {
        look,
        doubts: Doubts {
            started: known.started,
            ended: look.ended,
            unseen: look.unseen,
            racy: look.racy,
        },
        known,
        unread_above: None,
        covered: None,
        reader: identity::current(),
        changes: Changes {
            count: 0,
            bytes: 0,
            layers: sizes.collect(),
            root: None,
            started: look.started,
            racy_until: None,
            inodes: Vec::new(),
            recent: Vec::new(),
            unseen: HashSet::new(),
            took: Duration::ZERO,
            skipped: Skipped::default(),
            unread: Unread::default(),
            needed: HashSet::new(),
            held: HashSet::new(),
            doubt: None,
            log: None,
            captured: None,
        },
        log_file: Some(log),
        log: None,
        capture,
        captured: 0,
    };
    scan::walk(look.root, look.excludes, |met| scan.meet(&met))?;
    while let Some(known) = scan.known.rest()? {
        scan.absent(&known)?;
    }
    let mut changes = scan.changes;
    if let Some(log) = scan.log {
        let file = log.finish().map_err(Error::local("write", LOG))?;
        changes.log = Some(Spool::new(file));
    }
    changes.captured = scan.capture.map(|capture| Spool::new(capture.file));
    changes.took = begun.elapsed();
    Ok(changes)
}

/// What errors call the two working files.
const LOG: &str = "the log of what changed in RUNTIME_STATE";
pub const CAPTURED: &str = "the captured files in RUNTIME_STATE";

struct Scan<'a> {
    look: &'a Look<'a>,
    doubts: Doubts<'a>,
    known: Known,
    /// The last path that could not be looked at: what the index has below it stays.
    unread_above: Option<Vec<u8>>,
    /// A directory in the place of something else that is held: nothing below it can be in the snapshot.
    covered: Option<Vec<u8>>,
    /// Whose rights files are opened with.
    reader: Uid,
    changes: Changes,
    /// Until something is logged.
    log_file: Option<File>,
    log: Option<IndexWriter>,
    capture: Option<Capture>,
    /// Bytes that were captured.
    captured: u64,
}

impl Scan<'_> {
    fn meet(&mut self, met: &Met<'_>) -> Result<Verdict, Stop> {
        if let Some(capture) = &self.capture
            && Instant::now() >= capture.until
        {
            return Err(Stop::Late);
        }
        let path = match met {
            Met::Entry(found) => &found.entry.path[..],
            Met::Missed(path, _) => path,
        };
        while let Some(known) = self.known.before(path)? {
            self.absent(&known)?;
        }
        match met {
            Met::Entry(found) => self.visit(found),
            Met::Missed(path, miss) => {
                self.miss(path, *miss);
                Ok(Verdict::Skipped)
            }
        }
    }

    fn visit(&mut self, found: &Found<'_>) -> Result<Verdict, Stop> {
        if found.entry.path.is_empty() {
            self.changes.root = Some(RootId::of(found.parent)?);
        }
        if let Some(stamp) = found.entry.stamp {
            if could_repeat(stamp.ctime, self.changes.started, self.changes.started)? {
                let until = stamp.ctime.saturating_add(unit(stamp.ctime));
                self.changes.racy_until = self.changes.racy_until.max(Some(until));
            }
            if found.entry.kind == Kind::File {
                self.changes.inodes.push(stamp.ino);
                if stamp.ctime.saturating_add(LATEST) > self.changes.started {
                    self.changes.recent.push(stamp.ino);
                }
            }
        }
        let path = &found.entry.path;
        let known = self.known.at(path)?;
        if self
            .covered
            .as_ref()
            .is_some_and(|above| is_above(above, path))
        {
            self.changes.unread.add(display(path));
            return Ok(Verdict::Skipped);
        }
        let bytes = found.allocated.min(found.entry.size);
        let Some(known) = known else {
            let miss = self.note(found, None)?;
            return Ok(match miss {
                None => {
                    self.change(bytes);
                    Verdict::Taken
                }
                Some(miss) => {
                    self.miss(path, miss);
                    Verdict::Skipped
                }
            });
        };
        let is_directory = |entry: &Entry| entry.kind == Kind::Dir;
        let are_directories = is_directory(&found.entry) && is_directory(&known);
        if self.look.held.contains(path) && !are_directories {
            if is_directory(&found.entry) {
                self.covered = Some(path.clone());
            }
            self.changes.unread.add(display(path));
            self.keep_unread(&known);
            return Ok(Verdict::Taken);
        }
        let miss = match self.doubts.judge(found, &known)? {
            Judgement::Unread => Some(Miss::Unread(Errno::EIO)),
            Judgement::Same => {
                // Its content has to be written again, and it must be that of now.
                let is_taken = |capture: &Capture| {
                    let decides = known.layers.last();
                    decides.is_some_and(|layer| capture.taken[*layer as usize])
                };
                let is_taken = self.capture.as_ref().is_some_and(is_taken);
                let miss = if is_taken {
                    self.note(found, Some(&known))?
                } else {
                    None
                };
                if miss.is_none() {
                    self.keep(&known);
                }
                miss
            }
            Judgement::Changed => {
                let miss = self.note(found, Some(&known))?;
                if miss.is_none() {
                    self.change(bytes);
                }
                miss
            }
        };
        match miss {
            None => return Ok(Verdict::Taken),
            Some(Miss::Unread(_)) if are_directories => {
                // Only its attributes: what is in it is looked at.
                self.changes.unread.add(display(path));
                self.keep_unread(&known);
            }
            Some(miss @ Miss::Unread(_)) => {
                self.miss(path, miss);
                self.keep_unread(&known);
            }
            Some(miss) => {
                self.miss(path, miss);
                // As if it were not there: an older layer must not fill in for it.
                self.gone(&known)?;
            }
        }
        Ok(Verdict::Skipped)
    }

    /// Says that a path could not be taken.
    fn miss(&mut self, path: &[u8], miss: Miss) {
        match miss {
            Miss::Gone => {}
            Miss::LeftOut(reason) => self.changes.skipped.add(path, reason),
            Miss::Unread(_) => {
                self.changes.unread.add(display(path));
                self.unread_above = Some(path.to_vec());
            }
        }
    }

    /// A path of the index that the walk did not come to.
    fn absent(&mut self, known: &Entry) -> Result<(), Stop> {
        let is_above = |unread: &Vec<u8>| is_above(unread, &known.path);
        if self.unread_above.as_ref().is_some_and(is_above) {
            self.keep_unread(known);
            return Ok(());
        }
        if self.look.held.contains(&known.path) && known.kind != Kind::Deleted {
            self.changes.unread.add(known.display());
            self.keep_unread(known);
            return Ok(());
        }
        self.gone(known)
    }

    /// Logs what was found, with all that can be known of it now; or why it cannot be taken.
    fn note(&mut self, found: &Found<'_>, known: Option<&Entry>) -> Result<Option<Miss>, Stop> {
        let mut entry = found.entry.clone();
        match (entry.kind, &mut self.capture) {
            (Kind::File, Some(capture)) => {
                let content = match read::open(found.parent, found.name) {
                    Ok(content) => content,
                    Err(miss) => return Ok(Some(miss)),
                };
                // What is recorded is the file that was opened, not the one that was listed.
                entry = scan::entry(&entry.path, Kind::File, content.status());
                match self.changes.skipped.attributes(content.file(), &entry) {
                    Ok(xattrs) => entry.xattrs = xattrs,
                    Err(miss) => return Ok(Some(miss)),
                }
                entry.extents = match capture.take(&entry, &content, self.captured)? {
                    Ok(extents) => extents,
                    Err(miss) => return Ok(Some(miss)),
                };
                self.captured += entry.data();
            }
            (Kind::File, None) => {
                let is_doubtful = !self.reader.is_root()
                    && (entry.uid != self.reader.as_raw() || entry.mode & 0o400 == 0);
                // The first name of several has to be one that can be read.
                let is_linked = entry.stamp.is_some_and(|stamp| stamp.is_linked);
                // Found out here, it does not count as changed each time.
                let is_odd = holes::may_be_too_many(entry.size, found.allocated);
                if (is_doubtful || is_linked || is_odd)
                    && let Err(miss) = read::open(found.parent, found.name)
                {
                    return Ok(Some(miss));
                }
            }
            (Kind::Dir, _) => {
                if let Some(directory) = found.directory {
                    match self.changes.skipped.attributes(directory, &entry) {
                        Ok(xattrs) => entry.xattrs = xattrs,
                        Err(miss) if known.is_some_and(|known| known.kind == Kind::Dir) => {
                            return Ok(Some(miss));
                        }
                        Err(_) => {
                            // Without it, what is in it would be in no directory. Without a stamp, it is read again.
                            self.changes.unread.add(entry.display());
                            entry.stamp = None;
                        }
                    }
                }
            }
            (Kind::Symlink | Kind::Hardlink | Kind::Deleted, _) => {}
        }
        if let Some(known) = known {
            entry.keep_lost(known);
        }
        self.append(&entry)?;
        Ok(None)
    }

    fn append(&mut self, entry: &Entry) -> Result<(), Error> {
        let failed = || Error::local("write", LOG);
        if let Some(file) = self.log_file.take() {
            self.log = Some(IndexWriter::new(file, Scope::Local).map_err(failed())?);
        }
        self.log
            .as_mut()
            .map_or(Ok(()), |log| log.entry(entry))
            .map_err(failed())
    }

    fn keep(&mut self, entry: &Entry) {
        if let Some(layer) = entry.layers.last() {
            self.changes.layers[*layer as usize].live += entry.weight();
        }
    }

    /// A path that cannot be read: what the index has of it stays, and so does the layer that has its content.
    fn keep_unread(&mut self, known: &Entry) {
        self.keep(known);
        match (known.kind, known.layers.last(), &known.link) {
            (Kind::File, Some(layer), _) => self.changes.layers[*layer as usize].is_pinned = true,
            (Kind::Hardlink, _, Some(first)) if !self.look.held.contains(first) => {
                let slashes = (0..first.len()).filter(|at| first[*at] == b'/');
                let above = slashes.map(|end| first[..end].to_vec());
                self.changes.needed.extend(above);
                self.changes.needed.insert(first.clone());
            }
            _ => {}
        }
    }

    fn change(&mut self, data: u64) {
        self.changes.count += 1;
        self.changes.bytes = self.changes.bytes.saturating_add(weight(data));
    }

    fn gone(&mut self, known: &Entry) -> Result<(), Stop> {
        if known.kind == Kind::Deleted && known.stamp.is_none() {
            self.keep(known);
            return Ok(());
        }
        self.change(0);
        Ok(self.append(&Entry::deleted(known.path.clone()))?)
    }
}

impl Capture {
    /// Copies a file's data behind the `at` bytes that are there; gives their extents, or why they cannot be read.
    fn take(
        &mut self,
        entry: &Entry,
        content: &Content,
        at: u64,
    ) -> Result<Result<Extents, Miss>, Stop> {
        enum End {
            Miss(Miss),
            Stop(Stop),
        }

        let Self { file, until, .. } = self;
        // What a file that failed in the middle left is written over.
        file.seek(SeekFrom::Start(at))
            .map_err(Error::local("write", CAPTURED))?;
        let copied = content.data().read(
            |error| End::Miss(read::miss(&error)),
            |bytes| {
                if Instant::now() >= *until {
                    return Err(End::Stop(Stop::Late));
                }
                let written = file.write_all(bytes);
                written.map_err(|error| End::Stop(Error::local("write", CAPTURED)(error).into()))
            },
        );
        match copied {
            Ok(()) => Ok(Ok(extents(content.data().runs(), entry.size, at))),
            Err(End::Miss(miss)) => Ok(Err(miss)),
            Err(End::Stop(stop)) => Err(stop),
        }
    }
}
