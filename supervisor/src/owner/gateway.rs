//! The owner's hands on the gateway: starting it, hearing of its end, asking it to go, and sweeping up after it.

use std::process::{Child, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::json;
use tokio::task::JoinHandle;

use super::{Event, Owner};
use crate::api::envelope::Problem;
use crate::gateway::process::Prepared;
use crate::gateway::process_table::Belongs;
use crate::gateway::state::{self, Phase, Then};
use crate::gateway::{files, probe, process, root, rpc, sweep};
use crate::log::{self, Relay, Source, log};
use crate::reaper::{Exit, pid};
use crate::status::LastExit;

/// The gateway takes a restart request in milliseconds; one that does not gets SIGTERM.
const ASK_TIME_LIMIT: Duration = Duration::from_secs(2);

/// The gateway's process, or that of its prepare script.
pub(super) struct Process {
    pub pid: Pid,
    pub is_gateway: bool,
    probe: Option<JoinHandle<()>>,
}

impl Owner {
    /// Before a start. The first one since a restore makes the root where there is none; each later one finds that same root,
    /// or nothing is started.
    pub(super) fn ready_root(&mut self) -> Option<state::Event> {
        let path = &self.config.root;
        if self.root.is_none()
            && let Err(error) = root::make(path, &self.config.user)
        {
            let reason = error.to_string();
            log!(Error, "the root cannot be made ready", reason = reason);
        }
        let reason = match (root::identify(path), self.root) {
            (Ok(Some(found)), None) => {
                self.root = Some(found);
                return None;
            }
            (Ok(Some(found)), Some(known)) if known.is_same(&found) => return None,
            // It was just tried to make it.
            (Ok(None), None) => return Some(self.not_started(process::NOT_FOUND)),
            (Err(error), _) => {
                let reason = error.to_string();
                log!(Error, "cannot look at the root", reason = reason);
                return Some(self.not_started(process::CANNOT_EXECUTE));
            }
            (Ok(None), Some(_)) => "it is not there: it was removed, or its volume is detached",
            (Ok(Some(_)), Some(_)) => "another directory is in its place",
        };
        self.lose_root(reason);
        Some(state::Event::RootLost)
    }

    /// Notes an end without a beginning.
    fn not_started(&mut self, code: i32) -> state::Event {
        let exit = Exit {
            code: Some(code),
            signal: None,
        };
        self.status.last_exit = Some(LastExit::now(exit, false));
        state::Event::Exited(Some(code))
    }

    pub(super) fn spawn(
        &mut self,
        mut program: Prepared,
        is_gateway: bool,
    ) -> Option<state::Event> {
        self.is_swept = false;
        let command = &mut program.command;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        self.kills.remember();
        match self.reaper.spawn(&mut program.command) {
            Ok((mut child, exit)) => {
                let pid = pid(&child);
                self.has_run = true;
                self.relay(&mut child);
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
                let unstarted = program.explain(&error);
                log!(
                    Error,
                    "cannot start the program",
                    failed = unstarted.what,
                    setting = unstarted.setting,
                    reason = error.to_string(),
                    is_gateway = is_gateway,
                );
                Some(self.not_started(unstarted.code))
            }
        }
    }

    /// Passes on what the process writes, from now until nobody can write any more, or the next one is there: whoever still
    /// holds the pipes then is nothing of the gateway.
    fn relay(&mut self, child: &mut Child) {
        let tail = self.status.stderr.clone();
        let output = child
            .stdout
            .take()
            .and_then(|end| Relay::start(end, Source::Gateway, log::stdout(), |_| true));
        let errors = child.stderr.take().and_then(|end| {
            Relay::start(end, Source::Gateway, log::stderr(), move |line| {
                tail.add(line);
                true
            })
        });
        self.relays = [output, errors];
    }

    pub(super) fn exited(&mut self, pid: Pid, exit: Exit) {
        if !self.is_current(pid) {
            return;
        }
        let process = self.process.take().expect("is current");
        // While we sweep, the kill is ours.
        let is_oom = !self.is_sweeping() && self.kills.explain(exit);
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
            is_oom = is_oom,
        );
        if process.is_gateway || exit.code != Some(0) {
            self.status.last_exit = Some(LastExit::now(exit, is_oom));
        }
        self.step(state::Event::Exited(exit.code));
        if std::mem::take(&mut self.is_swept) {
            self.step(state::Event::Swept);
        }
    }

    pub(super) fn sweep(&mut self) -> Option<state::Event> {
        let belongs = self.belongs();
        if self.process.is_none() && sweep::is_clean(&belongs) {
            return Some(state::Event::Swept);
        }
        let (reaper, events) = (self.reaper.clone(), self.events.clone());
        tokio::spawn(async move {
            sweep::sweep(&belongs, &reaper).await;
            let _ = events.send(Event::Swept);
        });
        None
    }

    pub(super) fn belongs(&self) -> Belongs {
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
    pub(super) fn ask(&self) {
        let Some(Process { pid, .. }) = self.process else {
            return;
        };
        let Some(target) = files::restart_target(&self.config, pid.as_raw()) else {
            self.reaper.signal(pid, Signal::SIGTERM);
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
                | Phase::Sweeping { then: Then::Down }
        );
        if is_leaving {
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
}
