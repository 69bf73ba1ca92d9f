//! Processes of a user of their own, of every kind that a snapshot holds (`held.py`), and what the kernel says of them.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::agent::{Host, Place};
use crate::openclaw::repository;
use crate::tree;
use crate::wait::until;

/// Each test takes the next user, as they run side by side.
static COUNT: AtomicU32 = AtomicU32::new(0);

/// A user whom nobody else has, not even the same tests started twice: all of its processes are held, and killed at the end.
fn user() -> u32 {
    20_000 + std::process::id() % 1_000 * 32 + COUNT.fetch_add(1, Ordering::Relaxed)
}

/// A host whose root belongs to a user, and the processes of that user. They end with this.
pub struct Held {
    pub host: Host,
    pub uid: u32,
    members: Vec<Member>,
    count: u32,
}

/// One process, and how it is talked to.
pub struct Member {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Held {
    /// Nobody yet. None, where we are not root and so cannot be another user.
    pub fn new(place: &Place) -> Option<Self> {
        if !tree::is_root() {
            eprintln!("skipped: it takes root to hold another user's processes");
            return None;
        }
        let uid = user();
        let host = Host::new(place)
            .with("RUNTIME_GATEWAY_USER", uid.to_string())
            .with("RUNTIME_LOG", "debug");
        for folder in ["a", "m", "z"] {
            fs::create_dir(host.root.join(folder)).expect("the root is ours");
            chown(host.root.join(folder), Some(uid), Some(uid)).expect("root can give it away");
        }
        chown(&host.root, Some(uid), Some(uid)).expect("root can give it away");
        Some(Self {
            host,
            uid,
            members: Vec::new(),
            count: 0,
        })
    }

    /// Files without number, so that a walk takes its time.
    pub fn fill(&self, count: u32) {
        for number in 0..count {
            tree::write(&self.host.root, format!("m/fill-{number}"), "content");
        }
    }

    /// Starts a process and waits until it is ready. Gives its number among the members.
    pub fn start(&mut self, mode: &str, arguments: &[&str]) -> usize {
        let tmux = self.host.folder.path().join("tmux");
        if !tmux.exists() {
            fs::create_dir(&tmux).expect("the folder is ours");
            chown(&tmux, Some(self.uid), Some(self.uid)).expect("root can give it away");
        }
        let mut child = Command::new("python3")
            .arg(repository().join("tests/support/held.py"))
            .args([mode, &self.uid.to_string()])
            .args(arguments)
            .env("TMUX_TMPDIR", tmux)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is installed: see the target `test` in the Makefile");
        let orders = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut member = Member {
            child,
            orders,
            answers,
        };
        assert_eq!(member.answer(), "up");
        self.members.push(member);
        self.members.len() - 1
    }

    pub fn pid(&self, member: usize) -> u32 {
        self.members[member].child.id()
    }

    /// Tells a member something and takes its answer.
    pub fn ask(&mut self, member: usize, order: &str) -> Value {
        let member = &mut self.members[member];
        // In one piece: not every member reads by lines.
        let order = format!("{order}\n");
        let told = member.orders.write_all(order.as_bytes());
        told.expect("it listens");
        member.answer()
    }

    pub fn answer(&mut self, member: usize) -> Value {
        self.members[member].answer()
    }

    pub fn kill(&mut self, member: usize) {
        let child = &mut self.members[member].child;
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
    }

