//! One run of the backup agent: a program of its own, so that whatever happens to it, nothing happens to PID 1.
//!
//! In: a verb, the settings in a cleared environment. Out: one JSON object and an exit code, of which `outcome` makes sense.
//! The agent bounds its own time; here is only the backstop for one that hangs.

pub mod check;
mod outcome;
mod report;

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{Pid, setpgid};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::config::Config;
use crate::log::{self, Relay, Source, log};
use crate::reaper::{Child, Exit, Reaper, Side};
use crate::spawn::{self, ParentEnds, Program};
use outcome::judge;
pub use outcome::{Failure, Outcome, code};
pub use report::Report;

/// How much longer than its own bound the agent may take.
const BACKSTOP: Duration = Duration::from_secs(10);

/// From SIGTERM to SIGKILL: it has to abort an upload and clean up.
const GRACE: Duration = Duration::from_secs(5);

/// From SIGKILL to the end. What takes longer hangs in the kernel.
const KILL_TIME_LIMIT: Duration = Duration::from_secs(5);

/// A run that shows no progress for so long is worth a line, and further ones each time that this has doubled.
const SILENCE: Duration = Duration::from_secs(10);

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

/// A line of the agent's log with this message.
fn logged(line: &[u8], message: &str) -> Option<Value> {
    let mark = format!(r#""msg":"{message}""#);
    line.windows(mark.len())
        .find(|part| *part == mark.as_bytes())?;
    serde_json::from_slice(line).ok()
}

/// The sentence of a line that says that the store is silent.
fn waiting(line: &[u8]) -> Option<String> {
    let line = logged(line, "the store does not answer")?;
    let (host, seconds) = (line["host"].as_str()?, line["silentSeconds"].as_u64()?);
    Some(format!("the store {host} has not answered for {seconds} s"))
}

impl Progress {
    /// A line of the agent's log, when it is such a line.
    fn read(line: &[u8]) -> Option<Self> {
        let line = logged(line, "progress")?;
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

/// What there is to say of a run before it ends, and of its process afterwards.
#[derive(Clone, Debug)]
pub enum News {
    Progress(Progress),
    /// A sentence: what it waits for.
    Waiting(String),
    /// SIGKILL does not end the process.
    Stuck(Pid),
    /// A process that was stuck has ended.
    Gone,
}

/// A run under way, and how to cut it short.
pub struct Run {
    pub cancel: Option<oneshot::Sender<()>>,
}

/// The agent is the one that was built and shipped with us, never one from a `PATH`.
pub fn executable() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("backup-agent"))
}

/// Starts a run, which somebody asked for or waits for, or nobody; `tell` is called with its news, `done` with its outcome.
pub fn start(
    config: &Config,
    reaper: &Reaper,
    executable: &Path,
    verb: Verb,
    is_asked: bool,
    tell: impl Fn(News) + Clone + Send + Sync + 'static,
    done: impl FnOnce(Outcome) + Send + 'static,
) -> Run {
    let arguments = verb.arguments(is_asked).iter().map(OsStr::new);
    // Ctrl-C in a terminal is for us to handle.
    let setup = Box::new(|_: &mut u8| setpgid(Pid::from_raw(0), Pid::from_raw(0)));
    let program = executable.as_os_str();
    let started = Program::new(program, arguments, &config.agent_environment, setup)
        .and_then(|program| reaper.spawn(&program, Side::Runtime));
    let (child, ends) = match started {
        Ok(started) => started,
        Err(error) => {
            let failure = not_executed(&error.to_string());
            // From a task, like every other outcome: the caller has not noted the run yet.
            tokio::spawn(async move { done(Err(failure)) });
            return Run { cancel: None };
        }
    };
    let limit = BACKSTOP
        + match verb {
            Verb::Restore => config.restore_timeout,
            Verb::Backup | Verb::Fork | Verb::Prune => config.backup_timeout,
        };
    let (cancel, cancelled) = oneshot::channel();
    let (reaper, secrets) = (reaper.clone(), config.secrets.clone());
    let run = Run {
        cancel: Some(cancel),
    };
    tokio::spawn(async move {
        let outcome = attend(&reaper, child, ends, cancelled, limit, tell).await;
        done(outcome.map_err(|mut failure| {
            failure.error = secrets.scrub(&failure.error);
            failure
        }));
    });
    run
}

/// From the start of a process to its end, or to where there is no more use in waiting.
async fn attend(
    reaper: &Reaper,
    mut child: Child,
    ends: ParentEnds,
    cancelled: oneshot::Receiver<()>,
    limit: Duration,
    tell: impl Fn(News) + Clone + Send + Sync + 'static,
) -> Outcome {
    let told = tell.clone();
    let reading = tokio::spawn(read(ends.stdout));
    let (heard, last_heard) = watch::channel(Instant::now());
    let relay = Relay::start(ends.stderr, Source::Agent, log::stderr(), move |line| {
        heard.send_replace(Instant::now());
        if let Some(waiting) = waiting(line) {
            told(News::Waiting(waiting));
        }
        let progress = Progress::read(line);
        progress
            .map(|progress| told(News::Progress(progress)))
            .is_none()
    });
    let pid = child.pid;
    let ended = tokio::select! {
        ended = supervise(reaper, &mut child, cancelled, limit) => ended,
        never = watch_silence(pid, last_heard, &tell) => match never {},
    };
    let Some((exit, is_late)) = ended else {
        reading.abort();
        drop(relay);
        tell(News::Stuck(child.pid));
        tokio::spawn(async move {
            let _ = child.exit.await;
            tell(News::Gone);
        });
        return Err(Failure::stuck(child.pid));
    };
    // The pipes may outlive the agent when something of its own holds them; its answer does not.
    let text = timeout(Duration::from_secs(1), reading).await;
    let text = text.ok().and_then(Result::ok).unwrap_or_default();
    relay.finish(Duration::from_secs(1)).await;
    if let Some(failure) = spawn::Failure::read(&text) {
        return Err(not_executed(failure.error.desc()));
    }
    judge(exit, is_late, &text)
}

/// Says when the agent says nothing: it may hang on a disk, of which it cannot tell.
async fn watch_silence(
    pid: Pid,
    last_heard: watch::Receiver<Instant>,
    tell: &impl Fn(News),
) -> Infallible {
    let mut silence = SILENCE;
    loop {
        let heard = *last_heard.borrow();
        sleep_until(heard + silence).await;
        if *last_heard.borrow() != heard {
            silence = SILENCE;
            continue;
        }
        let seconds = silence.as_secs();
        log!(
            Warn,
            "the backup-agent shows no progress: it may wait for a disk, the store or another run",
            pid = pid.as_raw(),
            silent_s = seconds
        );
        tell(News::Waiting(format!(
            "backup-agent (process {pid}) has shown no progress for {seconds} s: it may wait for a disk, the store or another run"
        )));
        silence *= 2;
    }
}

fn not_executed(reason: &str) -> Failure {
    Failure {
        code: 1,
        error: format!("cannot execute backup-agent: {reason}"),
        word: None,
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

/// Waits for the exit, and enforces it when cancelled or late. None: the process does not end.
async fn supervise(
    reaper: &Reaper,
    child: &mut Child,
    cancelled: oneshot::Receiver<()>,
    limit: Duration,
) -> Option<(Exit, bool)> {
    const LOST: &str = "the reaper hands over every exit before it forgets the child";
    let deadline = Instant::now() + limit;
    let mut is_late = false;
    tokio::select! {
        exit = &mut child.exit => return Some((exit.expect(LOST), is_late)),
        Ok(()) = cancelled => {}
        () = sleep_until(deadline) => is_late = true,
    }
    for (signal, time_limit) in [(Signal::SIGTERM, GRACE), (Signal::SIGKILL, KILL_TIME_LIMIT)] {
        reaper.signal(child.pid, signal);
        if let Ok(exit) = timeout(time_limit, &mut child.exit).await {
            return Some((exit.expect(LOST), is_late));
        }
    }
    None
}
