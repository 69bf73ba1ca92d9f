//! Backup, restore and list on every kind of store: trees come back as they were, and doing it again changes nothing.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use e2e::agent::{Host, Place, boot_id, folder};
use e2e::on_every_store;
use e2e::tree::{self, assert_same, describe, kept};

on_every_store!(
    a_full_tree_comes_back_in_place_of_its_lost_root,
    a_full_tree_comes_back_beside_on_request,
    everything_comes_back_after_root_and_state_are_lost,
    an_older_snapshot_comes_back_by_its_id,
    a_changed_tree_is_put_back_and_what_came_since_goes,
    a_second_backup_and_a_second_restore_change_nothing,
    two_backups_at_once_both_succeed,
    a_list_shows_every_snapshot_newest_first,
    an_empty_store_is_said_to_be_empty_and_the_root_stays,
);

fn a_full_tree_comes_back_in_place_of_its_lost_root(place: &Place) {
    let host = Host::new(place);
    tree::make(&host.root);
    let before = kept(describe(&host.root));

    let answer = host.json(&["backup"]);
    assert_eq!(answer["unchanged"], false);
    assert_eq!(answer["consistency"], "instant");
    assert_eq!(answer["skipped"], 1, "the fifo");
    host.lose_root();
    let restored = host.json(&["restore"]);

    assert_eq!(restored["snapshot"], answer["snapshot"]);
    assert_eq!(restored["time"], answer["time"]);
    assert_eq!(restored["files"], answer["files"]);
    assert_same(&before, &describe(&host.root));
    assert_eq!(host.leftovers(), [""; 0]);
}

fn a_full_tree_comes_back_beside_on_request(place: &Place) {
    let host = Host::new(place);
    tree::make(&host.root);
    host.backup();
    let before = describe(&host.root);
    let state = describe(&host.state);

    let target = host.folder.path().join("below/target");
    let arguments = ["restore", "--target", &target.display().to_string()];
    let _ = host.run(&arguments).expect(0);

    assert_same(&kept(before.clone()), &describe(&target));
    assert_same(&before, &describe(&host.root));
    let facts = Path::new("state.json");
    assert_eq!(
        state[facts],
        describe(&host.state)[facts],
        "a restore beside is none of the root's business"
    );
    let again = host.run(&arguments).expect(64);
    assert!(
        again.sentence().contains("is not empty"),
        "{}",
        again.sentence()
    );
}

fn everything_comes_back_after_root_and_state_are_lost(place: &Place) {
    let host = Host::new(place);
    tree::make(&host.root);
    let before = kept(describe(&host.root));
    let snapshot = host.backup();
    host.lose_everything();

    let restored = host.json(&["restore"]);
    assert_eq!(restored["snapshot"], snapshot);
    assert_same(&before, &describe(&host.root));
    let next = host.json(&["backup"]);
    assert_eq!(
        next["unchanged"], true,
        "the restored tree is that snapshot"
    );
    assert_eq!(next["snapshot"], snapshot);
}

fn an_older_snapshot_comes_back_by_its_id(place: &Place) {
    let host = Host::new(place);
    tree::write(&host.root, "file", "old");
    let old = host.backup();
    tree::write(&host.root, "file", "new");
    let new = host.backup();

    assert_eq!(host.json(&["restore", &old])["snapshot"], old);
    assert_eq!(
        fs::read_to_string(host.root.join("file")).expect("it is back"),
        "old"
    );
    assert_eq!(
        place.head()["snapshot"],
        new,
        "restoring an old one does not make it the newest"
    );
    assert_eq!(host.json(&["restore"])["snapshot"], new);
    assert_eq!(
        fs::read_to_string(host.root.join("file")).expect("it is back"),
        "new"
    );
}

fn a_changed_tree_is_put_back_and_what_came_since_goes(place: &Place) {
    let host = Host::new(place);
    tree::make(&host.root);
    let before = kept(describe(&host.root));
    host.backup();

    fs::remove_file(host.root.join("text")).expect("it is there");
    tree::write(&host.root, "large", "small now");
    tree::write(&host.root, "new/file", "new");
    fs::remove_dir_all(host.root.join("links")).expect("it is there");
    std::os::unix::fs::symlink("/", host.root.join("links")).expect("can make a link");
    let restored = host.json(&["restore"]);

    assert_eq!(restored["unchanged"], false);
    assert_same(&before, &describe(&host.root));
}

