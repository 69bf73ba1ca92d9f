//! Whole runtimes, supervisor and real agent, on one store: killed with their container at any moment, and two at once.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Mutex;
use std::time::Duration;

use e2e::agent::{Host, Place};
use e2e::history::{Shown, assert_whole};
use e2e::http;
use e2e::on_every_store;
use e2e::seeds::{Choices, rounds};
use e2e::supervisor::{Setup, Supervisor, TOKEN};
use e2e::tree::{self, Tree, assert_same, describe};
use serde_json::Value;

on_every_store!(
    a_container_killed_at_any_moment_comes_up_with_the_last_good_snapshot,
    the_older_of_two_runtimes_is_fenced_and_says_so,
);

/// Containers in a row, of which each is killed; `E2E_ROUNDS` says otherwise.
const KILLS: u64 = 5;
/// Within this time of its start, or of the request for a backup, a container is killed.
const SPREAD: u64 = 400;

/// Comes up on an empty disk.
fn boot(place: &Place) -> Supervisor {
    let setup = Setup::new().on(place);
    fs::create_dir(setup.root()).expect("the disk is empty");
    setup.start()
}

fn backup(supervisor: &Supervisor) -> Value {
    let mut answer = supervisor.post("/v1/backup");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body["data"].take()
}

/// The snapshots that have been, and the tree of one that nobody has been told of yet.
#[derive(Default)]
struct Known {
    trees: BTreeMap<String, Tree>,
    last: Tree,
    sequence: u64,
}

impl Known {
    /// Looks at the store after a kill: all that was there still is.
    fn look(&mut self, place: &Place) -> Shown {
        let shown = assert_whole(place);
        for id in shown.records.keys() {
            let last = || self.last.clone();
            self.trees.entry(id.clone()).or_insert_with(last);
        }
        assert!(shown.sequence() >= self.sequence, "{shown:#?}");
        self.sequence = shown.sequence();
        assert!(self.trees.keys().all(|id| shown.records.contains_key(id)));
        shown
    }

    /// Waits until it has come up, with what the head names.
    fn assert_restored(&mut self, supervisor: &Supervisor, place: &Place) {
        supervisor.until_running(1);
        let shown = self.look(place);
        let status = supervisor.status();
        assert_eq!(status["restore"]["snapshot"], shown.head["snapshot"]);
        let tree = self.trees.get(shown.snapshot());
        if let Some(tree) = tree.filter(|_| !shown.records.is_empty()) {
            assert_same(tree, &describe(&supervisor.setup.root()));
        }
    }
}

fn a_container_killed_at_any_moment_comes_up_with_the_last_good_snapshot(place: &Place) {
    let test = "runtimes a_container_killed_at_any_moment";
    let known = Mutex::new(Known::default());
    rounds(test, KILLS, 1, |choices| {
        let mut known = known.lock().expect("the first failure ends it");
        live_and_be_killed(place, &mut known, choices);
    });
    let mut known = known.into_inner().expect("nothing failed");
    known.assert_restored(&boot(place), place);
    let _ = Host::new(place).run(&["verify", "all", "--deep"]).expect(0);
}

/// The life of one container, which ends while it comes up or while it takes a snapshot.
fn live_and_be_killed(place: &Place, known: &mut Known, choices: &mut Choices) {
    let mut supervisor = boot(place);
    let delay = Duration::from_millis(choices.below(SPREAD));
    if !choices.once_in(3) {
        known.assert_restored(&supervisor, place);
        let root = supervisor.setup.root();
        tree::write(&root, "file", choices.number().to_string());
        tree::write(&root, "noise", tree::noise(choices.number(), 300_000));
        known.last = describe(&root);
        backup(&supervisor);
        known.look(place);
        tree::write(&root, "file", choices.number().to_string());
        known.last = describe(&root);
        // Nobody is left to answer it.
        let api = supervisor.api;
        std::thread::spawn(move || {
            let token = format!("Bearer {TOKEN}");
            let headers = [("Authorization", token.as_str())];
            http::request(api, "POST", "/v1/backup", &headers, b"")
        });
    }
    std::thread::sleep(delay);
    supervisor.kill_container();
    known.look(place);
}

fn the_older_of_two_runtimes_is_fenced_and_says_so(place: &Place) {
    let older = boot(place);
    older.until_running(1);
    tree::write(&older.setup.root(), "file", "one");
    let one = backup(&older)["snapshot"].clone();

    let newer = boot(place);
    newer.until_running(1);
    assert_eq!(newer.status()["restore"]["snapshot"], one);
    tree::write(&older.setup.root(), "file", "the older one's");
    let tree = describe(&older.setup.root());
    let refused = older.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (409, "fenced"));
    let status = older.status();
    assert_eq!(status["backup"]["status"], "fenced");
    assert_eq!(status["gateway"]["status"], "running");
    assert_eq!(place.head()["snapshot"], one);

    tree::write(&newer.setup.root(), "file", "the newer one's");
    let two = backup(&newer)["snapshot"].clone();
    let refused = older.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (409, "fenced"));
    assert_eq!(place.head()["snapshot"], two);

    let person = Host::new(place);
    let list = person.json(&["list"]);
    let list = list["snapshots"].as_array().expect("it is a list");
    let fork = list.iter().find(|entry| entry["fork"] == true);
    let fork = fork.expect("the older one's is kept")["id"].as_str();
    let _ = person
        .run(&["restore", fork.expect("it has one")])
        .expect(0);
    assert_same(&tree, &describe(&person.root));
}
