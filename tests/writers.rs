//! More than one writer, and more than one life of the same one: who holds the head, who is fenced, what is kept.

use std::fs;

use e2e::agent::{Host, Place, boot_id};
use e2e::on_every_store;
use e2e::s3::{Effect, Kind};
use e2e::tree::{self, assert_same, describe, kept};
use serde_json::Value;

on_every_store!(
    the_second_runtime_takes_the_head_and_the_first_keeps_its_work_as_a_fork,
    a_fork_on_request_leaves_the_head_alone,
    a_backup_by_hand_is_refused_where_the_head_is_anothers_until_a_restore,
    two_first_backups_leave_one_head_and_both_snapshots,
    a_restart_with_the_disk_still_there_leaves_the_tree_alone,
    a_root_that_was_made_again_is_restored,
    a_snapshot_whose_head_was_never_written_is_the_latest,
);

fn list(host: &Host) -> Vec<Value> {
    let answer = host.json(&["list"]);
    answer["snapshots"]
        .as_array()
        .expect("it is a list")
        .clone()
}

fn read(host: &Host, name: &str) -> String {
    fs::read_to_string(host.root.join(name)).unwrap_or_default()
}

fn the_second_runtime_takes_the_head_and_the_first_keeps_its_work_as_a_fork(place: &Place) {
    let first = Host::new(place).booted('a');
    let _ = first.run(&["restore"]).expect(10);
    tree::write(&first.root, "file", "one");
    let one = first.backup();

    let second = Host::new(place).booted('b');
    assert_eq!(second.json(&["restore"])["snapshot"], one);
    assert_eq!(place.head()["writer"], boot_id('b'));
    assert_eq!(place.head()["snapshot"], one);

    tree::write(&first.root, "file", "the loser's");
    let refused = first.run(&["backup", "--json"]).expect(12);
    assert_eq!(refused.json()["code"], "fenced");
    let head = place.head();
    assert_eq!(
        (&head["writer"], &head["snapshot"]),
        (&boot_id('b').into(), &one.clone().into())
    );
    let forks: Vec<_> = list(&second)
        .into_iter()
        .filter(|entry| entry["fork"] == true)
        .collect();
    assert_eq!(forks.len(), 1, "the loser's snapshot is kept");
    let fork = forks[0]["id"].as_str().expect("it has an id");
    let error = refused.json()["error"]
        .as_str()
        .expect("it is a sentence")
        .to_owned();
    assert!(
        error.contains(fork) && error.contains(&boot_id('b')),
        "{error}"
    );

    // It stays fenced, and does not pile up forks.
    let _ = first.run(&["backup"]).expect(12);
    assert_eq!(place.keys("snapshots/").len(), 2);
    assert_eq!(place.keys("layers/").len(), 2);

    tree::write(&second.root, "file", "two");
    let two = second.backup();
    let history: Vec<_> = list(&second)
        .into_iter()
        .filter(|entry| entry["fork"] == false)
        .collect();
    assert_eq!(history.len(), 2);
    assert_eq!(
        (&history[0]["id"], &history[0]["parent"]),
        (&two.clone().into(), &one.into())
    );

    // Nothing of the fork is lost, and the fenced one comes back by restoring.
    let third = Host::new(place);
    let _ = third.run(&["restore", fork]).expect(0);
    assert_eq!(read(&third, "file"), "the loser's");
    assert_eq!(first.json(&["restore"])["snapshot"], two);
    assert_eq!(read(&first, "file"), "two");
    tree::write(&first.root, "file", "three");
    assert_eq!(place.head()["writer"], boot_id('a'));
    assert_eq!(first.json(&["backup"])["fork"], false);
}

