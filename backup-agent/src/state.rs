//! What the runtime remembers between runs, in a directory that only it can read: which snapshot the tree was last equal
//! to, the index of that snapshot, the head as last seen, and the lock that keeps two runs apart.
//!
//! All of it can be lost: the next backup is then a whole one, and the next restore downloads everything.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, Metadata, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use nix::{errno::Errno, libc};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::{
    archive::spool::Spool,
    config::{Config, is_open, is_trusted},
    error::Error,
    local_index::fine_clock,
    log,
    snapshot::{
        head::{Head, Seen},
        id,
        record::{Consistency, Layer},
        sealed,
    },
    tree::{
        identity::{Identity, with_identity},
        miss::Unread,
        root::RootId,
        staging,
        swap::Settled,
    },
};

/// The remembered facts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Facts {
    /// The store and instance that this is about.
    pub place: String,
    /// In whose name snapshots are written.
    pub writer: Option<String>,
    /// The head as it was when it was last ours.
    pub head: Option<Head>,
    pub etag: Option<String>,
    /// The snapshot that the index describes.
    pub snapshot: Option<Described>,
    /// The directory that carries on from that.
    pub root: Option<RootId>,
    /// The file systems' clock when the index of the snapshot had been made. It may have been set back since.
    pub ended: i64,
    /// Another writer took the head; only a restore changes that.
    pub is_fenced: bool,
    /// The store was found to honour conditional writes.
    pub is_store_trusted: bool,
    /// A restore has begun to replace the root, and nobody has said that it is whole again.
    pub is_root_unfinished: bool,
    /// Inodes of files that processes could change at the last look without the kernel setting a time.
    pub unseen: HashSet<u64>,
    /// The fork that was written because the tree had shrunk; the next backup confirms it.
    pub shrunken: Option<String>,
    /// What a backup that ran out of time has brought to the store.
    pub part: Option<Part>,
    /// Backups that ran out of time before anything of them could be kept, since the last one that ended well.
    pub late_tries: u32,
    /// When the store last confirmed what is remembered of it, in seconds since 1970.
    pub confirmed: Option<i64>,
}

/// Layers that no record names yet, and what they were built on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// What the index of it is called.
    pub name: String,
    /// The snapshot that its first layers are of; none of a first backup.
    pub built_on: Option<String>,
    /// Oldest first.
    pub layers: Vec<Layer>,
}

/// One of the local indexes.
#[derive(Debug, Clone, Copy)]
pub enum Which {
    /// Of the last snapshot.
    Last,
    /// Of the snapshot that is being taken.
    UnderWay,
    /// Of what a backup that ran out of time has brought to the store.
    Part,
}

/// A snapshot in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    pub id: String,
    pub time: String,
    pub sequence: u64,
    pub files: u64,
    pub bytes: u64,
    pub skipped: u64,
    pub unread: Unread,
    pub consistency: Consistency,
    /// Why it is not of one instant.
    pub reason: Option<String>,
    pub fork: bool,
    /// Oldest first.
    pub layers: Vec<Layer>,
}

/// The state directory, locked for this process.
pub struct State {
    directory: PathBuf,
    /// The root of the tree.
    root: PathBuf,
    pub facts: Facts,
    /// [`Facts::unseen`] of this run's looks.
    seen: HashSet<u64>,
    /// The file systems' clock when this run began.
    began: i64,
    /// Why nobody knows whether the root is half of two trees.
    pub doubt: Option<Error>,
    _lock: Lock,
}