fn a_second_backup_and_a_second_restore_change_nothing(place: &Place) {
    let host = Host::new(place);
    tree::make(&host.root);
    let first = host.json(&["backup"]);
    let objects = place.objects();
    let second = host.json(&["backup"]);
    assert_eq!(second["unchanged"], true);
    assert_eq!(second["bytesUploaded"], 0);
    assert_eq!(second["snapshot"], first["snapshot"]);
    assert_eq!(second["time"], first["time"]);
    assert_eq!(second["files"], first["files"]);

    host.lose_root();
    assert_eq!(host.json(&["restore"])["unchanged"], false);
    let restored = describe(&host.root);
    let again = host.json(&["restore"]);
    assert_eq!(again["unchanged"], true);
    assert_eq!(again["bytesDownloaded"], 0);
    assert_same(&restored, &describe(&host.root));
    assert_eq!(host.json(&["backup"])["unchanged"], true);
    assert_eq!(
        objects,
        place.objects(),
        "only the first backup wrote anything"
    );
}

fn two_backups_at_once_both_succeed(place: &Place) {
    let host = Host::new(place);
    tree::make(&host.root);
    let runs = [
        host.start(&["backup", "--json"]),
        host.start(&["backup", "--json"]),
    ];
    let answers = runs.map(|run| run.wait().expect(0).json());

    let unchanged = answers.iter().filter(|answer| answer["unchanged"] == true);
    assert_eq!(unchanged.count(), 1, "{answers:#?}");
    assert_eq!(answers[0]["snapshot"], answers[1]["snapshot"]);
    assert_eq!(place.keys("snapshots/").len(), 1);
}

fn a_list_shows_every_snapshot_newest_first(place: &Place) {
    let host = Host::new(place);
    let none = host.run(&["list"]).expect(0);
    assert!(
        none.stdout.starts_with("no snapshots in "),
        "{}",
        none.stdout
    );
    assert_eq!(host.json(&["list"])["snapshots"], serde_json::json!([]));

    let mut ids = Vec::new();
    for number in 0..3 {
        tree::write(&host.root, "file", number.to_string());
        ids.push(host.backup());
    }
    tree::write(&host.root, "file", "fork");
    let fork = host.json(&["backup", "--fork"]);
    assert_eq!(fork["fork"], true);

    let list = host.json(&["list"]);
    let list = list["snapshots"].as_array().expect("it is a list");
    let named: Vec<_> = list
        .iter()
        .map(|entry| entry["id"].as_str().expect("it has an id"))
        .collect();
    ids.push(fork["snapshot"].as_str().expect("it has an id").to_owned());
    assert_eq!(
        named,
        ids.iter().rev().map(String::as_str).collect::<Vec<_>>()
    );
    let marks: Vec<_> = list
        .iter()
        .map(|entry| (entry["head"] == true, entry["fork"] == true))
        .collect();
    assert_eq!(
        marks,
        [(false, true), (true, false), (false, false), (false, false)]
    );
    let sequences: Vec<_> = list
        .iter()
        .map(|entry| entry["sequence"].as_u64())
        .collect();
    assert_eq!(sequences, [Some(4), Some(3), Some(2), Some(1)]);
    for pair in list.windows(2) {
        assert_eq!(pair[0]["parent"], pair[1]["id"]);
    }

    let table = host.run(&["list"]).expect(0);
    let lines: Vec<_> = table.stdout.lines().collect();
    assert_eq!(lines.len(), 6, "{}", table.stdout);
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["ID", "TIME", "AGE", "PATHS", "SIZE", "STORED", "NOTE"]
    );
    assert!(lines[1].ends_with("instant, fork"), "{}", lines[1]);
    assert!(lines[2].ends_with("instant, head"), "{}", lines[2]);
    assert!(lines[5].contains("a month on R2"), "{}", lines[5]);
    assert_eq!(table.stderr, "", "a list has nothing to add");
}