fn a_fork_on_request_leaves_the_head_alone(place: &Place) {
    let owner = Host::new(place).booted('a');
    let _ = owner.run(&["restore"]).expect(10);
    tree::write(&owner.root, "file", "the owner's");
    owner.backup();
    let head = place.head();

    // A runtime that could not restore and starts fresh.
    let other = Host::new(place).booted('b');
    tree::write(&other.root, "file", "fresh");
    let fork = other.json(&["backup", "--fork"]);
    assert_eq!(fork["fork"], true);
    assert_eq!(other.json(&["backup", "--fork"])["unchanged"], true);
    assert_eq!(place.head(), head);
    tree::write(&owner.root, "file", "more");
    assert_eq!(
        owner.json(&["backup"])["fork"],
        false,
        "the owner notices nothing"
    );
    let marks: Vec<_> = list(&owner)
        .iter()
        .map(|entry| entry["fork"] == true)
        .collect();
    assert_eq!(marks, [false, true, false]);
}

fn a_backup_by_hand_is_refused_where_the_head_is_anothers_until_a_restore(place: &Place) {
    let owner = Host::new(place).booted('a');
    let _ = owner.run(&["restore"]).expect(10);
    tree::write(&owner.root, "file", "the owner's");
    let newest = owner.backup();
    let head = place.head();

    let person = Host::new(place);
    tree::write(&person.root, "file", "a person's");
    let refused = person.run(&["backup"]).expect(12);
    assert_eq!(refused.stdout, "");
    assert_eq!(place.head(), head);
    assert_eq!(person.json(&["restore"])["snapshot"], newest);
    assert_eq!(place.head(), head, "a restore by hand claims nothing");
    tree::write(&person.root, "file", "a person's, with leave");
    let followed = person.backup();
    assert_eq!(place.head()["snapshot"], followed);
    assert_eq!(place.head()["sequence"], 2);

    tree::write(&owner.root, "file", "too late");
    let _ = owner.run(&["backup"]).expect(12);
    assert_eq!(place.head()["snapshot"], followed);
}

fn two_first_backups_leave_one_head_and_both_snapshots(place: &Place) {
    let hosts = ['a', 'b'].map(|digit| {
        let host = Host::new(place).booted(digit);
        tree::write(&host.root, "file", digit.to_string());
        host
    });
    let runs = hosts
        .each_ref()
        .map(|host| host.start(&["backup", "--json"]));
    let outcomes = runs.map(e2e::agent::Running::wait);
    let mut codes = outcomes.each_ref().map(|outcome| outcome.code);
    codes.sort_unstable();
    assert_eq!(codes, [Some(0), Some(12)], "{outcomes:#?}");
    let winner = outcomes
        .iter()
        .find(|outcome| outcome.code == Some(0))
        .expect("there is one");
    assert_eq!(place.head()["snapshot"], winner.json()["snapshot"]);
    assert_eq!(place.keys("snapshots/").len(), 2, "the loser's is kept");
}

fn a_restart_with_the_disk_still_there_leaves_the_tree_alone(place: &Place) {
    let mut host = Host::new(place).booted('a');
    let _ = host.run(&["restore"]).expect(10);
    tree::make(&host.root);
    let newest = host.backup();
    tree::write(&host.root, "since", "written after the last snapshot");
    let before = describe(&host.root);

    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    let answer = host.json(&["restore"]);
    assert_eq!(answer["unchanged"], true);
    assert_eq!(answer["snapshot"], newest);
    assert_eq!(answer["bytesDownloaded"], 0);
    assert_same(&before, &describe(&host.root));
    assert_eq!(place.head()["writer"], boot_id('b'));
    let next = host.json(&["backup"]);
    assert_eq!(
        (&next["unchanged"], &next["fork"]),
        (&false.into(), &false.into())
    );
    assert_eq!(place.head()["sequence"], 2);
}

fn a_root_that_was_made_again_is_restored(place: &Place) {
    let mut host = Host::new(place).booted('a');
    let _ = host.run(&["restore"]).expect(10);
    tree::make(&host.root);
    host.backup();
    let before = kept(describe(&host.root));
    // The new directory gets the inode number of the old one.
    for _ in 0..2 {
        host.lose_root();
        fs::create_dir(&host.root).expect("can make the root");
    }

    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    assert_eq!(host.json(&["restore"])["unchanged"], false);
    assert_same(&before, &describe(&host.root));
}