impl State {
    /// Opens the directory and waits for its lock, for as long as the caller's bound lasts.
    pub async fn open(config: &Config) -> Result<Self, Error> {
        let (directory, verb) = (config.state.clone(), config.verb);
        let mut locking = tokio::task::spawn_blocking(move || lock(&directory, verb));
        let early = timeout(PATIENCE, &mut locking).await;
        let lock = if let Ok(lock) = early {
            lock
        } else {
            if let Some(holder) = holder() {
                let fields = [("holder", holder.into())];
                log::warn("waiting for the lock of the state folder", &fields);
            }
            locking.await
        };
        let lock = lock.map_err(|_| Error::Internal("lock's thread"))??;
        let mut facts = Facts::default();
        let path = config.state.join(FACTS);
        let read = open_own(&path).and_then(|mut file| {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).map(|_| bytes)
        });
        match read {
            Ok(bytes) => match sealed::open(FACTS, &bytes) {
                Ok(known) => facts = known,
                Err(error) => log::warn(
                    "state is damaged and ignored",
                    &[("error", error.to_string().into())],
                ),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::local("read", path)(error)),
        }
        if facts.place != config.address() {
            facts = Facts {
                place: config.address(),
                // Of the tree on this disk, whatever store is in use.
                is_root_unfinished: facts.is_root_unfinished,
                ..Facts::default()
            };
        }
        let mut state = Self {
            directory: config.state.clone(),
            root: config.root.clone(),
            facts,
            seen: HashSet::new(),
            began: fine_clock()?,
            doubt: None,
            _lock: lock,
        };
        state.settle_root(config.identity).await?;
        Ok(state)
    }

    /// Ends what a restore that was killed has left half done in the root.
    async fn settle_root(&mut self, identity: Option<Identity>) -> Result<(), Error> {
        let root = self.root.clone();
        let settled = tokio::task::spawn_blocking(move || staging::settle(&root)).await;
        let was_unfinished = self.facts.is_root_unfinished;
        match settled.map_err(|_| Error::Internal("root's thread"))? {
            // Nobody knows what was done about a restore that had begun.
            Ok(Settled::Nothing) => {}
            // One tree or the other; which snapshot it equals is not known.
            Ok(Settled::Untouched | Settled::Replaced) => self.facts.is_root_unfinished = false,
            Err(error @ Error::RootHalf { .. }) => {
                log::warn(
                    "a restore that was cut short cannot be ended",
                    &[("error", error.sentence().into())],
                );
                self.facts.snapshot = None;
                self.facts.root = None;
                self.facts.is_root_unfinished = true;
            }
            // Whether there is anything to end is not known: who works on the root has to know it.
            Err(error) => {
                let doubt = match is_free(&self.root, identity, &error).await {
                    Ok(true) => return Ok(()),
                    Ok(false) => error,
                    Err(other) => other,
                };
                log::warn(
                    "cannot tell whether a restore was cut short",
                    &[("error", doubt.sentence().into())],
                );
                self.doubt = Some(doubt);
            }
        }
        if self.facts.is_root_unfinished == was_unfinished {
            Ok(())
        } else {
            self.save()
        }
    }

    /// Writes the facts down, whole or not at all.
    pub fn save(&self) -> Result<(), Error> {
        self.replace(FACTS, |mut file| file.write_all(&sealed::seal(&self.facts)))
    }

    /// Forgets what the tree was equal to. Done before the tree is replaced: a kill in the middle must not leave a word
    /// about a tree that is gone.
    pub fn forget_tree(&mut self) -> Result<(), Error> {
        self.facts.snapshot = None;
        self.facts.root = None;
        self.facts.is_root_unfinished = true;
        self.save()
    }

    /// Remembers the tree: `described` is what it equals (nothing yet, where it starts empty).
    pub fn remember_tree(
        &mut self,
        root: Option<RootId>,
        described: Option<Described>,
    ) -> Result<(), Error> {
        self.facts.root = root;
        self.facts.snapshot = described;
        self.facts.is_root_unfinished = false;
        self.facts.unseen = std::mem::take(&mut self.seen);
        self.facts.part = None;
        self.facts.shrunken = None;
        self.facts.late_tries = 0;
        self.facts.ended = self.began.max(fine_clock()?);
        self.save()?;
        // One that stays is only room: it is about a snapshot that is no base any more.
        let _ = fs::remove_file(self.directory.join(INDEX_PART));
        Ok(())
    }

    /// Takes note of a look at the tree: the directory that it was at, and the files that may change unseen. Those of the
    /// looks before are doubtful until a whole run has ended.
    pub fn saw(&mut self, unseen: &HashSet<u64>, root: Option<RootId>) -> Result<(), Error> {
        if self.facts.root.is_some() && root != self.facts.root {
            let root = self.root.clone();
            return Err(Error::RootLost { root });
        }
        self.seen.extend(unseen);
        if !unseen.is_subset(&self.facts.unseen) {
            self.facts.unseen.extend(unseen);
            self.save()?;
        }
        Ok(())
    }

    /// The same tree as before: what this run did not see is not doubtful any more.
    pub fn settle(&mut self) -> Result<(), Error> {
        let known = self.facts.clone();
        self.facts.unseen = std::mem::take(&mut self.seen);
        self.facts.shrunken = None;
        if self.facts == known {
            Ok(())
        } else {
            self.save()
        }
    }

    /// Keeps what a backup that runs out of time has brought to the store, and the index under way as its index.
    pub fn keep_part(&mut self, part: Part) -> Result<(), Error> {
        let from = self.directory.join(INDEX_UNDER_WAY);
        fs::rename(&from, self.directory.join(INDEX_PART)).map_err(Error::local("rename", from))?;
        self.facts.part = Some(part);
        // What has fitted once may fit twice as large.
        self.facts.late_tries = self.facts.late_tries.saturating_sub(1);
        self.facts.ended = self.began.max(fine_clock()?);
        self.save()
    }

    /// The latest time that files can have of the walks of the indexes, as far as that is known.
    pub fn ended(&self) -> i64 {
        self.facts.ended.max(self.began)
    }

    /// Whether the store was asked within the last hour whether it has what is remembered of it.
    pub fn is_confirmed(&self) -> bool {
        /// A store that was wiped, or taken over by another writer, must not go unnoticed for longer.
        const LONGEST: i64 = 3600;

        let age = self
            .facts
            .confirmed
            .map(|at| Timestamp::now().as_second() - at);
        age.is_some_and(|age| (0..LONGEST).contains(&age))
    }

    /// Whether the root is the very directory that carries on from what was last seen.
    pub fn is_root_known(&self, root: &Path) -> Result<bool, Error> {
        Ok(self.doubt.is_none()
            && self.facts.root.is_some()
            && self.facts.root == RootId::at(root)?)
    }

    /// An empty file for an index under way. Whoever still reads an earlier one goes on reading that.
    pub fn index_under_way(&self) -> Result<File, Error> {
        self.scratch(INDEX_UNDER_WAY)
    }

    /// Makes the index under way the index of the last snapshot.
    pub fn keep_index(&self) -> Result<(), Error> {
        let from = self.directory.join(INDEX_UNDER_WAY);
        fs::rename(&from, self.directory.join(INDEX)).map_err(Error::local("rename", from))
    }

    /// An empty working file that is made now: what had its name, a link to somewhere perhaps, is neither followed nor kept.
    fn scratch(&self, name: &str) -> Result<File, Error> {
        let path = self.directory.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::local("remove", path)(error))
            }
            _ => private()
                .create_new(true)
                .open(&path)
                .map_err(Error::local("write", path)),
        }
    }

    /// A working file that nobody else sees: it has no name any more.
    pub fn nameless(&self) -> Result<File, Error> {
        let file = self.scratch("scratch.new")?;
        let path = self.directory.join("scratch.new");
        fs::remove_file(&path).map_err(Error::local("remove", path))?;
        Ok(file)
    }

    /// Removes the working files of runs that were killed; gives their number. Whoever holds the lock has none.
    pub fn sweep(&self) -> io::Result<u64> {
        let mut removed = 0;
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "new") {
                fs::remove_file(path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The index of a snapshot to compare the tree with: the last one, or the one under way.
    pub fn index(&self, which: Which) -> Result<Option<Spool>, Error> {
        let name = match which {
            Which::Last => INDEX,
            Which::UnderWay => INDEX_UNDER_WAY,
            Which::Part => INDEX_PART,
        };
        let path = self.directory.join(name);
        match open_own(&path) {
            Ok(file) => Ok(Some(Spool::new(file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::local("read", path)(error)),
        }
    }

    fn replace(&self, name: &str, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), Error> {
        let path = self.directory.join(name);
        let new = format!("{name}.new");
        let made = self.scratch(&new)?;
        fill(&made)
            .and_then(|()| made.sync_all())
            .and_then(|()| fs::rename(self.directory.join(new), &path))
            .map_err(Error::local("write", path))
    }
}

/// Whether a root that its owner alone may enter has no working directory of a restore, as its owner sees it: root may be
/// without the right to look (NFS, a container without `DAC_OVERRIDE`).
async fn is_free(root: &Path, identity: Option<Identity>, error: &Error) -> Result<bool, Error> {
    let inside = root.join(staging::INSIDE);
    let is_refused = matches!(error, Error::Local { source, path, .. }
        if *path == inside && source.kind() == io::ErrorKind::PermissionDenied);
    if identity.is_none() || !is_refused {
        return Ok(false);
    }
    let look = move || fs::symlink_metadata(inside).map(drop);
    let found = with_identity(identity, "look", look).await?;
    Ok(found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound))
}

const FACTS: &str = "state.json";
const INDEX: &str = "index";
const INDEX_UNDER_WAY: &str = "index.new";
const INDEX_PART: &str = "index.part";

/// How long a run waits for the lock without a word.
const PATIENCE: Duration = Duration::from_secs(1);

/// The lock that this run waits for.
static AWAITED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Never by a link, and without waiting for the other end of a pipe.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

/// Opens a file that an earlier run made.
fn open_own(path: &Path) -> io::Result<File> {
    let file = private().open(path)?;
    let status = file.metadata()?;
    if status.is_file() && is_trusted(status.uid()) {
        Ok(file)
    } else {
        Err(io::Error::other(
            "another user made it, or it is no plain file; see what it is, and remove it",
        ))
    }
}

/// The lock, which says whose it is for as long as it is held.
struct Lock(File);

impl Lock {
    /// For a person who waits; on a full disk nobody learns it. A file that has another name, too, is left as it is.
    fn write(&self, text: &str) {
        if self.0.metadata().is_ok_and(|status| status.nlink() == 1) {
            let mut file = &self.0;
            let _ = file
                .set_len(0)
                .and_then(|()| file.write_all(text.as_bytes()));
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // After a kill it stays, and is replaced by the next one's.
        self.write("");
    }
}

fn lock(directory: &Path, verb: &str) -> Result<Lock, Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(Error::local("make", directory))?;
    // The settings were looked at a moment ago; it may have been made by somebody else since.
    let status = fs::symlink_metadata(directory).map_err(Error::local("look at", directory))?;
    if !is_private(&status) {
        return Err(Error::local("trust", directory)(Errno::EPERM));
    }
    let path = directory.join("lock");
    let taken = private().create(true).open(&path).and_then(|_| {
        let file = open_own(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                await_lock(Some(path.clone()));
                file.lock()?;
                await_lock(None);
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        Ok(file)
    });
    let lock = Lock(taken.map_err(Error::local("lock", path))?);
    let pid = std::process::id();
    lock.write(&format!("pid {pid}, {verb}, since {}\n", id::now().1));
    Ok(lock)
}

fn is_private(status: &Metadata) -> bool {
    status.is_dir() && is_trusted(status.uid()) && !is_open(status.mode())
}

fn await_lock(path: Option<PathBuf>) {
    *AWAITED.lock().unwrap_or_else(PoisonError::into_inner) = path;
}

/// Which lock this run waits for, and who holds it, in words; `None` when it waits for none. Whoever could write into the file
/// may have made up what is in it, so only words are taken, and few.
pub fn holder() -> Option<String> {
    const LONGEST: u64 = 100;

    let awaited = AWAITED.lock().unwrap_or_else(PoisonError::into_inner);
    let path = awaited.as_ref()?;
    let mut bytes = Vec::new();
    // What cannot be read is another run all the same.
    let _ = open_own(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes));
    let is_word = |c: &char| c.is_ascii_alphanumeric() || " ,:.-".contains(*c);
    let text: String = bytes.into_iter().map(char::from).filter(is_word).collect();
    let who = if text.is_empty() {
        "another run"
    } else {
        &text
    };
    Some(format!("{} is held by {who}", path.display()))
}

impl Facts {
    /// The head as last seen, in the form that a swap compares.
    pub fn seen(&self) -> Option<Seen> {
        Some(Seen {
            head: self.head.clone()?,
            etag: self.etag.clone()?,
        })
    }

    /// Remembers the head as ours.
    pub fn hold(&mut self, seen: Seen) {
        self.head = Some(seen.head);
        self.etag = Some(seen.etag);
        self.is_fenced = false;
    }

    /// Remembers that the store has just now been found to have all that it should.
    pub fn confirm(&mut self) {
        self.confirmed = Some(Timestamp::now().as_second());
    }
}
