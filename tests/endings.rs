//! How starts and stops end when something hangs, stays or comes from outside, and what is said of each end.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::thread;

use e2e::agent::INSTANCE;
use e2e::supervisor::{Setup, Supervisor, failure, is_alive, is_root, place, snapshot};
use e2e::wait::{until, until_some};
use e2e::{http, hung};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A supervisor that is killed does not end its gateway when that is deaf; a test that fails must not leave it.
struct Leftover(i32);

impl Drop for Leftover {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
    }
}

/// A process of our own that ends with this.
struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn gateway(supervisor: &Supervisor) -> i32 {
    let pid = supervisor.status()["gateway"]["pid"].as_i64();
    i32::try_from(pid.expect("it runs")).expect("pids fit")
}

fn write_script(setup: &Setup, text: &str) -> String {
    let script = setup.fake().join("script");
    fs::write(&script, format!("#!/bin/sh\n{text}\n")).expect("can write");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&script, mode).expect("is ours");
    script.display().to_string()
}

/// What `status` says of the last exit, once it says that reason.
fn last_exit(supervisor: &Supervisor, reason: &str) -> Value {
    until_some(&format!("an end that is {reason}"), || {
        let exit = supervisor.status()["gateway"]["lastExit"].clone();
        (exit["reason"] == reason).then_some(exit)
    })
}

// Hung disks

#[test]
fn a_root_on_a_disk_that_hangs_is_a_failed_start_and_the_api_answers() {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "100ms");
    let Some(disk) = hung::disk(&setup.root(), 0) else {
        return;
    };
    let supervisor = setup.start();
    // It goes first: nothing is removed below a disk that hangs.
    let disk = disk;
    supervisor.until_running(1);
    // Until then a thread of the gateway may read its own configuration, and would hang with the disk.
    until("the version", || {
        supervisor.status()["version"]["openclaw"].is_string()
    });
    disk.hang();
    kill(Pid::from_raw(gateway(&supervisor)), Signal::SIGKILL).expect("it runs");
    let exit = last_exit(&supervisor, "exec");
    let message = exit["message"].as_str().expect("there is one");
    assert!(message.contains("cannot look at the root"), "{message}");
    assert!(message.contains("the disk does not answer"), "{message}");
    assert_eq!(supervisor.setup.starts().len(), 1);
}

#[test]
fn a_program_on_a_disk_that_hangs_does_not_hold_up_the_api_or_the_end() {
    let setup = Setup::new()
        .with("RUNTIME_STARTUP_TIMEOUT", "1s")
        .with("RUNTIME_STOP_GRACE", "100ms");
    let folder = setup.folder.path().join("programs");
    let Some(disk) = hung::disk(&folder, 0) else {
        return;
    };
    disk.hang();
    let program = folder.join("gateway").display().to_string();
    let mut supervisor = setup.command(&[&program]).start();
    let _disk = disk;
    // It is not even executed, and cannot be killed.
    supervisor.until_gateway("starting");
    let pid = gateway(&supervisor);
    supervisor.until_gateway("stopping");
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.stop(), Some(1));
    let log = supervisor.log();
    let left = log.lines().find(|line| line.contains("leaving processes"));
    assert!(left.expect("is there").contains(&pid.to_string()), "{log}");
    // The state is saved nevertheless.
    assert!(log.contains("\"is_saved\":true"), "{log}");
}

#[test]
fn an_agent_that_cannot_be_killed_is_given_up_and_is_the_only_one() {
    let setup = Setup::new();
    let folder = setup.folder.path().join("disk");
    let Some(disk) = hung::disk(&folder, 0) else {
        return;
    };
    disk.hang();
    setup.agent("backup", &json!([{ "looks": folder.join("file") }]));
    let mut supervisor = setup.start();
    let _disk = disk;
    supervisor.until_running(1);
    thread::scope(|scope| {
        let backup = scope.spawn(|| supervisor.post("/v1/backup"));
        until("the agent", || {
            !supervisor.setup.agent_calls("backup").is_empty()
        });
        supervisor.signal(Signal::SIGTERM);
        until("the end of the gateway", || {
            supervisor.log().contains("\"msg\":\"exited\"")
        });
        supervisor.signal(Signal::SIGTERM);
        let answer = backup.join().expect("does not panic");
        assert_eq!(answer.status, 504, "{answer:?}");
        let error = answer.body["error"].as_str().expect("is a sentence");
        assert!(error.contains("does not end after SIGKILL"), "{error}");
    });
    assert_eq!(supervisor.wait().code(), Some(1));
    let log = supervisor.log();
    assert!(log.contains("leaving a backup-agent behind"), "{log}");
    assert!(log.contains("\"is_saved\":false"), "{log}");
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 1);
}

