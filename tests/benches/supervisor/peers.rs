//! The supervisor and its peers, each keeping one program running.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use e2e::binaries::binary;
use e2e::supervisor::{Setup, descendants};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Outcome;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Peer {
    Own,
    S6,
    Runit,
    Tini,
    Horust,
    Supervisord,
    /// No supervisor at all: the floor of a restart.
    Loop,
}

impl Peer {
    pub const ALL: [Self; 7] = [
        Self::Own,
        Self::S6,
        Self::Runit,
        Self::Tini,
        Self::Horust,
        Self::Supervisord,
        Self::Loop,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "supervisor",
            Self::S6 => "s6",
            Self::Runit => "runit",
            Self::Tini => "tini",
            Self::Horust => "horust",
            Self::Supervisord => "supervisord",
            Self::Loop => "a loop of sh",
        }
    }

    /// What runs all the time.
    pub fn programs(self) -> Vec<PathBuf> {
        let names: &[&str] = match self {
            Self::Own => return vec![binary("supervisor")],
            Self::S6 => &["s6-svscan", "s6-supervise"],
            Self::Runit => &["runsvdir", "runsv"],
            Self::Tini => &["tini"],
            Self::Horust => &["horust"],
            Self::Supervisord => &["supervisord"],
            Self::Loop => &["sh"],
        };
        names.iter().filter_map(|name| find(name)).collect()
    }

    pub fn is_installed(self) -> bool {
        !self.programs().is_empty()
    }

    /// Waits a second before each start, or each second one, by design: a few are enough.
    pub fn restarts(self) -> usize {
        match self {
            Self::Own | Self::Loop => 40,
            Self::Tini => 0,
            _ => 6,
        }
    }

    /// A command line that keeps `program` running; of ours, the whole setup with it.
    pub fn command(self, setup: &Setup, program: &[String]) -> Outcome<Command> {
        let folder = setup.folder.path();
        let tool = |name: &str| Command::new(find(name).unwrap_or_default());
        let command = match self {
            Self::Own => return Ok(setup.program()),
            Self::S6 | Self::Runit => {
                let service = folder.join("scan/service");
                fs::create_dir_all(&service)?;
                let script = format!("#!/bin/sh\nexec {}\n", program.join(" "));
                fs::write(service.join("run"), script)?;
                fs::set_permissions(service.join("run"), Permissions::from_mode(0o755))?;
                let mut command = tool(if self == Self::S6 {
                    "s6-svscan"
                } else {
                    "runsvdir"
                });
                command.arg(folder.join("scan"));
                command
            }
            Self::Tini => {
                let mut command = tool("tini");
                command.arg("--").args(program);
                command
            }
            Self::Horust => {
                let services = folder.join("services");
                fs::create_dir_all(&services)?;
                let text = format!(
                    "command = \"{}\"\n[restart]\nstrategy = \"always\"\nbackoff = \"0s\"\n",
                    program.join(" ")
                );
                fs::write(services.join("service.toml"), text)?;
                let mut command = tool("horust");
                command.arg("--services-path").arg(services);
                command
            }
            Self::Loop => {
                let script = format!("while :; do {}; done", program.join(" "));
                let mut command = tool("sh");
                command.arg("-c").arg(script);
                command
            }
            Self::Supervisord => {
                let file = folder.join("supervisord.conf");
                let text = format!(
                    "[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={0}/pid\n\
                     [program:service]\ncommand={1}\nautorestart=true\nstartsecs=0\n",
                    folder.display(),
                    program.join(" ")
                );
                fs::write(&file, text)?;
                let mut command = tool("supervisord");
                command.arg("-c").arg(file);
                command
            }
        };
        Ok(command)
    }
}

/// In `PATH`.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// A program under test with everything below it, all of which ends with it.
pub struct Tree(pub Child);

impl Tree {
    pub fn start(command: &mut Command) -> Outcome<Self> {
        let quiet = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(Self(quiet.spawn()?))
    }

    pub fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap_or_default()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // From the top: what is below must not be started again.
        let all = descendants(self.pid());
        for pid in std::iter::once(self.pid()).chain(all) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.0.wait();
    }
}
