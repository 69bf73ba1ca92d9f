//! Stores that lie, under right checksums: whatever a head, a record or a layer says, nothing is written outside of the tree,
//! nothing is half restored, memory and time are bounded, and the lie is named.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use e2e::agent::{Host, Outcome, Place};
use e2e::forge;
use e2e::tree::{self, Tree, assert_same, describe};
use serde_json::{Value, json};

/// Larger than any number that is believed.
const ABSURD: u64 = 1 << 63;

/// A host with one snapshot, whose root has gone on since, and a folder beside it that nothing may get into.
struct Case {
    place: Place,
    host: Host,
    snapshot: String,
    outside: PathBuf,
    before: Tree,
}

impl Case {
    fn new() -> Self {
        let place = Place::directory();
        let host = Host::new(&place);
        let outside = host.state.with_file_name("outside");
        tree::write(&outside, "secret", "not ours");
        tree::write(&host.root, "dir/file", "in a directory");
        tree::write(&host.root, "file", tree::noise(1, 100_000));
        symlink(&outside, host.root.join("link")).expect("can make a link");
        let snapshot = host.backup();
        for name in ["dir/file", "file"] {
            tree::write(&host.root, name, "changed since");
        }
        let before = describe(&host.root);
        Self {
            place,
            host,
            snapshot,
            outside,
            before,
        }
    }

    /// A restore is refused, and has touched nothing.
    fn assert_refused(&self, lie: &str) -> Outcome {
        let verified = self.host.run(&["verify", "--deep"]);
        let restored = self.host.run(&["restore"]);
        for outcome in [&verified, &restored] {
            assert!(!outcome.stderr.contains("panicked"), "{lie}: {outcome:?}");
            assert!(!outcome.stderr.contains('\u{1b}'), "{lie}: {outcome:?}");
        }
        assert!(matches!(verified.code, Some(0 | 11)), "{lie}: {verified:?}");
        assert_same(&self.before, &describe(&self.host.root));
        let found: Vec<_> = describe(&self.outside).into_keys().collect();
        assert_eq!(found, ["", "secret"].map(PathBuf::from), "{lie}");
        assert_eq!(self.host.leftovers(), ["outside"], "{lie}");
        assert_eq!(restored.code, Some(11), "{lie}: {restored:?}");
        assert!(
            restored.sentence().contains("cannot trust "),
            "{lie}: {restored:?}"
        );
        restored
    }
}

fn line<'a>(lines: &'a mut [Value], path: &str) -> &'a mut Value {
    let mut lines = lines.iter_mut();
    lines
        .find(|line| line["path"] == path)
        .expect("it is there")
}

/// Gives one path another name.
fn rename(to: &'static str) -> impl Fn(&mut Vec<Value>) {
    move |lines| line(lines, "file")["path"] = to.into()
}

/// Changes one member of the file's line.
fn set(member: &'static str, value: Value) -> impl Fn(&mut Vec<Value>) {
    move |lines| line(lines, "file")[member] = value.clone()
}

/// Adds a line behind all others.
fn add(new: Value) -> impl Fn(&mut Vec<Value>) {
    move |lines| {
        let mut added = line(lines, "file").clone();
        for (name, value) in new.as_object().expect("it is one") {
            added[name] = value.clone();
        }
        lines.push(added);
    }
}

