//! The one task that owns all state. Events come in, the pure parts (`gateway::state`, `backups`) decide, and this carries
//! out what they say and publishes the result.
//!
//! Nothing here waits for anything but the next event: whatever takes time is a task that sends one when it is done.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::agent::{self, Failure, Outcome, Run, Verb, code};
use crate::api::envelope::Problem;
use crate::backups::{Backups, Refusal};
use crate::clock::Moment;
use crate::config::Config;
use crate::gateway::state::{self, Action, Phase, Policy, State};
use crate::gateway::sweep::{self, Belongs};
use crate::gateway::{files, probe, process, rpc};
use crate::log::log;
use crate::reaper::{Exit, Reaper, pid};
use crate::status::Status;

/// What a backup answers to each call that shares it.
pub type BackupAnswer = Result<Value, Problem>;

/// Everything that can happen.
pub enum Event {
    /// SIGTERM or SIGINT.
    Shutdown,
    Restart(oneshot::Sender<Result<u64, Problem>>),
    Backup(oneshot::Sender<BackupAnswer>),
    Exited(Pid, Exit),
    Ready(Pid),
    Version(String),
    /// The gateway could not be asked to go.
    AskFailed(Pid),
    Swept,
    AgentEnded(Verb, Outcome),
}

/// The channel is not bounded: its senders are (children, connections, timers), and an owner that waited on itself would
/// wait for ever.
pub type Events = UnboundedSender<Event>;

/// The gateway's process, or that of its prepare script.
struct Process {
    pid: Pid,
    is_gateway: bool,
    probe: Option<JoinHandle<()>>,
}

pub struct Owner {
    config: Arc<Config>,
    agent: PathBuf,
    reaper: Reaper,
    events: Events,
    published: watch::Sender<Status>,
    status: Status,
    policy: Policy,
    booted: Instant,
    state: State,
    process: Option<Process>,
    /// The sweep found nothing, but the exit of `process` has not come through yet.
    is_swept: bool,
    starts: u64,
    backups: Backups<oneshot::Sender<BackupAnswer>>,
    run: Option<Run>,
    next_backup: Option<Moment>,
    is_final_snapshot_lost: bool,
}

impl Owner {
    pub fn new(
        config: Arc<Config>,
        agent: PathBuf,
        reaper: Reaper,
        events: Events,
        published: watch::Sender<Status>,
    ) -> Self {
        let policy = Policy {
            startup_timeout: config.startup_timeout,
            stop_grace: config.stop_grace,
            hold: config.hold,
        };
        let backups = Backups::new(config.backup_interval);
        let state = State::boot(config.prepare.is_some());
        Self {
            config,
            agent,
            reaper,
            events,
            published,
            status: Status::boot(),
            policy,
            booted: Instant::now(),
            state,
            process: None,
            is_swept: false,
            starts: 0,
            backups,
            run: None,
            next_backup: None,
            is_final_snapshot_lost: false,
        }
    }

