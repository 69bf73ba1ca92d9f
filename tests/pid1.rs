//! What PID 1 owes its children and whoever reads their ends: adoption, every exit and signal told apart, a clean start.
//! As PID 1 of a namespace of its own, below another init, and as an ordinary process.

use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::supervisor::{Setup, Supervisor, children, is_alive, is_root};
use e2e::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Signals that kill, with their names. Those from 32 on have none.
const FATAL: [(i32, &str); 24] = [
    (1, "SIGHUP"),
    (2, "SIGINT"),
    (3, "SIGQUIT"),
    (4, "SIGILL"),
    (5, "SIGTRAP"),
    (6, "SIGABRT"),
    (7, "SIGBUS"),
    (8, "SIGFPE"),
    (9, "SIGKILL"),
    (10, "SIGUSR1"),
    (11, "SIGSEGV"),
    (12, "SIGUSR2"),
    (13, "SIGPIPE"),
    (14, "SIGALRM"),
    (15, "SIGTERM"),
    (16, "SIGSTKFLT"),
    (24, "SIGXCPU"),
    (25, "SIGXFSZ"),
    (26, "SIGVTALRM"),
    (27, "SIGPROF"),
    (29, "SIGIO"),
    (30, "SIGPWR"),
    (31, "SIGSYS"),
    (32, "SIG32"),
];

const WARNING: &str = "neither PID 1 nor a subreaper";

/// A field of `/proc/PID/status`.
fn field(pid: i32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let mut fields = status.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(key, _)| *key == name)?;
    Some(value.trim().to_owned())
}

// Reaping

#[test]
fn a_hundred_thousand_orphans_leave_no_zombie_and_hide_no_exit() {
    let setup = Setup::new();
    setup.behave(&json!({ "endedOrphans": 100_000, "exit": 42 }));
    let supervisor = setup.start();
    until("the start", || supervisor.setup.starts().len() == 1);
    supervisor.setup.behave(&json!({}));
    // The exit comes amid the last thousand.
    supervisor.until_running(2);
    let last = supervisor.status()["gateway"]["lastExit"].take();
    assert_eq!((&last["code"], &last["signal"]), (&json!(42), &Value::Null));
    let gateway = supervisor.status()["gateway"]["pid"].take();
    until("the gateway to be the only child", || {
        json!(children(supervisor.pid().as_raw())) == json!([gateway])
    });
}

/// Leaves an orphan, whose pid it writes to a file, and goes on as the program that follows.
const LEAVE_ORPHAN: &str = "(sleep 300 & echo $! > \"$0.new\"; mv \"$0.new\" \"$0\"); exec \"$@\"";

fn orphan(file: &Path) -> i32 {
    until("the orphan", || file.exists());
    let pid = fs::read_to_string(file).expect("is there");
    pid.trim().parse().expect("is a pid")
}

#[test]
fn an_orphan_of_the_gateway_is_adopted_and_an_orphan_of_a_plain_process_is_not() {
    let setup = Setup::new();
    let file = setup.fake().join("orphan");
    let fake = setup.fake().join("fake-gateway");
    let (file_text, fake_text) = (file.display().to_string(), fake.display().to_string());
    let port = setup.gateway.port().to_string();
    let folder = setup.fake().display().to_string();
    let words = [
        "/bin/sh",
        "-c",
        LEAVE_ORPHAN,
        &file_text,
        &fake_text,
        &port,
        &folder,
    ];
    let mut supervisor = setup.command(&words).start();
    supervisor.until_running(1);
    let adopted = orphan(&file);
    let parent = field(adopted, "PPid");
    assert_eq!(parent, Some(supervisor.pid().to_string()));
    assert_eq!(supervisor.stop(), Some(0));
    assert!(!is_alive(adopted.into()), "it was the gateway's");

    // The same of a child of this process, which is no subreaper: the assertion above is able to fail.
    fs::remove_file(&file).expect("is there");
    let mut plain = Command::new("/bin/sh")
        .args(["-c", LEAVE_ORPHAN, &file_text, "sleep", "300"])
        .spawn()
        .expect("a shell runs");
    let lost = orphan(&file);
    let parent = field(lost, "PPid");
    kill(Pid::from_raw(lost), Signal::SIGKILL).expect("is there");
    plain.kill().expect("is our child");
    plain.wait().expect("is our child");
    assert!(parent.is_some());
    assert_ne!(parent, Some(std::process::id().to_string()));
}

// Ends

/// A gateway that does what a file says, and the file.
fn obedient() -> (Supervisor, std::path::PathBuf) {
    let setup = Setup::new();
    let order = setup.fake().join("order");
    fs::write(&order, "exit 0").expect("can write");
    let text = order.display().to_string();
    let script = "ulimit -c 0; eval \"$(cat \"$0\")\"; exit 99";
    let setup = setup.command(&["/bin/sh", "-c", script, &text]);
    (setup.start(), order)
}

fn give(supervisor: &Supervisor, order: &Path, text: &str) {
    let new = order.with_extension("new");
    fs::write(&new, text).expect("can write");
    fs::rename(new, order).expect("can rename");
    // Not to wait for ever longer.
    assert_eq!(supervisor.post("/v1/restart").status, 202);
}

#[test]
fn all_256_exit_codes_are_told_apart() {
    let (supervisor, order) = obedient();
    for code in (0..=255).rev() {
        give(&supervisor, &order, &format!("exit {code}"));
        until(&format!("exit {code}"), || {
            let exit = supervisor.status()["gateway"]["lastExit"].take();
            exit["code"] == code && exit["signal"].is_null()
        });
    }
}

