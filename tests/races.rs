//! Two runtimes on one store: the last backups of the old one race the restore and the first backup of the new one. However
//! their requests interleave, one of them holds the head at the end, and every snapshot that either took is there.
//!
//! On S3 a gate in front of each lets one request pass at a time, in the order of the seed; on a directory both start at
//! moments of the seed. CI runs [`ROUNDS`] of each, `E2E_ROUNDS=1000` as many.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use e2e::agent::{Host, Outcome, Place, boot_id};
use e2e::history::{History, Shown, assert_whole};
use e2e::proxy::Proxy;
use e2e::seeds::{Choices, rounds};
use e2e::tree::{self, Tree, assert_same, describe};
use serde_json::Value;

const ROUNDS: u64 = 30;
const THREADS: usize = 4;
/// On a directory, both begin within this time: about what one of them takes.
const SPREAD: Duration = Duration::from_millis(40);

static HISTORY: LazyLock<History> = LazyLock::new(History::make);

/// One side of the race: what each of its runs said, and the tree that the run left or found.
type Side = Vec<(Outcome, Tree)>;

/// The instance that is on its way out takes one snapshot or two.
fn go(old: &Host, backups: u64) -> Side {
    let mut side = Side::new();
    for number in 0..backups {
        tree::write(&old.root, "file", format!("the old one's, {number}"));
        let tree = describe(&old.root);
        let outcome = old.run(&["backup", "--json"]);
        let is_over = outcome.code != Some(0);
        side.push((outcome, tree));
        if is_over {
            break;
        }
    }
    side
}

/// Its successor comes up and takes one.
fn come(new: &Host) -> Side {
    let restore = new.run(&["restore", "--json"]);
    let restored = describe(&new.root);
    tree::write(&new.root, "file", "the new one's");
    let tree = describe(&new.root);
    let backup = new.run(&["backup", "--json"]);
    vec![(restore, restored), (backup, tree)]
}

fn id(answer: &Value) -> String {
    let id = answer["snapshot"].as_str().expect("it names its snapshot");
    id.to_owned()
}

fn hosts(place: &Place) -> [Host; 2] {
    HISTORY.copy_to(place);
    let old = Host::new(place).booted('a');
    let _ = old.run(&["restore"]).expect(0);
    [old, Host::new(place).booted('b')]
}

/// Looks at the head while others move it: it only goes forward, and what it names is there.
struct Watch {
    sequence: u64,
}

impl Watch {
    fn look(&mut self, shown: &Shown) {
        assert!(
            shown.sequence() >= self.sequence,
            "it went back: {shown:#?}"
        );
        self.sequence = shown.sequence();
    }

    /// On a directory, where only single files can be looked at at once.
    fn look_in(&mut self, place: &Place) {
        let Place::Directory(folder) = place else {
            unreachable!("it was made as one");
        };
        let base = folder.path().join("store").join(e2e::agent::INSTANCE);
        let head = fs::read(base.join("head.json")).expect("there always is one");
        let head: Value = serde_json::from_slice(&head).expect("it is whole");
        let record = format!("snapshots/{}.json", id(&head));
        assert!(base.join(&record).exists(), "{record} is not there");
        let sequence = head["sequence"].as_u64().expect("it has one");
        assert!(sequence >= self.sequence, "it went back: {head}");
        self.sequence = sequence;
    }
}

/// Lets both run, each request when the seed says so.
fn race_on_s3(place: &Place, hosts: &mut [Host; 2], choices: &mut Choices) -> [Side; 2] {
    let backups = 1 + choices.below(2);
    let proxies = [Proxy::start(place), Proxy::start(place)];
    for (proxy, host) in proxies.iter().zip(hosts.iter_mut()) {
        proxy.gate(true);
        host.set("RUNTIME_S3_ENDPOINT", proxy.endpoint());
    }
    let has_ended = [AtomicBool::new(false), AtomicBool::new(false)];
    let is_over = |side: usize| has_ended[side].load(Ordering::Acquire);
    let mut watch = Watch { sequence: 0 };
    let [old, new] = &*hosts;
    std::thread::scope(|scope| {
        let end = |side: usize| has_ended[side].store(true, Ordering::Release);
        let old = scope.spawn(move || {
            let side = go(old, backups);
            end(0);
            side
        });
        let new = scope.spawn(move || {
            let side = come(new);
            end(1);
            side
        });
        while !(is_over(0) && is_over(1)) {
            let side = usize::from(choices.once_in(2));
            if proxies[side].pass_one(|| is_over(side)) {
                watch.look(&assert_whole(place));
            }
        }
        [old, new].map(|side| side.join().expect("the agent can be run"))
    })
}

