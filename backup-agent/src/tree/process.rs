//! What /proc says about processes. Their names are any bytes, so no file of it is read as text.
//!
//! `None` means that a process has ended. Whatever else keeps an answer back is an error: what cannot be read is not known.

use std::{
    fs::{self, File},
    io::{self, Read},
};

use nix::{
    errno::Errno,
    libc,
    unistd::{Pid, Uid},
};

/// Something that cannot be read, although it is there.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}")]
pub struct Error {
    path: String,
    source: io::Error,
}

pub type Answer<T> = Result<Option<T>, Error>;

/// What `status` says of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Real, effective and saved: a process may take on each of them at any time (setresuid(2)). The fourth, for files, is
    /// not among them: the agent works on files as the gateway's user.
    uids: [u32; 3],
    /// 0: nobody traces it.
    pub tracer: i32,
    pub threads: u32,
    /// It has memory of its own. A thread of the kernel has none, nor has a first thread that has ended.
    pub has_memory: bool,
}

impl Status {
    pub fn is_of(self, user: Uid) -> bool {
        self.uids.contains(&user.as_raw())
    }
}

/// Every process but our own.
///
/// A /proc that is empty, or that shows another PID namespace, has no answer: it would say that nobody is there.
pub fn others() -> Result<Vec<Pid>, Error> {
    let us = Pid::this();
    let failed = |source| Error {
        path: "/proc".to_owned(),
        source,
    };
    let ourselves = fs::read_link("/proc/self").map_err(failed)?;
    let numbers = numbers("/proc")?.unwrap_or_default();
    let all = numbers.len();
    let pids = numbers.into_iter().map(Pid::from_raw);
    let pids: Vec<Pid> = pids.filter(|pid| *pid != us).collect();
    if ourselves.as_os_str() != us.to_string().as_str() || pids.len() == all {
        let other = io::Error::other("it shows the processes of another PID namespace");
        return Err(failed(other));
    }
    Ok(pids)
}

pub fn status(pid: Pid, thread: Pid) -> Answer<Status> {
    let path = format!("/proc/{pid}/task/{thread}/status");
    parsed(path, parse_status)
}

/// The threads of a process. The list is cut short where one of them ends meanwhile, and then that one is not found any more.
pub fn threads(pid: Pid) -> Answer<Vec<Pid>> {
    let threads = numbers(&format!("/proc/{pid}/task"))?;
    // The C library takes the end of the process for the end of the list.
    let threads = threads.filter(|threads| !threads.is_empty());
    Ok(threads.map(|threads| threads.into_iter().map(Pid::from_raw).collect()))
}

/// The letter that proc(5) has for what a thread does.
pub fn state(pid: Pid, thread: Pid) -> Answer<u8> {
    parsed(format!("/proc/{pid}/task/{thread}/stat"), parse_state)
}

/// The system call that a thread sleeps in, if it does and if that may be known: without `DAC_OVERRIDE` it may not of every process.
pub fn call(pid: Pid, thread: Pid) -> Answer<Option<libc::c_long>> {
    let path = format!("/proc/{pid}/task/{thread}/syscall");
    match parsed(path, |text| Some(parse_call(text))) {
        Err(error) if error.source.kind() == io::ErrorKind::PermissionDenied => Ok(Some(None)),
        answer => answer,
    }
}

/// The entries of a directory whose names are numbers.
pub fn numbers(directory: &str) -> Answer<Vec<i32>> {
    let list = || -> io::Result<Vec<i32>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(directory)? {
            let name = entry?.file_name();
            let number: Option<i32> = name.to_str().and_then(|name| name.parse().ok());
            numbers.extend(number);
        }
        Ok(numbers)
    };
    unless_gone(list(), directory)
}

/// Takes the errors of a process that has ended apart from all others.
pub fn unless_gone<T>(result: io::Result<T>, path: &str) -> Answer<T> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(Error {
            path: path.to_owned(),
            source,
        }),
    }
}

fn is_gone(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::ENOENT | Errno::ESRCH))
}

