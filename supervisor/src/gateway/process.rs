//! Starts a program as the gateway's user, in a session of its own, with nothing of ours: no descriptor, signal mask,
//! disposition, privilege, capability or `RUNTIME_*` variable.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{self, Gid, Uid};

use crate::config::{Config, Limit};
use crate::oom;

/// SIGRTMAX of Linux.
const LAST_SIGNAL: libc::c_int = 64;

/// As many as the kernel's sets have bits.
const MAX_CAPABILITIES: libc::c_ulong = 64;

/// The first descriptor after standard error.
const FIRST_INHERITED: libc::c_int = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub uid: Uid,
    pub gid: Gid,
    pub groups: Vec<Gid>,
}

impl User {
    /// By name, or by number with an optional group as in `1000:1000`.
    pub fn find(text: &str) -> Option<Self> {
        if let Ok(Some(user)) = unistd::User::from_name(text) {
            return Some(user.into());
        }
        let (uid, gid) = match text.split_once(':') {
            Some((uid, gid)) => (uid, Some(gid.parse().ok()?)),
            None => (text, None),
        };
        let uid: u32 = uid.parse().ok()?;
        let known = unistd::User::from_uid(Uid::from_raw(uid)).ok().flatten();
        match (known, gid) {
            (Some(user), None) => Some(user.into()),
            (_, gid) => {
                let gid = Gid::from_raw(gid.unwrap_or(uid));
                Some(Self {
                    name: text.to_owned(),
                    uid: Uid::from_raw(uid),
                    gid,
                    groups: vec![gid],
                })
            }
        }
    }

    pub fn caller() -> Self {
        let uid = unistd::geteuid();
        match unistd::User::from_uid(uid) {
            Ok(Some(user)) => user.into(),
            _ => Self {
                name: uid.to_string(),
                uid,
                gid: unistd::getegid(),
                groups: vec![unistd::getegid()],
            },
        }
    }

    /// Whether the gateway's processes can be told from ours by their user.
    pub fn is_apart(&self) -> bool {
        self.uid != unistd::geteuid()
    }

    /// By mode and owner, of the file and of every folder above it.
    pub fn can_read(&self, file: &Path) -> bool {
        let may = |path: &Path, right: u32| {
            fs::metadata(path).is_ok_and(|metadata| {
                let shift = match metadata.uid() == self.uid.as_raw() {
                    true => 6,
                    false if self.groups.contains(&Gid::from_raw(metadata.gid())) => 3,
                    false => 0,
                };
                metadata.mode() >> shift & right != 0
            })
        };
        let Ok(file) = fs::canonicalize(file) else {
            return false;
        };
        may(&file, 0o4) && file.ancestors().skip(1).all(|folder| may(folder, 0o1))
    }
}

impl From<unistd::User> for User {
    fn from(user: unistd::User) -> Self {
        let groups = CString::new(user.name.as_str())
            .ok()
            .and_then(|name| unistd::getgrouplist(&name, user.gid).ok());
        Self {
            groups: groups.unwrap_or_else(|| vec![user.gid]),
            name: user.name,
            uid: user.uid,
            gid: user.gid,
        }
    }
}

/// A program that is about to be started as the gateway is.
pub struct Prepared {
    pub command: Command,
    /// What the child was last about to do; without the pipe (we may lack descriptors) that is not known.
    steps: Option<OwnedFd>,
    limits: Vec<Limit>,
    user: String,
    root: PathBuf,
}

/// What a child does before it becomes its program, in this order; each limit has a number of its own, from [`LIMITS`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Step {
    Groups = 1,
    Group,
    User,
    Capabilities,
    Folder,
    Session,
    Exec,
}

const LIMITS: u8 = 100;

