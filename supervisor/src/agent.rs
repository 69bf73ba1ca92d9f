//! One run of the backup agent: a program of its own, so that whatever happens to it, nothing happens to PID 1.
//!
//! In: a verb, the settings in a cleared environment. Out: one JSON object and an exit code. The agent bounds its own time;
//! here is only the backstop for one that hangs.

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

/// How much longer than its own bound the agent may take.
const BACKSTOP: Duration = Duration::from_secs(10);

/// From SIGTERM to SIGKILL: it has to abort an upload and clean up.
const GRACE: Duration = Duration::from_secs(5);

/// A prune has a line for each snapshot: thousands, on a store that was never pruned.
const MAX_OUTPUT: u64 = 1024 * 1024;

/// Nothing moves when no line about it comes.
const STALLED_AFTER: Duration = Duration::from_secs(5);

pub mod code {
    pub const NO_SNAPSHOT: i32 = 10;
    pub const FENCED: i32 = 12;
    pub const UNREACHABLE: i32 = 75;
    pub const TIMEOUT: i32 = 124;
    pub const INTERRUPTED: i32 = 143;
}

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
    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Restore => &["restore", "--json"],
            Self::Backup => &["backup", "--json"],
            Self::Fork => &["backup", "--fork", "--json"],
            Self::Prune => &["prune", "--json"],
        }
    }
}

/// A run that failed: the exit code of the contract, and a sentence without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub code: i32,
    pub error: String,
}

pub type Outcome = Result<Value, Failure>;

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

/// Starts a run; `tell` is called with how far it is, `done` with its outcome.
pub fn start(
    config: &Config,
    reaper: &Reaper,
    executable: &PathBuf,
    verb: Verb,
    tell: impl Fn(Progress) + Send + 'static,
    done: impl FnOnce(Outcome) + Send + 'static,
) -> Run {
    let mut command = Command::new(executable);
    command
        .args(verb.arguments())
        .env_clear()
        .envs(
            config
                .agent_environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .stdin(Stdio::null())
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
            tokio::spawn(async move { done(Err(Failure { code: 1, error })) });
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

fn judge(exit: Exit, is_late: bool, output: &[u8]) -> Outcome {
    let answer: Option<Value> = serde_json::from_slice(output).ok().filter(Value::is_object);
    let failure = |code, error: &str| {
        let error = error.to_owned();
        Err(Failure { code, error })
    };
    if is_late {
        return failure(
            code::TIMEOUT,
            "backup-agent did not end within its time and was stopped",
        );
    }
    match (exit.code, answer) {
        (Some(0), Some(answer)) => Ok(answer),
        (Some(0), None) => failure(1, "backup-agent did not answer with a JSON object"),
        (Some(code), answer) => {
            let sentence = answer.as_ref().and_then(|answer| answer["error"].as_str());
            match sentence {
                Some(sentence) => failure(code, sentence),
                None => failure(code, &format!("backup-agent ended with exit code {code}")),
            }
        }
        (None, _) => {
            let signal = exit.signal_name().unwrap_or_default();
            failure(
                128 + exit.signal.unwrap_or_default(),
                &format!("backup-agent was killed by {signal}"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ended(code: i32) -> Exit {
        Exit {
            code: Some(code),
            signal: None,
        }
    }

    #[test]
    fn an_outcome_is_read_from_exit_code_and_answer() {
        let killed = Exit {
            code: None,
            signal: Some(9),
        };
        let ours = "backup-agent ended with exit code 75";
        for (exit, is_late, output, expected) in [
            (
                ended(75),
                false,
                r#"{"error":"no route","code":"x"}"#,
                (75, "no route"),
            ),
            (ended(75), false, "", (75, ours)),
            (ended(75), false, "[1]", (75, ours)),
            (
                ended(0),
                false,
                "oops",
                (1, "backup-agent did not answer with a JSON object"),
            ),
            (
                killed,
                false,
                "",
                (137, "backup-agent was killed by SIGKILL"),
            ),
            (
                killed,
                true,
                "{}",
                (
                    124,
                    "backup-agent did not end within its time and was stopped",
                ),
            ),
        ] {
            let failure = judge(exit, is_late, output.as_bytes()).expect_err("is a failure");
            assert_eq!((failure.code, failure.error.as_str()), expected);
        }
        let answer = judge(ended(0), false, br#"{"files":3}"#).expect("is an answer");
        assert_eq!(answer["files"], 3);
    }
}
