//! Disks that are full, read-only or odd: the error names the place and what to do, nothing is lost, and the next run works once
//! the disk does.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e::agent::{Host, Outcome, Place};
use e2e::mount::{Mount, mount, tmpfs};
use e2e::tree::{self, Tree, assert_same, describe};

/// Fills a disk to its last byte; gives the file to remove.
fn fill(folder: &Path) -> PathBuf {
    let path = folder.join("filler");
    let mut file = File::create(&path).expect("there is room for a name");
    let block = vec![1; 1 << 16];
    let mut size = block.len();
    while size > 0 {
        // What does not fit as a whole may have been written in part; less will fit.
        if file.write_all(&block[..size]).is_err() {
            size /= 2;
        }
    }
    path
}

/// A host whose root, with its parent, is a file system of its own; state and store are elsewhere.
fn host_on(place: &Place, options: &[&str]) -> Option<(Mount, Host)> {
    let host = Host::new(place);
    let disk = host.folder.path().join("disk");
    let mounted = mount(&disk, options)?;
    let mut host = host;
    host.root = disk.join("root");
    fs::create_dir(&host.root).expect("can make the root");
    host.set("RUNTIME_ROOT", host.root.display().to_string());
    Some((mounted, host))
}

const SMALL: [&str; 5] = ["-t", "tmpfs", "-o", "size=12m", "tmpfs"];

/// The names beside the root.
fn beside(root: &Path) -> Vec<String> {
    let folder = root.parent().expect("it has one");
    let entries = fs::read_dir(folder).expect("it stays");
    let names = entries.map(|entry| entry.expect("it stays").file_name().display().to_string());
    names.filter(|name| name != "root").collect()
}

fn assert_says(outcome: &Outcome, parts: &[&str]) {
    let sentence = outcome.sentence();
    for part in parts {
        assert!(sentence.contains(part), "{sentence} does not say {part}");
    }
}

/// A root that is a mount point has the new tree in it while that is made, and the time of when that went.
fn with_time_of(before: &Tree, mut after: Tree) -> Tree {
    let root = after.get_mut(Path::new("")).expect("there is a root");
    root.mtime = before[Path::new("")].mtime;
    after
}

const NO_SPACE: &str = "No space left on device (os error 28); make room on that file system";

#[test]
fn a_full_state_directory_fails_both_verbs_and_loses_nothing() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", tree::noise(1, 1 << 20));
    host.backup();
    let Some(_disk) = tmpfs(&host.state, "size=256k") else {
        return;
    };
    let filler = fill(&host.state);
    tree::write(&host.root, "file", "changed");
    let (objects, before) = (place.objects(), describe(&host.root));
    for verb in ["backup", "restore"] {
        let outcome = host.run(&[verb]).expect(74);
        assert_says(&outcome, &[NO_SPACE]);
        let state = host.state.display().to_string();
        assert!(
            outcome.sentence().contains(&state) || outcome.sentence().contains("RUNTIME_STATE"),
            "{outcome:?}"
        );
        assert!(place.objects() == objects, "{verb} has changed the store");
        assert_same(&before, &describe(&host.root));
        assert_eq!(host.leftovers(), [""; 0]);
    }
    fs::remove_file(filler).expect("it is there");
    let _ = host.run(&["restore"]).expect(0);
    tree::write(&host.root, "file", "changed again");
    host.backup();
}

#[test]
fn a_state_directory_that_fills_up_during_a_walk_is_said_to_be_full() {
    let place = Place::directory();
    let host = Host::new(&place);
    let Some(_disk) = tmpfs(&host.state, "size=256k") else {
        return;
    };
    tree::write(&host.root, "file", "content");
    host.backup();
    // Their log of changes takes more than the thread that compresses it is given at once.
    for number in 0..3000 {
        tree::write(&host.root, format!("directory/file-{number}"), "");
    }
    let _filler = fill(&host.state);
    let outcome = host.run(&["backup"]).expect(74);
    assert_says(&outcome, &["RUNTIME_STATE", NO_SPACE]);
}

