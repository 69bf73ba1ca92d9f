//! File systems for tests: small, odd or full ones, mounted below a test's folder. Only root can; others skip the test.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, mount as mount_call};

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

/// A disk that does not answer: every call on it hangs. When this goes, each of them fails.
pub struct Hung {
    /// The file system's end of FUSE, from which nobody reads. It goes first, or to unmount hangs too.
    _server: File,
    _mount: Mount,
}

/// Mounts one; `None`, with a word about it, where that is not possible.
pub fn hung(at: &Path) -> Option<Hung> {
    std::fs::create_dir_all(at).expect("can make a directory");
    let skipped = |reason: String| eprintln!("skipped: cannot mount a disk that hangs: {reason}");
    let server = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let server = server.map_err(|error| skipped(error.to_string())).ok()?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other\0",
        server.as_raw_fd()
    );
    let options = std::ffi::CStr::from_bytes_with_nul(options.as_bytes()).expect("ends so");
    mount_call("none", at, "fuse", MountFlags::empty(), options)
        .map_err(|error| skipped(error.to_string()))
        .ok()?;
    Some(Hung {
        _server: server,
        _mount: Mount(at.to_owned()),
    })
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
