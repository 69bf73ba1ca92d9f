//! What is not as it was written is named and never used: exit code 11, the root untouched, nothing left beside it.

use e2e::agent::{Host, Outcome, Place};
use e2e::forge;
use e2e::on_every_store;
use e2e::s3::{Effect, Fault, Kind};
use e2e::tree::{self, Tree, assert_same, describe};
use serde_json::{Value, json};

on_every_store!(
    a_damaged_head_is_named,
    a_damaged_record_is_named_and_does_not_hide_the_others,
    a_missing_record_that_the_head_names_is_damage,
    a_missing_layer_is_named,
    a_byte_changed_anywhere_in_a_layer_is_found,
    a_layer_that_ends_early_is_damage,
    no_damage_blocks_what_does_not_need_it_and_each_says_what_helps,
    a_damaged_head_is_replaced_by_whoever_restored_beside_it,
    a_base_that_is_damaged_is_mended_by_a_whole_snapshot,
);

/// A host with a snapshot of some noise, and a root that has gone on since.
fn host(place: &Place) -> (Host, String, Tree) {
    let host = Host::new(place);
    tree::write(&host.root, "noise", tree::noise(3, 5 << 20));
    tree::write(&host.root, "directory/file", "file");
    let snapshot = host.backup();
    // Nothing of the snapshot is right on the disk any more: all of it has to come from the store.
    tree::write(&host.root, "noise", tree::noise(4, 5 << 20));
    tree::write(&host.root, "directory/file", "changed since");
    let before = describe(&host.root);
    (host, snapshot, before)
}

/// A restore fails, names the damaged object, and has changed nothing.
fn assert_refused(host: &Host, before: &Tree, key: &str) -> Outcome {
    for state in ["kept", "lost"] {
        if state == "lost" {
            std::fs::remove_dir_all(&host.state).expect("there is a state");
        }
        let outcome = host.run(&["restore", "--json"]).expect(11);
        let answer = outcome.json();
        assert_eq!(answer["code"], "damaged");
        let error = answer["error"].as_str().expect("it is a sentence");
        assert!(error.contains(key), "{error} names {key}");
        assert_same(before, &describe(&host.root));
        assert_eq!(host.leftovers(), [""; 0]);
    }
    host.run(&["restore"]).expect(11)
}

fn flip(place: &Place, key: &str, at: usize) -> Vec<u8> {
    let sound = place.objects().remove(key).expect("the object is there");
    let mut bytes = sound.clone();
    bytes[at] ^= 1;
    place.put(key, &bytes);
    sound
}

fn a_damaged_head_is_named(place: &Place) {
    let (host, _, before) = host(place);
    flip(place, "head.json", 20);
    assert_refused(&host, &before, "head.json");
    let backup = host.run(&["backup"]).expect(11);
    assert!(
        backup.sentence().contains("head.json"),
        "{}",
        backup.sentence()
    );
    place.put("head.json", b"");
    assert_refused(&host, &before, "head.json");
}

fn a_damaged_record_is_named_and_does_not_hide_the_others(place: &Place) {
    let (host, old, _) = host(place);
    let new = host.backup();
    tree::write(&host.root, "directory/file", "changed once more");
    let before = describe(&host.root);
    let key = format!("snapshots/{new}.json");
    flip(place, &key, 30);
    assert_refused(&host, &before, &key);
    let list = host.run(&["list", "--json"]).expect(0);
    assert_eq!(list.json()["snapshots"][0]["id"], old);
    assert_eq!(list.json()["snapshots"].as_array().map(Vec::len), Some(1));
    assert!(
        list.stderr.contains(&key),
        "the damaged one is named: {}",
        list.stderr
    );
    // The way out.
    assert_eq!(host.json(&["restore", &old])["snapshot"], old);
}

fn a_missing_record_that_the_head_names_is_damage(place: &Place) {
    let (host, snapshot, before) = host(place);
    let key = format!("snapshots/{snapshot}.json");
    place.remove(&key);
    assert_refused(&host, &before, &key);
    // One that a person asks for does not exist.
    let _ = host
        .run(&["restore", "20200101T000000000Z-00000000"])
        .expect(10);
}

fn a_missing_layer_is_named(place: &Place) {
    let (host, _, before) = host(place);
    let key = place.keys("layers/").remove(0);
    place.remove(&key);
    assert_refused(&host, &before, &key);
}

