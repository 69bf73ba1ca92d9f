//! A backup agent under test: a root and a state in a folder of their own, and one of the stores.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::moto::Moto;
use crate::s3::{BUCKET, S3};
use crate::surroundings;
pub use crate::surroundings::folder;
use crate::wait;

/// Far longer than any run takes, so that only one that hangs fails a test.
const DEADLINE: Duration = Duration::from_mins(2);

/// The instance of every test, and where its objects are in a bucket.
pub const INSTANCE: &str = "the-instance";
pub const PREFIX: &str = "some/prefix/the-instance/";

/// A store, whichever kind.
pub enum Place {
    Directory(TempDir),
    Memory(S3),
    Moto(Arc<Moto>, String),
}

impl Place {
    pub fn directory() -> Self {
        Self::Directory(folder())
    }

    pub fn memory() -> Self {
        Self::Memory(S3::start())
    }

    pub fn moto() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let bucket = format!(
            "bucket-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let moto = Moto::shared();
        moto.make_bucket(&bucket);
        Self::Moto(moto, bucket)
    }

    /// The server in memory.
    pub fn s3(&self) -> &S3 {
        match self {
            Self::Memory(s3) => s3,
            _ => panic!("this store has no requests to count"),
        }
    }

    /// The settings that lead to it.
    pub fn settings(&self) -> Vec<(String, String)> {
        let pairs = match self {
            Self::Directory(folder) => {
                vec![(
                    "RUNTIME_STORE",
                    format!("file://{}/store", folder.path().display()),
                )]
            }
            Self::Memory(s3) => {
                let identity = s3.identity();
                let mut pairs = vec![
                    ("RUNTIME_STORE", format!("s3://{BUCKET}/some/prefix")),
                    ("RUNTIME_S3_ENDPOINT", format!("http://{}", s3.address)),
                    ("RUNTIME_S3_ACCESS_KEY_ID", identity.access_key_id.clone()),
                    (
                        "RUNTIME_S3_SECRET_ACCESS_KEY",
                        identity.secret_access_key.clone(),
                    ),
                ];
                if let Some(token) = &identity.session_token {
                    pairs.push(("RUNTIME_S3_SESSION_TOKEN", token.clone()));
                }
                pairs
            }
            Self::Moto(moto, bucket) => vec![
                ("RUNTIME_STORE", format!("s3://{bucket}/some/prefix")),
                ("RUNTIME_S3_ENDPOINT", format!("http://{}", moto.address)),
                ("RUNTIME_S3_REGION", "us-east-1".to_owned()),
                ("RUNTIME_S3_ACCESS_KEY_ID", "anyone".to_owned()),
                ("RUNTIME_S3_SECRET_ACCESS_KEY", "anything".to_owned()),
            ],
        };
        pairs
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect()
    }

    /// The instance's objects by their keys.
    pub fn objects(&self) -> BTreeMap<String, Vec<u8>> {
        let all = match self {
            Self::Directory(folder) => return files(&folder.path().join("store").join(INSTANCE)),
            Self::Memory(s3) => s3.objects(),
            Self::Moto(moto, bucket) => moto.objects(bucket),
        };
        let own = all.into_iter().map(|(key, bytes)| {
            let key = key
                .strip_prefix(PREFIX)
                .expect("nothing is written outside of the prefix");
            (key.to_owned(), bytes)
        });
        own.collect()
    }

    /// Keys below a folder of the instance.
    pub fn keys(&self, folder: &str) -> Vec<String> {
        self.objects()
            .into_keys()
            .filter(|key| key.starts_with(folder))
            .collect()
    }

    /// Puts an object in place, whatever was there.
    pub fn put(&self, key: &str, bytes: &[u8]) {
        match self {
            Self::Directory(folder) => {
                let path = folder.path().join("store").join(INSTANCE).join(key);
                fs::create_dir_all(path.parent().expect("a key has a folder"))
                    .expect("can make a folder");
                fs::write(path, bytes).expect("can write an object");
            }
            Self::Memory(s3) => s3.put(&format!("{PREFIX}{key}"), bytes.to_vec()),
            Self::Moto(moto, bucket) => moto.put(bucket, &format!("{PREFIX}{key}"), bytes),
        }
    }

