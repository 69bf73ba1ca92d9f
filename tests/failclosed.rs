//! The supervisor with the real agent: whatever is wrong with the store or the disk, the gateway is not started on an empty
//! root and no backup is taken, until a restore succeeds or the store is known to be empty.

use std::fs;
use std::path::PathBuf;

use e2e::agent::{Host, INSTANCE, Place};
use e2e::forge;
use e2e::s3::{Effect, Kind};
use e2e::supervisor::{Setup, Supervisor};
use e2e::tree::{self, assert_same, describe};
use e2e::wait::{until, until_some};
use serde_json::{Value, json};

/// A supervisor on that store, with the real agent.
fn setup(place: &Place) -> Setup {
    let mut setup = Setup::with_agent();
    for (name, value) in place.settings() {
        setup = setup.with(&name, &value);
    }
    setup
        .with("RUNTIME_INSTANCE_ID", INSTANCE)
        .with("RUNTIME_BACKUP_INTERVAL", "1s")
}

/// A store with one snapshot of some files, taken elsewhere.
fn place_with_a_snapshot() -> (Place, String) {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "kept/file", "from the snapshot");
    tree::write(&host.root, "large", tree::noise(1, 2 << 20));
    let snapshot = host.backup();
    (place, snapshot)
}

/// Waits for a restore that failed with this in its error, twice: it is tried again.
fn until_held(supervisor: &Supervisor, word: &str) -> Value {
    let status = until_some("two failed restores", || {
        let failures = supervisor.log().matches("\"restore failed\"").count();
        let status = supervisor.status();
        (failures >= 2 && status["restore"]["status"] == "failed").then_some(status)
    });
    let error = status["restore"]["error"].as_str().expect("it is said");
    assert!(error.contains(word), "{error} does not say {word}");
    status
}

/// Nothing was started, nothing was written.
fn assert_closed(supervisor: &Supervisor, place: &Place, before: &Objects) {
    let status = supervisor.status();
    assert_eq!(status["gateway"]["status"], "restoring");
    assert_eq!(status["gateway"]["pid"], Value::Null);
    assert_eq!(status["backup"]["status"], "disabled");
    assert_eq!(status["lastBackup"], Value::Null);
    let refused = supervisor.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (409, "backup_disabled"));
    assert!(
        supervisor.setup.starts().is_empty(),
        "the gateway was started"
    );
    assert!(
        place.objects() == *before,
        "something was written to the store"
    );
}

type Objects = std::collections::BTreeMap<String, Vec<u8>>;

/// Up again, by itself, with the files of the snapshot.
fn assert_recovers(supervisor: &Supervisor, snapshot: &str) {
    supervisor.until_running(1);
    let status = supervisor.status();
    assert_eq!(
        status["restore"],
        json!({ "status": "done", "snapshot": snapshot, "error": null, "progress": null })
    );
    let file = supervisor.setup.root().join("kept/file");
    assert_eq!(fs::read(file).expect("it is back"), b"from the snapshot");
    assert_eq!(supervisor.post("/v1/backup").status, 200);
}

