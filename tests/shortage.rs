//! When something runs out: memory, descriptors, room for a line of the log. The gateway may suffer, its keeper does not.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::supervisor::{Setup, Supervisor, TOKEN, free_address, is_root};
use e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

fn kill_gateway(supervisor: &Supervisor) {
    let pid = supervisor.status()["gateway"]["pid"].as_i64();
    let pid = i32::try_from(pid.expect("the gateway runs")).expect("pids fit");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("is there");
}

// Memory

/// A control group with little memory, removed at the end.
struct Group(PathBuf);

impl Group {
    /// Where we may make one.
    fn new() -> Option<Self> {
        const LIMIT: &str = "67108864";
        if !is_root() {
            return None;
        }
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = groups.lines().find_map(|line| line.split_once(":memory:"));
        let own = own.map_or("", |(_, path)| path.trim_start_matches('/'));
        let name = format!("e2e-{}", std::process::id());
        let places = [
            (
                Path::new("/sys/fs/cgroup/memory").join(own),
                "memory.limit_in_bytes",
            ),
            (
                PathBuf::from("/sys/fs/cgroup/memory"),
                "memory.limit_in_bytes",
            ),
            (PathBuf::from("/sys/fs/cgroup"), "memory.max"),
        ];
        for (place, limit) in places {
            let group = Self(place.join(&name));
            let is_made = place.join("cgroup.procs").exists() && fs::create_dir(&group.0).is_ok();
            if is_made && fs::write(group.0.join(limit), LIMIT).is_ok() {
                return Some(group);
            }
        }
        eprintln!("skipped: no control group for memory can be made here");
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_gateway_killed_for_memory_is_told_from_one_that_was_killed() {
    let Some(group) = Group::new() else {
        return;
    };
    let setup = Setup::new();
    let script = "echo $$ > \"$0/cgroup.procs\"; exec \"$@\"";
    let folder = group.0.display().to_string();
    let program = setup.program_below(&["/bin/sh", "-c", script, &folder]);
    let mut supervisor = setup.start_as(program);
    supervisor.until_running(1);
    let gateway = supervisor.setup.gateway;
    let mut order = TcpStream::connect(gateway).expect("it runs");
    order
        .write_all(b"GET /hog HTTP/1.0\r\n\r\n")
        .expect("it runs");
    supervisor.until_running(2);
    let exit = supervisor.status()["gateway"]["lastExit"].take();
    assert_eq!(
        (&exit["signal"], &exit["reason"]),
        (&json!("SIGKILL"), &json!("oom")),
        "{exit}"
    );

    kill_gateway(&supervisor);
    supervisor.until_running(3);
    let exit = supervisor.status()["gateway"]["lastExit"].take();
    assert_eq!(
        (&exit["signal"], &exit["reason"]),
        (&json!("SIGKILL"), &Value::Null),
        "{exit}"
    );
    assert_eq!(supervisor.stop(), Some(0));
    drop(supervisor);
    until("the group to be empty", || {
        fs::read_to_string(group.0.join("cgroup.procs")).is_ok_and(|pids| pids.is_empty())
    });
}

/// The counters of a machine without the old hierarchies, as its kernel shows them, put where ours has its own.
#[test]
fn a_kill_for_memory_is_told_by_the_one_hierarchy_of_cgroup_v2_too() {
    let setup = Setup::new();
    let group = setup.folder.path().join("group");
    fs::create_dir(&group).expect("can make a folder");
    let count = |kills: u32| {
        let events =
            format!("low 0\nhigh 0\nmax 9\noom {kills}\noom_kill {kills}\noom_group_kill 0\n");
        fs::write(group.join("memory.events"), events).expect("is ours");
    };
    count(7);
    let script = "mount --bind \"$0\" /sys/fs/cgroup || exit 99; exec \"$@\"";
    let shell = ["unshare", "--mount", "/bin/sh", "-c", script];
    let folder = group.display().to_string();
    let words: Vec<&str> = shell.into_iter().chain([folder.as_str()]).collect();
    let probe = Command::new(words[0])
        .args(&words[1..])
        .arg("true")
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("skipped: nothing can be mounted here");
        return;
    }
    let program = setup.program_below(&words);
    let supervisor = setup.start_as(program);
    for (starts, kills, reason) in [(1, 8, json!("oom")), (2, 8, Value::Null)] {
        supervisor.until_running(starts);
        count(kills);
        kill_gateway(&supervisor);
        supervisor.until_running(starts + 1);
        let exit = supervisor.status()["gateway"]["lastExit"].take();
        assert_eq!(
            (&exit["signal"], &exit["reason"]),
            (&json!("SIGKILL"), &reason),
            "{exit}"
        );
    }
}

// Descriptors

/// The status over a connection that stays.
fn ask(line: &mut TcpStream, api: SocketAddr) -> Value {
    let request =
        format!("GET /v1/status HTTP/1.1\r\nHost: {api}\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    line.write_all(request.as_bytes()).expect("is open");
    let mut answer = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let length = line.read(&mut bytes).expect("is open");
        assert!(length > 0, "closed");
        answer.extend_from_slice(&bytes[..length]);
        let text = String::from_utf8_lossy(&answer).into_owned();
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body);
        if let Some(Ok(mut body)) = body.map(serde_json::from_str::<Value>) {
            return body["data"].take();
        }
    }
}