    /// Boots, and returns after the shutdown: whether everything that should have been saved is.
    pub async fn run(mut self, mut inbox: UnboundedReceiver<Event>) -> bool {
        self.act(Action::Restore);
        loop {
            self.begin_backup();
            self.publish();
            if self.state.phase == Phase::Down && self.run.is_none() && self.backups.is_over() {
                return !self.is_final_snapshot_lost;
            }
            let due = [self.state.deadline(), self.backups.next()];
            let due = due.into_iter().flatten().min();
            tokio::select! {
                Some(event) = inbox.recv() => self.handle(event),
                () = until(due.map(|due| self.booted + due)) => self.step(state::Event::Tick),
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Shutdown => self.shutdown(),
            Event::Restart(reply) => {
                // Whoever asked may have gone; that changes nothing.
                let _ = reply.send(self.restart());
            }
            Event::Backup(reply) => {
                if let Err((reply, refusal)) = self.backups.ask(reply) {
                    let _ = reply.send(Err(match refusal {
                        Refusal::Disabled => Problem::BackupDisabled,
                        Refusal::Fenced => Problem::Fenced,
                    }));
                }
            }
            Event::Exited(pid, exit) => self.exited(pid, exit),
            Event::Ready(pid) if self.is_current(pid) => {
                self.step(state::Event::Ready);
                self.ask_version();
            }
            Event::Version(version) => self.status.openclaw = Some(version),
            Event::AskFailed(pid) if self.is_current(pid) => signal(pid, Signal::SIGTERM),
            Event::Ready(_) | Event::AskFailed(_) => {}
            Event::Swept if self.process.is_some() => self.is_swept = true,
            Event::Swept => self.step(state::Event::Swept),
            Event::AgentEnded(Verb::Restore, outcome) => self.restored(outcome),
            Event::AgentEnded(Verb::Backup | Verb::Fork, outcome) => self.backed_up(outcome),
        }
    }

    /// Lets the state machine take one event, and does what it says until it says nothing more.
    fn step(&mut self, event: state::Event) {
        let mut event = Some(event);
        while let Some(current) = event.take() {
            let before = self.state.word();
            let (state, action) =
                state::next(self.state, current, self.now(), jitter(), &self.policy);
            self.state = state;
            let after = self.state.word();
            if before != after {
                self.status.since = SystemTime::now();
                let wait = self
                    .state
                    .deadline()
                    .map(|at| at.saturating_sub(self.now()));
                let wait = wait.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
                log!(
                    Info,
                    "gateway",
                    status = after,
                    was = before,
                    deadline_in_ms = wait
                );
            }
            event = action.and_then(|action| self.act(action));
        }
    }

    /// Carries out one action; some have a result at once.
    fn act(&mut self, action: Action) -> Option<state::Event> {
        match action {
            Action::Restore => {
                self.status.restore = "running";
                self.start_agent(Verb::Restore);
                None
            }
            Action::Prepare => {
                self.ready_root();
                let script = self.config.prepare.clone().unwrap_or_default();
                let command = process::command(&self.config, script.as_os_str(), &[""; 0]);
                self.spawn(command, false)
            }
            Action::Spawn => {
                self.ready_root();
                self.starts += 1;
                let config = &self.config;
                let (program, arguments) = config.command.split_first()?;
                let command = process::command(config, program, arguments);
                self.spawn(command, true)
            }
            Action::Ask => {
                self.ask();
                None
            }
            Action::Terminate => {
                if let Some(process) = &self.process {
                    signal(process.pid, Signal::SIGTERM);
                }
                None
            }
            Action::Sweep => self.sweep(),
            Action::Finish => {
                self.backups.ask_last();
                if !self.backups.is_running() {
                    // A restore has no use any more; it leaves the tree as it was.
                    self.cancel_agent();
                }
                None
            }
        }
    }

    /// A tree that does not exist yet, or a fresh volume that belongs to root, becomes the gateway's.
    fn ready_root(&self) {
        let (root, user) = (&self.config.root, &self.config.user);
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root);
        let given = made.and_then(|()| {
            let us = nix::unistd::geteuid();
            if us.is_root() && user.is_apart() && fs::symlink_metadata(root)?.uid() == us.as_raw() {
                let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
                std::os::unix::fs::lchown(root, Some(uid), Some(gid))?;
            }
            Ok(())
        });
        if let Err(error) = given {
            log!(
                Error,
                "the root cannot be made ready",
                reason = error.to_string()
            );
        }
    }

    fn spawn(&mut self, mut command: Command, is_gateway: bool) -> Option<state::Event> {
        self.is_swept = false;
        match self.reaper.spawn(&mut command) {
            Ok((child, exit)) => {
                let pid = pid(&child);
                log!(Info, "started", pid = pid.as_raw(), is_gateway = is_gateway);
                let events = self.events.clone();
                tokio::spawn(async move {
                    if let Ok(exit) = exit.await {
                        let _ = events.send(Event::Exited(pid, exit));
                    }
                });
                let probe = is_gateway.then(|| {
                    let (events, gateway) = (self.events.clone(), self.config.gateway_address);
                    tokio::spawn(async move {
                        probe::until_ready(gateway).await;
                        let _ = events.send(Event::Ready(pid));
                    })
                });
                self.process = Some(Process {
                    pid,
                    is_gateway,
                    probe,
                });
                None
            }
            Err(error) => {
                let code = process::exec_failure_code(&error);
                let program = command.get_program().to_string_lossy().into_owned();
                log!(
                    Error,
                    "cannot execute",
                    program = program,
                    reason = error.to_string()
                );
                let exit = Exit {
                    code: Some(code),
                    signal: None,
                };
                self.status.last_exit = Some((exit, SystemTime::now()));
                Some(state::Event::Exited(Some(code)))
            }
        }
    }

