//! An error is not an absence. Whichever call on the tree fails, with whatever error, a snapshot keeps what the last one has of
//! that path, says so, and the next one is right again. Only that something is gone takes it out of a snapshot.
//!
//! CI tries some faults of each kind, chosen by a seed (`E2E_SEED`, `E2E_ROUNDS`); `E2E_FAULTS=all` tries each error of each call.
#![cfg(target_arch = "x86_64")]

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::agent::{Host, Outcome, Place};
use e2e::mount::mount;
use e2e::seeds::{Choices, rounds};
use e2e::surroundings::around;
use e2e::syscalls::{Call, Fault, Traced, run};
use e2e::tree::{self, Node, Tree, describe, differences, is_root, noise};
use nix::errno::Errno;
use rustix::fs::XattrFlags;
use serde_json::Value;

/// What a disk, a network file system or a machine that is short of something answers.
const ERRORS: [Errno; 7] = [
    Errno::EIO,
    Errno::EBADMSG,
    Errno::ENFILE,
    Errno::ENOMEM,
    Errno::ESTALE,
    Errno::EMFILE,
    Errno::ETIMEDOUT,
];

/// Faults that CI tries in one round. A round has a host of its own.
const TRIED: usize = 8;

/// Whose processes are held, in the one test that holds any: there are none.
const HELD: u32 = 54_405;

/// A tree with something for each call that a walk and a reader make.
fn make_first(root: &Path) {
    for path in [
        "changed",
        "deep/changed",
        "deep/down/below/kept",
        "deep/down/changed",
        "deep/down/gone",
        "deep/kept",
        "gone",
        "kept",
        "turned",
    ] {
        tree::write(root, path, format!("first {path}"));
    }
    for at in 0..8 {
        tree::write(root, format!("deep/many/{at}"), "first");
    }
    fs::create_dir(root.join("empty")).expect("can make a directory");
    tree::write(root, "turning/file", "first");
    symlink("first", root.join("link")).expect("can make a link");
    tree::write(root, "names/one", "first");
    fs::hard_link(root.join("names/one"), root.join("names/two")).expect("can make a hard link");
    let sparse = File::create(root.join("sparse")).expect("can make a file");
    sparse.set_len(1 << 20).expect("can set a length");
    sparse.write_all_at(b"first", 65_536).expect("can write");
    for path in ["deep", "kept", "changed"] {
        set_attribute(&root.join(path), b"first");
    }
}

/// What becomes of it. `added`: bytes that are new, enough of them to have all else written again.
fn make_second(root: &Path, added: usize) {
    for path in ["changed", "deep/changed", "deep/down/changed", "names/one"] {
        fs::write(root.join(path), format!("second, longer, of {path}")).expect("can write");
    }
    for path in ["gone", "deep/down/gone", "turned", "turning/file"] {
        fs::remove_file(root.join(path)).expect("it is there");
    }
    fs::remove_dir(root.join("turning")).expect("it is empty");
    tree::write(root, "turning", "a file now");
    tree::write(root, "turned/file", "a directory now");
    tree::write(root, "new/file", noise(5, added));
    fs::remove_file(root.join("link")).expect("it is there");
    symlink("second", root.join("link")).expect("can make a link");
    let sparse = File::options().write(true).open(root.join("sparse"));
    let sparse = sparse.expect("it is there");
    sparse.write_all_at(b"second", 524_288).expect("can write");
    set_attribute(&root.join("deep"), b"second");
    set_attribute(&root.join("changed"), b"second");
}

fn set_attribute(path: &Path, value: &[u8]) {
    let set = rustix::fs::setxattr(path, "user.name", value, XattrFlags::empty());
    // Not every file system has them; there is a call less then.
    assert!(
        matches!(set, Ok(()) | Err(rustix::io::Errno::NOTSUP)),
        "{set:?}"
    );
}

/// A tree without what a fault may rightly change, which names were one file, and the owner, which a restore sets.
fn plain(root: &Path) -> Tree {
    let mut all = describe(root);
    for node in all.values_mut() {
        node.same_as = None;
        node.owner = (0, 0);
    }
    all
}

/// A host whose last snapshot is of another tree than the one that it has now.
struct Case {
    place: Place,
    host: Host,
    before: Tree,
    now: Tree,
}

