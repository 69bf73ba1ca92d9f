//! What `backup` claims of its store: `unchanged` means that the store has the snapshot, whole, and that it is the newest. The
//! store is asked once an hour, and always with `--confirm`.

use std::collections::BTreeMap;

use e2e::agent::{Host, Outcome, PREFIX, Place, boot_id};
use e2e::history::assert_whole;
use e2e::on_every_store;
use e2e::past::{self, let_pass};
use e2e::s3::{Effect, Kind};
use e2e::tree::{self, assert_same, describe};
use serde_json::Value;

on_every_store!(
    whatever_a_store_has_lost_is_found_and_a_whole_snapshot_is_made,
    a_store_that_was_set_back_gets_a_snapshot_on_top_of_what_it_has,
    who_does_not_hold_the_head_never_says_unchanged,
    a_layer_that_is_missing_is_found_while_the_tree_changes_all_the_time,
);

const HOUR: i64 = 3600;
const CONFIRM: [&str; 2] = ["backup", "--confirm"];

/// A runtime's host with two snapshots of two layers.
fn host(place: &Place) -> Host {
    let host = Host::new(place).booted('a');
    tree::write(&host.root, "large", tree::noise(1, 200_000));
    tree::write(&host.root, "below/file", "one");
    host.backup();
    tree::write(&host.root, "below/file", "two");
    host.backup();
    assert_eq!(place.keys("layers/").len(), 2);
    host
}

fn is_unchanged(answer: &Value) -> bool {
    answer["unchanged"]
        .as_bool()
        .expect("a backup says whether anything changed")
}

/// The newest snapshot of the store is that of the tree: it verifies, and another host restores it.
fn assert_newest_is(place: &Place, host: &Host) {
    let snapshot = place.head()["snapshot"].clone();
    let snapshot = snapshot.as_str().expect("the head names one");
    let other = Host::new(place);
    let _ = other.run(&["verify", snapshot, "--deep"]).expect(0);
    assert_eq!(other.json(&["restore"])["snapshot"], snapshot);
    assert_same(&describe(&host.root), &describe(&other.root));
}

