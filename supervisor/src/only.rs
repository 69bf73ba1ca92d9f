//! At most one supervisor at a time works with a state directory: it holds a lock on a file there for as long as it lives.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::error::Error;
use crate::log::log;

const NAME: &str = "supervisor.lock";

/// Longer than any pid.
const MAX_PID: u64 = 20;

/// The lock, which ends with the process. None where the file system has no locks or takes no files: then nobody else is found.
///
/// # Errors
/// Another supervisor has it.
pub fn lock(state: &Path) -> Result<Option<File>, Error> {
    match try_lock(state) {
        Ok(file) => Ok(Some(file)),
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
            Ok(None)
        }
    }
}

/// With the lock's holder, if it has written its pid.
fn try_lock(state: &Path) -> Result<File, (TryLockError, String)> {
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
    if let Err(error) = file.try_lock() {
        let mut holder = String::new();
        let _ = (&file).take(MAX_PID).read_to_string(&mut holder);
        return Err((error, holder.trim().to_owned()));
    }
    // For a person only: a disk without room for it has the lock all the same.
    let _ = file.set_len(0);
    let _ = writeln!(file, "{}", std::process::id());
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_one_is_told_who_holds_the_state() {
        let state = std::env::temp_dir().join(format!("supervisor-only-{}", std::process::id()));
        let first = lock(&state).expect("nobody has it");
        assert!(first.is_some());
        let refused = lock(&state).expect_err("the first one has it").to_string();
        assert!(
            refused.contains(&std::process::id().to_string()),
            "{refused}"
        );
        drop(first);
        assert!(lock(&state).expect("nobody has it").is_some());
        std::fs::remove_dir_all(state).expect("can remove");
    }
}
