//! A restore that is killed, stopped, late or refused by the kernel at any step of its swap, beside a writer or alone, where two
//! directories can be exchanged and where entries have to be moved: the root is the old tree or the new one, whole, the exit code
//! says which, and whatever command runs next ends what was left half done.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use e2e::agent::{Host, Outcome, Place, Running, boot_id};
use e2e::binaries::binary;
use e2e::mount::{Mount, mount, tmpfs};
use e2e::s3::{Effect, Fault, Kind};
use e2e::surroundings::around;
use e2e::tree::{self, Tree, describe, differences};

/// The calls that change a directory, or make a change last.
const STEPS: &str =
    "rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,fsync,fchmod,fchown,utimensat";
/// More steps than any of these restores has in one thread.
const MOST_STEPS: u32 = 400;

/// How the root can be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Exchange,
    Moves,
}

/// A host with an old tree in its root that is newer than its one snapshot.
struct Case {
    place: Place,
    host: Host,
    _disk: Option<Mount>,
    snapshot: String,
    old: Tree,
    new: Tree,
}

/// What is in a root, but for what is about the directory itself and about the restore.
fn content(root: &Path) -> Tree {
    let mut tree = describe(root);
    tree.retain(|path, _| !path.as_os_str().is_empty() && !path.starts_with(".restoring"));
    tree
}

impl Case {
    fn new(way: Way) -> Option<Self> {
        let place = Place::directory();
        let host = Host::new(&place);
        let disk = match way {
            Way::Exchange => None,
            Way::Moves => Some(tmpfs(&host.root, "size=16m")?),
        };
        for name in ["a/inner/file", "b", "c/file", "only-new/file"] {
            tree::write(&host.root, name, "of the snapshot");
        }
        let new = content(&host.root);
        let snapshot = host.backup();
        Some(
            Self {
                snapshot,
                place,
                host,
                _disk: disk,
                old: Tree::new(),
                new,
            }
            .renewed(),
        )
    }

    /// The root becomes the old tree again.
    fn renewed(mut self) -> Self {
        self.renew();
        self
    }

    fn renew(&mut self) {
        let root = &self.host.root;
        for entry in fs::read_dir(root).expect("it is there") {
            let path = entry.expect("it can be listed").path();
            let removed = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.expect("it can be removed");
        }
        for name in ["a/inner/file", "b", "c/file", "only-old/file", "z"] {
            tree::write(root, name, "newer than the snapshot");
        }
        self.old = content(root);
    }

    /// Runs a restore under strace(1), which injects something into these system calls.
    fn restore(&self, calls: &str, inject: &str, arguments: &[&str]) -> Outcome {
        let agent = self
            .host
            .command(&[&["restore", "--yes", "--json"], arguments].concat());
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e"]);
        command.args([
            format!("trace={calls}"),
            "-e".to_owned(),
            format!("inject={calls}:{inject}"),
        ]);
        Running::start(&mut around(command, &agent)).wait()
    }

    fn is(&self, tree: &Tree) -> bool {
        differences(tree, &content(&self.host.root)).is_empty()
    }

    #[track_caller]
    fn assert_is_one_of_them(&self, what: &str) {
        let root = content(&self.host.root);
        let (old, new) = (differences(&self.old, &root), differences(&self.new, &root));
        assert!(
            old.is_empty() || new.is_empty(),
            "{what}: not the old tree: {old:#?}\nnor the new one: {new:#?}"
        );
    }

    /// Whatever runs next ends it, the tree can be backed up and restored, and nothing is left.
    #[track_caller]
    fn assert_any_next_run_mends_it(&mut self, number: u32, what: &str) {
        let verbs: [&[&str]; 4] = [
            &["backup"],
            &["prune"],
            &["verify"],
            &["restore", "--dry-run"],
        ];
        let verb = verbs[number as usize % verbs.len()];
        let next = self.host.run(verb);
        assert_eq!(next.code, Some(0), "{what}, then {verb:?}: {}", next.stderr);
        self.assert_is_one_of_them(&format!("{what}, then {verb:?}"));
        if self.is(&self.old) {
            let restored = self.host.run(&["restore", &self.snapshot, "--yes"]);
            assert_eq!(restored.code, Some(0), "{what}: {restored:?}");
        }
        if verb[0] != "backup" {
            let now = content(&self.host.root);
            assert_eq!(
                differences(&self.new, &now),
                [""; 0],
                "{what}, then {verb:?}"
            );
        }
        let _ = self.host.run(&["prune"]).expect(0);
        assert_eq!(self.host.leftovers(), [""; 0], "{what}");
        assert!(!self.host.root.join(".restoring").exists(), "{what}");
    }
}