fn a_byte_changed_anywhere_in_a_layer_is_found(place: &Place) {
    let (host, snapshot, before) = host(place);
    let key = place.keys("layers/").remove(0);
    let record: Value =
        serde_json::from_slice(&place.objects()[&format!("snapshots/{snapshot}.json")])
            .expect("it is JSON");
    let offset = |name: &str| {
        let number = record["layers"][0][name].as_u64().expect("it is a number");
        usize::try_from(number).expect("it is small")
    };
    let (index, length) = (offset("indexOffset"), offset("indexSize"));
    for at in [
        0,
        100_000,
        index - 100,
        index,
        index + length / 2,
        index + length - 1,
    ] {
        let sound = flip(place, &key, at);
        assert_refused(&host, &before, &key);
        place.put(&key, &sound);
    }
    assert_eq!(
        host.json(&["restore"])["snapshot"],
        snapshot,
        "sound again, it is restored"
    );
}

fn a_layer_that_ends_early_is_damage(place: &Place) {
    let (host, _, before) = host(place);
    let key = place.keys("layers/").remove(0);
    let sound = place.objects().remove(&key).expect("the object is there");
    for length in [0, 1000, sound.len() / 2, sound.len() - 100] {
        place.put(&key, &sound[..length]);
        assert_refused(&host, &before, &key);
    }
}

#[test]
fn content_that_is_damaged_on_the_way_is_not_used() {
    for key in ["head.json", "snapshots/", "layers/"] {
        let place = Place::memory();
        let (host, snapshot, before) = host(&place);
        std::fs::remove_dir_all(&host.state).expect("there is a state");
        place
            .s3()
            .add_fault(Kind::Get, key, 2, Effect::WrongContent);
        let _ = host.run(&["restore"]).expect(11);
        assert_same(&before, &describe(&host.root));
        assert_eq!(host.leftovers(), [""; 0]);
        place.s3().clear_faults();
        assert_eq!(
            host.json(&["restore"])["snapshot"],
            snapshot,
            "the store itself is sound"
        );
    }
}

#[test]
fn content_that_is_damaged_on_the_way_once_is_fetched_again() {
    let place = Place::memory();
    let (host, snapshot, _) = host(&place);
    let restored = Host::new(&place);
    let _ = restored.run(&["restore"]).expect(0);
    let want = describe(&restored.root);
    // Of a layer: its footer, its index, its frames.
    for (key, skip) in [
        ("head.json", 0),
        ("snapshots/", 0),
        ("layers/", 0),
        ("layers/", 1),
    ] {
        place.s3().add(Fault {
            kind: Kind::Get,
            key,
            skip,
            times: 1,
            effect: Effect::WrongContent,
        });
        let other = Host::new(&place);
        assert_eq!(other.json(&["restore"])["snapshot"], snapshot);
        assert_same(&want, &describe(&other.root));
    }
    for skip in 0..3 {
        place.s3().add(Fault {
            kind: Kind::Get,
            key: "layers/",
            skip,
            times: 1,
            effect: Effect::WrongContent,
        });
        let _ = host.run(&["verify", "--deep"]).expect(0);
    }
}

/// Runs zstd over bytes.
fn zstd(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let folder = e2e::agent::folder();
    let path = folder.path().join("input");
    std::fs::write(&path, input).expect("can write");
    let mut command = std::process::Command::new("zstd");
    let output = command.args(arguments).arg("-c").arg(path).output();
    output.expect("zstd is installed").stdout
}

#[test]
fn an_index_that_was_written_anew_is_not_believed() {
    let place = Place::directory();
    let (host, snapshot, before) = host(&place);
    let key = place.keys("layers/").remove(0);
    let objects = place.objects();
    let record: Value = serde_json::from_slice(&objects[&format!("snapshots/{snapshot}.json")])
        .expect("it is JSON");
    let number = |name: &str| {
        let number = record["layers"][0][name].as_u64().expect("it is a number");
        usize::try_from(number).expect("it is small")
    };
    let (start, size) = (number("indexOffset"), number("indexSize"));
    let index = zstd(&["-d"], &objects[&key][start..start + size]);
    let index = String::from_utf8(index).expect("an index is JSON lines");
    let forged = index.replacen("\"mode\":420", "\"mode\":511", 1);
    assert_ne!(index, forged, "a file of mode 0644 is there");
    let mut forged = zstd(&["-19"], forged.as_bytes());
    // As long as it was: what is missing is a skippable frame.
    let missing = size
        .checked_sub(forged.len() + 8)
        .expect("the highest level saves a few bytes");
    forged.extend([0x50, 0x2a, 0x4d, 0x18]);
    forged.extend(u32::try_from(missing).expect("it is small").to_le_bytes());
    forged.resize(size, 0);
    let mut layer = objects[&key].clone();
    layer[start..start + size].copy_from_slice(&forged);
    place.put(&key, &layer);
    assert_refused(&host, &before, &key);
}