#[test]
fn a_full_root_keeps_the_old_tree_and_is_restored_when_there_is_room() {
    let place = Place::directory();
    let Some((_disk, host)) = host_on(&place, &SMALL) else {
        return;
    };
    tree::write(&host.root, "large", tree::noise(1, 5 << 20));
    tree::write(&host.root, "dir/file", "file");
    host.backup();
    tree::write(&host.root, "large", "changed");
    let filler = fill(&host.root);
    let before = describe(&host.root);
    let outcome = host.run(&["restore"]).expect(74);
    assert_says(&outcome, &["cannot ", NO_SPACE]);
    assert_same(&before, &describe(&host.root));
    assert_eq!(beside(&host.root), [""; 0], "the half of a tree is gone");
    // To take a snapshot takes no room there.
    let _ = host.json(&["backup"]);
    assert_same(&before, &describe(&host.root));
    fs::remove_file(filler).expect("it is there");
    let first = host.json(&["list"])["snapshots"][1]["id"].clone();
    let first = first.as_str().expect("there are two");
    let _ = host.run(&["restore", first]).expect(0);
    let back = fs::metadata(host.root.join("large")).expect("it is back");
    assert_eq!(back.len(), 5 << 20);
}

#[test]
fn a_full_root_that_is_a_mount_point_keeps_the_old_tree_too() {
    let place = Place::directory();
    let host = Host::new(&place);
    let Some(_disk) = tmpfs(&host.root, "size=8m") else {
        return;
    };
    tree::write(&host.root, "large", tree::noise(1, 5 << 20));
    tree::write(&host.root, "dir/file", "file");
    host.backup();
    tree::write(&host.root, "large", "changed");
    tree::write(&host.root, "new", "new");
    let filler = fill(&host.root);
    let before = describe(&host.root);
    let outcome = host.run(&["restore"]).expect(74);
    assert_says(&outcome, &[NO_SPACE]);
    assert_same(&before, &with_time_of(&before, describe(&host.root)));
    fs::remove_file(filler).expect("it is there");
    let _ = host.run(&["restore"]).expect(0);
    let mut names: Vec<_> = describe(&host.root).into_keys().collect();
    names.retain(|name| !name.as_os_str().is_empty());
    assert_eq!(names, ["dir", "dir/file", "large"].map(PathBuf::from));
}

#[test]
fn a_full_store_keeps_what_it_held_and_takes_the_next_snapshot_when_there_is_room() {
    let place = Place::directory();
    let host = Host::new(&place);
    let Place::Directory(folder) = &place else {
        unreachable!("it was made so");
    };
    let Some(_disk) = tmpfs(folder.path(), "size=4m") else {
        return;
    };
    tree::write(&host.root, "file", "first");
    let first = host.backup();
    let objects = place.objects();
    tree::write(&host.root, "large", tree::noise(1, 6 << 20));
    for _ in 0..3 {
        let outcome = host.run(&["backup", "--json"]).expect(75);
        let answer = outcome.json();
        assert_eq!(answer["code"], "store_unavailable");
        let error = answer["error"].as_str().expect("it is a sentence");
        assert!(error.contains(NO_SPACE), "{error}");
        assert!(place.objects() == objects, "the store holds what it held");
        let under_way = Command::new("find")
            .arg(folder.path())
            .args(["-name", ".under-way-*"])
            .output();
        let under_way = under_way.expect("find runs").stdout;
        assert_eq!(
            String::from_utf8_lossy(&under_way),
            "",
            "nothing takes up the room"
        );
    }
    // To the last byte: the head cannot be written either.
    fs::remove_file(host.root.join("large")).expect("it is there");
    tree::write(&host.root, "file", "second");
    let filler = fill(folder.path());
    let _ = host.run(&["backup"]).expect(75);
    assert_eq!(place.head()["snapshot"], first.as_str());
    let _ = host.run(&["verify", "--deep"]).expect(0);
    fs::remove_file(filler).expect("it is there");
    let second = host.backup();
    assert_eq!(place.head()["snapshot"], second.as_str());
}