#[test]
fn a_store_that_does_not_answer_holds_everything_until_it_does() {
    let (place, snapshot) = place_with_a_snapshot();
    let down = Effect::Status {
        status: 503,
        code: "SlowDown",
        retry_after: None,
    };
    for kind in [Kind::Get, Kind::List, Kind::Put] {
        place.s3().add_fault(kind, "", u32::MAX, down);
    }
    let before = place.objects();
    let mut supervisor = setup(&place).with("RUNTIME_RESTORE_TIMEOUT", "1s").start();
    until_held(&supervisor, "");
    assert_closed(&supervisor, &place, &before);
    place.s3().clear_faults();
    assert_recovers(&supervisor, &snapshot);
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn a_store_that_is_not_there_at_all_holds_everything_through_a_new_boot() {
    let (place, snapshot) = place_with_a_snapshot();
    let before = place.objects();
    let mut first = setup(&place)
        .with("RUNTIME_S3_ENDPOINT", "http://127.0.0.1:1")
        .with("RUNTIME_RESTORE_TIMEOUT", "1s")
        .start();
    until_held(&first, "");
    assert_closed(&first, &place, &before);
    // Neither does a shutdown take a final snapshot.
    assert_eq!(first.stop(), Some(0));
    assert!(place.objects() == before);
    // The same disk, a new boot, a store that is there again.
    let supervisor = setup(&place).on_the_disk_of(&first.setup).start();
    assert_recovers(&supervisor, &snapshot);
}

#[test]
fn wrong_credentials_hold_everything() {
    let (place, _) = place_with_a_snapshot();
    let before = place.objects();
    let supervisor = setup(&place)
        .with("RUNTIME_S3_SECRET_ACCESS_KEY", "not-the-right-one")
        .start();
    let status = until_held(&supervisor, "check the S3 credentials");
    assert!(!status.to_string().contains("not-the-right-one"));
    assert_closed(&supervisor, &place, &before);
}

/// Spoils one object; gives what it was.
fn spoil(place: &Place, find: &str, how: impl FnOnce(&mut Vec<u8>)) -> (String, Vec<u8>) {
    let objects = place.objects();
    let (key, sound) = objects
        .into_iter()
        .find(|(key, _)| key.starts_with(find))
        .expect("it is there");
    let mut bytes = sound.clone();
    how(&mut bytes);
    place.put(&key, &bytes);
    (key, sound)
}

#[test]
fn damage_of_any_kind_holds_everything_and_is_named_until_it_is_mended() {
    type Spoil = fn(&Place) -> (String, Vec<u8>);
    let cases: [(&str, Spoil); 5] = [
        ("head.json", |place| {
            spoil(place, "head.json", |bytes| bytes[9] ^= 1)
        }),
        ("snapshots/", |place| {
            spoil(place, "snapshots/", |bytes| bytes[9] ^= 1)
        }),
        ("layers/", |place| {
            // In the index.
            spoil(place, "layers/", |bytes| {
                let at = bytes.len() - 100;
                bytes[at] ^= 1;
            })
        }),
        ("layers/", |place| {
            spoil(place, "layers/", |bytes| bytes[1000] ^= 1)
        }),
        ("layers/", |place| {
            let lost = spoil(place, "layers/", |_| ());
            place.remove(&lost.0);
            lost
        }),
    ];
    for (named, make) in cases {
        let (place, snapshot) = place_with_a_snapshot();
        let (key, sound) = make(&place);
        let before = place.objects();
        let supervisor = setup(&place).start();
        until_held(&supervisor, named);
        assert_closed(&supervisor, &place, &before);
        place.put(&key, &sound);
        assert_recovers(&supervisor, &snapshot);
    }
}

#[test]
fn a_disk_that_is_full_holds_everything_and_is_named_until_there_is_room() {
    let (place, snapshot) = place_with_a_snapshot();
    let setup = setup(&place);
    // The folder that the root is made in.
    let disk = setup.folder.path().join("disk");
    let Some(mounted) = e2e::mount::tmpfs(&disk, "size=1m") else {
        return;
    };
    let root = disk.join("root");
    let before = place.objects();
    let setup = setup.with("RUNTIME_ROOT", &root.display().to_string());
    let supervisor = setup.start();
    until_held(
        &supervisor,
        "No space left on device (os error 28); make room",
    );
    assert_closed(&supervisor, &place, &before);
    let left: Vec<PathBuf> = describe(&disk).into_keys().collect();
    assert_eq!(left, [PathBuf::new()], "something takes up the room");
    mounted.remount("size=16m");
    supervisor.until_running(1);
    assert_eq!(
        supervisor.status()["restore"]["snapshot"],
        snapshot.as_str()
    );
    assert_eq!(
        fs::read(root.join("kept/file")).expect("it is back"),
        b"from the snapshot"
    );
}

#[test]
fn a_store_that_lists_nothing_is_a_new_instance_and_saves_what_comes() {
    let place = Place::memory();
    let mut supervisor = setup(&place).start();
    supervisor.until_running(1);
    let status = supervisor.status();
    assert_eq!(
        status["restore"],
        json!({ "status": "empty", "snapshot": null, "error": null, "progress": null })
    );
    tree::write(&supervisor.setup.root(), "file", "new");
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.stop(), Some(0));
    assert!(place.head()["snapshot"].is_string());
}

