//! The supervisor with a gateway and an agent that do as the test says: boot, isolation, restart policy, restore
//! failures, backups, shutdown.

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

use e2e::http;
use e2e::supervisor::{Setup, Supervisor, TOKEN, children, failure, is_alive, is_root, snapshot};
use e2e::wait::until;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn tell_gateway(supervisor: &Supervisor, path: &str) {
    let _ = http::raw(
        supervisor.setup.gateway,
        format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes(),
    );
}

fn gateway_pid(supervisor: &Supervisor) -> i64 {
    supervisor.status()["gateway"]["pid"]
        .as_i64()
        .expect("the gateway runs")
}

fn kill_gateway(supervisor: &Supervisor, signal: i32) {
    let pid = i32::try_from(gateway_pid(supervisor)).expect("pids fit");
    let status = std::process::Command::new("kill")
        .args([format!("-{signal}"), pid.to_string()])
        .status();
    assert!(status.expect("kill runs").success());
}

/// Waits for a line with both of these; the log may be read later than all else.
fn until_logged(supervisor: &Supervisor, message: &str, part: &str) {
    until(&format!("a line of {message} with {part}"), || {
        let log = supervisor.log();
        let mut lines = log.lines().filter(|line| line.contains(message));
        lines.any(|line| line.contains(part))
    });
}

/// By a process of its own, for the reason that `place` has.
fn write_script(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    fs::write(&draft, text).expect("can write");
    let installed = std::process::Command::new("install")
        .args(["-m", "755"])
        .args([&draft, path])
        .status();
    assert!(installed.is_ok_and(|status| status.success()));
}

// Boot

#[test]
fn the_api_answers_while_the_restore_runs_and_the_gateway_starts_only_after_it() {
    let setup = Setup::new();
    setup.agent(
        "restore",
        &json!([{ "exit": 0, "gate": "go", "answer": {
        "snapshot": "snapshot-0", "time": "2026-11-21T00:00:00.000Z", "unchanged": false } }]),
    );
    let supervisor = setup.start();
    until("the restore", || {
        supervisor.setup.agent_calls("restore").len() == 1
    });
    let status = supervisor.status();
    assert_eq!(status["gateway"]["status"], "restoring");
    assert_eq!(status["restore"]["status"], "running");
    assert_eq!(status["backup"]["status"], "disabled");
    assert!(supervisor.setup.starts().is_empty());

    supervisor.setup.open_gate("go");
    supervisor.until_running(1);
    let status = supervisor.status();
    assert_eq!(
        status["restore"],
        json!({ "status": "done", "snapshot": "snapshot-0", "error": null, "progress": null })
    );
    assert_eq!(status["lastBackup"], "2026-11-21T00:00:00.000Z");
    assert_eq!(status["backup"]["status"], "idle");
}

#[test]
fn an_empty_store_starts_fresh_with_backups_on() {
    let supervisor = Setup::new().start();
    supervisor.until_running(1);
    let status = supervisor.status();
    assert_eq!(
        status["restore"],
        json!({ "status": "empty", "snapshot": null, "error": null, "progress": null })
    );
    assert_eq!(status["backup"]["status"], "idle");
}

#[test]
fn the_version_of_the_gateway_is_known_once_it_runs() {
    let supervisor = Setup::new().start();
    supervisor.until_running(1);
    until("the version", || {
        supervisor.status()["version"]["openclaw"] == "2026.9.6-fake"
    });
}

#[test]
fn readiness_is_what_the_gateway_says_not_an_open_port() {
    for startup in ["starting", "html", "draining"] {
        let setup = Setup::new();
        setup.behave(&json!({ "startup": startup }));
        let supervisor = setup.start();
        until("the start", || supervisor.setup.starts().len() == 1);
        until("its port", || {
            std::net::TcpStream::connect(supervisor.setup.gateway).is_ok()
        });
        assert_eq!(supervisor.status()["gateway"]["status"], "starting");
    }
}

// Isolation

