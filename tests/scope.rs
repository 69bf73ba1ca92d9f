//! What a snapshot takes in and what it leaves out: file types, patterns, and whatever the gateway's user cannot read.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use e2e::agent::{Host, Place};
use e2e::s3::{Effect, Kind};
use e2e::surroundings::around;
use e2e::tree::{self, BLOCK, assert_same, chown, describe, set_mode};
use rustix::fs::{CWD, FileType, Mode, mknodat};

const NOBODY: u32 = 65_534;

/// Names that a restored copy of the newest snapshot has.
fn kept_names(host: &Host) -> Vec<String> {
    let target = host.folder.path().join("target");
    let _ = host
        .run(&["restore", "--target", &target.display().to_string()])
        .expect(0);
    let names = describe(&target)
        .into_iter()
        .filter(|(_, node)| node.kind != "directory");
    names.map(|(path, _)| path.display().to_string()).collect()
}

#[test]
fn a_fifo_is_left_out_with_a_word_and_a_socket_without() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    mknodat(CWD, host.root.join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("can make a fifo");
    let _socket = UnixListener::bind(host.root.join("socket")).expect("can make a socket");

    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(outcome.json()["skipped"], 1);
    let words: Vec<_> = outcome
        .logged("entry left out")
        .iter()
        .map(|line| line["path"].clone())
        .collect();
    assert_eq!(words, ["fifo"]);
    assert_eq!(kept_names(&host), ["file"]);
    let again = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(
        (&again.json()["unchanged"], again.stderr.as_str()),
        (&true.into(), "")
    );
}

#[test]
fn the_built_in_patterns_and_the_operators_own_decide() {
    let place = Place::directory();
    let host = Host::new(&place).with("RUNTIME_EXCLUDE", "*.log, /cache/ ,!keep.log,secret");
    let kept = [
        ".openclaw/state/openclaw.sqlite",
        ".openclaw/state/openclaw.sqlite-wal",
        "deep/cache/file",
        "deep/keep.log",
        "file",
        "tmp/file",
    ];
    let left_out = [
        ".openclaw/state/openclaw.sqlite-shm",
        ".openclaw/tmp/file",
        ".openclaw/extensions/a/node_modules/b.js",
        ".openclaw/gateway.pid",
        "a.log",
        "deep/b.log",
        "cache/file",
        "deep/secret",
        "secret/file",
    ];
    for path in kept.iter().chain(&left_out) {
        tree::write(&host.root, path, path);
    }
    let answer = host.json(&["backup"]);
    assert_eq!(answer["skipped"], 0, "what is excluded is not missed");
    assert_eq!(kept_names(&host), kept);

    // A change of what is left out is none of the snapshot.
    tree::write(&host.root, "a.log", "more");
    assert_eq!(host.json(&["backup"])["unchanged"], true);
}

