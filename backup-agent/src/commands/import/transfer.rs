//! Brings the files: several at once over the network, each in pieces, one thread that writes them.

use std::{
    cell::RefCell,
    fs::File,
    future::poll_fn,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    task::Poll,
};

use hyper::body::Bytes;
use nix::{
    errno::Errno,
    fcntl::{OFlag, openat},
    sys::stat::{Mode, futimens, mkdirat},
};
use tokio::sync::mpsc;

use super::layout::{Planned, refuse};
use crate::{error::Error, store::Store, tree::status::time_spec};

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
    source: &dyn Store,
    from: &str,
    plan: Vec<Planned>,
    sender: mpsc::Sender<Piece>,
) -> Result<(), Error> {
    let queue = RefCell::new(plan.into_iter());
    let work = async || {
        loop {
            let Some(file) = queue.borrow_mut().next() else {
                return Ok(());
            };
            fetch(source, from, file, &sender).await?;
        }
    };
    let mut workers: Vec<_> = (0..PARALLEL).map(|_| Box::pin(work())).collect();
    // Polling all of them when one is woken costs nothing beside a request, and their error ends the others.
    poll_fn(|context| {
        let mut at = 0;
        while let Some(worker) = workers.get_mut(at) {
            match worker.as_mut().poll(context) {
                Poll::Ready(Ok(())) => drop(workers.swap_remove(at)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => at += 1,
            }
        }
        if workers.is_empty() {
            Poll::Ready(Ok(()))
        } else {
            Poll::Pending
        }
    })
    .await
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
///
/// It works below the staging directory's descriptor: once that is removed, no late piece can bring it back.
pub fn write(home: &OwnedFd, mut pieces: mpsc::Receiver<Piece>) -> Result<(), Error> {
    while let Some(piece) = pieces.blocking_recv() {
        let directory = if piece.is_directory {
            Some(&*piece.path)
        } else {
            piece.path.parent()
        };
        if piece.offset == 0 {
            make_directories(home, directory).map_err(Error::local("make", &piece.path))?;
        }
        if !piece.is_directory {
            write_piece(home, &piece).map_err(Error::local("write", &piece.path))?;
        }
    }
    Ok(())
}

fn make_directories(home: &OwnedFd, directory: Option<&Path>) -> Result<(), Errno> {
    let mut path = PathBuf::new();
    for name in directory.into_iter().flatten() {
        path.push(name);
        match mkdirat(home, &path, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_piece(home: &OwnedFd, piece: &Piece) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = openat(home, &piece.path, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    let file = File::from(fd);
    file.write_all_at(&piece.bytes, piece.offset)?;
    if let Some(nanos) = piece.modified {
        let time = time_spec(nanos);
        futimens(&file, &time, &time)?;
    }
    Ok(())
}
