//! What people do by hand: verify, a look before a restore, the question at a terminal, limits, completions.

use std::fs;
use std::io::Write as _;
use std::process::{Command, Stdio};

use e2e::agent::{Host, Place};
use e2e::binaries::binary;
use e2e::on_every_store;
use e2e::surroundings::program;
use e2e::tree::{self, assert_same, describe};
use serde_json::Value;

on_every_store!(
    a_sound_store_is_found_sound,
    damage_is_named_with_the_paths_that_it_costs,
    a_missing_layer_costs_everything_and_hides_no_other_snapshot,
);

/// A host with two snapshots: one layer of some size, one of little.
fn host(place: &Place) -> (Host, [String; 2]) {
    let host = Host::new(place);
    for name in ["one", "two", "three"] {
        tree::write(&host.root, format!("large/{name}"), tree::noise(3, 3 << 20));
    }
    tree::write(&host.root, "small", "before");
    let first = host.backup();
    tree::write(&host.root, "small", "after");
    let second = host.backup();
    (host, [first, second])
}

fn a_sound_store_is_found_sound(place: &Place) {
    let (host, _) = host(place);
    for arguments in [
        &["verify"][..],
        &["verify", "--deep"],
        &["verify", "all"],
        &["verify", "all", "--deep"],
    ] {
        let answer = host.json(arguments);
        assert_eq!(answer["damaged"], Value::Object(serde_json::Map::new()));
        assert_eq!(answer["layers"], 2);
        let bytes = answer["bytesRead"].as_u64().expect("it is a number");
        assert!(bytes > 9 << 20, "{bytes}");
    }
    let said = host.run(&["verify"]).expect(0).stdout;
    assert!(said.ends_with("all sound\n"), "{said}");
}

fn damage_is_named_with_the_paths_that_it_costs(place: &Place) {
    let (host, [first, _]) = host(place);
    let objects = place.objects();
    let record: Value =
        serde_json::from_slice(&objects[&format!("snapshots/{first}.json")]).expect("it is JSON");
    let layer = record["layers"][0]["id"].as_str().expect("it has an id");
    let key = format!("layers/{layer}.tar.zst");
    let mut bytes = objects[&key].clone();
    // In the first of the frames, where the first of the large files begins.
    bytes[1 << 20] ^= 1;
    place.put(&key, &bytes);
    for deep in [
        &["verify", "all", "--json"][..],
        &["verify", "all", "--deep", "--json"],
    ] {
        let answer = host.run(deep).expect(11).json();
        assert_eq!(answer["code"], "damaged");
        let error = answer["error"].as_str().expect("it is a sentence");
        assert!(error.contains(&key), "{error}");
        for snapshot in answer["snapshots"].as_array().expect("it is a list") {
            let paths: Vec<_> = snapshot["paths"]
                .as_array()
                .expect("it is a list")
                .iter()
                .filter_map(Value::as_str)
                .collect();
            assert!(paths.contains(&"large/one"), "{paths:?}");
            assert!(!paths.contains(&"large/two"), "another frame: {paths:?}");
        }
    }
    let said = host.run(&["verify"]).expect(11).stdout;
    assert!(said.contains("large/one"), "{said}");
}

fn a_missing_layer_costs_everything_and_hides_no_other_snapshot(place: &Place) {
    let (host, [first, second]) = host(place);
    let record: Value =
        serde_json::from_slice(&place.objects()[&format!("snapshots/{second}.json")])
            .expect("it is JSON");
    let layer = record["layers"][1]["id"].as_str().expect("it has an id");
    place.remove(&format!("layers/{layer}.tar.zst"));
    let answer = host.run(&["verify", "all", "--json"]).expect(11).json();
    for snapshot in answer["snapshots"].as_array().expect("it is a list") {
        let is_lost = snapshot["lostPaths"] != 0;
        assert_eq!(is_lost, snapshot["id"] == second.as_str(), "{snapshot}");
    }
    let _ = host.run(&["verify", &first]).expect(0);
}