#[test]
fn locks_of_programs_do_not_come_back_and_what_looks_like_them_does() {
    let place = Place::directory();
    let host = Host::new(&place);
    let locks = [
        ".config/chromium/SingletonLock",
        ".openclaw/browser/openclaw/user-data/SingletonSocket",
        ".openclaw/workspace/profile/SingletonCookie",
    ];
    for path in locks {
        tree::write(
            &host.root,
            Path::new(path).with_file_name("Preferences"),
            "{}",
        );
        symlink("oldhost-4242", host.root.join(path)).expect("can make a link");
    }
    for profile in [".mozilla/firefox/p.default", ".openclaw/workspace/fox"] {
        tree::write(&host.root, Path::new(profile).join("prefs.js"), "kept");
        tree::write(&host.root, Path::new(profile).join(".parentlock"), "");
        symlink("127.0.1.1:+4242", host.root.join(profile).join("lock")).expect("can make a link");
    }
    for path in [
        "pg/postmaster.pid",
        ".openclaw/workspace/.git/index.lock",
        ".openclaw/workspace/.git/refs/heads/main.lock",
        ".openclaw/logs/commands.log",
        ".cache/pip/http/a",
    ] {
        tree::write(&host.root, path, "4242");
    }
    let kept = [
        ".cache/ms-playwright/mcp-chrome-profile/Default/Cookies",
        ".config/chromium/Preferences",
        ".mozilla/firefox/p.default/prefs.js",
        ".openclaw/browser/openclaw/user-data/Preferences",
        ".openclaw/workspace/.git/config",
        ".openclaw/workspace/app/node_modules/left-pad/package.json",
        ".openclaw/workspace/app/package.json",
        ".openclaw/workspace/fox/prefs.js",
        ".openclaw/workspace/lock",
        ".openclaw/workspace/mail.sock",
        ".openclaw/workspace/own/lock",
        ".openclaw/workspace/profile/Preferences",
        ".openclaw/workspace/server.pid",
        "app/node_modules/x/y",
        "own/SingletonLock",
        "own/lock/file",
    ];
    for path in kept {
        if path != ".openclaw/workspace/own/lock" {
            tree::write(&host.root, path, path);
        }
    }
    fs::create_dir(host.root.join(".openclaw/workspace/own")).expect("can make a directory");
    symlink("../lock", host.root.join(".openclaw/workspace/own/lock")).expect("can make a link");
    assert_eq!(host.json(&["backup"])["skipped"], 0);
    assert_eq!(kept_names(&host), kept);
}

/// A file of so many bytes of data, one in every `stride` bytes, and one more at `last`.
fn combed_file(path: &Path, runs: u64, stride: u64, last: u64) {
    let file = File::create(path).expect("can make a file");
    for at in (0..runs).map(|run| run * stride).chain([last]) {
        file.write_all_at(b"x", at).expect("can write");
    }
}

/// More runs of data than are told apart in one file.
const MANY_RUNS: u64 = 16_385;

#[test]
fn of_many_holes_the_small_ones_are_read_and_one_of_200_gib_is_not() {
    let place = Place::directory();
    let host = Host::new(&place);
    combed_file(&host.root.join("odd"), MANY_RUNS, 2 * BLOCK, 200 << 30);
    tree::write(&host.root, "other", "content");
    let answer = host.json(&["backup"]);
    assert_eq!(
        (&answer["files"], &answer["skipped"]),
        (&2.into(), &0.into())
    );
    assert_eq!(host.json(&["backup"])["unchanged"], true);

    let target = host.folder.path().join("target");
    let _ = host
        .run(&["restore", "--target", &target.display().to_string()])
        .expect(0);
    let restored = File::open(target.join("odd")).expect("it is back");
    let status = restored.metadata().expect("it is open");
    assert_eq!(status.len(), (200 << 30) + 1);
    assert!(status.blocks() * 512 < 1 << 30, "the large hole is one");
    for at in (0..MANY_RUNS).map(|run| run * 2 * BLOCK).chain([200 << 30]) {
        let mut byte = [0];
        restored.read_exact_at(&mut byte, at).expect("can read");
        assert_eq!(&byte, b"x", "at {at}");
    }
}

#[test]
fn a_file_of_too_many_holes_is_left_out_with_a_word_and_stops_no_backup() {
    let place = Place::directory();
    let host = Host::new(&place);
    // More than a thousand holes of 1 MiB would have to be read as zeros.
    combed_file(&host.root.join("odd"), MANY_RUNS + 1100, 1 << 20, 200 << 30);
    tree::write(&host.root, "other", "content");
    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(outcome.json()["skipped"], 1);
    let words = outcome.logged("entry left out");
    assert_eq!(words.len(), 1);
    assert_eq!(words[0]["path"], "odd");
    assert_eq!(words[0]["reason"], "it has too many holes");
    assert_eq!(kept_names(&host), ["other"]);

    assert_eq!(host.json(&["backup"])["unchanged"], true);
    tree::write(&host.root, "other", "changed");
    assert_eq!(host.json(&["backup"])["unchanged"], false);
}

