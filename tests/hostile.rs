//! The gateway runs commands for strangers, so its tree may be anything that its user can make. Nothing of it leads out of the
//! tree, holds a backup up or costs more than its share: what cannot be kept is named and counted, and the snapshot goes on.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use e2e::agent::{Host, Outcome, Place};
use e2e::forge::holds;
use e2e::surroundings::around;
use e2e::tree::{self, assert_same, chown, describe, set_mode};
use e2e::wait::until;
use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, XattrFlags};

const NOBODY: u32 = 65_534;
const SECRET: &[u8] = b"0nly-r00t-may-read-this";

/// The gateway's users to try: nobody, where we can change users, and ourselves.
fn users() -> Vec<&'static str> {
    if tree::is_root() {
        vec!["nobody", "root"]
    } else {
        eprintln!("skipped in part: only root can change users");
        vec![""]
    }
}

fn host(place: &Place, user: &str) -> Host {
    let host = Host::new(place);
    match user {
        "nobody" => {
            chown(&host.root, NOBODY, NOBODY);
            host.with("RUNTIME_GATEWAY_USER", "nobody")
        }
        "" => host,
        user => host.with("RUNTIME_GATEWAY_USER", user),
    }
}

/// The paths that a run left out, with the reasons.
fn left_out(outcome: &Outcome) -> Vec<(String, String)> {
    let word = |line: &serde_json::Value, name: &str| line[name].as_str().unwrap_or("").to_owned();
    let lines = outcome.logged("entry left out");
    let pairs = lines
        .iter()
        .map(|line| (word(line, "path"), word(line, "reason")));
    pairs.collect()
}

/// Takes a snapshot and restores it beside the root.
fn restored(host: &Host) -> PathBuf {
    let target = host.folder.path().join("target");
    let _ = Command::new("rm").arg("-rf").arg(&target).status();
    let path = target.display().to_string();
    let _ = host.run(&["restore", "--target", &path]).expect(0);
    target
}

#[test]
fn links_to_what_only_root_may_read_are_kept_as_links() {
    for user in users() {
        let place = Place::memory();
        let host = host(&place, user);
        let secret = host.state.with_file_name("secret");
        fs::write(&secret, SECRET).expect("can write");
        set_mode(&secret, 0o600);
        let targets = [
            "/proc/1/environ",
            "/proc/self/environ",
            "/proc/self/fd/3",
            "/dev/zero",
            "/dev/tty",
            "/",
            "..",
            "../secret",
            "../state",
            "loop",
        ];
        for (number, target) in targets.iter().enumerate() {
            symlink(target, host.root.join(format!("link-{number}"))).expect("can make a link");
        }
        symlink(&host.state, host.root.join("state")).expect("can make a link");
        symlink("loop", host.root.join("loop")).expect("can make a link");
        tree::write(&host.root, "file", "file");
        let before = describe(&host.root);
        let outcome = host.run(&["backup", "--json"]).expect(0);
        assert_eq!(outcome.json()["skipped"], 0, "{}", outcome.stderr);
        assert!(!holds(&place.objects(), SECRET), "as {user}");
        let environment = host.state.display().to_string();
        let variable = format!("RUNTIME_STATE={environment}");
        assert!(!holds(&place.objects(), variable.as_bytes()), "as {user}");
        let after = describe(&restored(&host));
        let targets = |tree: &tree::Tree| -> Vec<_> {
            tree.values()
                .filter_map(|node| node.target.clone())
                .collect()
        };
        assert_eq!(targets(&before), targets(&after));
    }
}