/// A way to lose something: its name, and the objects that are gone.
type Loss = (&'static str, fn(&Place) -> Vec<String>);

const LOST: [Loss; 6] = [
    ("everything", |place| place.keys("")),
    ("the head", |_| vec!["head.json".to_owned()]),
    ("the record of the head", |place| vec![record(place)]),
    ("all records", |place| place.keys("snapshots/")),
    ("the oldest layer", |place| {
        place.keys("layers/")[..1].to_vec()
    }),
    ("the newest layer", |place| {
        place.keys("layers/")[1..].to_vec()
    }),
];

/// The key of the record that the head names.
fn record(place: &Place) -> String {
    let id = place.head()["snapshot"].clone();
    format!("snapshots/{}.json", id.as_str().expect("it names one"))
}

fn whatever_a_store_has_lost_is_found_and_a_whole_snapshot_is_made(place: &Place) {
    let host = host(place);
    for (number, (what, lost)) in LOST.into_iter().enumerate() {
        for key in lost(place) {
            place.remove(&key);
        }
        // By the flag and by the hour.
        let arguments = if number % 2 == 0 {
            &CONFIRM[..]
        } else {
            let_pass(&host, HOUR);
            &CONFIRM[..1]
        };
        let answer = host.json(arguments);
        assert!(!is_unchanged(&answer), "{what}: {answer}");
        assert_eq!(place.head()["snapshot"], answer["snapshot"], "{what}");
        assert_eq!(answer["fork"], false, "{what}");
        assert_newest_is(place, &host);
        assert!(is_unchanged(&host.json(&CONFIRM)), "{what}");
        // Two layers again, and no more.
        for key in place.keys("") {
            place.remove(&key);
        }
        let _ = host.json(&CONFIRM);
        tree::write(&host.root, "below/file", format!("after {what}"));
        host.backup();
        assert_eq!(place.keys("layers/").len(), 2, "{what}");
    }
}

fn a_store_that_was_set_back_gets_a_snapshot_on_top_of_what_it_has(place: &Place) {
    let host = Host::new(place).booted('a');
    tree::write(&host.root, "file", "one");
    host.backup();
    let before = place.objects();
    tree::write(&host.root, "file", "two");
    let lost = host.backup();
    for key in place.keys("") {
        place.remove(&key);
    }
    for (key, bytes) in &before {
        place.put(key, bytes);
    }
    let answer = host.json(&CONFIRM);
    assert!(!is_unchanged(&answer), "{answer}");
    assert_ne!(answer["snapshot"], lost);
    assert_eq!(place.head()["sequence"], 2);
    assert_newest_is(place, &host);
    assert_eq!(assert_whole(place).records.len(), 2);
}

fn who_does_not_hold_the_head_never_says_unchanged(place: &Place) {
    for arguments in [&CONFIRM[..], &CONFIRM[..1]] {
        let first = host(place);
        let second = Host::new(place).booted('b');
        let _ = second.json(&["restore"]);
        if arguments == &CONFIRM[..1] {
            let_pass(&first, HOUR);
        }
        let outcome = first
            .run(&[arguments, &["--json"]].concat())
            .expect(12)
            .json();
        let error = outcome["error"].as_str().expect("it is a sentence");
        assert!(error.contains(&boot_id('b')), "{error}");
        // What it had is there as a fork, whole.
        let shown = assert_whole(place);
        let forks: Vec<_> = shown
            .records
            .iter()
            .filter(|(_, record)| record["fork"] == true)
            .collect();
        assert_eq!(forks.len(), 1, "{shown:#?}");
        let other = Host::new(place);
        let _ = other.run(&["restore", forks[0].0]).expect(0);
        assert_same(&describe(&first.root), &describe(&other.root));
        assert_eq!(place.head()["writer"], boot_id('b'));
        // From now on, whatever anybody does.
        for _ in 0..2 {
            let _ = first.run(&["backup"]).expect(12);
        }
        assert_eq!(assert_whole(place).records.len(), shown.records.len());
        for key in place.keys("") {
            place.remove(&key);
        }
    }
}

fn a_layer_that_is_missing_is_found_while_the_tree_changes_all_the_time(place: &Place) {
    let host = host(place);
    place.remove(&place.keys("layers/")[0]);
    // No quiet hour ever comes.
    for minutes in [20, 40, 60] {
        let_pass(&host, HOUR / 3);
        tree::write(&host.root, "below/file", format!("after {minutes} minutes"));
        host.backup();
    }
    assert_newest_is(place, &host);
}

#[test]
fn an_unchanged_tree_makes_no_request_within_the_hour_and_few_after_it() {
    let place = Place::memory();
    let host = host(&place);
    let count = |arguments: &[&str]| {
        place.s3().take_requests();
        assert!(is_unchanged(&host.json(arguments)), "{arguments:?}");
        place.s3().take_requests().len()
    };
    assert_eq!(count(&["backup"]), 0);
    let_pass(&host, HOUR - 60);
    assert_eq!(count(&["backup"]), 0);
    let_pass(&host, 60);
    // The head, its record, and each layer.
    assert_eq!(count(&["backup"]), 4);
    assert_eq!(count(&["backup"]), 0, "it is known for an hour more");
    assert_eq!(count(&CONFIRM), 4);
    assert_eq!(count(&CONFIRM), 4);
    // A clock that was ahead.
    let_pass(&host, -HOUR);
    assert_eq!(count(&["backup"]), 4);
    place.s3().assert_no_complaints();
}

#[test]
fn a_store_that_does_not_answer_confirms_nothing() {
    const REFUSED: Effect = Effect::Status {
        status: 403,
        code: "AccessDenied",
        retry_after: None,
    };
    let place = Place::memory();
    let host = host(&place);
    for (kind, key) in [
        (Kind::Get, "head.json"),
        (Kind::Get, "snapshots/"),
        (Kind::Get, "layers/"),
    ] {
        let_pass(&host, HOUR);
        let before = place.objects();
        place.s3().add_fault(kind, key, 100, REFUSED);
        let _ = host.run(&CONFIRM).expect(75);
        let _ = host.run(&["backup"]).expect(75);
        place.s3().clear_faults();
        place.s3().take_requests();
        assert!(is_unchanged(&host.json(&["backup"])), "{kind:?} {key}");
        assert_eq!(place.s3().take_requests().len(), 4, "{kind:?} {key}");
        assert!(before == place.objects(), "{kind:?} {key}");
    }
}

#[test]
fn a_claim_after_a_failed_repair_is_asked_for_again() {
    let place = Place::memory();
    let host = host(&place);
    place.remove(&place.keys("layers/")[0]);
    place.s3().add_fault(
        Kind::Put,
        "snapshots/",
        1,
        Effect::Status {
            status: 403,
            code: "AccessDenied",
            retry_after: None,
        },
    );
    let _ = host.run(&CONFIRM).expect(75);
    tree::write(&host.root, "below/file", "changed meanwhile");
    host.backup();
    assert_newest_is(&place, &host);
}

/// What is remembered is of the whole address: bucket and path are the same at another port.
#[test]
fn the_same_bucket_at_another_endpoint_gets_a_whole_snapshot() {
    let (one, two) = (Place::memory(), Place::memory());
    let mut host = host(&one);
    let snapshot = one.head()["snapshot"].clone();
    let settings = |place: &Place| {
        let all: BTreeMap<String, String> = place.settings().into_iter().collect();
        all["RUNTIME_S3_ENDPOINT"].clone()
    };
    host.set("RUNTIME_S3_ENDPOINT", settings(&two));
    let answer = host.json(&["backup"]);
    assert!(!is_unchanged(&answer), "{answer}");
    assert_newest_is(&two, &host);
    assert_eq!(one.head()["snapshot"], snapshot, "the first one stays");

    // Back again: that one is found by its content.
    host.set("RUNTIME_S3_ENDPOINT", settings(&one));
    one.s3().take_requests();
    let answer = host.json(&["backup"]);
    assert!(!one.s3().take_requests().is_empty());
    assert_eq!(
        (is_unchanged(&answer), &answer["snapshot"]),
        (true, &snapshot)
    );
    assert_newest_is(&one, &host);
}

#[test]
fn what_one_instance_has_lost_touches_no_other() {
    let place = Place::memory();
    let one = host(&place);
    let two = Host::new(&place)
        .booted('b')
        .with("RUNTIME_INSTANCE_ID", "another-instance");
    tree::write(&two.root, "file", "of the other");
    two.backup();
    let others = |objects: BTreeMap<String, Vec<u8>>| -> BTreeMap<String, Vec<u8>> {
        let others = objects
            .into_iter()
            .filter(|(key, _)| !key.starts_with(PREFIX));
        others.collect()
    };
    let before = others(place.s3().objects());
    assert_eq!(before.len(), 3);
    for key in place.s3().objects().into_keys() {
        if key.starts_with(PREFIX) {
            place.s3().remove(&key);
        }
    }
    assert!(!is_unchanged(&one.json(&CONFIRM)));
    assert!(is_unchanged(&two.json(&CONFIRM)));
    assert!(before == others(place.s3().objects()));
    let restored = Host::new(&place).with("RUNTIME_INSTANCE_ID", "another-instance");
    let _ = restored.run(&["restore"]).expect(0);
    assert_same(&describe(&two.root), &describe(&restored.root));
}

#[test]
fn a_start_on_a_disk_that_is_still_there_asks_the_store_for_nothing_less() {
    let place = Place::memory();
    let mut host = host(&place);
    place.remove(&place.keys("layers/")[0]);
    let_pass(&host, HOUR);
    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    // The tree is left alone, since nobody has moved the head.
    assert!(is_unchanged(&host.json(&["restore"])));
    assert!(!is_unchanged(&host.json(&["backup"])));
    assert_newest_is(&place, &host);
}

/// A fork is claimed to be there as well.
#[test]
fn a_fork_whose_layers_are_gone_is_made_again() {
    let place = Place::memory();
    let host = host(&place);
    tree::write(&host.root, "below/file", "of the fork");
    let fork = |arguments: &[&str]| -> Outcome { host.run(arguments).expect(0) };
    let first = fork(&["backup", "--fork", "--json"]).json();
    let again = fork(&["backup", "--fork", "--confirm", "--json"]).json();
    assert_eq!(first["snapshot"], again["snapshot"]);
    let named = past::layers(
        &place.objects(),
        first["snapshot"].as_str().expect("it names one"),
    );
    let own = named.last().expect("it has layers");
    place.remove(&format!("layers/{own}.tar.zst"));
    let again = fork(&["backup", "--fork", "--confirm", "--json"]).json();
    assert!(!is_unchanged(&again), "{again}");
    let other = Host::new(&place);
    let id = again["snapshot"].as_str().expect("it names one");
    let _ = other.run(&["restore", id]).expect(0);
    assert_same(&describe(&host.root), &describe(&other.root));
}