#[test]
fn a_quiet_run_says_nothing_but_its_result() {
    let place = Place::directory();
    let host = Host::new(&place);
    mknodat(CWD, host.root.join("fifo"), FileType::Fifo, Mode::RUSR, 0).expect("can make a fifo");
    let outcome = host.run(&["backup", "--quiet"]).expect(0);
    assert_eq!(outcome.stderr, "");
    assert!(
        outcome.stdout.ends_with(", 1 left out with a warning\n"),
        "{}",
        outcome.stdout
    );
}

/// A host whose root belongs to nobody, and whose agent works with nobody's rights. `None` where we are not root.
fn nobodys_host(place: &Place) -> Option<Host> {
    if !tree::is_root() {
        return None;
    }
    let host = Host::new(place).with("RUNTIME_GATEWAY_USER", "nobody");
    chown(&host.root, NOBODY, NOBODY);
    Some(host)
}

#[test]
fn where_the_kernel_keeps_the_users_identity_from_root_nothing_is_read_as_root() {
    let place = Place::directory();
    let Some(host) = nobodys_host(&place) else {
        return;
    };
    tree::write(&host.root, "file", "content");
    let agent = host.command(&["backup"]);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-setuid", "--"]);
    let output = around(command, &agent)
        .output()
        .expect("setpriv of util-linux can run");
    assert_eq!(output.status.code(), Some(74));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "backup-agent: cannot do file work as user 65534, group 65534: Operation not permitted (os error 1); \
         root lacks the capabilities SETUID here (docker run --cap-add)\n"
    );
    assert_eq!(place.keys("snapshots"), Vec::<String>::new());
}

#[test]
fn what_the_gateways_user_cannot_read_is_left_out_and_counted() {
    let place = Place::memory();
    let Some(host) = nobodys_host(&place) else {
        return;
    };
    for name in ["own", "open"] {
        tree::write(&host.root, name, name);
    }
    chown(&host.root.join("own"), NOBODY, NOBODY);
    set_mode(&host.root.join("own"), 0o600);
    tree::write(&host.root, "roots-file", "only root may read this");
    set_mode(&host.root.join("roots-file"), 0o600);
    tree::write(
        &host.root,
        "roots-directory/file",
        "only root may read this",
    );
    set_mode(&host.root.join("roots-directory"), 0o700);
    // Traps: a link to what only root can read, and another name of it.
    let secret = host.folder.path().join("secret");
    fs::write(&secret, "only root may read this").expect("can write");
    set_mode(&secret, 0o600);
    symlink(&secret, host.root.join("link")).expect("can make a link");
    fs::hard_link(&secret, host.root.join("name")).expect("can make a hard link");

    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(outcome.json()["skipped"], 3, "{}", outcome.stderr);
    let mut left_out: Vec<_> = outcome
        .logged("entry left out")
        .iter()
        .map(|line| line["path"].to_string())
        .collect();
    left_out.sort_unstable();
    assert_eq!(
        left_out,
        ["\"name\"", "\"roots-directory\"", "\"roots-file\""]
    );
    for (key, bytes) in place.objects() {
        let plain = zstd(&bytes);
        assert!(
            !plain.windows(9).any(|window| window == b"only root"),
            "{key} has what only root may read"
        );
    }

    fs::remove_file(&secret).expect("it is there");
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    let restored = describe(&host.root);
    let names: Vec<_> = restored
        .keys()
        .map(|path| path.display().to_string())
        .collect();
    assert_eq!(names, ["", "link", "open", "own"]);
    assert!(
        restored.values().all(|node| node.owner == (NOBODY, NOBODY)),
        "{restored:#?}"
    );
    assert_eq!(
        restored[Path::new("link")].target.as_deref(),
        Some(secret.as_os_str())
    );
}

/// Unpacked, where it is packed.
fn zstd(bytes: &[u8]) -> Vec<u8> {
    let folder = e2e::agent::folder();
    fs::write(folder.path().join("object"), bytes).expect("can write");
    let output = Command::new("zstd")
        .args(["-dcf"])
        .arg(folder.path().join("object"))
        .output();
    output.expect("zstd is installed").stdout
}

