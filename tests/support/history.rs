//! A store with a history of some days, made once and copied as often as a test needs it; and what must be true of the
//! objects of any store, whatever was done to those who wrote them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::SignedDuration;
use serde_json::Value;

use crate::agent::{Host, INSTANCE, PREFIX, Place};
use crate::past;
use crate::tree::{self, Tree, describe, sha256_hex};

/// Ages of the snapshots in hours.
const AGES: [u64; 4] = [50, 40, 30, 2];

/// The objects, the snapshots from old to new, and their trees.
pub struct History {
    objects: BTreeMap<String, Vec<u8>>,
    pub ids: Vec<String>,
    pub trees: BTreeMap<String, Tree>,
}

impl History {
    pub fn make() -> Self {
        let place = Place::directory();
        let host = Host::new(&place);
        let (mut made, mut trees) = (Vec::new(), Vec::new());
        for (number, age) in (0..).zip(AGES) {
            tree::write(&host.root, "file", format!("version {number}"));
            tree::write(&host.root, "steady/file", "always the same");
            let name = format!("steady/of-{number}");
            tree::write(&host.root, name, tree::noise(number, 3000));
            trees.push(describe(&host.root));
            made.push((host.backup(), Duration::from_hours(age)));
        }
        let ids = past::set_back(&place, &made);
        Self {
            objects: place.objects(),
            trees: ids.iter().cloned().zip(trees).collect(),
            ids,
        }
    }

    /// Its newest snapshot.
    pub fn head(&self) -> &str {
        self.ids.last().expect("there are some")
    }

    /// Puts it on an empty store.
    pub fn copy_to(&self, place: &Place) {
        for (key, bytes) in &self.objects {
            place.put(key, bytes);
        }
    }
}

/// What a store shows.
#[derive(Debug)]
pub struct Shown {
    /// `Null` where there is none.
    pub head: Value,
    /// By the ids of their snapshots.
    pub records: BTreeMap<String, Value>,
    /// Keys of layers that no record names.
    pub unnamed: BTreeSet<String>,
}

impl Shown {
    /// The snapshot that the head names.
    pub fn snapshot(&self) -> &str {
        self.head["snapshot"].as_str().unwrap_or_default()
    }

    pub fn sequence(&self) -> u64 {
        self.head["sequence"].as_u64().unwrap_or_default()
    }
}

/// Looks at the objects themselves: every layer of every record is there with its size and sha256, and the head names one
/// of the records.
pub fn assert_whole(place: &Place) -> Shown {
    let objects = place.objects();
    let mut records = BTreeMap::new();
    let mut named = BTreeSet::new();
    for (key, bytes) in &objects {
        let name = key.strip_prefix("snapshots/");
        let Some(id) = name.and_then(|name| name.strip_suffix(".json")) else {
            continue;
        };
        let record = json(bytes);
        for layer in record["layers"].as_array().expect("it is a list") {
            let layer_id = layer["id"].as_str().expect("it has one");
            let key = format!("layers/{layer_id}.tar.zst");
            let bytes = objects.get(&key);
            let bytes = bytes.unwrap_or_else(|| panic!("{id} names {key}, which is not there"));
            assert_eq!(layer["size"], bytes.len(), "{key} of {id}");
            assert_eq!(layer["sha256"], sha256_hex(bytes), "{key} of {id}");
            named.insert(key);
        }
        records.insert(id.to_owned(), record);
    }
    let head = objects.get("head.json").map_or(Value::Null, |b| json(b));
    if let Some(id) = head["snapshot"].as_str() {
        let record = records.get(id);
        let record = record.unwrap_or_else(|| panic!("the head names {id}, which is not there"));
        assert_eq!(record["sequence"], head["sequence"]);
    }
    let layers = objects.into_keys().filter(|key| key.starts_with("layers/"));
    Shown {
        head,
        records,
        unnamed: layers.filter(|key| !named.contains(key)).collect(),
    }
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).expect("records and heads are JSON")
}

/// Lets ten days go by for what runs that died have left: layers that nobody names, open uploads, files under way. For
/// the server in memory, probes are old anyway.
pub fn age_leftovers(place: &Place) {
    const AGE: Duration = Duration::from_hours(10 * 24);
    for key in assert_whole(place).unnamed {
        let bytes = place.objects().remove(&key).expect("it was just there");
        let id = key.trim_end_matches(".tar.zst");
        // Older than every head.
        let old = past::id(SignedDuration::from_hours(10 * 24), &id[id.len() - 8..]);
        place.remove(&key);
        place.put(&format!("layers/{old}.tar.zst"), &bytes);
    }
    match place {
        Place::Memory(s3) => s3.age_uploads(AGE),
        Place::Moto(..) => {}
        Place::Directory(folder) => {
            for path in files(folder.path()) {
                let file = fs::OpenOptions::new().append(true).open(path);
                let aged = file.and_then(|file| file.set_modified(SystemTime::now() - AGE));
                aged.expect("it is ours");
            }
        }
    }
}

/// Fails if the store holds anything but a head, records, and the layers that they name.
pub fn assert_tidy(place: &Place) {
    let shown = assert_whole(place);
    assert!(shown.unnamed.is_empty(), "{shown:#?}");
    assert!(place.keys("probe-").is_empty(), "{:?}", place.keys(""));
    match place {
        Place::Memory(s3) => {
            assert_eq!(s3.open_uploads(), 0);
            let all = s3.objects();
            assert!(all.keys().all(|key| key.starts_with(PREFIX)));
        }
        Place::Moto(moto, bucket) => assert_eq!(moto.open_uploads(bucket), 0),
        Place::Directory(folder) => {
            let found = files(folder.path());
            let names = found.iter().filter_map(|path| path.file_name()?.to_str());
            let is_hidden = |name: &&str| name.starts_with('.') && *name != ".lock";
            let hidden: Vec<_> = names.filter(is_hidden).collect();
            assert!(hidden.is_empty(), "{hidden:?}");
        }
    }
}

/// Every file of a directory store, hidden ones too.
fn files(folder: &Path) -> Vec<PathBuf> {
    let base = folder.join("store").join(INSTANCE);
    let folders = ["", "layers", "snapshots"].map(|name| fs::read_dir(base.join(name)));
    let entries = folders.into_iter().flatten().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect()
}