/// How many descriptors a process may have from now on; what it has it keeps.
fn limit_descriptors(pid: Pid, current: Option<u64>) -> Rlimit {
    let pid = rustix::process::Pid::from_raw(pid.as_raw());
    let maximum = getrlimit(Resource::Nofile).maximum;
    prlimit(pid, Resource::Nofile, Rlimit { current, maximum }).expect("is ours")
}

fn without_descriptors(setup: Setup) {
    setup.behave(&json!({ "holder": true }));
    let supervisor = setup.start();
    supervisor.until_running(1);
    supervisor.setup.behave(&json!({}));
    let mut line = TcpStream::connect(supervisor.api).expect("listens");
    let status = ask(&mut line, supervisor.api);
    let gateway = i32::try_from(status["gateway"]["pid"].as_i64().expect("runs"));
    let before = limit_descriptors(supervisor.pid(), Some(3));
    kill(Pid::from_raw(gateway.expect("pids fit")), Signal::SIGKILL).expect("is there");
    // Its exit is known; its helper cannot be looked for, and is not taken for gone.
    until("the exit", || {
        let status = ask(&mut line, supervisor.api);
        let exit = &status["gateway"]["lastExit"];
        exit["signal"] == "SIGKILL" && status["gateway"]["status"] == "stopping"
    });
    let mut late = TcpStream::connect(supervisor.api).expect("listens");
    until("a connection that cannot be taken", || {
        supervisor.log().contains("cannot accept a connection")
    });
    let mut uptime = || {
        let status = ask(&mut line, supervisor.api);
        assert_eq!(status["gateway"]["status"], "stopping");
        status["uptimeSeconds"].as_u64().expect("is a number")
    };
    let begun = uptime();
    until("a whole second, in which it is tried ten times", || {
        uptime() >= begun + 2
    });

    limit_descriptors(supervisor.pid(), before.current);
    ask(&mut late, supervisor.api);
    until("one line for the end of each shortage", || {
        let log = supervisor.log();
        let told = |line| log.matches(line).count();
        told("cannot accept a connection") == told("connections are accepted again")
    });
    supervisor.until_running(2);
    // The helper held the port: a gateway that finds it taken exits 78.
    assert_eq!(supervisor.status()["gateway"]["restarts"], 1);
}

#[test]
fn a_start_without_descriptors_is_tried_again() {
    let supervisor = Setup::new().start();
    supervisor.until_running(1);
    let mut line = TcpStream::connect(supervisor.api).expect("listens");
    let mut wait_for = |wanted: &str| {
        until(wanted, || {
            let status = ask(&mut line, supervisor.api);
            status["gateway"]["status"] == wanted
        });
    };
    supervisor.setup.behave(&json!({ "exit": 3 }));
    kill_gateway(&supervisor);
    wait_for("backoff");
    let before = limit_descriptors(supervisor.pid(), Some(3));
    until("a start that fails", || {
        supervisor.log().contains("Too many open files")
    });
    supervisor.setup.behave(&json!({}));
    limit_descriptors(supervisor.pid(), before.current);
    wait_for("running");
}

