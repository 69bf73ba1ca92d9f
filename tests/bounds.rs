//! A store that stalls at any request of any verb: the run ends within its bound plus one second with exit code 124, and the
//! store holds what it held. What a backup leaves behind and goes on with is in `interruption.rs`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use e2e::agent::{Host, Place, boot_id};
use e2e::history::{History, assert_whole};
use e2e::s3::{Effect, Kind};
use e2e::tree::{assert_same, describe};

const BOUND: Duration = Duration::from_secs(1);
/// A busy machine may hold up a run for longer; so often in a row, it is the agent.
const TRIES: u32 = 5;
/// They wait most of the time.
const THREADS: usize = 8;

/// Arguments of a run, and the requests that it makes.
type Case = (&'static [&'static str], &'static [(Kind, &'static str)]);

/// On a store with four snapshots, of which three are old.
const REQUESTS: [Case; 5] = [
    (
        &["list"],
        &[
            (Kind::Get, "head.json"),
            (Kind::List, "snapshots/"),
            (Kind::Get, "snapshots/"),
        ],
    ),
    (
        &["verify", "all", "--deep"],
        &[
            (Kind::Get, "head.json"),
            (Kind::List, "snapshots/"),
            (Kind::Get, "snapshots/"),
            (Kind::Get, "layers/"),
        ],
    ),
    (
        &["restore"],
        &[
            (Kind::Put, "probe-"),
            (Kind::Delete, "probe-"),
            (Kind::Get, "head.json"),
            (Kind::Get, "snapshots/"),
            (Kind::Get, "layers/"),
            (Kind::Put, "head.json"),
        ],
    ),
    (
        &["backup"],
        &[
            (Kind::Put, "probe-"),
            (Kind::Delete, "probe-"),
            (Kind::Get, "head.json"),
        ],
    ),
    (
        &["prune"],
        &[
            (Kind::Get, "head.json"),
            (Kind::List, "snapshots/"),
            (Kind::Get, "snapshots/"),
            (Kind::Delete, "snapshots/"),
            (Kind::List, "layers/"),
            (Kind::Delete, "layers/"),
            (Kind::List, "probe-"),
            (Kind::ListUploads, ""),
        ],
    ),
];

/// Runs a verb against a store that stalls there; how long it took.
fn stall(
    history: &History,
    arguments: &[&str],
    kind: Kind,
    key: &'static str,
    effect: Effect,
) -> Duration {
    let place = Place::memory();
    history.copy_to(&place);
    let mut host = Host::new(&place)
        .with("RUNTIME_RETENTION", "last=1")
        .with("RUNTIME_LOG", "debug");
    // A runtime comes up; all else is done by hand.
    if arguments == ["restore"] {
        host.set("RUNTIME_BOOT_ID", boot_id('a'));
    }
    let before = (place.objects(), describe(&host.root));
    place.s3().add_fault(kind, key, 1, effect);
    let bound = format!("{}s", BOUND.as_secs());
    let begun = Instant::now();
    let outcome = host.run(&[arguments, &["--timeout", &bound, "--json"]].concat());
    let took = begun.elapsed();
    let what = format!("{arguments:?} with {effect:?} at {kind:?} of {key:?}");
    assert_eq!(outcome.code, Some(124), "{what}: {outcome:#?}");
    assert_eq!(outcome.json()["code"], "timeout");
    let shown = assert_whole(&place);
    assert_eq!(shown.snapshot(), history.head(), "{what}");
    if arguments != ["prune"] {
        let mut after = place.objects();
        after.retain(|key, _| !key.starts_with("probe-"));
        if (kind, key) != (Kind::Put, "head.json") {
            assert_eq!(before.0, after, "{what}");
        }
        assert_same(&before.1, &describe(&host.root));
    }
    // The next restore goes on with what this one has unpacked.
    let mut left = host.leftovers();
    left.retain(|name| arguments != ["restore"] || name != ".root.restoring");
    assert_eq!(left, [""; 0], "{what}");
    took
}

#[test]
fn a_store_that_stalls_anywhere_ends_every_verb_in_time() {
    let history = History::make();
    let mut cases = Vec::new();
    for (arguments, requests) in REQUESTS {
        for &(kind, key) in requests {
            cases.push((arguments, kind, key, Effect::Stall));
            cases.push((arguments, kind, key, Effect::StallAfter));
            if matches!(kind, Kind::Get | Kind::List | Kind::ListUploads) {
                cases.push((arguments, kind, key, Effect::StallInBody));
            }
        }
    }
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(&(arguments, kind, key, effect)) =
            cases.get(next.fetch_add(1, Ordering::Relaxed))
        {
            let is_late = |_| {
                let took = stall(&history, arguments, kind, key, effect);
                took > BOUND + Duration::from_secs(1)
            };
            assert!(
                !(0..TRIES).all(is_late),
                "{arguments:?} at {kind:?} of {key:?}"
            );
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(work);
        }
    });
}
