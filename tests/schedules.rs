//! A store that misbehaves: for each seed a small history of one writer, while answers fail, break off, lie or never come.
//! Each run ends well or with the exit code that the faults explain; what is restored is what was backed up; the head never
//! moves to a snapshot that is not whole; and once the store behaves, everything is there.
//!
//! CI runs [`ROUNDS`] schedules on the server in memory and [`REAL_ROUNDS`] on a real one; `E2E_ROUNDS=1000` says otherwise.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use e2e::agent::{Host, Outcome, Place, boot_id};
use e2e::faults::{FINAL, misbehave};
use e2e::history::{History, Shown, assert_whole};
use e2e::proxy::Proxy;
use e2e::s3::Effect;
use e2e::seeds::{Choices, rounds};
use e2e::tree::{self, Tree, assert_same, describe};

const ROUNDS: u64 = 40;
const REAL_ROUNDS: u64 = 8;
/// Most of a round is waiting for the next try.
const THREADS: usize = 16;

/// Bound of every run: enough for some tries again, and short, because a stall takes all of it.
const BOUND: Duration = Duration::from_secs(3);
/// As often is a request tried before it is given up.
const ATTEMPTS: usize = 8;
/// What a machine that is busy with other tests may add to the bound before a run counts as hanging.
const PATIENCE: Duration = Duration::from_secs(20);

static HISTORY: LazyLock<History> = LazyLock::new(History::make);

/// One writer's life on a store that misbehaves.
struct Life {
    place: Place,
    proxy: Proxy,
    host: Host,
    is_real: bool,
    /// One request in so many goes wrong.
    one_in: u64,
    boots: u64,
    /// The last restore succeeded. Before one has, a runtime takes no backup.
    is_up: bool,
    trees: BTreeMap<String, Tree>,
    /// Snapshots that a run has answered for.
    promised: BTreeSet<String>,
    sequence: u64,
    /// What was run and went wrong.
    log: Vec<String>,
}

impl Drop for Life {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log.join("\n"));
        }
    }
}

impl Life {
    fn new(place: Place, choices: &mut Choices) -> Self {
        HISTORY.copy_to(&place);
        let proxy = Proxy::start(&place);
        let host = Host::new(&place)
            .booted('0')
            .with("RUNTIME_S3_ENDPOINT", proxy.endpoint())
            .with("RUNTIME_RETENTION", "last=2");
        let _ = host.run(&["restore"]).expect(0);
        Self {
            is_real: matches!(place, Place::Moto(..)),
            place,
            proxy,
            host,
            one_in: *choices.one_of(&[3, 6, 12]),
            boots: 0,
            is_up: true,
            trees: HISTORY.trees.clone(),
            promised: HISTORY.ids.iter().cloned().collect(),
            sequence: 0,
            log: Vec::new(),
        }
    }

    /// Runs a verb while the store misbehaves, and judges its exit code by what went wrong.
    fn run(&mut self, choices: &mut Choices, arguments: &[&str]) -> Outcome {
        let faults = misbehave(&self.proxy, choices, self.one_in, self.is_real);
        let begun = Instant::now();
        let bound = format!("{}s", BOUND.as_secs());
        let outcome = self
            .host
            .run(&[arguments, &["--json", "--timeout", &bound]].concat());
        let took = begun.elapsed();
        self.proxy.drain();
        self.proxy.behave();
        let faults = std::mem::take(&mut *faults.lock().expect("nobody panics with it"));
        let line = format!("{arguments:?}: {:?} after {faults:?}", outcome.code);
        self.log.push(line);
        assert!(took < BOUND + PATIENCE, "it took {took:?}");
        let count = |is: &dyn Fn(Effect) -> bool| {
            let effects = faults.iter().map(|(effect, ..)| *effect);
            effects.filter(|effect| is(*effect)).count()
        };
        let is_explained = match outcome.code {
            Some(0) => true,
            // A body was altered on its way, and again.
            Some(11) => count(&|effect| effect == Effect::WrongContent) > 1,
            // It tried again for as long as it could, or there was no point.
            Some(75) => {
                count(&|effect| FINAL.contains(&effect)) > 0
                    || faults.len() >= ATTEMPTS
                    || (!faults.is_empty() && took > BOUND / 2)
            }
            // A busy machine needs no fault for that.
            Some(124) => took >= BOUND,
            _ => false,
        };
        assert!(is_explained, "{outcome:#?} after {faults:#?}");
        outcome
    }