    pub fn remove(&self, key: &str) {
        match self {
            Self::Directory(folder) => {
                fs::remove_file(folder.path().join("store").join(INSTANCE).join(key))
                    .expect("the object is there");
            }
            Self::Memory(s3) => s3.remove(&format!("{PREFIX}{key}")),
            Self::Moto(moto, bucket) => moto.remove(bucket, &format!("{PREFIX}{key}")),
        }
    }

    /// The head as JSON.
    pub fn head(&self) -> Value {
        let objects = self.objects();
        serde_json::from_slice(objects.get("head.json").expect("there is a head"))
            .expect("the head is JSON")
    }
}

/// Files below a directory by their names relative to it, without those that are no objects.
fn files(base: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for folder in ["", "layers", "snapshots"] {
        let Ok(entries) = fs::read_dir(base.join(folder)) else {
            continue;
        };
        for entry in entries {
            let entry = entry.expect("the store stays");
            let name = entry.file_name().into_string().expect("keys are UTF-8");
            if entry.path().is_file() && !name.starts_with('.') {
                let key = Path::new(folder).join(name).display().to_string();
                found.insert(key, fs::read(entry.path()).expect("an object can be read"));
            }
        }
    }
    found
}

/// One host: a disk with root and state, and the settings to run the agent with.
pub struct Host {
    pub folder: TempDir,
    pub root: PathBuf,
    pub state: PathBuf,
    settings: Vec<(String, String)>,
}

impl Host {
    /// A host with an empty root.
    pub fn new(place: &Place) -> Self {
        let folder = folder();
        let root = folder.path().join("root");
        let state = folder.path().join("state");
        fs::create_dir(&root).expect("can make the root");
        let mut settings = place.settings();
        for (name, value) in [
            ("RUNTIME_ROOT", root.display().to_string()),
            ("RUNTIME_STATE", state.display().to_string()),
            ("RUNTIME_INSTANCE_ID", INSTANCE.to_owned()),
        ] {
            settings.push((name.to_owned(), value));
        }
        Self {
            folder,
            root,
            state,
            settings,
        }
    }

    /// The same host with a setting more, or another value of one that it has.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.set(name, value);
        self
    }

    pub fn set(&mut self, name: &str, value: impl Into<String>) {
        self.settings.retain(|(known, _)| known != name);
        self.settings.push((name.to_owned(), value.into()));
    }

    pub fn unset(&mut self, name: &str) {
        self.settings.retain(|(known, _)| known != name);
    }

    /// As a runtime that boots: the digit stands for its boot id.
    #[must_use]
    pub fn booted(self, digit: char) -> Self {
        self.with("RUNTIME_BOOT_ID", boot_id(digit))
    }

    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = surroundings::program("backup-agent");
        command
            .args(arguments)
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts the agent.
    pub fn start<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Running {
        Running::start(&mut self.command(arguments))
    }

    /// Runs the agent to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        self.start(arguments).wait()
    }

    /// Runs it with `--json` and takes its answer; it has to succeed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.run(&[arguments, &["--json"]].concat())
            .expect(0)
            .json()
    }

    /// A snapshot of what is there now: its id.
    pub fn backup(&self) -> String {
        let answer = self.json(&["backup"]);
        answer["snapshot"]
            .as_str()
            .expect("a backup names its snapshot")
            .to_owned()
    }

    /// What is beside root and state: nothing should be.
    pub fn leftovers(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).expect("the folder stays");
        let names = entries.map(|entry| {
            entry
                .expect("the folder stays")
                .file_name()
                .to_string_lossy()
                .into_owned()
        });
        names
            .filter(|name| name != "root" && name != "state")
            .collect()
    }

    /// Working files in the state directory that only a run under way should have.
    pub fn scratch(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.state).into_iter().flatten().flatten();
        let paths = entries.map(|entry| entry.path());
        let is_scratch = |path: &PathBuf| path.extension().is_some_and(|end| end == "new");
        paths.filter(is_scratch).collect()
    }

    /// Loses the disk: root and state are gone.
    pub fn lose_everything(&self) {
        self.lose_root();
        fs::remove_dir_all(&self.state).expect("there is a state");
    }

    pub fn lose_root(&self) {
        make_removable(&self.root);
        fs::remove_dir_all(&self.root).expect("there is a root");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Or the folder could not be removed by its owner, where that is not root.
        make_removable(self.folder.path());
    }
}

