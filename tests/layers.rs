//! Histories of edits: every snapshot comes back as the tree was, and layers stay few and mostly alive.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};

use e2e::agent::{Host, Place, folder};
use e2e::tree::{self, Tree, assert_same, describe, kept};
use rustix::fs::{XattrFlags, setxattr};
use serde_json::Value;

/// A small generator (xorshift), so that a failing history can be run again by its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).expect("it is below a usize")
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        (!of.is_empty()).then(|| &of[self.below(of.len())])
    }

    fn name(&mut self) -> OsString {
        let length = match self.below(20) {
            0 => 255,
            _ => 1 + self.below(3),
        };
        // Few letters, so that names come again; and bytes that are no text.
        let letters = b"abc\xff\n.- \\";
        let mut name: Vec<u8> = (0..length)
            .map(|_| letters[self.below(letters.len())])
            .collect();
        if name.iter().all(|byte| *byte == b'.') {
            name[0] = b'x';
        }
        OsString::from_vec(name)
    }
}

/// Paths of one kind in a tree.
fn paths(root: &Path, kind: &str) -> Vec<PathBuf> {
    let tree = describe(root);
    let found = tree.iter().filter(|(_, node)| node.kind == kind);
    found.map(|(path, _)| root.join(path)).collect()
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(status) if status.is_dir() => fs::remove_dir_all(path).expect("it can be removed"),
        Ok(_) => fs::remove_file(path).expect("it can be removed"),
        Err(_) => {}
    }
}

/// One change of the kinds that people and programs make.
fn edit(root: &Path, random: &mut Random) {
    let directories = paths(root, "directory");
    let files = paths(root, "file");
    let parent = random.pick(&directories).cloned();
    let place = parent.expect("there is the root").join(random.name());
    let file = random.pick(&files).cloned();
    match (random.below(18), file) {
        (0..=4, _) => {
            remove(&place);
            let length = 1 << random.below(18);
            let seed = random.below(1 << 30) as u64;
            fs::write(place, tree::noise(seed, length)).expect("can write");
        }
        (5..=6, Some(file)) => {
            let file = File::options()
                .append(true)
                .open(file)
                .expect("it is there");
            let length = file.metadata().expect("it is open").len();
            file.write_all_at(b"one more line\n", length)
                .expect("can write");
        }
        (7, Some(file)) => fs::write(file, b"").expect("can write"),
        (8, Some(file)) => remove(&file),
        (9, _) if directories.len() > 3 => {
            remove(&directories[1 + random.below(directories.len() - 1)]);
        }
        (10, _) => {
            remove(&place);
            fs::create_dir_all(place.join("a/b")).expect("can make directories");
        }
        (11, _) => {
            remove(&place);
            symlink(OsStr::from_bytes(b"../\xfe target"), place).expect("can make a link");
        }
        (12, Some(file)) if file != place => {
            remove(&place);
            if file.exists() {
                fs::hard_link(file, place).expect("can make a link");
            }
        }
        (13, Some(file)) if !place.starts_with(&file) => {
            remove(&place);
            if file.exists() {
                fs::rename(file, place).expect("can rename");
            }
        }
        // Whoever runs this has to be able to write there later.
        (14, Some(file)) => tree::set_mode(
            &file,
            0o600 + u32::try_from(random.below(64)).expect("small"),
        ),
        (15, Some(file)) => {
            let seconds = 1_000_000_000 + i64::try_from(random.below(1 << 30)).expect("small");
            tree::set_mtime(&file, seconds, 123_456_789);
        }
        (16, Some(file)) => {
            let value = random.name().into_vec();
            // Not every file system keeps them.
            let _ = setxattr(&file, "user.test", &value, XattrFlags::empty());
        }
        _ => {
            remove(&place);
            let file = File::create(place).expect("can make a file");
            file.write_all_at(b"data", 3 * tree::BLOCK)
                .expect("can write");
            file.set_len(9 * tree::BLOCK).expect("can set a length");
        }
    }
}

