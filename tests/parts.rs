//! A backup that does not fit into its time bound: each try goes on where the one before ended, nothing of it is visible before
//! the end, and then the snapshot is that of the tree, whatever happened between the tries.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::process::Command;

use e2e::agent::{Host, Outcome, Place};
use e2e::forge::key;
use e2e::history::assert_whole;
use e2e::mount::{mount, tmpfs};
use e2e::past;
use e2e::s3::{Effect, Fault, Kind};
use e2e::tree::{self, assert_same, describe, kept};
use rustix::process::Signal;
use serde_json::Value;

/// So much fits into a bound: less than half of the trees here, and more than the ten mebibytes after which a run knows
/// how fast the store is.
const BOUND: [&str; 5] = ["backup", "--bandwidth", "4000000", "--timeout", "6s"];
/// Files of noise, and the bytes of each.
const FILES: usize = 64;
const SIZE: usize = 500_000;
/// A machine that is busy gets less done in each try.
const MOST_TRIES: usize = 40;

fn file(number: usize) -> String {
    format!("d{}/f{number:02}", number / 8)
}

fn fill(host: &Host) {
    for number in 0..FILES {
        tree::write(
            &host.root,
            file(number),
            tree::noise(number as u64 + 1, SIZE),
        );
    }
}

/// Bytes of layers on the store.
fn stored(place: &Place) -> usize {
    let objects = place.objects();
    let layers = objects.iter().filter(|(key, _)| key.starts_with("layers/"));
    layers.map(|(_, bytes)| bytes.len()).sum()
}

/// What the agent remembers of a backup that ran out of time.
fn part(host: &Host) -> Value {
    let bytes = fs::read(host.state.join("state.json")).unwrap_or_default();
    let facts: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    facts["part"].clone()
}

/// One run that ends in time or too late; what is shown is what was shown before, unless it is done.
fn attempt(place: &Place, host: &Host, arguments: &[&str]) -> Outcome {
    let shown = || {
        (
            place.keys("snapshots/"),
            place.objects().remove("head.json"),
        )
    };
    let before = shown();
    let outcome = host.run(&[arguments, &["--json"]].concat());
    if outcome.code == Some(124) {
        let error = outcome.json()["error"].as_str().unwrap_or("").to_owned();
        assert!(error.contains("RUNTIME_BACKUP_TIMEOUT"), "{error}");
        assert!(shown() == before, "{outcome:?}");
    }
    outcome
}

/// How the tries of one backup went.
struct Tries {
    outcome: Outcome,
    /// Those that were too late and left something to the next one.
    parts: usize,
    /// Bytes that the store took, without those of tries that left nothing.
    bytes: usize,
}

/// Runs until it is done, with something between the tries.
///
/// A try on a machine that is busy with something else may leave nothing; the next one ends its upload earlier.
fn go_on(place: &Place, host: &Host, arguments: &[&str], mut between: impl FnMut(usize)) -> Tries {
    let (mut parts, mut bytes) = (0, 0);
    for _ in 0..MOST_TRIES {
        let before = (part(host), stored(place));
        let outcome = attempt(place, host, arguments);
        if outcome.code != Some(124) {
            bytes += stored(place) - before.1;
            return Tries {
                outcome,
                parts,
                bytes,
            };
        }
        if part(host) != before.0 {
            bytes += stored(place) - before.1;
            between(parts);
            parts += 1;
        }
    }
    panic!("it never ends");
}

/// Runs until a try was too late and left something to the next one.
fn first_part(place: &Place, host: &Host) {
    for _ in 0..MOST_TRIES {
        let _ = attempt(place, host, &BOUND).expect(124);
        if part(host) != Value::Null {
            return;
        }
    }
    panic!("no try leaves anything");
}

