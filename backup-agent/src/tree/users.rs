//! Which processes use a tree: what they write in there is lost when it is replaced.

use std::{
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use nix::unistd::{Pid, getppid};

use super::process;

/// Processes that are named.
const MOST_NAMED: usize = 8;

/// The processes that use a tree, and why some others cannot be told.
pub struct Users {
    /// Name and number of each.
    pub named: Vec<String>,
    pub doubt: Option<process::Error>,
}

/// The processes that work in the tree below `root`, have one of its files open or map one. Those that wait for this program
/// (a shell, sudo) are not among them.
pub fn users(root: &Path) -> Users {
    let root = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    let callers = callers();
    let mut users = Users {
        named: Vec::new(),
        doubt: None,
    };
    let others = match process::others() {
        Ok(others) => others,
        Err(error) => {
            users.doubt = Some(error);
            return users;
        }
    };
    for pid in others.into_iter().filter(|pid| !callers.contains(pid)) {
        if users.named.len() == MOST_NAMED {
            break;
        }
        match is_used(pid, &root) {
            Ok(false) => {}
            Ok(true) => {
                let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
                let name = name.trim_ascii().escape_ascii();
                users.named.push(format!("{name} {pid}"));
            }
            Err(error) => users.doubt = Some(error),
        }
    }
    users
}

/// Our parent, its parent and so on.
fn callers() -> Vec<Pid> {
    let mut callers = vec![getppid()];
    while let Some(last) = callers.last()
        && let Ok(stat) = fs::read(format!("/proc/{last}/stat"))
        // The name of a program need not be UTF-8.
        && let Some((_, rest)) = String::from_utf8_lossy(&stat).rsplit_once(')')
        && let Some(parent) = rest.split_whitespace().nth(1)
        && let Ok(parent) = parent.parse::<i32>()
        && parent > 1
    {
        callers.push(Pid::from_raw(parent));
    }
    callers
}

fn is_used(pid: Pid, root: &Path) -> Result<bool, process::Error> {
    let is_below = |link: &PathBuf| link.starts_with(root);
    for link in ["cwd", "root", "exe"].map(|name| format!("/proc/{pid}/{name}")) {
        if fs::read_link(link).is_ok_and(|link| is_below(&link)) {
            return Ok(true);
        }
    }
    let folder = format!("/proc/{pid}/fd");
    let open = || -> io::Result<bool> {
        for entry in fs::read_dir(&folder)? {
            if fs::read_link(entry?.path()).is_ok_and(|link| is_below(&link)) {
                return Ok(true);
            }
        }
        let maps = fs::read(format!("/proc/{pid}/maps"))?;
        let path = |line: &[u8]| Some(line[line.iter().position(|byte| *byte == b'/')?..].to_vec());
        let mut paths = maps.split(|byte| *byte == b'\n').filter_map(path);
        Ok(paths.any(|path| Path::new(std::ffi::OsStr::from_bytes(&path)).starts_with(root)))
    };
    let found = process::unless_gone(open(), &folder)?;
    Ok(found.unwrap_or(false))
}