    fn step(&mut self, choices: &mut Choices) {
        match choices.below(8) {
            0..3 if self.is_up => self.back_up(choices),
            3 if self.is_up => self.prune(choices),
            4 => self.look(choices),
            5 => self.verify(choices),
            _ => self.come_up(choices),
        }
        self.assert_store();
    }

    fn back_up(&mut self, choices: &mut Choices) {
        tree::write(&self.host.root, "file", choices.number().to_string());
        let name = format!("of/{}", choices.below(5));
        let size = if choices.once_in(12) { 11 << 20 } else { 3000 };
        tree::write(&self.host.root, name, tree::noise(choices.number(), size));
        let tree = describe(&self.host.root);
        let outcome = self.run(choices, &["backup"]);
        // The record may be there although its writer never learned of it.
        for id in assert_whole(&self.place).records.into_keys() {
            self.trees.entry(id).or_insert_with(|| tree.clone());
        }
        if outcome.code == Some(0) {
            let answer = outcome.json();
            if answer["fork"] == true {
                // A large file that became a small one looks like a tree that was wiped: the next backup confirms it.
                let warning = answer["warning"].as_str().unwrap_or_default();
                assert!(warning.contains("has shrunk"), "{answer}");
                return;
            }
            let id = answer["snapshot"].as_str().expect("it names it");
            assert_eq!(assert_whole(&self.place).snapshot(), id);
            assert_same(&tree, &self.trees[id]);
            self.promised.insert(id.to_owned());
        }
    }

    /// A new runtime, on an empty disk or on the old one; or the same, until it is up.
    fn come_up(&mut self, choices: &mut Choices) {
        if self.is_up {
            self.boots += 1;
            let digits = format!("{:032}", self.boots);
            self.host.set("RUNTIME_BOOT_ID", digits);
            if choices.once_in(2) {
                self.host.lose_everything();
            }
        }
        let before = self.host.root.exists().then(|| describe(&self.host.root));
        let outcome = self.run(choices, &["restore"]);
        self.is_up = outcome.code == Some(0);
        let newest = assert_whole(&self.place).snapshot().to_owned();
        let after = self.host.root.exists().then(|| describe(&self.host.root));
        if self.is_up {
            let answer = outcome.json();
            assert_eq!(answer["snapshot"], newest);
            if answer["unchanged"] == false {
                assert_same(&self.trees[&newest], &after.expect("it was restored"));
                return;
            }
        }
        if after != before {
            // It failed after the new tree had taken its place.
            assert_same(&self.trees[&newest], &after.expect("it is not removed"));
        }
    }

    /// A person looks at an old snapshot elsewhere.
    fn look(&mut self, choices: &mut Choices) {
        let shown = assert_whole(&self.place);
        let ids: Vec<_> = shown.records.into_keys().collect();
        let id = choices.one_of(&ids);
        let target = self.host.folder.path().join("target");
        let text = target.display().to_string();
        let outcome = self.run(choices, &["restore", id, "--target", &text]);
        if outcome.code == Some(0) {
            assert_same(&self.trees[id], &describe(&target));
            std::fs::remove_dir_all(target).expect("it is ours");
        } else {
            assert!(!target.exists(), "what was restored is whole or not there");
        }
    }

    fn verify(&mut self, choices: &mut Choices) {
        let outcome = self.run(choices, &["verify", "all", "--deep"]);
        if outcome.code == Some(0) {
            let answer = outcome.json();
            let shown = assert_whole(&self.place);
            assert_eq!(
                answer["snapshots"].as_array().map(Vec::len),
                Some(shown.records.len())
            );
        }
    }