/// The newest snapshot is that of the tree, and everything on the store verifies.
fn assert_done(place: &Place, host: &Host) {
    let other = Host::new(place);
    let _ = other.run(&["verify", "all", "--deep"]).expect(0);
    let _ = other.run(&["restore"]).expect(0);
    assert_same(&kept(describe(&host.root)), &describe(&other.root));
    assert!(
        host.json(&["backup", "--confirm"])["unchanged"]
            .as_bool()
            .unwrap_or_default()
    );
}

/// Runs each on a thread of its own: they wait most of the time.
fn at_once(cases: &[(&'static str, fn())]) {
    std::thread::scope(|scope| {
        let start = |(name, case): &(&'static str, fn())| {
            let thread = std::thread::Builder::new().name((*name).to_owned());
            thread
                .spawn_scoped(scope, *case)
                .expect("there are threads")
        };
        let running: Vec<_> = cases.iter().map(start).collect();
        for case in running {
            case.join().expect("the case holds");
        }
    });
}

#[test]
fn a_first_backup_that_does_not_fit_goes_on_with_each_try() {
    at_once(&[
        ("large files", || {
            let place = Place::memory();
            let host = Host::new(&place);
            fill(&host);
            let tries = go_on(&place, &host, &BOUND, |_| {});
            let _ = tries.outcome.expect(0);
            assert!(tries.parts > 0, "it is too large for one try");
            let (bytes, tree) = (tries.bytes, FILES * SIZE);
            assert!(bytes * 10 <= tree * 13, "{bytes} bytes for {tree}");
            assert_done(&place, &host);
            place.s3().assert_no_complaints();
        }),
        ("many small files", many_small_files_that_shrink),
        ("on a directory", || {
            // A try on a directory is late by the time that compression takes.
            let place = Place::directory();
            let host = Host::new(&place);
            for number in 0..200 {
                tree::write(&host.root, file(number), tree::noise(number as u64, SIZE));
            }
            let slow = [
                "backup",
                "--level",
                "12",
                "--jobs",
                "1",
                "--timeout",
                "900ms",
            ];
            let tries = go_on(&place, &host, &slow, |_| {});
            let _ = tries.outcome.expect(0);
            assert!(tries.bytes * 10 <= 200 * SIZE * 13);
            assert_done(&place, &host);
        }),
    ]);
}

fn many_small_files_that_shrink() {
    let place = Place::memory();
    let host = Host::new(&place);
    for number in 0..3000_u64 {
        let mut content = tree::noise(number, 7_000);
        content.extend(b"the same line again and again\n".repeat(200));
        tree::write(
            &host.root,
            format!("{}/{}/{number}", number % 7, number % 31),
            content,
        );
    }
    let tries = go_on(&place, &host, &BOUND, |_| {});
    let _ = tries.outcome.expect(0);
    assert!(tries.parts > 0, "it is too large for one try");
    assert!(tries.bytes * 10 <= 3000 * 8_000 * 13);
    assert_done(&place, &host);
}

/// Names of one file on both sides of where a try ends, which go away on either.
fn link(host: &Host, first: &str, others: &[&str]) {
    tree::write(&host.root, first, first);
    for other in others {
        let other = host.root.join(other);
        fs::create_dir_all(other.parent().expect("it has one")).expect("can make directories");
        fs::hard_link(host.root.join(first), other).expect("can make a hard link");
    }
}

#[test]
fn a_tree_that_changes_between_the_tries_is_right_in_the_end() {
    at_once(&[
        ("edits", || {
            let place = Place::memory();
            let host = Host::new(&place);
            fill(&host);
            link(&host, "a/stays", &["d4/late", "z/last"]);
            link(&host, "a/goes", &["d4/first then", "z/second then"]);
            link(&host, "a/whose last goes", &["z/goes"]);
            let tries = go_on(&place, &host, &BOUND, |late| {
                let root = &host.root;
                let moved = |from: &str, to: &str| {
                    fs::rename(root.join(from), root.join(to)).expect("it is there");
                };
                match late {
                    0 => {
                        // What has arrived, and what has not.
                        tree::write(root, file(0), tree::noise(1000, 10_000));
                        tree::write(root, file(63), tree::noise(1001, 10_000));
                        fs::remove_file(root.join(file(1))).expect("it is there");
                        fs::remove_file(root.join(file(62))).expect("it is there");
                        moved(&file(2), "z-from the front");
                        moved(&file(61), "0-from the end");
                        fs::remove_file(root.join("a/goes")).expect("it is there");
                        fs::remove_file(root.join("z/goes")).expect("it is there");
                        link(&host, &file(3), &["0-new name", "z/new name"]);
                        fs::remove_dir_all(root.join("d1")).expect("it is there");
                        tree::write(root, "d1", "a file in place of a directory");
                    }
                    1 => {
                        moved("d4", "d4 elsewhere");
                        moved("z-from the front", "d1-again");
                        tree::write(root, "a/stays", "another content");
                        tree::set_mode(&root.join(file(3)), 0o600);
                    }
                    _ => {}
                }
            });
            let _ = tries.outcome.expect(0);
            assert!(tries.parts > 0, "it is too large for one try");
            assert_done(&place, &host);
        }),
        ("another tree", || {
            let place = Place::memory();
            let host = Host::new(&place);
            fill(&host);
            // All that was there goes, and another tree comes.
            let tries = go_on(&place, &host, &BOUND, |late| {
                if late == 0 {
                    for folder in 0..8 {
                        fs::remove_dir_all(host.root.join(format!("d{folder}")))
                            .expect("it is there");
                    }
                    tree::make(&host.root.join("all kinds"));
                }
            });
            let _ = tries.outcome.expect(0);
            assert!(tries.parts > 0, "it is too large for one try");
            assert_done(&place, &host);
        }),
        ("as before", || {
            // Back to what the last snapshot has, or to nothing new.
            let place = Place::memory();
            let host = Host::new(&place);
            tree::write(&host.root, "old", "old");
            let before = host.backup();
            fill(&host);
            let tries = go_on(&place, &host, &BOUND, |late| {
                if late == 0 {
                    for folder in 0..8 {
                        fs::remove_dir_all(host.root.join(format!("d{folder}")))
                            .expect("it is there");
                    }
                }
            });
            let answer = tries.outcome.expect(0).json();
            assert!(tries.parts > 0, "it is too large for one try");
            assert_ne!(answer["snapshot"], before);
            assert_done(&place, &host);
        }),
    ]);
}

#[test]
fn what_ends_a_try_or_loses_its_work_costs_no_more_than_that() {
    at_once(&[
        ("SIGKILL", || killed(Signal::KILL)),
        ("SIGTERM", || killed(Signal::TERM)),
        ("lost state", || {
            let place = Place::memory();
            let host = Host::new(&place);
            fill(&host);
            let tries = go_on(&place, &host, &BOUND, |late| {
                if late == 0 {
                    fs::remove_dir_all(&host.state).expect("there is a state");
                }
            });
            let _ = tries.outcome.expect(0);
            assert!(tries.parts > 1, "it began again");
            assert_done(&place, &host);
        }),
        ("lost layers", || {
            // A prune of an earlier version, or somebody who tidies up.
            let place = Place::memory();
            let host = Host::new(&place);
            fill(&host);
            first_part(&place, &host);
            let lost = part(&host);
            place.remove(&key(&lost["layers"][0]));
            let outcome = attempt(&place, &host, &BOUND);
            let said = "the store has lost a part of the last snapshot; a whole new one is taken";
            assert_eq!(outcome.logged(said).len(), 1, "{outcome:?}");
            let tries = go_on(&place, &host, &BOUND, |_| {});
            let _ = tries.outcome.expect(0);
            assert_done(&place, &host);
        }),
        ("layers lost at the end", || {
            // At the worst moment: between the look before and the record.
            let place = Place::memory();
            let host = Host::new(&place);
            fill(&host);
            first_part(&place, &host);
            place
                .s3()
                .add_fault(Kind::Put, "/snapshots/", 1, Effect::Hold);
            let running = host.start(&["backup", "--json"]);
            place.s3().wait_for(Kind::Put, "/snapshots/");
            place.remove(&key(&part(&host)["layers"][0]));
            place.s3().release();
            let _ = running.wait().expect(11);
            assert_eq!(place.keys("snapshots/"), [""; 0], "none with a hole");
            assert_eq!(place.keys("head.json"), [""; 0]);
            let _ = host.json(&["backup"]);
            assert_done(&place, &host);
        }),
        ("another writer", another_writer),
        ("a prune elsewhere", a_prune_elsewhere),
    ]);
}

fn killed(signal: Signal) {
    let place = Place::memory();
    let host = Host::new(&place);
    fill(&host);
    first_part(&place, &host);
    let (left, before) = (part(&host), stored(&place));
    for skip in [0, 1] {
        place.s3().take_requests();
        place.s3().add(Fault {
            kind: Kind::Part,
            key: "/layers/",
            skip,
            times: 1,
            effect: Effect::Stall,
        });
        let running = host.start(&["backup"]);
        e2e::wait::until("it uploads", || {
            place.s3().arrivals(Kind::Part, "/layers/") > usize::try_from(skip).unwrap_or(0)
        });
        running.signal(signal);
        let _ = running.wait();
        place.s3().clear_faults();
        assert_eq!(place.keys("snapshots/"), [""; 0]);
        assert_eq!((part(&host), stored(&place)), (left.clone(), before));
    }
    let tries = go_on(&place, &host, &BOUND, |_| {});
    let _ = tries.outcome.expect(0);
    let layers = left["layers"].as_array().expect("it is a list").iter();
    let arrived: u64 = layers.filter_map(|layer| layer["size"].as_u64()).sum();
    let rest = FILES * SIZE - usize::try_from(arrived).expect("it is small");
    let bytes = tries.bytes;
    assert!(bytes * 10 <= rest * 13, "{bytes} bytes for {rest}");
    assert_done(&place, &host);
}

/// It gets the head, and this one's snapshot is a fork, whole.
fn another_writer() {
    let place = Place::memory();
    let host = Host::new(&place).booted('a');
    fill(&host);
    let other = Host::new(&place).booted('b');
    let tries = go_on(&place, &host, &BOUND, |late| {
        if late == 0 {
            let _ = other.run(&["restore"]).expect(10);
            tree::write(&other.root, "file", "of the other");
            other.backup();
        }
    });
    let _ = tries.outcome.expect(12);
    assert!(tries.parts > 0, "it is too large for one try");
    let shown = assert_whole(&place);
    let forks: Vec<_> = shown
        .records
        .iter()
        .filter(|(_, record)| record["fork"] == true)
        .collect();
    assert_eq!(forks.len(), 1, "{shown:#?}");
    let reader = Host::new(&place);
    let _ = reader.run(&["verify", "all", "--deep"]).expect(0);
    let _ = reader.run(&["restore", forks[0].0]).expect(0);
    assert_same(&describe(&host.root), &describe(&reader.root));
}

/// It leaves layers that no record names, and for six days, a backup goes on from them.
fn a_prune_elsewhere() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "old", "old");
    host.backup();
    fill(&host);
    first_part(&place, &host);
    let newest = |host: &Host| {
        let left = part(host);
        let layers = left["layers"].as_array().expect("it is a list");
        let own = layers.last().expect("it has a layer of its own");
        own["id"].as_str().expect("it has one").to_owned()
    };
    let made = newest(&host);
    let _ = Host::new(&place).run(&["prune"]).expect(0);
    assert!(
        place
            .keys("layers/")
            .contains(&format!("layers/{made}.tar.zst"))
    );
    // Six days later, a prune could come between any two requests.
    let old = past::id(
        jiff::SignedDuration::from_hours(6 * 24),
        &made[made.len() - 8..],
    );
    let bytes = place
        .objects()
        .remove(&format!("layers/{made}.tar.zst"))
        .expect("it is there");
    place.put(&format!("layers/{old}.tar.zst"), &bytes);
    past::change_facts(&host, |facts| {
        let layers = facts["part"]["layers"]
            .as_array_mut()
            .expect("it is a list");
        layers.last_mut().expect("it has one")["id"] = old.clone().into();
    });
    let tries = go_on(&place, &host, &BOUND, |_| {});
    let answer = tries.outcome.expect(0).json();
    let snapshot = answer["snapshot"].as_str().expect("it names one");
    assert!(
        !past::layers(&place.objects(), snapshot).contains(&old),
        "it began anew"
    );
    assert_done(&place, &host);
}