#[test]
fn the_gateway_starts_clean_whatever_the_supervisor_was_started_with() {
    let setup = Setup::new()
        .with("RUNTIME_GATEWAY_TOKEN", "gateway-token")
        .with("RUNTIME_MADE_UP", "secret")
        .with("ANTHROPIC_API_KEY", "key")
        .with("HOME", "/nowhere")
        .with("INVOCATION_ID", "1")
        .with("OPENCLAW_NO_RESPAWN", "1")
        .with("OPENCLAW_LOG_LEVEL", "debug")
        .with("RUNTIME_GATEWAY_LIMITS", "nofile=99");
    // A descriptor that survives exec, and an ignored signal, as a careless parent leaves them.
    let leak = fs::File::open("/dev/null").expect("is there");
    fcntl(&leak, FcntlArg::F_SETFD(FdFlag::empty())).expect("is our descriptor");
    let script = "trap '' HUP USR1 QUIT; exec \"$0\" \"$@\"";
    let program = setup.program_below(&["/bin/sh", "-c", script]);
    let supervisor = setup.start_as(program);
    let own = fs::read_link(format!(
        "/proc/{}/fd/{}",
        supervisor.pid(),
        leak.as_raw_fd()
    ));
    // Only root may look: the supervisor hides itself from its own user.
    let is_leaked = own.is_ok() || !nix::unistd::geteuid().is_root();
    assert!(is_leaked, "the leak is meant to reach the supervisor");

    let found = supervisor.until_running(1);
    let environment = found["environment"].as_object().expect("has one");
    let runtime = environment.keys().find(|name| name.starts_with("RUNTIME_"));
    assert_eq!(runtime, None);
    let root = supervisor.setup.root().display().to_string();
    assert_eq!(environment["HOME"], root.as_str());
    assert_eq!(environment["ANTHROPIC_API_KEY"], "key");
    assert_eq!(environment["OPENCLAW_LOG_LEVEL"], "debug");
    assert_eq!(environment["OPENCLAW_SUPERVISOR_MODE"], "external");
    assert_eq!(environment["OPENCLAW_GATEWAY_TOKEN"], "gateway-token");
    assert!(!environment.contains_key("INVOCATION_ID"));
    assert!(!environment.contains_key("OPENCLAW_NO_RESPAWN"));
    assert_eq!(found["folder"], root.as_str());
    assert_eq!(found["session"], found["pid"]);
    assert_eq!(found["descriptors"], json!([0, 1, 2]));
    assert_eq!(found["blocked"], "0000000000000000");
    let ignored = found["ignored"].as_str().expect("is known");
    let ignored = u64::from_str_radix(ignored, 16).expect("is a mask");
    // The fake's own runtime ignores SIGPIPE (13) before it can look; 32 and 33 are the C library's, for its threads.
    let not_ours = [13, 32, 33]
        .iter()
        .fold(0, |mask, signal| mask | 1 << (signal - 1));
    assert_eq!(ignored & !not_ours, 0, "{ignored:x}");
    assert_eq!(found["noNewPrivileges"], "1");
    let files: Vec<&str> = found["files"]
        .as_str()
        .expect("is known")
        .split_whitespace()
        .collect();
    assert_eq!(&files[3..5], ["99", "99"]);
}

#[test]
fn the_gateway_is_another_user_who_cannot_look_into_the_supervisor() {
    if !is_root() {
        return;
    }
    let supervisor = Setup::new()
        .with("RUNTIME_GATEWAY_USER", "64101:64102")
        .start();
    let found = supervisor.until_running(1);
    assert_eq!(found["uid"], "64101\t64101\t64101\t64101");
    assert_eq!(found["gid"], "64102\t64102\t64102\t64102");
    assert_eq!(found["groups"], "64102");
    assert_eq!(found["canReadSupervisor"], false);
    let root = fs::metadata(supervisor.setup.root()).expect("was made");
    assert_eq!(
        (root.uid(), root.gid(), root.mode() & 0o777),
        (64101, 64102, 0o700)
    );
}

#[test]
fn a_gateway_of_the_same_user_cannot_look_into_the_supervisor_either() {
    if !is_root() {
        return;
    }
    // As when a person runs it: nobody is root. The folders are the test's, so they are given away first.
    let setup = Setup::new()
        .with("RUNTIME_ROOT", "/tmp")
        .with("RUNTIME_STATE", "/var/lib/none");
    let mut program = setup.program();
    program.uid(64103).gid(64103);
    for name in ["bin", "fake"] {
        std::os::unix::fs::chown(setup.folder.path().join(name), Some(64103), None)
            .expect("are root");
    }
    let supervisor = setup.start_as(program);
    let found = supervisor.until_running(1);
    assert_eq!(found["uid"], "64103\t64103\t64103\t64103");
    assert_eq!(found["canReadSupervisor"], false);
}

#[test]
fn the_agent_sees_the_runtimes_settings_and_no_token() {
    let setup = Setup::new()
        .with("RUNTIME_GATEWAY_TOKEN", "gateway-token")
        .with("RUNTIME_BOOT_ID", "from-outside")
        .with("RUNTIME_MAX_PAUSE", "1s")
        .with("ANTHROPIC_API_KEY", "key");
    let supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    let restore = supervisor.setup.agent_calls("restore").remove(0);
    let backup = supervisor.setup.agent_calls("backup").remove(0);
    assert_eq!(restore["arguments"], json!(["restore", "--json"]));
    assert_eq!(
        backup["arguments"],
        json!(["backup", "--confirm", "--json"])
    );
    let environment = restore["environment"].as_object().expect("has one");
    assert!(
        environment.keys().all(|name| name.starts_with("RUNTIME_")),
        "{environment:?}"
    );
    for name in ["RUNTIME_SERVICE_TOKEN", "RUNTIME_GATEWAY_TOKEN"] {
        assert!(!environment.contains_key(name));
    }
    assert_eq!(environment["RUNTIME_MAX_PAUSE"], "1s");
    let boot = environment["RUNTIME_BOOT_ID"].as_str().expect("is set");
    assert!(
        boot.len() == 32 && boot.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{boot}"
    );
    assert_eq!(backup["environment"]["RUNTIME_BOOT_ID"], boot);
}

// Restart policy

#[test]
fn a_crash_loop_backs_off_and_ends_when_the_cause_does() {
    let setup = Setup::new();
    setup.behave(&json!({ "exit": 3 }));
    let supervisor = setup.start();
    until("three starts", || supervisor.setup.starts().len() >= 3);
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 3);
    assert_eq!(status["gateway"]["lastExit"]["signal"], Value::Null);
    assert_eq!(status["gateway"]["pid"], Value::Null);
    supervisor.setup.behave(&json!({}));
    let before = supervisor.setup.starts().len();
    supervisor.until_running(before + 1);
    let starts = supervisor.setup.starts().len();
    assert_eq!(supervisor.status()["gateway"]["restarts"], starts - 1);
}

