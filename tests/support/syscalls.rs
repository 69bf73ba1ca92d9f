//! Runs a program under ptrace(2), notes the system calls by which it looks at a tree, and lets chosen ones fail. A call is
//! named by what it is about, not by its number in the run: threads do not change which one fails.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::agent::{Outcome, collect};

/// How a call says what it is about.
#[derive(Clone, Copy)]
enum By {
    Descriptor,
    /// A directory's descriptor, and a path from there.
    Path,
}

/// The calls by which a program looks at files and directories.
const CALLS: [(libc::c_long, &str, By); 13] = [
    (libc::SYS_openat, "openat", By::Path),
    (libc::SYS_newfstatat, "newfstatat", By::Path),
    (libc::SYS_statx, "statx", By::Path),
    (libc::SYS_readlinkat, "readlinkat", By::Path),
    (libc::SYS_fstat, "fstat", By::Descriptor),
    (libc::SYS_getdents64, "getdents64", By::Descriptor),
    (libc::SYS_read, "read", By::Descriptor),
    (libc::SYS_pread64, "pread64", By::Descriptor),
    (libc::SYS_preadv, "preadv", By::Descriptor),
    (libc::SYS_copy_file_range, "copy_file_range", By::Descriptor),
    (libc::SYS_lseek, "lseek", By::Descriptor),
    (libc::SYS_flistxattr, "flistxattr", By::Descriptor),
    (libc::SYS_fgetxattr, "fgetxattr", By::Descriptor),
];

/// Longest path that the kernel takes.
const LONGEST_PATH: usize = 4096;

/// A system call on a path, which is relative to the tree.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    pub name: &'static str,
    pub path: PathBuf,
}

/// What goes wrong in a run.
#[derive(Clone, Debug)]
pub struct Fault {
    pub call: Call,
    pub errno: Errno,
    /// The calls of this kind that succeed before.
    pub after: u32,
    /// All that follow fail, too.
    pub lasts: bool,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            call,
            errno,
            after,
            lasts,
        } = self;
        let which = if *lasts { "from" } else { "only" };
        let path = call.path.display();
        write!(
            f,
            "{errno:?} of {} on {path:?}, {which} number {after}",
            call.name
        )
    }
}

/// What happened in a run.
pub struct Traced {
    pub outcome: Outcome,
    /// The calls on the tree in their order.
    pub calls: Vec<Call>,
    /// How many of them were made to fail.
    pub failed: u32,
}