#[test]
fn fifos_sockets_and_devices_hold_nothing_up() {
    for user in users() {
        let place = Place::directory();
        let host = host(&place, user);
        let make = |name: &str, kind, device| {
            rustix::fs::mknodat(CWD, host.root.join(name), kind, Mode::from(0o666), device)
        };
        make("fifo", FileType::Fifo, 0).expect("can make a fifo");
        let _socket = UnixListener::bind(host.root.join("socket")).expect("can make a socket");
        let mut devices = Vec::new();
        if tree::is_root() {
            for (name, kind, major, minor) in [
                ("zero", FileType::CharacterDevice, 1, 5),
                ("tty", FileType::CharacterDevice, 5, 0),
                ("disk", FileType::BlockDevice, 254, 0),
            ] {
                // A container may not make any.
                if make(name, kind, rustix::fs::makedev(major, minor)).is_ok() {
                    devices.push(name);
                }
            }
        }
        tree::write(&host.root, "file", "file");
        let outcome = host.run(&["backup", "--json"]).expect(0);
        let mut names: Vec<_> = left_out(&outcome)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        names.sort_unstable();
        devices.push("fifo");
        devices.sort_unstable();
        assert_eq!(names, devices);
        assert_eq!(outcome.json()["skipped"], devices.len());
        let kept: Vec<_> = describe(&restored(&host)).into_keys().collect();
        assert_eq!(kept, [PathBuf::new(), PathBuf::from("file")]);
    }
}

/// Ends a thread with the scope of this, also when that panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Swaps two paths for each other, again and again, as long as `work` takes. Gives the number of swaps.
fn while_swapping(one: &Path, other: &Path, work: impl FnOnce()) -> u64 {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let mut swaps = 0;
            while !is_over.load(Ordering::Relaxed) {
                let swapped =
                    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE);
                swapped.expect("both are there");
                swaps += 1;
            }
            swaps
        });
        let ends = Ends(&is_over);
        work();
        drop(ends);
        swapper.join().expect("it does not panic")
    })
}

#[test]
fn directories_and_files_swapped_for_links_during_the_walk_lead_nowhere() {
    let rounds = rounds("E2E_SWAP_ROUNDS", 12);
    for user in users() {
        let place = Place::directory();
        let host = host(&place, user);
        let secrets = host.state.with_file_name("secrets");
        for number in 0..20 {
            tree::write(&secrets, format!("dir/{number}"), SECRET);
            tree::write(&host.root, format!("victim/dir/{number}"), "harmless");
        }
        if user == "nobody" {
            set_mode(&secrets, 0o700);
        }
        tree::write(&host.root, "file", "harmless");
        symlink(&secrets, host.root.join("other")).expect("can make a link");
        symlink(secrets.join("dir/0"), host.root.join("trap")).expect("can make a link");
        let [victim, other, file, trap] =
            ["victim", "other", "file", "trap"].map(|name| host.root.join(name));
        let mut swaps = 0;
        for round in 0..rounds {
            // Something new, so that everything is read: in every round another file.
            tree::write(&host.root, "round", round.to_string());
            swaps += while_swapping(&victim, &other, || {
                while_swapping(&file, &trap, || {
                    let outcome = host.run(&["backup", "--json"]).expect(0);
                    assert!(outcome.json()["snapshot"].is_string());
                });
            });
            if round % 4 == 3 {
                let _ = fs::remove_dir_all(&host.state);
                let _ = host.run(&["restore", "--yes"]).expect(0);
                for name in ["victim", "other", "file", "trap"] {
                    let _ = fs::remove_dir_all(host.root.join(name));
                    let _ = fs::remove_file(host.root.join(name));
                }
                for number in 0..20 {
                    tree::write(&host.root, format!("victim/dir/{number}"), "harmless");
                }
                tree::write(&host.root, "file", "harmless");
                symlink(&secrets, &other).expect("can make a link");
                symlink(secrets.join("dir/0"), &trap).expect("can make a link");
            }
        }
        assert!(swaps > rounds, "{swaps} swaps in {rounds} rounds");
        println!("as {user:?}: {swaps} swaps in {rounds} rounds");
        assert!(!holds(&place.objects(), SECRET), "as {user}");
    }
}

/// How often, or as the environment says.
fn rounds(variable: &str, default: u64) -> u64 {
    let said = std::env::var(variable).ok();
    said.map_or(default, |said| said.parse().expect("it is a number"))
}