/// `program` with `arguments`, set up as the gateway is. It is looked up in the `PATH` of the gateway's environment.
pub fn command(config: &Config, program: &OsStr, arguments: &[impl AsRef<OsStr>]) -> Prepared {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(
            config
                .gateway_environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .stdin(Stdio::inherit());
    // The settings take no path with a NUL in it; a variable of the environment cannot hold one.
    let root = CString::new(config.root.as_os_str().as_bytes()).unwrap_or_default();
    let pipe = unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK);
    let (steps, told) = pipe.map_or((None, None), |(read, write)| (Some(read), Some(write)));
    let (limits, user) = (config.limits.clone(), config.user.clone());
    isolate(&mut command, root, limits.clone(), user.clone(), told);
    Prepared {
        command,
        steps,
        limits,
        user: user.name,
        root: config.root.clone(),
    }
}

/// Why a program was not started.
#[derive(Debug, PartialEq, Eq)]
pub struct Unstarted {
    /// As a shell reports it.
    pub code: i32,
    /// Which of our settings is to blame, if any.
    pub setting: Option<&'static str>,
    /// What could not be done, as the rest of a sentence that begins with "cannot".
    pub what: String,
}

impl Prepared {
    /// What the child could not do, after its start has failed with this error.
    pub fn explain(self, error: &io::Error) -> Unstarted {
        let program = self.command.get_program().to_string_lossy().into_owned();
        let mut steps = [0; 64];
        let count = self
            .steps
            .map_or(0, |pipe| unistd::read(pipe, &mut steps).unwrap_or(0));
        let last = steps[..count].last().copied();
        let limit = |resource: Resource| {
            let mut limits = self.limits.iter();
            limits.find(|limit| limit.resource == resource)
        };
        let (setting, what) = match last {
            // Neither is wrong with the program.
            Some(step) if step == Step::Exec as u8 => match error.raw_os_error() {
                Some(libc::EAGAIN) if limit(Resource::RLIMIT_NPROC).is_some() => {
                    (Some(LIMITS_NAME), format!("execute {program} within nproc"))
                }
                Some(libc::ENOMEM | libc::E2BIG) if limit(Resource::RLIMIT_AS).is_some() => {
                    (Some(LIMITS_NAME), format!("execute {program} within as"))
                }
                _ => (None, format!("execute {program}")),
            },
            Some(step) if step >= LIMITS => {
                let limit = self.limits.get(usize::from(step - LIMITS));
                let limit = limit.map(|limit| format!("set the limit {limit}"));
                (Some(LIMITS_NAME), limit.unwrap_or_default())
            }
            Some(step) if step <= Step::User as u8 => {
                let what = match step {
                    1 => "groups",
                    2 => "group",
                    _ => "user",
                };
                let user = &self.user;
                (
                    Some("RUNTIME_GATEWAY_USER"),
                    format!("take the {what} of {user}"),
                )
            }
            Some(step) if step == Step::Folder as u8 => {
                let what = format!("enter {} as {}", self.root.display(), self.user);
                (Some("RUNTIME_ROOT"), what)
            }
            Some(step) if step == Step::Capabilities as u8 => {
                (None, format!("drop the capabilities before {program}"))
            }
            Some(_) => (None, format!("make a session of its own for {program}")),
            None => (None, format!("make a process for {program}")),
        };
        let code = match (last, error.kind()) {
            (Some(step), io::ErrorKind::NotFound) if step == Step::Exec as u8 => NOT_FOUND,
            _ => CANNOT_EXECUTE,
        };
        Unstarted {
            code,
            setting,
            what,
        }
    }
}

const LIMITS_NAME: &str = "RUNTIME_GATEWAY_LIMITS";

/// The umask that we were started with, which is the gateway's.
static UMASK: OnceLock<Mode> = OnceLock::new();

/// Gives this process a umask of its own: its files have the mode that is asked for.
pub fn keep_umask() {
    let inherited = umask(Mode::S_IWGRP | Mode::S_IWOTH);
    // A second call would keep ours.
    let _ = UMASK.set(inherited);
}

/// What a shell reports for a program that is not there, or cannot be executed.
pub const NOT_FOUND: i32 = 127;
pub const CANNOT_EXECUTE: i32 = 126;