    fn exited(&mut self, pid: Pid, exit: Exit) {
        if !self.is_current(pid) {
            return;
        }
        let process = self.process.take().expect("is current");
        if let Some(probe) = process.probe {
            probe.abort();
        }
        log!(
            Info,
            "exited",
            pid = pid.as_raw(),
            is_gateway = process.is_gateway,
            code = exit.code,
            signal = exit.signal_name(),
        );
        if process.is_gateway || exit.code != Some(0) {
            self.status.last_exit = Some((exit, SystemTime::now()));
        }
        self.step(state::Event::Exited(exit.code));
        if std::mem::take(&mut self.is_swept) {
            self.step(state::Event::Swept);
        }
    }

    fn sweep(&mut self) -> Option<state::Event> {
        let belongs = self.belongs();
        if self.process.is_none() && sweep::is_clean(&belongs) {
            return Some(state::Event::Swept);
        }
        let events = self.events.clone();
        tokio::spawn(async move {
            sweep::sweep(belongs).await;
            let _ = events.send(Event::Swept);
        });
        None
    }

    fn belongs(&self) -> Belongs {
        let user = &self.config.user;
        if user.is_apart() {
            Belongs::ToUser(user.uid)
        } else {
            let agent = self.run.as_ref().and_then(|run| run.pid);
            Belongs::ByDescent {
                except: agent.into_iter().collect(),
            }
        }
    }

    /// The gateway's own restart request drains within a budget; SIGTERM alone may drain for five minutes.
    fn ask(&self) {
        let Some(Process { pid, .. }) = self.process else {
            return;
        };
        let Some(target) = files::restart_target(&self.config, pid.as_raw()) else {
            signal(pid, Signal::SIGTERM);
            return;
        };
        // A third of the grace is left for the exit itself.
        let budget = self.config.stop_grace * 2 / 3;
        let params = json!({
            "reason": "supervisor",
            "target": target,
            "restartIntent": {
                "force": true,
                "drainBudgetMs": u64::try_from(budget.as_millis()).unwrap_or(u64::MAX),
            },
        });
        let (config, events) = (self.config.clone(), self.events.clone());
        tokio::spawn(async move {
            let call = rpc::call(&config, "gateway.restart.request", params);
            let answer = tokio::time::timeout(ASK_TIME_LIMIT, call).await;
            if !matches!(answer, Ok(Ok(_))) {
                let _ = events.send(Event::AskFailed(pid));
            }
        });
    }

    fn ask_version(&self) {
        let (config, events) = (self.config.clone(), self.events.clone());
        tokio::spawn(async move {
            match rpc::version(&config).await {
                Ok(Some(version)) => drop(events.send(Event::Version(version))),
                Ok(None) => {}
                Err(error) => {
                    let reason = config.secrets.scrub(&error.to_string());
                    log!(
                        Warn,
                        "the gateway takes no calls; devices will fail",
                        reason = reason
                    );
                }
            }
        });
    }

    /// The number of the start that a call leads to, counted from 1.
    fn restart(&mut self) -> Result<u64, Problem> {
        let is_leaving = |phase| {
            use state::Then;
            matches!(
                phase,
                Phase::Down
                    | Phase::Stopping {
                        then: Then::Down,
                        ..
                    }
                    | Phase::Sweeping { then: Then::Down }
            )
        };
        if is_leaving(self.state.phase) {
            return Err(Problem::GatewayUnavailable(
                "the runtime is shutting down".into(),
            ));
        }
        self.step(state::Event::Restart);
        let is_under_way = matches!(self.state.phase, Phase::Starting { .. });
        Ok(if is_under_way {
            self.starts
        } else {
            self.starts + 1
        })
    }

    /// Each signal cuts the wait that is current: the gateway's grace first, then the agent.
    fn shutdown(&mut self) {
        log!(Info, "asked to stop");
        if self.state.phase == Phase::Down {
            self.cancel_agent();
        }
        self.step(state::Event::Shutdown);
    }

    fn cancel_agent(&mut self) {
        let cancel = self.run.as_mut().and_then(|run| run.cancel.take());
        if let Some(cancel) = cancel {
            let _ = cancel.send(());
        }
    }