fn make_removable(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = fs::set_permissions(entry.path(), fs::Permissions::from_mode(0o700));
            make_removable(&entry.path());
        }
    }
}

/// The boot id that a digit stands for.
pub fn boot_id(digit: char) -> String {
    digit.to_string().repeat(32)
}

/// An agent at work; it is killed when this is dropped.
pub struct Running {
    child: Child,
    outputs: Option<[JoinHandle<String>; 2]>,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("the agent can be run");
        let stdout = collect(child.stdout.take().expect("it is piped"));
        let stderr = collect(child.stderr.take().expect("it is piped"));
        Self {
            child,
            outputs: Some([stdout, stderr]),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it waits for a lock.
    pub fn wait_for_lock(&self) {
        let tasks = format!("/proc/{}/task", self.pid());
        wait::until("it waits for a lock", || {
            let threads = fs::read_dir(&tasks).into_iter().flatten().flatten();
            threads
                .map(|thread| fs::read_to_string(thread.path().join("syscall")).unwrap_or_default())
                // flock(2) on x86_64 and aarch64.
                .any(|call| call.starts_with("73 ") || call.starts_with("32 "))
        });
    }

    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .expect("a child has a pid");
        kill_process(pid, signal).expect("it runs until it is waited for");
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("it is our child").is_none()
    }

    /// Peak of its resident memory so far, in KiB.
    pub fn peak_memory(&self) -> u64 {
        self.peak_memory_if_there().expect("it runs")
    }

    /// Likewise, of one that may have ended.
    pub fn peak_memory_if_there(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    }

    pub fn wait(mut self) -> Outcome {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is our child") {
                break status;
            }
            assert!(start.elapsed() < DEADLINE, "the agent hangs");
            std::thread::sleep(Duration::from_millis(2));
        };
        let [stdout, stderr] = self.outputs.take().expect("it is waited for once");
        Outcome {
            code: status.code(),
            signal: status.signal(),
            stdout: stdout.join().expect("the collector does not panic"),
            stderr: stderr.join().expect("the collector does not panic"),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already, unless the test has failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn collect(mut from: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).expect("a pipe can be read");
        String::from_utf8(bytes).expect("the agent writes UTF-8")
    })
}

/// What an agent left behind.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Fails unless it ended with this code.
    #[must_use]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(
            self.code,
            Some(code),
            "\n--- standard output\n{}\n--- standard error\n{}",
            self.stdout,
            self.stderr
        );
        self
    }

    /// The one object on standard output.
    pub fn json(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("{error}: {:?}\n{}", self.stdout, self.stderr));
        assert!(value.is_object(), "{value} is no object");
        assert_eq!(
            self.stdout.lines().count(),
            1,
            "it is one line: {}",
            self.stdout
        );
        value
    }

    /// The last line on standard error that is no log line: the sentence of an error.
    pub fn sentence(&self) -> String {
        let lines = self.stderr.lines().filter(|line| !line.starts_with('{'));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// Log lines with this message.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        let lines = self
            .stderr
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["msg"] == message).collect()
    }
}

/// Makes the same tests for every kind of store.
#[macro_export]
macro_rules! on_every_store {
    ($($name:ident),* $(,)?) => {
        mod on_a_directory {
            $(#[test] fn $name() { super::$name(&e2e::agent::Place::directory()); })*
        }
        mod on_s3_in_memory {
            $(#[test] fn $name() {
                let place = e2e::agent::Place::memory();
                super::$name(&place);
                place.s3().assert_no_complaints();
            })*
        }
        mod on_moto {
            $(#[test] fn $name() { super::$name(&e2e::agent::Place::moto()); })*
        }
    };
}
