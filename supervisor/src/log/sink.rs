//! Standard output and standard error: each is written by a thread of its own, from two bounded queues.
//!
//! Invariants: nobody waits for whoever reads them; our own lines go before those of children; every line begins where no other
//! one is unfinished. What finds its queue full, or cannot be written, is lost, counted, and said as soon as a write succeeds.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use nix::unistd;
use tokio::sync::Notify;

use super::log;
use super::shape::MARK;

/// Waiting at most: some hundreds of our lines, and of children's less than a pipe takes, as they can wait in theirs.
const OURS: usize = 64 * 1024;
const OTHERS: usize = 32 * 1024;

/// The longest line that tells of a loss, with what it takes beside its text.
const LINE: usize = 512;

/// What a piece takes beside its text.
const OVERHEAD: usize = 128;

/// After a write that failed.
const PAUSE: Duration = Duration::from_millis(10);

/// Between two looks at a disk that is full.
const FULL: Duration = Duration::from_millis(100);

const STACK: usize = 64 * 1024;

/// Who wrote a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Supervisor,
    Gateway,
    Agent,
}

/// Whole lines, or a part of one that is very long.
#[derive(Debug)]
pub struct Piece {
    pub source: Source,
    /// Of the pipe that it came from: a part goes on with the line of the part before.
    pub pipe: u64,
    /// It goes on with nothing that was written before.
    pub is_fresh: bool,
    /// Its beginning could be taken for a line of ours where it begins a line.
    pub is_like_ours: bool,
    pub text: Vec<u8>,
}

impl Piece {
    pub fn ours(text: String) -> Self {
        Self {
            source: Source::Supervisor,
            pipe: 0,
            is_fresh: true,
            is_like_ours: false,
            text: text.into_bytes(),
        }
    }

    fn size(&self) -> usize {
        self.text.len() + OVERHEAD
    }
}

pub struct Sink {
    stream: Stream,
    state: Mutex<State>,
    /// Of something to write, and of having written.
    changed: Condvar,
    /// For the event loop: there is room in the queue of the children.
    room: Notify,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Output,
    Error,
}

struct State {
    ours: Queue,
    others: Queue,
    lost: Lost,
    has_thread: bool,
    is_writing: bool,
}

struct Queue {
    pieces: VecDeque<Piece>,
    size: usize,
    limit: usize,
}

/// Bytes that nobody will read, by who wrote them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lost {
    ours: usize,
    gateway: usize,
    agent: usize,
    /// Of the last write that failed; without one there was no room.
    reason: Option<Errno>,
}

static OUTPUT: Sink = Sink::new(Stream::Output);
static ERROR: Sink = Sink::new(Stream::Error);

/// Where our own lines go.
pub fn stderr() -> &'static Sink {
    &ERROR
}

/// The same one when both are one file, as at a terminal: two threads would write into each other's lines.
pub fn stdout() -> &'static Sink {
    static IS_ONE: OnceLock<bool> = OnceLock::new();
    let is_one = IS_ONE.get_or_init(|| {
        let (output, error) = (fstat(io::stdout()), fstat(io::stderr()));
        let file = |found: nix::sys::stat::FileStat| (found.st_dev, found.st_ino);
        matches!((output, error), (Ok(output), Ok(error)) if file(output) == file(error))
    });
    if *is_one { &ERROR } else { &OUTPUT }
}

/// Waits until everything is written, for `limit` at most.
pub fn flush(limit: Duration) {
    let deadline = Instant::now() + limit;
    for sink in [&OUTPUT, &ERROR] {
        sink.flush(deadline);
    }
}

impl Sink {
    const fn new(stream: Stream) -> Self {
        Self {
            stream,
            state: Mutex::new(State {
                ours: Queue::new(OURS),
                others: Queue::new(OTHERS),
                lost: Lost {
                    ours: 0,
                    gateway: 0,
                    agent: 0,
                    reason: None,
                },
                has_thread: false,
                is_writing: false,
            }),
            changed: Condvar::new(),
            room: Notify::const_new(),
        }
    }

