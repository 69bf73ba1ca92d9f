//! Starts a program in a process of its own, without waiting for its exec: that may hang on a dead disk.
//!
//! Invariant: between fork and exec there are system calls only; all memory that they need is made before the fork.

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{self, c_char, c_int};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::unistd::{dup2_stderr, dup2_stdout, pipe2, write};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use crate::descriptors;
use crate::reaper::Side;

/// SIGRTMAX of Linux.
const LAST_SIGNAL: c_int = 64;

/// What `Program` itself does last; a program's own setup has other numbers.
pub const EXEC: u8 = 0;

/// What a new process does before its exec. It notes what it does next in its argument.
pub type Setup = Box<dyn Fn(&mut u8) -> nix::Result<()> + Send>;

/// A program with its arguments and its whole environment.
pub struct Program {
    /// Where it may be, in the order of `PATH`.
    files: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    setup: Setup,
}

/// Why a process did not become its program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What it was doing, `EXEC` or a number of its setup's.
    pub step: u8,
    pub error: Errno,
}

/// The ends that a new process gets. Its standard input is ours.
pub struct ChildEnds {
    stdout: OwnedFd,
    stderr: OwnedFd,
    /// Where a failure is written; without it, to standard output.
    failure: Option<OwnedFd>,
}

/// The ends that we keep.
pub struct ParentEnds {
    pub stdout: pipe::Receiver,
    pub stderr: pipe::Receiver,
    /// For the gateway's side only: whose standard output is an answer to us has it there (`Failure::read`).
    pub start: Option<Start>,
}

/// Tells whether the process has become its program.
pub struct Start(pipe::Receiver);

impl Start {
    /// Waits for the exec. Also ends without a failure when the process was killed before.
    pub async fn result(mut self) -> Result<(), Failure> {
        let mut record = [0; Failure::SIZE];
        match self.0.read_exact(&mut record).await {
            Ok(_) => Failure::read(&record).map_or(Ok(()), Err),
            Err(_) => Ok(()),
        }
    }
}

impl Failure {
    const SIZE: usize = 6;
    /// No text begins with it.
    const MARK: u8 = 0xff;

    fn encode(self) -> [u8; Self::SIZE] {
        let [a, b, c, d] = (self.error as i32).to_ne_bytes();
        [Self::MARK, self.step, a, b, c, d]
    }

    /// What a process that did not become its program has written.
    pub fn read(written: &[u8]) -> Option<Self> {
        let [Self::MARK, step, error @ ..] = written.first_chunk::<{ Self::SIZE }>()? else {
            return None;
        };
        let error = Errno::from_raw(i32::from_ne_bytes(*error));
        Some(Self { step: *step, error })
    }
}

/// # Errors
/// No descriptor is left.
pub fn pipes(side: Side) -> io::Result<(ParentEnds, ChildEnds)> {
    let pipe = || pipe2(OFlag::O_CLOEXEC);
    let receiver = pipe::Receiver::from_owned_fd;
    let ((stdout, child_stdout), (stderr, child_stderr)) = (pipe()?, pipe()?);
    let (start, failure) = match side {
        Side::Gateway => {
            let (start, failure) = pipe()?;
            (Some(Start(receiver(start)?)), Some(failure))
        }
        Side::Runtime => (None, None),
    };
    let parent = ParentEnds {
        stdout: receiver(stdout)?,
        stderr: receiver(stderr)?,
        start,
    };
    let child = ChildEnds {
        stdout: child_stdout,
        stderr: child_stderr,
        failure,
    };
    Ok((parent, child))
}

impl Program {
    /// `program` is looked up in the `PATH` of `environment` unless it has a slash (execvp(3)).
    ///
    /// # Errors
    /// A NUL in a name, an argument or a variable.
    pub fn new<'a>(
        program: &'a OsStr,
        arguments: impl Iterator<Item = &'a OsStr>,
        environment: &[(OsString, OsString)],
        setup: Setup,
    ) -> io::Result<Self> {
        let variables = environment.iter().map(|(name, value)| {
            let mut variable = name.clone();
            variable.push("=");
            variable.push(value);
            CString::new(variable.into_encoded_bytes())
        });
        let arguments = std::iter::once(program).chain(arguments);
        let path = environment.iter().find(|(name, _)| name == "PATH");
        let path = path.map_or(OsStr::new(""), |(_, path)| path.as_os_str());
        Ok(Self {
            files: files(program, path)?,
            arguments: arguments
                .map(|argument| CString::new(argument.as_bytes()))
                .collect::<Result<_, _>>()?,
            environment: variables.collect::<Result<_, _>>()?,
            setup,
        })
    }

    /// What the new process runs, made before the fork. Returns only when it did not become the program, with its exit code.
    pub fn child(&self, ends: ChildEnds) -> impl FnOnce() -> i32 + use<'_> {
        let pointers = |list: &[CString]| -> Vec<*const c_char> {
            let pointers = list.iter().map(|text| text.as_ptr());
            pointers.chain([ptr::null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        move || {
            let mut step = EXEC;
            let error = match self.set_up(&ends, &mut step) {
                Ok(()) => {
                    step = EXEC;
                    self.execute(&arguments, &environment)
                }
                Err(error) => error,
            };
            let to = ends.failure.as_ref().unwrap_or(&ends.stdout);
            let _ = write(to, &Failure { step, error }.encode());
            // As a shell reports it.
            if step == EXEC && error == Errno::ENOENT {
                127
            } else {
                126
            }
        }
    }

    fn set_up(&self, ends: &ChildEnds, step: &mut u8) -> nix::Result<()> {
        // First, while nobody but root can signal us: our handlers write to sockets that we still share with the supervisor.
        reset_signals();
        descriptors::give_back()?;
        dup2_stdout(&ends.stdout)?;
        dup2_stderr(&ends.stderr)?;
        (self.setup)(step)?;
        close_descriptors();
        // The fork has blocked them all.
        SigSet::empty().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        Ok(())
    }

    /// Why none of the files can be executed: that one is not there is the least telling reason.
    #[allow(unsafe_code)]
    fn execute(&self, arguments: &[*const c_char], environment: &[*const c_char]) -> Errno {
        let mut reason = Errno::ENOENT;
        for file in &self.files {
            // SAFETY: all three point to text that ends in NUL or to lists of such that end in null, and outlive the call.
            unsafe { libc::execve(file.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
            match Errno::last() {
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => reason = Errno::EACCES,
                error => return error,
            }
        }
        reason
    }
}

fn files(program: &OsStr, path: &OsStr) -> io::Result<Vec<CString>> {
    let program = program.as_bytes();
    if program.contains(&b'/') || program.is_empty() {
        return Ok(vec![CString::new(program)?]);
    }
    let folders = path.as_bytes().split(|byte| *byte == b':');
    let files = folders.map(|folder| {
        // An empty one is the working directory.
        let folder = if folder.is_empty() { b"." } else { folder };
        CString::new([folder, b"/", program].concat())
    });
    Ok(files.collect::<Result<_, _>>()?)
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
                ptr::null_mut::<u64>(),
                MASK_BYTES,
            );
        }
    }
}

/// At exec, all but standard input, output and error. Ours are marked already; this is for those that we were started with.
#[allow(unsafe_code)]
fn close_descriptors() {
    const FIRST: c_int = 3;
    // SAFETY: no memory is passed.
    let is_done = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    } == 0;
    if !is_done {
        // Kernels before 5.11 and some sandboxes: one by one, as far as anyone opens descriptors before exec.
        for descriptor in FIRST..1024 {
            // SAFETY: on a descriptor that is not open this fails and changes nothing.
            unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
}
