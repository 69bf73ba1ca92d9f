//! PID 1 of the container: keeps one gateway running and its state backed up.

mod agent;
mod api;
mod backups;
mod blocking;
mod capabilities;
mod clock;
mod config;
mod descriptors;
mod error;
mod final_snapshot;
mod gateway;
mod healthcheck;
mod json;
mod log;
mod only;
mod oom;
mod owner;
mod reaper;
mod redact;
mod secret;
mod signals;
mod spawn;
mod status;
pub mod untrusted;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::unistd::{dup2_stdin, pipe2};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::api::listen::Listeners;
use crate::api::routes::Context;
use crate::api::server::{self, Server};
use crate::config::{Config, StoreKind};
use crate::error::Error;
use crate::log::log;
use crate::only::Lock;
use crate::owner::{Ended, Event, Owner};
use crate::reaper::Reaper;
use crate::signals::{Signals, Wakeups};
use crate::status::Status;

const HELP: &str = "\
Keeps one OpenClaw gateway running and its state backed up. Settings are RUNTIME_* variables.

usage: supervisor [-- COMMAND ARGS...]   run; COMMAND is the gateway
       supervisor check                  print the settings in force, or what is wrong with them
       supervisor healthcheck            ask the running supervisor; exit 0 when it is well
       supervisor --help | --version
";

/// For the disks that boot looks at.
const BOOT_TIME_LIMIT: Duration = Duration::from_secs(15);

/// For what is not written yet at the end, where nobody reads it.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Does what the command line says, and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    // First of all: as PID 1 a signal without a handler is lost, otherwise it kills.
    let signals = Signals::register();
    let code = match run(signals) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let mut text = format!("supervisor: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text.push_str(": ");
                text.push_str(&cause.to_string());
                source = cause.source();
            }
            text.push('\n');
            log::say(text);
            ExitCode::from(error.exit_code())
        }
    };
    log::flush(LAST_LINES);
    code
}

fn run(signals: io::Result<Signals>) -> Result<bool, Error> {
    gateway::process::keep_umask();
    // From here on nobody of our own user reads our memory or environment, both of which hold the service token.
    prctl::set_dumpable(false).map_err(|error| start("hiding our memory")(error.into()))?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map_while(|word| word.to_str()).collect();
    let command = match words.as_slice() {
        [] if arguments.is_empty() => Vec::new(),
        ["--", ..] => arguments[1..].to_vec(),
        ["check"] => return check(),
        ["healthcheck"] => return healthcheck(),
        ["--help" | "-h"] => return print(HELP),
        ["--version" | "-V"] => {
            return print(concat!("supervisor ", env!("CARGO_PKG_VERSION"), "\n"));
        }
        _ => {
            return Err(Error::Usage(
                arguments.join(" ".as_ref()).to_string_lossy().into_owned(),
            ));
        }
    };
    let signals = signals.map_err(start("catching signals"))?;
    supervise(read(command)?, signals)
}

fn read(command: Vec<OsString>) -> Result<Config, Error> {
    close_stdin().map_err(start("closing standard input"))?;
    let variables = std::env::vars_os().collect();
    let environment = config::agent_environment(&variables);
    let checked = agent::check::run(&executable()?, &environment)?;
    // Some settings name files.
    let read = move || Config::read(&variables, command, environment, &checked);
    before_the_loop("the files that the settings name", read)?.map_err(Error::Settings)
}

/// There is no event loop yet that answers while a disk hangs, so that is the end.
fn before_the_loop<T: Send + 'static>(
    what: &'static str,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    blocking::within_now(BOOT_TIME_LIMIT, call).map_err(|source| Error::Hung { what, source })
}

fn executable() -> Result<PathBuf, Error> {
    agent::executable().map_err(start("finding the backup-agent"))
}

fn check() -> Result<bool, Error> {
    let config = read(Vec::new())?;
    let lines = config
        .effective
        .iter()
        .map(|(name, value)| format!("{name}={value}\n"));
    print(&lines.collect::<String>())
}

fn healthcheck() -> Result<bool, Error> {
    let variables = std::env::vars_os().collect();
    let (listen, token) = config::read_api_alone(&variables).map_err(Error::Settings)?;
    let status = runtime()?.block_on(healthcheck::check(listen, &token))?;
    print(&format!("{status}\n"))
}

fn print(text: &str) -> Result<bool, Error> {
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(start("printing"))?;
    Ok(true)
}

fn supervise(config: Config, signals: Signals) -> Result<bool, Error> {
    log::set_level(config.log);
    descriptors::raise();
    std::panic::set_hook(Box::new(|panic| {
        // The place only: a message may quote a request.
        let place = panic.location().map(ToString::to_string);
        log!(Error, "panicked", at = place);
    }));
    let is_adopting = std::process::id() == 1 || prctl::get_child_subreaper() == Ok(true);
    if !is_adopting {
        log!(
            Warn,
            "neither PID 1 nor a subreaper: made a subreaper, so that the gateway's orphans come here"
        );
    }
    // A child's orphans come to us even when we are not PID 1.
    prctl::set_child_subreaper(true).map_err(|error| start("adopting orphans")(error.into()))?;
    let state = config.state.clone();
    let lock = before_the_loop("the files of the state", move || Lock::take(&state))??;
    runtime()?.block_on(serve(Arc::new(config), executable()?, lock, signals))
}