/// Does something at each step of a restore, or at every so many of them, until no step is left.
fn at_each_step(
    way: Way,
    stride: usize,
    inject: impl Fn(u32) -> String,
    arguments: &[&str],
    check: impl Fn(&mut Case, &Outcome, u32, &str),
) {
    let Some(mut case) = Case::new(way) else {
        return;
    };
    let snapshot = case.snapshot.clone();
    let mut quiet = 0;
    for step in (1..MOST_STEPS).step_by(stride) {
        let inject = inject(step);
        let what = format!("{way:?}, {inject}");
        let arguments = [&[snapshot.as_str()], arguments].concat();
        let outcome = case.restore(STEPS, &inject, &arguments);
        if outcome.code == Some(0) {
            assert!(
                case.is(&case.new),
                "{what}: exit code 0 says that it is the new tree"
            );
        }
        check(&mut case, &outcome, step, &what);
        // Each thread counts for itself: no thread has so many steps.
        quiet = if outcome.code == Some(0)
            && outcome.logged("a part of the old tree is left").is_empty()
        {
            quiet + 1
        } else {
            0
        };
        if quiet == 3 {
            return;
        }
        case.renew();
    }
    panic!("{MOST_STEPS} steps and no end");
}

#[test]
fn after_a_kill_at_any_step_any_next_run_ends_it() {
    for way in [Way::Exchange, Way::Moves] {
        at_each_step(
            way,
            1,
            |step| format!("signal=SIGKILL:when={step}"),
            &[],
            |case, outcome, step, what| {
                assert!(
                    outcome.code == Some(0) || outcome.signal == Some(9),
                    "{what}: {outcome:?}"
                );
                case.assert_any_next_run_mends_it(step, what);
            },
        );
    }
}

#[test]
fn a_signal_at_any_step_leaves_the_tree_that_the_exit_code_says() {
    for way in [Way::Exchange, Way::Moves] {
        at_each_step(
            way,
            1,
            |step| format!("signal=SIGTERM:when={step}"),
            &[],
            |case, outcome, step, what| {
                if outcome.code != Some(0) {
                    assert_eq!(outcome.code, Some(143), "{what}: {outcome:?}");
                    assert!(case.is(&case.old), "{what}");
                }
                case.assert_any_next_run_mends_it(step, what);
            },
        );
    }
}

#[test]
fn a_bound_that_runs_out_at_any_step_leaves_the_tree_that_the_exit_code_says() {
    for way in [Way::Exchange, Way::Moves] {
        let delay = |step| format!("delay_enter=1200000:when={step}");
        at_each_step(
            // Each step waits for the bound.
            way,
            3,
            delay,
            &["--timeout", "1s"],
            |case, outcome, step, what| {
                if outcome.code != Some(0) {
                    assert_eq!(outcome.code, Some(124), "{what}: {outcome:?}");
                    assert!(case.is(&case.old), "{what}");
                }
                case.assert_any_next_run_mends_it(step, what);
            },
        );
    }
}

#[test]
fn an_error_at_any_step_leaves_the_old_tree_or_the_new_one() {
    for way in [Way::Exchange, Way::Moves] {
        for error in ["EIO", "ENOSPC", "EPERM"] {
            at_each_step(
                way,
                1,
                |step| format!("error={error}:when={step}"),
                &[],
                |case, outcome, step, what| {
                    assert!(outcome.signal.is_none(), "{what}: {outcome:?}");
                    // Each call counts for itself: a second one may fail on the way back.
                    let is_half =
                        outcome.code == Some(74) && outcome.json()["code"] == "restore_unfinished";
                    if outcome.code != Some(0) && !is_half {
                        assert!(case.is(&case.old), "{what}: {outcome:?}");
                    }
                    case.assert_any_next_run_mends_it(step, what);
                },
            );
        }
    }
}

