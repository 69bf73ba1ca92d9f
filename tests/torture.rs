//! Killed anywhere: SIGKILL at seeded moments of backup, prune and restore. Whatever the moment, every snapshot is whole, the
//! head is the last good one or the new one, the same run succeeds the next time, and prune leaves nothing behind.
//!
//! CI runs [`ROUNDS`] kills on each kind of store, each checked in full; `E2E_ROUNDS=1000` makes it 2,000.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use e2e::agent::{Host, Place, Running, boot_id};
use e2e::history::{History, Shown, age_leftovers, assert_tidy, assert_whole};
use e2e::proxy::Proxy;
use e2e::s3::Effect;
use e2e::seeds::{Choices, rounds};
use e2e::tree::{self, Tree, assert_same, describe};
use e2e::wait::until;
use rustix::process::Signal;

/// Kills on each kind of store that CI runs.
const ROUNDS: u64 = 50;
/// Rounds wait for disks and each other's timers more than they compute.
const THREADS: usize = 4;
/// Enough noise for three parts of an upload.
const SEVERAL_PARTS: usize = 11 << 20;

static HISTORY: LazyLock<History> = LazyLock::new(History::make);

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Backup,
    BackupInParts,
    Prune,
    /// A runtime comes up on an empty disk.
    Restore,
    /// A person puts an older snapshot in the place of what is there.
    Replace,
}

impl Work {
    /// Requests that it makes, or a few more.
    fn requests(self) -> u64 {
        match self {
            Self::Backup => 5,
            Self::BackupInParts => 9,
            Self::Prune => 18,
            Self::Restore | Self::Replace => 14,
        }
    }
}

/// A host that goes on from the history's newest snapshot, and the tree that it has now.
struct Life {
    place: Place,
    proxy: Option<Proxy>,
    host: Host,
    tree: Tree,
    /// The older snapshot that a person wants.
    wanted: String,
}

impl Life {
    fn new(place: Place, work: Work, choices: &mut Choices) -> Self {
        HISTORY.copy_to(&place);
        let proxy = matches!(place, Place::Memory(_)).then(|| Proxy::start(&place));
        let mut host = Host::new(&place)
            .booted('a')
            .with("RUNTIME_RETENTION", "last=1");
        if let Some(proxy) = &proxy {
            host.set("RUNTIME_S3_ENDPOINT", proxy.endpoint());
        }
        let _ = host.run(&["restore"]).expect(0);
        tree::write(&host.root, "file", choices.number().to_string());
        tree::write(&host.root, "new/file", tree::noise(choices.number(), 5000));
        std::fs::remove_file(host.root.join("steady/of-1")).expect("it was restored");
        if work == Work::BackupInParts {
            let noise = tree::noise(choices.number(), SEVERAL_PARTS);
            tree::write(&host.root, "new/noise", noise);
        }
        if work == Work::Replace {
            host.unset("RUNTIME_BOOT_ID");
        }
        let tree = describe(&host.root);
        if work == Work::Restore {
            host.lose_everything();
            host.set("RUNTIME_BOOT_ID", boot_id('b'));
        }
        Self {
            place,
            proxy,
            host,
            tree,
            wanted: choices.one_of(&HISTORY.ids[..3]).clone(),
        }
    }

    fn start(&self, work: Work) -> Running {
        match work {
            Work::Backup | Work::BackupInParts => self.host.start(&["backup"]),
            Work::Prune => self.host.start(&["prune"]),
            Work::Restore => self.host.start(&["restore"]),
            Work::Replace => self.host.start(&["restore", &self.wanted]),
        }
    }

    /// Kills it at a request, before or after what that does, or at a moment within the time that it takes.
    fn kill(&self, work: Work, takes: Duration, choices: &mut Choices) {
        let at_request = self.proxy.as_ref().filter(|_| !choices.once_in(3));
        let mut running;
        if let Some(proxy) = at_request {
            let number = 1 + choices.below(work.requests());
            let effect = *choices.one_of(&[Effect::Stall, Effect::StallAfter]);
            let mut count = 0;
            proxy.plan(move |_, _| {
                count += 1;
                (count == number).then_some(effect)
            });
            let last = proxy.arrived() + number;
            running = self.start(work);
            until("the request", || {
                proxy.arrived() >= last || !running.is_running()
            });
            if effect == Effect::StallAfter {
                proxy.settle();
            }
        } else {
            let micros = u64::try_from(takes.as_micros()).expect("it takes no age");
            let delay = Duration::from_micros(choices.below(micros));
            running = self.start(work);
            std::thread::sleep(delay);
        }
        if running.is_running() {
            running.signal(Signal::KILL);
        }
        let outcome = running.wait();
        assert!(
            outcome.signal == Some(9) || outcome.code == Some(0),
            "{outcome:#?}"
        );
        if let Some(proxy) = &self.proxy {
            proxy.drain();
            proxy.behave();
        }
    }

