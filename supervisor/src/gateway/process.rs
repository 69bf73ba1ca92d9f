//! Starts a program as the gateway's user, in a session of its own, with nothing of ours: no descriptor, signal mask,
//! disposition, privilege, capability or `RUNTIME_*` variable.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{self, Gid, Uid};

use crate::config::{Config, Limit};
use crate::oom;
use crate::spawn::{EXEC, Failure, Program, Setup};

/// As many as the kernel's sets have bits.
const MAX_CAPABILITIES: libc::c_ulong = 64;

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
}

const LIMITS: u8 = 100;

/// `program` with `arguments`, set up as the gateway is. It is looked up in the `PATH` of the gateway's environment.
///
/// # Errors
/// A NUL in an argument.
pub fn command(
    config: &Config,
    program: &OsStr,
    arguments: &[impl AsRef<OsStr>],
) -> io::Result<Program> {
    let root = CString::new(config.root.as_os_str().as_bytes())?;
    let setup = isolation(root, config.limits.clone(), config.user.clone());
    let arguments = arguments.iter().map(AsRef::as_ref);
    Program::new(program, arguments, &config.gateway_environment, setup)
}

/// A start that led to no program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unstarted {
    /// As a shell reports it.
    pub code: i32,
    /// Which of our settings is to blame, if any.
    pub setting: Option<&'static str>,
    /// What could not be done, as the rest of a sentence that begins with "cannot".
    pub failed: String,
    pub reason: String,
}

impl Unstarted {
    /// A sentence.
    pub fn message(&self) -> String {
        format!("cannot {}: {}", self.failed, self.reason)
    }

    /// Before there was a process.
    pub fn without_process(program: &OsStr, error: &io::Error) -> Self {
        let program = program.to_string_lossy();
        Self {
            code: CANNOT_EXECUTE,
            setting: None,
            failed: format!("make a process for {program}"),
            reason: error.to_string(),
        }
    }

    /// What its process could not do.
    pub fn explain(config: &Config, program: &OsStr, failure: Failure) -> Self {
        let Config {
            limits, user, root, ..
        } = config;
        Self::explained(
            limits,
            &user.name,
            root,
            &program.to_string_lossy(),
            failure,
        )
    }