impl Case {
    fn new(place: Place, host: Host, change: impl FnOnce(&Path)) -> Self {
        make_first(&host.root);
        host.backup();
        let before = plain(&host.root);
        change(&host.root);
        let now = plain(&host.root);
        let case = Self {
            place,
            host,
            before,
            now,
        };
        copy(&case.host.state, &case.kept("state"));
        copy(&case.store(), &case.kept("store"));
        case
    }

    fn store(&self) -> PathBuf {
        let Place::Directory(folder) = &self.place else {
            panic!("this test has its store in a directory");
        };
        folder.path().join("store")
    }

    /// Where a copy is that a run can begin from again.
    fn kept(&self, name: &str) -> PathBuf {
        self.host.folder.path().join(format!("kept-{name}"))
    }

    /// As it was before any fault.
    fn reset(&self, loses_state: bool) {
        copy(&self.kept("store"), &self.store());
        if loses_state {
            fs::remove_dir_all(&self.host.state).unwrap_or_default();
        } else {
            copy(&self.kept("state"), &self.host.state);
        }
    }

    /// What the newest snapshot has.
    fn newest(&self) -> Tree {
        let target = self.host.folder.path().join("target");
        let _ = fs::remove_dir_all(&target);
        let _ = self
            .host
            .run(&["restore", "--target", &target.display().to_string()])
            .expect(0);
        plain(&target)
    }

    /// The newest snapshot's record.
    fn record(&self) -> Value {
        let id = self.place.head()["snapshot"].clone();
        let id = id.as_str().expect("there is a snapshot");
        let objects = self.place.objects();
        let record = &objects[&format!("snapshots/{id}.json")];
        serde_json::from_slice(record).expect("a record is JSON")
    }

    /// What a backup says and stores while something cannot be read. `what` is said when that is wrong.
    fn judge(&self, outcome: &Outcome, what: &str) -> Vec<PathBuf> {
        assert_eq!(outcome.code, Some(0), "{what}: {}", outcome.stderr);
        let answer = outcome.json();
        let unread = unread(&answer);
        let newest = self.newest();
        let wrong = wrong(&self.before, &self.now, &newest, &unread);
        assert_eq!(wrong, [""; 0], "{what}: {answer}");
        if !unread.is_empty() {
            assert_eq!(answer["consistency"], "per-file", "{what}: {answer}");
            assert_eq!(self.record()["unread"], answer["unread"], "{what}");
        }
        unread
    }

    /// Without any fault, all is right again.
    fn assert_heals(&self, arguments: &[&str], what: &str) {
        let was_unread = !unread(&self.record()).is_empty();
        let answer = self.host.run(arguments).expect(0).json();
        assert!(unread(&answer).is_empty(), "after {what}: {answer}");
        let record = self.record();
        assert!(unread(&record).is_empty(), "after {what}: {record}");
        // A snapshot that has everything, and was taken for one that may be torn, is not taken again.
        if was_unread || answer["unchanged"] == false {
            assert_eq!(record["consistency"], "instant", "after {what}: {record}");
        }
        assert_eq!(
            differences(&self.now, &self.newest()),
            [""; 0],
            "after {what}"
        );
    }
}

/// What an answer or a record says could not be read.
fn unread(of: &Value) -> Vec<PathBuf> {
    let paths = of["unread"]["paths"].as_array();
    let paths: Vec<PathBuf> = paths
        .into_iter()
        .flatten()
        .map(|path| path.as_str().expect("a path is text"))
        // The root itself.
        .map(|path| PathBuf::from(if path == "." { "" } else { path }))
        .collect();
    let count = of["unread"]["count"].as_u64().unwrap_or(0);
    assert_eq!(count, paths.len() as u64, "few enough to be named");
    paths
}

/// What is wrong with a snapshot that was taken of `now` after one of `before`, where that could not be read.
fn wrong(before: &Tree, now: &Tree, got: &Tree, unread: &[PathBuf]) -> Vec<String> {
    let all: BTreeSet<&PathBuf> = before.keys().chain(now.keys()).chain(got.keys()).collect();
    let problem = |path: &PathBuf| {
        let (before, now, got) = (before.get(path), now.get(path), got.get(path));
        let is_dir = |node: Option<&Node>| node.is_some_and(|node| node.kind == "directory");
        let may_be = if unread.contains(path) && !is_dir(before) && !is_dir(now) {
            vec![before]
        } else if unread.iter().any(|missed| is_at_or_below(path, missed)) {
            // Of what is below a directory, all or nothing is as it was: that depends on what of the directory failed.
            vec![before, now]
        } else if unread.iter().any(|missed| are_one_file(path, missed)) {
            vec![before, now]
        } else {
            vec![now]
        };
        let which = |node: Option<&Node>| match (node == before, node == now, node.is_none()) {
            (true, false, _) => "what it was",
            (_, _, true) => "nothing",
            (_, true, _) => "what it is",
            _ => "something else",
        };
        let want: Vec<_> = may_be.iter().map(|node| which(*node)).collect();
        let line = format!(
            "{}: want {}, got {}",
            path.display(),
            want.join(" or "),
            which(got)
        );
        (!may_be.contains(&got)).then_some(line)
    };
    all.into_iter().filter_map(problem).collect()
}