#[test]
fn exit_78_is_failed_and_not_tried_again_until_asked() {
    let setup = Setup::new();
    setup.behave(&json!({ "exit": 78 }));
    let supervisor = setup.start();
    let status = supervisor.until_gateway("failed");
    assert_eq!(status["gateway"]["lastExit"]["code"], 78);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    until("the second try", || supervisor.setup.starts().len() == 2);
    supervisor.until_gateway("failed");
    supervisor.setup.behave(&json!({}));
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(3);
}

#[test]
fn a_clean_exit_of_a_ready_gateway_starts_it_again_at_once() {
    let supervisor = Setup::new().start();
    supervisor.until_running(1);
    // Thrice, which a backoff would make slower and slower.
    for starts in 2..5 {
        tell_gateway(&supervisor, "/exit/0");
        supervisor.until_running(starts);
        assert_eq!(supervisor.status()["gateway"]["lastExit"]["code"], 0);
    }
    assert!(!supervisor.log().contains("\"backoff\""));
}

#[test]
fn a_clean_exit_before_readiness_is_a_crash() {
    let setup = Setup::new();
    setup.behave(&json!({ "exit": 0 }));
    let supervisor = setup.start();
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 0);
}

#[test]
fn a_signal_that_killed_the_gateway_is_reported_by_name() {
    let supervisor = Setup::new().start();
    // 40 is a real-time signal, which has no name.
    for (starts, (number, name)) in [(9, "SIGKILL"), (6, "SIGABRT"), (40, "SIG40")]
        .iter()
        .enumerate()
    {
        supervisor.until_running(starts + 1);
        kill_gateway(&supervisor, *number);
        supervisor.until_running(starts + 2);
        let exit = &supervisor.status()["gateway"]["lastExit"];
        assert_eq!(
            (&exit["code"], &exit["signal"]),
            (&Value::Null, &json!(name))
        );
    }
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_is_no_program_126() {
    let setup = Setup::new().command(&["no-such-command"]);
    let supervisor = setup.start();
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 127);

    let supervisor = Setup::new().command(&["/etc/passwd"]).start();
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 126);
}

#[test]
fn a_gateway_that_never_gets_ready_is_stopped_and_counts_as_crashed() {
    let setup = Setup::new().with("RUNTIME_STARTUP_TIMEOUT", "300ms");
    setup.behave(&json!({ "startup": "starting" }));
    let supervisor = setup.start();
    until("the second start", || supervisor.setup.starts().len() >= 2);
    let first = supervisor.setup.starts()[0]["pid"]
        .as_i64()
        .expect("is a pid");
    assert!(!is_alive(first));
    assert_eq!(
        supervisor.status()["gateway"]["lastExit"]["signal"],
        "SIGTERM"
    );
}

// Stopping

#[test]
fn a_gateway_deaf_to_sigterm_is_killed_after_its_grace() {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "200ms");
    setup.behave(&json!({ "deaf": true }));
    let supervisor = setup.start();
    let first = supervisor.until_running(1)["pid"]
        .as_i64()
        .expect("is a pid");
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert!(!is_alive(first));
    assert_eq!(
        supervisor.status()["gateway"]["lastExit"]["signal"],
        "SIGKILL"
    );
}

fn nothing_outlives_a_restart(setup: Setup) {
    setup.behave(&json!({ "helpers": 3, "deaf": true }));
    let mut supervisor = setup.with("RUNTIME_STOP_GRACE", "200ms").start();
    let mut gone = Vec::new();
    for (starts, stop) in [(1, "request"), (2, "death"), (3, "shutdown")] {
        let found = supervisor.until_running(starts);
        let helpers = found["helpers"].as_array().expect("is a list").clone();
        assert_eq!(helpers.len(), 3);
        let helpers = helpers.iter().filter_map(Value::as_i64);
        assert!(helpers.clone().all(is_alive));
        gone.extend(helpers);
        match stop {
            "request" => assert_eq!(supervisor.post("/v1/restart").status, 202),
            "death" => kill_gateway(&supervisor, 9),
            _ => assert_eq!(supervisor.stop(), Some(0)),
        }
        if stop != "shutdown" {
            supervisor.until_running(starts + 1);
        }
        let left: Vec<&i64> = gone.iter().filter(|pid| is_alive(**pid)).collect();
        assert!(left.is_empty(), "after the {stop}: {left:?}");
    }
}

#[test]
fn no_process_of_the_gateway_outlives_it_when_found_by_descent() {
    nothing_outlives_a_restart(Setup::new());
}

#[test]
fn no_process_of_the_gateway_outlives_it_when_found_by_user() {
    if is_root() {
        nothing_outlives_a_restart(Setup::new().with("RUNTIME_GATEWAY_USER", "64104"));
    }
}

#[test]
fn orphans_are_reaped() {
    let setup = Setup::new();
    setup.behave(&json!({ "orphans": true }));
    let supervisor = setup.start();
    supervisor.until_running(1);
    until("the gateway to be the only child", || {
        children(supervisor.pid().as_raw()).len() == 1
    });
}