    fn prune(&mut self, choices: &mut Choices) {
        let outcome = self.run(choices, &["prune"]);
        let shown = assert_whole(&self.place);
        if outcome.code == Some(0) {
            let removed = outcome.json()["removed"].clone();
            for id in removed.as_array().expect("it is a list") {
                let id = id.as_str().expect("it is an id");
                assert!(!shown.records.contains_key(id), "{id} was to be removed");
            }
        }
        // Only these are old enough to go.
        let gone = |id: &String| !shown.records.contains_key(id);
        let allowed: BTreeSet<_> = HISTORY.ids.iter().cloned().collect();
        let lost: Vec<_> = self
            .promised
            .iter()
            .filter(|id| gone(id))
            .cloned()
            .collect();
        for id in lost {
            assert!(allowed.contains(&id), "{id} is lost");
            self.promised.remove(&id);
        }
    }

    /// What must be true of the store after every run.
    fn assert_store(&mut self) -> Shown {
        let shown = assert_whole(&self.place);
        assert!(
            shown.sequence() >= self.sequence,
            "the head went back: {shown:#?}"
        );
        self.sequence = shown.sequence();
        for id in &self.promised {
            assert!(shown.records.contains_key(id), "{id} is lost: {shown:#?}");
        }
        shown
    }

    /// The store behaves again.
    fn assert_end(&mut self) {
        let shown = self.assert_store();
        let other = Host::new(&self.place);
        let list = other.json(&["list"]);
        let listed = list["snapshots"].as_array().map(Vec::len);
        assert_eq!(listed, Some(shown.records.len()));
        let _ = other.run(&["verify", "all", "--deep"]).expect(0);
        assert_eq!(other.json(&["restore"])["snapshot"], shown.snapshot());
        assert_same(&self.trees[shown.snapshot()], &describe(&other.root));
        // And the writer goes on, as a runtime that comes up anew.
        self.host.set("RUNTIME_BOOT_ID", boot_id('f'));
        let _ = self.host.run(&["restore"]).expect(0);
        tree::write(&self.host.root, "file", "the last one");
        let id = self.host.backup();
        assert_eq!(assert_whole(&self.place).snapshot(), id);
    }
}

fn survive(test: &str, count: u64, make: impl Fn() -> Place + Sync) {
    rounds(test, count, THREADS, |choices| {
        let mut life = Life::new(make(), choices);
        for _ in 0..3 + choices.below(4) {
            life.step(choices);
        }
        life.assert_end();
    });
}

#[test]
fn a_store_that_misbehaves_never_gives_a_wrong_tree_and_loses_nothing() {
    let test = "schedules a_store_that_misbehaves";
    survive(test, ROUNDS, Place::memory);
}

#[test]
fn a_store_that_ignores_conditions_is_found_out_whatever_else_goes_wrong() {
    let test = "schedules a_store_that_ignores_conditions";
    rounds(test, REAL_ROUNDS, THREADS, |choices| {
        let place = Place::memory();
        place.s3().ignore_conditions();
        let proxy = Proxy::start(&place);
        let host = Host::new(&place)
            .booted('a')
            .with("RUNTIME_S3_ENDPOINT", proxy.endpoint());
        tree::write(&host.root, "file", "content");
        for verb in ["restore", "backup", "restore"] {
            let faults = misbehave(&proxy, choices, 3, false);
            let outcome = host.run(&[verb, "--timeout", "3s"]);
            proxy.drain();
            assert!(
                matches!(outcome.code, Some(64 | 75 | 124)),
                "{outcome:#?} after {faults:#?}"
            );
        }
        proxy.behave();
        let _ = host.run(&["backup"]).expect(64);
        assert!(place.keys("").iter().all(|key| key.starts_with("probe-")));
    });
}

#[test]
fn a_real_server_behind_a_faulty_line_never_gives_a_wrong_tree_and_loses_nothing() {
    let test = "schedules a_real_server";
    survive(test, REAL_ROUNDS, Place::moto);
}
