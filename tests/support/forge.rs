//! Makes a store lie: takes layers, records and heads apart and puts them together again under right checksums, as only
//! somebody could who may write to the store.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::agent::Place;
use crate::tree::sha256_hex;

/// In front of the content of a skippable frame: magic and length.
const FRAME: usize = 8;
/// The whole frame of the footer at the end of a layer.
const FOOTER: usize = 72;

/// A layer taken apart.
pub struct Layer {
    /// The frames of the tarball.
    pub data: Vec<u8>,
    /// The index as it is stored, compressed.
    pub index: Vec<u8>,
    /// What is in the footer about the tarball's length.
    raw_size: u64,
}

impl Layer {
    /// Takes a layer apart; what the record says about it tells where.
    pub fn open(bytes: &[u8], word: &Value) -> Self {
        let number = |name: &str| word[name].as_u64().expect("it is a number");
        let at = usize::try_from(number("indexOffset")).expect("layers of tests are small");
        let size = usize::try_from(number("indexSize")).expect("layers of tests are small");
        assert_eq!(bytes.len(), at + size + FOOTER, "the footer is at the end");
        Self {
            data: bytes[..at - FRAME].to_vec(),
            index: bytes[at..at + size].to_vec(),
            raw_size: number("rawSize"),
        }
    }

    /// The index as text, a line for each path.
    pub fn text(&self) -> String {
        let text = zstd::decode_all(&self.index[..]).expect("an index unpacks");
        String::from_utf8(text).expect("an index is JSON")
    }

    /// Replaces the index.
    pub fn pack(&mut self, text: &str) {
        self.index = zstd::encode_all(text.as_bytes(), 1).expect("an index packs");
    }

    /// The bytes of the layer; what a record has to say about them goes into `word`.
    pub fn seal(&self, word: &mut Value) -> Vec<u8> {
        let digest = ring::digest::digest(&ring::digest::SHA256, &self.index);
        let offset = (self.data.len() + FRAME) as u64;
        let mut bytes = self.data.clone();
        bytes.extend(skippable(self.index.len()));
        bytes.extend(&self.index);
        bytes.extend(skippable(FOOTER - FRAME));
        bytes.extend(b"OCLAYER1");
        for number in [offset, self.index.len() as u64, self.raw_size] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(digest.as_ref());
        word["indexOffset"] = offset.into();
        word["indexSize"] = self.index.len().into();
        word["indexSha256"] = sha256_hex(&self.index).into();
        word["size"] = bytes.len().into();
        word["sha256"] = sha256_hex(&bytes).into();
        bytes
    }
}

fn skippable(content: usize) -> Vec<u8> {
    let content = u32::try_from(content).expect("layers of tests are small");
    [0x184D_2A50_u32.to_le_bytes(), content.to_le_bytes()].concat()
}

/// An object with its checksum, as its last member.
pub fn seal(mut object: Value) -> Vec<u8> {
    let members = object.as_object_mut().expect("it is an object");
    members.remove("sha256");
    let text = object.to_string();
    let body = text.strip_suffix('}').expect("an object ends so");
    format!("{body},\"sha256\":\"{}\"}}\n", sha256_hex(body.as_bytes())).into_bytes()
}

/// Changes a sealed object.
pub fn object(place: &Place, key: &str, change: impl FnOnce(&mut Value)) {
    let bytes = &place.objects()[key];
    let mut object: Value = serde_json::from_slice(bytes).expect("it is JSON");
    change(&mut object);
    place.put(key, &seal(object));
}

/// Changes the newest layer of a snapshot, and the record with it.
pub fn layer(place: &Place, snapshot: &str, change: impl FnOnce(&mut Layer)) {
    let objects = place.objects();
    object(place, &format!("snapshots/{snapshot}.json"), |record| {
        let layers = record["layers"].as_array_mut().expect("it is a list");
        let word = layers.last_mut().expect("a snapshot has a layer");
        let key = key(word);
        let mut layer = Layer::open(&objects[&key], word);
        change(&mut layer);
        place.put(&key, &layer.seal(word));
    });
}

/// Changes the lines of the newest layer's index, the header first.
pub fn index(place: &Place, snapshot: &str, change: impl FnOnce(&mut Vec<Value>)) {
    layer(place, snapshot, |layer| {
        let text = layer.text();
        let lines = text.lines().map(serde_json::from_str);
        let mut lines: Vec<Value> = lines.collect::<Result<_, _>>().expect("a line is JSON");
        change(&mut lines);
        let lines: Vec<String> = lines.iter().map(|line| format!("{line}\n")).collect();
        layer.pack(&lines.concat());
    });
}

/// The key of the layer that a record has this word on.
pub fn key(word: &Value) -> String {
    format!(
        "layers/{}.tar.zst",
        word["id"].as_str().expect("it has one")
    )
}

/// Whether any object has these bytes, as it is or unpacked: data, indexes, records.
pub fn holds(objects: &BTreeMap<String, Vec<u8>>, secret: &[u8]) -> bool {
    let has = |bytes: &[u8]| bytes.windows(secret.len()).any(|window| window == secret);
    let mut words: BTreeMap<String, Value> = BTreeMap::new();
    for (name, bytes) in objects {
        if name.starts_with("snapshots/") {
            let record: Value = serde_json::from_slice(bytes).expect("a record is JSON");
            let layers = record["layers"].as_array().expect("it is a list");
            words.extend(layers.iter().map(|word| (key(word), word.clone())));
        }
    }
    objects.iter().any(|(name, bytes)| {
        has(bytes)
            || words.get(name).is_some_and(|word| {
                let layer = Layer::open(bytes, word);
                let data = zstd::decode_all(&layer.data[..]).expect("a layer unpacks");
                has(&data) || has(layer.text().as_bytes())
            })
    })
}