#[test]
fn a_gateway_that_takes_requests_is_asked_with_a_budget_instead_of_signalled() {
    let setup = Setup::new();
    setup.behave(&json!({ "deaf": true }));
    let mut supervisor = setup.start();
    let pid = supervisor.until_running(1)["pid"].clone();
    let uid = nix::unistd::geteuid();
    let folder = supervisor
        .setup
        .root()
        .join(format!(".openclaw/tmp/openclaw-{uid}"));
    fs::create_dir_all(&folder).expect("can make folders");
    let lock = json!({ "pid": pid, "ownerId": "owner-1" });
    fs::write(folder.join("gateway.state.lock"), lock.to_string()).expect("can write");
    // It is deaf to SIGTERM and its grace is long: only the request can end it.
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    let asked = fs::read_to_string(supervisor.setup.fake().join("asked.jsonl")).expect("was asked");
    let asked: Value = serde_json::from_str(asked.lines().next().expect("once")).expect("is JSON");
    assert_eq!(asked["target"]["pid"], pid);
    assert_eq!(asked["target"]["ownerId"], "owner-1");
    assert_eq!(asked["target"]["port"], supervisor.setup.gateway.port());
    assert_eq!(
        asked["restartIntent"],
        json!({ "force": true, "drainBudgetMs": 13_333 })
    );
    assert_eq!(supervisor.status()["gateway"]["lastExit"]["code"], 0);
    supervisor.signal(Signal::SIGTERM);
    supervisor.signal(Signal::SIGINT);
    supervisor.wait();
}

// Restore failures

#[test]
fn after_a_failed_restore_nothing_starts_and_nothing_is_backed_up_until_one_succeeds() {
    let setup = Setup::new();
    setup.agent("restore", &failure(75, "store_unavailable"));
    let supervisor = setup.start();
    until("the failure", || {
        supervisor.status()["restore"]["status"] == "failed"
    });
    let status = supervisor.status();
    assert_eq!(status["gateway"]["status"], "restoring");
    assert_eq!(
        status["restore"]["error"],
        "the fake says store_unavailable"
    );
    assert_eq!(status["backup"]["status"], "disabled");
    let refused = supervisor.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (409, "backup_disabled"));

    supervisor.setup.agent("restore", &snapshot("snapshot-0"));
    // A request tries again at once.
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(1);
    assert_eq!(
        supervisor.status()["restore"],
        json!({ "status": "done", "snapshot": "snapshot-0", "error": null, "progress": null })
    );
    assert!(supervisor.setup.agent_calls("backup").is_empty());
    assert_eq!(supervisor.post("/v1/backup").status, 200);
}

#[test]
fn a_failed_restore_is_tried_again_by_itself() {
    let setup = Setup::new();
    let mut steps = failure(11, "damaged");
    let good = snapshot("snapshot-0")
        .as_array()
        .expect("is a list")
        .clone();
    steps.as_array_mut().expect("is a list").extend(good);
    setup.agent("restore", &steps);
    let supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 2);
}

#[test]
fn told_to_start_after_a_failed_restore_it_does_and_backs_up_to_a_fork() {
    let setup = Setup::new().with("RUNTIME_ON_RESTORE_FAILURE", "start");
    setup.agent("restore", &failure(11, "damaged"));
    let mut supervisor = setup.start();
    supervisor.until_running(1);
    let status = supervisor.status();
    assert_eq!(status["restore"]["status"], "failed");
    assert_eq!(status["restore"]["error"], "the fake says damaged");
    assert_eq!(status["backup"]["fork"], true, "before the first one");
    let answer = supervisor.post("/v1/backup");
    // Whatever the agent says: it was told to make one.
    assert_eq!(
        (answer.status, &answer.body["data"]["fork"]),
        (200, &json!(true))
    );
    let call = supervisor.setup.agent_calls("backup").remove(0);
    assert_eq!(
        call["arguments"],
        json!(["backup", "--fork", "--confirm", "--json"])
    );
    until_logged(&supervisor, "\"backed up\"", "\"fork\":true");
    assert_eq!(supervisor.status()["backup"]["fork"], true);
    assert_eq!(supervisor.stop(), Some(0));
    assert_final(
        &supervisor,
        "final snapshot not in the head",
        "it is a fork",
    );
}

#[test]
fn a_shutdown_does_not_wait_for_a_restore() {
    let setup = Setup::new();
    setup.agent("restore", &json!([{ "gate": "never" }]));
    let mut supervisor = setup.start();
    until("the restore", || {
        supervisor.setup.agent_calls("restore").len() == 1
    });
    let agent = supervisor.setup.agent_calls("restore")[0]["pid"]
        .as_i64()
        .expect("is a pid");
    assert_eq!(supervisor.stop(), Some(0));
    assert!(!is_alive(agent));
    assert!(supervisor.setup.agent_calls("backup").is_empty());
}

#[test]
fn the_prepare_step_runs_as_the_gateway_would_before_its_first_start_only() {
    let setup = Setup::new();
    let script = setup.fake().join("prepare");
    write_script(&script, "#!/bin/sh\nenv > \"$HOME/prepared.$$\"\n");
    let supervisor = setup
        .with("RUNTIME_GATEWAY_PREPARE", script.to_str().expect("is text"))
        .start();
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    let prepared: Vec<_> = fs::read_dir(supervisor.setup.root())
        .expect("was made")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().contains("prepared."))
        .collect();
    assert_eq!(prepared.len(), 1);
    let environment = fs::read_to_string(&prepared[0]).expect("is there");
    assert!(environment.contains("OPENCLAW_SUPERVISOR_MODE=external"));
    assert!(!environment.contains("RUNTIME_"));
}

#[test]
fn a_prepare_step_that_fails_is_a_failed_start() {
    let setup = Setup::new();
    let script = setup.fake().join("prepare");
    write_script(&script, "#!/bin/sh\nexit 5\n");
    let supervisor = setup
        .with("RUNTIME_GATEWAY_PREPARE", script.to_str().expect("is text"))
        .start();
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 5);
    assert!(supervisor.setup.starts().is_empty());
    write_script(&script, "#!/bin/sh\nexit 0\n");
    supervisor.until_running(1);
}