#[test]
fn much_new_data_and_layers_that_would_be_taken_over_end_as_well() {
    at_once(&[
        ("new data", || {
            let place = Place::memory();
            let host = Host::new(&place);
            tree::write(&host.root, "d3/old", tree::noise(7, 100_000));
            tree::write(&host.root, "z/old", "old");
            host.backup();
            fill(&host);
            let tries = go_on(&place, &host, &BOUND, |late| {
                tree::write(&host.root, "z/old", format!("changed {late}"));
            });
            let _ = tries.outcome.expect(0);
            assert!(tries.parts > 0, "it is too large for one try");
            assert_done(&place, &host);
        }),
        ("layers taken over", layers_taken_over),
    ]);
}

/// What is in a layer that is taken over is left to the next run as well.
fn layers_taken_over() {
    let place = Place::memory();
    let host = Host::new(&place);
    for number in (0..FILES).step_by(2) {
        tree::write(
            &host.root,
            file(number),
            tree::noise(number as u64 + 1, SIZE),
        );
    }
    link(&host, "a/first", &["d7/z"]);
    std::os::unix::fs::symlink("nowhere", host.root.join("d7/link")).expect("can make a link");
    host.backup();
    fs::remove_file(host.root.join(file(0))).expect("it is there");
    fill(&host);
    let tries = go_on(&place, &host, &BOUND, |late| {
        tree::write(&host.root, file(60), format!("changed {late}"));
    });
    let _ = tries.outcome.expect(0);
    assert!(tries.parts > 0, "it is too large for one try");
    let (bytes, tree) = (tries.bytes, FILES * SIZE);
    assert!(bytes * 10 <= tree * 13, "{bytes} bytes for {tree}");
    assert_done(&place, &host);
    tree::write(&host.root, "d0/more", tree::noise(3, 20 << 20));
    host.backup();
    assert_done(&place, &host);
}

