//! The supervisor over a long time: memory and descriptors stay as they are, and nothing wakes it without need.
//!
//! `E2E_SOAK=full` makes 10,000 requests and 1,000 restarts. Against the released programs (`E2E_BIN_DIR`) memory has its
//! budget too.

use std::fs;
use std::time::Duration;

use e2e::supervisor::{Setup, Supervisor};

/// README.md promises it.
const BUDGET: u64 = 1536;

/// What an allocator may still take once the first requests and restarts are over, in KiB.
const SLACK: u64 = 192;

fn field(supervisor: &Supervisor, name: &str) -> u64 {
    let status =
        fs::read_to_string(format!("/proc/{}/status", supervisor.pid())).expect("is there");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .expect("the kernel tells");
    let number = line.trim_start_matches(':').trim().trim_end_matches(" kB");
    number.parse().expect("is a number")
}

fn descriptors(supervisor: &Supervisor) -> Option<usize> {
    fs::read_dir(format!("/proc/{}/fd", supervisor.pid()))
        .ok()
        .map(Iterator::count)
}

fn live(supervisor: &Supervisor, requests: usize, restarts: usize) {
    for number in 0..requests {
        match number % 10 {
            0 => assert_eq!(supervisor.get("/v1/devices").status, 200),
            1 => assert_eq!(supervisor.get("/nothing").status, 404),
            _ => assert_eq!(supervisor.get("/v1/status").status, 200),
        }
    }
    for _ in 0..restarts {
        let starts = supervisor.setup.starts().len();
        assert_eq!(supervisor.post("/v1/restart").status, 202);
        supervisor.until_running(starts + 1);
    }
}

#[test]
fn memory_and_descriptors_stay_flat_over_requests_and_restarts() {
    let (requests, restarts) = match std::env::var("E2E_SOAK").as_deref() {
        Ok("full") => (10_000, 1_000),
        _ => (2_000, 20),
    };
    let setup = Setup::new();
    setup.behave(&serde_json::json!({ "stderr": "a line\n", "repeat": 300 }));
    let supervisor = setup.start();
    supervisor.until_running(1);
    live(&supervisor, 500, 5);
    let before = (field(&supervisor, "VmRSS"), descriptors(&supervisor));
    live(&supervisor, requests, restarts);
    let after = (field(&supervisor, "VmRSS"), descriptors(&supervisor));
    eprintln!("resident {} KiB, then {} KiB", before.0, after.0);
    assert!(after.0 <= before.0 + SLACK, "{before:?}, then {after:?}");
    // The last connections may still be on their way out.
    e2e::wait::until("the descriptors of before", || {
        descriptors(&supervisor) <= before.1
    });
    if std::env::var_os("E2E_BIN_DIR").is_some() {
        assert!(after.0 <= BUDGET, "{} KiB", after.0);
    }
}

#[test]
fn nothing_wakes_a_supervisor_that_has_nothing_to_do() {
    let supervisor = Setup::new().with("RUNTIME_BACKUP_INTERVAL", "5m").start();
    supervisor.until_running(1);
    // It is asked once the gateway is ready.
    e2e::wait::until("the version", || {
        supervisor.status()["version"]["openclaw"].is_string()
    });
    let switches = || field(&supervisor, "voluntary_ctxt_switches");
    // Until the last request is behind it: idle connections have ten seconds, but ours are closed.
    let mut last = switches();
    e2e::wait::slowly_until("rest", || {
        let now = switches();
        std::mem::replace(&mut last, now) == now
    });
    // Nothing happens, so there is nothing to wait for but time itself.
    std::thread::sleep(Duration::from_secs(10));
    let woken = switches() - last;
    assert!(woken <= 1, "woken {woken} times in 10 s");
}
