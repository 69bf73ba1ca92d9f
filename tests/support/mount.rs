//! File systems for tests: small, odd or full ones, mounted below a test's folder. Only root can; others skip the test.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A mount; it goes away with this.
pub struct Mount(PathBuf);

/// Mounts a file system of memory.
pub fn tmpfs(at: &Path, options: &str) -> Option<Mount> {
    mount(at, &["-t", "tmpfs", "-o", options, "tmpfs"])
}

/// Mounts something; `None`, with a word about it, where that is not possible.
pub fn mount(at: &Path, arguments: &[&str]) -> Option<Mount> {
    std::fs::create_dir_all(at).expect("can make a directory");
    let output = Command::new("mount").args(arguments).arg(at).output();
    match output {
        Ok(output) if output.status.success() => Some(Mount(at.to_owned())),
        failed => {
            eprintln!("skipped: cannot mount {arguments:?}: {failed:?}");
            None
        }
    }
}

impl Mount {
    /// Changes its options.
    pub fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let status = Command::new("mount")
            .args(["-o", &options])
            .arg(&self.0)
            .status();
        assert!(status.is_ok_and(|status| status.success()), "{options}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Also while something is still open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