#[test]
fn errors_from_some_step_on_lose_nothing_and_the_next_run_goes_on() {
    for way in [Way::Exchange, Way::Moves] {
        at_each_step(
            way,
            1,
            |step| format!("error=EIO:when={step}+"),
            &[],
            |case, outcome, step, what| {
                assert!(outcome.signal.is_none(), "{what}: {outcome:?}");
                if outcome.code != Some(0) && outcome.json()["code"] != "restore_unfinished" {
                    assert!(case.is(&case.old), "{what}: {outcome:?}");
                }
                case.assert_any_next_run_mends_it(step, what);
            },
        );
    }
}

#[test]
fn a_writer_that_makes_directories_again_and_again_stops_no_restore_and_loses_no_tree() {
    let Some(mut case) = Case::new(Way::Moves) else {
        return;
    };
    for _ in 0..20 {
        let is_done = AtomicBool::new(false);
        let (again, root) = (case.host.root.join("c"), &case.host.root);
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    // There or not, and in the middle of a swap: only that it tries counts.
                    let _ = fs::create_dir(&again);
                    let _ = fs::write(root.join("b"), "a log line");
                }
            });
            let outcome = case.host.run(&["restore", "--yes", "--json"]);
            is_done.store(true, Ordering::Relaxed);
            outcome
        });
        let want = if outcome.code == Some(0) {
            &case.new
        } else {
            &case.old
        };
        let mut got = content(&case.host.root);
        let mut want = want.clone();
        for tree in [&mut got, &mut want] {
            tree.remove(Path::new("b"));
        }
        // The time of a directory in which the writer failed to make one is what it was.
        assert!(
            differences(&want, &got).is_empty(),
            "{outcome:?}: {:#?}",
            differences(&want, &got)
        );
        case.renew();
    }
}

#[test]
fn what_a_writer_puts_in_the_way_back_is_set_aside_and_the_old_tree_is_whole() {
    let Some(mut case) = Case::new(Way::Moves) else {
        return;
    };
    let mut aside = 0;
    for step in 1..30 {
        let is_done = AtomicBool::new(false);
        let root = case.host.root.clone();
        let inject = format!("error=EIO:when={step}");
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    // There or not, and in the middle of a swap: only that it tries counts.
                    let _ = fs::create_dir(root.join("c"));
                    let _ = fs::write(root.join("c/log"), "a log line");
                }
            });
            let outcome = case.restore("renameat2", &inject, &[]);
            is_done.store(true, Ordering::Relaxed);
            outcome
        });
        let is_half = outcome.code != Some(0) && outcome.json()["code"] == "restore_unfinished";
        if is_half {
            // Moving back failed, too: the next run goes on, to the one tree or the other.
            let _ = case.host.run(&["verify"]).expect(0);
        }
        let is_new = outcome.code == Some(0) || (is_half && !root.join("z").exists());
        let want = if is_new { &case.new } else { &case.old };
        // What the writer adds is beside the point, and so is the time of the directory that it writes to.
        let mut lines = differences(want, &content(&root));
        lines.retain(|line| !line.starts_with("too much: ") && !line.starts_with("mtime of c:"));
        assert_eq!(lines, [""; 0], "{inject}: {outcome:?}");
        if !is_half && root.join(".restoring-aside").exists() {
            aside += 1;
            let named = outcome.logged("set aside what was written while the tree was replaced");
            assert_eq!(named.len(), 1, "{outcome:?}");
        }
        case.renew();
    }
    assert!(aside > 0, "nothing was ever in the way");
}

/// A directory store whose root lies on an overlay: what is in the lower layer cannot be renamed.
#[test]
fn a_root_of_an_overlay_whose_lower_layer_has_directories_is_replaced_whole() {
    let place = Place::directory();
    let host = Host::new(&place);
    let folder = host.folder.path();
    let lower = folder.join("state/lower");
    for name in ["a/inner/file", "b", "only-old/deep/file"] {
        tree::write(&lower, name, "of the image");
    }
    let Some(_upper) = tmpfs(&folder.join("state/upper"), "size=16m") else {
        return;
    };
    for name in ["upper", "work"] {
        fs::create_dir(folder.join("state/upper").join(name)).expect("it can be made");
    }
    let options = format!(
        "lowerdir={0}/lower,upperdir={0}/upper/upper,workdir={0}/upper/work",
        folder.join("state").display()
    );
    let Some(_overlay) = mount(&host.root, &["-t", "overlay", "overlay", "-o", &options]) else {
        return;
    };
    let before = content(&host.root);
    host.backup();
    tree::write(&host.root, "a/inner/file", "changed");
    tree::write(&host.root, "new", "new");
    let _ = host.run(&["restore", "--yes"]).expect(0);
    assert!(differences(&before, &content(&host.root)).is_empty());
}