/// Nothing is read. Children inherit it: opened anew for each it would take one descriptor more, and those may be few.
fn close_stdin() -> io::Result<()> {
    let nothing: OwnedFd = match File::open("/dev/null") {
        Ok(null) => null.into(),
        // Without `/dev`: a pipe that nobody can write to.
        Err(_) => pipe2(OFlag::O_CLOEXEC)?.0,
    };
    Ok(dup2_stdin(nothing)?)
}

fn runtime() -> Result<Runtime, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(start("the event loop"))
}

async fn serve(
    config: Arc<Config>,
    agent: PathBuf,
    lock: Lock,
    signals: Signals,
) -> Result<bool, Error> {
    let (children, termination) = signals.listen().map_err(start("catching signals"))?;
    let (events, inbox) = mpsc::unbounded_channel();
    let (published, status) = watch::channel(Status::boot());
    let listeners = Listeners::bind(config.listen)?;
    let (address, other) = listeners.addresses().map_err(start("listening"))?;
    // The address in the other family of IPv4 and IPv6, or why there is none.
    let missing = listeners.missing.as_ref();
    let other = other.map(|address| address.to_string());
    let other = other.or_else(|| missing.map(|error| format!("none: {error}")));
    log!(
        Info,
        "listening",
        address = address.to_string(),
        other_family = other
    );
    warn(&config);

    let reaper = Reaper::default();
    let reaping = tokio::spawn(reaper.clone().run(children));
    let forwarding = tokio::spawn(forward(termination, events.clone()));
    let places = descriptors::places(server::MAX_CONNECTIONS);
    let context = Context::new(config.clone(), status, events.clone(), places);
    let (server, accepting) = Server::start(listeners, Arc::new(context), places);
    let owner = Owner::new(config, agent, lock, reaper, events, published);
    let owner = tokio::spawn(owner.run(inbox));
    match until_over(owner, reaping, forwarding, accepting).await {
        Ok(ended) => {
            server.drain().await;
            log!(Info, "stopped", is_saved = ended.is_saved);
            Ok(ended.is_well)
        }
        Err(part) => {
            log!(
                Error,
                "a part of the runtime has ended: exiting, so that the platform replaces it",
                part = part
            );
            Ok(false)
        }
    }
}

/// What the owner says at the end of the shutdown; or the part that ended before it, which only a bug can make happen.
async fn until_over(
    owner: JoinHandle<Ended>,
    reaper: JoinHandle<()>,
    signals: JoinHandle<()>,
    api: JoinHandle<()>,
) -> Result<Ended, &'static str> {
    tokio::select! {
        ended = owner => ended.map_err(|_| "owner"),
        _ = reaper => Err("reaper"),
        _ = signals => Err("signals"),
        _ = api => Err("api"),
    }
}

async fn forward(mut termination: Wakeups, events: owner::Events) {
    loop {
        for _ in 0..termination.next().await {
            let _ = events.send(Event::Shutdown);
        }
    }
}

/// What an operator should know at boot, though it stops nothing.
fn warn(config: &Config) {
    for name in &config.unknown {
        log!(Warn, "unknown setting", name = name.as_str());
    }
    if config.store == StoreKind::File {
        log!(Warn, "the store is a directory: it dies with this disk");
    }
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    if !config.user.is_apart() {
        log!(
            Warn,
            "the gateway runs as root: it can read everything that the runtime can"
        );
        return;
    }
    let (files, user) = (config.secret_files.clone(), config.user.clone());
    tokio::spawn(async move {
        let look = move || {
            let readable = files.into_iter().filter(|(_, file)| user.can_read(file));
            readable.map(|(name, _)| name).collect::<Vec<_>>()
        };
        for name in blocking::within(BOOT_TIME_LIMIT, look)
            .await
            .unwrap_or_default()
        {
            log!(
                Error,
                "the gateway's user can read a secret: let root alone read its file",
                setting = format!("{name}_FILE")
            );
        }
    });
    if let Some((names, failing)) = capabilities::missing() {
        log!(
            Error,
            "root lacks capabilities: add them, as with docker run --cap-add",
            capabilities = names,
            failing = failing
        );
    }
}

fn start(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Start { action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_any_part_is_told_and_the_end_of_the_owner_is_the_result() {
        std::panic::set_hook(Box::new(|_| {}));
        let idle = || tokio::spawn(std::future::pending());
        let ended = || tokio::spawn(async {});
        let broken = || tokio::spawn(async { panic!("on purpose") });
        for end in [ended, broken] {
            let part = until_over(tokio::spawn(std::future::pending()), end(), idle(), idle());
            assert_eq!(part.await, Err("reaper"));
            let part = until_over(tokio::spawn(std::future::pending()), idle(), end(), idle());
            assert_eq!(part.await, Err("signals"));
            let part = until_over(tokio::spawn(std::future::pending()), idle(), idle(), end());
            assert_eq!(part.await, Err("api"));
        }
        let owner = tokio::spawn(async { panic!("on purpose") });
        assert_eq!(
            until_over(owner, idle(), idle(), idle()).await,
            Err("owner")
        );
        for is_well in [true, false] {
            let ended = Ended {
                is_saved: true,
                is_well,
            };
            let owner = tokio::spawn(async move { ended });
            let result = until_over(owner, idle(), idle(), idle()).await;
            assert_eq!(result, Ok(ended));
        }
    }
}
