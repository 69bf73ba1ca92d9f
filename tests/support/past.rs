//! Moves snapshots into the past: the agent reads the real clock, so a test that needs old ones makes them new and then
//! gives snapshots and layers the ids of another time, everywhere an id is written and under every checksum.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp, tz::TimeZone};
use serde_json::Value;

use crate::agent::{Place, boot_id};
use crate::tree::sha256_hex;

/// In front of the content of a skippable frame: magic and length.
const FRAME: usize = 8;
/// The whole frame of the footer at the end of a layer.
const FOOTER: usize = 72;

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
                let key = format!(
                    "layers/{}.tar.zst",
                    layer["id"].as_str().expect("it has one")
                );
                let bytes = with_index_renamed(&objects[&key], layer, &ids);
                moved.insert(renamed(&key, &ids), bytes);
            }
            moved.insert(renamed(key, &ids), seal(record, &ids));
        } else if key == "head.json" {
            let head = serde_json::from_slice(bytes).expect("a head is JSON");
            moved.insert(key.clone(), seal(head, &ids));
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
    place.put(
        &format!("snapshots/{id}.json"),
        &seal(record, &HashMap::new()),
    );
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

/// The object with its checksum, as its last member.
fn seal(mut object: Value, ids: &HashMap<String, String>) -> Vec<u8> {
    let members = object.as_object_mut().expect("it is an object");
    members.remove("sha256");
    let text = renamed(&object.to_string(), ids);
    let body = text.strip_suffix('}').expect("an object ends so");
    format!("{body},\"sha256\":\"{}\"}}\n", sha256_hex(body.as_bytes())).into_bytes()
}

/// The layer with other ids in its index, whose new place and checksums go into the record's word on it.
fn with_index_renamed(layer: &[u8], word: &mut Value, ids: &HashMap<String, String>) -> Vec<u8> {
    let number = |name: &str| {
        let number = word[name].as_u64().expect("it is a number");
        usize::try_from(number).expect("layers of tests are small")
    };
    let (offset, size) = (number("indexOffset"), number("indexSize"));
    let text = zstd::decode_all(&layer[offset..offset + size]).expect("an index unpacks");
    let text = String::from_utf8(text).expect("an index is JSON");
    let index = zstd::encode_all(renamed(&text, ids).as_bytes(), 1).expect("an index packs");
    let footer = &layer[offset + size..];
    assert_eq!(footer.len(), FOOTER, "the footer follows the index");
    let length = index.len() as u64;
    let mut bytes = layer[..offset - FRAME / 2].to_vec();
    bytes.extend(&length.to_le_bytes()[..FRAME / 2]);
    bytes.extend(&index);
    // Frame header, name and offset stay; then come length, length of the stream, and digest.
    bytes.extend(&footer[..24]);
    bytes.extend(length.to_le_bytes());
    bytes.extend(&footer[32..40]);
    bytes.extend(digest(&index));
    word["indexSize"] = length.into();
    word["indexSha256"] = sha256_hex(&index).into();
    word["size"] = bytes.len().into();
    word["sha256"] = sha256_hex(&bytes).into();
    bytes
}

fn digest(bytes: &[u8]) -> Vec<u8> {
    let hex = sha256_hex(bytes).into_bytes();
    let pairs = hex.chunks(2);
    let byte = |pair: &[u8]| {
        let pair = std::str::from_utf8(pair).expect("hexadecimal is text");
        u8::from_str_radix(pair, 16).expect("it is hexadecimal")
    };
    pairs.map(byte).collect()
}