// Backups

#[test]
fn backups_run_on_schedule() {
    let supervisor = Setup::new().with("RUNTIME_BACKUP_INTERVAL", "1s").start();
    supervisor.until_running(1);
    assert!(supervisor.status()["backup"]["nextAt"].is_string());
    until("two backups", || {
        supervisor.setup.agent_calls("backup").len() >= 2
    });
    let status = supervisor.status();
    assert_eq!(status["lastBackup"], "2026-11-22T09:00:45.000Z");
    assert_eq!(status["backup"]["snapshot"], "snapshot-1");
    // Nobody asked for it.
    let call = supervisor.setup.agent_calls("backup").remove(0);
    assert_eq!(call["arguments"], json!(["backup", "--json"]));
}

#[test]
fn a_fence_ends_the_schedule_but_not_the_gateway() {
    let setup = Setup::new().with("RUNTIME_BACKUP_INTERVAL", "1s");
    setup.agent("backup", &failure(12, "fenced"));
    let mut supervisor = setup.start();
    supervisor.until_running(1);
    until("the fence", || {
        supervisor.status()["backup"]["status"] == "fenced"
    });
    let status = supervisor.status();
    assert_eq!(status["gateway"]["status"], "running");
    assert_eq!(status["backup"]["nextAt"], Value::Null);
    assert_eq!(status["backup"]["lastError"], "the fake says fenced");
    let refused = supervisor.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (409, "fenced"));
    // Not at the shutdown either, which is a clean one, but what was written since is lost, and that is said.
    assert_eq!(supervisor.stop(), Some(0));
    assert_final(
        &supervisor,
        "final snapshot lost",
        "another instance holds the head",
    );
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 1);
}

#[test]
fn an_agent_that_hangs_past_its_bound_is_stopped() {
    let setup = Setup::new().with("RUNTIME_BACKUP_TIMEOUT", "1ms");
    setup.agent("backup", &json!([{ "gate": "never" }]));
    let supervisor = setup.start();
    supervisor.until_running(1);
    let answer = supervisor.post("/v1/backup");
    assert_eq!((answer.status, answer.code()), (504, "timeout"));
    let agent = supervisor.setup.agent_calls("backup")[0]["pid"].as_i64();
    assert!(!is_alive(agent.expect("is a pid")));
    // For the shutdown.
    supervisor.setup.open_gate("never");
}

// A root that is lost

/// A supervisor whose gateway runs, and whose next restore waits at the gate `restore`.
fn with_a_second_restore(setup: Setup) -> Supervisor {
    let mut steps = failure(10, "no_snapshot");
    let mut second = snapshot("snapshot-0");
    second[0]["gate"] = "restore".into();
    let steps_of = |steps: &mut Value| steps.as_array_mut().expect("is a list").pop();
    let second = steps_of(&mut second).expect("has a step");
    steps.as_array_mut().expect("is a list").push(second);
    setup.agent("restore", &steps);
    let supervisor = setup.start();
    supervisor.until_running(1);
    supervisor
}

/// Waits for the second restore; nothing is started and nothing saved before it is done.
fn until_restoring_again(supervisor: &Supervisor, reason: &str) {
    until("the second restore", || {
        supervisor.setup.agent_calls("restore").len() == 2
    });
    let status = supervisor.until_gateway("restoring");
    assert_eq!(status["gateway"]["pid"], Value::Null);
    assert_eq!(status["restore"]["status"], "running");
    let error = status["restore"]["error"].as_str().expect("is said");
    assert!(error.contains(reason), "{error} does not say {reason}");
    assert_eq!(status["backup"]["status"], "disabled");
    let refused = supervisor.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (409, "backup_disabled"));
    assert_eq!(supervisor.setup.starts().len(), 1);
    until_logged(
        supervisor,
        "the root is lost: stopping and restoring",
        "\"error\"",
    );
}

/// And what follows once it is.
fn assert_restored(supervisor: &Supervisor) {
    supervisor.setup.open_gate("restore");
    supervisor.until_running(2);
    let status = supervisor.status();
    assert_eq!(
        status["restore"],
        json!({ "status": "done", "snapshot": "snapshot-0", "error": null, "progress": null })
    );
    assert_eq!(status["backup"]["snapshot"], "snapshot-0");
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 2);
}

#[test]
fn a_root_that_is_not_the_restored_one_is_restored_and_not_started_on() {
    type Lose = fn(&Path);
    const GONE: &str = "it is not there";
    const ANOTHER: &str = "another directory is in its place";
    let cases: [(&str, Lose, &str); 6] = [
        (
            "removed",
            |root| fs::remove_dir_all(root).expect("can"),
            GONE,
        ),
        (
            "its parent removed",
            |root| fs::remove_dir_all(root.parent().expect("has one")).expect("can"),
            GONE,
        ),
        (
            "its parent is a file",
            |root| {
                let parent = root.parent().expect("has one");
                fs::remove_dir_all(parent).expect("can");
                fs::write(parent, "").expect("can");
            },
            GONE,
        ),
        (
            "a new one",
            |root| {
                fs::remove_dir_all(root).expect("can");
                fs::create_dir(root).expect("can");
            },
            ANOTHER,
        ),
        (
            "moved away and replaced",
            |root| {
                fs::rename(root, root.with_extension("old")).expect("can");
                fs::create_dir(root).expect("can");
            },
            ANOTHER,
        ),
        (
            "a file",
            |root| {
                fs::remove_dir_all(root).expect("can");
                fs::write(root, "").expect("can");
            },
            ANOTHER,
        ),
    ];
    for (name, lose, reason) in cases {
        for is_crash in [false, true] {
            let setup = Setup::new();
            let root = setup.folder.path().join("volumes/root");
            let setup = setup.with("RUNTIME_ROOT", &root.display().to_string());
            let supervisor = with_a_second_restore(setup);
            lose(&root);
            if is_crash {
                kill_gateway(&supervisor, 9);
            } else {
                assert_eq!(supervisor.post("/v1/restart").status, 202);
            }
            until_restoring_again(&supervisor, reason);
            // The restore makes a root again.
            let parent = root.parent().expect("has one");
            for file in [parent, root.as_path()] {
                if file.is_file() {
                    fs::remove_file(file).expect(name);
                }
            }
            assert_restored(&supervisor);
        }
    }
}

