//! The thread that holds others by ptrace(2). They are held for as long as it lives and no longer: when it ends, in whatever
//! way, the kernel lets all of them go on. It ends by itself when the time is over, whatever the agent is doing.
//!
//! It never waits for a stop (waitpid(2)). A stop that nobody has waited for keeps its signal, and the kernel delivers that
//! signal when the tracer ends; a stop that was waited for would lose it.

use std::{
    fs, io,
    sync::{
        Arc, OnceLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::ptrace,
    unistd::{Pid, gettid},
};

use crate::log::{self, Level};

/// How long the thread may take beyond its time. It hangs where one of those that it is to hold executes a program that the
/// disk does not give: the kernel lets it wait for that.
const PATIENCE: Duration = Duration::from_secs(1);

/// Between two looks at whether the thread has ended, which takes it some ten microseconds.
const LOOK_AGAIN: Duration = Duration::from_micros(20);

pub struct Tracer {
    pub id: Pid,
    /// None once it was told to end.
    orders: Option<Sender<Order>>,
    answers: Receiver<Vec<Result<(), Errno>>>,
    let_go: Arc<OnceLock<Instant>>,
    until: Option<Instant>,
}

struct Order {
    threads: Vec<Pid>,
    until: Instant,
}

impl Tracer {
    pub fn start() -> io::Result<Self> {
        let (orders, to_do) = channel();
        let (done, answers) = channel();
        let (tell_id, id) = channel();
        let let_go = Arc::new(OnceLock::new());
        let ends = Arc::clone(&let_go);
        thread::Builder::new()
            .name("tracer".to_owned())
            .spawn(move || {
                let _ = tell_id.send(gettid());
                hold(&to_do, &done);
                // Set before anybody can go on.
                let _ = ends.set(Instant::now());
            })?;
        let id = id.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(Self {
            id,
            orders: Some(orders),
            answers,
            let_go,
            until: None,
        })
    }

    /// Holds threads, until then at the latest: what became of each. None when the time is over.
    pub fn hold(&mut self, threads: Vec<Pid>, until: Instant) -> Option<Vec<Result<(), Errno>>> {
        self.until = Some(until);
        self.orders.as_ref()?.send(Order { threads, until }).ok()?;
        let left = (until + PATIENCE).saturating_duration_since(Instant::now());
        match self.answers.recv_timeout(left) {
            Ok(answers) => Some(answers),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => end_of_patience(),
        }
    }

    /// When it let all of them go on by itself.
    pub fn let_go(&self) -> Option<Instant> {
        self.let_go.get().copied()
    }

    /// Ends the thread, and gives the moment by which everybody goes on.
    pub fn end(&mut self) -> Instant {
        let by_itself = self.let_go();
        drop(self.orders.take());
        let now = Instant::now();
        let latest = self.until.unwrap_or(now).max(now) + PATIENCE;
        // `join` returns before the kernel lets anybody go on; the entry goes after that.
        let entry = format!("/proc/self/task/{}", self.id);
        while fs::symlink_metadata(&entry).is_ok() {
            if Instant::now() >= latest {
                end_of_patience();
            }
            thread::sleep(LOOK_AGAIN);
        }
        by_itself.unwrap_or_else(Instant::now)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if self.orders.is_some() {
            self.end();
        }
    }
}

/// Carries out orders until there are no more, or the time is over.
fn hold(orders: &Receiver<Order>, done: &Sender<Vec<Result<(), Errno>>>) {
    let Ok(mut order) = orders.recv() else {
        return;
    };
    loop {
        let mut answers = Vec::with_capacity(order.threads.len());
        for thread in order.threads {
            if Instant::now() >= order.until {
                return;
            }
            answers.push(hold_one(thread));
        }
        if done.send(answers).is_err() {
            return;
        }
        let left = order.until.saturating_duration_since(Instant::now());
        match orders.recv_timeout(left) {
            Ok(next) => order = next,
            Err(_) => return,
        }
    }
}

/// Without any option: neither children nor system calls are of interest, and nobody is to die with the tracer.
fn hold_one(thread: Pid) -> Result<(), Errno> {
    ptrace::seize(thread, ptrace::Options::empty())?;
    ptrace::interrupt(thread)
}

/// The thread hangs in the kernel. Those whom it holds go on when the process ends, and only then.
fn end_of_patience() -> ! {
    log::write(
        Level::Error,
        "ending at once: a call to ptrace hangs, and the gateway is held until it returns",
        &[],
    );
    std::process::exit(1)
}
