//! At most one supervisor at a time works with a state directory: it holds a lock on a file there for as long as it lives. The
//! file tells the next one which gateway was running.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::log::log;

const NAME: &str = "supervisor.lock";

/// Longer than what is written.
const MAX_TEXT: u64 = 200;

/// The lock, which ends with the process.
#[derive(Clone, Debug)]
pub struct Lock {
    /// None where the file system has no locks or takes no files: then nobody else is found.
    file: Option<Arc<Mutex<File>>>,
    /// What the supervisor before was running when it ended.
    pub earlier: Option<Gateway>,
}

/// A gateway that has no user of its own, and so no better mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Also the number of its session.
    pub pid: i32,
    /// In clock ticks since the boot of the machine (`starttime` of proc(5)): numbers of processes are used again.
    pub started: u64,
    /// Of the machine.
    boot: String,
}

impl Lock {
    /// # Errors
    /// Another supervisor has it.
    pub fn take(state: &Path) -> Result<Self, Error> {
        match try_lock(state) {
            Ok((file, earlier)) => Ok(Self {
                file: Some(Arc::new(Mutex::new(file))),
                earlier,
            }),
            Err((TryLockError::WouldBlock, holder)) => Err(Error::Another {
                state: state.to_owned(),
                holder,
            }),
            Err((TryLockError::Error(error), _)) => {
                log!(
                    Warn,
                    "cannot lock the state directory: a second supervisor would not be noticed",
                    reason = error.to_string()
                );
                Ok(Self {
                    file: None,
                    earlier: None,
                })
            }
        }
    }

    /// Writes down which gateway runs. The disk may hang.
    ///
    /// # Errors
    /// What keeps it from being written, or its process from being looked at.
    pub fn note(&self, pid: i32) -> io::Result<()> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let started = started(pid)?;
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let us = std::process::id();
        write(&mut file, &format!("{us}\n{pid} {started} {}\n", boot()?))
    }
}

impl Gateway {
    /// Of this boot of the machine.
    fn read(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let found = Self {
            pid: words.next()?.parse().ok()?,
            started: words.next()?.parse().ok()?,
            boot: words.next()?.to_owned(),
        };
        (boot().ok()? == found.boot).then_some(found)
    }
}

/// In clock ticks since the boot of the machine.
pub fn started(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat"))?;
    let stat = String::from_utf8_lossy(&stat);
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    // It is field 22, and the third one comes after the name.
    let started = fields.and_then(|fields| fields.split_whitespace().nth(22 - 3)?.parse().ok());
    started.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn boot() -> io::Result<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

/// With the lock's holder, if it has written its pid.
fn try_lock(state: &Path) -> Result<(File, Option<Gateway>), (TryLockError, String)> {
    let failed = |error: io::Error| (TryLockError::Error(error), String::new());
    let made = DirBuilder::new().recursive(true).mode(0o700).create(state);
    made.map_err(failed)?;
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(state.join(NAME))
        .map_err(failed)?;
    let locked = file.try_lock();
    let mut text = String::new();
    let _ = (&file).take(MAX_TEXT).read_to_string(&mut text);
    let mut lines = text.lines();
    let holder = lines.next().unwrap_or_default();
    if let Err(error) = locked {
        return Err((error, holder.to_owned()));
    }
    let noted = lines.next().unwrap_or_default();
    // The pid is for a person only: a disk without room for it has the lock all the same. What is noted stays until another
    // gateway runs: we may be killed before the earlier one is.
    let _ = write(&mut file, &format!("{}\n{noted}\n", std::process::id()));
    Ok((file, Gateway::read(noted)))
}

fn write(file: &mut File, text: &str) -> io::Result<()> {
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_holds_the_state() {
        let state = std::env::temp_dir().join(format!("supervisor-only-{}", std::process::id()));
        let first = Lock::take(&state).expect("nobody has it");
        assert!(first.file.is_some());
        let refused = Lock::take(&state)
            .expect_err("the first one has it")
            .to_string();
        assert!(
            refused.contains(&std::process::id().to_string()),
            "{refused}"
        );
        let us = i32::try_from(std::process::id()).expect("pids fit");
        first.note(us).expect("can write");
        drop(first);
        // One in between is killed before it has done anything.
        drop(Lock::take(&state).expect("nobody has it"));
        let second = Lock::take(&state).expect("nobody has it");
        let earlier = second.earlier.expect("is noted");
        let started = started(us).expect("is there");
        assert_eq!((earlier.pid, earlier.started), (us, started));
        std::fs::remove_dir_all(state).expect("can remove");
    }
}
