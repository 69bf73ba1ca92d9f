//! Snapshots of one instant while everything is written to at full speed, and nobody is ever left held.
//!
//! `E2E_INSTANTS` is the number of snapshots that are taken, 30 unless set; `E2E_KILLS` that of agents that are killed while
//! they hold the writers, 40 unless set.

use std::path::PathBuf;

use e2e::agent::{Host, Place, Running};
use e2e::ledger::{Ledger, check};
use e2e::openclaw::OpenClaw;
use e2e::supervisor::is_root;
use e2e::tree;
use e2e::wait::until;
use rustix::process::Signal;
use serde_json::Value;

/// The user whose processes are held: of each test its own, as they run side by side.
const USERS: [u32; 3] = [54_401, 54_402, 54_403];

/// Long enough for a busy machine.
const PAUSE: &str = "20s";

/// What is there besides, so that a walk takes its time.
const OTHER_FILES: usize = 400;

fn host(place: &Place, openclaw: &OpenClaw, uid: u32) -> (Host, Ledger) {
    let host = Host::new(place).with("RUNTIME_GATEWAY_USER", uid.to_string());
    for number in 0..OTHER_FILES {
        // Between the databases and the files in the order of the walk.
        tree::write(&host.root, format!("c/{number}"), "content");
    }
    let ledger = Ledger::start(openclaw, &host.root, uid);
    (host, ledger)
}

fn arguments(uid: u32, pause: &str) -> Vec<String> {
    [
        "backup",
        "--freeze-user",
        &uid.to_string(),
        "--max-pause",
        pause,
    ]
    .map(str::to_owned)
    .to_vec()
}

fn backup(host: &Host, uid: u32, pause: &str) -> Value {
    let arguments = arguments(uid, pause);
    host.json(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

fn restore(host: &Host, snapshot: &Value) -> PathBuf {
    let snapshot = snapshot.as_str().expect("a snapshot has an id");
    let target = host.folder.path().join(snapshot);
    let path = target.to_str().expect("it is UTF-8");
    let _ = host.json(&["restore", snapshot, "--target", path]);
    target
}

fn count(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |count| count.parse().expect("a number"))
}

#[test]
fn every_snapshot_is_of_one_instant_while_four_writers_keep_an_invariant() {
    if !is_root() {
        return;
    }
    let count = count("E2E_INSTANTS", 30);
    let openclaw = OpenClaw::install().expect("the gateway can be installed");
    let place = Place::directory();
    let (host, ledger) = host(&place, &openclaw, USERS[0]);
    let mut taken = Vec::new();
    for _ in 0..count {
        let answer = backup(&host, USERS[0], PAUSE);
        assert_eq!(answer["consistency"], "instant", "{answer}");
        assert!(answer["pauseMs"].as_u64() > Some(0), "{answer}");
        assert!(!ledger.is_held());
        ledger.go_on();
        taken.push(answer["snapshot"].clone());
    }
    drop(ledger);
    let copies: Vec<PathBuf> = taken.iter().map(|id| restore(&host, id)).collect();
    for (snapshot, problem) in taken.iter().zip(check(&openclaw, &copies)) {
        assert_eq!(problem, None, "{snapshot}");
    }
}

#[test]
fn without_a_pause_snapshots_break_the_invariant_and_do_not_claim_to_be_of_one_instant() {
    if !is_root() {
        return;
    }
    let openclaw = OpenClaw::install().expect("the gateway can be installed");
    let place = Place::directory();
    let (host, ledger) = host(&place, &openclaw, USERS[1]);
    let is_torn = (0..100).any(|_| {
        let answer = backup(&host, USERS[1], "0");
        assert_eq!(
            (&answer["consistency"], &answer["pauseMs"]),
            (&"per-file".into(), &Value::Null)
        );
        ledger.go_on();
        check(&openclaw, &[restore(&host, &answer["snapshot"])])[0].is_some()
    });
    assert!(
        is_torn,
        "the invariant cannot be broken, so it proves nothing"
    );
}

/// A backup that holds the writers.
fn in_the_pause(host: &Host, ledger: &Ledger, uid: u32, pause: &str) -> Option<Running> {
    let arguments = arguments(uid, pause);
    let mut running = host.start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    until(
        "the writers are held, or it was too short to be seen",
        || ledger.is_held() || !running.is_running(),
    );
    running.is_running().then_some(running)
}

#[test]
fn an_agent_that_is_killed_in_the_pause_leaves_nobody_held() {
    if !is_root() {
        return;
    }
    let openclaw = OpenClaw::install().expect("the gateway can be installed");
    let place = Place::directory();
    let (host, ledger) = host(&place, &openclaw, USERS[2]);
    let (mut kills, mut seed) = (0, 1_u64);
    let count = count("E2E_KILLS", 40);
    while kills < count {
        let Some(running) = in_the_pause(&host, &ledger, USERS[2], PAUSE) else {
            continue;
        };
        // Some of the pause is left, or a moment more than that.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        for _ in 0..seed >> 48 {
            std::hint::spin_loop();
        }
        running.signal(Signal::KILL);
        let _ = running.wait();
        until("everybody goes on", || !ledger.is_held());
        ledger.go_on();
        kills += 1;
    }
    let answer = backup(&host, USERS[2], PAUSE);
    assert_eq!(answer["consistency"], "instant", "{answer}");
    drop(ledger);
    let copy = restore(&host, &answer["snapshot"]);
    assert_eq!(check(&openclaw, &[copy]), [None]);
}
