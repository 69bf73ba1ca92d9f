//! What is read from the gateway's own tree: its token and its lock file.
//!
//! The tree is hostile and we may be root: no link is followed below its top, nothing but a regular file is read, and no
//! more than a bound. Whatever is odd about a file, it is as if it were not there.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;
use serde_json::{Value, json};

use crate::config::Config;

const MAX_FILE: u64 = 1 << 20;

/// The secret that the gateway expects: a string in its configuration file wins over ours, as it does in the gateway.
/// A file with comments (JSON5), and a token that is a reference, are left to the gateway; then it is ours.
pub fn token(config: &Config) -> String {
    let path = config.state_directory.join("openclaw.json");
    read_json(&config.root, &path)
        .and_then(|file| Some(file["gateway"]["auth"]["token"].as_str()?.to_owned()))
        .filter(|token| !token.is_empty())
        .unwrap_or_else(|| config.gateway_token.expose().to_owned())
}

/// Whom a restart request must name, from the lock that the running gateway keeps.
pub fn restart_target(config: &Config, pid: i32) -> Option<Value> {
    let lock = config
        .state_directory
        .join("tmp")
        .join(format!("openclaw-{}", config.user.uid))
        .join("gateway.state.lock");
    let lock = read_json(&config.root, &lock)?;
    (lock["pid"] == pid).then(|| {
        json!({
            "pid": pid,
            "ownerId": lock["ownerId"],
            "port": config.gateway_address.port(),
        })
    })
}

fn read_json(root: &Path, path: &Path) -> Option<Value> {
    // Outside of its home the operator chose the directory by hand; then the file's own folder is where trust ends.
    let (top, below) = match path.strip_prefix(root) {
        Ok(below) => (root.to_owned(), below.to_owned()),
        Err(_) => (path.parent()?.to_owned(), PathBuf::from(path.file_name()?)),
    };
    let mut text = Vec::new();
    let file = open_beneath(&top, &below)?;
    file.take(MAX_FILE).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

/// Opens `below` one name at a time, so that no link is followed on the way either. A fifo does not make us wait.
fn open_beneath(top: &Path, below: &Path) -> Option<File> {
    let directory = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut at: OwnedFd = open(top, OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).ok()?;
    for name in below.parent()? {
        at = openat(&at, name, directory, Mode::empty()).ok()?;
    }
    let name: &OsStr = below.file_name()?;
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(openat(&at, name, flags, Mode::empty()).ok()?);
    file.metadata().ok()?.is_file().then_some(file)
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
        std::os::unix::fs::symlink("../../outside.json", inside.join("link.json"))
            .expect("can link");
        std::os::unix::fs::symlink("a", top.join("root/folder")).expect("can link");
        nix::unistd::mkfifo(&inside.join("fifo.json"), Mode::S_IRWXU).expect("can make a fifo");

        let root = top.join("root");
        let read = |name: &str| read_json(&root, &root.join(name));
        assert_eq!(read("a/real.json"), Some(json!({"x": 1})));
        for name in [
            "a/link.json",
            "folder/real.json",
            "a/fifo.json",
            "a",
            "a/none.json",
        ] {
            assert_eq!(read(name), None, "{name}");
        }
        std::fs::remove_dir_all(top).expect("can remove");
    }
}