#[test]
fn all_fatal_signals_are_told_apart() {
    let (supervisor, order) = obedient();
    let named = FATAL.map(|(number, name)| (number, name.to_owned()));
    let real_time = (33..=64).map(|number| (number, format!("SIG{number}")));
    for (number, name) in named.into_iter().chain(real_time) {
        give(&supervisor, &order, &format!("kill -{number} $$"));
        until(&name, || {
            let exit = supervisor.status()["gateway"]["lastExit"].take();
            exit["signal"] == name.as_str() && exit["code"].is_null() && exit["reason"].is_null()
        });
    }
}

// Starts

#[test]
fn the_gateways_signals_are_those_of_a_fresh_login_whatever_ours_were() {
    let setup = Setup::new();
    let found = setup.fake().join("status");
    // A program that changes nothing about signals before it looks.
    let text = found.display().to_string();
    let setup = setup.command(&["cp", "/proc/self/status", &text]);
    let careless = ["env", "--block-signal", "--ignore-signal"];
    let program = setup.program_below(&careless);
    let mut supervisor = setup.start_as(program);
    until("the status", || {
        fs::read_to_string(&found).is_ok_and(|text| text.contains("nonvoluntary"))
    });
    let status = fs::read_to_string(&found).expect("is there");
    let mut masks = Vec::new();
    for name in ["SigBlk", "SigIgn", "SigCgt", "ShdPnd"] {
        let line = status.lines().find(|line| line.starts_with(name));
        masks.push(line.expect("is there").split_whitespace().last());
    }
    assert_eq!(masks, [Some("0000000000000000"); 4], "{status}");
    // Ours took effect although they were blocked: SIGCHLD for this, SIGTERM for the end.
    supervisor.until_gateway("backoff");
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn the_careless_start_is_one() {
    // Without the supervisor in between: the test above is able to fail.
    let output = Command::new("env")
        .args(["--block-signal", "--ignore-signal"])
        .args(["cat", "/proc/self/status"])
        .output()
        .expect("env runs");
    let status = String::from_utf8_lossy(&output.stdout).into_owned();
    for name in ["SigBlk", "SigIgn"] {
        let line = status.lines().find(|line| line.starts_with(name));
        let mask = line.and_then(|line| line.split_whitespace().last());
        let mask = u64::from_str_radix(mask.expect("is there"), 16).expect("is a mask");
        assert!(mask.count_ones() > 50, "{status}");
    }
}

// Where it runs

#[test]
fn an_ordinary_process_makes_itself_a_subreaper_and_says_so() {
    let supervisor = Setup::new().start();
    supervisor.until_running(1);
    let log = supervisor.log();
    let mut lines = log.lines().filter(|line| line.contains(WARNING));
    assert!(lines.any(|line| line.contains("\"warn\"")), "{log}");
}

/// In a pid namespace of its own, below these words; `None` where that is not allowed.
fn in_namespace(setup: Setup, init: &[&str]) -> Option<Supervisor> {
    let unshare = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    if !is_root() {
        return None;
    }
    let tried = Command::new(unshare[0])
        .args(&unshare[1..])
        .arg("true")
        .output();
    if !tried.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: namespaces are not allowed here");
        return None;
    }
    let program = setup.program_below(&[&unshare, init].concat());
    Some(setup.start_as(program))
}

/// The process that is PID 1 in the namespace, by our own count.
fn init_of(supervisor: &Supervisor) -> i32 {
    children(supervisor.pid().as_raw())[0]
}

/// What it owes in every place: orphans reaped, helpers gone, the port free for the next one, a clean end.
fn does_its_work(supervisor: &mut Supervisor, keeper: i32) {
    supervisor.until_running(1);
    let gateway = children(keeper);
    kill(Pid::from_raw(keeper), None).expect("is there");
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert!(gateway.iter().all(|pid| !is_alive((*pid).into())));
    until("the gateway to be the only child", || {
        children(keeper).len() == 1
    });
    kill(Pid::from_raw(keeper), Signal::SIGTERM).expect("is there");
    assert_eq!(supervisor.wait().code(), Some(0));
}

fn busy() -> Setup {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "200ms");
    setup.behave(&json!({ "orphans": true, "helpers": 3, "deaf": true }));
    setup
}

#[test]
fn it_works_as_pid_1_of_a_namespace() {
    let Some(mut supervisor) = in_namespace(busy(), &[]) else {
        return;
    };
    let keeper = init_of(&supervisor);
    supervisor.until_running(1);
    let pids = field(keeper, "NSpid").expect("is there");
    assert!(pids.ends_with("\t1"), "{pids}");
    assert!(!supervisor.log().contains(WARNING));
    does_its_work(&mut supervisor, keeper);
}

#[test]
fn it_works_below_another_init() {
    // As under `docker run --init`: PID 1 is somebody else's.
    let init = ["/bin/sh", "-c", "\"$@\"; exit $?", "init"];
    let Some(mut supervisor) = in_namespace(busy(), &init) else {
        return;
    };
    supervisor.until_running(1);
    let init = init_of(&supervisor);
    let keeper = children(init)[0];
    let pids = field(keeper, "NSpid").expect("is there");
    assert!(!pids.ends_with("\t1"), "{pids}");
    assert!(supervisor.log().contains(WARNING));
    does_its_work(&mut supervisor, keeper);
}
