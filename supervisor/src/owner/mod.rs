//! The one task that owns all state. Events come in, the pure parts (`gateway::transitions`, `backups`) decide, and this
//! carries out what they say and publishes the result.
//!
//! Nothing here waits for anything but the next event: whatever takes time is a task that sends one when it is done.

mod gateway;
mod saving;
mod status;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::agent::{Failure, News, Outcome, Run, Verb};
use crate::api::envelope::Problem;
use crate::backups::{Backups, Refusal};
use crate::blocking;
use crate::clock::Moment;
use crate::config::Config;
use crate::final_snapshot::{Tree, loss};
use crate::gateway::process::Unstarted;
use crate::gateway::root::Identity;
use crate::gateway::state::{self, Action, Phase, Policy, State};
use crate::gateway::{root, transitions};
use crate::log::{Relay, log};
use crate::only::Lock;
use crate::oom::Kills;
use crate::reaper::{Exit, Reaper};
use crate::status::{ExitReason, Status};
use gateway::{Look, Process};

/// For what the gateway wrote before it ended, to be passed on.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// For a last look at the root.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// What a backup answers to each call that shares it.
pub type BackupAnswer = Result<Value, Problem>;

/// Everything that can happen.
pub enum Event {
    /// A signal to stop.
    Shutdown,
    Restart(oneshot::Sender<Result<u64, Problem>>),
    Backup(oneshot::Sender<BackupAnswer>),
    /// And why it did not become its program, if it did not.
    Exited(Pid, Exit, Option<Unstarted>),
    /// For the start of this number: the gateway's, or that of the prepare step.
    RootLooked(u64, bool, Look),
    /// A backup says that the root is lost, and whether another one is there.
    RootChecked(String, bool),
    Ready(Pid),
    Version(String),
    /// The gateway could not be asked to go, or has not gone within its time.
    AskedInVain(Pid),
    /// What SIGKILL has not ended yet.
    Left(Vec<Pid>),
    Swept,
    /// This process of the gateway has not been reaped for a while after the sweep.
    Unreaped(Pid),
    AgentTold(Verb, News),
    AgentEnded(Verb, Outcome),
}

/// How a life ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The next boot restores what this life leaves.
    pub is_saved: bool,
    /// Nothing went wrong that somebody has to look after.
    pub is_well: bool,
}

/// The channel is not bounded: its senders are (children, connections, timers), and an owner that waited on itself would
/// wait for ever.
pub type Events = UnboundedSender<Event>;

pub struct Owner {
    config: Arc<Config>,
    agent: PathBuf,
    lock: Lock,
    reaper: Reaper,
    events: Events,
    published: watch::Sender<Status>,
    status: Status,
    policy: Policy,
    booted: Instant,
    state: State,
    process: Option<Process>,
    /// Pass on what the last process writes on standard output and standard error.
    relays: [Option<Relay>; 2],
    kills: Kills,
    /// The sweep found nothing, but the exit of `process` has not come through yet.
    is_swept: bool,
    /// What the last round of a sweep found.
    left: Vec<Pid>,
    /// What a sweep had left when it was given up, at the end.
    left_behind: Option<Vec<Pid>>,
    /// What the end that we bring about is to be called.
    ending: Option<(ExitReason, String)>,
    /// Counts the starts and what ends them before there is a process.
    attempt: u64,
    starts: u64,
    backups: Backups<oneshot::Sender<BackupAnswer>>,
    run: Option<Run>,
    /// An agent that SIGKILL has not ended.
    stuck: Option<Pid>,
    next_backup: Option<Moment>,
    /// The root as the first start since the last restore found it.
    root: Option<Identity>,
    /// A restore waits for the run under way.
    is_restore_due: bool,
    /// Whether anything of the gateway that has ended was started in this life.
    has_run: bool,
    /// The last backup that ended after the gateway had gone, and whether it is a fork.
    last_ended: Option<Result<bool, Failure>>,
}

impl Owner {
    pub fn new(
        config: Arc<Config>,
        agent: PathBuf,
        lock: Lock,
        reaper: Reaper,
        events: Events,
        published: watch::Sender<Status>,
    ) -> Self {
        let policy = Policy {
            startup_timeout: config.startup_timeout,
            stop_grace: config.stop_grace,
            hold: config.hold,
            has_prepare: config.prepare.is_some(),
        };
        let backups = Backups::new(config.backup_interval);
        let state = State::boot(&policy);
        Self {
            config,
            agent,
            lock,
            reaper,
            events,
            published,
            status: Status::boot(),
            policy,
            booted: Instant::now(),
            state,
            process: None,
            relays: [None, None],
            kills: Kills::new(),
            is_swept: false,
            left: Vec::new(),
            left_behind: None,
            ending: None,
            attempt: 0,
            starts: 0,
            backups,
            run: None,
            stuck: None,
            next_backup: None,
            root: None,
            is_restore_due: false,
            has_run: false,
            last_ended: None,
        }
    }