    pub fn name(&self) -> &'static str {
        match self.stream {
            Stream::Output => "standard output",
            Stream::Error => "standard error",
        }
    }

    /// Leaves a piece to be written, or has it counted as lost.
    pub fn push(&'static self, piece: Piece) {
        if let Err(piece) = self.try_push(piece) {
            self.lose(&piece);
        }
    }

    /// Likewise, once there is room; gives the piece back when there is none for `patience`.
    pub async fn push_within(
        &'static self,
        mut piece: Piece,
        patience: Duration,
    ) -> Result<(), Piece> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            // From here on no call is missed.
            let room = self.room.notified();
            piece = match self.try_push(piece) {
                Ok(()) => return Ok(()),
                Err(piece) => piece,
            };
            if tokio::time::timeout_at(deadline, room).await.is_err() {
                return Err(piece);
            }
        }
    }

    pub fn lose(&self, piece: &Piece) {
        self.state().lost.add(piece);
    }

    fn try_push(&'static self, piece: Piece) -> Result<(), Piece> {
        let mut state = self.state();
        let queue = match piece.source {
            Source::Supervisor => &mut state.ours,
            Source::Gateway | Source::Agent => &mut state.others,
        };
        queue.push(piece)?;
        // Where the kernel gives no thread now, the next piece tries again.
        if !state.has_thread {
            let thread = thread::Builder::new().stack_size(STACK);
            state.has_thread = thread.spawn(|| self.write_all()).is_ok();
        }
        self.changed.notify_all();
        Ok(())
    }

    fn flush(&self, deadline: Instant) {
        let mut state = self.state();
        while state.is_writing || state.ours.size + state.others.size > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What the thread does, for ever.
    fn write_all(&self) {
        let mut seam = Seam::default();
        loop {
            let piece = self.next();
            let text = seam.join(&piece);
            let (written, error) = self.write(&text);
            seam.end(&piece, &text, written);
            match error {
                None => self.tell_lost(),
                Some(error) => {
                    let mut state = self.state();
                    state.lost.add(&piece);
                    state.lost.reason = Some(error);
                    drop(state);
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    fn next(&self) -> Piece {
        let mut state = self.state();
        loop {
            let state_now = &mut *state;
            let next = state_now.ours.pop().or_else(|| state_now.others.pop());
            state.is_writing = next.is_some();
            self.changed.notify_all();
            if let Some(piece) = next {
                self.room.notify_waiters();
                return piece;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Writes as much as can be written, however long it takes.
    fn write(&self, text: &[u8]) -> (usize, Option<Errno>) {
        let full = |error| self.state().lost.reason = Some(error);
        match self.stream {
            Stream::Output => write_to(&io::stdout(), text, full),
            Stream::Error => write_to(&io::stderr(), text, full),
        }
    }

    fn tell_lost(&self) {
        let lost = {
            let mut state = self.state();
            let count = state.lost.ours + state.lost.gateway + state.lost.agent;
            // Without room for the line itself the count waits.
            if count == 0 || state.ours.size + LINE > OURS {
                return;
            }
            std::mem::take(&mut state.lost)
        };
        let reason = lost.reason.map_or("nobody read it", Errno::desc);
        log!(
            Warn,
            "lines were lost",
            stream = self.name(),
            reason = reason,
            supervisor_bytes = lost.ours,
            gateway_bytes = lost.gateway,
            agent_bytes = lost.agent,
        );
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `full` is told of a disk without room: what is begun is ended as soon as there is some.
fn write_to(file: &impl AsFd, text: &[u8], full: impl Fn(Errno)) -> (usize, Option<Errno>) {
    let mut written = 0;
    while written < text.len() {
        match unistd::write(file, &text[written..]) {
            Ok(count) => written += count,
            Err(Errno::EINTR) => {}
            // Somebody who shares the file has set it to that.
            Err(Errno::EAGAIN) => {
                let mut wanted = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut wanted, PollTimeout::NONE);
            }
            Err(error @ (Errno::ENOSPC | Errno::EDQUOT)) => {
                full(error);
                thread::sleep(FULL);
            }
            Err(error) => return (written, Some(error)),
        }
    }
    (written, None)
}

impl Queue {
    const fn new(limit: usize) -> Self {
        Self {
            pieces: VecDeque::new(),
            size: 0,
            limit,
        }
    }

    /// A piece that is larger than all room there is may be there alone.
    fn push(&mut self, piece: Piece) -> Result<(), Piece> {
        if self.size > 0 && self.size + piece.size() > self.limit {
            return Err(piece);
        }
        self.size += piece.size();
        self.pieces.push_back(piece);
        Ok(())
    }

    fn pop(&mut self) -> Option<Piece> {
        let piece = self.pieces.pop_front()?;
        self.size -= piece.size();
        if self.pieces.is_empty() {
            self.pieces = VecDeque::new();
        }
        Some(piece)
    }
}

impl Lost {
    fn add(&mut self, piece: &Piece) {
        let sum = match piece.source {
            Source::Supervisor => &mut self.ours,
            Source::Gateway => &mut self.gateway,
            Source::Agent => &mut self.agent,
        };
        *sum += piece.text.len();
    }
}

/// Where one piece follows another.
#[derive(Default)]
struct Seam {
    /// The pipe whose line is unfinished.
    unfinished: Option<u64>,
}

/// Of a line that nothing goes on with, as its rest is lost.
const NOBODY: u64 = u64::MAX;

impl Seam {
    /// The text that is written for a piece.
    fn join<'a>(&self, piece: &'a Piece) -> std::borrow::Cow<'a, [u8]> {
        let goes_on = !piece.is_fresh && self.unfinished == Some(piece.pipe);
        let begins: &[u8] = if goes_on || self.unfinished.is_none() {
            b""
        } else {
            b"\n"
        };
        let mark: &[u8] = if piece.is_like_ours && !goes_on {
            MARK
        } else {
            b""
        };
        if begins.is_empty() && mark.is_empty() {
            (&piece.text).into()
        } else {
            [begins, mark, &piece.text].concat().into()
        }
    }

    fn end(&mut self, piece: &Piece, text: &[u8], written: usize) {
        let is_whole = written == text.len();
        self.unfinished = match text[..written].last() {
            Some(b'\n') => None,
            Some(_) if is_whole => Some(piece.pipe),
            Some(_) => Some(NOBODY),
            None => self
                .unfinished
                .map(|pipe| if is_whole { pipe } else { NOBODY }),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: usize = usize::MAX;

    fn piece(pipe: u64, is_fresh: bool, is_like_ours: bool, text: &str) -> Piece {
        Piece {
            source: Source::Gateway,
            pipe,
            is_fresh,
            is_like_ours,
            text: text.into(),
        }
    }

    /// What is written of pieces, each of which so many bytes are written of.
    fn join(pieces: &[(Piece, usize)]) -> String {
        let mut seam = Seam::default();
        let mut all = Vec::new();
        for (piece, count) in pieces {
            let text = seam.join(piece);
            let count = text.len().min(*count);
            all.extend_from_slice(&text[..count]);
            seam.end(piece, &text, count);
        }
        String::from_utf8(all).expect("was text")
    }

    fn ours() -> (Piece, usize) {
        (Piece::ours("{ours}\n".to_owned()), WHOLE)
    }

    #[test]
    fn a_line_begins_where_no_other_one_is_unfinished() {
        let part = |pipe, is_fresh, text| (piece(pipe, is_fresh, false, text), WHOLE);
        for (pieces, expected) in [
            (
                vec![part(1, true, "a\nb\n"), ours(), part(1, true, "c\n")],
                "a\nb\n{ours}\nc\n",
            ),
            (
                vec![part(1, true, "long "), part(1, false, "line\n"), ours()],
                "long line\n{ours}\n",
            ),
            (
                vec![part(1, true, "long "), ours(), part(1, false, "line\n")],
                "long \n{ours}\nline\n",
            ),
            (
                vec![
                    part(1, true, "one "),
                    part(2, true, "two "),
                    part(1, false, "three"),
                ],
                "one \ntwo \nthree",
            ),
            // What was between is lost, or the pipe is that of another process.
            (
                vec![part(1, true, "long "), part(1, true, "next\n")],
                "long \nnext\n",
            ),
            (
                vec![part(1, true, "long "), part(2, false, "next\n")],
                "long \nnext\n",
            ),
            (
                vec![part(1, true, "x"), part(1, false, ""), part(1, false, "y")],
                "xy",
            ),
        ] {
            assert_eq!(join(&pieces), expected);
        }
    }

    #[test]
    fn a_part_of_a_line_is_marked_where_it_begins_one() {
        let part = |is_fresh, text| (piece(1, is_fresh, true, text), WHOLE);
        for (pieces, expected) in [
            (vec![part(true, "{a}\n")], "gateway: {a}\n"),
            (
                vec![part(true, "{a"), part(false, "{b}\n")],
                "gateway: {a{b}\n",
            ),
            (
                vec![part(true, "{a"), ours(), part(false, "{b}\n")],
                "gateway: {a\n{ours}\ngateway: {b}\n",
            ),
        ] {
            assert_eq!(join(&pieces), expected);
        }
    }

    #[test]
    fn what_follows_a_write_that_failed_halfway_begins_a_line() {
        let part = |is_fresh, text, count| (piece(1, is_fresh, false, text), count);
        for (pieces, expected) in [
            (
                vec![(Piece::ours("{ours}\n".to_owned()), 3), ours()],
                "{ou\n{ours}\n",
            ),
            (
                vec![
                    part(true, "a", WHOLE),
                    part(false, "bcd", 1),
                    part(false, "e", WHOLE),
                ],
                "ab\ne",
            ),
            (
                vec![
                    part(true, "a", WHOLE),
                    part(false, "bcd", 0),
                    part(false, "e", WHOLE),
                ],
                "a\ne",
            ),
            (
                vec![part(true, "a\n", WHOLE), part(true, "b", 0), ours()],
                "a\n{ours}\n",
            ),
        ] {
            assert_eq!(join(&pieces), expected);
        }
    }

    #[test]
    fn a_queue_is_bounded_by_what_it_takes_and_takes_one_piece_of_any_size() {
        let mut queue = Queue::new(OTHERS);
        let mut count = 0;
        while queue.push(piece(1, true, false, "\n")).is_ok() {
            count += 1;
        }
        assert_eq!(count, OTHERS / (OVERHEAD + 1));
        while queue.pop().is_some() {
            count -= 1;
        }
        assert_eq!((count, queue.size), (0, 0));
        let large = "x".repeat(2 * OTHERS);
        assert!(queue.push(piece(1, true, false, &large)).is_ok());
        assert!(queue.push(piece(1, true, false, "x")).is_err());
    }
}