#[test]
fn a_restore_that_runs_out_of_time_goes_on_from_what_it_has() {
    // Many files, and one that no single try has time for.
    for sizes in [vec![1_500_000; 24], vec![36_000_000]] {
        let place = Place::memory();
        let host = Host::new(&place);
        for (number, size) in sizes.iter().enumerate() {
            tree::write(
                &host.root,
                format!("file-{number}"),
                tree::noise(number as u64, *size),
            );
        }
        let before = content(&host.root);
        host.backup();
        host.lose_everything();
        place.s3().take_requests();
        let mut tries = 0;
        let is_done = |tries: u32| {
            let digits = [b'a', b'b', b'c', b'd', b'e', b'f'];
            let mut runtime = host.command(&[
                "restore",
                "--json",
                "--bandwidth",
                "6000000",
                "--timeout",
                "3s",
            ]);
            runtime.env(
                "RUNTIME_BOOT_ID",
                boot_id(digits[tries as usize % digits.len()].into()),
            );
            let outcome = Running::start(&mut runtime).wait();
            assert!(matches!(outcome.code, Some(0 | 124)), "{outcome:?}");
            outcome.code == Some(0)
        };
        while !is_done(tries) {
            assert!(!host.root.exists(), "a tree appears whole or not at all");
            tries += 1;
            assert!(tries < 12, "it makes no progress");
        }
        assert!(tries > 0, "one try had time for all of it");
        assert!(differences(&before, &content(&host.root)).is_empty());
        assert_eq!(host.leftovers(), [""; 0]);
    }
}

#[test]
fn what_an_earlier_restore_left_and_somebody_altered_is_not_taken_over() {
    let place = Place::memory();
    let host = Host::new(&place);
    for name in ["a", "b", "dir/c"] {
        tree::write(&host.root, name, tree::noise(7, 100_000));
    }
    let before = content(&host.root);
    host.backup();
    host.lose_everything();
    // Until everything is unpacked but nothing is in its place.
    let _ = host.run(&["restore"]).expect(0);
    let staged = host.folder.path().join(".root.restoring/new");
    fs::remove_dir_all(&host.root).expect("it can be removed");
    place.s3().add_fault(Kind::Get, "layers/", 9, Effect::Stall);
    let mut late = host.command(&["restore", "--timeout", "1s"]);
    let _ = Running::start(&mut late).wait().expect(124);
    place.s3().clear_faults();
    fs::create_dir_all(staged.join("dir")).expect("it can be made");
    fs::write(staged.join("a"), tree::noise(8, 100_000)).expect("it can be written");
    fs::write(staged.join("b"), tree::noise(8, 50_000)).expect("it can be written");
    std::os::unix::fs::symlink("/etc/passwd", staged.join("dir/c")).expect("it can be made");
    let mut last = None;
    for _ in 0..3 {
        let outcome = host.run(&["restore", "--json"]);
        if outcome.code == Some(0) {
            last = Some(outcome);
            break;
        }
        assert_eq!(outcome.json()["code"], "local", "{outcome:?}");
    }
    assert!(last.is_some(), "it never ends");
    assert!(differences(&before, &content(&host.root)).is_empty());
}

#[test]
fn a_root_in_use_is_not_replaced_by_hand_without_a_word() {
    let Some(case) = Case::new(Way::Exchange) else {
        return;
    };
    let mut user = Command::new("sleep")
        .arg("1000")
        .current_dir(case.host.root.join("a"))
        .spawn()
        .expect("it can be run");
    let refused = case.host.run(&["restore", "--json"]);
    let pid = user.id().to_string();
    assert_eq!(
        (refused.code, &refused.json()["code"]),
        (Some(74), &"in_use".into())
    );
    assert!(
        refused.json()["error"]
            .to_string()
            .contains(&format!("sleep {pid}")),
        "{refused:?}"
    );
    assert!(case.is(&case.old));
    let _ = case.host.run(&["restore", "--yes"]).expect(0);
    assert!(case.is(&case.new));
    user.kill().expect("it runs");
    user.wait().expect("it is our child");
}