fn record(place: &Place, snapshot: &str) -> Value {
    let objects = place.objects();
    serde_json::from_slice(&objects[&format!("snapshots/{snapshot}.json")]).expect("it is JSON")
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("it is a number")
}

/// Restores a snapshot beside the root and gives its tree and the answer.
fn restored(host: &Host, snapshot: &str) -> (Tree, Value) {
    let folder = folder();
    let target = folder.path().join("tree");
    let path = target.display().to_string();
    let answer = host.json(&["restore", snapshot, "--target", &path]);
    (describe(&target), answer)
}

fn run_history(seed: u64) {
    let mut random = Random(seed);
    let place = Place::directory();
    let host = Host::new(&place);
    let mut history: BTreeMap<String, Tree> = BTreeMap::new();
    for step in 0..60 {
        for _ in 0..=random.below(6) {
            edit(&host.root, &mut random);
        }
        match random.below(12) {
            // The index is lost, and has to be made again out of the layers.
            0 => {
                let _ = fs::remove_file(host.state.join("index"));
            }
            // It is damaged.
            1 if host.state.join("index").exists() => {
                let index = File::options().write(true).open(host.state.join("index"));
                let index = index.expect("it is there");
                index.write_all_at(b"??", 60).expect("can write");
            }
            // Another machine goes on.
            2 if step > 0 => {
                host.lose_everything();
                let _ = host.run(&["restore"]).expect(0);
            }
            _ => {}
        }
        let answer = host.json(&["backup"]);
        let snapshot = answer["snapshot"]
            .as_str()
            .expect("it has an id")
            .to_owned();
        let now = kept(describe(&host.root));
        if let Some(before) = history.insert(snapshot.clone(), now.clone()) {
            assert_same(&before, &now);
            continue;
        }

        let record = record(&place, &snapshot);
        let layers = record["layers"].as_array().expect("it is a list");
        let sizes: Vec<u64> = layers
            .iter()
            .map(|layer| number(&layer["rawSize"]))
            .collect();
        for pair in sizes.windows(2) {
            // The rule goes by an estimate of what headers take.
            assert!(
                pair[0] + pair[0] / 4 + 4096 >= 2 * pair[1],
                "seed {seed}, step {step}: {sizes:?}"
            );
        }
        let known = history.len() - random.below(history.len().min(4)) - 1;
        let (id, want) = history.iter().nth(known).expect("it is one of them");
        let (got, answer) = restored(&host, id);
        assert_same(want, &got);
        if *id == snapshot {
            let total: u64 = layers.iter().map(|layer| number(&layer["size"])).sum();
            assert!(number(&answer["bytesDownloaded"]) <= total);
        }
    }
    for (snapshot, want) in &history {
        assert_same(want, &restored(&host, snapshot).0);
    }
}

#[test]
fn every_snapshot_of_a_history_comes_back() {
    run_history(0x9E37_79B9_7F4A_7C15);
}

#[test]
fn every_snapshot_of_another_history_comes_back() {
    run_history(0xD1B5_4A32_D192_ED03);
}

#[test]
fn a_change_costs_what_changed_and_a_restore_what_is_there() {
    let place = Place::memory();
    let host = Host::new(&place);
    for number in 0..40 {
        let noise = tree::noise(number + 1, 256 << 10);
        tree::write(&host.root, format!("large/{number}"), noise);
    }
    tree::write(&host.root, "small", "before");
    let first = host.json(&["backup"]);
    assert!(number(&first["bytesUploaded"]) > 10 << 20);

    tree::write(&host.root, "small", "after");
    fs::remove_file(host.root.join("large/7")).expect("it is there");
    let second = host.json(&["backup"]);
    assert!(number(&second["bytesUploaded"]) < 4096, "{second}");

    let snapshot = second["snapshot"].as_str().expect("it has an id");
    let (got, _) = restored(&host, snapshot);
    assert_same(&describe(&host.root), &got);
    let layers = record(&place, snapshot)["layers"].as_array().map(Vec::len);
    assert_eq!(layers, Some(2));

    // In place, what is right on the disk is not fetched again.
    let first = first["snapshot"].as_str().expect("it has an id");
    let back = host.json(&["restore", first]);
    let fetched = number(&back["bytesDownloaded"]);
    assert!(fetched < 5 << 20, "one file of the first snapshot: {back}");
    assert!(host.root.join("large/7").exists());
}

