//! The owner's hands on the gateway: starting it, hearing of its end, asking it to go, and sweeping up after it.

use std::ffi::{OsStr, OsString};
use std::pin::pin;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Event, Owner};
use crate::api::envelope::Problem;
use crate::blocking;
use crate::config::Config;
use crate::gateway::process::{CANNOT_EXECUTE, NOT_FOUND, Unstarted, command};
use crate::gateway::root::{Fault, Identity};
use crate::gateway::rpc::{Call, Size};
use crate::gateway::state::{self, Phase, State, Swept, Then};
use crate::gateway::sweep::{self, Belongs, named};
use crate::gateway::{files, probe, root, rpc};
use crate::log::{self, Relay, Source, log};
use crate::reaper::{Exit, Side};
use crate::spawn::{Failure, Start};
use crate::status::{ExitReason, LastExit};

/// The gateway takes a restart request in milliseconds; one that does not gets SIGTERM.
const ASK_TIME_LIMIT: Duration = Duration::from_secs(2);

/// For a look at the root. A network disk may take a moment.
const ROOT_TIME_LIMIT: Duration = Duration::from_secs(10);

/// To write a line to the state.
const NOTE_TIME_LIMIT: Duration = Duration::from_secs(5);

/// An exec that takes longer is worth a line.
const EXEC_SILENCE: Duration = Duration::from_secs(5);

/// From the end of everything else of the gateway to that of its first process, which a tracer may hold.
const LAST_EXIT_TIME_LIMIT: Duration = Duration::from_secs(5);

/// The gateway's process, or that of its prepare script.
pub(super) struct Process {
    pub pid: Pid,
    pub is_gateway: bool,
    probe: Option<JoinHandle<()>>,
}

/// What a start found of the root, and what went wrong with making it.
pub type Look = Result<(Identity, Option<std::io::Error>), Fault>;

impl Owner {
    /// A start begins with a look at the root, which may be on a disk that does not answer.
    pub(super) fn begin_start(&mut self, is_gateway: bool) {
        self.attempt += 1;
        self.ending = None;
        let (attempt, events) = (self.attempt, self.events.clone());
        let (config, known) = (self.config.clone(), self.root);
        let startup_timeout = config.startup_timeout;
        tokio::spawn(async move {
            let look = move || root::ready(&config.root, &config.user, known);
            // It is over before the start is.
            let limit = ROOT_TIME_LIMIT.min(startup_timeout / 2);
            let look = blocking::within(limit, look).await;
            let look = look.unwrap_or_else(|error| Err(Fault::Unreadable(error)));
            let _ = events.send(Event::RootLooked(attempt, is_gateway, look));
        });
    }

    /// Starts the program, unless the start was given up meanwhile.
    pub(super) fn root_looked(&mut self, attempt: u64, is_gateway: bool, look: Look) {
        if attempt != self.attempt {
            return;
        }
        let root = self.config.root.display();
        let unusable = |verb: &str, reason: String, code| Unstarted {
            code,
            setting: Some("RUNTIME_ROOT"),
            failed: format!("{verb} the root {root}"),
            reason,
        };
        let event = match look {
            Ok((found, problem)) => {
                if let Some(problem) = problem {
                    let reason = problem.to_string();
                    log!(Error, "the root cannot be made ready", reason = reason);
                }
                self.root = Some(found);
                self.start(is_gateway)
            }
            Err(Fault::Lost(reason)) => {
                self.lose_root(reason);
                Some(state::Event::RootLost)
            }
            Err(Fault::Absent(problem)) => {
                let reason = problem.map_or("it is gone again".to_owned(), |why| why.to_string());
                log!(
                    Error,
                    "the root cannot be made ready",
                    reason = reason.as_str()
                );
                Some(self.not_started(is_gateway, &unusable("make", reason, NOT_FOUND)))
            }
            Err(Fault::Unreadable(error)) => {
                let reason = error.to_string();
                log!(Error, "cannot look at the root", reason = reason.as_str());
                Some(self.not_started(is_gateway, &unusable("look at", reason, CANNOT_EXECUTE)))
            }
        };
        if let Some(event) = event {
            self.step(event);
        }
    }

