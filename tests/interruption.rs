//! Killed, interrupted or out of time at any moment: the store shows what it showed before, and the next run works.

use e2e::agent::{Host, Place, boot_id};
use e2e::s3::{Effect, Fault, Kind};
use e2e::tree::{self, assert_same, describe};
use rustix::process::Signal;

/// Enough noise for three parts of an upload.
const SEVERAL_PARTS: usize = 20 << 20;

/// A host whose next backup takes several parts, after a first snapshot.
fn host(place: &Place) -> (Host, String) {
    let host = Host::new(place).booted('a');
    tree::write(&host.root, "file", "content");
    let snapshot = host.backup();
    tree::write(&host.root, "noise", tree::noise(1, SEVERAL_PARTS));
    place.s3().take_requests();
    (host, snapshot)
}

/// The requests of that next backup in their order.
const STEPS: [(Kind, &str); 6] = [
    (Kind::Get, "head.json"),
    (Kind::Create, "layers/"),
    (Kind::Part, "layers/"),
    (Kind::Complete, "layers/"),
    (Kind::Put, "snapshots/"),
    (Kind::Put, "head.json"),
];

fn assert_shows_only(place: &Place, host: &Host, snapshot: &str) {
    assert_eq!(place.head()["snapshot"], snapshot);
    let list = host.json(&["list"]);
    assert_eq!(
        list["snapshots"].as_array().map(Vec::len),
        Some(1),
        "{list:#}"
    );
    assert_eq!(list["snapshots"][0]["id"], snapshot);
}

fn assert_next_backup_works(place: &Place, host: &Host) {
    place.s3().clear_faults();
    let next = host.json(&["backup"]);
    assert_eq!(
        (&next["unchanged"], &next["fork"]),
        (&false.into(), &false.into())
    );
    assert_eq!(place.head()["snapshot"], next["snapshot"]);
    let other = Host::new(place);
    let _ = other.run(&["restore"]).expect(0);
    assert_same(&describe(&host.root), &describe(&other.root));
    place.s3().assert_no_complaints();
}

#[test]
fn a_kill_at_any_step_of_a_backup_leaves_what_was_there() {
    for (kind, key) in STEPS {
        let place = Place::memory();
        let (host, snapshot) = host(&place);
        place.s3().add_fault(kind, key, 1, Effect::Stall);
        let running = host.start(&["backup"]);
        place.s3().wait_for(kind, key);
        running.signal(Signal::KILL);
        assert_eq!(running.wait().signal, Some(9));
        if (kind, key) == (Kind::Put, "head.json") {
            // The record is there, and with it a whole snapshot; the head does not name it.
            assert_eq!(place.head()["snapshot"], snapshot);
            assert_eq!(
                host.json(&["list"])["snapshots"].as_array().map(Vec::len),
                Some(2)
            );
        } else {
            assert_shows_only(&place, &host, &snapshot);
        }
        assert_next_backup_works(&place, &host);
    }
}

/// A backup that is killed between the head's move and learning of it.
fn kill_once_the_head_moved(place: &Place, host: &Host, snapshot: &str) {
    place
        .s3()
        .add_fault(Kind::Put, "head.json", 1, Effect::StallAfter);
    let running = host.start(&["backup"]);
    place.s3().wait_for(Kind::Put, "head.json");
    e2e::wait::until("the head moves", || place.head()["snapshot"] != snapshot);
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(9));
}

#[test]
fn a_kill_after_the_head_moved_does_not_fence_the_writer() {
    let place = Place::memory();
    let (host, snapshot) = host(&place);
    kill_once_the_head_moved(&place, &host, &snapshot);
    place.s3().clear_faults();
    let again = host.json(&["backup"]);
    assert_eq!(
        (&again["unchanged"], &again["snapshot"]),
        (&true.into(), &place.head()["snapshot"])
    );
    tree::write(&host.root, "since", "written after that");
    assert_next_backup_works(&place, &host);
    assert_eq!(place.head()["sequence"], 3);
}