fn is_at_or_below(path: &Path, missed: &Path) -> bool {
    // Of the root only its own attributes can be missed, or there is no snapshot.
    path == missed || (!missed.as_os_str().is_empty() && path.starts_with(missed))
}

/// Makes `to` what `from` is.
fn copy(from: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).expect("it is ours");
    }
    let done = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(done.is_ok_and(|done| done.success()), "{}", from.display());
}

/// The faults to try, of a run that makes these calls.
fn choose(calls: &[Call], choices: &mut Choices) -> Vec<Fault> {
    let mut seen: HashMap<&Call, u32> = HashMap::new();
    let numbered: Vec<(&Call, u32)> = calls
        .iter()
        .map(|call| {
            let before = seen.entry(call).or_default();
            *before += 1;
            (call, *before - 1)
        })
        .collect();
    let fault = |(call, after): (&Call, u32), errno, lasts| Fault {
        call: call.clone(),
        errno,
        after,
        lasts,
    };
    if std::env::var_os("E2E_FAULTS").is_some_and(|value| value == "all") {
        let both = numbered
            .iter()
            .flat_map(|call| [(*call, true), (*call, false)]);
        let all = both.flat_map(|(call, lasts)| ERRORS.map(|errno| fault(call, errno, lasts)));
        return all.collect();
    }
    let mut chosen = || {
        let call = *choices.one_of(&numbered);
        fault(call, *choices.one_of(&ERRORS), choices.once_in(2))
    };
    (0..TRIED).map(|_| chosen()).collect()
}

/// Lets calls of a backup fail, one kind of call in each run.
fn try_backups(case: &Case, arguments: &[&str], loses_state: bool, choices: &mut Choices) {
    let traced = |fault: Option<&Fault>| {
        case.reset(loses_state);
        let command = case.host.command(arguments);
        run(&command, &case.host.root, fault)
    };
    let clean = traced(None);
    assert_eq!(
        case.judge(&clean.outcome, "no fault"),
        [""; 0].map(PathBuf::from)
    );
    assert!(!clean.calls.is_empty(), "a walk makes calls");
    for fault in choose(&clean.calls, choices) {
        let what = fault.to_string();
        let Traced {
            outcome, failed, ..
        } = traced(Some(&fault));
        let is_root = fault.call.path.as_os_str().is_empty();
        if is_root && outcome.code == Some(74) {
            assert!(failed > 0, "{what}: {}", outcome.stderr);
            let differences = differences(&case.before, &case.newest());
            assert_eq!(differences, [""; 0], "{what}: nothing is published");
        } else {
            let unread = case.judge(&outcome, &what);
            assert!(failed > 0 || unread.is_empty(), "{what}: {unread:?}");
            assert!(
                unread.iter().all(|path| is_about(path, &fault.call.path)),
                "{what}: {unread:?}"
            );
        }
        case.assert_heals(arguments, &what);
    }
}

/// Whether a path that is said to be unread has to do with the one whose call failed.
fn is_about(unread: &Path, failed: &Path) -> bool {
    unread.starts_with(failed) || failed.starts_with(unread) || are_one_file(unread, failed)
}

/// Whether both are names of the file that has several; they stay names of one file.
fn are_one_file(one: &Path, other: &Path) -> bool {
    one.starts_with("names") && other.starts_with("names")
}

#[test]
fn a_call_that_fails_takes_nothing_out_of_a_snapshot() {
    rounds(
        "unread a_call_that_fails_takes_nothing_out_of_a_snapshot",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let host = Host::new(&place);
            let case = Case::new(place, host, |root| make_second(root, 10));
            try_backups(&case, &["backup", "--json"], false, choices);
        },
    );
}

#[test]
fn a_call_that_fails_while_older_layers_are_written_again_takes_nothing_out() {
    rounds(
        "unread a_call_that_fails_while_older_layers_are_written_again_takes_nothing_out",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let host = Host::new(&place);
            let case = Case::new(place, host, |root| make_second(root, 200_000));
            try_backups(&case, &["backup", "--json"], false, choices);
        },
    );
}