#[test]
fn told_to_start_anyway_it_starts_fresh_and_saves_beside_the_history() {
    let (place, snapshot) = place_with_a_snapshot();
    let (key, sound) = spoil(&place, "layers/", |bytes| bytes[1000] ^= 1);
    let head = place.head();
    let mut supervisor = setup(&place)
        .with("RUNTIME_ON_RESTORE_FAILURE", "start")
        .with("RUNTIME_BACKUP_INTERVAL", "0")
        .start();
    supervisor.until_running(1);
    let status = supervisor.status();
    assert_eq!(status["restore"]["status"], "failed");
    assert!(
        status["restore"]["error"]
            .as_str()
            .is_some_and(|error| error.contains(&key))
    );
    tree::write(&supervisor.setup.root(), "fresh", "written since");
    let answer = supervisor.post("/v1/backup");
    assert_eq!(answer.status, 200, "{answer:?}");
    let fork = answer.body["data"]["snapshot"]
        .as_str()
        .expect("it is named")
        .to_owned();
    tree::write(&supervisor.setup.root(), "fresh", "written later");
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(
        place.head()["snapshot"],
        head["snapshot"],
        "the head has moved"
    );
    assert!(place.head() == head, "the head was claimed");

    let host = Host::new(&place);
    let list = host.json(&["list"]);
    let rows = list["snapshots"].as_array().expect("it is a list");
    let row = |id: &str| {
        rows.iter()
            .find(|row| row["id"] == id)
            .expect("it is listed")
    };
    assert_eq!(
        (&row(&snapshot)["head"], &row(&snapshot)["fork"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(
        (&row(&fork)["head"], &row(&fork)["fork"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(rows.len(), 3, "the final one is a fork too");
    let target = host.state.with_file_name("fork");
    let _ = host
        .run(&["restore", &fork, "--target", &target.display().to_string()])
        .expect(0);
    assert_eq!(
        fs::read(target.join("fresh")).expect("it is there"),
        b"written since"
    );

    // Mended, and told nothing more: the next boot has the history again.
    place.put(&key, &sound);
    let next = setup(&place).on_the_disk_of(&supervisor.setup).start();
    assert_recovers(&next, &snapshot);
}

#[test]
fn another_instance_meanwhile_is_not_disturbed_and_what_it_saved_comes_back() {
    let (place, snapshot) = place_with_a_snapshot();
    // Ours cannot read the layer; another machine has a copy that can.
    let down = Effect::Status {
        status: 403,
        code: "AccessDenied",
        retry_after: None,
    };
    place.s3().add_fault(Kind::Get, "layers/", u32::MAX, down);
    let supervisor = setup(&place).start();
    until_held(&supervisor, "these credentials need");
    let before = place.objects();
    assert_closed(&supervisor, &place, &before);
    place.s3().clear_faults();

    let other = Host::new(&place).booted('b');
    let restored = other.json(&["restore"]);
    assert_eq!(restored["snapshot"], snapshot.as_str());
    tree::write(&other.root, "kept/other", "from the other instance");
    let newer = other.backup();
    // Ours comes up with what the other one saved, and the other one learns of it.
    supervisor.until_running(1);
    let status = until_some("a restore", || {
        let status = supervisor.status();
        (status["restore"]["status"] == "done").then_some(status)
    });
    let root = supervisor.setup.root();
    if status["restore"]["snapshot"] == newer.as_str() {
        assert_same(
            &describe(&other.root.join("kept")),
            &describe(&root.join("kept")),
        );
        tree::write(&other.root, "kept/late", "too late");
        let _ = other.run(&["backup"]).expect(12);
        assert_eq!(supervisor.post("/v1/backup").status, 200);
    } else {
        // Ours was first, in between: then the other one has the head, and ours is told.
        assert_eq!(status["restore"]["snapshot"], snapshot.as_str());
        tree::write(&root, "late", "too late");
        let refused = supervisor.post("/v1/backup");
        assert_eq!((refused.status, refused.code()), (409, "fenced"));
    }
}

#[test]
fn a_head_that_lies_is_never_taken_for_an_empty_store() {
    let (place, _) = place_with_a_snapshot();
    forge::object(&place, "head.json", |head| {
        head["snapshot"] = "20260102T030405006Z-89abcdef".into();
    });
    let before = place.objects();
    let supervisor = setup(&place).start();
    until_held(&supervisor, "snapshots/20260102T030405006Z-89abcdef.json");
    assert_closed(&supervisor, &place, &before);
}

#[test]
fn a_root_that_goes_away_while_the_runtime_runs_comes_back_and_no_emptiness_is_saved() {
    let (place, snapshot) = place_with_a_snapshot();
    let setup = setup(&place).with("RUNTIME_BACKUP_INTERVAL", "0");
    let root = setup.root();
    let volume = e2e::mount::tmpfs(&root, "mode=755");
    let is_volume = volume.is_some();
    let mut supervisor = setup.start();
    supervisor.until_running(1);
    tree::write(&root, "kept/since", "after the snapshot");
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    // Detached, where this machine can mount one; removed at last.
    drop(volume);
    for losses in 1..=2 {
        if losses == 2 || !is_volume {
            fs::remove_dir_all(&root).expect("can remove it");
        }
        assert_eq!(supervisor.post("/v1/restart").status, 202);
        supervisor.until_running(losses + 1);
        until("the loss to be said", || {
            supervisor.log().matches("the root is lost").count() == losses
        });
        let since = fs::read(root.join("kept/since")).expect("it is back");
        assert_eq!(since, b"after the snapshot");
        assert_eq!(supervisor.post("/v1/backup").status, 200);
    }
    let head = place.head()["snapshot"].clone();
    fs::remove_dir_all(&root).expect("can remove it");
    // Nothing can be saved any more, and that is said.
    assert_eq!(supervisor.stop(), Some(1));
    until("the loss to be said", || {
        supervisor.log().contains("\"final snapshot lost\"")
    });
    assert_eq!(place.head()["snapshot"], head);
    assert_ne!(head, snapshot.as_str());
    let list = Host::new(&place).json(&["list"]);
    let rows = list["snapshots"].as_array().expect("it is a list");
    assert!(
        rows.iter().all(|row| row["files"].as_u64() > Some(0)),
        "{list}"
    );
}