/// What can be wrong with a head, a record and a layer; `None`: it is gone.
fn damages(place: &Place, new: &str) -> Vec<(&'static str, String, Option<Vec<u8>>)> {
    let objects = place.objects();
    let (head, record) = ("head.json".to_owned(), format!("snapshots/{new}.json"));
    let layer = new_layer(place, new);
    let changed = |key: &str, change: &dyn Fn(&mut Value)| {
        let mut object = serde_json::from_slice(&objects[key]).expect("it is JSON");
        change(&mut object);
        Some(forge::seal(object))
    };
    let flipped = |key: &str| {
        let mut bytes = objects[key].clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Some(bytes)
    };
    let mut all = Vec::new();
    for key in [&head, &record] {
        all.extend([
            ("empty", key.clone(), Some(Vec::new())),
            ("no JSON", key.clone(), Some(b"no JSON\n".to_vec())),
            ("too large", key.clone(), Some(vec![b'x'; 2 << 20])),
            ("under a wrong checksum", key.clone(), flipped(key)),
            (
                "of another format",
                key.clone(),
                changed(key, &|object| object["format"] = 2.into()),
            ),
        ]);
    }
    let elsewhere = |object: &mut Value| object["snapshot"] = UNKNOWN.into();
    all.extend([
        (
            "of no snapshot that exists",
            head.clone(),
            changed(&head, &elsewhere),
        ),
        (
            "of nobody",
            head.clone(),
            changed(&head, &|object| object["writer"] = "".into()),
        ),
        ("gone", record, None),
        ("gone", layer.clone(), None),
        ("empty", layer.clone(), Some(Vec::new())),
        ("under a wrong checksum", layer.clone(), flipped(&layer)),
    ]);
    all
}

const UNKNOWN: &str = "20200101T000000000Z-00000000";

/// The newest layer of a snapshot.
fn new_layer(place: &Place, snapshot: &str) -> String {
    let record = &place.objects()[&format!("snapshots/{snapshot}.json")];
    let record: Value = serde_json::from_slice(record).expect("it is JSON");
    let layers = record["layers"].as_array().expect("it is a list");
    forge::key(layers.last().expect("it has one"))
}

fn put(place: &Place, key: &str, bytes: Option<&[u8]>) {
    match bytes {
        Some(bytes) => place.put(key, bytes),
        None => place.remove(key),
    }
}

/// What helps is a command of this program.
fn assert_helps(text: &str, what: &str) {
    let commands = ["`backup-agent list`", "`backup-agent restore ID`"];
    let is_named = commands.iter().any(|command| text.contains(command));
    assert!(is_named, "{what}: {text}");
}

fn no_damage_blocks_what_does_not_need_it_and_each_says_what_helps(place: &Place) {
    let (host, old, _) = host(place);
    let new = host.backup();
    tree::write(&host.root, "directory/file", "changed once more");
    let runtime = Host::new(place).booted('7');
    let sound = place.objects();
    for (what, key, bytes) in damages(place, &new) {
        put(place, &key, bytes.as_deref());
        let what = format!("{key} is {what}");
        let is_head = key == "head.json";

        // What does not need it.
        let list = host.run(&["list", "--json"]).expect(0).json();
        let listed = list["snapshots"].as_array().expect("it is a list");
        assert!(
            listed.iter().any(|snapshot| snapshot["id"] == old),
            "{what}"
        );
        assert!(
            listed.iter().all(|snapshot| snapshot["fork"] == false),
            "{what}: {list}"
        );
        let is_listed_as_damaged = list["damaged"][&key].is_string();
        let is_seen = !key.starts_with("layers/") && bytes.is_some() && !what.contains("exists");
        assert_eq!(is_listed_as_damaged, is_seen, "{what}: {list}");
        assert_eq!(host.json(&["verify", &old])["damaged"], json!({}), "{what}");
        let target = host.folder.path().join("target");
        let path = target.display().to_string();
        let beside = host.json(&["restore", &old, "--target", &path]);
        assert_eq!(beside["snapshot"], old, "{what}");
        std::fs::remove_dir_all(target).expect("it was made");
        let elsewhere = Host::new(place);
        assert_eq!(
            elsewhere.json(&["restore", &old])["snapshot"],
            old,
            "{what}"
        );
        assert_eq!(host.json(&["restore", &old, "--dry-run"])["snapshot"], old);
        if is_head {
            assert_eq!(host.json(&["verify", &new])["damaged"], json!({}), "{what}");
        }

        // What does: by hand, and the runtime's.
        let all = host.run(&["verify", "all", "--deep"]);
        let is_found = !what.contains("exists") && (bytes.is_some() || key.starts_with("layers/"));
        let all = all.expect(if is_found { 11 } else { 0 });
        if is_found {
            assert!(all.stdout.contains(&key), "{what}: {}", all.stdout);
            assert_helps(&all.stdout, &what);
        }
        for host in [&host, &runtime] {
            for arguments in [&["restore"][..], &["restore", "latest", "--json"]] {
                let outcome = host.run(arguments).expect(11);
                let said = format!("{}{}", outcome.stdout, outcome.stderr);
                let named = if what.contains("exists") {
                    UNKNOWN
                } else {
                    &key
                };
                assert!(said.contains(named), "{what}: {said}");
                assert_helps(&said, &what);
            }
        }
        if is_head && !what.contains("exists") {
            let said = host.run(&["backup", "--confirm"]).expect(11).sentence();
            assert!(said.contains("`backup-agent restore ID`"), "{what}: {said}");
            assert_helps(&host.run(&["prune"]).expect(11).sentence(), &what);
        }
        for (key, bytes) in &sound {
            put(place, key, Some(bytes));
        }
    }
}