#[test]
fn names_of_any_bytes_come_back_and_say_nothing_to_a_terminal() {
    let place = Place::directory();
    let host = Host::new(&place);
    let names: [&[u8]; 9] = [
        b"new\nline",
        b"\x1b[2J\x1b]0;title\x07",
        b"\xff\xfe\x80",
        b"-rf",
        b" ",
        b"\\",
        b"{\"path\":\"x\"}",
        &[b'n'; 255],
        "\u{202e}gnp.exe".as_bytes(),
    ];
    for name in names {
        let directory = host.root.join(OsStr::from_bytes(name));
        fs::create_dir(&directory).expect("can make a directory");
        for inner in names {
            let path = directory.join(OsStr::from_bytes(inner));
            fs::write(&path, inner).expect("can write");
        }
        rustix::fs::mknodat(CWD, directory.join("fifo"), FileType::Fifo, Mode::RUSR, 0)
            .expect("can make a fifo");
    }
    let mut before = tree::kept(describe(&host.root));
    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(outcome.json()["skipped"], names.len());
    assert!(!outcome.stderr.contains('\u{1b}'), "{}", outcome.stderr);
    assert!(
        outcome.stderr.lines().all(|line| line.starts_with('{')),
        "{}",
        outcome.stderr
    );
    let after = describe(&restored(&host));
    before.retain(|path, _| after.contains_key(path) || !path.ends_with("fifo"));
    assert_same(&before, &after);
}

/// Makes directories in each other, each with a file, and gives the descriptor of the last.
fn deep(root: &Path, name: &OsStr, levels: usize) -> OwnedFd {
    let name = CString::new(name.as_bytes()).expect("it has no NUL");
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut fd = rustix::fs::open(root, flags, Mode::empty()).expect("it is there");
    for _ in 0..levels {
        rustix::fs::mkdirat(&fd, &name, Mode::RWXU).expect("can make a directory");
        let inner = rustix::fs::openat(&fd, &name, flags, Mode::empty()).expect("it is there");
        fd = inner;
    }
    fd
}

#[test]
fn ten_thousand_levels_cost_what_is_below_a_paths_length_and_nothing_else() {
    for name in ["d", &"n".repeat(255)] {
        let place = Place::directory();
        let host = Host::new(&place);
        deep(&host.root, OsStr::new(name), 10_000);
        tree::write(&host.root, format!("{name}/file"), "near the surface");
        tree::write(&host.root, "z", "behind it in the walk");
        let outcome = host.run(&["backup", "--json"]).expect(0);
        assert_eq!(outcome.json()["skipped"], 1);
        let left_out = left_out(&outcome);
        assert_eq!(left_out.len(), 1, "{left_out:?}");
        assert_eq!(
            left_out[0].1,
            "its path is longer than 4,096 bytes, or its name than 255"
        );
        // It is the same tree again, and nothing is said twice.
        assert_eq!(host.json(&["backup"])["unchanged"], true);

        // As a person and as a runtime: the old tree goes, whatever its depth.
        tree::write(&host.root, "z", "changed");
        let _ = host.run(&["restore"]).expect(0);
        assert_eq!(
            fs::read(host.root.join("z")).expect("it is back"),
            b"behind it in the walk"
        );
        assert_eq!(
            fs::read(host.root.join(name).join("file")).expect("it is back"),
            b"near the surface"
        );
        assert_eq!(host.leftovers(), [""; 0]);
        let levels = 4096 / (name.len() + 1);
        let mut path = host.root.clone();
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut fd = rustix::fs::open(&path, flags, Mode::empty()).expect("it is there");
        let mut depth = 0;
        while let Ok(inner) = rustix::fs::openat(&fd, name, flags, Mode::empty()) {
            fd = inner;
            depth += 1;
            path.push(name);
        }
        assert_eq!(depth, levels);
    }
}

