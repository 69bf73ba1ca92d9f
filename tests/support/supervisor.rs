//! A supervisor under test with a fake gateway and a fake agent, in a folder of its own.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{INSTANCE, Place};
use crate::binaries::binary;
use crate::http::{self, Response};
use crate::surroundings;
use crate::wait::{until, until_some};

pub const TOKEN: &str = "service-token-0123456789abcdefghij";

/// What the fake agent says when all is well.
pub fn snapshot(id: &str) -> Value {
    json!([{ "exit": 0, "answer": {
        "snapshot": id, "time": "2026-11-22T09:00:45.000Z", "unchanged": false, "bytesUploaded": 12, "files": 3,
        "durationMs": 4, "consistency": "instant", "consistencyReason": null, "rounds": 1, "pauseMs": 12, "skipped": 0,
        "unread": { "count": 0, "paths": [] }, "fork": false, "warning": null,
    } }])
}

/// A script with one step: a failure with this exit code.
pub fn failure(exit: i32, code: &str) -> Value {
    json!([{ "exit": exit, "answer": { "error": format!("the fake says {code}"), "code": code } }])
}

/// A supervisor that is about to be started.
pub struct Setup {
    pub folder: TempDir,
    pub gateway: SocketAddr,
    settings: Vec<(String, String)>,
    command: Option<Vec<String>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self::new()
    }
}

impl Setup {
    /// An empty store, a gateway that behaves, and short waits.
    pub fn new() -> Self {
        let setup = Self::of("fake-agent");
        setup.agent("restore", &failure(10, "no_snapshot"));
        setup.agent("backup", &snapshot("snapshot-1"));
        setup.agent(
            "prune",
            &json!([{ "exit": 0, "answer": { "removed": [], "bytesFreed": 0 } }]),
        );
        setup
    }

    /// The same with the real agent; the store is to be set.
    pub fn with_agent() -> Self {
        Self::of("backup-agent")
    }

    fn of(agent: &str) -> Self {
        let folder = surroundings::folder();
        // The gateway may run as somebody else.
        open_to_all(folder.path());
        let fake = folder.path().join("fake");
        fs::create_dir(&fake).expect("can make a folder");
        open_to_all(&fake);
        let programs = folder.path().join("bin");
        fs::create_dir(&programs).expect("can make a folder");
        place(&binary("supervisor"), &programs.join("supervisor"));
        place(&binary(agent), &programs.join("backup-agent"));
        place(&binary("backup-agent"), &programs.join("real-agent"));
        place(&binary("fake-gateway"), &fake.join("fake-gateway"));
        let gateway = free_address();
        let settings = [
            ("RUNTIME_SERVICE_TOKEN", TOKEN.to_owned()),
            ("RUNTIME_LISTEN", "127.0.0.1:0".to_owned()),
            ("RUNTIME_GATEWAY_URL", format!("http://{gateway}")),
            (
                "RUNTIME_ROOT",
                folder.path().join("root").display().to_string(),
            ),
            (
                "RUNTIME_STATE",
                folder.path().join("state").display().to_string(),
            ),
            ("RUNTIME_STOP_GRACE", "20s".to_owned()),
            ("RUNTIME_BACKUP_INTERVAL", "0".to_owned()),
        ];
        let setup = Self {
            folder,
            gateway,
            settings: settings
                .map(|(name, value)| (name.to_owned(), value))
                .to_vec(),
            command: None,
        };
        setup.behave(&json!({}));
        setup.devices(&json!({ "pending": [], "paired": [] }));
        setup
    }

    /// Sets a variable of the supervisor's environment.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With the real agent, on this store.
    #[must_use]
    pub fn on(mut self, store: &Place) -> Self {
        let agent = self.folder.path().join("bin/backup-agent");
        fs::remove_file(&agent).expect("there is the fake one");
        place(&binary("backup-agent"), &agent);
        self.settings.extend(store.settings());
        self.with("RUNTIME_INSTANCE_ID", INSTANCE)
    }

    /// Runs this instead of the fake gateway.
    #[must_use]
    pub fn command(mut self, command: &[&str]) -> Self {
        self.command = Some(command.iter().map(|&word| word.to_owned()).collect());
        self
    }

    /// Writes down what the agent does, run by run (see `fake_agent.rs`).
    pub fn agent(&self, verb: &str, steps: &Value) {
        write(
            &self.folder.path().join("bin").join(format!("{verb}.json")),
            steps,
        );
    }

    /// Writes down what the gateway does from its next start on (see `fake_gateway.rs`).
    pub fn behave(&self, behaviour: &Value) {
        write(&self.fake().join("behaviour.json"), behaviour);
    }