    /// What the root may be after a kill.
    fn assert_root(&self, work: Work) {
        let root = &self.host.root;
        let restored = match work {
            Work::Restore => &HISTORY.trees[HISTORY.head()],
            Work::Replace => &HISTORY.trees[&self.wanted],
            _ => return assert_same(&self.tree, &describe(root)),
        };
        if !root.exists() {
            assert_eq!(work, Work::Restore, "what was there is gone");
            return;
        }
        let found = describe(root);
        if found != self.tree || work == Work::Restore {
            assert_same(restored, &found);
        }
    }

    /// What the store may show after a kill; the tree of the snapshot that the head names.
    fn assert_store(&self, work: Work) -> &Tree {
        let shown = assert_whole(&self.place);
        let known: BTreeSet<&String> = HISTORY.ids.iter().collect();
        let new: Vec<&String> = shown
            .records
            .keys()
            .filter(|id| !known.contains(id))
            .collect();
        let is_backup = matches!(work, Work::Backup | Work::BackupInParts);
        assert!(new.len() <= usize::from(is_backup), "{shown:#?}");
        if work != Work::Prune {
            assert_eq!(shown.records.len(), known.len() + new.len(), "{shown:#?}");
        }
        let tree = if shown.snapshot() == HISTORY.head() {
            &HISTORY.trees[HISTORY.head()]
        } else {
            assert_eq!(new, [shown.snapshot()], "{shown:#?}");
            &self.tree
        };
        assert_readable(&self.place, &shown, tree);
        tree
    }

    /// The same run again ends well.
    fn assert_works(&mut self, work: Work) {
        if work == Work::Restore {
            self.host.set("RUNTIME_BOOT_ID", boot_id('c'));
        }
        let _ = self.start(work).wait().expect(0);
        let shown = assert_whole(&self.place);
        match work {
            Work::Backup | Work::BackupInParts => {
                assert_ne!(shown.snapshot(), HISTORY.head());
                assert_eq!(shown.records[shown.snapshot()]["fork"], false);
                assert_readable(&self.place, &shown, &self.tree);
            }
            Work::Prune => assert_eq!(shown.records.len(), 1),
            Work::Restore => {
                assert_same(&HISTORY.trees[HISTORY.head()], &describe(&self.host.root));
                assert_eq!(shown.head["writer"], boot_id('c'));
            }
            Work::Replace => {
                assert_same(&HISTORY.trees[&self.wanted], &describe(&self.host.root));
            }
        }
    }

    /// Prune removes all that was left, on the store and on the disk.
    fn assert_pruned(&self) {
        age_leftovers(&self.place);
        let _ = self.host.run(&["prune"]).expect(0);
        assert_tidy(&self.place);
        assert_eq!(self.host.leftovers(), [""; 0]);
        assert_eq!(self.host.scratch(), <[PathBuf; 0]>::default());
    }
}

/// Somebody elsewhere lists, verifies and restores what the store shows.
fn assert_readable(place: &Place, shown: &Shown, tree: &Tree) {
    let other = Host::new(place);
    let list = other.json(&["list"]);
    let listed = list["snapshots"].as_array().expect("it is a list");
    let listed: BTreeSet<_> = listed
        .iter()
        .filter_map(|entry| entry["id"].as_str())
        .collect();
    assert_eq!(listed, shown.records.keys().map(String::as_str).collect());
    let _ = other.run(&["verify", "all", "--deep"]).expect(0);
    let answer = other.json(&["restore"]);
    assert_eq!(answer["snapshot"], shown.snapshot());
    assert_same(tree, &describe(&other.root));
}

/// How long each kind of work takes when nobody kills it.
fn durations(make: impl Fn() -> Place, works: &[Work]) -> Vec<(Work, Duration)> {
    let took = works.iter().map(|&work| {
        let life = Life::new(make(), work, &mut Choices::new(0));
        let begun = Instant::now();
        let _ = life.start(work).wait().expect(0);
        (work, begun.elapsed())
    });
    took.collect()
}

fn kill_anywhere(test: &str, make: impl Fn() -> Place + Sync, works: &[Work]) {
    let works = durations(&make, works);
    rounds(test, ROUNDS, THREADS, |choices| {
        let &(work, takes) = choices.one_of(&works);
        let mut life = Life::new(make(), work, choices);
        life.kill(work, takes, choices);
        life.assert_root(work);
        life.assert_store(work);
        // A runtime that did not come up prunes nothing; the others may do so before they try again.
        if work == Work::Restore || choices.once_in(2) {
            life.assert_works(work);
        }
        life.assert_pruned();
    });
}

#[test]
fn a_kill_at_any_moment_on_s3_loses_nothing() {
    use Work::{Backup, BackupInParts, Prune, Replace, Restore};
    let works = [
        Backup,
        Backup,
        BackupInParts,
        Prune,
        Prune,
        Restore,
        Replace,
    ];
    let test = "torture a_kill_at_any_moment_on_s3";
    kill_anywhere(test, Place::memory, &works);
}

#[test]
fn a_kill_at_any_moment_on_a_directory_loses_nothing() {
    use Work::{Backup, Prune, Replace, Restore};
    let test = "torture a_kill_at_any_moment_on_a_directory";
    kill_anywhere(test, Place::directory, &[Backup, Prune, Restore, Replace]);
}
