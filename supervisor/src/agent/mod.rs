//! One run of the backup agent: a program of its own, so that whatever happens to it, nothing happens to PID 1.
//!
//! In: a verb, the settings in a cleared environment. Out: one JSON object and an exit code, of which `outcome` makes sense.
//! The agent bounds its own time; here is only the backstop for one that hangs.

pub mod check;
mod outcome;
mod report;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::config::Config;
use crate::reaper::{Exit, Reaper, pid};
use crate::stderr;
use outcome::judge;
pub use outcome::{Failure, Outcome, code};
pub use report::Report;

/// How much longer than its own bound the agent may take.
const BACKSTOP: Duration = Duration::from_secs(10);

/// From SIGTERM to SIGKILL: it has to abort an upload and clean up.
const GRACE: Duration = Duration::from_secs(5);

/// A prune has a line for each snapshot: thousands, on a store that was never pruned.
const MAX_OUTPUT: u64 = 1024 * 1024;

/// Nothing moves when no line about it comes.
const STALLED_AFTER: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Restore,
    Backup,
    /// A snapshot that leaves the head alone.
    Fork,
    /// Removes what the retention policy does not keep.
    Prune,
}

impl Verb {
    /// Who asks for a backup is told what the store has now, not what it had an hour ago.
    fn arguments(self, is_asked: bool) -> &'static [&'static str] {
        match (self, is_asked) {
            (Self::Restore, _) => &["restore", "--json"],
            (Self::Backup, false) => &["backup", "--json"],
            (Self::Backup, true) => &["backup", "--confirm", "--json"],
            (Self::Fork, false) => &["backup", "--fork", "--json"],
            (Self::Fork, true) => &["backup", "--fork", "--confirm", "--json"],
            (Self::Prune, _) => &["prune", "--json"],
        }
    }
}

/// How far a run has come, from the lines that the agent logs about it: at most one a second, none in a short run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    done: u64,
    total: u64,
    rate: u64,
    at: Instant,
}

impl Progress {
    /// A line of the agent's log, when it is such a line.
    fn read(line: &[u8]) -> Option<Self> {
        const MARK: &[u8] = br#""msg":"progress""#;
        line.windows(MARK.len()).find(|part| *part == MARK)?;
        let line: Value = serde_json::from_slice(line).ok()?;
        let number = |name: &str| line[name].as_u64();
        Some(Self {
            done: number("doneBytes")?,
            total: number("totalBytes")?,
            rate: number("bytesPerSecond")?,
            at: Instant::now(),
        })
    }

    pub fn render(self) -> Value {
        let rate = if self.at.elapsed() < STALLED_AFTER {
            self.rate
        } else {
            0
        };
        json!({ "doneBytes": self.done, "totalBytes": self.total, "bytesPerSecond": rate })
    }
}

/// A run under way: its process, and how to cut it short.
pub struct Run {
    pub pid: Option<Pid>,
    pub cancel: Option<oneshot::Sender<()>>,
}

/// The agent is the one that was built and shipped with us, never one from a `PATH`.
pub fn executable() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("backup-agent"))
}

/// Starts a run, which somebody asked for or waits for, or nobody; `tell` is called with how far it is, `done` with its outcome.
pub fn start(
    config: &Config,
    reaper: &Reaper,
    executable: &PathBuf,
    verb: Verb,
    is_asked: bool,
    tell: impl Fn(Progress) + Send + 'static,
    done: impl FnOnce(Outcome) + Send + 'static,
) -> Run {
    let mut command = Command::new(executable);
    command
        .args(verb.arguments(is_asked))
        .env_clear()
        .envs(
            config
                .agent_environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .stdin(Stdio::inherit())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal is for us to handle.
        .process_group(0);
    let limit = BACKSTOP
        + match verb {
            Verb::Restore => config.restore_timeout,
            Verb::Backup | Verb::Fork | Verb::Prune => config.backup_timeout,
        };
    let (cancel, cancelled) = oneshot::channel();
    let (reaper, secrets) = (reaper.clone(), config.secrets.clone());
    let started = reaper.spawn(&mut command).and_then(|(mut child, exit)| {
        let pid = pid(&child);
        let output = child.stdout.take().expect("was asked to be piped");
        let errors = child.stderr.take().expect("was asked to be piped");
        let receiver = |end: OwnedFd| pipe::Receiver::from_owned_fd(end);
        Ok((
            pid,
            exit,
            receiver(output.into())?,
            receiver(errors.into())?,
        ))
    });
    match started {
        Ok((pid, exit, output, errors)) => {
            tokio::spawn(async move {
                let reading = tokio::spawn(read(output));
                let mut relaying = tokio::spawn(stderr::relay(errors, move |line| {
                    let progress = Progress::read(line);
                    progress.map(&tell).is_none()
                }));
                let (exit, is_late) = supervise(&reaper, pid, exit, cancelled, limit).await;
                // The pipes may outlive the agent when something of its own holds them; its answer does not.
                let text = timeout(Duration::from_secs(1), reading).await;
                let text = text.ok().and_then(Result::ok).unwrap_or_default();
                if timeout(Duration::from_secs(1), &mut relaying)
                    .await
                    .is_err()
                {
                    relaying.abort();
                }
                done(judge(exit, is_late, &text).map_err(|mut failure| {
                    failure.error = secrets.scrub(&failure.error);
                    failure
                }));
            });
            Run {
                pid: Some(pid),
                cancel: Some(cancel),
            }
        }
        Err(error) => {
            let error = format!("cannot execute backup-agent: {}", error.kind());
            // From a task, like every other outcome: the caller has not noted the run yet.
            let failure = Failure {
                code: 1,
                error,
                word: None,
            };
            tokio::spawn(async move { done(Err(failure)) });
            Run {
                pid: None,
                cancel: None,
            }
        }
    }
}

async fn read(output: pipe::Receiver) -> Vec<u8> {
    let mut text = Vec::new();
    let mut bounded = output.take(MAX_OUTPUT);
    let _ = bounded.read_to_end(&mut text).await;
    // What is too much is still taken, or the agent would block on a full pipe until the backstop.
    let _ = tokio::io::copy(&mut bounded.into_inner(), &mut tokio::io::sink()).await;
    text
}

/// Waits for the exit, and enforces it when cancelled or late.
async fn supervise(
    reaper: &Reaper,
    pid: Pid,
    mut exit: oneshot::Receiver<Exit>,
    cancelled: oneshot::Receiver<()>,
    limit: Duration,
) -> (Exit, bool) {
    const LOST: &str = "the reaper hands over every exit before it forgets the child";
    let deadline = Instant::now() + limit;
    let mut is_late = false;
    tokio::select! {
        exit = &mut exit => return (exit.expect(LOST), is_late),
        Ok(()) = cancelled => {}
        () = sleep_until(deadline) => is_late = true,
    }
    reaper.signal(pid, Signal::SIGTERM);
    tokio::select! {
        exit = &mut exit => return (exit.expect(LOST), is_late),
        () = sleep(GRACE) => {}
    }
    reaper.signal(pid, Signal::SIGKILL);
    (exit.await.expect(LOST), is_late)
}
