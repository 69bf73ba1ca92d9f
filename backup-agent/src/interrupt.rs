//! Runs a command within its time bound and stops it on SIGINT and SIGTERM.
//!
//! Stopping is safe anywhere, because nothing on the store is visible before the head moves. What is left is tidied here:
//! an upload in parts that was not completed is aborted, within [`TIDY`].

use std::{os::unix::net::UnixStream, time::Duration};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    low_level::pipe,
};
use tokio::{io::AsyncReadExt, time::timeout};

use crate::{
    cli::Verb,
    commands::{self, Answer},
    config::Config,
    error::Error,
    state,
};

/// Time for tidying after the bound ran out: short, because the caller's patience is over already.
const TIDY: Duration = Duration::from_millis(500);

/// Runs the verb to its end, its bound or a signal, whichever is first.
pub fn bounded(config: &Config, verb: &Verb) -> Result<Answer, Error> {
    let bound = config.bound(verb);
    let left = match verb {
        Verb::Prune { .. } => "every snapshot that is left is whole, and the next prune goes on",
        _ => "the store holds what it held before",
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::local("start", "the event loop"))?;
    let store = crate::store::open(config, bound)?;
    let result: Result<_, Error> = runtime.block_on(async {
        let signals = signal_pipe()?;
        let work = async {
            tokio::select! {
                result = commands::run(config, &store, verb) => result,
                signal = signals => Err(Error::Interrupted { signal, left }),
            }
        };
        let result = match timeout(bound, work).await {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                after: bound,
                left: match state::holder() {
                    Some(holder) => {
                        format!("{holder}: wait for that run to end, or end it; {left}")
                    }
                    None => format!("{left}; {}", longer(verb)),
                },
            }),
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
    let watch = |signal| -> Result<tokio::net::UnixStream, std::io::Error> {
        let (receiver, sender) = UnixStream::pair()?;
        pipe::register(signal, sender)?;
        receiver.set_nonblocking(true)?;
        tokio::net::UnixStream::from_std(receiver)
    };
    let failed = || Error::local("watch", "signals");
    let mut int = watch(SIGINT).map_err(failed())?;
    let mut term = watch(SIGTERM).map_err(failed())?;
    Ok(async move {
        let (mut a, mut b) = ([0], [0]);
        tokio::select! {
            _ = int.read(&mut a) => SIGINT,
            _ = term.read(&mut b) => SIGTERM,
        }
    })
}
