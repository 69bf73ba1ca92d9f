//! Our standard error: log lines, and what children write to theirs.
//!
//! Invariant: nobody who reads it slowly, or not at all, holds PID 1 or a child up. Whatever finds it full is lost.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::time::sleep;

use crate::log::log;

/// Written and passed on at most this much at once: a pipe takes it whole or not at all (`PIPE_BUF`, pipe(7)).
const PIECE: usize = 4096;

/// How long what a child writes waits for room. Meanwhile its own pipe takes 64 KiB more.
const PATIENCE: u32 = 100;
const PAUSE: Duration = Duration::from_millis(10);

/// Kept of what a child has written.
const TAIL: usize = 4096;

/// Writes without waiting; whether there was room.
pub fn write(bytes: &[u8]) -> bool {
    let written = |mut file: &File| {
        bytes
            .chunks(PIECE)
            .all(|piece| file.write_all(piece).is_ok())
    };
    if let Some(pipe) = own_pipe() {
        return written(pipe);
    }
    let stderr = io::stderr();
    let mut wanted = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let is_ready = poll(&mut wanted, PollTimeout::ZERO) != Ok(0);
    is_ready && stderr.lock().write_all(bytes).is_ok()
}

/// A pipe is opened anew, so that not waiting is a property of ours and not of everybody's who shares it.
fn own_pipe() -> Option<&'static File> {
    static PIPE: OnceLock<Option<File>> = OnceLock::new();
    let open = || {
        let path = "/proc/self/fd/2";
        let is_pipe = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(libc::O_NONBLOCK);
        is_pipe.then(|| options.open(path).ok()).flatten()
    };
    PIPE.get_or_init(open).as_ref()
}

/// Passes on what comes out of a child's standard error, by whole lines where they are not too long. `take` sees each one
/// first, and says whether it is to be passed on.
pub async fn relay(mut pipe: pipe::Receiver, mut take: impl FnMut(&[u8]) -> bool) {
    let mut buffer = Box::new([0; PIECE]);
    let (mut held, mut lost) = (0, 0);
    while let Ok(count @ 1..) = pipe.read(&mut buffer[held..]).await {
        held += count;
        let end = buffer[..held].iter().rposition(|byte| *byte == b'\n');
        let whole = end.map_or(if held == PIECE { held } else { 0 }, |end| end + 1);
        pass_lines(&buffer[..whole], &mut take, &mut lost).await;
        buffer.copy_within(whole..held, 0);
        held -= whole;
    }
    pass_lines(&buffer[..held], &mut take, &mut lost).await;
}

async fn pass_lines(lines: &[u8], take: &mut impl FnMut(&[u8]) -> bool, lost: &mut usize) {
    let mut passed = Vec::new();
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        if take(line) {
            passed.extend_from_slice(line);
        }
    }
    if !passed.is_empty() {
        pass(&passed, lost).await;
    }
}

/// Once something was lost, nothing waits again until there is room.
async fn pass(bytes: &[u8], lost: &mut usize) {
    let patience = if *lost == 0 { PATIENCE } else { 0 };
    for _ in 0..patience {
        if write(bytes) {
            return;
        }
        sleep(PAUSE).await;
    }
    if write(bytes) {
        log!(Warn, "standard error was full", lost_bytes = *lost);
        *lost = 0;
    } else {
        *lost += bytes.len();
    }
}

/// The end of what children wrote, shared with whoever shows it.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<Vec<u8>>>);

impl Tail {
    pub fn add(&self, text: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = &text[text.len().saturating_sub(TAIL)..];
        let surplus = (kept.len() + text.len()).saturating_sub(TAIL);
        kept.drain(..surplus);
        kept.extend_from_slice(text);
    }

    /// And whether something was before it.
    pub fn get(&self) -> (Vec<u8>, bool) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.clone(), kept.len() == TAIL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_end_of_what_was_written() {
        let tail = Tail::default();
        assert_eq!(tail.get(), (Vec::new(), false));
        tail.add(b"first\n");
        assert_eq!(tail.get(), (b"first\n".to_vec(), false));
        let line = [b'x'; 1000];
        for _ in 0..5 {
            tail.add(&line);
        }
        tail.add(b"last\n");
        let (text, is_cut) = tail.get();
        assert!(is_cut && text.len() == TAIL && text.ends_with(b"xlast\n"));
        tail.add(&[b'y'; 3 * TAIL]);
        assert_eq!(tail.get(), (vec![b'y'; TAIL], true));
    }
}