    fn start_agent(&mut self, verb: Verb) {
        let events = self.events.clone();
        let done = move |outcome| drop(events.send(Event::AgentEnded(verb, outcome)));
        self.run = Some(agent::start(
            &self.config,
            &self.reaper,
            &self.agent,
            verb,
            done,
        ));
    }

    fn restored(&mut self, outcome: Outcome) {
        self.run = None;
        if self.state.phase == Phase::Down {
            return;
        }
        let event = match outcome {
            Ok(answer) => {
                self.status.restore = "done";
                self.status.restored = text(&answer["snapshot"]);
                self.status.snapshot = text(&answer["snapshot"]);
                self.status.last_backup = text(&answer["time"]);
                log!(Info, "restored", snapshot = self.status.restored.clone());
                state::Event::Restored
            }
            Err(Failure { code, .. }) if code == code::NO_SNAPSHOT => {
                self.status.restore = "empty";
                log!(Info, "the store is empty, starting fresh");
                state::Event::Restored
            }
            Err(Failure { code, error }) => {
                log!(Error, "restore failed", code = code, reason = error.clone());
                self.status.restore = "failed";
                self.status.restore_error = Some(error);
                state::Event::RestoreFailed
            }
        };
        if event == state::Event::Restored {
            self.status.restore_error = None;
            self.backups.enable(Verb::Backup, self.now(), jitter());
        } else if !self.config.hold {
            self.backups.enable(Verb::Fork, self.now(), jitter());
        }
        self.step(event);
    }

    /// Starts the run that is due. Not during a sweep: that might take the young agent for one of the gateway's.
    fn begin_backup(&mut self) {
        if matches!(self.state.phase, Phase::Sweeping { .. }) {
            return;
        }
        if let Some(verb) = self.backups.begin(self.now()) {
            self.start_agent(verb);
        }
    }

    fn backed_up(&mut self, outcome: Outcome) {
        self.run = None;
        let answer = match outcome {
            Ok(answer) => {
                self.status.last_backup = text(&answer["time"]);
                self.status.snapshot = text(&answer["snapshot"]);
                self.status.backup_error = None;
                log!(Info, "backed up", snapshot = self.status.snapshot.clone());
                Ok(json!({
                    "lastBackup": self.status.last_backup,
                    "snapshot": self.status.snapshot,
                    "unchanged": answer["unchanged"],
                    "bytesUploaded": answer["bytesUploaded"],
                    "files": answer["files"],
                    "durationMs": answer["durationMs"],
                }))
            }
            Err(failure) => {
                log!(
                    Error,
                    "backup failed",
                    code = failure.code,
                    reason = failure.error.clone()
                );
                self.status.backup_error = Some((failure.error.clone(), SystemTime::now()));
                // It may have ended while it held the gateway still.
                sweep::resume(&self.belongs());
                if failure.code == code::FENCED {
                    self.backups.fence();
                }
                Err(Problem::from(failure))
            }
        };
        if self.state.phase == Phase::Down {
            self.is_final_snapshot_lost = answer.is_err() && self.backups.word() != "fenced";
        }
        for reply in self.backups.end(self.now(), jitter()) {
            let _ = reply.send(answer.clone());
        }
    }

    fn publish(&mut self) {
        if self.next_backup != self.backups.next() {
            self.next_backup = self.backups.next();
            let wait = self.next_backup.map(|next| next.saturating_sub(self.now()));
            self.status.next_backup = wait.map(|wait| SystemTime::now() + wait);
        }
        let gateway = self.process.as_ref().filter(|process| process.is_gateway);
        self.status.pid = gateway.map(|process| process.pid.as_raw());
        self.status.gateway = self.state.word();
        self.status.restarts = self.starts.saturating_sub(1);
        self.status.backup = self.backups.word();
        self.published.send_replace(self.status.clone());
    }

    fn is_current(&self, pid: Pid) -> bool {
        self.process
            .as_ref()
            .is_some_and(|process| process.pid == pid)
    }

    fn now(&self) -> Moment {
        self.booted.elapsed()
    }
}

/// The gateway takes a restart request in milliseconds; one that does not gets SIGTERM.
const ASK_TIME_LIMIT: Duration = Duration::from_secs(2);

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// To a child whose exit has not come through, so the pid is still its own.
fn signal(pid: Pid, signal: Signal) {
    let _ = kill(pid, signal);
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// Evenly between 0 and 1; without randomness, in the middle.
fn jitter() -> f64 {
    getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX))
}