#[test]
fn a_backup_that_says_that_only_a_restore_helps_stops_the_gateway_and_restores() {
    for word in ["root_lost", "restore_unfinished"] {
        let setup = Setup::new();
        let script = setup.fake().join("prepare");
        write_script(&script, "#!/bin/sh\ntouch \"$HOME/../prepared.$$\"\n");
        let script = script.display().to_string();
        let supervisor = with_a_second_restore(setup.with("RUNTIME_GATEWAY_PREPARE", &script));
        let first = gateway_pid(&supervisor);
        supervisor.setup.agent("backup", &failure(74, word));
        let answer = supervisor.post("/v1/backup");
        assert_eq!((answer.status, answer.code()), (409, "backup_disabled"));
        assert_eq!(answer.body["error"], format!("the fake says {word}"));
        until_restoring_again(&supervisor, word);
        assert!(!is_alive(first));
        supervisor.setup.agent("backup", &snapshot("snapshot-1"));
        assert_restored(&supervisor);
        let folder = fs::read_dir(supervisor.setup.folder.path()).expect("is ours");
        let prepared = folder
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.starts_with("prepared."));
        assert_eq!(prepared.count(), 2, "before each first start");
    }
}

#[test]
fn a_root_that_cannot_be_looked_at_is_a_failed_start_and_no_restore() {
    let setup = Setup::new();
    let root = setup.root();
    let supervisor = with_a_second_restore(setup);
    // An error that is no absence.
    let aside = root.with_extension("aside");
    fs::rename(&root, &aside).expect("can move it");
    std::os::unix::fs::symlink(&root, &root).expect("can link");
    kill_gateway(&supervisor, 9);
    until("the failed start", || {
        supervisor.log().contains("\"cannot look at the root\"")
    });
    let status = supervisor.until_gateway("backoff");
    assert_eq!(status["gateway"]["lastExit"]["code"], 126);
    fs::remove_file(&root).expect("is the link");
    fs::rename(&aside, &root).expect("can move it back");
    supervisor.until_running(2);
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 1);
}

#[test]
fn a_restore_after_a_lost_root_waits_for_the_backup_under_way() {
    let setup = Setup::new();
    setup.agent(
        "backup",
        &json!([{ "gate": "backup", "answer": { "snapshot": "of-a-moment-ago" } }]),
    );
    let root = setup.root();
    let supervisor = with_a_second_restore(setup);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| supervisor.post("/v1/backup"));
        until("the backup", || {
            supervisor.setup.agent_calls("backup").len() == 1
        });
        fs::remove_dir_all(&root).expect("can remove it");
        kill_gateway(&supervisor, 9);
        let _ = supervisor.until_gateway("restoring");
        assert_eq!(supervisor.setup.agent_calls("restore").len(), 1);
        supervisor.setup.open_gate("backup");
        let answer = call.join().expect("answers");
        assert_eq!(answer.body["data"]["snapshot"], "of-a-moment-ago");
    });
    until_restoring_again(&supervisor, "it is not there");
    assert_restored(&supervisor);
}

#[test]
fn a_fenced_instance_that_loses_its_root_takes_nothing_over() {
    let setup = Setup::new();
    setup.agent("backup", &failure(12, "fenced"));
    let root = setup.root();
    let mut supervisor = with_a_second_restore(setup);
    assert_eq!(supervisor.post("/v1/backup").code(), "fenced");
    fs::remove_dir_all(root).expect("can remove it");
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    until("the refusal", || {
        supervisor.log().contains("\"restore refused\"")
    });
    let status = supervisor.until_gateway("restoring");
    assert_eq!(status["restore"]["status"], "failed");
    let error = status["restore"]["error"].as_str().expect("is said");
    assert!(error.contains("another instance holds the head"), "{error}");
    assert_eq!(status["backup"]["status"], "fenced");
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 1);
    assert_eq!(supervisor.setup.starts().len(), 1);
}

#[test]
fn a_fork_that_is_refused_does_not_stop_a_gateway_that_was_started_without_a_restore() {
    let setup = Setup::new().with("RUNTIME_ON_RESTORE_FAILURE", "start");
    setup.agent("restore", &failure(11, "damaged"));
    setup.agent("backup", &failure(74, "restore_unfinished"));
    let supervisor = setup.start();
    supervisor.until_running(1);
    let pid = gateway_pid(&supervisor);
    for _ in 0..2 {
        let answer = supervisor.post("/v1/backup");
        assert_eq!((answer.status, answer.code()), (409, "backup_disabled"));
    }
    assert_eq!(gateway_pid(&supervisor), pid);
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 1);
    // Its own root is looked at all the same.
    fs::remove_dir_all(supervisor.setup.root()).expect("can remove it");
    assert_eq!(supervisor.post("/v1/backup").status, 409);
    supervisor.until_running(2);
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 2);
}