    pub fn devices(&self, devices: &Value) {
        let path = self.fake().join("devices.json");
        write(&path, devices);
        fs::set_permissions(path, Permissions::from_mode(0o666)).expect("is our file");
    }

    pub fn fake(&self) -> PathBuf {
        self.folder.path().join("fake")
    }

    pub fn root(&self) -> PathBuf {
        self.setting("RUNTIME_ROOT")
    }

    /// The same disk for another boot: root and state of this one.
    #[must_use]
    pub fn on_the_disk_of(self, other: &Self) -> Self {
        ["RUNTIME_ROOT", "RUNTIME_STATE"]
            .into_iter()
            .fold(self, |setup, name| {
                let value = other.setting(name).display().to_string();
                setup.with(name, &value)
            })
    }

    fn setting(&self, name: &str) -> PathBuf {
        let mut settings = self.settings.iter();
        let found = settings.find(|(known, _)| known == name);
        PathBuf::from(&found.expect("it is always set").1)
    }

    /// Lets an agent that waits at this gate go on.
    pub fn open_gate(&self, name: &str) {
        fs::write(self.folder.path().join("bin").join(name), "").expect("can write");
    }

    /// Every run of the agent so far.
    pub fn agent_calls(&self, verb: &str) -> Vec<Value> {
        let mut calls = lines(&self.folder.path().join("bin/calls.jsonl"));
        calls.retain(|call| call["arguments"][0] == verb);
        calls
    }

    /// Every start of the gateway so far.
    pub fn starts(&self) -> Vec<Value> {
        lines(&self.fake().join("starts.jsonl"))
    }

    /// The command line and environment, for a test that starts it in a way of its own.
    pub fn program(&self) -> Command {
        let mut program = Command::new(self.folder.path().join("bin/supervisor"));
        surroundings::empty(&mut program);
        program.env("PATH", "/usr/bin:/bin").arg("--");
        match &self.command {
            Some(command) => program.args(command),
            None => program
                .arg(self.fake().join("fake-gateway"))
                .arg(self.gateway.port().to_string())
                .arg(self.fake()),
        };
        program.envs(self.settings.iter().map(|(name, value)| (name, value)));
        program.stdin(Stdio::null()).stderr(Stdio::piped());
        program
    }

    /// Likewise, as the arguments of another program that executes it.
    pub fn program_below(&self, words: &[&str]) -> Command {
        let inner = self.program();
        let mut program = Command::new(words[0]);
        program.args(&words[1..]);
        program.arg(inner.get_program()).args(inner.get_args());
        let set =
            |(name, value): (&OsStr, Option<&OsStr>)| Some((name.to_owned(), value?.to_owned()));
        program.env_clear().envs(inner.get_envs().filter_map(set));
        program.stdin(Stdio::null()).stderr(Stdio::piped());
        program
    }

    /// Another command of the same program, with the same settings.
    pub fn program_with(&self, arguments: &[&str], api: SocketAddr) -> Output {
        let mut program = Command::new(self.folder.path().join("bin/supervisor"));
        surroundings::empty(&mut program);
        program.envs(self.settings.iter().map(|(name, value)| (name, value)));
        program.env("RUNTIME_LISTEN", api.to_string());
        program.args(arguments).output().expect("can be executed")
    }

    pub fn start(self) -> Supervisor {
        let program = self.program();
        self.start_as(program)
    }

    pub fn start_as(self, program: Command) -> Supervisor {
        let mut supervisor = self.spawn(program);
        supervisor.api = until_some("the address of the API", || {
            let line = supervisor
                .log()
                .lines()
                .find(|line| line.contains("\"listening\""))?
                .to_owned();
            let line: Value = serde_json::from_str(&line).expect("a log line is JSON");
            line["address"].as_str()?.parse().ok()
        });
        supervisor
    }

    /// For one that cannot log where it listens.
    pub fn start_at(self, api: SocketAddr, program: Command) -> Supervisor {
        let mut supervisor = self.spawn(program);
        supervisor.api = api;
        until("the API", || TcpStream::connect(api).is_ok());
        supervisor
    }

    fn spawn(self, mut program: Command) -> Supervisor {
        let mut child = program.spawn().expect("the supervisor can be executed");
        let log = Arc::new(Mutex::new(Vec::new()));
        if let Some(stderr) = child.stderr.take() {
            let written = log.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    written.lock().expect("nobody panics with it").push(line);
                }
            });
        }
        Supervisor {
            setup: self,
            child,
            log,
            api: SocketAddr::from(([127, 0, 0, 1], 0)),
        }
    }
}

pub struct Supervisor {
    pub setup: Setup,
    pub api: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

impl Supervisor {
    /// A request with the right token.
    pub fn request(&self, method: &str, path: &str) -> Response {
        http::request(
            self.api,
            method,
            path,
            &[("Authorization", &format!("Bearer {TOKEN}"))],
            b"",
        )
    }