#[test]
fn a_read_only_root_can_be_saved_and_is_not_restored() {
    let place = Place::directory();
    let Some((disk, host)) = host_on(&place, &SMALL) else {
        return;
    };
    tree::write(&host.root, "file", "first");
    host.backup();
    tree::write(&host.root, "file", "second");
    disk.remount("ro");
    let _ = host.json(&["backup"]);
    let before = describe(&host.root);
    let first = host.json(&["list"])["snapshots"][1]["id"].clone();
    let first = first.as_str().expect("there are two").to_owned();
    let outcome = host.run(&["restore", &first]).expect(74);
    let place_of = host
        .root
        .parent()
        .expect("it has one")
        .display()
        .to_string();
    assert_says(
        &outcome,
        &[
            "cannot make ",
            &place_of,
            "; that file system is mounted read-only",
        ],
    );
    assert_same(&before, &describe(&host.root));
    disk.remount("rw");
    let _ = host.run(&["restore", &first]).expect(0);
    assert_eq!(
        fs::read(host.root.join("file")).expect("it is back"),
        b"first"
    );
}

#[test]
fn a_file_system_without_attributes_keeps_all_else() {
    let place = Place::directory();
    let source = Host::new(&place);
    tree::write(&source.root, "dir/file", "file");
    tree::write(&source.root, "other", "other");
    for name in ["dir", "dir/file", "other"] {
        let path = source.root.join(name);
        let flags = rustix::fs::XattrFlags::empty();
        if rustix::fs::setxattr(&path, "user.test", b"value", flags).is_err() {
            eprintln!("skipped: the folder of the tests keeps no attributes");
            return;
        }
    }
    source.backup();
    let Some((_disk, host)) = host_on(&place, &["-t", "ramfs", "ramfs"]) else {
        return;
    };
    let outcome = host.run(&["restore"]).expect(0);
    let warning = "restored without a part of its status";
    assert_eq!(outcome.logged(warning).len(), 3, "{}", outcome.stderr);
    let mut want = describe(&source.root);
    for node in want.values_mut() {
        node.attributes.clear();
    }
    assert_same(&want, &describe(&host.root));
    // What it never had does not count as changed; what it writes does.
    tree::write(&host.root, "new", "new");
    let _ = host.json(&["backup"]);
    assert_eq!(host.json(&["backup"])["unchanged"], true);
}

#[test]
fn where_directories_cannot_be_exchanged_entries_are() {
    let place = Place::directory();
    let host = Host::new(&place);
    // Directories of a lower layer of an overlay cannot be renamed: that is a root in an image.
    let lower = host.folder.path().join("lower");
    tree::write(&lower, "root/dir/deep/file", "from the image");
    tree::write(&lower, "root/file", "from the image");
    let Some(_scratch) = tmpfs(&host.folder.path().join("scratch"), "size=16m") else {
        return;
    };
    for name in ["upper", "work"] {
        fs::create_dir(host.folder.path().join("scratch").join(name)).expect("can make it");
    }
    let base = host.folder.path().display();
    let options =
        format!("lowerdir={base}/lower,upperdir={base}/scratch/upper,workdir={base}/scratch/work");
    let Some((_disk, host)) = ({
        let disk = host.folder.path().join("disk");
        let mounted = mount(&disk, &["-t", "overlay", "-o", &options, "overlay"]);
        let mut host = host;
        host.root = disk.join("root");
        host.set("RUNTIME_ROOT", host.root.display().to_string());
        mounted.map(|mounted| (mounted, host))
    }) else {
        return;
    };
    let before = describe(&host.root);
    host.backup();
    tree::write(&host.root, "dir/deep/file", "changed");
    tree::write(&host.root, "new/file", "new");
    let _ = host.run(&["restore"]).expect(0);
    let after = describe(&host.root);
    assert_same(&before, &after);
    assert_eq!(beside(&host.root), [""; 0]);
}