/// Runs the command to its end. Calls on `tree`, and on what is in it, are noted; one may fail.
pub fn run(command: &Command, tree: &Path, fault: Option<&Fault>) -> Traced {
    // On a thread of its own: a tracer is a thread, and it waits for no children but its own.
    std::thread::scope(|scope| {
        let tracer = scope.spawn(|| trace(command, tree, fault));
        tracer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[expect(
    clippy::zombie_processes,
    reason = "the tracer waits for all that it traces"
)]
fn trace(command: &Command, tree: &Path, fault: Option<&Fault>) -> Traced {
    // It waits for a line, and so for its tracer.
    let mut child = Command::new("sh")
        .args(["-c", "read -r go; exec \"$0\" \"$@\" </dev/null"])
        .arg(command.get_program())
        .args(command.get_args())
        .env_clear()
        .envs(
            command
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("there is a shell");
    let stdout = collect(child.stdout.take().expect("it is piped"));
    let stderr = collect(child.stderr.take().expect("it is piped"));
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid fits"));
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options).expect("a child can be traced");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(b"\n").expect("it waits for a line");
    drop(stdin);

    let mut tracer = Tracer {
        tree,
        fault,
        is_program: false,
        inside: HashSet::new(),
        failing: HashMap::new(),
        calls: Vec::new(),
        matching: 0,
        failed: 0,
    };
    let (code, signal) = tracer.wait(pid);
    Traced {
        outcome: Outcome {
            code,
            signal,
            stdout: stdout.join().expect("the collector does not panic"),
            stderr: stderr.join().expect("the collector does not panic"),
        },
        calls: tracer.calls,
        failed: tracer.failed,
    }
}

struct Tracer<'a> {
    tree: &'a Path,
    fault: Option<&'a Fault>,
    /// The shell has become the program.
    is_program: bool,
    /// Threads in a system call.
    inside: HashSet<Pid>,
    /// Those of them whose call was replaced by none, and will have failed.
    failing: HashMap<Pid, Errno>,
    calls: Vec<Call>,
    /// Calls so far that are of the fault's kind.
    matching: u32,
    failed: u32,
}

impl Tracer<'_> {
    /// Waits until all that is traced has ended; gives how the first process did.
    fn wait(&mut self, first: Pid) -> (Option<i32>, Option<i32>) {
        let mut end = (None, None);
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        loop {
            match waitpid(None, Some(flags)) {
                Ok(WaitStatus::Exited(pid, code)) if pid == first => end = (Some(code), None),
                Ok(WaitStatus::Signaled(pid, signal, _)) if pid == first => {
                    end = (None, Some(signal as i32));
                }
                Ok(WaitStatus::PtraceSyscall(pid)) => {
                    self.stopped_at_a_call(pid);
                    self.go_on(pid, None);
                }
                Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                    self.is_program |= event == libc::PTRACE_EVENT_EXEC;
                    self.go_on(pid, None);
                }
                Ok(WaitStatus::Stopped(pid, signal)) => self.go_on(pid, Some(signal)),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::ECHILD) => return end,
                Err(error) => panic!("cannot wait for what is traced: {error}"),
            }
        }
    }

    fn go_on(&self, pid: Pid, signal: Option<Signal>) {
        let done = if self.is_program {
            ptrace::syscall(pid, signal)
        } else {
            ptrace::cont(pid, signal)
        };
        // It was killed in the meantime.
        assert!(matches!(done, Ok(()) | Err(Errno::ESRCH)), "{done:?}");
    }

    fn stopped_at_a_call(&mut self, pid: Pid) {
        let Ok(mut registers) = ptrace::getregs(pid) else {
            return;
        };
        // On its way in, the kernel has put that there.
        let is_entry = registers.rax.cast_signed() == -i64::from(libc::ENOSYS);
        if is_entry && self.inside.insert(pid) {
            let Some(call) = self.call(pid, &registers) else {
                return;
            };
            if let Some(errno) = self.is_to_fail(&call) {
                // No call has this number.
                registers.orig_rax = u64::MAX;
                if ptrace::setregs(pid, registers).is_ok() {
                    self.failing.insert(pid, errno);
                    self.failed += 1;
                }
            }
            self.calls.push(call);
            return;
        }
        self.inside.remove(&pid);
        if let Some(errno) = self.failing.remove(&pid) {
            registers.rax = (-i64::from(errno as i32)).cast_unsigned();
            let done = ptrace::setregs(pid, registers);
            assert!(matches!(done, Ok(()) | Err(Errno::ESRCH)), "{done:?}");
        }
    }

    fn is_to_fail(&mut self, call: &Call) -> Option<Errno> {
        let fault = self.fault.filter(|fault| fault.call == *call)?;
        self.matching += 1;
        let before = self.matching - 1;
        let is_it = before == fault.after || (fault.lasts && before > fault.after);
        is_it.then_some(fault.errno)
    }

    /// The call that a thread is about to make, if it is one on the tree.
    fn call(&self, pid: Pid, registers: &libc::user_regs_struct) -> Option<Call> {
        let number = registers.orig_rax.cast_signed();
        let (_, name, by) = CALLS.into_iter().find(|(known, ..)| *known == number)?;
        // The kernel takes the lower half.
        let descriptor = u32::try_from(registers.rdi & u64::from(u32::MAX));
        let descriptor = descriptor.expect("it is the lower half").cast_signed();
        let path = match by {
            By::Descriptor => open_path(pid, descriptor)?,
            By::Path => {
                let path = string_at(pid, registers.rsi)?;
                if path.is_absolute() || descriptor == libc::AT_FDCWD {
                    path
                } else if path.as_os_str().is_empty() || path == Path::new(".") {
                    open_path(pid, descriptor)?
                } else {
                    open_path(pid, descriptor)?.join(path)
                }
            }
        };
        let path = path.strip_prefix(self.tree).ok()?.to_owned();
        Some(Call { name, path })
    }
}

/// The path of an open file.
fn open_path(pid: Pid, descriptor: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/fd/{descriptor}")).ok()
}

/// The string at an address of the thread's memory.
fn string_at(pid: Pid, address: u64) -> Option<PathBuf> {
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let mut bytes = [0; LONGEST_PATH];
    // What is mapped behind it may end before.
    let length = memory.read_at(&mut bytes, address).ok()?;
    let end = bytes[..length].iter().position(|byte| *byte == 0)?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&bytes[..end])))
}