#[test]
fn a_low_limit_of_open_files_costs_what_is_too_deep_for_it() {
    let place = Place::directory();
    let host = Host::new(&place);
    deep(&host.root, OsStr::new("d"), 300);
    tree::write(&host.root, "z", "behind it in the walk");
    let run = |arguments: &[&str]| {
        let inner = host.command(arguments);
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "ulimit -Sn 256 && ulimit -Hn 256 && exec \"$0\" \"$@\"",
        ]);
        e2e::agent::Running::start(&mut around(command, &inner)).wait()
    };
    let outcome = run(&["backup", "--json"]).expect(0);
    // A run with a higher limit can read it: it is not gone.
    let answer = outcome.json();
    assert_eq!(answer["unread"]["count"], 1, "{answer}");
    assert_eq!(answer["consistency"], "per-file");
    assert_eq!(left_out(&outcome), Vec::<(String, String)>::new());
    tree::write(&host.root, "z", "changed");
    let _ = run(&["restore"]).expect(0);
    assert_eq!(
        fs::read(host.root.join("z")).expect("it is back"),
        b"behind it in the walk"
    );
    assert!(host.root.join("d/".repeat(40)).is_dir());
}

/// A million of them with `E2E_ENTRIES=1000000`.
#[test]
fn very_many_names_in_one_directory_take_little_memory() {
    let count = rounds("E2E_ENTRIES", 20_000);
    let place = Place::directory();
    let host = Host::new(&place);
    let folder = host.root.join("names");
    fs::create_dir(&folder).expect("can make a directory");
    for number in 0..count {
        // Links: they take no block, and no file of any kind is opened.
        symlink("x", folder.join(format!("{number:07}"))).expect("can make a link");
    }
    for arguments in [&["backup", "--json"][..], &["restore", "--json"]] {
        if arguments[0] == "restore" {
            host.lose_everything();
        }
        let mut running = host.start(arguments);
        let mut peak = 0;
        while running.is_running() {
            peak = peak.max(running.peak_memory_if_there().unwrap_or(0));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let outcome = running.wait().expect(0);
        println!("{count} names: {} takes {peak} KiB", arguments[0]);
        assert!((1..64 << 10).contains(&peak), "{peak} KiB: {outcome:?}");
    }
    let names = fs::read_dir(&folder).expect("it is back").count() as u64;
    assert_eq!(names, count);
}

#[test]
fn files_that_grow_for_ever_and_files_that_shrink_do_not_hold_a_backup_up() {
    let place = Place::directory();
    let host = Host::new(&place);
    let growing = File::create(host.root.join("growing")).expect("can make a file");
    let shrinking = host.root.join("shrinking");
    tree::write(&host.root, "z", "behind them in the walk");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let noise = tree::noise(1, 1 << 20);
            let mut at = 0;
            while !is_over.load(Ordering::Relaxed) {
                // Appended as fast as it goes, up to what the disk should bear.
                growing.write_all_at(&noise, at).expect("there is room");
                at = (at + noise.len() as u64) % (512 << 20);
                let file = File::create(&shrinking).expect("can make a file");
                file.set_len(32 << 20).expect("can set a length");
                file.write_all_at(&noise, 0).expect("there is room");
                file.set_len(1000).expect("can set a length");
            }
        });
        until("the first write", || {
            fs::metadata(host.root.join("growing")).is_ok_and(|status| status.len() > 0)
        });
        let _ends = Ends(&is_over);
        for _ in 0..3 {
            let _ = host.run(&["backup", "--json"]).expect(0);
        }
    });
    let target = restored(&host);
    assert_eq!(
        fs::read(target.join("z")).expect("it is back"),
        b"behind them in the walk"
    );
    assert!(
        fs::metadata(target.join("growing"))
            .expect("it is back")
            .len()
            > 0
    );
    let _ = host.json(&["verify", "--deep"]);
}

