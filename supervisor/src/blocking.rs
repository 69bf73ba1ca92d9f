//! System calls that may hang in the kernel, such as those on a dead disk: each on a thread of its own, awaited within a bound.
//!
//! Invariants: the event loop never waits for a disk; at most `MAX_THREADS` threads hang at once, and further calls fail at once.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

/// Each has a stack of its own, and a hung one keeps it.
const MAX_THREADS: usize = 8;
const STACK: usize = 256 * 1024;

static THREADS: AtomicUsize = AtomicUsize::new(0);

/// A call without its types: there is one copy of the machinery for all calls.
type Work = Box<dyn FnOnce() + Send>;

type Shared<T> = Arc<Mutex<Option<T>>>;

/// Runs `call` on a thread. A call that takes longer than `limit` goes on, and its result is dropped.
///
/// # Errors
/// `TimedOut` after `limit`, or when too many calls hang already; what the kernel says when it gives no thread.
pub async fn within<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (work, result) = without_types(call);
    run(limit, work).await?;
    take(&result)
}

/// Likewise before there is an event loop.
///
/// # Errors
/// As `within`.
pub fn within_now<T: Send + 'static>(
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let (work, result) = without_types(call);
    run_now(limit, work)?;
    take(&result)
}

fn without_types<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
) -> (Work, Shared<T>) {
    let result = Shared::default();
    let filled = Shared::clone(&result);
    let work = move || {
        let found = call();
        *filled.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    };
    (Box::new(work), result)
}

fn take<T>(result: &Shared<T>) -> io::Result<T> {
    let mut result = result.lock().unwrap_or_else(PoisonError::into_inner);
    let bug = || io::Error::other("a bug in the runtime ended the call");
    result.take().ok_or_else(bug)
}

async fn run(limit: Duration, work: Work) -> io::Result<()> {
    let (sender, receiver) = oneshot::channel::<()>();
    start(work, move || drop(sender))?;
    // Its sender is dropped when the call has ended.
    match timeout(limit, receiver).await {
        Ok(_) => Ok(()),
        Err(_) => Err(hung()),
    }
}

fn run_now(limit: Duration, work: Work) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel::<()>();
    start(work, move || drop(sender))?;
    match receiver.recv_timeout(limit) {
        Err(mpsc::RecvTimeoutError::Timeout) => Err(hung()),
        _ => Ok(()),
    }
}

fn start(work: Work, done: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let place = Place::take().ok_or_else(hung)?;
    let thread = thread::Builder::new().stack_size(STACK);
    let started = thread.spawn(move || {
        work();
        drop(place);
        done();
    });
    started.map(drop)
}

fn hung() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        "the disk does not answer: check the file system below it",
    )
}

/// One of the `MAX_THREADS`; given back when the call has ended.
struct Place;

impl Place {
    fn take() -> Option<Self> {
        let add = |count| (count < MAX_THREADS).then_some(count + 1);
        let taken = THREADS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
        taken.is_ok().then(|| Self)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        THREADS.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_millis(1);
    const LATE: Duration = Duration::from_mins(1);

    #[tokio::test]
    async fn calls_that_hang_are_given_up_and_at_most_so_many_hang() {
        let kind = |result: io::Result<bool>| result.map_err(|error| error.kind());
        assert_eq!(kind(within(LATE, || true).await), Ok(true));
        let mut senders = Vec::new();
        for _ in 0..MAX_THREADS {
            let (sender, receiver) = mpsc::channel::<()>();
            let hung = within(SOON, move || receiver.recv().is_ok()).await;
            assert_eq!(kind(hung), Err(io::ErrorKind::TimedOut));
            senders.push(sender);
        }
        let refused = within(LATE, || panic!("there is no thread for it")).await;
        assert_eq!(kind(refused), Err(io::ErrorKind::TimedOut));
        drop(senders);
        while THREADS.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
        assert_eq!(kind(within(LATE, || true).await), Ok(true));
    }
}