    fn start(&mut self, is_gateway: bool) -> Option<state::Event> {
        let config = self.config.clone();
        let (program, arguments): (&OsStr, &[OsString]) = if is_gateway {
            self.starts += 1;
            let (program, arguments) = config.command.split_first()?;
            (program, arguments)
        } else {
            (config.prepare.as_ref()?.as_os_str(), &[])
        };
        self.is_swept = false;
        self.kills.remember();
        let started = command(&config, program, arguments)
            .and_then(|command| self.reaper.spawn(&command, Side::Gateway));
        let (child, ends) = match started {
            Ok(started) => started,
            Err(error) => {
                let unstarted = Unstarted::without_process(program, &error);
                return Some(self.not_started(is_gateway, &unstarted));
            }
        };
        let pid = child.pid;
        self.note_gateway(pid);
        self.relay(ends.stdout, ends.stderr);
        let events = self.events.clone();
        let program = program.to_owned();
        tokio::spawn(async move {
            let failure = match ends.start {
                Some(start) => executed(pid, start).await.err(),
                None => None,
            };
            if failure.is_none() {
                log!(Info, "started", pid = pid.as_raw(), is_gateway = is_gateway);
            }
            let unstarted = failure.map(|failure| Unstarted::explain(&config, &program, failure));
            if let Ok(exit) = child.exit.await {
                let _ = events.send(Event::Exited(pid, exit, unstarted));
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

    /// For the next supervisor, which would not find it by its user.
    fn note_gateway(&self, pid: Pid) {
        if self.config.user.is_apart() {
            return;
        }
        let lock = self.lock.clone();
        tokio::spawn(async move {
            let note = move || lock.note(pid.as_raw());
            if let Err(error) = blocking::within(NOTE_TIME_LIMIT, note).await.flatten() {
                log!(
                    Warn,
                    "cannot note which gateway runs: another supervisor may not find it",
                    reason = error.to_string()
                );
            }
        });
    }

    /// Notes an end without a beginning.
    fn not_started(&mut self, is_gateway: bool, unstarted: &Unstarted) -> state::Event {
        let code = Some(unstarted.code);
        let exit = Exit { code, signal: None };
        self.note_unstarted(is_gateway, exit, unstarted);
        state::Event::Exited(code)
    }

    fn note_unstarted(&mut self, is_gateway: bool, exit: Exit, unstarted: &Unstarted) {
        log!(
            Error,
            "cannot start the program",
            failed = unstarted.failed.as_str(),
            setting = unstarted.setting,
            reason = unstarted.reason.as_str(),
            is_gateway = is_gateway,
        );
        let message = Some(unstarted.message());
        self.status.last_exit = Some(LastExit::now(exit, Some(ExitReason::Exec), message));
    }

    /// Passes on what the process writes, from now until nobody can write any more, or the next one is there: whoever still
    /// holds the pipes then is nothing of the gateway.
    fn relay(&mut self, stdout: pipe::Receiver, stderr: pipe::Receiver) {
        let tail = self.status.stderr.clone();
        let output = Relay::start(stdout, Source::Gateway, log::stdout(), |_| true);
        let errors = Relay::start(stderr, Source::Gateway, log::stderr(), move |line| {
            tail.add(line);
            true
        });
        self.relays = [Some(output), Some(errors)];
    }

    pub(super) fn exited(&mut self, pid: Pid, exit: Exit, unstarted: Option<Unstarted>) {
        if !self.is_current(pid) {
            return;
        }
        let process = self.process.take().expect("is current");
        if let Some(probe) = process.probe {
            probe.abort();
        }
        // While we sweep, the kill is ours.
        let is_oom = !self.is_sweeping() && self.kills.explain(exit);
        let ending = self.ending.take();
        self.has_run |= unstarted.is_none();
        if let Some(unstarted) = unstarted {
            self.note_unstarted(process.is_gateway, exit, &unstarted);
        } else {
            let (reason, message) = match ending {
                _ if is_oom => (Some(ExitReason::Oom), None),
                Some((reason, message)) => (Some(reason), Some(message)),
                None if !process.is_gateway && exit.code != Some(0) => {
                    let how = exit.describe();
                    let message = format!("the prepare step failed: it ended with {how}");
                    (Some(ExitReason::Prepare), Some(message))
                }
                None => (None, None),
            };
            log!(
                Info,
                "exited",
                pid = pid.as_raw(),
                is_gateway = process.is_gateway,
                code = exit.code,
                signal = exit.signal_name(),
                reason = reason.map(ExitReason::word),
                message = message.clone(),
            );
            if process.is_gateway || exit.code != Some(0) {
                self.status.last_exit = Some(LastExit::now(exit, reason, message));
            }
        }
        self.step(state::Event::Exited(exit.code));
        if std::mem::take(&mut self.is_swept) {
            self.step(state::Event::Swept);
        }
    }

    /// What an end that we bring about is to be called.
    pub(super) fn note_ending(&mut self, event: state::Event, next: &State) {
        let timeout = self.config.startup_timeout.as_secs_f64();
        let grace = self.config.stop_grace.as_secs_f64();
        let (reason, message) = match (self.state.phase, event, next.phase) {
            (Phase::Preparing { .. }, state::Event::Tick, _) => (
                ExitReason::Prepare,
                format!(
                    "the prepare step did not end within {timeout} s (RUNTIME_STARTUP_TIMEOUT) and was stopped"
                ),
            ),
            (Phase::Starting { .. }, state::Event::Tick, _) => (
                ExitReason::StartupTimeout,
                format!(
                    "it was not ready within {timeout} s (RUNTIME_STARTUP_TIMEOUT) and was stopped"
                ),
            ),
            (Phase::Stopping { .. }, state::Event::Tick, Phase::Sweeping { .. }) => (
                ExitReason::Killed,
                format!(
                    "it did not end within {grace} s (RUNTIME_STOP_GRACE) after it was asked to, and was killed"
                ),
            ),
            (Phase::Stopping { .. }, state::Event::Shutdown, Phase::Sweeping { .. }) => (
                ExitReason::Killed,
                "a further signal to stop cut its grace, and it was killed".to_owned(),
            ),
            _ => return,
        };
        if let Some(process) = &self.process {
            let pid = process.pid.as_raw();
            log!(
                Warn,
                "stopping a process",
                pid = pid,
                reason = message.as_str()
            );
            // The first reason counts: one that was too slow to start may be too slow to end.
            self.ending.get_or_insert((reason, message));
        }
    }

    pub(super) fn sweep(&mut self) -> Option<state::Event> {
        let Some(belongs) = self.belongs() else {
            return Some(state::Event::Swept);
        };
        // It may not be its user yet: then no look for that user finds it.
        if let Some(process) = &self.process {
            self.reaper.signal(process.pid, Signal::SIGKILL);
        }
        let (reaper, events) = (self.reaper.clone(), self.events.clone());
        tokio::spawn(async move {
            let told = events.clone();
            let tell = move |left| drop(told.send(Event::Left(left)));
            sweep::sweep(&belongs, &reaper, tell).await;
            let _ = events.send(Event::Swept);
        });
        None
    }

    /// Whose processes are to be swept; none when there can be none.
    fn belongs(&self) -> Option<Belongs> {
        let user = &self.config.user;
        let is_first = matches!(
            self.state.phase,
            Phase::Sweeping {
                what: Swept::Earlier,
                ..
            }
        );
        // As PID 1 we are the first process that there is.
        if is_first && std::process::id() == 1 {
            return None;
        }
        match (user.is_apart(), is_first) {
            (true, _) => Some(Belongs::ToUser(user.uid)),
            (false, true) => {
                let (root, earlier) = (self.config.root.clone(), self.lock.earlier.clone());
                Some(Belongs::ToEarlier(root, earlier))
            }
            (false, false) => Some(Belongs::ByDescent),
        }
    }

    /// Everything of the gateway is gone but the exit of its first process.
    pub(super) fn await_exit(&mut self, pid: Pid) {
        self.is_swept = true;
        let events = self.events.clone();
        tokio::spawn(async move {
            sleep(LAST_EXIT_TIME_LIMIT).await;
            let _ = events.send(Event::Unreaped(pid));
        });
    }

    /// It runs nothing any more, so the next one may start: only its tracer can let it go.
    pub(super) fn unreaped(&mut self, pid: Pid) {
        if !(self.is_current(pid) && self.is_swept) {
            return;
        }
        log!(
            Warn,
            "the gateway's process has ended, but the process that traces it holds its exit",
            pid = pid.as_raw()
        );
        let exit = Exit {
            code: None,
            signal: Some(Signal::SIGKILL as i32),
        };
        self.exited(pid, exit, None);
    }

    /// We leave although something of the gateway does not die.
    pub(super) fn give_up_sweep(&mut self) {
        if let (Some(process), true) = (&self.process, self.left.is_empty()) {
            self.left.push(process.pid);
        }
        log!(
            Error,
            "leaving processes of the gateway behind: they do not end after SIGKILL, as on a dead disk",
            pids = named(&self.left),
        );
        self.left_behind = Some(std::mem::take(&mut self.left));
    }

    /// The gateway's own restart request drains within a budget; SIGTERM alone may drain for five minutes.
    pub(super) fn ask(&self) {
        let Some(Process { pid, .. }) = self.process else {
            return;
        };
        let (config, events) = (self.config.clone(), self.events.clone());
        // A third of the grace is left for the exit itself.
        let budget = self.config.stop_grace * 2 / 3;
        let drained = Instant::now() + budget;
        tokio::spawn(async move {
            let asked = timeout(ASK_TIME_LIMIT, request_restart(&config, pid, budget)).await;
            if asked == Ok(true) {
                sleep_until(drained).await;
            }
            let _ = events.send(Event::AskedInVain(pid));
        });
    }

    pub(super) fn ask_version(&self) {
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
    pub(super) fn restart(&mut self) -> Result<u64, Problem> {
        let is_leaving = matches!(
            self.state.phase,
            Phase::Down
                | Phase::Stopping {
                    then: Then::Down,
                    ..
                }
                | Phase::Sweeping {
                    then: Then::Down,
                    ..
                }
        );
        if is_leaving {
            return Err(Problem::GatewayUnavailable(
                "the runtime is shutting down".into(),
            ));
        }
        self.step(state::Event::Restart);
        // A start counts from when there is a process.
        let is_under_way =
            matches!(self.state.phase, Phase::Starting { .. }) && self.process.is_some();
        Ok(if is_under_way {
            self.starts
        } else {
            self.starts + 1
        })
    }
}

/// Waits for the exec, and says when that takes long.
async fn executed(pid: Pid, start: Start) -> Result<(), Failure> {
    let mut result = pin!(start.result());
    if let Ok(result) = timeout(EXEC_SILENCE, &mut result).await {
        return result;
    }
    log!(
        Warn,
        "the program is not executed yet: the disk that it is on may hang",
        pid = pid.as_raw()
    );
    result.await
}

/// Whether the gateway took the request.
async fn request_restart(config: &Config, pid: Pid, budget: Duration) -> bool {
    let Ok(Some(target)) = files::restart_target(config, pid.as_raw()).await else {
        return false;
    };
    let call = Call {
        method: "gateway.restart.request",
        params: json!({
            "reason": "supervisor",
            "target": target,
            "restartIntent": {
                "force": true,
                "drainBudgetMs": u64::try_from(budget.as_millis()).unwrap_or(u64::MAX),
            },
        }),
        size: Size::Short,
        take: |_| Vec::new(),
    };
    rpc::call(config, call).await.is_ok()
}