fn a_damaged_head_is_replaced_by_whoever_restored_beside_it(place: &Place) {
    let (host, old, before) = host(place);
    let new = host.backup();
    let sound = place.objects().remove("head.json").expect("there is one");
    for (number, bytes) in [&b""[..], b"no JSON\n"].into_iter().enumerate() {
        place.put("head.json", bytes);
        // Nobody else, and not before.
        let other = Host::new(place);
        tree::write(&other.root, "file", "other");
        for host in [&host, &other, &Host::new(place).booted('8')] {
            let _ = host.run(&["backup", "--confirm"]).expect(11);
        }
        // One that was damaged in another way meanwhile is not the one that was seen.
        let restored = host.json(&["restore", &new]);
        assert_eq!(restored["snapshot"], new);
        assert_same(&before, &describe(&host.root));
        place.put("head.json", b"something else");
        let _ = host.run(&["backup", "--confirm"]).expect(11);
        place.put("head.json", bytes);
        let snapshot = host.backup();
        assert_eq!(place.head()["snapshot"], snapshot.as_str());
        let list = host.json(&["list"]);
        let newest = &list["snapshots"][0];
        assert_eq!(
            (&newest["head"], &newest["parent"]),
            (&json!(true), &json!(new)),
            "{list}"
        );
        assert!(list["snapshots"].as_array().is_some_and(|all| {
            all.iter()
                .all(|one| one["fork"] == false || one["id"] != old)
        }));
        let booted = Host::new(place).booted(
            char::from_digit(u32::try_from(number).expect("it is small"), 10).expect("it is one"),
        );
        assert_eq!(booted.json(&["restore"])["snapshot"], snapshot);
        // The next round is another writer's again.
        place.put("head.json", &sound);
        let _ = host.json(&["restore", &new]);
    }
}

fn a_base_that_is_damaged_is_mended_by_a_whole_snapshot(place: &Place) {
    let (host, _, _) = host(place);
    let new = host.backup();
    let layer = new_layer(place, &new);
    flip(place, &layer, 1000);
    // It builds on what it cannot know to be damaged.
    tree::write(&host.root, "directory/file", "changed once more");
    host.backup();
    let said = host.run(&["verify", "--deep"]).expect(11).stdout;
    assert!(said.contains("`backup-agent backup --whole`"), "{said}");
    let before = describe(&host.root);
    let answer = host.json(&["backup", "--whole"]);
    assert_eq!(answer["unchanged"], false);
    let _ = host.run(&["verify", "--deep"]).expect(0);
    let whole = answer["snapshot"].as_str().expect("it has an id");
    assert_eq!(place.head()["snapshot"], whole);
    assert_eq!(host.json(&["backup"])["unchanged"], true);
    let other = Host::new(place);
    assert_eq!(other.json(&["restore"])["snapshot"], whole);
    assert_same(&before, &describe(&other.root));

    // A layer that is gone is found by itself, and so is a record that is damaged.
    for is_layer in [true, false] {
        let newest = place.head()["snapshot"].as_str().map(str::to_owned);
        let newest = newest.expect("it names one");
        let key = if is_layer {
            new_layer(place, &newest)
        } else {
            format!("snapshots/{newest}.json")
        };
        let sound = place.objects().remove(&key).expect("it is there");
        if is_layer {
            place.remove(&key);
        } else {
            flip(place, &key, 30);
        }
        let answer = host.json(&["backup", "--confirm"]);
        assert_eq!(answer["unchanged"], false, "{key}");
        let _ = host.run(&["verify", "--deep"]).expect(0);
        place.put(&key, &sound);
        let _ = host.json(&["restore"]);
    }
}
