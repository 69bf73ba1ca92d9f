//! What is read from the gateway's own tree: its token and its lock file.
//!
//! The tree is hostile, its disk may be dead, and we may be root: no link is followed below its top, nothing but a regular
//! file is read, no more than a bound, and on a thread. Whatever is odd about a file, it is as if it were not there; a file
//! that cannot be read, or not in time, is an error.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use crate::blocking;
use crate::config::Config;
use crate::json::Json;
use crate::secret::{REDACTED, Secret};

const MAX_CONFIGURATION: u64 = 1 << 20;
const MAX_LOCK: u64 = 64 * 1024;

/// As they are written. What is longer is odd.
const MAX_TOKEN: usize = 4096;
const MAX_OWNER: usize = 1024;

/// For a read and the wait for its turn. Disks under load take milliseconds.
const TIME_LIMIT: Duration = Duration::from_secs(3);

/// Files that are read at once: while one hangs, others wait for it and not on threads of their own.
static READS: Semaphore = Semaphore::const_new(1);

/// The token that was found last: a secret that no setting has.
static LAST_TOKEN: Mutex<Option<Secret>> = Mutex::new(None);

/// The token of the gateway's configuration file, once a call has read it.
pub fn last_token() -> Option<Secret> {
    let last = LAST_TOKEN.lock().unwrap_or_else(PoisonError::into_inner);
    last.clone()
}

/// A sentence of the gateway without that token.
pub fn without_token(text: Cow<'_, str>) -> Cow<'_, str> {
    match last_token().filter(|token| text.contains(token.expose())) {
        Some(token) => text.replace(token.expose(), REDACTED).into(),
        None => text,
    }
}

/// The secret that the gateway expects: a string in its configuration file wins over ours, as it does in the gateway.
/// A file with comments (JSON5), and a token that is a reference, are left to the gateway; then it is ours.
///
/// # Errors
/// What keeps the file from being read.
pub async fn token(config: &Config) -> io::Result<String> {
    let path = config.state_directory.join("openclaw.json");
    let found = read(&config.root, path, MAX_CONFIGURATION, token_in).await?;
    if let Some(token) = &found {
        let mut last = LAST_TOKEN.lock().unwrap_or_else(PoisonError::into_inner);
        *last = Some(Secret::new(token.clone()));
    }
    Ok(found.unwrap_or_else(|| config.gateway_token.expose().to_owned()))
}

/// The token in the text of `openclaw.json`.
pub fn token_in(text: &str) -> Option<String> {
    let token = Json::read(text)?.at(&["gateway", "auth", "token"])?;
    let token = token.text(MAX_TOKEN).filter(|token| !token.is_empty())?;
    Some(token.into_owned())
}

/// Whom a restart request must name, from the lock that the running gateway keeps.
///
/// # Errors
/// What keeps the lock from being read.
pub async fn restart_target(config: &Config, pid: i32) -> io::Result<Option<Value>> {
    let path = config
        .state_directory
        .join("tmp")
        .join(format!("openclaw-{}", config.user.uid))
        .join("gateway.state.lock");
    let owner = move |text: &str| owner_in(text, pid);
    let owner = read(&config.root, path, MAX_LOCK, owner).await?;
    let port = config.gateway_address.port();
    Ok(owner.map(|owner| json!({ "pid": pid, "ownerId": owner, "port": port })))
}

/// The owner in the text of the lock, when it is that of `pid`.
pub fn owner_in(text: &str, pid: i32) -> Option<Value> {
    let lock = Json::read(text)?;
    let is_its = lock.field("pid")?.raw() == pid.to_string();
    let owner = lock.field("ownerId").and_then(|id| id.text(MAX_OWNER));
    is_its.then(|| owner.into())
}

/// What `take` finds in a file; nothing, when there is no such file, or anything is odd about it.
async fn read<T: Send + 'static>(
    root: &Path,
    path: PathBuf,
    most: u64,
    take: impl FnOnce(&str) -> Option<T> + Send + 'static,
) -> io::Result<Option<T>> {
    let hangs = |_| {
        io::Error::new(
            io::ErrorKind::TimedOut,
            "another read hangs: check the file system below it",
        )
    };
    let end = Instant::now() + TIME_LIMIT;
    let turn = timeout_at(end, READS.acquire()).await.map_err(hangs)?;
    let root = root.to_owned();
    let read = move || {
        let text = text(&root, &path, most);
        // Kept while this hangs, so that it is the only one.
        drop(turn);
        Ok(text?.and_then(|text| take(&text)))
    };
    blocking::within(end - Instant::now(), read).await?
}