#[test]
fn a_mount_below_the_root_is_saved_and_never_emptied() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "file");
    let inner = host.root.join("in ner");
    let Some(mounted) = tmpfs(&inner, "size=1m") else {
        return;
    };
    tree::write(&inner, "dir/file", "on another file system");
    host.backup();
    tree::write(&host.root, "file", "changed");
    tree::write(&inner, "dir/file", "on another file system, and changed");
    let before = describe(&host.root);
    let outcome = host.run(&["restore"]).expect(74);
    let place_of = inner.display().to_string();
    assert_says(
        &outcome,
        &["cannot replace ", &place_of, "unmount it first"],
    );
    assert_same(&before, &describe(&host.root));
    assert_eq!(host.leftovers(), [""; 0]);
    drop(mounted);
    let _ = host.run(&["restore"]).expect(0);
    assert_eq!(
        fs::read(inner.join("dir/file")).expect("it is back, in the root's own file system"),
        b"on another file system"
    );
}

/// Makes a file immutable, or changeable again. `false` where that is not possible.
fn immutable(path: &Path, sign: &str) -> bool {
    let status = Command::new("chattr")
        .arg(format!("{sign}i"))
        .arg(path)
        .status();
    let is_done = status.is_ok_and(|status| status.success());
    if !is_done {
        eprintln!("skipped: no file can be made immutable here");
    }
    is_done
}

/// Makes it changeable again however the test ends: nobody could remove it.
struct Immutable(PathBuf);

impl Immutable {
    fn new(path: PathBuf) -> Option<Self> {
        immutable(&path, "+").then_some(Self(path))
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        // It may have moved with the tree that it is in.
        let script = "find \"$0\" -xdev -exec chattr -i {} + 2>/dev/null";
        let folder = self.0.ancestors().find(|folder| folder.is_dir());
        let folder = folder.unwrap_or(Path::new("."));
        let _ = Command::new("sh")
            .args([OsStr::new("-c"), OsStr::new(script), folder.as_os_str()])
            .status();
    }
}

#[test]
fn an_immutable_file_of_the_old_tree_costs_its_room_and_is_named() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "dir/file", "first");
    let first = host.backup();
    tree::write(&host.root, "dir/file", "second");
    let second = host.backup();
    let Some(stuck) = Immutable::new(host.root.join("dir/file")) else {
        return;
    };
    let all = Immutable(host.folder.path().to_owned());
    // The new tree is there; only the old one cannot be removed, and that keeps no other restore from its work.
    for (snapshot, content) in [(&first, b"first".as_slice()), (&second, b"second")] {
        let outcome = host.run(&["restore", snapshot, "--json"]).expect(0);
        assert_eq!(outcome.logged("a part of the old tree is left").len(), 1);
        let warning = outcome.json()["warning"].to_string();
        for part in [
            "cannot remove ",
            "dir/file",
            "it may be immutable: see lsattr",
        ] {
            assert!(warning.contains(part), "{warning}");
        }
        let found = fs::read(host.root.join("dir/file")).expect("it is back");
        assert_eq!(found, content);
    }
    drop((stuck, all));
    let _ = host.run(&["prune"]).expect(0);
    assert_eq!(host.leftovers(), [""; 0]);
}

#[test]
fn an_immutable_file_in_a_root_that_is_a_mount_point_leaves_all_of_it_as_it_was() {
    let place = Place::directory();
    let host = Host::new(&place);
    let Some(_disk) = tmpfs(&host.root, "size=8m") else {
        return;
    };
    for name in ["a/file", "b", "m", "y", "z/file"] {
        tree::write(&host.root, name, "first");
    }
    host.backup();
    for name in ["a/file", "b", "m", "new", "y", "z/file"] {
        tree::write(&host.root, name, "second");
    }
    let Some(stuck) = Immutable::new(host.root.join("m")) else {
        return;
    };
    let before = describe(&host.root);
    let outcome = host.run(&["restore"]).expect(74);
    assert_says(
        &outcome,
        &["cannot move ", "/root/m", "it may be immutable: see lsattr"],
    );
    assert_same(&before, &with_time_of(&before, describe(&host.root)));
    drop(stuck);
    let _ = host.run(&["restore"]).expect(0);
    assert_eq!(fs::read(host.root.join("m")).expect("it is back"), b"first");
    assert!(!host.root.join("new").exists());
}