#[test]
fn names_of_other_peoples_files_are_read_as_the_gateway_could() {
    if !tree::is_root() {
        return;
    }
    let place = Place::memory();
    let host = host(&place, "nobody");
    let beside = |name: &str, mode| {
        let path = host.state.with_file_name(name);
        fs::write(&path, [SECRET, name.as_bytes()].concat()).expect("can write");
        set_mode(&path, mode);
        fs::hard_link(&path, host.root.join(name)).expect("can make a hard link");
        path
    };
    let _secret = beside("secret", 0o600);
    let public = beside("public", 0o644);
    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(
        left_out(&outcome),
        [("secret".to_owned(), "it cannot be read".to_owned())]
    );
    assert!(holds(&place.objects(), &[SECRET, b"public"].concat()));
    assert!(!holds(&place.objects(), &[SECRET, b"secret"].concat()));
    // A restore writes a file of its own, and never through that name.
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    let back = fs::metadata(host.root.join("public")).expect("it is back");
    assert_eq!((back.uid(), back.nlink()), (NOBODY, 1));
    assert_ne!(back.ino(), fs::metadata(public).expect("it stayed").ino());
}

#[test]
fn the_rights_of_others_do_not_come_back_with_a_file() {
    if !tree::is_root() {
        return;
    }
    let place = Place::directory();
    let host = host(&place, "nobody");
    for (name, owner) in [("own", NOBODY), ("roots", 0)] {
        tree::write(&host.root, name, name);
        chown(&host.root.join(name), owner, owner);
        set_mode(&host.root.join(name), 0o6755);
    }
    host.backup();
    let modes = |host: &Host| {
        host.lose_everything();
        let _ = host.run(&["restore"]).expect(0);
        ["own", "roots"].map(|name| {
            let status = fs::metadata(host.root.join(name)).expect("it is back");
            (status.uid(), status.mode() & 0o7777)
        })
    };
    assert_eq!(modes(&host), [(NOBODY, 0o6755), (NOBODY, 0o755)]);
    let mut host = host;
    host.set("RUNTIME_GATEWAY_USER", "root");
    assert_eq!(modes(&host), [(NOBODY, 0o6755), (0, 0o6755)]);
}

#[test]
fn attributes_of_any_size_cost_at_most_themselves() {
    let place = Place::directory();
    let mut host = Host::new(&place);
    let Some(_mount) = e2e::mount::tmpfs(&host.root, "size=64m,nr_inodes=10000000") else {
        return;
    };
    let set = |name: &str, attribute: String, size| {
        let value = tree::noise(1, size);
        rustix::fs::setxattr(host.root.join(name), attribute, &value, XattrFlags::empty())
    };
    tree::write(&host.root, "largest", "largest");
    if set("largest", "user.largest".to_owned(), 65_536).is_err() {
        eprintln!("skipped: this kernel's tmpfs keeps no attributes of that size");
        return;
    }
    tree::write(&host.root, "many", "many");
    tree::write(&host.root, "folder/file", "in a folder");
    for number in 0..40 {
        for name in ["many", "folder"] {
            set(name, format!("user.{number}"), 65_536).expect("there is room");
        }
    }
    let outcome = host.run(&["backup", "--json"]).expect(0);
    let mut without = left_out(&outcome);
    without.sort_unstable();
    let reason = "only its attributes: too many, or unreadable";
    let pairs = ["folder", "many"].map(|name| (name.to_owned(), reason.to_owned()));
    assert_eq!(without, pairs);
    assert_eq!(outcome.json()["skipped"], 2);
    host.set(
        "RUNTIME_ROOT",
        host.folder.path().join("other").display().to_string(),
    );
    let Some(other) = e2e::mount::tmpfs(&host.folder.path().join("other"), "size=64m") else {
        return;
    };
    let _ = host.run(&["restore"]).expect(0);
    let tree = describe(&host.folder.path().join("other"));
    assert_eq!(
        tree[Path::new("largest")].attributes[OsStr::new("user.largest")].len(),
        65_536
    );
    assert!(tree[Path::new("many")].attributes.is_empty());
    assert_eq!(tree[Path::new("folder/file")].size, 11);
    drop(other);
}