    /// The arguments of a backup that holds the user. There is something new to back up then.
    pub fn arguments(&mut self, pause: &str) -> Vec<String> {
        self.count += 1;
        tree::write(&self.host.root, "new", self.count.to_string());
        [
            "backup",
            "--json",
            "--freeze-user",
            &self.uid.to_string(),
            "--max-pause",
            pause,
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// A backup and its answer.
    pub fn backup(&mut self, pause: &str) -> Value {
        let arguments = self.arguments(pause);
        self.host.run(&arguments).expect(0).json()
    }

    /// A backup that is of one instant because it has held everybody, and after which nobody is held.
    pub fn hold(&mut self) {
        let arguments = self.arguments("10s");
        let outcome = self.host.run(&arguments).expect(0);
        let answer = outcome.json();
        assert_eq!(answer["consistency"], "instant", "{outcome:?}");
        // Without a pause it may be of one instant just because nobody has written.
        assert!(answer["pauseMs"].is_u64(), "{outcome:?}");
        self.assert_nobody_is_held();
    }

    /// A backup that cannot hold everybody: why.
    pub fn refused(&mut self, command: &mut Command) -> String {
        let outcome = crate::agent::Running::start(command).wait().expect(0);
        // A tree to which nobody happens to write is of one instant without any pause.
        assert!(outcome.json()["pauseMs"].is_null(), "{outcome:?}");
        self.assert_nobody_is_held();
        let said = outcome.logged("the gateway is not held for a snapshot of one instant");
        let reason = said.last().and_then(|line| line["reason"].as_str());
        reason.expect("the log has the reason").to_owned()
    }

    /// The letter that the kernel has for what each thread of the user does, but for those that stopped by themselves.
    fn states(&self) -> Vec<(String, char)> {
        let numbers = |directory: &Path| -> Vec<String> {
            let entries = fs::read_dir(directory).into_iter().flatten().flatten();
            let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.filter(|name| name.parse::<u32>().is_ok()).collect()
        };
        let mut states = Vec::new();
        for pid in numbers(Path::new("/proc")) {
            let process = Path::new("/proc").join(&pid);
            let text = fs::read(process.join("status")).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let mut lines = text.lines();
            let ids = lines.find_map(|line| line.strip_prefix("Uid:"));
            let mut ids = ids.unwrap_or_default().split_ascii_whitespace().take(3);
            if !ids.any(|id| id.parse() == Ok(self.uid)) {
                continue;
            }
            for thread in numbers(&process.join("task")) {
                let state = state(&process.join("task").join(&thread));
                states.extend(state.map(|state| (thread, state)));
            }
        }
        states
    }

    /// Whether every thread of the user is held.
    pub fn is_held(&self) -> bool {
        let states = self.states();
        !states.is_empty() && states.iter().all(|(_, state)| matches!(state, 't' | 'Z'))
    }

    /// Fails if somebody is, or stopped; the one that stopped itself is counted apart.
    pub fn assert_nobody_is_held(&self) {
        until("nobody is held", || {
            let states = self.states();
            states.iter().all(|(_, state)| *state != 't')
        });
        let stopped = |state: &&(String, char)| state.1 == 'T';
        let states = self.states();
        let stopped: Vec<_> = states.iter().filter(stopped).collect();
        let by_itself = self.members.iter().filter(|member| member.is_stopped());
        assert_eq!(stopped.len(), by_itself.count(), "{stopped:?}");
    }

    /// What is wrong with the numbers of a chain in a copy of the root, if anything.
    pub fn torn(&self, snapshot: &Value, name: &str) -> Option<String> {
        let snapshot = snapshot.as_str().expect("a snapshot has an id");
        let target = self.host.folder.path().join(format!("{snapshot}-{name}"));
        let path = target.to_str().expect("it is UTF-8");
        let _ = self.host.json(&["restore", snapshot, "--target", path]);
        let [first, second, third] = ["a", "m", "z"].map(|folder| {
            let text = fs::read_to_string(target.join(folder).join(name));
            text.unwrap_or_default().trim().parse::<u64>().unwrap_or(0)
        });
        let is_whole = first >= second && second >= third && third + 1 >= first;
        (!is_whole).then(|| format!("{first} {second} {third}"))
    }
}

impl Member {
    fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it says UTF-8");
        serde_json::from_str(&line).expect("it answers with a line of JSON")
    }

    /// Whether its first thread is stopped by a signal.
    fn is_stopped(&self) -> bool {
        let process = Path::new("/proc").join(self.child.id().to_string());
        state(&process) == Some('T')
    }
}

/// What a process or a thread does, by its folder in /proc.
pub fn state(folder: &Path) -> Option<char> {
    let stat = fs::read(folder.join("stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat).into_owned();
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.chars().next()
}

impl Drop for Held {
    fn drop(&mut self) {
        for member in &mut self.members {
            // It may have ended already.
            let _ = member.child.kill();
            let _ = member.child.wait();
        }
        let _ = Command::new("python3")
            .arg(repository().join("tests/support/held.py"))
            .args(["end", &self.uid.to_string()])
            .status();
    }
}
