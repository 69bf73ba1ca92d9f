//! Which files the processes of a user may change without a trace in the files' times: through shared mappings, and by writes
//! that go past the cache and are finished by the kernel while the process is held.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::fs::MetadataExt,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use nix::{
    libc::{O_ACCMODE, O_DIRECT, O_RDONLY},
    unistd::{Pid, Uid},
};

use super::{
    identity::Identity,
    process::{self, Answer, Status, unless_gone},
};
use crate::capabilities;

/// Longest look at what processes map, while they run: it takes milliseconds, unless the kernel waits for a page.
pub const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// A read of `maps` takes as much of it at once.
const BUFFER: usize = 64 << 10;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unseen {
    /// Of files that may have changed whatever their times say. By number alone: overlayfs shows another device in a mapping
    /// than in a status. A file of another file system that has the number costs a read, no more.
    pub inodes: HashSet<u64>,
    /// A process that may have a write under way in the kernel, which no stop of it stops.
    pub in_flight: Option<Pid>,
    /// Such a write may be to a file that no descriptor leads to any more: `io_submit(2)` keeps what it writes to open.
    pub is_any_file_written: bool,
    /// Whether all of it could be read, and in time.
    pub is_complete: bool,
}

/// A look at processes that is under way.
pub struct Watch {
    found: Arc<Mutex<Unseen>>,
    is_done: mpsc::Receiver<bool>,
    end: Instant,
}

/// Begins to look at what processes of the user may change unseen, with the rights of the calling thread. Without the capability
/// `SYS_PTRACE` only the user itself may look, as `identity`.
///
/// A thread of its own reads, and is left behind where that hangs: `maps` waits for a page fault of the process, which waits for
/// its file system.
pub fn watch(user: Uid, identity: Option<Identity>, budget: Duration) -> Watch {
    let end = Instant::now() + budget;
    let found = Arc::new(Mutex::new(Unseen::default()));
    let (done, is_done) = mpsc::channel();
    let shared = Arc::clone(&found);
    let thread = thread::Builder::new().name("writers".to_owned());
    // One that does not start leaves its end of the channel closed, which is an incomplete look.
    let _ = thread.spawn(move || {
        let mut is_allowed = true;
        if let Some(identity) = identity.filter(|_| !capabilities::can_trace()) {
            is_allowed = identity.assume().is_ok();
        }
        let is_complete = is_allowed && look(user, end, &shared);
        let _ = done.send(is_complete);
    });
    Watch {
        found,
        is_done,
        end,
    }
}

impl Watch {
    /// What was found by the end of the budget.
    pub fn finish(self) -> Unseen {
        let left = self.end.saturating_duration_since(Instant::now());
        let is_complete = self.is_done.recv_timeout(left) == Ok(true);
        let mut unseen = lock(&self.found).clone();
        unseen.is_complete = is_complete;
        unseen
    }
}

/// No panic can leave it half-changed.
fn lock(found: &Mutex<Unseen>) -> std::sync::MutexGuard<'_, Unseen> {
    found.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether all processes of the user could be looked at.
fn look(user: Uid, end: Instant, found: &Mutex<Unseen>) -> bool {
    let Ok(pids) = process::others() else {
        return false;
    };
    let mut is_complete = true;
    for pid in pids {
        if Instant::now() >= end {
            return false;
        }
        match process::status(pid, pid) {
            Ok(Some(status)) if status.is_of(user) => {
                // Nobody of it can write, unless another thread goes on without the first one.
                if status.has_memory || status.threads > 1 {
                    is_complete &= look_at(pid, status, found).is_ok();
                }
            }
            Ok(_) => {}
            Err(_) => is_complete = false,
        }
    }
    is_complete
}

fn look_at(pid: Pid, status: Status, found: &Mutex<Unseen>) -> Result<(), process::Error> {
    let thread = if status.has_memory {
        pid
    } else {
        let Some(thread) = live_thread(pid)? else {
            return Ok(());
        };
        thread
    };
    let of = format!("/proc/{pid}/task/{thread}");
    let mapped = mapped(&of).map(Option::unwrap_or_default);
    if let Ok(mapped) = &mapped {
        lock(found).inodes.extend(&mapped.inodes);
    }
    // Each says something even where the other one cannot be read.
    let open = open_files(&of)?.unwrap_or_default();
    let has_aio = mapped.as_ref().is_ok_and(|mapped| mapped.has_aio);
    let is_in_flight = has_aio || (open.has_ring && !open.direct.is_empty());
    let mut found = lock(found);
    found.is_any_file_written |= has_aio;
    found.inodes.extend(open.direct);
    if is_in_flight {
        found.in_flight = Some(pid);
    }
    mapped.map(drop)
}