#[test]
fn files_of_many_holes_and_of_terabytes_come_back() {
    let place = Place::directory();
    let host = Host::new(&place);
    let many = File::create(host.root.join("many")).expect("can make a file");
    // More than are told apart.
    for number in 0..20_000 {
        many.write_all_at(b"x", 2 * number * tree::BLOCK)
            .expect("there is room");
    }
    let large = File::create(host.root.join("large")).expect("can make a file");
    large.set_len(8 << 40).expect("can set a length");
    large
        .write_all_at(b"end", (8 << 40) - 3)
        .expect("there is room");
    drop((many, large));
    host.backup();
    let target = restored(&host);
    for name in ["many", "large"] {
        let [old, new] = [&host.root, &target]
            .map(|tree| fs::metadata(tree.join(name)).expect("it is there").len());
        assert_eq!(old, new, "{name}");
    }
    let content = |tree: &Path| fs::read(tree.join("many")).expect("it can be read");
    assert!(
        content(&host.root) == content(&target),
        "the contents differ"
    );
    let blocks = fs::metadata(target.join("large"))
        .expect("it is there")
        .blocks();
    assert!(blocks < 1000, "its hole was filled with {blocks} blocks");
}

#[test]
fn absurd_times_and_very_many_names_of_files_do_no_harm() {
    let place = Place::directory();
    let host = Host::new(&place);
    let Some(_mount) = e2e::mount::tmpfs(&host.root, "size=256m,nr_inodes=1000000") else {
        return;
    };
    for (name, seconds) in [
        ("first", i64::MIN),
        ("before", -1 << 40),
        ("after", 1 << 40),
        ("last", i64::MAX),
    ] {
        tree::write(&host.root, name, name);
        tree::set_mtime(&host.root.join(name), seconds, 999_999_999);
    }
    // One file of many names, and many files of two names with long paths: more than are kept in mind.
    tree::write(&host.root, "names/first", "names");
    for number in 0..20_000 {
        let name = host.root.join("names").join(number.to_string());
        fs::hard_link(host.root.join("names/first"), name).expect("can make a link");
    }
    let long = vec!["n".repeat(250); 6].join("/");
    let folders = ["a", "b"].map(|name| host.root.join(name).join(&long));
    for folder in &folders {
        fs::create_dir_all(folder).expect("can make a directory");
    }
    let count = rounds("E2E_NAMES", 12_000);
    for number in 0..count {
        let name = format!("{}{number:08}", "n".repeat(200));
        fs::write(folders[0].join(&name), b"").expect("there is room");
        fs::hard_link(folders[0].join(&name), folders[1].join(&name)).expect("can make a link");
    }
    let mut running = host.start(&["backup", "--json"]);
    let mut peak = 0;
    while running.is_running() {
        peak = peak.max(running.peak_memory_if_there().unwrap_or(0));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let outcome = running.wait().expect(0);
    println!("{count} files of two names: {peak} KiB");
    assert!((1..64 << 10).contains(&peak), "{peak} KiB");
    assert_eq!(outcome.json()["skipped"], 0);
    assert_eq!(host.json(&["backup"])["unchanged"], true);
    let target = restored(&host);
    let status = fs::metadata(target.join("names/19999")).expect("it is back");
    assert_eq!(status.nlink(), 20_001);
    let folder = target.join("b").join(&long);
    let found = fs::read_dir(&folder).expect("it is back").map(|entry| {
        let status = entry.and_then(|entry| entry.metadata());
        status.expect("it is back").nlink()
    });
    let found: Vec<u64> = found.collect();
    assert_eq!(found.len() as u64, count);
    let linked = found.iter().filter(|names| **names == 2).count();
    assert!((1..found.len()).contains(&linked), "{linked} of {count}");
}