#[test]
fn what_is_written_right_after_a_restore_is_in_the_next_backup() {
    let Some(mut case) = Case::new(Way::Exchange) else {
        return;
    };
    for round in 0..20 {
        case.renew();
        // So that a walk of the tree takes its time.
        for number in 0..500 {
            tree::write(&case.host.root, format!("junk/{number}"), "");
        }
        let is_done = AtomicBool::new(false);
        let root = &case.host.root;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut written = 0;
                // One write in the new tree, at its first moment.
                while !is_done.load(Ordering::Relaxed) && root.join("junk").exists() {
                    written += 1;
                    // In the middle of the exchange there is no such directory.
                    let _ = fs::write(root.join("c/new"), format!("{round} {written}"));
                    let _ = fs::rename(root.join("c/new"), root.join("c/file"));
                }
                let _ = fs::write(root.join("c/new"), format!("{round} last"));
                let _ = fs::rename(root.join("c/new"), root.join("c/file"));
            });
            let _ = case.host.run(&["restore", "--yes"]).expect(0);
            is_done.store(true, Ordering::Relaxed);
        });
        case.host.backup();
        let target = case.host.folder.path().join(format!("target-{round}"));
        let target_text = target.display().to_string();
        let _ = case
            .host
            .run(&["restore", "--target", &target_text])
            .expect(0);
        let read = |root: &Path| fs::read(root.join("c/file")).expect("it is there");
        assert_eq!(read(&target), read(&case.host.root), "round {round}");
        let _ = case.host.run(&["restore", "--dry-run"]).expect(0);
        fs::remove_dir_all(&target).expect("it can be removed");
    }
}