fn a_snapshot_whose_head_was_never_written_is_the_latest(place: &Place) {
    let host = Host::new(place);
    tree::write(&host.root, "file", "whole");
    let snapshot = host.backup();
    // What a kill before the first head leaves.
    place.remove("head.json");
    host.lose_everything();
    assert_eq!(host.json(&["restore"])["snapshot"], snapshot);
    assert_eq!(read(&host, "file"), "whole");
}

#[test]
fn a_head_whose_answer_was_lost_is_recognized_as_our_own() {
    let place = Place::memory();
    let host = Host::new(&place).booted('a');
    for round in 1..=2 {
        tree::write(&host.root, "file", round.to_string());
        place
            .s3()
            .add_fault(Kind::Put, "head.json", 1, Effect::LoseAnswer);
        let answer = host.json(&["backup"]);
        assert_eq!(answer["fork"], false);
        assert_eq!(place.head()["snapshot"], answer["snapshot"]);
        assert_eq!(place.head()["sequence"], round);
    }
    place.s3().assert_no_complaints();
}

#[test]
fn a_record_whose_answer_was_lost_is_recognized_as_our_own() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    place
        .s3()
        .add_fault(Kind::Put, "snapshots/", 1, Effect::LoseAnswer);
    let snapshot = host.backup();
    assert_eq!(place.head()["snapshot"], snapshot);
    assert_eq!(place.keys("snapshots/").len(), 1);
}

#[test]
fn a_claim_that_comes_between_reading_and_writing_the_head_wins() {
    let place = Place::memory();
    let first = Host::new(&place).booted('a');
    tree::write(&first.root, "file", "one");
    let one = first.backup();
    tree::write(&first.root, "file", "two");
    place.s3().take_requests();
    place
        .s3()
        .add_fault(Kind::Put, "snapshots/", 1, Effect::Hold);
    let backup = first.start(&["backup", "--json"]);
    place.s3().wait_for(Kind::Put, "snapshots/");

    let second = Host::new(&place).booted('b');
    assert_eq!(second.json(&["restore"])["snapshot"], one);
    place.s3().release();
    assert_eq!(backup.wait().expect(12).json()["code"], "fenced");
    assert_eq!(place.head()["writer"], boot_id('b'));
    assert_eq!(place.head()["snapshot"], one);
    assert_eq!(place.keys("snapshots/").len(), 2, "the loser's is kept");
}

#[test]
fn a_restore_that_loses_the_head_meanwhile_restores_the_newer_snapshot() {
    let place = Place::memory();
    let first = Host::new(&place).booted('a');
    tree::write(&first.root, "file", "one");
    first.backup();
    tree::write(&first.root, "file", "two");

    let second = Host::new(&place).booted('b');
    place.s3().take_requests();
    place.s3().add_fault(Kind::Get, "layers/", 1, Effect::Hold);
    let restore = second.start(&["restore", "--json"]);
    place.s3().wait_for(Kind::Get, "layers/");
    let two = first.backup();
    place.s3().release();

    assert_eq!(restore.wait().expect(0).json()["snapshot"], two);
    assert_eq!(read(&second, "file"), "two");
    assert_eq!(place.head()["writer"], boot_id('b'));
    assert_eq!(second.leftovers(), [""; 0]);
}

#[test]
fn a_writer_that_never_learned_of_its_own_head_is_not_fenced() {
    let place = Place::memory();
    let mut host = Host::new(&place);
    tree::write(&host.root, "file", "one");
    place
        .s3()
        .add_fault(Kind::Put, "head.json", 1, Effect::StallAfter);
    host.set("RUNTIME_BACKUP_TIMEOUT", "2s");
    let _ = host.run(&["backup"]).expect(124);
    host.unset("RUNTIME_BACKUP_TIMEOUT");
    tree::write(&host.root, "file", "two");
    let snapshot = host.backup();
    assert_eq!(place.head()["snapshot"], snapshot);
    assert_eq!(place.head()["sequence"], 2);
}
