//! The tree that is not there: a root that was removed, replaced or detached, one that a killed restore left half-made, and one
//! that has lost nearly everything. None of them becomes the newest snapshot by itself.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use e2e::agent::{Host, Outcome, Place};
use e2e::mount::{Mount, mount, tmpfs};
use e2e::s3::{Effect, Kind};
use e2e::supervisor::is_root;
use e2e::tree::{self, Tree, describe, differences, kept};
use rustix::process::Signal;
use serde_json::Value;

const FILES: u32 = 40;

fn fill(root: &Path) {
    for number in 0..FILES {
        tree::write(root, format!("folder-{}/{number}", number % 4), [b'x'; 100]);
    }
}

/// What is in a tree. A root that is a mount point keeps a time of its own.
fn content(root: &Path) -> Tree {
    let mut tree = kept(describe(root));
    tree.remove(Path::new(""));
    tree
}

#[track_caller]
fn assert_restored(want: &Tree, root: &Path) {
    let differences = differences(want, &content(root));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// Every backup of this root is refused with this code, and leaves the store as it was.
#[track_caller]
fn assert_refused(place: &Place, host: &Host, code: &str) -> Outcome {
    let before = place.objects();
    let boot = [("RUNTIME_BOOT_ID", e2e::agent::boot_id('c'))];
    let mut last = None;
    for arguments in [
        &["backup", "--json"][..],
        &["backup", "--json", "--confirm"],
        &["backup", "--json", "--fork"],
    ] {
        for settings in [&boot[..0], &boot[..]] {
            let mut command = host.command(arguments);
            command.envs(settings.iter().map(|(name, value)| (name, value)));
            let outcome = e2e::agent::Running::start(&mut command).wait().expect(74);
            assert_eq!(outcome.json()["code"], code, "{arguments:?} {settings:?}");
            last = Some(outcome);
        }
    }
    assert!(place.objects() == before, "nothing is published");
    last.expect("there was one")
}

/// A host whose tree is on the store, and what is in that.
fn backed_up(host: Host) -> (Host, Tree) {
    fill(&host.root);
    let before = content(&host.root);
    host.backup();
    (host, before)
}

/// A restore mends it, and backups go on.
#[track_caller]
fn assert_mended(place: &Place, host: &Host, want: &Tree) {
    assert_eq!(host.json(&["restore"])["unchanged"], false);
    assert_restored(want, &host.root);
    assert_eq!(host.json(&["backup"])["unchanged"], true);
    tree::write(&host.root, "since", "since");
    let answer = host.json(&["backup"]);
    assert_eq!(
        (&answer["unchanged"], &answer["fork"]),
        (&false.into(), &false.into())
    );
    assert_eq!(place.head()["snapshot"], answer["snapshot"]);
}

#[test]
fn a_root_that_was_removed_or_made_again_is_not_backed_up() {
    let place = Place::directory();
    let (host, before) = backed_up(Host::new(&place));
    host.lose_root();
    let refused = assert_refused(&place, &host, "root_lost");
    let error = refused.json()["error"].to_string();
    assert!(error.contains("backup-agent restore"), "{error}");
    fs::create_dir(&host.root).expect("can make the root");
    assert_refused(&place, &host, "root_lost");
    // Nor is one that somebody has filled again, or that has the number of the first one.
    fill(&host.root);
    assert_refused(&place, &host, "root_lost");
    assert_mended(&place, &host, &before);

    let number = fs::metadata(&host.root).expect("it is there").ino();
    let mut is_number_of_before = false;
    for _ in 0..4 {
        host.lose_root();
        fs::create_dir(&host.root).expect("can make the root");
        is_number_of_before |= fs::metadata(&host.root).expect("it is there").ino() == number;
        assert_refused(&place, &host, "root_lost");
    }
    println!("the number of the root was used again: {is_number_of_before}");
}

#[test]
fn a_root_is_known_from_a_start_with_an_empty_store_on() {
    let place = Place::directory();
    let host = Host::new(&place).booted('a');
    let _ = host.run(&["restore"]).expect(10);
    host.lose_root();
    fs::create_dir(&host.root).expect("can make the root");
    assert_refused(&place, &host, "root_lost");
    assert_eq!(place.keys("snapshots/"), [""; 0]);
    let _ = host.run(&["restore"]).expect(10);
    fill(&host.root);
    assert_eq!(host.json(&["backup"])["fork"], false);
}

#[test]
fn a_root_in_the_place_of_which_is_something_else_is_not_backed_up() {
    let place = Place::directory();
    let (host, before) = backed_up(Host::new(&place));
    let aside = host.folder.path().join("aside");
    fs::rename(&host.root, &aside).expect("can be moved");
    fs::write(&host.root, "a file").expect("can write");
    assert_refused(&place, &host, "root_lost");
    fs::remove_file(&host.root).expect("it is there");
    for (target, code) in [("nowhere", "root_lost"), ("/", "usage")] {
        symlink(target, &host.root).expect("can make a link");
        if code == "usage" {
            let refused = host.run(&["backup", "--json"]).expect(64);
            assert_eq!(refused.json()["code"], code);
        } else {
            assert_refused(&place, &host, code);
        }
        fs::remove_file(&host.root).expect("it is there");
    }
    // Another folder behind a link is another folder; the very one is itself.
    let other = host.folder.path().join("other");
    fs::create_dir(&other).expect("can make a folder");
    symlink(&other, &host.root).expect("can make a link");
    assert_refused(&place, &host, "root_lost");
    fs::remove_file(&host.root).expect("it is there");
    symlink(&aside, &host.root).expect("can make a link");
    assert_head(&place, &host);
    fs::remove_file(&host.root).expect("it is there");
    // The very directory comes back: nothing was lost.
    fs::rename(&aside, &host.root).expect("can be moved");
    assert_head(&place, &host);
    assert_restored(&before, &host.root);
}

#[test]
fn a_root_that_its_user_may_not_list_is_not_backed_up() {
    if !is_root() {
        return;
    }
    let place = Place::directory();
    let host = Host::new(&place).with("RUNTIME_GATEWAY_USER", "54701");
    chown(&host.root, Some(54_701), Some(54_701)).expect("root can give it away");
    let (host, _) = backed_up(host);
    let set_mode = |mode| fs::set_permissions(&host.root, fs::Permissions::from_mode(mode));
    set_mode(0o000).expect("can set a mode");
    let before = place.objects();
    let refused = host.run(&["backup", "--json"]).expect(74);
    assert_eq!(refused.json()["code"], "local");
    assert!(place.objects() == before);
    set_mode(0o755).expect("can set a mode");
    assert_eq!(host.json(&["backup"])["fork"], false);
}

#[test]
fn a_volume_that_was_detached_is_not_backed_up() {
    let place = Place::directory();
    let host = Host::new(&place);
    // The root is the volume itself, and then a folder on it; what is below is empty, or not there.
    let Some(volume) = tmpfs(&host.root, "size=8m") else {
        return;
    };
    let (mut host, before) = backed_up(host);
    drop(volume);
    assert!(content(&host.root).is_empty());
    assert_refused(&place, &host, "root_lost");
    let Some(volume) = tmpfs(&host.root, "size=8m") else {
        return;
    };
    // Another volume, or the same one that is made again.
    assert_refused(&place, &host, "root_lost");
    assert_mended(&place, &host, &before);
    drop(volume);

    let place = Place::directory();
    for (name, value) in place.settings() {
        host.set(&name, value);
    }
    let at = host.folder.path().join("volume");
    let Some(volume) = tmpfs(&at, "size=8m") else {
        return;
    };
    host.root = at.join("home");
    fs::create_dir(&host.root).expect("can make the root");
    host.set("RUNTIME_ROOT", host.root.display().to_string());
    fs::remove_dir_all(&host.state).expect("there is a state");
    let (host, before) = backed_up(host);
    drop(volume);
    assert_refused(&place, &host, "root_lost");
    fs::create_dir(&host.root).expect("can make the root");
    assert_refused(&place, &host, "root_lost");
    assert_mended(&place, &host, &before);
}

/// The image of a container has the root in a lower layer, until the first write to it.
fn overlay(host: &Host) -> Option<Mount> {
    let folder = host.folder.path();
    let of = |name: &str| folder.join("layers").join(name);
    for name in ["lower/root", "upper", "work"] {
        fs::create_dir_all(of(name)).expect("can make a directory");
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        of("lower").display(),
        of("upper").display(),
        of("work").display()
    );
    mount(
        &folder.join("disk"),
        &["-t", "overlay", "-o", &options, "overlay"],
    )
}

fn host_on_overlay(place: &Place) -> Option<(Host, Mount)> {
    let mut host = Host::new(place);
    let disk = overlay(&host)?;
    host.root = host.folder.path().join("disk/root");
    host.set("RUNTIME_ROOT", host.root.display().to_string());
    Some((host, disk))
}

#[test]
fn a_root_of_an_image_stays_the_same_when_it_is_first_written_to() {
    // A start of a runtime, a backup by hand, and a restore by hand of what another machine has.
    for is_booted in [true, false] {
        let place = Place::directory();
        let Some((mut host, _disk)) = host_on_overlay(&place) else {
            return;
        };
        if is_booted {
            host.set("RUNTIME_BOOT_ID", e2e::agent::boot_id('a'));
            let _ = host.run(&["restore"]).expect(10);
        } else {
            host.backup();
        }
        fill(&host.root);
        let answer = host.json(&["backup"]);
        assert_eq!(place.head()["snapshot"], answer["snapshot"]);
        tree::write(&host.root, "since", "since");
        assert_eq!(host.json(&["backup"])["fork"], false);
        host.lose_root();
        fs::create_dir(&host.root).expect("can make the root");
        assert_refused(&place, &host, "root_lost");
    }
}

#[test]
fn a_root_that_is_swapped_while_it_is_backed_up_is_not_published() {
    let place = Place::memory();
    let (host, before) = backed_up(Host::new(&place));
    let (aside, other) = (
        host.folder.path().join("aside"),
        host.folder.path().join("other"),
    );
    tree::write(&host.root, "new", "new");
    fs::create_dir(&other).expect("can make a directory");
    let records = place.keys("snapshots/");
    let head = place.head();
    place.s3().take_requests();
    place.s3().add_fault(Kind::Put, "layers/", 1, Effect::Hold);
    let backup = host.start(&["backup", "--json"]);
    place.s3().wait_for(Kind::Put, "layers/");
    fs::rename(&host.root, &aside).expect("can be moved");
    fs::rename(&other, &host.root).expect("can be moved");
    place.s3().release();
    assert_eq!(backup.wait().expect(74).json()["code"], "root_lost");
    assert_eq!((place.keys("snapshots/"), place.head()), (records, head));
    assert_refused(&place, &host, "root_lost");
    assert_mended(&place, &host, &before);
}

/// Kills a restore while it moves entries: some of the old tree are out of the root. False if it came too late.
fn killed_while_moving(host: &Host) -> bool {
    let old = host.root.join(".restoring/old");
    let mut restore = host.start(&["restore", "--json"]);
    loop {
        let moved = fs::read_dir(&old).map_or(0, Iterator::count);
        if moved > 0 {
            restore.signal(Signal::KILL);
            let killed = restore.wait().signal.is_some();
            // It may have ended with all entries of both trees in their places.
            return killed && old.exists();
        }
        if !restore.is_running() {
            return false;
        }
    }
}

#[test]
fn half_of_two_trees_is_not_backed_up_while_it_cannot_be_ended() {
    const TRIES: u32 = 20;
    let place = Place::directory();
    let host = Host::new(&place);
    let Some(volume) = tmpfs(&host.root, "size=32m") else {
        return;
    };
    for number in 0..400 {
        tree::write(&host.root, format!("entry-{number}"), number.to_string());
    }
    let before = content(&host.root);
    host.backup();
    for _ in 0..TRIES {
        for number in 0..400 {
            tree::write(&host.root, format!("newer-{number}"), number.to_string());
        }
        if !killed_while_moving(&host) {
            let _ = host.run(&["restore"]).expect(0);
            continue;
        }
        // Nothing can be moved now: the tree stays as it is, whoever asks for a backup, and wherever to.
        volume.remount("ro");
        assert_refused(&place, &host, "restore_unfinished");
        let elsewhere = Place::directory();
        let mut command = host.command(&["backup", "--json"]);
        command.envs(elsewhere.settings());
        let refused = e2e::agent::Running::start(&mut command).wait().expect(74);
        assert_eq!(refused.json()["code"], "restore_unfinished");
        assert!(elsewhere.objects().is_empty());
        // Once it can be, the next backup ends it first.
        volume.remount("rw");
        assert_eq!(host.json(&["backup"])["unchanged"], true);
        assert_restored(&before, &host.root);
        return;
    }
    panic!("none of {TRIES} restores was killed in time");
}

fn forks(host: &Host) -> Vec<Value> {
    let listed = host.json(&["list"]);
    let all = listed["snapshots"].as_array().expect("it is a list");
    let forks = all.iter().filter(|entry| entry["fork"] == true);
    forks.map(|entry| entry["id"].clone()).collect()
}

/// A backup that is a fork, because the tree has shrunk.
#[track_caller]
fn assert_fork(place: &Place, host: &Host) -> Value {
    let head = place.head();
    let answer = host.json(&["backup"]);
    assert_eq!(
        (&answer["fork"], &answer["unchanged"]),
        (&true.into(), &false.into()),
        "{answer}"
    );
    let warning = answer["warning"].as_str().expect("there is a warning");
    assert!(warning.contains("shrunk"), "{warning}");
    assert_eq!(place.head(), head);
    assert_eq!(
        host.json(&["list"])["snapshots"][0]["id"],
        answer["snapshot"]
    );
    assert!(forks(host).contains(&answer["snapshot"]));
    answer
}

#[track_caller]
fn assert_head(place: &Place, host: &Host) -> Value {
    let answer = host.json(&["backup"]);
    assert_eq!(
        (&answer["fork"], &answer["warning"]),
        (&false.into(), &Value::Null),
        "{answer}"
    );
    assert_eq!(place.head()["snapshot"], answer["snapshot"]);
    answer
}

/// Leaves so many files.
fn shrink(root: &Path, left: u32) {
    for number in left..FILES {
        let _ = fs::remove_file(root.join(format!("folder-{}/{number}", number % 4)));
    }
}

#[test]
fn a_tree_of_which_a_tenth_is_left_is_a_snapshot_like_any_other() {
    let place = Place::directory();
    let (host, _) = backed_up(Host::new(&place));
    shrink(&host.root, FILES / 10);
    assert_head(&place, &host);
    shrink(&host.root, 1);
    assert_head(&place, &host);
}

#[test]
fn a_tree_of_which_less_than_a_tenth_is_left_is_a_fork_first() {
    for left in [FILES / 10 - 1, 1] {
        let place = Place::directory();
        let (host, _) = backed_up(Host::new(&place));
        shrink(&host.root, left);
        assert_fork(&place, &host);
        tree::write(&host.root, "since", "since");
        let answer = assert_head(&place, &host);
        assert_eq!(answer["files"], left + 1);
        assert_eq!(forks(&host).len(), 1);
    }
}

/// Leaves all files, and nothing in them.
fn empty(root: &Path) {
    for number in 0..FILES {
        tree::write(root, format!("folder-{}/{number}", number % 4), "");
    }
}

#[test]
fn a_tree_whose_files_are_emptied_is_a_fork_first() {
    let place = Place::directory();
    let (host, before) = backed_up(Host::new(&place));
    empty(&host.root);
    assert_fork(&place, &host);
    fill(&host.root);
    // It is back, with times of now: a snapshot like any other, and not yet confirmed.
    assert_head(&place, &host);
    empty(&host.root);
    assert_fork(&place, &host);
    assert_head(&place, &host);
    assert_eq!(forks(&host).len(), 2);
    assert_eq!(content(&host.root).len(), before.len());
}

#[test]
fn a_tree_that_comes_back_before_it_is_confirmed_is_as_if_nothing_was() {
    let place = Place::directory();
    let (host, before) = backed_up(Host::new(&place));
    let aside = host.folder.path().join("aside");
    let away = |is_away: bool| {
        for number in 0..4 {
            let name = format!("folder-{number}");
            let paths = [host.root.join(&name), aside.join(&name)];
            let [from, to] = if is_away { [0, 1] } else { [1, 0] };
            fs::rename(&paths[from], &paths[to]).expect("can be moved");
        }
    };
    fs::create_dir(&aside).expect("can make a directory");
    for _ in 0..2 {
        away(true);
        assert_fork(&place, &host);
        away(false);
        let _ = host.json(&["backup"]);
        assert_restored(&before, &host.root);
    }
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    assert_restored(&before, &host.root);
}

#[test]
fn a_start_before_a_fork_is_confirmed_brings_the_whole_tree_back() {
    let shrinkers: [fn(&Path); 2] = [|root| shrink(root, 1), empty];
    for shrink in shrinkers {
        let place = Place::directory();
        let mut host = Host::new(&place).booted('a');
        let _ = host.run(&["restore"]).expect(10);
        let (shrunken, before) = backed_up(host);
        host = shrunken;
        shrink(&host.root);
        assert_fork(&place, &host);
        host.set("RUNTIME_BOOT_ID", e2e::agent::boot_id('b'));
        assert_eq!(host.json(&["restore"])["unchanged"], false);
        assert_restored(&before, &host.root);
        // Nothing of it is confirmed now: what shrinks again is a fork again.
        shrink(&host.root);
        assert_fork(&place, &host);
        assert_eq!(assert_head(&place, &host)["consistency"], "instant");
    }
}

#[test]
fn a_fork_that_is_asked_for_says_nothing_of_the_size_of_a_tree() {
    let place = Place::directory();
    let (host, _) = backed_up(Host::new(&place));
    shrink(&host.root, 1);
    let head = place.head();
    let answer = host.json(&["backup", "--fork"]);
    assert_eq!(
        (&answer["fork"], &answer["warning"]),
        (&true.into(), &Value::Null)
    );
    assert_eq!(place.head(), head);
}

#[test]
fn a_first_snapshot_of_nothing_is_no_fork() {
    let place = Place::directory();
    let host = Host::new(&place);
    assert_head(&place, &host);
    tree::write(&host.root, "file", "");
    assert_head(&place, &host);
    fs::remove_file(host.root.join("file")).expect("it is there");
    assert_fork(&place, &host);
}

#[test]
fn a_wiped_tree_is_a_fork_though_nothing_of_it_is_remembered() {
    let place = Place::directory();
    let (host, before) = backed_up(Host::new(&place).booted('a'));
    let whole = place.head()["snapshot"].clone();
    fs::remove_dir_all(&host.state).expect("there is a state");
    shrink(&host.root, 0);
    assert_fork(&place, &host);
    // The index alone is lost.
    let index = host.state.join("index");
    let _ = host.json(&["restore"]);
    assert_restored(&before, &host.root);
    fs::remove_file(index).expect("there is an index");
    shrink(&host.root, 0);
    assert_fork(&place, &host);
    assert_eq!(place.head()["snapshot"], whole);
}

#[test]
fn a_wiped_tree_is_a_fork_though_the_store_has_lost_a_part_of_the_last_snapshot() {
    let place = Place::directory();
    let host = Host::new(&place);
    // It stays, and with it most of the layer.
    tree::write(&host.root, "large", tree::noise(1, 1 << 20));
    let (host, _) = backed_up(host);
    let head = place.head();
    place.remove(&place.keys("layers/")[0]);
    shrink(&host.root, 0);
    let answer = host.json(&["backup", "--confirm"]);
    assert_eq!(answer["fork"], true, "{answer}");
    assert_eq!(place.head(), head);
    // Nothing is built on what the store has lost, though it was asked a moment ago.
    assert_head(&place, &host);
    let _ = host.run(&["verify"]).expect(0);
}

#[test]
fn an_instance_that_is_claimed_anew_knows_how_large_its_tree_was() {
    let place = Place::directory();
    let mut host = Host::new(&place).booted('a');
    let _ = host.run(&["restore"]).expect(10);
    let (claimed, _) = backed_up(host);
    host = claimed;
    host.set("RUNTIME_BOOT_ID", e2e::agent::boot_id('b'));
    assert_eq!(host.json(&["restore"])["unchanged"], true);
    shrink(&host.root, 1);
    assert_fork(&place, &host);
    // Elsewhere, with nothing remembered but what the restore learned.
    let other = Host::new(&place).booted('c');
    assert_eq!(other.json(&["restore"])["files"], FILES);
    shrink(&other.root, 1);
    assert_fork(&place, &other);
    assert_head(&place, &other);
}

#[test]
fn a_tree_without_files_is_a_fork_first() {
    let place = Place::directory();
    let (host, before) = backed_up(Host::new(&place));
    let whole = place.head()["snapshot"].clone();
    shrink(&host.root, 0);
    let fork = assert_fork(&place, &host);
    assert_eq!(fork["files"], 0);
    let confirmed = assert_head(&place, &host);
    assert_eq!(confirmed["files"], 0);
    assert_eq!(host.json(&["backup"])["unchanged"], true);
    // Nothing is lost, and the next time it is a fork again.
    let whole = whole.as_str().expect("it has an id");
    let _ = host.json(&["restore", whole]);
    assert_restored(&before, &host.root);
    assert_head(&place, &host);
    shrink(&host.root, 1);
    assert_fork(&place, &host);
}
