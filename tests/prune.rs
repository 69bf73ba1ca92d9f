//! Prune on real stores: what stays can be restored, what goes is gone, and nothing that anybody works on is touched.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, SystemTime};

use e2e::agent::{Host, PREFIX, Place, boot_id};
use e2e::on_every_store;
use e2e::past;
use e2e::s3::{Effect, Kind};
use e2e::tree::{self, Tree, assert_same, describe};
use jiff::SignedDuration;
use rustix::process::Signal;
use serde_json::Value;

on_every_store!(
    what_stays_can_be_restored_and_what_goes_is_gone,
    a_dry_run_says_so_and_removes_nothing,
    a_record_that_cannot_be_read_keeps_everything,
    a_head_that_names_nothing_keeps_everything,
    layers_that_nobody_names_go_after_a_week_and_behind_the_head,
    layers_of_a_snapshot_that_goes_do_not_wait_for_a_week,
    a_fenced_runtime_removes_nothing,
    a_backup_after_a_prune_goes_on_from_the_head,
);

const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);

/// A runtime's host with a snapshot of each of these ages, and the trees they are of, by id.
struct Past {
    host: Host,
    ids: Vec<String>,
    trees: BTreeMap<String, Tree>,
}

/// The last snapshot is the head, and the tree goes on from it.
fn past(place: &Place, ages: &[Duration]) -> Past {
    let host = Host::new(place).booted('a');
    let mut made = Vec::new();
    let mut trees = Vec::new();
    for (number, age) in ages.iter().enumerate() {
        tree::write(&host.root, "file", format!("version {number}"));
        tree::write(
            &host.root,
            format!("of-{number}"),
            tree::noise(number as u64, 3000),
        );
        trees.push(describe(&host.root));
        made.push((host.backup(), *age));
    }
    let ids = past::set_back(place, &made);
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    let trees = ids.iter().cloned().zip(trees).collect();
    Past { host, ids, trees }
}

fn ids(list: &Value) -> Vec<String> {
    let snapshots = list["snapshots"].as_array().expect("it is a list").iter();
    let id = |entry: &Value| entry["id"].as_str().expect("it has one").to_owned();
    snapshots.map(id).collect()
}

/// Every snapshot that `list` shows can be restored and is what it was, and every layer is somebody's.
fn assert_whole(place: &Place, past: &Past) -> Vec<String> {
    let shown = ids(&past.host.json(&["list"]));
    for id in &shown {
        let other = Host::new(place);
        let _ = other.run(&["restore", id]).expect(0);
        assert_same(&past.trees[id], &describe(&other.root));
    }
    shown
}

fn layers_on(place: &Place) -> Vec<String> {
    let keys = place.keys("layers/").into_iter();
    keys.map(|key| key["layers/".len()..key.len() - ".tar.zst".len()].to_owned())
        .collect()
}

fn named_layers(place: &Place) -> Vec<String> {
    let objects = place.objects();
    let records = objects.keys().filter_map(|key| {
        let name = key.strip_prefix("snapshots/")?;
        name.strip_suffix(".json")
    });
    let mut named: Vec<String> = records.flat_map(|id| past::layers(&objects, id)).collect();
    named.sort_unstable();
    named.dedup();
    named
}

fn what_stays_can_be_restored_and_what_goes_is_gone(place: &Place) {
    let past = past(
        place,
        &[
            50 * HOUR,
            40 * HOUR,
            30 * HOUR,
            20 * HOUR,
            2 * HOUR,
            HOUR / 2,
        ],
    );
    let host = Host::new(place).with("RUNTIME_RETENTION", "last=2");
    let size = |place: &Place| -> usize {
        let objects = place.objects();
        let layers = objects.iter().filter(|(key, _)| key.starts_with("layers/"));
        layers.map(|(_, bytes)| bytes.len()).sum()
    };
    let before = size(place);
    let answer = host.json(&["prune"]);
    let mut want = past.ids[..4].to_vec();
    want.reverse();
    assert_eq!(answer["removed"], Value::from(want));
    assert_eq!(answer["kept"], 2);
    assert_eq!(answer["dryRun"], false);
    let reasons = |answer: &Value| -> Vec<String> {
        let verdicts = answer["verdicts"].as_array().expect("it is a list").iter();
        verdicts
            .map(|verdict| verdict["reason"].as_str().expect("it has one").to_owned())
            .collect()
    };
    assert_eq!(
        reasons(&answer)[..3],
        ["the head", "last 2 of 2", "no rule keeps it"]
    );
    let freed = before - size(place);
    assert!(freed > 0);
    assert_eq!(answer["bytesFreed"], freed);
    assert_eq!(layers_on(place), named_layers(place));
    assert_eq!(
        assert_whole(place, &past),
        [past.ids[5].clone(), past.ids[4].clone()]
    );
    // What is left is no fork, though the parents are gone.
    let list = host.json(&["list"]);
    assert!(!list.to_string().contains("\"fork\":true"), "{list}");
    assert_eq!(list["layersBytes"], size(place));

    let again = host.json(&["prune"]);
    assert_eq!(
        (&again["removed"], &again["layersRemoved"]),
        (&Value::from(Vec::<Value>::new()), &0.into())
    );
}