/// Reads the beginning of a file, which has all that is asked for here, with one call: it is of one moment.
fn parsed<T>(path: String, parse: impl FnOnce(&[u8]) -> Option<T>) -> Answer<T> {
    let mut text = [0; 1024];
    let length = File::open(&path).and_then(|mut file| file.read(&mut text));
    let Some(length) = unless_gone(length, &path)? else {
        return Ok(None);
    };
    match parse(&text[..length]) {
        Some(found) => Ok(Some(found)),
        None => Err(Error {
            path,
            source: io::ErrorKind::InvalidData.into(),
        }),
    }
}

fn parse_status(status: &[u8]) -> Option<Status> {
    let field = |name: &[u8]| {
        // The kernel escapes line feeds in the name, which is the first line.
        let mut lines = status.split(|byte| *byte == b'\n');
        let line = lines.find_map(|line| line.strip_prefix(name))?;
        str::from_utf8(line).ok().map(str::split_ascii_whitespace)
    };
    let mut uids = field(b"Uid:")?.map(str::parse);
    let mut uid = || uids.next()?.ok();
    Some(Status {
        uids: [uid()?, uid()?, uid()?],
        tracer: field(b"TracerPid:")?.next()?.parse().ok()?,
        threads: field(b"Threads:")?.next()?.parse().ok()?,
        has_memory: field(b"VmSize:").is_some(),
    })
}

/// The state is the first field behind the name, which may have anything in it.
fn parse_state(stat: &[u8]) -> Option<u8> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(end + 2).copied()
}

/// `running`, or the number of the call and more; -1 is no call.
fn parse_call(text: &[u8]) -> Option<libc::c_long> {
    let first = text.split(u8::is_ascii_whitespace).next()?;
    let number: libc::c_long = str::from_utf8(first).ok()?.parse().ok()?;
    (number >= 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_pass_for_the_fields_behind_it() {
        assert_eq!(parse_state(b"7 (a) S 1 (b) T 2 3"), Some(b'T'));
        assert_eq!(parse_state(b"7 (gateway-aaaaa\xc3) t 2 3"), Some(b't'));
        assert_eq!(parse_state(b"7 (a"), None);
        let status = b"Name:\tUid:\\n\xc3\nState:\tS\nTracerPid:\t9\nUid:\t1\t2\t3\t4\nGid:\t5\nThreads:\t2\n";
        let parsed = parse_status(status).expect("all lines are there");
        assert_eq!((parsed.tracer, parsed.threads), (9, 2));
        assert!(!parsed.has_memory);
        let is_of = |uid| parsed.is_of(Uid::from_raw(uid));
        assert_eq!([1, 2, 3, 4].map(is_of), [true, true, true, false]);
        assert_eq!(parse_status(b"Name:\tx\nTracerPid:\t0\nUid:\t1\t2"), None);
    }

    #[test]
    fn a_call_is_a_number_or_none() {
        let calls = ["running", "-1 0x7f 0x0", "56 0x4100 0x0", "", "0 0x3"];
        let parsed = calls.map(|text| parse_call(text.as_bytes()));
        assert_eq!(parsed, [None, None, Some(56), None, Some(0)]);
    }

    #[test]
    fn we_run_as_ourselves_and_what_has_ended_is_gone() {
        let us = Pid::this();
        let status = status(us, us).expect("we can be read").expect("we run");
        assert!(status.is_of(Uid::effective()) && !status.is_of(Uid::from_raw(54_321)));
        let threads = threads(us).expect("they can be read");
        assert!(threads.is_some_and(|threads| threads.contains(&us)));
        let nobody = Pid::from_raw(i32::MAX);
        assert_eq!(state(nobody, nobody).expect("nothing failed"), None);
        assert!(others().is_ok_and(|others| !others.contains(&us)));
    }

    #[test]
    fn what_cannot_be_read_is_not_gone() {
        for errno in [Errno::EMFILE, Errno::EACCES, Errno::ENOMEM, Errno::EPERM] {
            assert!(unless_gone::<()>(Err(errno.into()), "/proc/1/task").is_err());
        }
        assert!(parsed("/proc/self/comm".into(), parse_status).is_err());
    }
}