/// Lets both run from moments of the seed on.
fn race_on_a_directory(place: &Place, hosts: &[Host; 2], choices: &mut Choices) -> [Side; 2] {
    let backups = 1 + choices.below(2);
    let spread = u64::try_from(SPREAD.as_micros()).expect("it is short");
    let starts = [0, 1].map(|_| Duration::from_micros(choices.below(spread)));
    let mut watch = Watch { sequence: 0 };
    let [old, new] = hosts;
    std::thread::scope(|scope| {
        let old = scope.spawn(move || {
            std::thread::sleep(starts[0]);
            go(old, backups)
        });
        let new = scope.spawn(move || {
            std::thread::sleep(starts[1]);
            come(new)
        });
        while !(old.is_finished() && new.is_finished()) {
            watch.look_in(place);
            std::thread::sleep(Duration::from_millis(1));
        }
        [old, new].map(|side| side.join().expect("the agent can be run"))
    })
}

/// What has to be true however it went.
fn assert_settled(place: &Place, hosts: &[Host; 2], [gone, came]: [Side; 2]) {
    let shown = assert_whole(place);
    let mut trees: BTreeMap<String, Tree> = HISTORY.trees.clone();
    let mut newest = HISTORY.head().to_owned();
    let mut known: BTreeSet<String> = HISTORY.ids.iter().cloned().collect();
    let mut fork = None;
    let [(restore, restored), (backup, tree)] = <[_; 2]>::try_from(came).expect("it has two runs");
    let backup = id(&backup.expect(0).json());
    trees.insert(backup.clone(), tree);
    known.insert(backup.clone());
    for (outcome, tree) in gone {
        let code = outcome.code;
        let id = if code == Some(0) {
            newest = id(&outcome.json());
            newest.clone()
        } else {
            let answer = outcome.expect(12).json();
            let mut others = shown.records.keys().filter(|id| !known.contains(*id));
            let id = others.next().expect("the loser's snapshot is kept").clone();
            let error = answer["error"].as_str().expect("it is a sentence");
            assert!(error.contains(&id), "{error}");
            fork = Some(id.clone());
            id
        };
        known.insert(id.clone());
        trees.insert(id, tree);
    }
    assert_eq!(
        shown.records.keys().cloned().collect::<BTreeSet<_>>(),
        known
    );
    assert_eq!(
        (shown.snapshot(), &shown.head["writer"]),
        (backup.as_str(), &boot_id('b').into())
    );
    // The new one has everything that the old one was told to be safe.
    assert_eq!(id(&restore.expect(0).json()), newest);
    assert_same(&trees[&newest], &restored);
    assert_eq!(shown.records[&backup]["parent"], newest.as_str());

    let third = Host::new(place);
    let list = third.json(&["list"]);
    let list = list["snapshots"].as_array().expect("it is a list");
    let forks: Vec<_> = list.iter().filter(|entry| entry["fork"] == true).collect();
    assert_eq!(
        forks.iter().map(|entry| id_of(entry)).collect::<Vec<_>>(),
        fork.iter().collect::<Vec<_>>()
    );
    assert_eq!(
        list.iter()
            .map(|entry| id_of(entry).clone())
            .collect::<BTreeSet<_>>(),
        known
    );
    for id in fork.iter().chain([&newest, &backup]) {
        let _ = third.run(&["restore", id]).expect(0);
        assert_same(&trees[id], &describe(&third.root));
    }
    // The server has another address than in the race: what was known of being fenced belongs to that one.
    let makes_a_fork = fork.is_none() || matches!(place, Place::Memory(_));
    assert_fenced(place, &hosts[0], known.len() + usize::from(makes_a_fork));
}

fn id_of(entry: &Value) -> &String {
    let Value::String(id) = &entry["id"] else {
        panic!("{entry} has no id");
    };
    id
}

/// The old one never moves the head again; it keeps one fork, and no more.
fn assert_fenced(place: &Place, old: &Host, snapshots: usize) {
    let head = place.head();
    for round in 0..2 {
        tree::write(&old.root, "file", format!("too late, {round}"));
        let refused = old.run(&["backup", "--json"]).expect(12).json();
        assert_eq!(refused["code"], "fenced");
        assert_eq!(place.head(), head);
        assert_eq!(place.keys("snapshots/").len(), snapshots);
    }
}

#[test]
fn two_runtimes_on_s3_leave_one_head_and_every_snapshot() {
    let test = "races two_runtimes_on_s3";
    rounds(test, ROUNDS, THREADS, |choices| {
        let place = Place::memory();
        let mut hosts = hosts(&place);
        let sides = race_on_s3(&place, &mut hosts, choices);
        for host in &mut hosts {
            host.set(
                "RUNTIME_S3_ENDPOINT",
                format!("http://{}", place.s3().address),
            );
        }
        assert_settled(&place, &hosts, sides);
        place.s3().assert_no_complaints();
    });
}

#[test]
fn two_runtimes_on_a_directory_leave_one_head_and_every_snapshot() {
    let test = "races two_runtimes_on_a_directory";
    rounds(test, ROUNDS, THREADS, |choices| {
        let place = Place::directory();
        let hosts = hosts(&place);
        let sides = race_on_a_directory(&place, &hosts, choices);
        assert_settled(&place, &hosts, sides);
    });
}
