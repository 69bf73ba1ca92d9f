//! A store in a directory: objects are files, written beside their place and renamed into it.
//!
//! Layers hold the gateway's secrets, so everything is readable by the owner only. Conditional writes compare under an
//! advisory lock, which holds between processes of one machine and on network file systems that support it; where there are
//! no locks, only an operator's word that there is one writer replaces them.

use std::{
    fs::{self, DirBuilder, DirEntry, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use hyper::body::Bytes;
use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use super::{Object, PROBE, Part, Pending, SMALL_OBJECT, Store, StoreError};
use crate::{log, snapshot::id};

/// Names that begin so are not objects: the lock and files under way.
const HIDDEN: char = '.';

/// Names that begin so are files under way, each writer's with random digits of its own.
const UNDER_WAY: &str = ".under-way-";
/// Where files under way are.
const FOLDERS: [&str; 3] = ["", "layers", "snapshots"];

/// Objects below one directory.
#[derive(Debug)]
pub struct Directory {
    base: PathBuf,
    /// Name of this process's files under way, so that they are told from another writer's.
    under_way: String,
    /// The operator says that there is one writer, so a file system without locks will do.
    is_unfenced: bool,
}

impl Directory {
    /// A store below `base`, which is made at the first write.
    pub fn new(base: PathBuf, is_unfenced: bool) -> Result<Self, io::Error> {
        Ok(Self {
            base,
            is_unfenced,
            under_way: format!("{UNDER_WAY}{}", id::random_hex::<8>()?),
        })
    }

    /// Runs file work on a thread of its own, so that a dead file system cannot hold up the time bound.
    fn blocking<'a, T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path, &str) -> Result<T, StoreError> + Send + 'static,
    ) -> Pending<'a, T> {
        let (base, under_way) = (self.base.clone(), self.under_way.clone());
        let (sender, receiver) = tokio::sync::oneshot::channel();
        // Boxed, or the compiler would make a copy of the whole task for each.
        let work: Box<dyn FnOnce() + Send> = Box::new(move || {
            // Nobody waits any more when the bound ran out.
            let _ = sender.send(work(&base, &under_way));
        });
        Box::pin(async move {
            tokio::task::spawn_blocking(work);
            receiver.await.unwrap_or(Err(StoreError::Protocol(
                "the file thread ended without a result",
            )))
        })
    }
}

impl Store for Directory {
    fn get<'a>(&'a self, key: &'a str) -> Pending<'a, (Vec<u8>, String)> {
        let key = key.to_owned();
        self.blocking(move |base, _| {
            let bytes = read_small(&base.join(key))?;
            let tag = tag(&bytes);
            Ok((bytes, tag))
        })
    }