#[test]
fn a_store_that_hangs_is_named_while_it_does() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there are ports");
    let store = listener.local_addr().expect("is bound");
    // Connections are taken by the kernel, and nobody answers.
    let supervisor = Setup::with_agent()
        .with("RUNTIME_STORE", "s3://bucket/prefix")
        .with("RUNTIME_S3_ENDPOINT", &format!("http://{store}"))
        .with("RUNTIME_S3_ACCESS_KEY_ID", "AKIAEXAMPLE")
        .with("RUNTIME_S3_SECRET_ACCESS_KEY", "secret-0123456789")
        .with("RUNTIME_INSTANCE_ID", INSTANCE)
        .start();
    let restore = until_some("the sentence", || {
        let restore = supervisor.status()["restore"].clone();
        restore["error"].is_string().then_some(restore)
    });
    assert_eq!(restore["status"], "running");
    let error = restore["error"].as_str().expect("is a sentence");
    assert!(
        error.starts_with("the store 127.0.0.1 has not answered for "),
        "{error}"
    );
    let log = supervisor.log();
    assert!(log.contains("\"restoring\""), "{log}");
    assert!(log.contains("the store does not answer"), "{log}");
}

#[test]
fn a_file_of_the_settings_on_a_disk_that_hangs_ends_the_boot_with_a_sentence() {
    let setup = Setup::new();
    let folder = setup.folder.path().join("disk");
    let Some(disk) = hung::disk(&folder, 0) else {
        return;
    };
    disk.hang();
    let file = folder.join("token").display().to_string();
    let setup = setup.with("RUNTIME_GATEWAY_TOKEN_FILE", &file);
    let child = setup.program().stderr(Stdio::piped()).spawn();
    let mut child = child.expect("can be executed");
    let mut said = String::new();
    let stderr = child.stderr.take().expect("was piped");
    let read = BufReader::new(stderr).read_line(&mut said);
    read.expect("is text");
    assert!(
        said.contains("cannot read the files that the settings name"),
        "{said}"
    );
    assert!(said.contains("the disk does not answer"), "{said}");
    // Its thread waits in the kernel until then.
    drop(disk);
    let status = child.wait().expect("is our child");
    assert_eq!(status.code(), Some(1));
}

#[test]
fn the_error_of_a_restore_stays_while_the_next_try_makes_progress() {
    let setup = Setup::new();
    let progress = r#"{"msg":"progress","doneBytes":1,"totalBytes":2,"bytesPerSecond":1}"#;
    let silent = r#"{"msg":"the store does not answer","host":"a.store","silentSeconds":2}"#;
    setup.agent(
        "restore",
        &json!([
            failure(75, "first")[0],
            { "stderr": [silent], "gate": "silent", "exit": 75, "answer": { "error": "second", "code": "x" } },
            { "stderr": [silent, progress], "gate": "progress" },
        ]),
    );
    let supervisor = setup.start();
    let until_error = |wanted: &str| {
        until(wanted, || supervisor.status()["restore"]["error"] == wanted);
    };
    until_error("the store a.store has not answered for 2 s");
    supervisor.setup.open_gate("silent");
    until("the progress", || {
        supervisor.status()["restore"]["progress"]["totalBytes"] == 2
    });
    until_error("second");
}

// Processes that are not our children

#[test]
fn the_gateway_of_a_supervisor_that_was_killed_is_gone_before_the_next_restore() {
    survives_no_restore(|setup| setup);
    if is_root() {
        survives_no_restore(|setup| setup.with("RUNTIME_GATEWAY_USER", "64141"));
    }
    // One whose environment tells nothing.
    survives_no_restore(|setup| {
        let fake = setup.fake().display().to_string();
        let (program, port) = (format!("{fake}/fake-gateway"), setup.gateway.port());
        setup.command(&["env", "-i", &program, &port.to_string(), &fake])
    });
}

