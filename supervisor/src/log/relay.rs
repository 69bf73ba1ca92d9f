//! Passes on what a child writes into a pipe, line by line.
//!
//! Invariants: the pipe is always read, so no child waits for whoever reads our log longer than for a moment; memory is bounded
//! however long a line is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{sleep, timeout};

use super::sink::{Piece, Sink, Source};
use super::{log, shape};

/// Read at once. A longer line takes more room, up to `LONGEST`, and is passed on in parts from there on.
const READ: usize = 4096;
const LONGEST: usize = 16 * 1024;

/// How long what a child writes waits for room, so that a reader who is slow makes the child slow instead of losing lines.
const PATIENCE: Duration = Duration::from_secs(1);

/// Likewise once something was lost: the reader has stopped. Bounds what reading for nobody costs.
const LITTLE_PATIENCE: Duration = Duration::from_millis(1);

/// Whoever writes this much without a pause waits for one: a flood takes a small part of a processor, and none of our time.
const BURST: usize = 32 * 1024;
const PAUSE: Duration = Duration::from_millis(1);

/// Nothing comes for so long: the pipe is empty.
const SILENCE: Duration = Duration::from_millis(1);

/// The largest pipe that the gateway's user may make. Whoever writes more after the end of its process does not stop.
const LAST: usize = 1024 * 1024;

/// A child's pipe being passed on. Dropped, it ends once the pipe is empty, whoever else could still write into it.
pub struct Relay {
    task: JoinHandle<()>,
    end: oneshot::Sender<()>,
}

impl Relay {
    /// `take` sees each line, or part of a long one, first, and says whether it is to be passed on.
    pub fn start(
        pipe: pipe::Receiver,
        source: Source,
        sink: &'static Sink,
        take: impl FnMut(&[u8]) -> bool + Send + 'static,
    ) -> Self {
        static PIPES: AtomicU64 = AtomicU64::new(1);

        let (end, ended) = oneshot::channel();
        let passing = Passing {
            source,
            pipe: PIPES.fetch_add(1, Ordering::Relaxed),
            sink,
            take,
            is_inside: false,
            is_blank: false,
            is_losing: false,
        };
        let task = tokio::spawn(passing.run(pipe, ended));
        Self { task, end }
    }

    /// Waits until what was written is passed on, for `limit` at most.
    pub async fn finish(self, limit: Duration) {
        drop(self.end);
        let _ = timeout(limit, self.task).await;
    }
}

struct Passing<T> {
    source: Source,
    pipe: u64,
    sink: &'static Sink,
    take: T,
    /// The next piece goes on with a line of which a part was passed on.
    is_inside: bool,
    /// That part shows nothing yet.
    is_blank: bool,
    /// The last piece was lost.
    is_losing: bool,
}

impl<T: FnMut(&[u8]) -> bool> Passing<T> {
    async fn run(mut self, mut pipe: pipe::Receiver, mut ended: oneshot::Receiver<()>) {
        let mut buffer = vec![0; READ];
        let (mut held, mut burst) = (0, 0);
        // How much may still come, once the end was said.
        let mut left = None;
        loop {
            let count = tokio::select! {
                biased;
                read = pipe.read(&mut buffer[held..]) => read.unwrap_or_default(),
                _ = &mut ended, if left.is_none() => {
                    left = Some(LAST);
                    continue;
                }
                () = sleep(SILENCE), if left.is_some() => 0,
            };
            held += count;
            left = left.map(|left: usize| left.saturating_sub(count));
            let is_last = count == 0 || left == Some(0);
            let end = buffer[..held].iter().rposition(|byte| *byte == b'\n');
            let whole = match end {
                _ if is_last => held,
                Some(end) => end + 1,
                None if held == LONGEST => held,
                None => 0,
            };
            if whole > 0 {
                self.pass(&buffer[..whole], is_last).await;
            }
            if is_last {
                return;
            }
            buffer.copy_within(whole..held, 0);
            held -= whole;
            if held == buffer.len() {
                buffer.resize((2 * held).min(LONGEST), 0);
            } else if held < READ {
                buffer.truncate(READ);
                buffer.shrink_to_fit();
            }
            burst += count;
            if burst < BURST {
                yield_now().await;
            } else {
                sleep(PAUSE).await;
                burst = 0;
            }
        }
    }

    async fn pass(&mut self, text: &[u8], is_last: bool) {
        let piece = self.piece(text, is_last);
        if piece.text.is_empty() {
            return;
        }
        let patience = if self.is_losing {
            LITTLE_PATIENCE
        } else {
            PATIENCE
        };
        let passed = self.sink.push_within(piece, patience).await;
        if let Err(piece) = &passed {
            self.sink.lose(piece);
            if !self.is_losing {
                log!(
                    Warn,
                    "nobody reads the log: lines are being lost",
                    stream = self.sink.name()
                );
            }
        }
        self.is_losing = passed.is_err();
    }

    fn piece(&mut self, text: &[u8], is_last: bool) -> Piece {
        let mut piece = Piece {
            source: self.source,
            pipe: self.pipe,
            is_fresh: !self.is_inside || self.is_losing,
            is_like_ours: false,
            text: Vec::with_capacity(text.len()),
        };
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            let is_inside = std::mem::replace(&mut self.is_inside, !line.ends_with(b"\n"));
            let was_blank = std::mem::take(&mut self.is_blank);
            if !(self.take)(line) {
                continue;
            }
            if self.source == Source::Agent {
                piece.text.extend_from_slice(line);
                continue;
            }
            let is_cut = self.is_inside && !is_last;
            self.is_blank = is_cut && shape::is_blank_at_end(line);
            let start = piece.text.len();
            let is_like_ours = shape::mark(line, is_cut, &mut piece.text);
            // Where a line may or may not begin, whoever writes it knows.
            if is_like_ours && start == 0 && !(is_inside && was_blank) {
                piece.is_like_ours = true;
            } else if is_like_ours {
                piece.text.splice(start..start, shape::MARK.iter().copied());
            }
        }
        piece
    }
}