    pub fn get(&self, path: &str) -> Response {
        self.request("GET", path)
    }

    pub fn post(&self, path: &str) -> Response {
        self.request("POST", path)
    }

    /// `data` of the status.
    pub fn status(&self) -> Value {
        let mut answer = self.get("/v1/status");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.body["data"].take()
    }

    /// Waits until the gateway has this status, and returns all of it.
    pub fn until_gateway(&self, wanted: &str) -> Value {
        until_some(&format!("a gateway that is {wanted}"), || {
            let status = self.status();
            (status["gateway"]["status"] == wanted).then_some(status)
        })
    }

    /// Waits until the gateway runs and has been started this often, and returns what the last start found.
    pub fn until_running(&self, starts: usize) -> Value {
        until(&format!("start {starts} of the gateway"), || {
            self.setup.starts().len() >= starts
        });
        let _ = self.until_gateway("running");
        self.setup.starts().pop().expect("there are some")
    }

    /// Everything logged so far.
    pub fn log(&self) -> String {
        self.log.lock().expect("nobody panics with it").join("\n")
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("pids fit"))
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("the supervisor is there");
    }

    /// Kills it and every process of it at once, as the end of its container does.
    pub fn kill_container(&mut self) {
        let pid = self.pid();
        self.signal(Signal::SIGSTOP);
        until("a supervisor that is stopped", || {
            state(pid.as_raw().into()) == Some('T')
        });
        // Stopped it starts nobody again, and as their reaper it still is who gets those that lose their parent.
        until("the end of every process", || {
            let all = descendants(pid.as_raw()).into_iter();
            let living: Vec<i32> = all.filter(|pid| is_alive((*pid).into())).collect();
            for pid in &living {
                // It may have ended meanwhile.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            living.is_empty()
        });
        self.child.kill().expect("it is our child");
        let _ = self.wait();
    }

    /// How it ended, if it has.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("is our child")
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        until_some("the end of the supervisor", || self.try_wait())
    }

    /// SIGTERM, and its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.wait().code()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        for _ in 0..100 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            // Each one cuts a wait short.
            let _ = kill(self.pid(), Signal::SIGTERM);
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether anything of a process still runs: of a zombie it may be all but the first thread.
pub fn is_alive(pid: i64) -> bool {
    match state(pid) {
        Some('Z') => field(pid, "Threads").is_some_and(|threads| threads != "1"),
        state => state.is_some(),
    }
}

/// `R`, `S`, `T`, `Z` … as in proc(5).
fn state(pid: i64) -> Option<char> {
    field(pid, "State")?.chars().next()
}

fn field(pid: i64, name: &str) -> Option<String> {
    // The name of a program need not be UTF-8.
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let mut lines = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = lines.find(|(found, _)| *found == name)?;
    Some(value.trim().to_owned())
}

/// The children of a process, the dead ones that it has not reaped included; none when it has gone.
pub fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let threads = threads.into_iter().flatten().flatten();
    let lists = threads.flat_map(|thread| fs::read_to_string(thread.path().join("children")));
    lists
        .flat_map(|list| {
            let pids = list.split_whitespace().map(str::parse);
            pids.collect::<Result<Vec<_>, _>>()
                .expect("is a list of pids")
        })
        .collect()
}

/// The children of a process, theirs, and so on.
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut all = children(pid);
    let mut at = 0;
    while let Some(next) = all.get(at) {
        all.extend(children(*next));
        at += 1;
    }
    all
}

/// A test that needs root says so and ends, when we are not.
pub fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: only root can change users");
    }
    is_root
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    // The last line may still be being written.
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// At once, since the reader may come any time.
fn write(path: &Path, value: &Value) {
    let new = path.with_extension("new");
    fs::write(&new, value.to_string()).expect("can write");
    fs::rename(new, path).expect("can rename");
}

/// Puts a program somewhere, by a link where that is possible: the programs are large.
///
/// Never by a copy of our own: a child that another test forks meanwhile would hold the file open for writing until its
/// own exec, and the copy could not be executed (`ETXTBSY`).
pub fn place(from: &Path, to: &Path) {
    if fs::hard_link(from, to).is_err() {
        let copied = Command::new("cp").arg(from).arg(to).status();
        assert!(copied.is_ok_and(|status| status.success()), "can copy");
    }
    // Others run it too, whatever the umask of the build was.
    fs::set_permissions(to, Permissions::from_mode(0o755)).expect("is ours");
}

/// Where nobody listens.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("there is a free port")
}

fn open_to_all(folder: &Path) {
    // Sticky, as /tmp is: what is in it cannot be replaced by another user.
    fs::set_permissions(folder, Permissions::from_mode(0o1777)).expect("is our folder");
}
