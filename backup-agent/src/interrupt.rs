//! Runs a command within its time bound and stops it on SIGINT, SIGTERM and SIGHUP.
//!
//! Stopping is safe anywhere, because nothing on the store is visible before the head moves. What is left is tidied here:
//! an upload in parts that was not completed is aborted, within [`TIDY`]. Only the swap of a restored tree is not cut off
//! (see [`Finality`]).

use std::{
    os::unix::net::UnixStream,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ},
    flag,
    low_level::pipe,
};
use tokio::{io::AsyncReadExt, sync::Notify, time::timeout};

use crate::{
    cli::Verb,
    commands::{self, Answer},
    config::Config,
    error::Error,
    state,
};

/// Time for tidying after the bound ran out: short, because the caller's patience is over already.
const TIDY: Duration = Duration::from_millis(500);

/// Time for ending what cannot be undone any more. A runtime kills its agent 5 s after it asked it to stop.
const LAST: Duration = Duration::from_secs(4);

/// The part of a verb that a bound or a signal does not cut off: from its point of no return on, the answer has to say what
/// was done.
#[derive(Default)]
pub struct Finality {
    is_reached: AtomicBool,
    hurry: Notify,
}

impl Finality {
    /// From now on a bound or a signal only shortens what is left.
    pub fn reach(&self) {
        self.is_reached.store(true, Ordering::Relaxed);
    }

    /// Does some work that may be left out when a bound or a signal came; `None`: it was.
    pub async fn unless_hurried<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = work => Some(done),
            () = self.hurry.notified() => {
                // For whatever is left to do after this.
                self.hurry.notify_one();
                None
            }
        }
    }
}

/// Runs the verb to its end, its bound or a signal, whichever is first.
pub fn bounded(config: &Config, verb: &Verb) -> Result<Answer, Error> {
    let bound = config.bound(verb);
    let left = match verb {
        Verb::Prune { .. } => "every snapshot that is left is whole, and the next prune goes on",
        // Of a part of a snapshot, no other run goes on.
        Verb::Restore(options) if options.paths.is_empty() && !options.dry_run => {
            "the tree is what it was before, and the next restore goes on from what was unpacked"
        }
        _ => "the store holds what it held before",
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::local("start", "the event loop"))?;
    let store = crate::store::open(config, bound)?;
    let last = Finality::default();
    let result: Result<_, Error> = runtime.block_on(async {
        let signals = signal_pipe()?;
        let mut work = pin!(commands::run(config, &store, verb, &last));
        let stop = async {
            match timeout(bound, signals).await {
                Ok(signal) => Error::Interrupted {
                    signal,
                    left: left.to_owned(),
                },
                Err(_) => Error::Timeout {
                    after: bound,
                    left: match state::holder() {
                        Some(holder) => {
                            format!("{holder}: wait for that run to end, or end it; {left}")
                        }
                        None => format!("{left}; {}", longer(verb)),
                    },
                },
            }
        };
        let result = tokio::select! {
            result = &mut work => result,
            stopped = stop => if last.is_reached.load(Ordering::Relaxed) {
                last.hurry.notify_one();
                let ended = timeout(LAST, work).await;
                ended.unwrap_or_else(|_| Err(in_the_middle(stopped)))
            } else {
                Err(stopped)
            },
        };
        if result.is_err() {
            let _ = timeout(TIDY, store.abort_uploads()).await;
        }
        Ok(result)
    });
    // A thread that is stuck in the kernel (a dead network file system) must not hold the exit.
    runtime.shutdown_background();
    result?
}

/// The error of a run that is stuck after its point of no return.
fn in_the_middle(mut stopped: Error) -> Error {
    let middle = "the tree is being replaced: the next backup, restore, verify or prune ends that"
        .to_owned();
    if let Error::Timeout { left, .. } | Error::Interrupted { left, .. } = &mut stopped {
        *left = middle;
    }
    stopped
}

/// How to give a verb more time.
pub fn longer(verb: &Verb) -> String {
    let setting = match verb {
        Verb::Backup(_) | Verb::Prune { .. } => "RUNTIME_BACKUP_TIMEOUT",
        _ => "RUNTIME_RESTORE_TIMEOUT",
    };
    format!("make {setting} (or --timeout) longer")
}

/// A future of the first signal that asks to stop.
fn signal_pipe() -> Result<impl Future<Output = i32>, Error> {
    let failed = || Error::local("watch", "signals");
    // Without a handler a write beyond the limit of a file's size ends the program, and not the write.
    flag::register(SIGXFSZ, Arc::default()).map_err(failed())?;
    let (receiver, sender) = UnixStream::pair().map_err(failed())?;
    receiver.set_nonblocking(true).map_err(failed())?;
    let mut receiver = tokio::net::UnixStream::from_std(receiver).map_err(failed())?;
    let seen: [(i32, Arc<AtomicBool>); 3] =
        [SIGINT, SIGTERM, SIGHUP].map(|signal| (signal, Arc::default()));
    for (signal, is_seen) in &seen {
        let sender = sender.try_clone().map_err(failed())?;
        flag::register(*signal, is_seen.clone())
            .and_then(|_| pipe::register(*signal, sender))
            .map_err(failed())?;
    }
    Ok(async move {
        let mut byte = [0];
        // It ends only with the program.
        let _ = receiver.read(&mut byte).await;
        let first = seen
            .iter()
            .find(|(_, is_seen)| is_seen.load(Ordering::Relaxed));
        first.map_or(SIGTERM, |(signal, _)| *signal)
    })
}