#[test]
fn a_call_that_fails_on_a_tree_that_has_not_changed_takes_nothing_out() {
    rounds(
        "unread a_call_that_fails_on_a_tree_that_has_not_changed_takes_nothing_out",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let host = Host::new(&place);
            let case = Case::new(place, host, |_| ());
            try_backups(&case, &["backup", "--json"], false, choices);
        },
    );
}

#[test]
fn a_call_that_fails_while_the_index_is_made_again_takes_nothing_out() {
    rounds(
        "unread a_call_that_fails_while_the_index_is_made_again_takes_nothing_out",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let mut host = Host::new(&place);
            // A runtime's, which may follow its head without a state.
            host.set("RUNTIME_BOOT_ID", e2e::agent::boot_id('a'));
            let _ = host.run(&["restore"]).expect(10);
            let case = Case::new(place, host, |root| make_second(root, 10));
            try_backups(&case, &["backup", "--json"], true, choices);
        },
    );
}

#[test]
fn a_call_that_fails_in_the_pause_takes_nothing_out() {
    if !is_root() {
        return;
    }
    rounds(
        "unread a_call_that_fails_in_the_pause_takes_nothing_out",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let host = Host::new(&place).with("RUNTIME_GATEWAY_USER", HELD.to_string());
            let hand_over = |root: &Path| {
                let owner = HELD.to_string();
                let done = Command::new("chown")
                    .args(["-Rh", &owner])
                    .arg(root)
                    .status();
                assert!(done.is_ok_and(|done| done.success()), "it is ours to give");
            };
            hand_over(&host.root);
            let case = Case::new(place, host, |root| {
                make_second(root, 10);
                hand_over(root);
            });
            let uid = HELD.to_string();
            let arguments = [
                "backup",
                "--json",
                "--freeze-user",
                &uid,
                "--max-pause",
                "20s",
            ];
            try_backups(&case, &arguments, false, choices);
        },
    );
}

#[test]
fn a_call_that_fails_when_a_runtime_starts_does_not_replace_a_newer_tree() {
    rounds(
        "unread a_call_that_fails_when_a_runtime_starts_does_not_replace_a_newer_tree",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let mut host = Host::new(&place).booted('a');
            let _ = host.run(&["restore"]).expect(10);
            host.set("RUNTIME_BOOT_ID", e2e::agent::boot_id('a'));
            let mut case = Case::new(place, host, |root| make_second(root, 10));
            case.host.set("RUNTIME_BOOT_ID", e2e::agent::boot_id('b'));
            let traced = |fault: Option<&Fault>| {
                case.reset(false);
                run(
                    &case.host.command(&["restore", "--json"]),
                    &case.host.root,
                    fault,
                )
            };
            let clean = traced(None);
            assert_eq!(clean.outcome.expect(0).json()["unchanged"], true);
            for fault in choose(&clean.calls, choices) {
                let outcome = traced(Some(&fault)).outcome;
                let is_root = fault.call.path.as_os_str().is_empty();
                let is_refused = is_root && outcome.code == Some(74);
                assert!(
                    is_refused || outcome.code == Some(0),
                    "{fault}: {outcome:?}"
                );
                let differences = differences(&case.now, &plain(&case.host.root));
                assert_eq!(differences, [""; 0], "{fault}: {}", outcome.stderr);
                case.assert_heals(&["backup", "--json"], &fault.to_string());
            }
        },
    );
}

/// After a restore by hand the index is made from the layers and the tree that was put in place.
#[test]
fn a_call_that_fails_in_a_restore_by_hand_takes_nothing_out_of_the_next_snapshot() {
    rounds(
        "unread a_call_that_fails_in_a_restore_by_hand_takes_nothing_out_of_the_next_snapshot",
        2,
        2,
        |choices| {
            let place = Place::directory();
            let host = Host::new(&place);
            let mut case = Case::new(place, host, |root| make_second(root, 10));
            // What comes back is the tree of the snapshot.
            case.now = case.before.clone();
            let traced = |fault: Option<&Fault>| {
                case.reset(true);
                case.host.lose_root();
                fs::create_dir(&case.host.root).expect("can make the root");
                make_first(&case.host.root);
                make_second(&case.host.root, 10);
                run(
                    &case.host.command(&["restore", "--json"]),
                    &case.host.root,
                    fault,
                )
            };
            let clean = traced(None);
            let _ = clean.outcome.expect(0);
            for fault in choose(&clean.calls, choices) {
                let outcome = traced(Some(&fault)).outcome;
                if outcome.code != Some(0) {
                    let is_root = fault.call.path.as_os_str().is_empty();
                    assert!(is_root && outcome.code == Some(74), "{fault}: {outcome:?}");
                    let _ = case.host.run(&["restore"]).expect(0);
                }
                let found = differences(&case.before, &plain(&case.host.root));
                assert_eq!(found, [""; 0], "{fault}: {}", outcome.stderr);
                case.assert_heals(&["backup", "--json"], &fault.to_string());
            }
        },
    );
}