fn text(root: &Path, path: &Path, most: u64) -> io::Result<Option<String>> {
    // Outside of its home the operator chose the directory by hand; then the file's own folder is where trust ends.
    let split = match path.strip_prefix(root) {
        Ok(below) => Some((root, below)),
        Err(_) => path.parent().zip(path.file_name().map(Path::new)),
    };
    let Some((top, below)) = split else {
        return Ok(None);
    };
    let file = match open_beneath(top, below) {
        Ok(file) => file,
        // There is none; or a link, a file in the place of a folder, or a socket.
        Err(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() > most {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(most).read_to_end(&mut text)?;
    Ok(String::from_utf8(text).ok())
}

/// Opens `below` one name at a time, so that no link is followed on the way either. A fifo does not make us wait.
fn open_beneath(top: &Path, below: &Path) -> nix::Result<File> {
    let directory = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at: OwnedFd = open(top, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    for name in below.parent().into_iter().flatten() {
        at = openat(&at, name, directory, Mode::empty())?;
    }
    let name: &OsStr = below.file_name().ok_or(Errno::ENOENT)?;
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    Ok(File::from(openat(&at, name, flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_without_links_on_the_way_are_read() {
        let top = std::env::temp_dir().join(format!("supervisor-files-{}", std::process::id()));
        let inside = top.join("root/a");
        std::fs::create_dir_all(&inside).expect("can make folders");
        std::fs::write(inside.join("real.json"), r#"{"x":1}"#).expect("can write");
        std::fs::write(top.join("outside.json"), r#"{"x":2}"#).expect("can write");
        std::fs::write(inside.join("large.json"), r#"{"x":1} "#).expect("can write");
        std::os::unix::fs::symlink("../../outside.json", inside.join("link.json"))
            .expect("can link");
        std::os::unix::fs::symlink("a", top.join("root/folder")).expect("can link");
        nix::unistd::mkfifo(&inside.join("fifo.json"), Mode::S_IRWXU).expect("can make a fifo");

        let root = top.join("root");
        let read = |name: &str| text(&root, &root.join(name), 7).expect("nothing fails");
        assert_eq!(read("a/real.json").as_deref(), Some(r#"{"x":1}"#));
        for name in [
            "a/link.json",
            "folder/real.json",
            "a/fifo.json",
            "a",
            "a/none.json",
            "a/large.json",
        ] {
            assert_eq!(read(name), None, "{name}");
        }
        std::fs::remove_dir_all(top).expect("can remove");
    }

    #[test]
    fn a_token_is_a_text_in_the_configuration() {
        let token = |text| token_in(text).unwrap_or_default();
        assert_eq!(token(r#"{"gateway":{"auth":{"token":"a\u0062"}}}"#), "ab");
        for none in [
            r#"{"gateway":{"auth":{"token":""}}}"#,
            r#"{"gateway":{"auth":{"token":{"source":"env"}}}}"#,
            r#"{"gateway":{"auth":{"token":"a"}}} // a comment"#,
            r#"{"gateway":"token"}"#,
            "",
        ] {
            assert_eq!(token(none), "", "{none}");
        }
        let long = "x".repeat(MAX_TOKEN + 1);
        let long = format!(r#"{{"gateway":{{"auth":{{"token":"{long}"}}}}}}"#);
        assert_eq!(token(&long), "");
    }

    #[test]
    fn a_lock_names_its_owner() {
        let lock = r#"{"pid":12,"ownerId":"o"}"#;
        assert_eq!(owner_in(lock, 12), Some(json!("o")));
        assert_eq!(owner_in(lock, 1), None);
        assert_eq!(
            owner_in(r#"{"pid":12,"ownerId":[]}"#, 12),
            Some(Value::Null)
        );
    }
}