/// What is wrong, in what makes it so.
type Lie = (&'static str, Box<dyn Fn(&mut Vec<Value>)>);

fn lies_about_names() -> Vec<Lie> {
    let name = "n".repeat(256);
    let hard_link = |to: &str| json!({"path": "name", "type": "hardlink", "size": 0, "extents": [], "sha256": null, "link": to});
    vec![
        ("a way up", Box::new(rename("../outside/file"))),
        (
            "a way up from inside",
            Box::new(rename("dir/../../outside/file")),
        ),
        ("an absolute path", Box::new(rename("/file"))),
        (
            "an absolute path into a folder",
            Box::new(rename("/etc/file")),
        ),
        (
            "a way through a link",
            Box::new(add(json!({"path": "link/file"}))),
        ),
        (
            "a file in a file",
            Box::new(add(json!({"path": "zz/file"}))),
        ),
        ("an empty name", Box::new(rename("dir//file"))),
        ("a name of a NUL", Box::new(rename("fi\0le"))),
        (
            "a name that is too long",
            Box::new(add(json!({"path": name}))),
        ),
        (
            "a name in no base64",
            Box::new(add(json!({"path": null, "path64": "?"}))),
        ),
        ("a name twice", Box::new(add(json!({})))),
        ("names out of order", Box::new(add(json!({"path": "a"})))),
        ("no root", Box::new(|lines| drop(lines.remove(1)))),
        ("no status", Box::new(set("mode", Value::Null))),
        (
            "a link to nowhere",
            Box::new(|lines| line(lines, "link")["link"] = "".into()),
        ),
        (
            "a link without a target",
            Box::new(|lines| line(lines, "link")["link"] = Value::Null),
        ),
        (
            "a name of a file outside",
            Box::new(add(hard_link("../outside/secret"))),
        ),
        (
            "a name of a file by a link",
            Box::new(add(hard_link("link/secret"))),
        ),
        ("a name of a link", Box::new(add(hard_link("link")))),
        ("a name of a directory", Box::new(add(hard_link("dir")))),
        ("a name of itself", Box::new(add(hard_link("name")))),
    ]
}

fn lies_about_contents() -> Vec<Lie> {
    let hole = |length: u64| json!([null, 0, length]);
    vec![
        ("an absurd size", Box::new(set("size", ABSURD.into()))),
        (
            "an absurd hole",
            Box::new(|lines| {
                line(lines, "file")["size"] = ABSURD.into();
                line(lines, "file")["extents"] = json!([[null, 0, ABSURD]]);
            }),
        ),
        (
            "extents that overflow",
            Box::new(move |lines| {
                line(lines, "file")["size"] = 0.into();
                line(lines, "file")["extents"] = json!([hole(ABSURD), hole(ABSURD)]);
            }),
        ),
        (
            "extents of another size",
            Box::new(set("extents", json!([hole(1)]))),
        ),
        (
            "data beyond the end",
            Box::new(set("extents", json!([[0, 1_u64 << 40, 100_000]]))),
        ),
        (
            "data at the end of numbers",
            Box::new(set("extents", json!([[0, u64::MAX, 100_000]]))),
        ),
        (
            "data in front",
            Box::new(set("extents", json!([[0, 0, 100_000]]))),
        ),
        (
            "data of another layer",
            Box::new(set("extents", json!([[7, 0, 100_000]]))),
        ),
        (
            "another sha256",
            Box::new(set("sha256", "00".repeat(32).into())),
        ),
        ("no sha256", Box::new(set("sha256", Value::Null))),
        (
            "an attribute of the system's",
            Box::new(set("xattrs", json!({"security.capability": "AQAAAg=="}))),
        ),
        (
            "an attribute that root alone may set",
            Box::new(set("system", json!({"trusted.a": "AQAAAg=="}))),
        ),
        (
            "a user's attribute among the system's",
            Box::new(set("system", json!({"user.a": "AQAAAg=="}))),
        ),
        (
            "an attribute in no base64",
            Box::new(set("xattrs", json!({"user.a": "?"}))),
        ),
    ]
}

fn lies_in_a_header() -> Vec<Lie> {
    vec![
        (
            "another layer's index",
            Box::new(|lines| lines[0]["layers"][0] = "20260102T030405006Z-89abcdef".into()),
        ),
        (
            "another format",
            Box::new(|lines| lines[0]["format"] = 2.into()),
        ),
        (
            "no frames",
            Box::new(|lines| lines[0]["frames"] = json!([])),
        ),
        (
            "a frame of absurd size",
            Box::new(|lines| lines[0]["frames"][0][0] = (1_u64 << 60).into()),
        ),
        (
            "a frame that is shorter",
            Box::new(|lines| lines[0]["frames"][0][0] = 1000.into()),
        ),
        (
            "a frame of another sha256",
            Box::new(|lines| lines[0]["frames"][0][2] = "00".repeat(32).into()),
        ),
        ("no header", Box::new(|lines| drop(lines.remove(0)))),
        ("nothing", Box::new(Vec::clear)),
    ]
}

#[test]
fn an_index_that_lies_is_refused_and_named() {
    let lies = [
        lies_about_names(),
        lies_about_contents(),
        lies_in_a_header(),
    ];
    for (lie, make) in lies.into_iter().flatten() {
        let case = Case::new();
        forge::index(&case.place, &case.snapshot, make);
        let _ = case.assert_refused(lie);
        // Good data can be written again all the same.
        let outcome = case.host.run(&["backup"]);
        assert!(matches!(outcome.code, Some(0 | 11)), "{lie}: {outcome:?}");
    }
}

#[test]
fn what_is_odd_but_possible_is_restored() {
    let case = Case::new();
    forge::index(&case.place, &case.snapshot, |lines| {
        line(lines, "file")["mode"] = u32::MAX.into();
        line(lines, "dir/file")["mtime"] = i64::MIN.into();
    });
    let _ = case.host.run(&["restore"]).expect(0);
    let tree = describe(&case.host.root);
    assert_eq!(tree[&PathBuf::from("file")].size, 100_000);
    assert_eq!(tree[&PathBuf::from("file")].kind, "file");
}

#[test]
fn frames_and_indexes_that_unpack_to_more_than_they_say_are_refused() {
    let case = Case::new();
    let bomb = zstd::encode_all(&vec![0; 64 << 20][..], 1).expect("in memory");
    forge::layer(&case.place, &case.snapshot, |layer| {
        let text = layer.text();
        let (header, rest) = text.split_once('\n').expect("there is a header");
        let mut header: Value = serde_json::from_str(header).expect("it is JSON");
        header["frames"] = json!([[16 << 20, bomb.len(), tree::sha256_hex(&bomb)]]);
        layer.pack(&format!("{header}\n{rest}"));
        layer.data = bomb;
    });
    let sentence = case.assert_refused("a frame").sentence();
    assert!(
        sentence.contains("does not unpack to its size"),
        "{sentence}"
    );

    // One line without an end, of a gigabyte: a few kilobytes.
    let case = Case::new();
    let spaces = zstd::encode_all(&vec![b' '; 8 << 20][..], 1).expect("in memory");
    forge::layer(&case.place, &case.snapshot, |layer| {
        for _ in 0..128 {
            layer.index.extend(&spaces);
        }
    });
    let sentence = case.assert_refused("a line").sentence();
    assert!(sentence.contains("far too long"), "{sentence}");

    // A window of 128 MiB for a few bytes.
    let case = Case::new();
    forge::layer(&case.place, &case.snapshot, |layer| {
        let text = layer.text();
        let mut packer = zstd::Encoder::new(Vec::new(), 1).expect("in memory");
        packer.window_log(27).expect("zstd knows it");
        std::io::Write::write_all(&mut packer, text.as_bytes()).expect("in memory");
        layer.index = packer.finish().expect("in memory");
    });
    let _ = case.assert_refused("a window");

    let case = Case::new();
    forge::layer(&case.place, &case.snapshot, |layer| {
        layer.index = b"no zstd".to_vec();
    });
    let _ = case.assert_refused("no zstd");
}

#[test]
fn an_index_that_goes_on_for_ever_ends_with_the_time_bound_in_little_memory() {
    let case = Case::new();
    let pack = |text: &[u8]| zstd::encode_all(text, 1).expect("in memory");
    // Each line is right, and mostly white space: 8 MiB in some hundred bytes, 80 GB in all.
    let spaces = pack(&vec![b' '; 8 << 20]);
    forge::layer(&case.place, &case.snapshot, |layer| {
        for line in 0..10_000 {
            layer
                .index
                .extend(pack(format!("{{\"path\":\"z{line:06}\",").as_bytes()));
            layer.index.extend(&spaces);
            layer.index.extend(pack(b"\"type\":\"deleted\"}\n"));
        }
    });
    let mut running = case.host.start(&["restore", "--timeout", "2s", "--json"]);
    let mut peak = 0;
    while running.is_running() {
        peak = peak.max(running.peak_memory_if_there().unwrap_or(0));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let outcome = running.wait().expect(124);
    assert_eq!(outcome.json()["code"], "timeout");
    assert!((1..64 << 10).contains(&peak), "{peak} KiB at the peak");
    assert_same(&case.before, &describe(&case.host.root));
    // What was unpacked is for the next try.
    assert_eq!(case.host.leftovers(), [".root.restoring", "outside"]);
}

type LieOfARecord = (&'static str, Box<dyn Fn(&mut Value)>);

/// Changes the word on the first layer.
fn word(record: &mut Value, member: &str, value: Value) {
    record["layers"][0][member] = value;
}

#[test]
fn a_record_that_lies_is_refused_and_named() {
    let lies: Vec<LieOfARecord> = vec![
        (
            "an absurd size",
            Box::new(|record| word(record, "size", ABSURD.into())),
        ),
        (
            "an absurd tar stream",
            Box::new(|record| word(record, "rawSize", u64::MAX.into())),
        ),
        (
            "an index at the end of numbers",
            Box::new(|record| word(record, "indexOffset", u64::MAX.into())),
        ),
        (
            "an index of absurd size",
            Box::new(|record| word(record, "indexSize", ABSURD.into())),
        ),
        (
            "an index beyond the end",
            Box::new(|record| word(record, "indexSize", (1_u64 << 40).into())),
        ),
        (
            "an index elsewhere",
            Box::new(|record| word(record, "indexOffset", 3.into())),
        ),
        (
            "a layer elsewhere",
            Box::new(|record| word(record, "id", "../../outside/secret".into())),
        ),
        (
            "a thousand layers",
            Box::new(|record| {
                let layer = record["layers"][0].clone();
                record["layers"] = vec![layer; 1000].into();
            }),
        ),
        (
            "the same layer twice",
            Box::new(|record| {
                let layer = record["layers"][0].clone();
                record["layers"] = json!([layer, layer]);
                record["layers"][1]["id"] = "20260102T030405006Z-89abcdef".into();
            }),
        ),
        ("no layers", Box::new(|record| record["layers"] = json!([]))),
        (
            "an absurd sequence",
            Box::new(|record| record["sequence"] = u64::MAX.into()),
        ),
        (
            "absurd totals",
            Box::new(|record| record["totals"]["bytes"] = u64::MAX.into()),
        ),
        (
            "another snapshot",
            Box::new(|record| record["id"] = "20260102T030405006Z-89abcdef".into()),
        ),
        (
            "another format",
            Box::new(|record| record["format"] = 2.into()),
        ),
        (
            "words for a terminal",
            Box::new(|record| record["time"] = "\u{1b}[2Jgone".into()),
        ),
    ];
    for (lie, make) in lies {
        let case = Case::new();
        forge::object(
            &case.place,
            &format!("snapshots/{}.json", case.snapshot),
            make,
        );
        let _ = case.assert_refused(lie);
        for verb in ["list", "prune", "backup"] {
            let outcome = case.host.run(&[verb]);
            assert!(
                matches!(outcome.code, Some(0 | 11)),
                "{lie}, {verb}: {outcome:?}"
            );
        }
    }
}

#[test]
fn a_record_or_head_that_is_far_too_large_is_not_read() {
    let case = Case::new();
    let record = format!("snapshots/{}.json", case.snapshot);
    forge::object(&case.place, &record, |record| {
        let layer = record["layers"][0].clone();
        record["layers"] = vec![layer; 1_000_000].into();
    });
    let outcome = case.host.run(&["restore"]);
    assert!(matches!(outcome.code, Some(11 | 75)), "{outcome:?}");
    assert_same(&case.before, &describe(&case.host.root));
}

#[test]
fn parents_in_a_circle_end() {
    let case = Case::new();
    let second = case.host.backup();
    let key = |id: &str| format!("snapshots/{id}.json");
    forge::object(&case.place, &key(&case.snapshot), |record| {
        record["parent"] = second.clone().into();
    });
    let list = case.host.json(&["list"]);
    assert_eq!(list["snapshots"].as_array().map(Vec::len), Some(2));
    let _ = case.host.json(&["prune"]);
    let _ = case.host.run(&["restore"]).expect(0);
}

#[test]
fn a_head_that_lies_is_refused_and_named() {
    let lies: [(&str, Value); 5] = [
        ("snapshot", "../../outside/secret".into()),
        ("snapshot", "20260102T030405006Z-89abcdef".into()),
        ("sequence", u64::MAX.into()),
        ("format", 7.into()),
        ("writer", "\u{1b}]0;title\u{7}".into()),
    ];
    for (member, value) in lies {
        let case = Case::new();
        let lie = format!("{member}: {value}");
        forge::object(&case.place, "head.json", |head| head[member] = value);
        let _ = case.assert_refused(&lie);
        let outcome = case.host.run(&["backup"]);
        let is_unknown = lie.contains("2026");
        assert!(outcome.code == Some(11) || is_unknown, "{lie}: {outcome:?}");
    }
}