fn survives_no_restore(given: impl Fn(Setup) -> Setup) {
    let setup = given(Setup::new());
    setup.behave(&json!({ "deaf": true }));
    let mut first = setup.start();
    first.until_running(1);
    let pid = gateway(&first);
    let _leftover = Leftover(pid);
    first.signal(Signal::SIGKILL);
    first.wait();
    assert!(is_alive(pid.into()), "it is deaf");

    let setup = given(Setup::new().on_the_disk_of(&first.setup));
    let empty = json!({ "error": "", "code": "no_snapshot" });
    setup.agent(
        "restore",
        &json!([{ "gate": "go", "exit": 10, "answer": empty }]),
    );
    let second = setup.start();
    until("the restore", || {
        !second.setup.agent_calls("restore").is_empty()
    });
    assert!(!is_alive(pid.into()));
    second.setup.open_gate("go");
    second.until_running(1);
}

#[test]
fn a_process_of_the_gateways_user_that_is_no_child_of_ours_goes_at_a_restart() {
    if !is_root() {
        eprintln!("skipped: only root can start it");
        return;
    }
    let supervisor = Setup::new().with("RUNTIME_GATEWAY_USER", "64142").start();
    supervisor.until_running(1);
    let sleeper = Command::new("sleep")
        .arg("1000")
        .uid(64142)
        .gid(64142)
        .spawn();
    let sleeper = Sleeper(sleeper.expect("can be started"));
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert!(!is_alive(sleeper.0.id().into()));
}

#[test]
fn a_process_of_root_that_plays_the_gateways_user_holds_nothing_up() {
    if !is_root() {
        eprintln!("skipped: only root can start it");
        return;
    }
    let supervisor = Setup::new().with("RUNTIME_GATEWAY_USER", "64144").start();
    supervisor.until_running(1);
    let play = "import os, time\nos.setresuid(0, 64144, 0)\nprint(flush=True)\ntime.sleep(1000)";
    let player = Command::new("/usr/bin/python3")
        .args(["-c", play])
        .stdout(Stdio::piped())
        .spawn();
    let mut player = Sleeper(player.expect("can be started"));
    let ready = player.0.stdout.take().expect("was piped");
    let read = BufReader::new(ready).read_line(&mut String::new());
    assert_eq!(read.ok(), Some(1));
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert!(is_alive(player.0.id().into()));
}

#[test]
fn names_that_are_no_text_hold_up_no_sweep() {
    for user in [None, Some("64143")] {
        if user.is_some() && !is_root() {
            continue;
        }
        let setup = Setup::new();
        let name = setup.fake().join(OsStr::from_bytes(b"w\xc3\xff\xfe"));
        place("/bin/sleep".as_ref(), &name);
        // One is a stranger's, the other one the gateway's own.
        let stranger = Command::new(&name).arg("1000").spawn();
        let stranger = Sleeper(stranger.expect("can be started"));
        let setup = match user {
            Some(user) => setup.with("RUNTIME_GATEWAY_USER", user),
            None => setup,
        };
        let fake = setup.fake().join("fake-gateway").display().to_string();
        let port = setup.gateway.port();
        let script = format!(
            "cd {}; ./w* 1000 & exec {fake} {port} .",
            setup.fake().display()
        );
        let script = write_script(&setup, &script);
        let mut supervisor = setup.command(&[&script]).start();
        supervisor.until_running(1);
        assert_eq!(supervisor.post("/v1/restart").status, 202);
        supervisor.until_running(2);
        assert!(
            is_alive(stranger.0.id().into()),
            "{user:?} {}",
            supervisor.log()
        );
        assert_eq!(supervisor.stop(), Some(0));
    }
}

#[test]
fn a_second_supervisor_on_the_same_state_is_refused_and_told_of_the_first() {
    let first = Setup::new().start();
    first.until_running(1);
    let second = Setup::new().on_the_disk_of(&first.setup);
    let output = second.program().output().expect("can be executed");
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = format!("another supervisor (process {})", first.pid());
    assert!(said.contains(&expected), "{said}");
    assert_eq!(first.status()["gateway"]["status"], "running");
}

// Ends, and what they are called

#[test]
fn every_signal_that_asks_to_stop_takes_the_final_snapshot() {
    // The last one is SIGRTMIN+3 of glibc.
    for signal in [2, 3, 15, 30, 37] {
        let mut supervisor = Setup::new().start();
        supervisor.until_running(1);
        let sent = Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(supervisor.pid().to_string())
            .status();
        assert!(sent.is_ok_and(|status| status.success()));
        assert_eq!(supervisor.wait().code(), Some(0), "signal {signal}");
        assert_eq!(supervisor.setup.agent_calls("backup").len(), 1);
    }
}