/// A thread that has what all of them share. The first one may have ended before the others, and then it has nothing.
fn live_thread(pid: Pid) -> Answer<Pid> {
    for thread in process::threads(pid)?.unwrap_or_default() {
        if !matches!(process::state(pid, thread)?, None | Some(b'Z' | b'X')) {
            return Ok(Some(thread));
        }
    }
    Ok(None)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Mapped {
    inodes: HashSet<u64>,
    /// The ring of `io_setup(2)`.
    has_aio: bool,
}

fn mapped(of: &str) -> Answer<Mapped> {
    let path = format!("{of}/maps");
    let read = || {
        let mut maps = BufReader::with_capacity(BUFFER, File::open(&path)?);
        let (mut mapped, mut line) = (Mapped::default(), Vec::new());
        while maps.read_until(b'\n', &mut line)? > 0 {
            mapped.add(&line);
            line.clear();
        }
        Ok(mapped)
    };
    unless_gone(read(), &path)
}

impl Mapped {
    /// Takes a line `START-END PERMISSIONS OFFSET DEVICE INODE   PATH`, whose path may have any bytes but a line feed.
    fn add(&mut self, line: &[u8]) {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let mut fields = line.splitn(6, |byte| *byte == b' ');
        let Some(permissions) = fields.nth(1) else {
            return;
        };
        // A mapping that may not be written to now may have been, or may be again (mprotect(2)).
        if permissions.get(3) != Some(&b's') {
            return;
        }
        let inode = fields.nth(2).and_then(|field| str::from_utf8(field).ok());
        let inode = inode.and_then(|inode| inode.parse::<u64>().ok());
        self.inodes.extend(inode.filter(|inode| *inode != 0));
        let path = fields.next().unwrap_or_default().trim_ascii_start();
        self.has_aio |= path.starts_with(b"/[aio]");
    }
}

/// What the descriptors of a process say.
#[derive(Debug, Default)]
struct Open {
    /// Inodes of the files that it has open for writing past the cache.
    direct: Vec<u64>,
    /// It has a ring of `io_uring_setup(2)`.
    has_ring: bool,
}

fn open_files(of: &str) -> Answer<Open> {
    let directory = format!("{of}/fd");
    let Some(descriptors) = process::numbers(&directory)? else {
        return Ok(None);
    };
    let mut open = Open::default();
    for descriptor in descriptors {
        let path = format!("{directory}/{descriptor}");
        let Some(target) = unless_gone(fs::read_link(&path), &path)? else {
            continue;
        };
        // Pipes, sockets and the like have no path.
        if !target.is_absolute() {
            open.has_ring |= target.as_os_str() == "anon_inode:[io_uring]";
            continue;
        }
        let info = format!("{of}/fdinfo/{descriptor}");
        let Some(info) = unless_gone(fs::read(&info), &info)? else {
            continue;
        };
        let info = Info::parse(&info);
        if !info.is_direct {
            continue;
        }
        // Linux before 5.14 does not tell.
        let inode = match info.inode {
            Some(inode) => Some(inode),
            None => unless_gone(fs::metadata(&path).map(|file| file.ino()), &path)?,
        };
        open.direct.extend(inode);
    }
    Ok(Some(open))
}

/// What `fdinfo` says of a descriptor.
#[derive(Debug, PartialEq, Eq)]
struct Info {
    is_direct: bool,
    inode: Option<u64>,
}

impl Info {
    fn parse(info: &[u8]) -> Self {
        let field = |name: &[u8]| {
            let mut lines = info.split(|byte| *byte == b'\n');
            let value = lines.find_map(|line| line.strip_prefix(name))?;
            str::from_utf8(value.trim_ascii()).ok()
        };
        let flags = field(b"flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
        let is_direct = |flags: i32| flags & O_DIRECT != 0 && flags & O_ACCMODE != O_RDONLY;
        Self {
            is_direct: flags.is_some_and(is_direct),
            inode: field(b"ino:").and_then(|inode| inode.parse().ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn shared_mappings_are_found_whatever_their_paths_are() {
        let mut mapped = Mapped::default();
        for line in [
            &b"7f00-7f01 rw-s 00000000 08:01 11                         /data/a b\xc3 c\n"[..],
            b"7f00-7f01 r--s 00001000 08:01 12 /data/read only\n",
            b"7f00-7f01 ---s 00000000 00:2d 13 /data/rw-s 0 00:00 99 (deleted)\n",
            b"7f00-7f01 rw-p 00000000 08:01 14 /data/private\n",
            b"7f00-7f01 rw-s 00000000 00:00 0 \n",
            b"7f00-7f01 rw-p 00000000 00:00 0          [heap]\n",
            b"nonsense\n",
            b"",
        ] {
            mapped.add(line);
        }
        assert_eq!(mapped.inodes, HashSet::from([11, 12, 13]));
        assert!(!mapped.has_aio);
        mapped.add(b"7f00-7f01 rw-s 00000000 00:10 20     /[aio] (deleted)\n");
        assert!(mapped.has_aio);
    }

    #[test]
    fn a_descriptor_is_direct_when_it_is_written_to_past_the_cache() {
        let parse = |flags: i32, rest: &str| {
            Info::parse(format!("pos:\t0\nflags:\t0{flags:o}\nmnt_id:\t30\n{rest}").as_bytes())
        };
        for (flags, is_direct) in [
            (O_DIRECT | O_RDONLY, false),
            (O_DIRECT | nix::libc::O_WRONLY, true),
            (O_DIRECT | nix::libc::O_RDWR | nix::libc::O_CLOEXEC, true),
            (nix::libc::O_RDWR | nix::libc::O_APPEND, false),
        ] {
            assert_eq!(parse(flags, "ino:\t77\n").is_direct, is_direct, "{flags:o}");
        }
        assert_eq!(parse(0, "ino:\t77\n").inode, Some(77));
        assert_eq!(parse(0, "").inode, None);
        assert!(!Info::parse(b"flags:\tx\n\xc3").is_direct);
    }

    /// Maps a file and closes it, and opens another one past the cache; then it becomes the user.
    const WRITER: &str = r"
import mmap, os, sys
folder, uid = sys.argv[1:]
mapped = os.open(folder + '/mapped', os.O_RDWR | os.O_CREAT)
os.truncate(mapped, 4096)
memory = mmap.mmap(mapped, 4096)
os.close(mapped)
direct = os.open(folder + '/direct', os.O_RDWR | os.O_CREAT | os.O_DIRECT)
if os.getuid() == 0: os.setuid(int(uid))
print('up', flush=True)
sys.stdin.read()
";

    #[test]
    fn files_are_found_that_a_process_may_change_unseen() {
        let is_root = Uid::effective().is_root();
        let user = if is_root {
            Uid::from_raw(54_398)
        } else {
            Uid::current()
        };
        // Not every file system in memory can be written past its cache; the one that builds are made on can.
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/unseen");
        fs::create_dir_all(folder).expect("the folder of builds is ours");
        let mut child = Command::new("python3")
            .args(["-c", WRITER, folder, &user.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is installed");
        let mut up = String::new();
        let output = child.stdout.take().expect("it is piped");
        BufReader::new(output)
            .read_line(&mut up)
            .expect("it speaks");
        assert_eq!(up, "up\n");
        let unseen = watch(user, None, Duration::from_mins(1)).finish();
        for name in ["mapped", "direct"] {
            let file = fs::metadata(format!("{folder}/{name}")).expect("it was made");
            assert!(unseen.inodes.contains(&file.ino()), "{name}: {unseen:?}");
        }
        if is_root {
            assert_eq!((unseen.is_complete, unseen.in_flight), (true, None));
        }
        drop(child.stdin.take());
        child.wait().expect("it is our child");
    }

    #[test]
    fn time_that_is_over_is_no_answer() {
        let unseen = watch(Uid::from_raw(54_321), None, Duration::ZERO).finish();
        assert_eq!(unseen, Unseen::default());
    }
}
