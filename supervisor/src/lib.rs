//! PID 1 of the container: keeps one gateway running and its state backed up.

mod agent;
mod api;
mod backups;
mod blocking;
mod capabilities;
mod clock;
mod config;
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
mod stderr;
pub mod untrusted;

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use nix::sys::prctl;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};

use crate::api::routes::Context;
use crate::api::server::{Server, listen};
use crate::config::{Config, StoreKind};
use crate::error::Error;
use crate::log::log;
use crate::owner::{Event, Owner};
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

/// Does what the command line says, and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    // First of all: as PID 1 a signal without a handler is lost, otherwise it kills.
    let signals = Signals::register();
    match run(signals) {
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
            let _ = io::stderr().write_all(text.as_bytes());
            ExitCode::from(error.exit_code())
        }
    }
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
    let variables = std::env::vars_os().collect();
    let environment = config::agent_environment(&variables);
    let checked = agent::check::run(&executable()?, &environment)?;
    Config::read(&variables, command, environment, &checked).map_err(Error::Settings)
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
    let _lock = only::lock(&config.state)?;
    runtime()?.block_on(serve(Arc::new(config), executable()?, signals))
}

fn runtime() -> Result<Runtime, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(start("the event loop"))
}

async fn serve(config: Arc<Config>, agent: PathBuf, signals: Signals) -> Result<bool, Error> {
    let (children, termination) = signals.listen().map_err(start("catching signals"))?;
    let (events, inbox) = mpsc::unbounded_channel();
    let (published, status) = watch::channel(Status::boot());
    let address = config.listen;
    let listening = |source| Error::Listen { address, source };
    let listener = listen(address).map_err(listening)?;
    let address = listener.local_addr().map_err(listening)?;
    log!(Info, "listening", address = address.to_string());
    warn(&config);

    let reaper = Reaper::default();
    tokio::spawn(reaper.clone().run(children));
    tokio::spawn(forward(termination, events.clone()));
    let context = Context::new(config.clone(), status, events.clone());
    let server = Server::start(listener, Arc::new(context));
    let ended = Owner::new(config, agent, reaper, events, published)
        .run(inbox)
        .await;
    server.drain().await;
    log!(Info, "stopped", is_saved = ended.is_saved);
    Ok(ended.is_well)
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
    for (name, file) in &config.secret_files {
        if config.user.can_read(file) {
            log!(
                Error,
                "the gateway's user can read a secret: let root alone read its file",
                setting = format!("{name}_FILE")
            );
        }
    }
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
