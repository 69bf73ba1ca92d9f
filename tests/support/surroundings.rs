//! What keeps a test apart from the machine it runs on: a known umask, folders that every user may enter, and programs that
//! get no variable and no default user of the machine.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;

use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::binaries::binary;

/// Gives this process the umask that tests count on. Every way into the harness comes by here.
pub fn settle() {
    static SETTLED: Once = Once::new();
    SETTLED.call_once(|| {
        umask(Mode::S_IWGRP | Mode::S_IWOTH);
    });
}

/// A folder that every user may enter: the programs may work as somebody else.
pub fn folder() -> TempDir {
    settle();
    let folder = tempfile::Builder::new()
        .prefix("e2e-")
        .tempdir_in(base())
        .expect("can make a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    folder
}

/// `TMPDIR` where every user gets there, else what is there on every machine.
fn base() -> PathBuf {
    let may_pass = |path: &Path| {
        fs::metadata(path).is_ok_and(|status| status.permissions().mode() & 0o001 != 0)
    };
    let wanted = std::env::temp_dir();
    if wanted.is_absolute() && wanted.ancestors().all(may_pass) {
        return wanted;
    }
    PathBuf::from("/tmp")
}

/// One of the programs under test, with an empty environment but for whom the gateway runs as: a user `openclaw` would be
/// the default on a machine that has one.
pub fn program(name: &str) -> Command {
    let mut command = Command::new(binary(name));
    empty(&mut command);
    command
}

/// Empties a program's environment but for whom the gateway runs as.
pub fn empty(command: &mut Command) {
    command.env_clear().env(GATEWAY_USER, caller());
}

pub const GATEWAY_USER: &str = "RUNTIME_GATEWAY_USER";

/// Who runs the tests, as a setting names him.
pub fn caller() -> String {
    geteuid().to_string()
}

/// A program that ends by running another one, such as strace(1) or `sh -c '… exec "$@"'`: `inner` and its arguments come behind
/// the outer one's own. It gets the system's programs and the inner one's variables, and pipes for its output.
pub fn around(mut outer: Command, inner: &Command) -> Command {
    let set = |(name, value): (&OsStr, Option<&OsStr>)| Some((name.to_owned(), value?.to_owned()));
    outer
        .arg(inner.get_program())
        .args(inner.get_args())
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .envs(inner.get_envs().filter_map(set))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    outer
}