#[test]
fn without_descriptors_an_exit_is_not_lost_and_nothing_is_taken_for_clean() {
    without_descriptors(Setup::new());
    if is_root() {
        without_descriptors(Setup::new().with("RUNTIME_GATEWAY_USER", "64131"));
    }
}

/// So few that connections and the work of PID 1 compete for them.
#[test]
fn with_twenty_descriptors_strangers_keep_neither_status_nor_backup_nor_restart_from_the_token() {
    let api = free_address();
    let setup = Setup::new().with("RUNTIME_LISTEN", &api.to_string());
    let log = setup.folder.path().join("log");
    let script = "exec 2> \"$0\"; exec prlimit --nofile=20:20 \"$@\"";
    let log_name = log.display().to_string();
    let program = setup.program_below(&["/bin/sh", "-c", script, &log_name]);
    let mut supervisor = setup.start_at(api, program);
    supervisor.until_running(1);
    for starts in 2..4 {
        let connect = |_| TcpStream::connect(api).expect("is taken");
        let strangers: Vec<_> = (0..20).map(connect).collect();
        supervisor.status();
        // The last strangers may still have their second.
        until("a backup", || supervisor.post("/v1/backup").status == 200);
        assert_eq!(supervisor.post("/v1/restart").status, 202);
        supervisor.until_running(starts);
        drop(strangers);
    }
    let log = fs::read_to_string(log).expect("is there");
    let warning = log.lines().find(|line| line.contains("\"needed\":"));
    let warning: Value =
        serde_json::from_str(warning.expect("the limit is low")).expect("a log line is JSON");
    let needed = warning["needed"].as_u64().expect("is a number");
    assert_eq!(warning["limit"], 20);
    assert_eq!(supervisor.stop(), Some(0));

    // The number that it asks for is enough.
    let setup = Setup::new();
    let limit = format!("--nofile={needed}:{needed}");
    let program = setup.program_below(&["prlimit", &limit]);
    let supervisor = setup.start_as(program);
    supervisor.until_running(1);
    let connect = |_| TcpStream::connect(supervisor.api).expect("is taken");
    let _strangers: Vec<_> = (0..50).map(connect).collect();
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert!(!supervisor.log().contains("Too many open files"));
}

/// A soft limit is a default: we take what the hard one allows.
#[test]
fn a_low_soft_limit_on_descriptors_is_raised() {
    let setup = Setup::new();
    let program = setup.program_below(&["prlimit", "--nofile=20:4096"]);
    let supervisor = setup.start_as(program);
    supervisor.until_running(1);
    assert!(!supervisor.log().contains("the limit on descriptors"));
    if is_root() {
        let limits = fs::read_to_string(format!("/proc/{}/limits", supervisor.pid()));
        let limits = limits.expect("is there");
        let mut lines = limits.lines();
        let line = lines.find(|line| line.starts_with("Max open files"));
        let words: Vec<_> = line.expect("is listed").split_whitespace().collect();
        assert_eq!(words[3..5], ["1024", "4096"]);
    }
}

// Room

#[test]
fn a_log_on_a_full_disk_changes_nothing() {
    let api = free_address();
    let setup = Setup::new()
        .with("RUNTIME_LISTEN", &api.to_string())
        .with("RUNTIME_LOG", "debug");
    let script = "exec \"$0\" \"$@\" 2> /dev/full";
    let program = setup.program_below(&["/bin/sh", "-c", script]);
    let mut supervisor = setup.start_at(api, program);
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(supervisor.log(), "");
}

#[test]
fn a_root_on_a_full_disk_is_no_end_of_the_supervisor() {
    if !is_root() {
        return;
    }
    let setup = Setup::new();
    let root = setup.root();
    fs::create_dir(&root).expect("can make a folder");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "none"])
        .arg(&root)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: nothing can be mounted here");
        return;
    }
    let below = root.join("home").display().to_string();
    let mut supervisor = setup.with("RUNTIME_ROOT", &below).start();
    // There is no folder for it to start in.
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 127);
    assert!(supervisor.log().contains("the root cannot be made ready"));
    let ended = supervisor.stop();
    let unmounted = Command::new("umount").arg(&root).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    assert_eq!(ended, Some(0));
}
