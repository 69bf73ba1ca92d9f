//! What changed in the tree since an index was made: one walk beside it, and a log of every path that is new, changed or gone.
//!
//! A layer is written from the log, so the tree is not walked again for that. The log is a file, since a first backup changes
//! everything. A walk can also capture the content of what it logs: then all of it is of the time of the walk.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use nix::unistd::Uid;

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
    local_index::{Known, Racy, Unreadable, file_clock, is_changed},
    log,
    snapshot::{layers::Size, record::Layer},
    tree::{
        exclude::Excludes,
        holes, identity,
        read::{self, Content},
        scan::{self, Found, Verdict},
    },
};

/// Paths that are named in the log of the program when they are left out. A tree that is hostile may have millions.
const MOST_NAMED: usize = 100;

/// What changed.
pub struct Changes {
    /// Paths that are new, changed or gone.
    pub count: u64,
    /// About the bytes that they take in a tar stream.
    pub bytes: u64,
    /// What the tree still needs of each layer.
    pub layers: Vec<Size>,
    /// The file systems' clock when the walk began.
    pub started: i64,
    /// Something changed in that tick of the clock or later: before it was found or after, nobody can tell.
    pub is_racy: bool,
    /// How long the walk took.
    pub took: Duration,
    pub skipped: Skipped,
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

    fn join(&mut self, other: Self) {
        self.count += other.count;
        self.named.extend(other.named);
    }

    /// The attributes of an entry; none, where they cannot be read or are too many.
    pub fn attributes(&mut self, of: impl AsFd, entry: &Entry) -> BTreeMap<String, Vec<u8>> {
        read::xattrs(of).unwrap_or_else(|_| {
            self.add(&entry.path, "only its attributes: too many, or unreadable");
            BTreeMap::new()
        })
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

/// Compares the tree with an index of a snapshot that has these layers. `log` is an empty file.
pub fn scan(
    root: &Path,
    excludes: &Excludes,
    known: Known,
    layers: &[Layer],
    racy: Racy,
    log: File,
    capture: Option<Capture>,
) -> Result<Changes, Stop> {
    let begun = Instant::now();
    let sizes = layers.iter().map(|layer| Size {
        whole: layer.raw_size,
        live: 0,
    });
    let mut scan = Scan {
        racy,
        known,
        reader: identity::current(),
        changes: Changes {
            count: 0,
            bytes: 0,
            layers: sizes.collect(),
            started: file_clock()?,
            is_racy: false,
            took: Duration::ZERO,
            skipped: Skipped::default(),
            log: None,
            captured: None,
        },
        log_file: Some(log),
        log: None,
        capture,
        captured: 0,
    };
    let mut skipped = Skipped::default();
    let visit = |found: Found<'_>| scan.visit(found);
    scan::walk(root, excludes, visit, |path, reason| {
        skipped.add(path, reason);
    })?;
    while let Some(gone) = scan.known.rest()? {
        scan.gone(&gone)?;
    }
    let mut changes = scan.changes;
    if let Some(log) = scan.log {
        let file = log.finish().map_err(Error::local("write", LOG))?;
        changes.log = Some(Spool::new(file));
    }
    changes.captured = scan.capture.map(|capture| Spool::new(capture.file));
    changes.skipped.join(skipped);
    changes.took = begun.elapsed();
    Ok(changes)
}

/// What errors call the two working files.
const LOG: &str = "the log of what changed in RUNTIME_STATE";
const CAPTURED: &str = "the captured files in RUNTIME_STATE";

struct Scan {
    racy: Racy,
    known: Known,
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

impl Scan {
    fn visit(&mut self, found: Found<'_>) -> Result<Verdict, Stop> {
        if let Some(capture) = &self.capture
            && Instant::now() >= capture.until
        {
            return Err(Stop::Late);
        }
        while let Some(gone) = self.known.before(&found.entry.path)? {
            self.gone(&gone)?;
        }
        let changed_at = found.entry.stamp.map(|stamp| stamp.ctime);
        self.changes.is_racy |= changed_at.is_some_and(|at| at >= self.changes.started);
        let known = self.known.at(&found.entry.path)?;
        if let Some(known) = &known
            && !is_changed(&found, known, self.known.started, self.racy)
        {
            self.keep(known);
            // Its content has to be written again, and it must be that of now.
            let is_taken = |capture: &Capture| {
                let decides = known.layers.last();
                decides.is_some_and(|layer| capture.taken[*layer as usize])
            };
            if !self.capture.as_ref().is_some_and(is_taken) {
                return Ok(Verdict::Taken);
            }
            return self.note(found);
        }
        let bytes = found.allocated.min(found.entry.size);
        let verdict = self.note(found)?;
        match (verdict, known) {
            (Verdict::Taken, _) => self.change(bytes),
            // As if it were not there: an older layer must not fill in for it.
            (Verdict::Skipped, Some(known)) => self.gone(&known)?,
            (Verdict::Skipped, None) => {}
        }
        Ok(verdict)
    }

    /// Logs what was found, with all that can be known of it now.
    fn note(&mut self, found: Found<'_>) -> Result<Verdict, Stop> {
        let mut entry = found.entry;
        match (entry.kind, &mut self.capture) {
            (Kind::File, Some(capture)) => {
                let Ok(Some(content)) = read::open(found.parent, found.name) else {
                    return Ok(Verdict::Skipped);
                };
                // What is recorded is the file that was opened, not the one that was listed.
                entry = scan::entry(&entry.path, Kind::File, content.status());
                entry.xattrs = self.changes.skipped.attributes(content.file(), &entry);
                entry.extents = capture.take(&entry, &content, self.captured)?;
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
                    && !matches!(read::open(found.parent, found.name), Ok(Some(_)))
                {
                    return Ok(Verdict::Skipped);
                }
            }
            (Kind::Dir, _) => {
                if let Some(directory) = found.directory {
                    entry.xattrs = self.changes.skipped.attributes(directory, &entry);
                }
            }
            (Kind::Symlink | Kind::Hardlink | Kind::Deleted, _) => {}
        }
        self.append(&entry)?;
        Ok(Verdict::Taken)
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

    fn change(&mut self, data: u64) {
        self.changes.count += 1;
        self.changes.bytes = self.changes.bytes.saturating_add(weight(data));
    }

    fn gone(&mut self, known: &Entry) -> Result<(), Stop> {
        if known.kind == Kind::Deleted {
            self.keep(known);
            return Ok(());
        }
        self.change(0);
        Ok(self.append(&Entry::deleted(known.path.clone()))?)
    }
}

impl Capture {
    /// Copies a file's data behind those that are there; gives their extents.
    fn take(&mut self, entry: &Entry, content: &Content, at: u64) -> Result<Extents, Stop> {
        let Self { file, until, .. } = self;
        content.data().read(
            |source| Stop::Failed(Error::local("read", entry.display())(source)),
            |bytes| {
                if Instant::now() >= *until {
                    return Err(Stop::Late);
                }
                Ok(file
                    .write_all(bytes)
                    .map_err(Error::local("write", CAPTURED))?)
            },
        )?;
        Ok(extents(content.data().runs(), entry.size, at))
    }
}