#[test]
fn a_backup_that_fits_is_one_layer_however_close_its_bound_is() {
    let place = Place::directory();
    let host = Host::new(&place);
    fill(&host);
    tree::make(&host.root.join("all kinds"));
    let _ = host.json(&["backup", "--timeout", "60s"]);
    assert_eq!(place.keys("layers/").len(), 1);
    assert_done(&place, &host);
}

/// A change within the second of the last snapshot, where times have no more than seconds: only its content tells. The try that
/// found it is over before it is written, and the next one must find it again.
#[test]
fn a_change_that_only_the_content_tells_is_not_lost_between_the_tries() {
    const USER: &str = "54411";
    let place = Place::memory();
    let host = Host::new(&place).with("RUNTIME_GATEWAY_USER", USER);
    let image = host.folder.path().join("image");
    let file = File::create(&image).expect("can make a file");
    file.set_len(200 << 20).expect("can set a length");
    // Inodes of 128 bytes have no room for nanoseconds.
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-I", "128"])
        .arg(&image)
        .output();
    if !made.is_ok_and(|made| made.status.success()) {
        eprintln!("skipped: there is no mkfs.ext4");
        return;
    }
    let image = image.to_str().expect("it is UTF-8");
    let Some(_disk) = mount(&host.root, &["-o", "loop", image]) else {
        return;
    };
    let pause = ["--freeze-user", USER, "--max-pause", "20ms"];
    let changed = host.root.join("z/file");
    let ctime = || fs::metadata(&changed).expect("it is there").ctime();
    // In a layer that is too large to be taken over.
    for number in 0..70 {
        let line = format!("line {number} again and again\n");
        tree::write(
            &host.root,
            format!("a/{number}"),
            line.repeat((1 << 20) / line.len()),
        );
    }
    e2e::wait::until("it changes within the second", || {
        let _ = fs::remove_dir_all(&host.state);
        for key in place.keys("") {
            place.remove(&key);
        }
        tree::write(&host.root, "z/file", "one");
        let before = ctime();
        let _ = host.json(&[&["backup"][..], &pause].concat());
        tree::write(&host.root, "z/file", "two");
        ctime() == before
    });
    // A look that begins now reads the file for its time; once that cannot come again, later looks do not.
    e2e::wait::until("that second and the next are over", || {
        jiff::Timestamp::now().as_second() > ctime() + 2
    });
    fill(&host);
    let tries = go_on(&place, &host, &[&BOUND[..], &pause].concat(), |_| {});
    let _ = tries.outcome.expect(0);
    assert!(tries.parts > 0, "it is too large for one try");
    let other = Host::new(&place);
    let _ = other.run(&["restore"]).expect(0);
    let read = |host: &Host| fs::read(host.root.join("z/file")).expect("it can be read");
    assert_eq!(read(&other), read(&host));
}