#[test]
fn a_look_before_a_restore_says_what_it_would_change_and_changes_nothing() {
    let place = Place::memory();
    let (host, [first, _]) = host(&place);
    fs::remove_file(host.root.join("large/two")).expect("it is there");
    tree::write(&host.root, "new", "new");
    let before = describe(&host.root);
    let look = host.run(&["restore", &first, "--dry-run"]).expect(0);
    let lines: Vec<&str> = look.stdout.lines().collect();
    assert!(lines.contains(&"+ large/two"), "{lines:?}");
    assert!(lines.contains(&"- new"), "{lines:?}");
    assert!(lines.contains(&"~ small"), "{lines:?}");
    assert!(!lines.iter().any(|line| line.ends_with("large/one")));
    let answer = host.json(&["restore", &first, "--dry-run"]);
    let counts = ["added", "changed", "removed"].map(|name| answer[name].as_u64());
    // The root and the directory of the large files have other times, too.
    assert_eq!(counts, [Some(1), Some(3), Some(1)], "{answer}");
    assert_same(&before, &describe(&host.root));
}

/// Runs the agent at a terminal of its own (script(1)), where a person types `typed`.
fn at_a_terminal(host: &Host, arguments: &str, typed: &str) -> (i32, String) {
    let command = format!("{} {arguments}", binary("backup-agent").display());
    let agent = host.command::<&str>(&[]);
    let mut script = Command::new("script");
    script.env_clear().env("PATH", "/usr/bin:/bin");
    for (name, value) in agent.get_envs() {
        if let Some(value) = value {
            script.env(name, value);
        }
    }
    let mut running = script
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script(1) is there");
    let mut keyboard = running.stdin.take().expect("it is a pipe");
    keyboard.write_all(typed.as_bytes()).expect("it reads");
    let done = running.wait_with_output().expect("it ends");
    drop(keyboard);
    let screen = String::from_utf8_lossy(&done.stdout).into_owned();
    (done.status.code().expect("it was not killed"), screen)
}

#[test]
fn a_person_is_asked_before_the_root_is_replaced() {
    let place = Place::directory();
    let (host, [first, _]) = host(&place);
    let before = describe(&host.root);
    let (code, screen) = at_a_terminal(&host, &format!("restore {first}"), "n\n");
    assert_eq!(code, 1, "{screen}");
    assert!(screen.contains("This replaces everything in"), "{screen}");
    assert_same(&before, &describe(&host.root));
    let (code, screen) = at_a_terminal(&host, &format!("restore {first}"), "y\n");
    assert_eq!(code, 0, "{screen}");
    let small = fs::read(host.root.join("small")).expect("it is there");
    assert_eq!(small, b"before");
    let (code, screen) = at_a_terminal(&host, "restore latest --yes", "");
    assert_eq!(code, 0, "{screen}");
    assert!(!screen.contains("[y/N]"), "{screen}");
}

#[test]
fn a_limit_of_bandwidth_holds_both_ways() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "noise", tree::noise(1, 1 << 20));
    let slow = ["--bandwidth", "50000", "--timeout", "3s"];
    let _ = host.run(&[&["backup"], &slow[..]].concat()).expect(124);
    host.backup();
    let target = host.folder.path().join("target").display().to_string();
    let restore = ["restore", "--target", &target];
    let _ = host.run(&[&restore, &slow[..]].concat()).expect(124);
    let _ = host.run(&restore).expect(0);
}

#[test]
fn any_level_and_any_number_of_threads_bring_the_same_tree_back() {
    for effort in [["--level=1", "--jobs=1"], ["--level=9", "--jobs=5"]] {
        let place = Place::memory();
        let host = Host::new(&place);
        tree::make(&host.root);
        tree::write(&host.root, "many-frames", tree::noise(2, 30 << 20));
        let before = tree::kept(describe(&host.root));
        let _ = host.run(&[&["backup"], &effort[..]].concat()).expect(0);
        host.lose_everything();
        let _ = host.run(&["restore"]).expect(0);
        assert_same(&before, &describe(&host.root));
    }
}

#[test]
fn completions_are_printed_for_a_shell() {
    let said = program("backup-agent")
        .args(["completions", "bash"])
        .output()
        .expect("it runs");
    assert!(said.status.success());
    let script = String::from_utf8_lossy(&said.stdout);
    assert!(script.contains("complete -F"), "{script}");
}