#[test]
fn starts_that_come_to_nothing_have_their_reason_and_sentence() {
    let prepare = |text: &str| {
        let setup = Setup::new();
        let script = write_script(&setup, text);
        setup.with("RUNTIME_GATEWAY_PREPARE", &script)
    };
    let slow = |setup: Setup| {
        setup
            .with("RUNTIME_STARTUP_TIMEOUT", "300ms")
            .with("RUNTIME_STOP_GRACE", "200ms")
    };
    let never_ready = || {
        let setup = Setup::new();
        setup.behave(&json!({ "startup": "starting" }));
        setup
    };
    for (setup, reason, sentence) in [
        (
            Setup::new().command(&["no-such-program"]),
            "exec",
            "cannot execute no-such-program: No such file or directory",
        ),
        (
            Setup::new().with("RUNTIME_GATEWAY_LIMITS", "nofile=999999999"),
            "exec",
            "cannot set the limit nofile=999999999: Operation not permitted",
        ),
        (prepare("exit 9"), "prepare", "it ended with exit code 9"),
        (prepare("kill -9 $$"), "prepare", "it ended with SIGKILL"),
        (
            slow(prepare("exec sleep 1000")),
            "prepare",
            "did not end within 0.3 s",
        ),
        (
            slow(never_ready()),
            "startup_timeout",
            "it was not ready within 0.3 s",
        ),
    ] {
        let supervisor = setup.start();
        let exit = last_exit(&supervisor, reason);
        let message = exit["message"].as_str().expect("there is one");
        assert!(message.contains(sentence), "{message}");
        supervisor.until_gateway("backoff");
        let log = supervisor.log();
        let is_stop = log.contains(r#""status":"stopping","was":"starting""#);
        assert_eq!(is_stop, message.contains("stopped"), "{log}");
    }
}

#[test]
fn a_gateway_that_does_not_end_when_asked_is_killed_and_that_is_said() {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "200ms");
    setup.behave(&json!({ "deaf": true }));
    let supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    let exit = last_exit(&supervisor, "killed");
    assert_eq!(exit["signal"], "SIGKILL");
    let message = exit["message"].as_str().expect("there is one");
    assert!(message.contains("0.2 s (RUNTIME_STOP_GRACE)"), "{message}");
}

#[test]
fn one_that_accepts_the_restart_and_stays_gets_sigterm_and_only_then_sigkill() {
    for (deaf, signal, reason) in [
        (false, "SIGTERM", Value::Null),
        (true, "SIGKILL", "killed".into()),
    ] {
        let setup = Setup::new().with("RUNTIME_STOP_GRACE", "3s");
        setup.behave(&json!({ "stays": true, "deaf": deaf }));
        let supervisor = setup.start();
        supervisor.until_running(1);
        let user = nix::unistd::geteuid();
        let folder = supervisor.setup.root();
        let folder = folder.join(format!(".openclaw/tmp/openclaw-{user}"));
        fs::create_dir_all(&folder).expect("can make folders");
        let lock = json!({ "pid": gateway(&supervisor), "ownerId": "owner-1" });
        fs::write(folder.join("gateway.state.lock"), lock.to_string()).expect("can write");
        assert_eq!(supervisor.post("/v1/restart").status, 202);
        supervisor.until_running(2);
        let exit = &supervisor.status()["gateway"]["lastExit"];
        assert_eq!(
            (&exit["signal"], &exit["reason"]),
            (&signal.into(), &reason)
        );
    }
}

#[test]
fn a_gateway_that_leaves_right_after_readiness_again_and_again_waits() {
    let supervisor = Setup::new().start();
    for starts in 1..5 {
        supervisor.until_running(starts);
        // It exits with 0.
        let leave = b"GET /exit/0 HTTP/1.0\r\n\r\n";
        let _ = http::raw(supervisor.setup.gateway, leave);
    }
    supervisor.until_gateway("backoff");
    assert_eq!(supervisor.setup.starts().len(), 4);
}

#[test]
fn a_life_that_ends_fenced_is_not_called_saved() {
    let setup = Setup::new();
    setup.agent(
        "backup",
        &json!([snapshot("snapshot-1")[0], failure(12, "fenced")[0]]),
    );
    let mut supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.post("/v1/backup").status, 409);
    assert_eq!(supervisor.stop(), Some(0));
    assert!(supervisor.log().contains("\"is_saved\":false"));
}