/// One with more runs of data than are told apart is kept; one whose holes would be read as zeros by the gigabyte is left out.
#[test]
fn an_odd_file_never_stops_the_backups_of_the_others() {
    const RUNS: u64 = 16_385;
    let place = Place::directory();
    let (host, other) = (Host::new(&place), Host::new(&place));
    // Where it can be had: disks take long to remove a file of so many pieces.
    let _disks = [&host, &other].map(|host| tmpfs(&host.root, "size=400m,mode=755"));
    tree::write(&host.root, "a", "before them");
    tree::write(&host.root, "z", "behind them");
    let odd = |name: &str, runs: u64, apart: u64, length: u64| {
        let file = File::create(host.root.join(name)).expect("can make a file");
        for run in 0..runs {
            file.write_all_at(b"data", run * apart).expect("can write");
        }
        file.set_len(length).expect("can set a length");
    };
    odd("many runs", RUNS, 8192, 200 << 30);
    odd("many large holes", RUNS + 100, 12 << 20, 200 << 30);
    let first = host.json(&["backup"]);
    assert_eq!(first["skipped"], 1);
    tree::write(&host.root, "z", "changed");
    let answer = host.json(&["backup"]);
    assert_eq!(answer["unchanged"], false, "{answer}");
    let again = host.json(&["backup"]);
    assert_eq!(
        again["unchanged"], true,
        "it does not count as changed each time"
    );

    let _ = other.run(&["restore"]).expect(0);
    let names = |host: &Host| describe(&host.root).into_keys().collect::<Vec<_>>();
    let mut want = names(&host);
    want.retain(|name| !name.ends_with("many large holes"));
    assert_eq!(want, names(&other));
    for name in ["a", "z"] {
        let read = |host: &Host| fs::read(host.root.join(name)).expect("it can be read");
        assert_eq!(read(&host), read(&other), "{name}");
    }
    let back = File::open(other.root.join("many runs")).expect("it is back");
    assert_eq!(back.metadata().expect("it is open").len(), 200 << 30);
    for run in 0..RUNS {
        let mut found = [1; 8];
        back.read_exact_at(&mut found, run * 8192)
            .expect("it is as long");
        assert_eq!(&found, b"data\0\0\0\0", "run {run}");
    }
}