#[test]
fn a_restart_after_such_a_kill_leaves_the_tree_alone() {
    let place = Place::memory();
    let (mut host, snapshot) = host(&place);
    kill_once_the_head_moved(&place, &host, &snapshot);
    tree::write(&host.root, "since", "written after the last snapshot");
    let before = describe(&host.root);

    place.s3().clear_faults();
    let newest = place.head()["snapshot"].clone();
    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    let answer = host.json(&["restore"]);
    assert_eq!(
        (&answer["unchanged"], &answer["snapshot"]),
        (&true.into(), &newest)
    );
    assert_same(&before, &describe(&host.root));
    assert_eq!(place.head()["writer"], boot_id('b'));
}

#[test]
fn a_signal_during_an_upload_stops_it_and_aborts_its_parts() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let place = Place::memory();
        let (host, snapshot) = host(&place);
        place.s3().add(Fault {
            kind: Kind::Part,
            key: "layers/",
            skip: 1,
            times: 1,
            effect: Effect::Stall,
        });
        let running = host.start(&["backup", "--json"]);
        place.s3().wait_for(Kind::Part, "layers/");
        running.signal(signal);
        let answer = running.wait().expect(code).json();
        assert_eq!(answer["code"], "interrupted");
        assert_eq!(place.s3().open_uploads(), 0);
        assert_shows_only(&place, &host, &snapshot);
        assert_next_backup_works(&place, &host);
    }
}

#[test]
fn a_signal_while_waiting_for_another_run_ends_the_wait() {
    let place = Place::memory();
    let (host, _) = host(&place);
    place
        .s3()
        .add_fault(Kind::Get, "head.json", 1, Effect::Hold);
    let first = host.start(&["backup"]);
    place.s3().wait_for(Kind::Get, "head.json");
    let mut second = host.start(&["backup"]);
    second.wait_for_lock();
    assert!(second.is_running());
    second.signal(Signal::TERM);
    let _ = second.wait().expect(143);
    place.s3().release();
    let _ = first.wait().expect(0);
}

#[test]
fn time_that_runs_out_at_any_step_of_a_backup_changes_nothing() {
    for (kind, key) in STEPS {
        let place = Place::memory();
        let (host, snapshot) = host(&place);
        place.s3().add_fault(kind, key, 1, Effect::Stall);
        let answer = host
            .run(&["backup", "--timeout", "3s", "--json"])
            .expect(124)
            .json();
        assert_eq!(answer["code"], "timeout");
        assert_eq!(place.head()["snapshot"], snapshot, "{kind:?} {key}");
        assert_eq!(place.s3().open_uploads(), 0, "{kind:?} {key}");
        assert_next_backup_works(&place, &host);
    }
}

#[test]
fn time_that_runs_out_at_any_step_of_a_restore_changes_nothing() {
    for effect in [Effect::Stall, Effect::StallInBody] {
        for key in ["head.json", "snapshots/", "layers/"] {
            let place = Place::memory();
            let (host, _) = host(&place);
            host.backup();
            tree::write(&host.root, "file", "changed since");
            let before = describe(&host.root);
            let objects = place.objects();
            place.s3().add_fault(Kind::Get, key, 1, effect);
            // By hand, so that the tree is not simply left alone.
            let person = host.with("RUNTIME_RESTORE_TIMEOUT", "1s");
            let mut person = person;
            person.unset("RUNTIME_BOOT_ID");
            let _ = person.run(&["restore"]).expect(124);
            assert_same(&before, &describe(&person.root));
            assert_eq!(objects, place.objects());
            // Only what the next restore goes on with.
            person.set("RUNTIME_RESTORE_TIMEOUT", "10m");
            place.s3().clear_faults();
            let _ = person.run(&["restore"]).expect(0);
            assert_eq!(person.leftovers(), [""; 0], "{effect:?} of {key}");
        }
    }
}

