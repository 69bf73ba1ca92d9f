//! Moves snapshots into the past: the agent reads the real clock, so a test that needs old ones makes them new and then
//! gives snapshots and layers the ids of another time, everywhere an id is written and under every checksum.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde_json::Value;

use crate::agent::{Host, Place, boot_id};
use crate::forge;

/// An id of so long ago, negative for the future.
pub fn id(age: SignedDuration, suffix: &str) -> String {
    let time = (Timestamp::now() - age).to_zoned(TimeZone::UTC);
    format!("{}-{suffix}", time.strftime("%Y%m%dT%H%M%S%3fZ"))
}

fn suffix(id: &str) -> &str {
    &id[id.len() - 8..]
}

/// Gives each snapshot, and the layers that it is the first to name, this age. Returns their new ids in the same order.
///
/// What a host remembers is not true any more afterwards: let it lose its state and restore.
pub fn set_back(place: &Place, snapshots: &[(String, Duration)]) -> Vec<String> {
    let objects = place.objects();
    let mut ids: HashMap<String, String> = HashMap::new();
    let mut new = Vec::new();
    for (old, age) in snapshots {
        let age = SignedDuration::try_from(*age).expect("it is no age of the universe");
        new.push(id(age, suffix(old)));
        ids.extend(new.last().map(|id| (old.clone(), id.clone())));
        for layer in layers(&objects, old) {
            // Made a moment after the snapshot's own id was.
            let moved = id(age - SignedDuration::from_millis(1), suffix(&layer));
            ids.entry(layer).or_insert(moved);
        }
    }
    let mut moved = BTreeMap::new();
    for (key, bytes) in &objects {
        if key.starts_with("snapshots/") {
            let mut record: Value = serde_json::from_slice(bytes).expect("a record is JSON");
            let named = record["layers"].as_array_mut().expect("it is a list");
            for layer in named {
                let key = forge::key(layer);
                let bytes = with_index_renamed(&objects[&key], layer, &ids);
                moved.insert(renamed(&key, &ids), bytes);
            }
            moved.insert(renamed(key, &ids), seal(&record, &ids));
        } else if key == "head.json" {
            let head: Value = serde_json::from_slice(bytes).expect("a head is JSON");
            moved.insert(key.clone(), seal(&head, &ids));
        } else if !key.starts_with("layers/") {
            moved.insert(key.clone(), bytes.clone());
        }
    }
    for key in objects.keys() {
        place.remove(key);
    }
    for (key, bytes) in &moved {
        place.put(key, bytes);
    }
    new
}

/// Lets so many seconds go by since the host's agent last asked its store what that has; negative: sets its clock back.
pub fn let_pass(host: &Host, seconds: i64) {
    change_facts(host, |facts| {
        let confirmed = facts["confirmed"]
            .as_i64()
            .expect("the store was asked once");
        facts["confirmed"] = (confirmed - seconds).into();
    });
}

/// Changes what the host's agent remembers.
pub fn change_facts(host: &Host, change: impl FnOnce(&mut Value)) {
    let path = host.state.join("state.json");
    let bytes = fs::read(&path).expect("the agent remembers something");
    let mut facts = serde_json::from_slice(&bytes).expect("it is JSON");
    change(&mut facts);
    fs::write(&path, forge::seal(facts)).expect("can write");
}

/// Writes a record of this id that follows nothing and names these layers, as if a writer had just written it.
pub fn put_record(place: &Place, id: &str, layers: &[&str]) {
    let layer = |id: &&str| {
        serde_json::json!({
            "id": id, "size": 1000, "rawSize": 2000, "sha256": "", "indexOffset": 8, "indexSize": 1, "indexSha256": "",
        })
    };
    let record = serde_json::json!({
        "format": 1, "id": id, "parent": null, "sequence": 1, "time": "2026-01-01T00:00:00.000Z", "writer": boot_id('f'),
        "tool": "0.1.0", "consistency": "instant", "rounds": 1, "pauseMs": null, "fork": true,
        "totals": { "entries": 1, "files": 0, "bytes": 0, "storedBytes": 1000, "skipped": 0 },
        "layers": layers.iter().map(layer).collect::<Vec<_>>(),
    });
    place.put(&format!("snapshots/{id}.json"), &forge::seal(record));
}

/// Layers that the record of a snapshot names.
pub fn layers(objects: &BTreeMap<String, Vec<u8>>, snapshot: &str) -> Vec<String> {
    let bytes = &objects[&format!("snapshots/{snapshot}.json")];
    let record: Value = serde_json::from_slice(bytes).expect("a record is JSON");
    let layers = record["layers"].as_array().expect("it is a list").iter();
    let id = |layer: &Value| layer["id"].as_str().expect("it has one").to_owned();
    layers.map(id).collect()
}

fn renamed(text: &str, ids: &HashMap<String, String>) -> String {
    ids.iter()
        .fold(text.to_owned(), |text, (old, new)| text.replace(old, new))
}

/// The object under its new ids.
fn seal(object: &Value, ids: &HashMap<String, String>) -> Vec<u8> {
    let object = serde_json::from_str(&renamed(&object.to_string(), ids));
    forge::seal(object.expect("ids are replaced by ids"))
}

/// The layer with other ids in its index, whose new place and checksums go into the record's word on it.
fn with_index_renamed(layer: &[u8], word: &mut Value, ids: &HashMap<String, String>) -> Vec<u8> {
    let mut layer = forge::Layer::open(layer, word);
    let text = renamed(&layer.text(), ids);
    layer.pack(&text);
    layer.seal(word)
}