fn an_empty_store_is_said_to_be_empty_and_the_root_stays(place: &Place) {
    let mut host = Host::new(place);
    tree::write(&host.root, "file", "was here before");
    let before = describe(&host.root);

    let by_hand = host.run(&["restore", "--json"]).expect(10);
    assert_eq!(by_hand.json()["code"], "no_snapshot");
    assert!(
        place.objects().is_empty(),
        "nobody claims anything by hand: {:?}",
        place.keys("")
    );

    host.set("RUNTIME_BOOT_ID", boot_id('a'));
    let _ = host.run(&["restore"]).expect(10);
    assert_eq!(place.head()["writer"], boot_id('a'));
    assert_eq!(place.head()["snapshot"], serde_json::Value::Null);
    assert_eq!(place.keys(""), ["head.json"]);
    // A restart finds its own claim.
    host.set("RUNTIME_BOOT_ID", boot_id('b'));
    let _ = host.run(&["restore"]).expect(10);
    assert_same(&before, &describe(&host.root));
    let snapshot = host.backup();
    assert_eq!(place.head()["snapshot"], snapshot);
    assert_eq!(place.head()["sequence"], 1);
}

#[test]
fn an_unchanged_tree_costs_no_request_at_all() {
    let place = Place::memory();
    let host = Host::new(&place).booted('a');
    tree::make(&host.root);
    let _ = host.run(&["restore"]).expect(10);
    host.backup();
    place.s3().take_requests();

    assert_eq!(host.json(&["backup"])["unchanged"], true);
    let requests = place.s3().take_requests();
    assert!(requests.is_empty(), "{requests:#?}");
}

/// The agent is held until the moment of the write, so that it looks within the same tick of the file system's clock.
#[test]
fn a_quiet_tree_is_of_one_instant_however_lately_it_was_written() {
    let host = Host::new(&Place::directory());
    tree::write(&host.root, "file", "first");
    host.backup();
    for number in 0..10 {
        let lock = fs::File::open(host.state.join("lock")).expect("a run leaves it");
        lock.lock().expect("nobody has it");
        let backup = host.start(&["backup", "--json"]);
        backup.wait_for_lock();
        tree::write(&host.root, "file", number.to_string());
        drop(lock);
        assert_eq!(backup.wait().expect(0).json()["consistency"], "instant");
    }
}

#[test]
fn a_file_that_changes_without_a_change_of_size_or_time_is_noticed() {
    let place = Place::directory();
    let host = Host::new(&place);
    for round in 0..20 {
        // Same size, same time: only the content tells.
        tree::write(&host.root, "file", format!("round {round:04}"));
        tree::set_mtime(&host.root.join("file"), 1_000_000_000, 0);
        assert_eq!(host.json(&["backup"])["unchanged"], false, "round {round}");
    }
}

#[test]
fn stock_tools_unpack_a_layer_to_the_same_tree() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::make(&host.root);
    host.backup();
    let objects = place.objects();
    let (_, layer) = objects
        .iter()
        .find(|(key, _)| key.starts_with("layers/"))
        .expect("there is a layer");
    let scratch = folder();
    let (archive, target) = (
        scratch.path().join("layer.tar.zst"),
        scratch.path().join("target"),
    );
    fs::write(&archive, layer).expect("can write a file");
    fs::create_dir(&target).expect("can make a directory");

    let mut zstd = Command::new("zstd")
        .arg("-dc")
        .arg(&archive)
        .stdout(Stdio::piped())
        .spawn()
        .expect("zstd is installed");
    let stream = zstd.stdout.take().expect("it is piped");
    let tar = Command::new("tar")
        .args([
            "--xattrs",
            "--numeric-owner",
            // It finds times before 1970 and after today odd, and keeps them.
            "--warning=no-timestamp",
            "-xpf",
            "-",
            "-C",
        ])
        .arg(&target)
        .stdin(stream)
        .output()
        .expect("tar is installed");
    assert!(zstd.wait().expect("it is our child").success());
    assert!(
        tar.status.success(),
        "{}",
        String::from_utf8_lossy(&tar.stderr)
    );
    assert_eq!(
        String::from_utf8_lossy(&tar.stderr),
        "",
        "stock tar knows all that is in it"
    );
    assert_same(&kept(describe(&host.root)), &describe(&target));
}
