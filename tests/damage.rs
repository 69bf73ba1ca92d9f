//! What is not as it was written is named and never used: exit code 11, the root untouched, nothing left beside it.

use e2e::agent::{Host, Outcome, Place};
use e2e::on_every_store;
use e2e::s3::{Effect, Fault, Kind};
use e2e::tree::{self, Tree, assert_same, describe};

on_every_store!(
    a_damaged_head_is_named,
    a_damaged_record_is_named_and_does_not_hide_the_others,
    a_missing_record_that_the_head_names_is_damage,
    a_missing_layer_is_named,
    a_byte_changed_anywhere_in_a_layer_is_found,
    a_layer_that_ends_early_is_damage,
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
    let record: serde_json::Value =
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
    let record: serde_json::Value =
        serde_json::from_slice(&objects[&format!("snapshots/{snapshot}.json")])
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