#[test]
fn a_shutdown_before_the_lost_root_is_back_says_that_something_is_lost() {
    let setup = Setup::new();
    let root = setup.root();
    let mut supervisor = with_a_second_restore(setup);
    fs::remove_dir_all(root).expect("can remove it");
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    until_restoring_again(&supervisor, "it is not there");
    assert_eq!(supervisor.stop(), Some(1));
    assert_final(&supervisor, "final snapshot lost", "the root was lost");
    assert!(supervisor.setup.agent_calls("backup").is_empty());
}

#[test]
fn a_root_in_a_layer_of_an_image_stays_the_same_when_it_is_first_written_to() {
    let setup = Setup::new();
    let folder = setup.folder.path().join("layers");
    for name in ["lower/root", "upper", "work"] {
        fs::create_dir_all(folder.join(name)).expect("can make folders");
    }
    let layer = |name: &str| format!("{name}dir={}", folder.join(name).display());
    let layers = ["lower", "upper", "work"].map(layer).join(",");
    let merged = folder.join("merged");
    let arguments = ["-t", "overlay", "-o", &layers, "overlay"];
    let Some(_mounted) = e2e::mount::mount(&merged, &arguments) else {
        return;
    };
    let root = merged.join("root");
    let supervisor = setup
        .with("RUNTIME_ROOT", &root.display().to_string())
        .start();
    supervisor.until_running(1);
    fs::write(root.join("file"), "").expect("can write");
    assert!(folder.join("upper/root/file").exists(), "it is an overlay");
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert_eq!(supervisor.setup.agent_calls("restore").len(), 1);
}

// Prunes

/// A supervisor with a first backup made, whose prune waits at the gate `prune`.
fn pruning(setup: Setup) -> Supervisor {
    setup.agent(
        "prune",
        &json!([{ "gate": "prune", "answer": { "removed": [] } }]),
    );
    let supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    until("the prune", || {
        supervisor.setup.agent_calls("prune").len() == 1
    });
    supervisor
}

#[test]
fn a_prune_follows_the_first_backup_and_not_the_next_ones() {
    let setup = Setup::new().with("RUNTIME_RETENTION", "last=3");
    let supervisor = pruning(setup);
    assert_eq!(supervisor.status()["backup"]["status"], "idle");
    supervisor.setup.open_gate("prune");
    until("the end of the prune", || {
        supervisor.log().contains("\"pruned\"")
    });
    for backups in 2..4 {
        assert_eq!(supervisor.post("/v1/backup").status, 200);
        assert_eq!(supervisor.setup.agent_calls("backup").len(), backups);
    }
    let prunes = supervisor.setup.agent_calls("prune");
    assert_eq!(prunes.len(), 1);
    assert_eq!(prunes[0]["arguments"], json!(["prune", "--json"]));
    assert_eq!(prunes[0]["environment"]["RUNTIME_RETENTION"], "last=3");
}

#[test]
fn a_prune_that_fails_is_a_warning_and_no_error_of_the_backup() {
    let setup = Setup::new();
    setup.agent("prune", &failure(11, "damaged"));
    let supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    until("the warning", || {
        let log = supervisor.log();
        let mut lines = log.lines().filter(|line| line.contains("\"prune failed\""));
        lines.any(|line| line.contains("\"warn\"") && line.contains("the fake says damaged"))
    });
    let backup = &supervisor.status()["backup"];
    assert_eq!(
        (&backup["lastError"], &backup["status"]),
        (&Value::Null, &json!("idle"))
    );
    assert_eq!(supervisor.post("/v1/backup").status, 200);
}

#[test]
fn a_backup_that_is_asked_for_cuts_a_prune_short() {
    let supervisor = pruning(Setup::new());
    let prune = supervisor.setup.agent_calls("prune")[0]["pid"].as_i64();
    let answer = supervisor.post("/v1/backup");
    assert_eq!(answer.status, 200);
    assert!(!is_alive(prune.expect("is a pid")), "one agent at a time");
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 2);
}

#[test]
fn a_shutdown_cuts_a_prune_short_and_starts_none() {
    let mut supervisor = pruning(Setup::new());
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 2);
    assert_eq!(supervisor.setup.agent_calls("prune").len(), 1);
}

// Shutdown

#[test]
fn sigterm_stops_the_gateway_takes_the_final_snapshot_and_exits_0() {
    let setup = Setup::new();
    setup.agent(
        "backup",
        &json!([{ "gate": "go", "answer": { "snapshot": "last" } }]),
    );
    let mut supervisor = setup.start();
    let gateway = supervisor.until_running(1)["pid"]
        .as_i64()
        .expect("is a pid");
    supervisor.signal(Signal::SIGTERM);
    until("the final snapshot", || {
        supervisor.setup.agent_calls("backup").len() == 1
    });
    assert!(
        !is_alive(gateway),
        "the gateway still writes while the final snapshot is taken"
    );
    assert_eq!(supervisor.status()["backup"]["status"], "running");
    let late = supervisor.post("/v1/restart");
    assert_eq!((late.status, late.code()), (503, "gateway_unavailable"));
    supervisor.setup.open_gate("go");
    assert_eq!(supervisor.wait().code(), Some(0));
    let calls = supervisor.setup.agent_calls("backup");
    assert_eq!(calls.len(), 1);
    assert_eq!(
        calls[0]["arguments"],
        json!(["backup", "--confirm", "--json"])
    );
}