/// What happens in the child between fork and exec.
#[allow(unsafe_code)]
fn isolate(
    command: &mut Command,
    root: CString,
    limits: Vec<Limit>,
    user: User,
    told: Option<OwnedFd>,
) {
    let is_root = unistd::geteuid().is_root();
    let keeps_privileges = user.uid.is_root();
    let oom_score = oom::score_of_gateway();
    let mask = UMASK.get().copied();
    let hook = move || {
        // One byte for each step, of which the last is read when there is an error: that is only a number.
        let tell = |step: u8| {
            if let Some(told) = &told {
                let _ = unistd::write(told, &[step]);
            }
        };
        // First, while nobody but root can signal us: our handlers write to pipes that we still share with the supervisor.
        // The mask was emptied by `std` itself.
        reset_signals();
        oom::set_score(oom_score);
        if let Some(mask) = mask {
            umask(mask);
        }
        for (number, limit) in (LIMITS..).zip(&limits) {
            tell(number);
            setrlimit(limit.resource, limit.value, limit.value)?;
        }
        if !keeps_privileges {
            empty_bounding_set();
        }
        if is_root {
            tell(Step::Groups as u8);
            unistd::setgroups(&user.groups)?;
            tell(Step::Group as u8);
            unistd::setgid(user.gid)?;
            tell(Step::User as u8);
            unistd::setuid(user.uid)?;
        }
        tell(Step::Capabilities as u8);
        if !keeps_privileges {
            drop_capabilities()?;
        }
        tell(Step::Folder as u8);
        // As the user, whose directory it is: `Command::current_dir` would enter it as root, which a root without
        // CAP_DAC_OVERRIDE may not.
        unistd::chdir(root.as_c_str())?;
        tell(Step::Session as u8);
        unistd::setsid()?;
        prctl::set_no_new_privs()?;
        // Without a container around us nothing else would stop the gateway when we are killed.
        prctl::set_pdeathsig(Signal::SIGTERM)?;
        close_descriptors();
        tell(Step::Exec as u8);
        Ok(())
    };
    // SAFETY: between fork and exec the hook only makes system calls that are safe in a signal handler; it does not
    // allocate, lock or unwind. Everything it reads was copied with the process.
    unsafe { command.pre_exec(hook) };
}

/// Ignored signals would survive exec. By the system call: the C library keeps a few signals of its own out of reach.
#[allow(unsafe_code)]
fn reset_signals() {
    /// The kernel's `struct sigaction` and more, as zeros: the default, without flags and mask.
    const DEFAULT: [u64; 8] = [0; 8];
    const MASK_BYTES: usize = 8;
    for signal in 1..=LAST_SIGNAL {
        // SAFETY: the kernel reads no more than DEFAULT has and writes nothing; the default runs none of our code. SIGKILL
        // and SIGSTOP are refused, harmlessly.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null_mut::<u64>(),
                MASK_BYTES,
            );
        }
    }
}

/// As far as we may: without the capability `SETPCAP` it stays as it is, of no use to a process without new privileges.
#[allow(unsafe_code)]
fn empty_bounding_set() {
    for capability in 0..MAX_CAPABILITIES {
        // SAFETY: numbers only.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability) } != 0 {
            return;
        }
    }
}

