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

/// The processes that work in the tree below `root`, have one of its files open or map one, each by name and number.
/// Those that wait for this program (a shell, sudo) are not among them.
pub fn users(root: &Path) -> Result<Vec<String>, process::Error> {
    let root = fs::canonicalize(root).unwrap_or_else(|_| root.to_owned());
    let callers = callers();
    let mut users = Vec::new();
    for pid in process::others()? {
        if users.len() == MOST_NAMED {
            break;
        }
        if !callers.contains(&pid) && is_used(pid, &root)? {
            let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            users.push(format!("{} {pid}", name.trim_ascii().escape_ascii()));
        }
    }
    Ok(users)
}

/// Our parent, its parent and so on.
fn callers() -> Vec<Pid> {
    let mut callers = vec![getppid()];
    while let Some(last) = callers.last()
        && let Ok(stat) = fs::read_to_string(format!("/proc/{last}/stat"))
        && let Some((_, rest)) = stat.rsplit_once(')')
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
    let links = ["cwd", "root", "exe"].map(|name| format!("/proc/{pid}/{name}"));
    if links
        .iter()
        .any(|link| fs::read_link(link).is_ok_and(|link| link != root.join("/") && is_below(&link)))
    {
        return Ok(true);
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