    fn explained(
        limits: &[Limit],
        user: &str,
        root: &Path,
        program: &str,
        failure: Failure,
    ) -> Self {
        let Failure { step, error } = failure;
        let has = |resource: Resource| {
            let mut limits = limits.iter();
            limits.any(|limit| limit.resource == resource)
        };
        let (setting, what) = match step {
            // Neither is wrong with the program.
            EXEC if error == Errno::EAGAIN && has(Resource::RLIMIT_NPROC) => {
                (Some(LIMITS_NAME), format!("execute {program} within nproc"))
            }
            EXEC if matches!(error, Errno::ENOMEM | Errno::E2BIG) && has(Resource::RLIMIT_AS) => {
                (Some(LIMITS_NAME), format!("execute {program} within as"))
            }
            EXEC => (None, format!("execute {program}")),
            LIMITS.. => {
                let limit = limits.get(usize::from(step - LIMITS));
                let limit = limit.map(|limit| format!("set the limit {limit}"));
                (Some(LIMITS_NAME), limit.unwrap_or_default())
            }
            step if step == Step::Folder as u8 => {
                let what = format!("enter {} as {user}", root.display());
                (Some("RUNTIME_ROOT"), what)
            }
            step if step == Step::Capabilities as u8 => {
                (None, format!("drop the capabilities before {program}"))
            }
            step if step > Step::User as u8 => {
                (None, format!("make a session of its own for {program}"))
            }
            step => {
                let what = match step {
                    1 => "groups",
                    2 => "group",
                    _ => "user",
                };
                let what = format!("take the {what} of {user}");
                (Some("RUNTIME_GATEWAY_USER"), what)
            }
        };
        let code = match (step, error) {
            (EXEC, Errno::ENOENT) => NOT_FOUND,
            _ => CANNOT_EXECUTE,
        };
        Self {
            code,
            setting,
            failed: what,
            reason: io::Error::from(error).to_string(),
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

/// What happens in the child between fork and exec: system calls only. Everything that it reads was copied with the process.
fn isolation(root: CString, limits: Vec<Limit>, user: User) -> Setup {
    let is_root = unistd::geteuid().is_root();
    let keeps_privileges = user.uid.is_root();
    let oom_score = oom::score_of_gateway();
    let mask = UMASK.get().copied();
    Box::new(move |step| {
        oom::set_score(oom_score);
        if let Some(mask) = mask {
            umask(mask);
        }
        for (number, limit) in (LIMITS..).zip(&limits) {
            *step = number;
            setrlimit(limit.resource, limit.value, limit.value)?;
        }
        if !keeps_privileges {
            empty_bounding_set();
        }
        if is_root {
            *step = Step::Groups as u8;
            unistd::setgroups(&user.groups)?;
            *step = Step::Group as u8;
            unistd::setgid(user.gid)?;
            *step = Step::User as u8;
            unistd::setuid(user.uid)?;
        }
        *step = Step::Capabilities as u8;
        if !keeps_privileges {
            drop_capabilities()?;
        }
        // As the user, whose directory it is: a root without CAP_DAC_OVERRIDE may not enter it.
        *step = Step::Folder as u8;
        unistd::chdir(root.as_c_str())?;
        *step = Step::Session as u8;
        unistd::setsid()?;
        prctl::set_no_new_privs()?;
        // Without a container around us nothing else would stop the gateway when we are killed.
        prctl::set_pdeathsig(Signal::SIGTERM)
    })
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
fn drop_capabilities() -> nix::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`, and the calling process.
    const HEADER: [u32; 2] = [0x2008_0522, 0];
    const NONE: [u32; 6] = [0; 6];
    // The kernel may write its version to the header.
    let mut header = HEADER;
    // SAFETY: both arrays have the size that this version means, and outlive the call.
    match unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), NONE.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn the_last_step_of_a_start_says_what_is_to_blame() {
        let limit = |resource| Limit { resource, value: 7 };
        let limits = [
            limit(Resource::RLIMIT_NOFILE),
            limit(Resource::RLIMIT_NPROC),
        ];
        let user = Some("RUNTIME_GATEWAY_USER");
        for (step, error, code, setting, what) in [
            (
                LIMITS,
                Errno::EPERM,
                126,
                Some(LIMITS_NAME),
                "set the limit nofile=7",
            ),
            (
                LIMITS + 1,
                Errno::EPERM,
                126,
                Some(LIMITS_NAME),
                "set the limit nproc=7",
            ),
            (
                Step::Groups as u8,
                Errno::EPERM,
                126,
                user,
                "take the groups of ada",
            ),
            (
                Step::Group as u8,
                Errno::EPERM,
                126,
                user,
                "take the group of ada",
            ),
            (
                Step::User as u8,
                Errno::EAGAIN,
                126,
                user,
                "take the user of ada",
            ),
            (
                Step::Folder as u8,
                Errno::ENOENT,
                126,
                Some("RUNTIME_ROOT"),
                "enter /data as ada",
            ),
            (
                Step::Session as u8,
                Errno::EPERM,
                126,
                None,
                "make a session of its own for gateway",
            ),
            (EXEC, Errno::ENOENT, 127, None, "execute gateway"),
            (EXEC, Errno::EACCES, 126, None, "execute gateway"),
            (
                EXEC,
                Errno::EAGAIN,
                126,
                Some(LIMITS_NAME),
                "execute gateway within nproc",
            ),
            // No limit on memory is set.
            (EXEC, Errno::ENOMEM, 126, None, "execute gateway"),
        ] {
            let failure = Failure { step, error };
            let root = Path::new("/data");
            let found = Unstarted::explained(&limits, "ada", root, "gateway", failure);
            let expected = Unstarted {
                code,
                setting,
                failed: what.to_owned(),
                reason: io::Error::from(error).to_string(),
            };
            assert_eq!(found, expected);
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