/// Empties the permitted, effective and inheritable sets, and with them the ambient one: a change of user leaves some.
#[allow(unsafe_code)]
fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`, and the calling process.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    const NONE: [u32; 6] = [0; 6];
    // The kernel may write its version to the header.
    let mut header = HEADER;
    // SAFETY: both arrays have the size that this version means, and outlive the call.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), NONE.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// At exec: `std` has one open until then, to report a failed one. Our own are marked already; this is for those that we
/// were started with.
#[allow(unsafe_code)]
fn close_descriptors() {
    // SAFETY: no memory is passed.
    let is_done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST_INHERITED,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    } == 0;
    if !is_done {
        // Kernels before 5.11 and some sandboxes: one by one, as far as anyone opens descriptors before exec.
        for descriptor in FIRST_INHERITED..1024 {
            // SAFETY: on a descriptor that is not open this fails and changes nothing.
            unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn the_last_step_of_a_start_says_what_is_to_blame() {
        let explain = |steps: &[u8], errno| {
            let (read, write) = unistd::pipe2(OFlag::O_CLOEXEC).expect("there are descriptors");
            unistd::write(&write, steps).expect("it has room");
            drop(write);
            let limit = |resource| Limit { resource, value: 7 };
            let prepared = Prepared {
                command: Command::new("gateway"),
                steps: Some(read),
                limits: vec![
                    limit(Resource::RLIMIT_NOFILE),
                    limit(Resource::RLIMIT_NPROC),
                ],
                user: "ada".to_owned(),
                root: "/data".into(),
            };
            prepared.explain(&io::Error::from_raw_os_error(errno))
        };
        let exec = Step::Exec as u8;
        for (steps, errno, code, setting, what) in [
            (
                &[LIMITS][..],
                libc::EPERM,
                126,
                Some(LIMITS_NAME),
                "set the limit nofile=7",
            ),
            (
                &[LIMITS, LIMITS + 1],
                libc::EPERM,
                126,
                Some(LIMITS_NAME),
                "set the limit nproc=7",
            ),
            (
                &[1],
                libc::EPERM,
                126,
                Some("RUNTIME_GATEWAY_USER"),
                "take the groups of ada",
            ),
            (
                &[1, 2, 3],
                libc::EAGAIN,
                126,
                Some("RUNTIME_GATEWAY_USER"),
                "take the user of ada",
            ),
            (
                &[5],
                libc::ENOENT,
                126,
                Some("RUNTIME_ROOT"),
                "enter /data as ada",
            ),
            (&[5, exec], libc::ENOENT, 127, None, "execute gateway"),
            (&[exec], libc::EACCES, 126, None, "execute gateway"),
            (
                &[exec],
                libc::EAGAIN,
                126,
                Some(LIMITS_NAME),
                "execute gateway within nproc",
            ),
            // No limit on memory is set.
            (&[exec], libc::ENOMEM, 126, None, "execute gateway"),
            (&[], libc::EAGAIN, 126, None, "make a process for gateway"),
        ] {
            let expected = Unstarted {
                code,
                setting,
                what: what.to_owned(),
            };
            assert_eq!(explain(steps, errno), expected);
        }
    }

    #[test]
    fn who_can_read_a_file_depends_on_the_way_there_too() {
        // Every user gets to this one, whatever `TMPDIR` is.
        let top = PathBuf::from(format!("/tmp/supervisor-process-{}", std::process::id()));
        fs::create_dir_all(&top).expect("can make folders");
        let file = top.join("secret");
        fs::write(&file, "").expect("can write");
        let metadata = fs::metadata(&file).expect("is there");
        let user = |uid: u32, gid: u32| User {
            name: String::new(),
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: vec![Gid::from_raw(gid)],
        };
        let owner = user(metadata.uid(), 64_002);
        let group = user(64_001, metadata.gid());
        let other = user(64_001, 64_002);
        for (folder_mode, mode, readers) in [
            (0o755, 0o600, [true, false, false]),
            (0o755, 0o640, [true, true, false]),
            (0o755, 0o604, [true, false, true]),
            (0o755, 0o044, [false, true, true]),
            (0o700, 0o644, [true, false, false]),
        ] {
            let set = |path: &Path, mode| {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("is ours");
            };
            set(&top, folder_mode);
            set(&file, mode);
            let found = [&owner, &group, &other].map(|user| user.can_read(&file));
            assert_eq!(found, readers, "{folder_mode:o} {mode:o}");
        }
        assert!(!other.can_read(&top.join("none")));
        fs::remove_dir_all(top).expect("can remove");
    }
}