/// The error that says what became of the final snapshot, and why.
fn assert_final(supervisor: &Supervisor, message: &str, reason: &str) {
    until_logged(supervisor, message, reason);
    until_logged(supervisor, message, "\"error\"");
}

#[test]
fn a_final_snapshot_that_is_not_the_head_is_said_and_shows_in_the_exit_code() {
    let shrunk =
        json!([{ "answer": { "snapshot": "beside", "fork": true, "warning": "the tree shrank" } }]);
    for (exit, steps, message, reason) in [
        (
            1,
            failure(75, "store_unavailable"),
            "final snapshot lost",
            "the fake says store_unavailable",
        ),
        (
            1,
            failure(74, "root_lost"),
            "final snapshot lost",
            "the fake says root_lost",
        ),
        (
            1,
            failure(74, "restore_unfinished"),
            "final snapshot lost",
            "the fake says restore_unfinished",
        ),
        (
            0,
            failure(12, "fenced"),
            "final snapshot not in the head",
            "the fake says fenced",
        ),
        (0, shrunk, "final snapshot not in the head", "it is a fork"),
    ] {
        let setup = Setup::new();
        setup.agent("backup", &steps);
        let mut supervisor = setup.start();
        supervisor.until_running(1);
        fs::write(supervisor.setup.root().join("file"), "").expect("can write");
        assert_eq!(supervisor.stop(), Some(exit), "{reason}");
        assert_final(&supervisor, message, reason);
        assert_eq!(supervisor.setup.agent_calls("restore").len(), 1);
        assert_eq!(supervisor.setup.starts().len(), 1);
    }
}

#[test]
fn nothing_is_lost_when_there_was_nothing_to_save() {
    let setup = Setup::new().command(&["no-such-command"]);
    setup.agent("backup", &failure(75, "store_unavailable"));
    let mut supervisor = setup.start();
    supervisor.until_gateway("backoff");
    assert_eq!(supervisor.stop(), Some(0));
    assert!(!supervisor.log().contains("final snapshot"));
}

#[test]
fn each_further_sigterm_cuts_the_wait_that_is_current() {
    let setup = Setup::new();
    setup.behave(&json!({ "deaf": true }));
    setup.agent("backup", &json!([{ "gate": "never" }]));
    let mut supervisor = setup.start();
    let gateway = supervisor.until_running(1)["pid"]
        .as_i64()
        .expect("is a pid");
    supervisor.signal(Signal::SIGTERM);
    supervisor.until_gateway("stopping");
    assert!(is_alive(gateway), "its grace is long");
    supervisor.signal(Signal::SIGTERM);
    until("the final snapshot", || {
        supervisor.setup.agent_calls("backup").len() == 1
    });
    assert!(!is_alive(gateway));
    supervisor.signal(Signal::SIGINT);
    assert_eq!(supervisor.wait().code(), Some(1));
    assert_final(&supervisor, "final snapshot lost", "backup-agent");
}

#[test]
fn the_final_snapshot_follows_a_backup_that_began_before_the_gateway_stopped() {
    let setup = Setup::new();
    setup.agent("backup", &json!([{ "gate": "go", "answer": { "snapshot": "early" } }, { "answer": { "snapshot": "last" } }]));
    let mut supervisor = setup.start();
    supervisor.until_running(1);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| supervisor.post("/v1/backup"));
        until("the backup", || {
            supervisor.setup.agent_calls("backup").len() == 1
        });
        supervisor.signal(Signal::SIGTERM);
        supervisor.until_gateway("stopping");
        supervisor.setup.open_gate("go");
        let answer = call.join().expect("answers");
        assert_eq!(answer.body["data"]["snapshot"], "early");
    });
    assert_eq!(supervisor.wait().code(), Some(0));
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 2);
}

#[test]
fn sighup_changes_nothing() {
    let supervisor = Setup::new().start();
    let pid = supervisor.until_running(1)["pid"].clone();
    supervisor.signal(Signal::SIGHUP);
    assert_eq!(supervisor.status()["gateway"]["pid"], pid);
}

#[test]
fn a_supervisor_that_is_killed_takes_its_gateway_with_it() {
    let mut supervisor = Setup::new().start();
    let gateway = supervisor.until_running(1)["pid"]
        .as_i64()
        .expect("is a pid");
    supervisor.signal(Signal::SIGKILL);
    supervisor.wait();
    until("the end of the gateway", || !is_alive(gateway));
}

#[test]
fn healthcheck_asks_the_running_supervisor() {
    let setup = Setup::new();
    setup.behave(&json!({ "exit": 78 }));
    let supervisor = setup.start();
    supervisor.until_gateway("failed");
    let ask = |token: &str| {
        let program = supervisor.setup.folder.path().join("bin/supervisor");
        let mut command = std::process::Command::new(program);
        e2e::surroundings::empty(&mut command);
        command
            .arg("healthcheck")
            .env("RUNTIME_SERVICE_TOKEN", token)
            .env("RUNTIME_LISTEN", supervisor.api.to_string())
            .output()
            .expect("can be executed")
    };
    let failed = ask(TOKEN);
    assert_eq!(failed.status.code(), Some(1));
    let text = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(
        text.contains("the gateway has failed") && !text.contains(TOKEN),
        "{text}"
    );

    supervisor.setup.behave(&json!({}));
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    let well = ask(TOKEN);
    assert_eq!(
        (well.status.code(), &well.stdout[..]),
        (Some(0), &b"running\n"[..])
    );
    assert_eq!(
        ask("another-token-0123456789abcdefghij").status.code(),
        Some(1)
    );
}