fn a_dry_run_says_so_and_removes_nothing(place: &Place) {
    let past = past(place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    place.put("probe-0123456789abcdef", b"left behind");
    let host = Host::new(place).with("RUNTIME_RETENTION", "last=1");
    let before = place.objects();
    let said = host.json(&["prune", "--dry-run"]);
    let table = host.run(&["prune", "--dry-run"]).expect(0).stdout;
    assert_eq!(before, place.objects());
    assert_eq!(said["dryRun"], true);
    for (id, line) in past.ids.iter().rev().zip(table.lines().skip(1)) {
        assert!(line.starts_with(id.as_str()), "{line}");
    }
    assert!(table.contains("would remove 2 snapshots"), "{table}");
    let mut done = host.json(&["prune"]);
    done["dryRun"] = true.into();
    assert_eq!(done, said, "it does what it said");
}

fn a_record_that_cannot_be_read_keeps_everything(place: &Place) {
    let past = past(place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    let host = Host::new(place).with("RUNTIME_RETENTION", "last=1");
    let key = format!("snapshots/{}.json", past.ids[1]);
    let sound = place.objects().remove(&key).expect("it is there");
    let mut changed = sound.clone();
    changed[20] ^= 1;
    let text = String::from_utf8(sound.clone()).expect("a record is JSON");
    let newer = text.replace("\"format\":1", "\"format\":9").into_bytes();
    for bytes in [changed, newer] {
        place.put(&key, &bytes);
        let before = place.objects();
        let answer = host.run(&["prune", "--json"]).expect(11).json();
        let error = answer["error"].as_str().expect("it is a sentence");
        assert!(error.contains(&key), "{error}");
        assert_eq!(before, place.objects());
    }
    place.put(&key, &sound);
    assert_eq!(host.json(&["prune"])["kept"], 1);
}

fn a_head_that_names_nothing_keeps_everything(place: &Place) {
    let past = past(place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    place.remove(&format!("snapshots/{}.json", past.ids[2]));
    let before = place.objects();
    let host = Host::new(place).with("RUNTIME_RETENTION", "last=1");
    let _ = host.run(&["prune"]).expect(11);
    assert_eq!(before, place.objects());
}

/// Layers of a backup that goes on with the next run, or whose upload takes long.
fn layers_that_nobody_names_go_after_a_week_and_behind_the_head(place: &Place) {
    let past = past(place, &[30 * DAY, 9 * DAY]);
    let hours = |hours| past::id(SignedDuration::from_hours(hours), "0badcafe");
    let (old, ahead, young) = (hours(10 * 24), hours(8 * 24), hours(7 * 24 - 1));
    for layer in [&old, &ahead, &young] {
        place.put(&format!("layers/{layer}.tar.zst"), b"left behind");
    }
    place.put("layers/notes.txt", b"of somebody");
    let answer = past.host.json(&["prune"]);
    assert_eq!(answer["layersRemoved"], 1);
    let left = place.keys("layers/").concat();
    assert!(
        !left.contains(&old),
        "behind the head, nobody can be about to name it"
    );
    assert!(left.contains(&ahead), "a backup under way follows the head");
    assert!(left.contains(&young) && left.contains("notes.txt"));

    // Without a head there is nothing to be behind.
    place.remove("head.json");
    let person = Host::new(place);
    assert_eq!(person.json(&["prune"])["layersRemoved"], 1);
    let left = place.keys("layers/").concat();
    assert!(left.contains(&young) && !left.contains(&ahead));
    assert_eq!(assert_whole(place, &past).len(), 2);
}

fn layers_of_a_snapshot_that_goes_do_not_wait_for_a_week(place: &Place) {
    let past = past(place, &[3 * HOUR, 2 * HOUR]);
    // Nothing but the head needs another layer than that of the first one.
    for name in ["file", "of-0", "of-1"] {
        fs::remove_file(past.host.root.join(name)).expect("it is there");
    }
    tree::write(&past.host.root, "file", "the only one");
    let head = past.host.backup();
    let host = Host::new(place).with("RUNTIME_RETENTION", "last=1");
    let before = layers_on(place);
    let answer = host.json(&["prune"]);
    let left = layers_on(place);
    assert_eq!(answer["layersRemoved"], before.len() - left.len());
    assert_eq!(left, named_layers(place));
    assert!(left.len() < before.len(), "{answer}");
    assert_eq!(answer["verdicts"][0]["id"], head);
}

fn a_fenced_runtime_removes_nothing(place: &Place) {
    let past = past(place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    let first = past.host.with("RUNTIME_RETENTION", "last=1");
    let second = Host::new(place)
        .booted('b')
        .with("RUNTIME_RETENTION", "last=1");
    let _ = second.run(&["restore"]).expect(0);
    let before = place.objects();
    let answer = first.run(&["prune", "--json"]).expect(12).json();
    assert_eq!(answer["code"], "fenced");
    let error = answer["error"].as_str().expect("it is a sentence");
    assert!(error.contains(&boot_id('b')), "{error}");
    let _ = first.run(&["prune", "--dry-run"]).expect(12);
    assert_eq!(before, place.objects());
    assert_eq!(second.json(&["prune"])["kept"], 1);
}

fn a_backup_after_a_prune_goes_on_from_the_head(place: &Place) {
    let mut past = past(place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    past.host.set("RUNTIME_RETENTION", "last=1");
    assert_eq!(past.host.json(&["prune"])["kept"], 1);
    tree::write(&past.host.root, "file", "after the prune");
    let id = past.host.backup();
    past.trees.insert(id.clone(), describe(&past.host.root));
    assert_eq!(assert_whole(place, &past), [id, past.ids[2].clone()]);
}

#[test]
fn a_kill_at_any_step_leaves_whole_snapshots_and_the_next_run_finishes() {
    const STEPS: [(Kind, &str, Effect); 7] = [
        (Kind::Get, "snapshots/", Effect::Stall),
        (Kind::Delete, "snapshots/", Effect::Stall),
        (Kind::Delete, "snapshots/", Effect::StallAfter),
        (Kind::List, "layers/", Effect::Stall),
        (Kind::Delete, "layers/", Effect::Stall),
        (Kind::Delete, "layers/", Effect::StallAfter),
        (Kind::List, "probe-", Effect::Stall),
    ];
    for (kind, key, effect) in STEPS {
        let place = Place::memory();
        let past = past(&place, &[11 * DAY, 10 * DAY, 9 * DAY, 8 * DAY, 2 * HOUR]);
        let host = Host::new(&place).with("RUNTIME_RETENTION", "last=2");
        place.s3().take_requests();
        place.s3().add_fault(kind, key, 1, effect);
        let running = host.start(&["prune"]);
        place.s3().wait_for(kind, key);
        running.signal(Signal::KILL);
        assert_eq!(running.wait().signal, Some(9));
        place.s3().clear_faults();
        let left = assert_whole(&place, &past);
        assert_eq!(left[..2], [past.ids[4].clone(), past.ids[3].clone()]);

        host.json(&["prune"]);
        assert_eq!(assert_whole(&place, &past).len(), 2, "{kind:?} {key}");
        assert_eq!(layers_on(&place), named_layers(&place), "{kind:?} {key}");
        place.s3().assert_no_complaints();
    }
}

#[test]
fn kills_at_random_moments_on_a_directory_leave_whole_snapshots() {
    let place = Place::directory();
    let ages: Vec<Duration> = (8..46).rev().map(|days| days * DAY).collect();
    let past = past(&place, &ages);
    let host = Host::new(&place).with("RUNTIME_RETENTION", "last=2");
    let begin = place.keys("snapshots/").len();
    assert_eq!(begin, ages.len());
    let Place::Directory(folder) = &place else {
        unreachable!("it was made as one");
    };
    let base = folder.path().join("store").join(e2e::agent::INSTANCE);
    // Names only: what is listed may be gone before it could be read.
    let count = || {
        let folders = ["layers", "snapshots"].map(|name| fs::read_dir(base.join(name)));
        let names = folders.map(|entries| entries.expect("the store stays").count());
        names.iter().sum::<usize>()
    };
    // Each run is killed once it has removed something more, wherever that finds it.
    loop {
        let before = count();
        let mut running = host.start(&["prune"]);
        e2e::wait::until("something is removed", || {
            !running.is_running() || count() < before
        });
        if running.is_running() {
            running.signal(Signal::KILL);
        }
        let outcome = running.wait();
        let named = named_layers(&place);
        let stored = layers_on(&place);
        assert!(
            named.iter().all(|layer| stored.contains(layer)),
            "{named:?}"
        );
        if outcome.signal.is_none() {
            break;
        }
    }
    assert_eq!(assert_whole(&place, &past).len(), 2);
    assert_eq!(layers_on(&place), named_layers(&place));
}

#[test]
fn a_backup_elsewhere_that_ends_during_a_prune_keeps_its_layers() {
    let place = Place::memory();
    let past = past(&place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    let host = Host::new(&place).with("RUNTIME_RETENTION", "last=1");
    // A snapshot that shares the layer of one that goes.
    let shared = past::layers(&place.objects(), &past.ids[0]).remove(0);
    let late = past::id(SignedDuration::ZERO, "0badcafe");
    place.s3().take_requests();
    place
        .s3()
        .add_fault(Kind::Delete, "snapshots/", 1, Effect::Hold);
    let running = host.start(&["prune"]);
    place.s3().wait_for(Kind::Delete, "snapshots/");
    past::put_record(&place, &late, &[&shared]);
    place.s3().release();
    let _ = running.wait().expect(0);
    let stored = layers_on(&place);
    assert!(stored.contains(&shared), "{stored:?}");
    assert_eq!(stored, named_layers(&place));
}

#[test]
fn a_prune_beside_a_backup_elsewhere_leaves_it_alone() {
    let place = Place::memory();
    let mut past = past(&place, &[50 * HOUR, 40 * HOUR, 2 * HOUR]);
    let other = Host::new(&place).with("RUNTIME_RETENTION", "last=1");
    tree::write(&past.host.root, "file", "newer");
    // Its layer is on the store, its record is not.
    place
        .s3()
        .add_fault(Kind::Put, "snapshots/", 1, Effect::Hold);
    place.s3().take_requests();
    let backup = past.host.start(&["backup", "--json"]);
    place.s3().wait_for(Kind::Put, "snapshots/");
    assert_eq!(other.json(&["prune"])["kept"], 1);
    place.s3().release();
    let id = backup.wait().expect(0).json()["snapshot"].clone();
    let id = id.as_str().expect("it names it").to_owned();
    past.trees.insert(id.clone(), describe(&past.host.root));
    assert_eq!(assert_whole(&place, &past), [id, past.ids[2].clone()]);
}

#[test]
fn two_runs_of_one_state_directory_do_not_overlap() {
    let place = Place::memory();
    let past = past(&place, &[50 * HOUR, 2 * HOUR]);
    place
        .s3()
        .add_fault(Kind::Get, "head.json", 1, Effect::Hold);
    place.s3().take_requests();
    let prune = past.host.start(&["prune"]);
    place.s3().wait_for(Kind::Get, "head.json");
    tree::write(&past.host.root, "file", "newer");
    let backup = past.host.start(&["backup", "--timeout", "1s"]);
    let _ = backup.wait().expect(124);
    assert!(
        place.s3().take_requests().is_empty(),
        "the backup waits for the lock"
    );
    place.s3().release();
    let _ = prune.wait().expect(0);
    past.host.backup();
}

#[test]
fn more_than_one_object_goes_at_once_and_never_more_than_eight() {
    let place = Place::memory();
    let ages: Vec<Duration> = (2..22).rev().map(|hours| hours * HOUR).collect();
    let past = past(&place, &ages);
    let host = Host::new(&place).with("RUNTIME_RETENTION", "last=1");
    place
        .s3()
        .add_fault(Kind::Delete, "snapshots/", 100, Effect::Hold);
    place.s3().take_requests();
    let running = host.start(&["prune"]);
    e2e::wait::until("eight at once", || {
        place.s3().arrivals(Kind::Delete, "snapshots/") == 8
    });
    place.s3().clear_faults();
    place.s3().release();
    let _ = running.wait().expect(0);
    assert_eq!(assert_whole(&place, &past).len(), 1);
}

#[test]
fn leftovers_of_writers_that_died_go_when_they_are_old() {
    let place = Place::directory();
    let past = past(&place, &[2 * HOUR]);
    let Place::Directory(folder) = &place else {
        unreachable!("it was made as one");
    };
    let base = folder.path().join("store").join(e2e::agent::INSTANCE);
    let under_way = ".under-way-0123456789abcdef";
    let names = [
        under_way.to_owned(),
        format!("layers/{under_way}"),
        format!("snapshots/{under_way}"),
        "probe-0123456789abcdef".to_owned(),
    ];
    let foreign = ["notes", "layers/probe-notes", ".lock"];
    let age = |name: &str, age: Duration| {
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(base.join(name))
            .expect("can write");
        file.set_modified(SystemTime::now() - age)
            .expect("it is ours");
    };
    for name in &names {
        age(name, Duration::from_mins(59));
    }
    for name in foreign {
        age(name, 100 * HOUR);
    }
    let _ = past.host.run(&["prune"]).expect(0);
    assert!(names.iter().all(|name| base.join(name).exists()));
    for name in &names {
        age(name, Duration::from_mins(61));
    }
    let _ = past.host.run(&["prune", "--dry-run"]).expect(0);
    assert!(names.iter().all(|name| base.join(name).exists()));
    let outcome = past.host.run(&["prune"]).expect(0);
    assert_eq!(outcome.logged("leftovers removed")[0]["count"], 4);
    assert!(names.iter().all(|name| !base.join(name).exists()));
    assert!(foreign.iter().all(|name| base.join(name).exists()));
    assert_whole(&place, &past);
}

#[test]
fn uploads_in_parts_that_a_killed_agent_left_open_are_aborted_when_they_are_old() {
    let place = Place::memory();
    let past = past(&place, &[2 * HOUR]);
    tree::write(&past.host.root, "noise", tree::noise(1, 20 << 20));
    place
        .s3()
        .add_fault(Kind::Complete, "layers/", 1, Effect::Stall);
    let running = past.host.start(&["backup"]);
    place.s3().wait_for(Kind::Complete, "layers/");
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(9));

    place.s3().age_uploads(167 * HOUR);
    past.host.json(&["prune"]);
    assert_eq!(place.s3().open_uploads(), 1, "it may be under way");
    place.s3().age_uploads(2 * HOUR);
    past.host.json(&["prune", "--dry-run"]);
    assert_eq!(place.s3().open_uploads(), 1);
    // Somebody else's in the same bucket.
    let elsewhere = Host::new(&place).with("RUNTIME_INSTANCE_ID", "the-instance-2");
    let _ = elsewhere.run(&["prune"]).expect(0);
    assert_eq!(place.s3().open_uploads(), 1);
    let outcome = past.host.run(&["prune"]).expect(0);
    assert_eq!(outcome.logged("leftovers removed")[0]["count"], 1);
    assert_eq!(place.s3().open_uploads(), 0);
    place.s3().assert_no_complaints();
}

#[test]
fn open_uploads_are_found_on_a_server_of_somebody_elses_making() {
    let place = Place::moto();
    let Place::Moto(moto, bucket) = &place else {
        unreachable!("it was made as one");
    };
    let key = format!("{PREFIX}layers/a layer & more.tar.zst");
    moto.begin_upload(bucket, &key.replace(' ', "%20").replace('&', "%26"));
    moto.begin_upload(bucket, "some/prefix/the-instance-2/layers/another");
    assert_eq!(moto.open_uploads(bucket), 2);
    // It says of every upload that it was begun in 2010.
    let _ = Host::new(&place).run(&["prune"]).expect(0);
    assert_eq!(moto.open_uploads(bucket), 1);
}

#[test]
fn an_old_probe_on_s3_goes_and_a_store_that_does_not_tell_is_no_failure() {
    let place = Place::memory();
    let past = past(&place, &[2 * HOUR]);
    // The server says that everything was written in January.
    place.put("probe-0123456789abcdef", b"first");
    let refusal = Effect::Status {
        status: 403,
        code: "AccessDenied",
        retry_after: None,
    };
    place.s3().add_fault(Kind::List, "probe-", 1, refusal);
    let outcome = past.host.run(&["prune"]).expect(0);
    assert_eq!(outcome.logged("leftovers cannot be removed").len(), 1);
    assert_eq!(place.keys("probe-").len(), 1);
    let _ = past.host.run(&["prune"]).expect(0);
    assert!(place.keys("probe-").is_empty());

    let place = Place::moto();
    let host = Host::new(&place);
    place.put("probe-0123456789abcdef", b"first");
    let _ = host.run(&["prune"]).expect(0);
    assert_eq!(place.keys("probe-").len(), 1, "it is a moment old");
}