#[test]
fn too_few_descriptors_take_nothing_out_of_a_snapshot() {
    let place = Place::directory();
    let host = Host::new(&place);
    let deep: PathBuf = (0..40).map(|depth| format!("d{depth}")).collect();
    tree::write(&host.root, deep.join("file"), "below it all");
    let case = Case::new(place, host, |root| make_second(root, 10));
    let mut seen = BTreeSet::new();
    for limit in [10, 12, 14, 16, 18, 20, 24, 32, 48, 64] {
        case.reset(false);
        let agent = case.host.command(&["backup", "--json"]);
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -n \"$1\" && shift && exec \"$@\"", "sh"])
            .arg(limit.to_string());
        let traced = run(&around(command, &agent), &case.host.root, None);
        let what = format!("{limit} descriptors");
        if traced.outcome.code == Some(0) {
            seen.insert(!case.judge(&traced.outcome, &what).is_empty());
        } else {
            let found = differences(&case.before, &case.newest());
            assert_eq!(found, [""; 0], "{what}: nothing is published");
        }
        case.assert_heals(&["backup", "--json"], &what);
    }
    assert!(
        seen.contains(&true),
        "one of the limits cuts the tree short"
    );
}

#[test]
fn a_damaged_directory_takes_nothing_out_of_a_snapshot() {
    if !is_root() {
        return;
    }
    let place = Place::directory();
    let mut host = Host::new(&place);
    let image = host.folder.path().join("image");
    let file = File::create(&image).expect("can make a file");
    file.set_len(16 << 20).expect("can set a length");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-b", "4096", "-O", "metadata_csum"])
        .arg(&image)
        .status();
    if !made.is_ok_and(|made| made.success()) {
        eprintln!("skipped: no ext4 can be made here, which takes e2fsprogs");
        return;
    }
    let disk = host.folder.path().join("disk");
    let image_text = image.display().to_string();
    let attach = || mount(&disk, &["-o", "loop,errors=continue", &image_text]);
    let Some(mounted) = attach() else {
        return;
    };
    host.root = disk.join("root");
    host.set("RUNTIME_ROOT", host.root.display().to_string());
    fs::create_dir(&host.root).expect("can make the root");
    let case = Case::new(place, host, |root| make_second(root, 10));
    drop(mounted);

    let asked = Command::new("debugfs")
        .args(["-R", "blocks /root/deep/down"])
        .arg(&image)
        .output()
        .expect("debugfs can be run");
    let block = String::from_utf8_lossy(&asked.stdout);
    let block: u64 = block
        .trim()
        .parse()
        .expect("a small directory has one block");
    let image = File::options().read(true).write(true).open(&image);
    let image = image.expect("it is there");
    let mut good = [0; 4096];
    image
        .read_exact_at(&mut good, block * 4096)
        .expect("it is in the image");
    image
        .write_all_at(&[0xff; 512], block * 4096 + 12)
        .expect("can write");
    let mounted = attach().expect("it could be mounted before");
    let damaged = fs::read_dir(case.host.root.join("deep/down"))
        .and_then(|mut names| names.try_for_each(|name| name.map(drop)));
    assert!(damaged.is_err(), "the directory is damaged");

    let outcome = case.host.run(&["backup", "--json"]);
    let unread = case.judge(&outcome, "a damaged directory");
    assert_eq!(unread, [PathBuf::from("deep/down")]);
    let again = case.host.run(&["backup", "--json"]);
    assert_eq!(case.judge(&again, "a directory that stays damaged"), unread);
    drop(mounted);
    image.write_all_at(&good, block * 4096).expect("can write");
    (&image).flush().expect("it is a file");
    let _mounted = attach().expect("it could be mounted before");
    case.assert_heals(&["backup", "--json"], "a damaged directory");
}