#[test]
fn time_that_runs_out_while_listing_or_probing_is_said_so() {
    let place = Place::memory();
    let host = Host::new(&place)
        .with("RUNTIME_RESTORE_TIMEOUT", "1s")
        .with("RUNTIME_BACKUP_TIMEOUT", "1s");
    place.s3().add_fault(Kind::List, "", 1, Effect::Stall);
    let _ = host.run(&["list"]).expect(124);
    for kind in [Kind::Put, Kind::Delete] {
        place.s3().add_fault(kind, "probe-", 1, Effect::Stall);
        let _ = host.run(&["backup"]).expect(124);
        assert!(place.keys("snapshots/").is_empty());
    }
}

#[test]
fn a_kill_in_the_middle_of_a_restore_is_mended_by_the_next() {
    let place = Place::memory();
    let (mut host, _) = host(&place);
    let snapshot = host.backup();
    let before = describe(&host.root);
    host.lose_everything();
    place.s3().add(Fault {
        kind: Kind::Get,
        key: "layers/",
        skip: 2,
        times: 1,
        effect: Effect::Stall,
    });
    place.s3().take_requests();
    let running = host.start(&["restore"]);
    e2e::wait::until("the tree begins to grow", || !host.leftovers().is_empty());
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(9));
    assert!(!host.root.exists(), "a tree appears whole or not at all");

    place.s3().clear_faults();
    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    assert_eq!(host.json(&["restore"])["snapshot"], snapshot);
    assert_same(&before, &describe(&host.root));
    assert_eq!(host.leftovers(), [""; 0]);
}

#[test]
fn a_signal_in_the_middle_of_a_restore_leaves_the_root_and_what_the_next_one_goes_on_with() {
    let place = Place::memory();
    let (mut host, _) = host(&place);
    host.backup();
    tree::write(&host.root, "file", "changed since");
    let before = describe(&host.root);
    host.unset("RUNTIME_BOOT_ID");
    place.s3().add(Fault {
        kind: Kind::Get,
        key: "layers/",
        skip: 2,
        times: 1,
        effect: Effect::Stall,
    });
    place.s3().take_requests();
    let running = host.start(&["restore"]);
    let staged = host.folder.path().join(".root.restoring/new");
    let has_entries = || std::fs::read_dir(&staged).is_ok_and(|mut found| found.next().is_some());
    e2e::wait::until("the tree begins to grow", has_entries);
    running.signal(Signal::TERM);
    let _ = running.wait().expect(143);
    assert_same(&before, &describe(&host.root));
    place.s3().clear_faults();
    let next = host.run(&["restore", "--json"]).expect(0);
    let going_on = next.logged("going on with what an earlier restore has unpacked");
    assert_eq!(going_on.len(), 1);
    assert_eq!(host.leftovers(), [""; 0]);
}

#[test]
fn a_kill_of_a_backup_to_a_directory_leaves_what_was_there() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    let snapshot = host.backup();
    let objects = place.objects();
    tree::write(&host.root, "noise", tree::noise(1, 4 * SEVERAL_PARTS));
    let Place::Directory(folder) = &place else {
        unreachable!("it was made as one");
    };
    let layers = folder
        .path()
        .join("store")
        .join(e2e::agent::INSTANCE)
        .join("layers");
    let running = host.start(&["backup"]);
    e2e::wait::until("the layer begins to grow", || {
        std::fs::read_dir(&layers)
            .expect("there is one")
            .flatten()
            .any(|entry| entry.file_name().as_encoded_bytes()[0] == b'.')
    });
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(9));
    assert_eq!(
        objects.keys().collect::<Vec<_>>(),
        place.objects().keys().collect::<Vec<_>>()
    );
    assert_eq!(host.json(&["list"])["snapshots"][0]["id"], snapshot);
    assert_eq!(host.json(&["backup"])["fork"], false);
}
