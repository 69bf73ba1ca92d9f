//! What the runtime remembers between runs, in a directory that only it can read: which snapshot the tree was last equal
//! to, the index of that snapshot, the head as last seen, and the lock that keeps two runs apart.
//!
//! All of it can be lost: the next backup is then a whole one, and the next restore downloads everything.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    archive::spool::Spool,
    config::Config,
    error::Error,
    log,
    snapshot::{
        head::{Head, Seen},
        record::Layer,
        sealed,
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
    /// Another writer took the head; only a restore changes that.
    pub is_fenced: bool,
    /// The store was found to honour conditional writes.
    pub is_store_trusted: bool,
}

/// What tells a directory from another one that was made later under the same name. Inode numbers are used again at once,
/// so the time of birth counts too, where the file system knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootId {
    device: u64,
    inode: u64,
    born: i64,
}

/// One of the two local indexes.
#[derive(Debug, Clone, Copy)]
pub enum Which {
    /// Of the last snapshot.
    Last,
    /// Of the snapshot that is being taken.
    UnderWay,
}

/// A snapshot in a few words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    pub id: String,
    pub time: String,
    pub sequence: u64,
    pub files: u64,
    pub fork: bool,
    /// Oldest first.
    pub layers: Vec<Layer>,
}

/// The state directory, locked for this process.
pub struct State {
    directory: PathBuf,
    pub facts: Facts,
    _lock: File,
}

impl State {
    /// Opens the directory and waits for its lock, for as long as the caller's bound lasts.
    pub async fn open(config: &Config) -> Result<Self, Error> {
        let directory = config.state.clone();
        let lock = tokio::task::spawn_blocking(move || lock(&directory))
            .await
            .map_err(|_| Error::Internal("lock's thread"))??;
        let mut facts = Facts::default();
        let path = config.state.join(FACTS);
        match fs::read(&path) {
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
        if facts.place != config.place() {
            facts = Facts {
                place: config.place(),
                ..Facts::default()
            };
        }
        Ok(Self {
            directory: config.state.clone(),
            facts,
            _lock: lock,
        })
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
        self.save()
    }

    /// Remembers the tree: `described` is what it equals (nothing yet, where it starts empty).
    pub fn remember_tree(
        &mut self,
        root: &Path,
        described: Option<Described>,
    ) -> Result<(), Error> {
        self.facts.root = root_id(root);
        self.facts.snapshot = described;
        self.save()
    }

    /// Whether the root is the very directory that carries on from what was last seen.
    pub fn is_root_known(&self, root: &Path) -> bool {
        self.facts.root.is_some() && self.facts.root == root_id(root)
    }

    /// An empty file for an index under way. Whoever still reads an earlier one goes on reading that.
    pub fn index_under_way(&self) -> Result<File, Error> {
        let path = self.directory.join(INDEX_UNDER_WAY);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::local("remove", path)(error))
            }
            _ => self.scratch(INDEX_UNDER_WAY),
        }
    }

    /// Makes the index under way the index of the last snapshot.
    pub fn keep_index(&self) -> Result<(), Error> {
        let from = self.directory.join(INDEX_UNDER_WAY);
        fs::rename(&from, self.directory.join(INDEX)).map_err(Error::local("rename", from))
    }

    /// An empty working file of the runtime's own.
    fn scratch(&self, name: &str) -> Result<File, Error> {
        let path = self.directory.join(name);
        private(true)
            .open(&path)
            .map_err(Error::local("write", path))
    }

    /// A working file that nobody else sees: it has no name any more.
    pub fn nameless(&self) -> Result<File, Error> {
        let file = self.scratch("scratch.new")?;
        let path = self.directory.join("scratch.new");
        fs::remove_file(&path).map_err(Error::local("remove", path))?;
        Ok(file)
    }

    /// The index of a snapshot to compare the tree with: the last one, or the one under way.
    pub fn index(&self, which: Which) -> Option<Spool> {
        let name = match which {
            Which::Last => INDEX,
            Which::UnderWay => INDEX_UNDER_WAY,
        };
        File::open(self.directory.join(name)).ok().map(Spool::new)
    }

    fn replace(&self, name: &str, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<(), Error> {
        let path = self.directory.join(name);
        let new = self.directory.join(format!("{name}.new"));
        private(true)
            .open(&new)
            .and_then(|file| {
                fill(&file)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&new, &path))
            .map_err(Error::local("write", path))
    }
}

const FACTS: &str = "state.json";
const INDEX: &str = "index";
const INDEX_UNDER_WAY: &str = "index.new";

fn private(truncate: bool) -> OpenOptions {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(truncate)
        .mode(0o600);
    options
}

fn lock(directory: &Path) -> Result<File, Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(Error::local("make", directory))?;
    let path = directory.join("lock");
    private(false)
        .open(&path)
        .and_then(|file| {
            file.lock()?;
            Ok(file)
        })
        .map_err(Error::local("lock", path))
}

fn root_id(root: &Path) -> Option<RootId> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let status = statx(CWD, root, AtFlags::SYMLINK_NOFOLLOW, wanted).ok()?;
    let born = status.stx_btime;
    Some(RootId {
        device: rustix::fs::makedev(status.stx_dev_major, status.stx_dev_minor),
        inode: status.stx_ino,
        born: born.tv_sec.saturating_mul(1_000_000_000) + i64::from(born.tv_nsec),
    })
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
}
