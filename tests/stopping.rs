//! Stop means gone: whatever the gateway left behind, and however it tries to stay.

use std::fs;

use e2e::supervisor::{Setup, Supervisor, is_alive, is_root};
use e2e::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Every living process that was started with this setup's folder, its gateway's and their copies.
fn of_gateway(setup: &Setup) -> Vec<i64> {
    let folder = setup.fake().display().to_string();
    let pids = fs::read_dir("/proc")
        .expect("is there")
        .filter_map(|entry| {
            let pid: i64 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let is_of_gateway = String::from_utf8_lossy(&words).starts_with(&folder);
            (is_of_gateway && is_alive(pid)).then_some(pid)
        });
    pids.collect()
}

/// Both ways of finding what belongs to the gateway: by descent, and by a user, who is this test's alone.
fn both_ways(user: &str, check: impl Fn(Setup)) {
    check(Setup::new());
    if is_root() {
        check(Setup::new().with("RUNTIME_GATEWAY_USER", user));
    }
}

/// Restarts, then ends; after each nothing but the new gateway, if any, is there.
fn leaves_nothing(setup: Setup, behaviour: &Value, at_least: usize) {
    let setup = setup.with("RUNTIME_STOP_GRACE", "100ms");
    setup.behave(behaviour);
    let mut supervisor = setup.start();
    let first = supervisor.until_running(1);
    until("what it leaves", || {
        of_gateway(&supervisor.setup).len() > at_least
    });

    supervisor.setup.behave(&json!({}));
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    // The port was held by all of them: a gateway that finds it taken exits 78.
    let second = supervisor.until_running(2);
    assert_eq!(
        of_gateway(&supervisor.setup),
        [second["pid"].as_i64().expect("is a pid")]
    );
    assert_eq!(first["environment"], second["environment"]);
    assert_eq!(supervisor.status()["gateway"]["restarts"], 1);

    supervisor.setup.behave(behaviour);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(3);
    until("what it leaves", || {
        of_gateway(&supervisor.setup).len() > at_least
    });
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(of_gateway(&supervisor.setup), [0; 0]);
}

#[test]
fn a_helper_that_holds_the_port_is_gone_before_the_next_start() {
    both_ways("64111", |setup| {
        leaves_nothing(setup, &json!({ "holder": true }), 1);
    });
}

#[test]
fn a_stopped_process_is_gone() {
    both_ways("64112", |setup| {
        leaves_nothing(setup, &json!({ "stopped": true, "deaf": true }), 1);
    });
}

#[test]
fn two_hundred_that_fork_while_being_killed_are_gone() {
    let behaviour = json!({ "rabbits": 200, "rabbitsRestMs": 50, "deaf": true });
    both_ways("64113", |setup| leaves_nothing(setup, &behaviour, 100));
}

#[test]
fn a_few_that_are_gone_before_anybody_has_looked_at_them_are_gone_for_good() {
    let behaviour = json!({ "rabbits": 3, "rabbitsRestMs": 0 });
    both_ways("64114", |setup| leaves_nothing(setup, &behaviour, 1));
}

#[test]
fn a_crash_leaves_nothing_either() {
    both_ways("64115", |setup| {
        setup.behave(&json!({ "rabbits": 3, "rabbitsRestMs": 1, "holder": true }));
        let supervisor = setup.start();
        supervisor.until_running(1);
        supervisor.setup.behave(&json!({}));
        let gateway = supervisor.status()["gateway"]["pid"].as_i64();
        let gateway = i32::try_from(gateway.expect("runs")).expect("pids fit");
        let gateway = nix::unistd::Pid::from_raw(gateway);
        nix::sys::signal::kill(gateway, Signal::SIGKILL).expect("is there");
        let second = supervisor.until_running(2);
        assert_eq!(
            of_gateway(&supervisor.setup),
            [second["pid"].as_i64().expect("is a pid")]
        );
        assert_eq!(supervisor.status()["gateway"]["restarts"], 1);
    });
}

// The grace

fn draining() -> Supervisor {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "10m");
    setup.behave(&json!({ "drains": true }));
    let supervisor = setup.start();
    supervisor.until_running(1);
    supervisor
}

#[test]
fn a_gateway_that_drains_within_a_long_grace_ends_by_itself() {
    let mut supervisor = draining();
    supervisor.signal(Signal::SIGTERM);
    let status = supervisor.until_gateway("stopping");
    assert!(is_alive(
        status["gateway"]["pid"].as_i64().expect("is a pid")
    ));
    fs::write(supervisor.setup.fake().join("drained"), "").expect("can write");
    assert_eq!(supervisor.wait().code(), Some(0));
    let log = supervisor.log();
    let mut exits = log.lines().filter(|line| line.contains("\"exited\""));
    assert!(exits.any(|line| line.contains("\"code\":0")), "{log}");
}

#[test]
fn a_second_sigterm_cuts_the_drain_of_a_restart_too() {
    let mut supervisor = draining();
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_gateway("stopping");
    supervisor.signal(Signal::SIGTERM);
    until("the shutdown", || {
        supervisor.log().contains("\"asked to stop\"")
    });
    assert_eq!(supervisor.status()["gateway"]["status"], "stopping");
    supervisor.signal(Signal::SIGTERM);
    assert_eq!(supervisor.wait().code(), Some(0));
    assert_eq!(of_gateway(&supervisor.setup), [0; 0]);
    assert_eq!(supervisor.setup.starts().len(), 1);
}