    fn get_range<'a>(&'a self, key: &'a str, offset: u64, length: usize) -> Pending<'a, Bytes> {
        let key = key.to_owned();
        self.blocking(move |base, _| {
            let mut file = open(&base.join(key))?;
            file.seek(SeekFrom::Start(offset))?;
            let mut bytes = vec![0; length];
            file.read_exact(&mut bytes).map_err(|error| {
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    StoreError::TooShort
                } else {
                    error.into()
                }
            })?;
            Ok(bytes.into())
        })
    }

    fn put_if<'a>(
        &'a self,
        key: &'a str,
        bytes: Vec<u8>,
        expected: Option<&'a str>,
    ) -> Pending<'a, String> {
        let (key, expected) = (key.to_owned(), expected.map(str::to_owned));
        let is_unfenced = self.is_unfenced;
        self.blocking(move |base, under_way| {
            let path = base.join(key);
            make_parent(&path)?;
            let lock = private().create(true).open(base.join(".lock"))?;
            match lock.lock() {
                Err(error) if is_unsupported(&error) && !is_unfenced => {
                    return Err(StoreError::NoLocks(error));
                }
                Err(error) if !is_unsupported(&error) => return Err(error.into()),
                _ => {}
            }
            let found = match read_small(&path) {
                Ok(now) => Some(tag(&now)),
                Err(StoreError::NotFound) => None,
                Err(error) => return Err(error),
            };
            if found != expected {
                return Err(StoreError::Conflict);
            }
            let (mut file, under_way) = begin(&path, under_way)?;
            let written = file.write_all(&bytes).map_err(StoreError::from);
            if let Err(error) = written.and_then(|()| finish(&file, &under_way, &path)) {
                // A disk that is full needs the room.
                let _ = fs::remove_file(&under_way);
                return Err(error);
            }
            Ok(tag(&bytes))
        })
    }

    fn upload<'a>(&'a self, key: &'a str, mut parts: mpsc::Receiver<Part>) -> Pending<'a, ()> {
        let key = key.to_owned();
        self.blocking(move |base, under_way| {
            let path = base.join(key);
            make_parent(&path)?;
            let (mut file, under_way) = begin(&path, under_way)?;
            loop {
                let part = parts.blocking_recv().ok_or(StoreError::Abandoned)?;
                file.write_all(&part.bytes)?;
                if part.is_last {
                    return finish(&file, &under_way, &path);
                }
            }
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<String>> {
        let prefix = prefix.to_owned();
        self.blocking(move |base, _| {
            let mut names = Vec::new();
            match fs::read_dir(base.join(&prefix)) {
                Ok(entries) => {
                    for entry in entries {
                        let entry = entry?;
                        let name = entry.file_name().to_string_lossy().into_owned();
                        // Whoever reads it finds out what else it may be: it is there.
                        if !name.starts_with(HIDDEN) {
                            names.push(format!("{prefix}{name}"));
                        }
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
            Ok(names)
        })
    }

    fn walk<'a>(&'a self, prefix: &'a str) -> Pending<'a, Vec<Object>> {
        let prefix = prefix.to_owned();
        self.blocking(move |base, _| {
            let mut objects = Vec::new();
            match fs::metadata(base.join(&prefix)) {
                Ok(status) if status.is_dir() => add_all(base, prefix, &mut objects)?,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
            Ok(objects)
        })
    }

    fn stat<'a>(&'a self, key: &'a str) -> Pending<'a, (String, Option<i64>)> {
        let key = key.to_owned();
        self.blocking(move |base, _| {
            let status = fs::symlink_metadata(base.join(key)).map_err(missing)?;
            let time = status.mtime().checked_mul(1_000_000_000);
            let time = time.and_then(|time| time.checked_add(status.mtime_nsec()));
            Ok((change_tag(&status), time))
        })
    }

    fn delete<'a>(&'a self, key: &'a str) -> Pending<'a, ()> {
        let key = key.to_owned();
        self.blocking(move |base, _| match fs::remove_file(base.join(key)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        })
    }

    fn sweep(&self, before: Timestamp, _: Timestamp) -> Pending<'_, u64> {
        self.blocking(move |base, _| {
            let mut removed = 0;
            for folder in FOLDERS {
                let entries = match fs::read_dir(base.join(folder)) {
                    Ok(entries) => entries,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => return Err(error.into()),
                };
                for entry in entries {
                    let entry = entry?;
                    let name = entry.file_name();
                    let name = name.to_string_lossy();
                    let is_leftover = name.starts_with(UNDER_WAY)
                        || (folder.is_empty() && name.starts_with(PROBE));
                    // A writer that is alive writes: its file has a young time of change, or is gone by now.
                    if is_leftover && is_older(&entry, before)? {
                        fs::remove_file(entry.path())?;
                        removed += 1;
                    }
                }
            }
            Ok(removed)
        })
    }

    fn abort_uploads(&self) -> Pending<'_, ()> {
        self.blocking(move |base, under_way| {
            for folder in FOLDERS {
                let _ = fs::remove_file(base.join(folder).join(under_way));
            }
            Ok(())
        })
    }
}

fn is_older(entry: &DirEntry, before: Timestamp) -> Result<bool, io::Error> {
    match entry.metadata().and_then(|metadata| metadata.modified()) {
        Ok(time) => Ok(time < before.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Adds everything below a directory whose key is `prefix`; links and devices are left out with a warning.
fn add_all(base: &Path, prefix: String, objects: &mut Vec<Object>) -> Result<(), StoreError> {
    for entry in fs::read_dir(base.join(&prefix))? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            return Err(StoreError::Protocol("a file's name is not UTF-8"));
        };
        let status = entry.metadata()?;
        let key = format!("{prefix}{name}");
        if status.is_dir() {
            add_all(base, format!("{key}/"), objects)?;
        } else if status.is_file() {
            objects.push(Object {
                key,
                size: status.len(),
                tag: change_tag(&status),
            });
        } else {
            let reason = "it is neither a file nor a directory".into();
            log::warn(
                "entry left out",
                &[("path", key.into()), ("reason", reason)],
            );
        }
    }
    objects.push(Object {
        key: prefix,
        size: 0,
        tag: String::new(),
    });
    Ok(())
}

/// What changes with a file's content, without reading it.
fn change_tag(status: &fs::Metadata) -> String {
    format!(
        "{}-{}-{}",
        status.ino(),
        status.ctime(),
        status.ctime_nsec()
    )
}

fn missing(error: io::Error) -> StoreError {
    if error.kind() == io::ErrorKind::NotFound {
        StoreError::NotFound
    } else {
        error.into()
    }
}

/// Opens an object. Whatever else has its name is no absence, and holds nobody up.
fn open(path: &Path) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    // Else a pipe waits for its writer.
    options.read(true).custom_flags(nix::libc::O_NONBLOCK);
    let file = match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            return Err(StoreError::Protocol("it is a link that leads nowhere"));
        }
        opened => opened.map_err(missing)?,
    };
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(StoreError::Protocol("it is not a file"))
    }
}

fn read_small(path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    let limit = SMALL_OBJECT as u64 + 1;
    open(path)?.take(limit).read_to_end(&mut bytes)?;
    if bytes.len() > SMALL_OBJECT {
        return Err(StoreError::TooLong);
    }
    Ok(bytes)
}

fn tag(bytes: &[u8]) -> String {
    id::hex(&Sha256::digest(bytes))
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    // Without it, a pipe of that name waits for its reader.
    options
        .write(true)
        .mode(0o600)
        .custom_flags(nix::libc::O_NONBLOCK);
    options
}

fn make_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)?;
    Ok(())
}

fn begin(path: &Path, name: &str) -> Result<(File, PathBuf), StoreError> {
    let under_way = path.with_file_name(name);
    let file = private().create(true).truncate(true).open(&under_way)?;
    Ok((file, under_way))
}

/// Makes a file visible under its name, after its bytes are on the disk.
fn finish(file: &File, under_way: &Path, path: &Path) -> Result<(), StoreError> {
    synced(file.sync_all())?;
    fs::rename(under_way, path)?;
    let parent = File::open(path.parent().unwrap_or(Path::new("/")))?;
    Ok(synced(parent.sync_all())?)
}

/// A file system that cannot sync this at all (a directory on CIFS and some of FUSE) keeps what it has in its own way.
fn synced(result: Result<(), io::Error>) -> Result<(), io::Error> {
    result.or_else(|error| {
        if is_unsupported(&error) {
            Ok(())
        } else {
            Err(error)
        }
    })
}

/// The file system does not have this operation, whatever is asked of it.
fn is_unsupported(error: &io::Error) -> bool {
    use nix::libc::{EBADF, EINVAL, ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP};

    error.raw_os_error().is_some_and(|number| {
        [EBADF, EINVAL, ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP].contains(&number)
    })
}