#[test]
fn the_removal_of_a_large_old_tree_holds_up_neither_a_signal_nor_the_answer() {
    let Some(mut case) = Case::new(Way::Exchange) else {
        return;
    };
    for number in 0..3000 {
        tree::write(&case.host.root, format!("large/{number}"), "");
    }
    // Each removal takes so long that the whole of it would take minutes.
    let outcome = case.restore(STEPS, "delay_enter=50000:when=200+", &["--timeout", "5s"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(case.is(&case.new));
    let warning = outcome.json()["warning"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(warning.contains("the new tree is in place"), "{warning}");
    assert!(!case.host.leftovers().is_empty());
    case.assert_any_next_run_mends_it(1, "a removal that was cut short");
}

#[test]
fn a_target_that_is_an_empty_mount_point_is_filled_also_by_a_second_try() {
    let place = Place::memory();
    let host = Host::new(&place);
    for name in ["a/inner/file", "b"] {
        tree::write(&host.root, name, tree::noise(1, 100_000));
    }
    let before = content(&host.root);
    host.backup();
    let target = host.folder.path().join("target");
    let Some(_disk) = tmpfs(&target, "size=16m") else {
        return;
    };
    let text = target.display().to_string();
    place.s3().add(Fault {
        kind: Kind::Get,
        key: "layers/",
        skip: 1,
        times: 1,
        effect: Effect::Stall,
    });
    let late = host.run(&["restore", "--target", &text, "--timeout", "2s"]);
    let _ = late.expect(124);
    assert!(target.join(".restoring").exists(), "for the next try");
    place.s3().clear_faults();
    let next = host.run(&["restore", "--target", &text]).expect(0);
    let going_on = next.logged("going on with what an earlier restore has unpacked");
    assert_eq!(going_on.len(), 1);
    assert!(differences(&before, &content(&target)).is_empty());
    assert!(!target.join(".restoring").exists());
    // Not empty any more.
    let _ = host.run(&["restore", "--target", &text]).expect(64);
}

#[test]
fn what_is_left_of_a_swap_that_was_undone_does_not_undo_the_next_one() {
    let Some(mut case) = Case::new(Way::Moves) else {
        return;
    };
    // Unpacked, and then killed; and the folder of a way back whose last step failed.
    let outcome = case.restore("syncfs", "signal=SIGKILL:when=1", &[]);
    assert_eq!(outcome.signal, Some(9), "{outcome:?}");
    fs::create_dir(case.host.root.join(".restoring/back")).expect("it can be made");
    let _ = case.host.run(&["restore", "--yes"]).expect(0);
    assert!(case.is(&case.new));
    case.assert_any_next_run_mends_it(1, "a swap after one that was undone");
}

#[test]
fn what_somebody_put_into_an_unfinished_restore_does_not_come_back_with_it() {
    let Some(case) = Case::new(Way::Exchange) else {
        return;
    };
    let outcome = case.restore("syncfs", "signal=SIGKILL:when=1", &[]);
    assert_eq!(outcome.signal, Some(9), "{outcome:?}");
    let staged = case.host.folder.path().join(".root.restoring/new");
    tree::write(&staged, "foreign/file", "of somebody else");
    fs::remove_dir_all(staged.join("c")).expect("it is there");
    std::os::unix::fs::symlink("/etc", staged.join("c")).expect("it can be made");
    fs::remove_file(staged.join("b")).expect("it is there");
    fs::create_dir_all(staged.join("b/inner")).expect("it can be made");
    rustix::fs::setxattr(
        staged.join("a/inner/file"),
        "user.foreign",
        b"1",
        rustix::fs::XattrFlags::empty(),
    )
    .expect("it can be set");
    let outcome = case.host.run(&["restore", "--yes", "--json"]).expect(0);
    let going_on = outcome.logged("going on with what an earlier restore has unpacked");
    assert_eq!(going_on.len(), 1);
    let root = content(&case.host.root);
    assert_eq!(differences(&case.new, &root), [""; 0]);
}

#[test]
fn a_hangup_in_the_middle_is_served_as_any_signal_that_asks_to_stop() {
    for way in [Way::Exchange, Way::Moves] {
        let Some(mut case) = Case::new(way) else {
            return;
        };
        for step in 1..8 {
            let outcome = case.restore("renameat2", &format!("signal=SIGHUP:when={step}"), &[]);
            let want = match outcome.code {
                Some(0) => &case.new,
                Some(129) => &case.old,
                _ => panic!("{step}: {outcome:?}"),
            };
            assert!(case.is(want), "{step}: {outcome:?}");
            case.renew();
        }
    }
}

#[test]
fn a_directory_that_its_owner_may_not_write_to_can_be_moved() {
    if !tree::is_root() {
        return;
    }
    for way in [Way::Exchange, Way::Moves] {
        let Some(case) = Case::new(way) else {
            return;
        };
        // All of it as a user without any right of root's.
        let host = &case.host;
        // That user may have no way to where it was built.
        let agent = host.folder.path().join("agent");
        fs::copy(binary("backup-agent"), &agent).expect("it can be copied");
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).expect("it is ours");
        let user = host.folder.path().display().to_string();
        let set = |script: &str| {
            let status = Command::new("sh")
                .args(["-c", script, "sh", &user])
                .status();
            assert!(status.is_ok_and(|status| status.success()), "{script}");
        };
        let run = |arguments: &[&str]| {
            let by_root = host.command(arguments);
            let mut command = Command::new("setpriv");
            command.args(["--reuid=54711", "--regid=54711", "--clear-groups"]);
            // The copy runs in the place of the program.
            command.args([
                OsStr::new("sh"),
                OsStr::new("-c"),
                OsStr::new("agent=$1 && shift 2 && exec \"$agent\" \"$@\""),
            ]);
            command.arg("sh").arg(&agent);
            Running::start(&mut around(command, &by_root)).wait()
        };
        set("chown -R 54711:54711 \"$1\" && chmod 755 \"$1\"");
        let Place::Directory(store) = &case.place else {
            unreachable!("it was made as one");
        };
        let status = Command::new("chown")
            .arg("-R")
            .arg("54711:54711")
            .arg(store.path())
            .status();
        assert!(status.is_ok_and(|status| status.success()));
        set("chmod 555 \"$1/root/a\" \"$1/root\"");
        let before = content(&host.root);
        let _ = run(&["backup", "--json"]).expect(0);
        set(
            "chmod 755 \"$1/root\" \"$1/root/a\" && rm -r \"$1/root/\"* && mkdir \"$1/root/other\" \"$1/root/shut\" && chmod 555 \"$1/root/other\" && chmod 0 \"$1/root/shut\" && chown -R 54711 \"$1/root\"",
        );
        let restored = run(&["restore", "--yes", "--json"]);
        assert_eq!(restored.code, Some(0), "{way:?}: {restored:?}");
        assert_eq!(
            differences(&before, &content(&host.root)),
            [""; 0],
            "{way:?}"
        );
    }
}