#[test]
fn a_file_swapped_for_a_link_while_it_is_read_gives_nothing_away() {
    let place = Place::memory();
    let Some(host) = nobodys_host(&place) else {
        return;
    };
    // The reader is held up behind the first parts; what comes after in the walk changes meanwhile.
    tree::write(&host.root, "a", tree::noise(1, 40 << 20));
    tree::write(&host.root, "z", "harmless");
    let secret = host.folder.path().join("secret");
    fs::write(&secret, "only root may read this").expect("can write");
    set_mode(&secret, 0o600);
    place.s3().add_fault(Kind::Part, "layers/", 1, Effect::Hold);
    let running = host.start(&["backup", "--json"]);
    place.s3().wait_for(Kind::Part, "layers/");
    fs::remove_file(host.root.join("z")).expect("it is there");
    symlink(&secret, host.root.join("z")).expect("can make a link");
    place.s3().release();

    let answer = running.wait().expect(0).json();
    assert_eq!(
        answer["consistency"], "per-file",
        "the tree changed while it was read"
    );
    let layer = place
        .objects()
        .into_iter()
        .find(|(key, _)| key.starts_with("layers/"))
        .expect("there is one");
    assert!(
        !zstd(&layer.1)
            .windows(9)
            .any(|window| window == b"only root")
    );
}

#[test]
fn a_restored_tree_is_owned_as_it_was_where_the_gateway_is_root_too() {
    if !tree::is_root() {
        return;
    }
    let place = Place::directory();
    let host = Host::new(&place).with("RUNTIME_GATEWAY_USER", "root");
    tree::write(&host.root, "file", "content");
    chown(&host.root.join("file"), 1234, 4321);
    host.backup();
    host.lose_root();
    let _ = host.run(&["restore"]).expect(0);
    let status = fs::metadata(host.root.join("file")).expect("it is back");
    assert_eq!((status.uid(), status.gid()), (1234, 4321));
}

#[test]
fn what_is_taken_over_from_the_old_tree_belongs_to_the_gateways_user() {
    let place = Place::directory();
    let Some(host) = nobodys_host(&place) else {
        return;
    };
    let host = host.booted('a');
    let _ = host.run(&["restore"]).expect(10);
    for name in ["mine", "roots", "changed"] {
        tree::write(&host.root, name, tree::noise(1, 100_000));
        chown(&host.root.join(name), NOBODY, NOBODY);
    }
    host.backup();
    chown(&host.root.join("roots"), 0, 0);
    tree::write(&host.root, "changed", "since");
    let inode = |name: &str| {
        fs::metadata(host.root.join(name))
            .expect("it is there")
            .ino()
    };
    let before = inode("mine");
    // Another runtime took the instance in between, so the tree is not simply kept.
    let other = Host::new(&place).booted('b');
    let _ = other.run(&["restore"]).expect(0);
    let restored = host.json(&["restore"]);
    assert_eq!(restored["unchanged"], false);
    assert_eq!(
        inode("mine"),
        before,
        "it was right and nobody worked on it"
    );
    for name in ["mine", "roots", "changed"] {
        let status = fs::metadata(host.root.join(name)).expect("it is there");
        assert_eq!((status.uid(), status.len()), (NOBODY, 100_000), "{name}");
    }
}

#[test]
fn a_root_on_a_file_system_of_its_own_is_restored_in_place() {
    if !tree::is_root() {
        return;
    }
    let place = Place::memory();
    let host = Host::new(&place);
    tree::make(&host.root);
    let before = tree::kept(describe(&host.root));
    host.backup();
    fs::write(host.root.join("text"), "changed").expect("can write");
    // A bind mount of its own cannot be exchanged; the namespace takes it away again.
    let inner = host.command(&["restore"]);
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "sh",
            "-c",
            "mount --bind \"$1\" \"$1\" && shift && exec \"$@\"",
            "sh",
        ])
        .arg(&host.root);
    let mut command = around(command, &inner);
    let _ = e2e::agent::Running::start(&mut command).wait().expect(0);
    assert_same(&before, &describe(&host.root));
    assert_eq!(host.leftovers(), [""; 0]);
}
