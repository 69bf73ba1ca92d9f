//! A disk that stops answering: an empty file system of our own (fuse(4)) that takes requests and leaves them. Whoever waits for
//! one waits in the kernel, where no signal reaches it.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::mount::{MsFlags, mount};

// Of linux/fuse.h.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const STATFS: u32 = 17;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const BATCH_FORGET: u32 = 42;

/// No request is longer: `max_write` is 64 KiB.
const LARGEST: usize = 1 << 20;

/// The mount. It lets everybody go and goes away with this.
pub struct HungDisk {
    at: PathBuf,
    is_hung: Arc<AtomicBool>,
}

/// Mounts it, answering, with a top folder that belongs to this user. `None`, with a word about it, where that is not possible.
pub fn disk(at: &Path, owner: u32) -> Option<HungDisk> {
    std::fs::create_dir_all(at).expect("can make a folder");
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let mounted = device.and_then(|device| {
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(
            Some("fuse"),
            at,
            Some("fuse"),
            flags,
            Some(options.as_str()),
        )?;
        Ok(device)
    });
    let device = match mounted {
        Ok(device) => device,
        Err(error) => {
            eprintln!("skipped: cannot mount a file system of our own: {error}");
            return None;
        }
    };
    let is_hung = Arc::new(AtomicBool::new(false));
    let flag = is_hung.clone();
    thread::spawn(move || serve(device, owner, &flag));
    Some(HungDisk {
        at: at.to_owned(),
        is_hung,
    })
}

impl HungDisk {
    /// From now on nothing is answered.
    pub fn hang(&self) {
        self.is_hung.store(true, Ordering::Relaxed);
    }
}

impl Drop for HungDisk {
    fn drop(&mut self) {
        // By force: whoever waits is told that the connection has ended.
        let _ = Command::new("umount").arg("-f").arg(&self.at).status();
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

/// Until it is unmounted.
fn serve(mut device: File, owner: u32, is_hung: &AtomicBool) {
    let mut request = vec![0; LARGEST];
    while let Ok(count @ 40..) = device.read(&mut request) {
        let number = |at: usize| {
            let bytes = request[..count][at..at + 4].try_into();
            u32::from_ne_bytes(bytes.expect("are four"))
        };
        let opcode = number(4);
        let is_told_only = matches!(opcode, FORGET | BATCH_FORGET);
        if is_told_only || opcode != INIT && is_hung.load(Ordering::Relaxed) {
            continue;
        }
        let (error, body) = match opcode {
            INIT => (0, init(number(44).min(31))),
            GETATTR => (0, attributes(owner)),
            OPENDIR => (0, vec![0; 16]),
            STATFS => (0, vec![0; 80]),
            READDIR | RELEASEDIR => (0, Vec::new()),
            LOOKUP => (-nix::libc::ENOENT, Vec::new()),
            _ => (-nix::libc::ENOSYS, Vec::new()),
        };
        let length = u32::try_from(16 + body.len()).expect("is short");
        let mut answer = length.to_ne_bytes().to_vec();
        answer.extend_from_slice(&i32::to_ne_bytes(error));
        answer.extend_from_slice(&request[8..16]);
        answer.extend_from_slice(&body);
        // Whoever asked may have gone.
        let _ = device.write(&answer);
    }
}

/// `fuse_init_out`: the version, and what may be written at once.
fn init(minor: u32) -> Vec<u8> {
    let mut body = vec![0; 64];
    body[..4].copy_from_slice(&7_u32.to_ne_bytes());
    body[4..8].copy_from_slice(&minor.to_ne_bytes());
    body[20..24].copy_from_slice(&65_536_u32.to_ne_bytes());
    body
}

/// `fuse_attr_out`: the one folder, never kept in a cache.
fn attributes(owner: u32) -> Vec<u8> {
    let mut body = vec![0; 104];
    body[16] = 1;
    let mode = nix::libc::S_IFDIR | 0o755;
    for (at, value) in [(76, mode), (80, 2), (84, owner), (88, owner)] {
        body[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }
    body
}
