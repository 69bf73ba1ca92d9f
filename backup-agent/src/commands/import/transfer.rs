//! Brings the files: several at once over the network, each in pieces, one thread that writes them.

use std::{
    cell::RefCell,
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use hyper::body::Bytes;
use nix::sys::{stat::futimens, time::TimeSpec};
use tokio::{
    sync::mpsc,
    task::{JoinSet, LocalSet},
};

use super::layout::{Planned, refuse};
use crate::{error::Error, store::Store};

/// Files on their way at once: as many as the old tool took.
const PARALLEL: usize = 16;
/// Bytes of one file on their way: with all of them a fraction of the smallest container's memory.
const PIECE: u64 = 2 << 20;

/// Some bytes of a file under way.
pub struct Piece {
    path: PathBuf,
    offset: u64,
    bytes: Bytes,
    /// With the last piece: the file's time, where it is known.
    modified: Option<i64>,
    is_directory: bool,
}

/// Brings every file, several at once.
pub async fn fetch_all(
    source: &Arc<dyn Store>,
    from: &Arc<str>,
    plan: Vec<Planned>,
    sender: mpsc::Sender<Piece>,
) -> Result<(), Error> {
    let queue = Rc::new(RefCell::new(plan.into_iter()));
    let (local, mut workers) = (LocalSet::new(), JoinSet::new());
    for _ in 0..PARALLEL {
        let (source, from) = (source.clone(), from.clone());
        let (queue, sender) = (queue.clone(), sender.clone());
        let work = async move {
            loop {
                let Some(file) = queue.borrow_mut().next() else {
                    return Ok(());
                };
                fetch(source.as_ref(), &from, file, &sender).await?;
            }
        };
        workers.spawn_local_on(work, &local);
    }
    drop(sender);
    let all = async {
        while let Some(done) = workers.join_next().await {
            done.map_err(|_| Error::Internal("download"))??;
        }
        Ok(())
    };
    local.run_until(all).await
}

async fn fetch(
    source: &dyn Store,
    from: &str,
    file: Planned,
    sender: &mpsc::Sender<Piece>,
) -> Result<(), Error> {
    let is_directory = file.is_directory();
    let Planned {
        object,
        path,
        content,
    } = file;
    let place = || format!("{from}/{}", object.key);
    let piece = |offset, bytes, modified| Piece {
        path: path.clone(),
        offset,
        bytes,
        modified,
        is_directory,
    };
    let is_own = content.is_none();
    let mut at = 0;
    // Nobody takes a piece any more when the writer has failed, and it says why.
    while is_own && at < object.size {
        let length = PIECE.min(object.size - at);
        let read = source
            .get_range(
                &object.key,
                at,
                usize::try_from(length).unwrap_or(usize::MAX),
            )
            .await;
        let bytes = read.map_err(Error::store("read", place()))?;
        if sender.send(piece(at, bytes, None)).await.is_err() {
            return Ok(());
        }
        at += length;
    }
    let mut modified = None;
    if !is_directory {
        let (tag, time) = source
            .stat(&object.key)
            .await
            .map_err(Error::store("read", place()))?;
        if tag != object.tag {
            return Err(refuse(
                &object.key,
                "it was changed while it was read; stop the old gateway and its copying, then import again",
            ));
        }
        modified = time;
    }
    let _ = sender
        .send(piece(at, content.unwrap_or_default(), modified))
        .await;
    Ok(())
}

/// Writes what comes, on a thread with the gateway user's rights. Modes are the gateway's own: S3 has kept none.
pub fn write(home: &Path, mut pieces: mpsc::Receiver<Piece>) -> Result<(), Error> {
    while let Some(piece) = pieces.blocking_recv() {
        let path = home.join(&piece.path);
        let directory = if piece.is_directory {
            Some(&*path)
        } else {
            path.parent()
        };
        let directory = directory.unwrap_or(home);
        let mut private = DirBuilder::new();
        private
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(Error::local("make", directory))?;
        if !piece.is_directory {
            write_piece(&path, &piece).map_err(Error::local("write", &path))?;
        }
    }
    Ok(())
}

fn write_piece(path: &Path, piece: &Piece) -> io::Result<()> {
    let mut private = OpenOptions::new();
    let file: File = private
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)?;
    file.write_all_at(&piece.bytes, piece.offset)?;
    if let Some(nanos) = piece.modified {
        let time = TimeSpec::new(
            nanos.div_euclid(1_000_000_000),
            nanos.rem_euclid(1_000_000_000),
        );
        futimens(&file, &time, &time)?;
    }
    Ok(())
}