    /// Boots, and returns after the shutdown.
    pub async fn run(mut self, mut inbox: UnboundedReceiver<Event>) -> Ended {
        if let Some(event) = self.act(Action::Sweep) {
            self.step(event);
        }
        loop {
            self.begin_run();
            self.publish();
            if self.state.phase == Phase::Down && self.run.is_none() && self.backups.is_over() {
                for relay in self.relays.iter_mut().filter_map(Option::take) {
                    relay.finish(LAST_WORDS).await;
                }
                return self.end().await;
            }
            // A backup that is due waits for a prune, whose end is an event.
            let next_backup = self.backups.next().filter(|_| !self.backups.is_pruning());
            let due = [self.state.deadline(), next_backup];
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
                        Refusal::Disabled => Problem::not_restored(),
                        Refusal::Fenced => Problem::Fenced,
                    }));
                }
            }
            Event::Exited(pid, exit, unstarted) => self.exited(pid, exit, unstarted),
            Event::Ready(pid) if self.is_current(pid) => {
                self.step(state::Event::Ready);
                self.ask_version();
            }
            Event::Version(version) => self.status.openclaw = Some(version),
            Event::AskedInVain(pid) if self.is_current(pid) => {
                self.reaper.signal(pid, Signal::SIGTERM);
            }
            Event::Ready(_) | Event::AskedInVain(_) => {}
            Event::RootLooked(attempt, is_gateway, look) => {
                self.root_looked(attempt, is_gateway, look);
            }
            Event::RootChecked(reason, is_another) => {
                if is_another && !self.is_restoring() {
                    self.lose_root(&reason);
                    self.step(state::Event::RootLost);
                }
            }
            Event::Left(pids) => self.left = pids,
            Event::Swept if let Some(process) = &self.process => self.await_exit(process.pid),
            Event::Unreaped(pid) => self.unreaped(pid),
            Event::Swept => {
                self.left.clear();
                self.left_behind = None;
                self.step(state::Event::Swept);
            }
            Event::AgentTold(verb, news) => self.told(verb, news),
            Event::AgentEnded(Verb::Restore, outcome) => self.restored(outcome),
            Event::AgentEnded(verb @ (Verb::Backup | Verb::Fork), outcome) => {
                self.backed_up(verb, outcome);
            }
            Event::AgentEnded(Verb::Prune, outcome) => self.pruned(outcome),
        }
    }

    /// Lets the state machine take one event, and does what it says until it says nothing more.
    fn step(&mut self, event: state::Event) {
        let mut event = Some(event);
        while let Some(current) = event.take() {
            let before = self.state.word();
            let (state, action) =
                transitions::next(self.state, current, self.now(), jitter(), &self.policy);
            if self.state.phase != state.phase {
                self.note_ending(current, &state);
                self.entered(&state);
            }
            let is_given_up = self.is_sweeping() && current == state::Event::Tick;
            self.state = state;
            if is_given_up && state.phase == Phase::Down {
                self.give_up_sweep();
            }
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
            Action::Restore => self.restore(),
            Action::Prepare => {
                self.begin_start(false);
                None
            }
            Action::Spawn => {
                self.begin_start(true);
                None
            }
            Action::Ask => {
                self.ask();
                None
            }
            Action::Terminate => {
                let Some(process) = &self.process else {
                    // It was not started yet, and is not to be.
                    self.attempt += 1;
                    return Some(state::Event::Exited(None));
                };
                self.reaper.signal(process.pid, Signal::SIGTERM);
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

    /// How this life ends. What the next boot does not restore is said, and so is what is left behind.
    async fn end(&self) -> Ended {
        let root = self.config.root.clone();
        let is_empty = blocking::within(LAST_LOOK, move || root::is_empty(&root)).await;
        let has_run = self.has_run || self.process.is_some();
        let tree = match (has_run, is_empty.unwrap_or_default()) {
            (true, _) => Tree::Used,
            (false, true) => Tree::Nothing,
            (false, false) => Tree::Unused,
        };
        let loss = loss(self.last_ended.as_ref(), self.backups.mode(), tree);
        if let Some(loss) = &loss {
            if loss.is_fork() {
                log!(
                    Error,
                    "final snapshot not in the head",
                    reason = loss.reason()
                );
            } else {
                log!(Error, "final snapshot lost", reason = loss.reason());
            }
        }
        if let Some(pid) = self.stuck {
            log!(
                Error,
                "leaving a backup-agent behind: it does not end after SIGKILL, as on a dead disk",
                pid = pid.as_raw()
            );
        }
        let is_alone = self.left_behind.is_none() && self.stuck.is_none();
        Ended {
            is_saved: loss.is_none(),
            is_well: is_alone && loss.is_none_or(|loss| !loss.is_failure()),
        }
    }

    /// Each signal cuts the wait that is current: the gateway's grace first, then the agent.
    fn shutdown(&mut self) {
        log!(Info, "asked to stop");
        if self.state.phase == Phase::Down {
            self.cancel_agent();
        }
        self.step(state::Event::Shutdown);
    }

    fn is_current(&self, pid: Pid) -> bool {
        self.process
            .as_ref()
            .is_some_and(|process| process.pid == pid)
    }

    fn is_restoring(&self) -> bool {
        matches!(self.state.phase, Phase::Restoring | Phase::Held { .. })
    }

    fn is_sweeping(&self) -> bool {
        matches!(self.state.phase, Phase::Sweeping { .. })
    }

    fn now(&self) -> Moment {
        self.booted.elapsed()
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// Evenly between 0 and 1; without randomness, in the middle.
fn jitter() -> f64 {
    getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX))
}