#[test]
fn files_without_data_come_back_from_a_layer_of_nothing_else() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "bulk", tree::noise(1, 1 << 20));
    host.backup();
    tree::write(&host.root, "empty", "");
    let hole = File::create(host.root.join("hole")).expect("can make a file");
    hole.set_len(1 << 20).expect("can set a length");
    let snapshot = host.backup();
    assert_same(&describe(&host.root), &restored(&host, &snapshot).0);
}

#[test]
fn a_lost_index_uploads_nothing_that_is_there() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::make(&host.root);
    let first = host.json(&["backup"]);
    fs::remove_file(host.state.join("index")).expect("it is there");
    let second = host.json(&["backup"]);
    assert_eq!(second["unchanged"], true);
    assert_eq!(second["snapshot"], first["snapshot"]);

    fs::remove_file(host.state.join("index")).expect("it is there");
    tree::write(&host.root, "new", "new");
    let third = host.json(&["backup"]);
    assert_eq!(third["unchanged"], false);
    assert!(number(&third["bytesUploaded"]) < 8192, "{third}");
}

#[test]
fn nothing_is_built_on_a_snapshot_that_is_damaged() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", tree::noise(1, 1 << 20));
    host.backup();
    fs::remove_file(host.state.join("index")).expect("it is there");
    place.remove(&place.keys("layers/")[0]);
    let whole = host.json(&["backup"]);
    assert!(number(&whole["bytesUploaded"]) > 1 << 20, "{whole}");
    let snapshot = whole["snapshot"].as_str().expect("it has an id");
    assert_same(&describe(&host.root), &restored(&host, snapshot).0);
}

#[test]
fn a_part_of_a_snapshot_can_be_restored_alone() {
    let place = Place::memory();
    let host = Host::new(&place);
    for path in [
        "keep/a.txt",
        "keep/deep/b.txt",
        "other/c.txt",
        "other/d.log",
    ] {
        tree::write(&host.root, path, path);
    }
    tree::write(&host.root, "bulk", tree::noise(5, 12 << 20));
    fs::hard_link(host.root.join("other/c.txt"), host.root.join("zz-link")).expect("can link");
    host.backup();
    let folder = folder();
    let names = |patterns: &[&str], target: &str| {
        let target = folder.path().join(target);
        let path = target.display().to_string();
        let mut arguments = vec!["restore", "--target", &path];
        for pattern in patterns {
            arguments.extend(["--path", pattern]);
        }
        let answer = host.json(&arguments);
        let names: Vec<String> = describe(&target)
            .keys()
            .map(|path| path.display().to_string())
            .collect();
        (names, number(&answer["bytesDownloaded"]))
    };
    let (found, downloaded) = names(&["/keep/"], "one");
    let want = ["", "keep", "keep/a.txt", "keep/deep", "keep/deep/b.txt"];
    assert_eq!(found, want);
    assert!(downloaded < 5 << 20, "{downloaded}");
    assert_eq!(names(&["*.log"], "two").0, ["", "other", "other/d.log"]);
    // The other name of a file brings the file.
    let found = names(&["zz-link"], "three").0;
    assert_eq!(found, ["", "other", "other/c.txt", "zz-link"]);
    let target = folder.path().join("four").display().to_string();
    let nothing = host.run(&["restore", "--target", &target, "--path", "none"]);
    assert!(nothing.expect(64).sentence().contains("nothing in"));
}
