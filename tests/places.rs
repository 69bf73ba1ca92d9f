//! The folders of the settings: none inside of another, none in other hands, no link followed that somebody else made; the lock
//! of the state, and a state that is full; and what a gateway's start could not do.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;
use std::process::Command;

use e2e::agent::{Host, Place};
use e2e::mount::{mount, tmpfs};
use e2e::supervisor::{Setup, is_root};
use e2e::tree::{self, assert_same, describe};
use e2e::wait::until;
use rustix::process::Signal;
use serde_json::Value;

/// A user of no machine: the gateway's, and another one.
const GATEWAY: u32 = 61_234;
const SOMEBODY: u32 = 61_235;

/// Whatever a run may destroy.
const VERBS: [&[&str]; 6] = [
    &["check"],
    &["backup"],
    &["restore", "--yes"],
    &["restore", "--dry-run"],
    &["list"],
    &["prune"],
];

/// Of these, those that write to the root or beside it.
const ON_THE_ROOT: [&[&str]; 3] = [&["check"], &["restore", "--yes"], &["prune"]];

/// A host with a snapshot, its state and its store in its own folder.
fn host() -> Host {
    let place = Place::directory();
    let host = Host::new(&place);
    let store = format!("file://{}", host.folder.path().join("store").display());
    let host = host.with("RUNTIME_STORE", store);
    tree::write(&host.root, "file", "content");
    tree::write(&host.root, "folder/file", "content");
    host.backup();
    host
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Every verb refuses it, says so, and touches nothing.
fn assert_refused(host: &Host, part: &str) {
    assert_refused_by(&VERBS, host, part);
}

fn assert_refused_by(verbs: &[&[&str]], host: &Host, part: &str) {
    let before = describe(host.folder.path());
    for arguments in verbs {
        let outcome = host.run(arguments).expect(64);
        assert!(
            outcome.sentence().contains(part),
            "{arguments:?}: {}",
            outcome.stderr
        );
        let json = host.run(&[*arguments, &["--json"]].concat()).expect(64);
        assert_eq!(json.json()["code"], "usage");
    }
    assert_same(&before, &describe(host.folder.path()));
}

#[test]
fn root_state_and_store_are_never_inside_of_one_another() {
    let inside = "is inside of the folder of RUNTIME_ROOT";
    let around = "has inside of it the folder of RUNTIME_ROOT";
    let same = "is the folder of RUNTIME_ROOT";
    for (name, value, part) in [
        ("RUNTIME_STORE", "file://FOLDER/root/store", inside),
        ("RUNTIME_STORE", "file://FOLDER/root/a/b/store", inside),
        ("RUNTIME_STORE", "file://FOLDER/link/store", inside),
        ("RUNTIME_STORE", "file://FOLDER/deep/store", inside),
        ("RUNTIME_STORE", "file://FOLDER/to-root", same),
        ("RUNTIME_STORE", "file://FOLDER", around),
        ("RUNTIME_STATE", "FOLDER/root/state", inside),
        ("RUNTIME_STATE", "FOLDER/link/state", inside),
        ("RUNTIME_STATE", "FOLDER/root", same),
        ("RUNTIME_STATE", "FOLDER", around),
        ("RUNTIME_ROOT", "FOLDER/store/root", "RUNTIME_STORE"),
        ("RUNTIME_ROOT", "FOLDER/state/root", "RUNTIME_STATE"),
        ("RUNTIME_ROOT", "FOLDER", "RUNTIME_STATE"),
    ] {
        let mut host = host();
        let folder = shown(host.folder.path());
        for (link, target) in [
            ("link", "root"),
            ("to-root", &shown(&host.root)),
            ("deep", "link/folder"),
        ] {
            symlink(target, host.folder.path().join(link)).expect("can link");
        }
        host.set(name, value.replace("FOLDER", &folder));
        assert_refused(&host, part);
    }
}

#[test]
fn a_folder_with_two_names_is_found_out_by_its_number() {
    let mut host = host();
    let other = host.folder.path().join("other-name");
    let Some(_mount) = mount(&other, &["--bind", &shown(&host.root)]) else {
        return;
    };
    host.set(
        "RUNTIME_STORE",
        format!("file://{}", shown(&other.join("store"))),
    );
    let outcome = host.run(&["restore", "--yes"]).expect(64);
    assert!(
        outcome
            .sentence()
            .contains("is inside of the folder of RUNTIME_ROOT"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_target_is_apart_from_everything() {
    let host = host();
    let folder = host.folder.path();
    symlink("root", folder.join("link")).expect("can link");
    symlink("nowhere", folder.join("dangling")).expect("can link");
    tree::write(folder, "plain", "a file");
    fs::create_dir(folder.join("empty")).expect("can make a folder");
    fs::create_dir(folder.join("in-use")).expect("can make a folder");
    tree::write(folder, "in-use/file", "a file");
    for (link, target) in [
        ("to-empty", "empty"),
        ("to-in-use", "in-use"),
        ("to-file", "plain"),
    ] {
        symlink(target, folder.join(link)).expect("can link");
    }
    let before = describe(folder);
    for (target, part) in [
        ("root", "is the folder of RUNTIME_ROOT"),
        ("link", "is the folder of RUNTIME_ROOT"),
        ("root/new", "is inside of the folder of RUNTIME_ROOT"),
        ("link/new", "is inside of the folder of RUNTIME_ROOT"),
        (
            "empty/../root/new",
            "is inside of the folder of RUNTIME_ROOT",
        ),
        ("state/new", "is inside of the folder of RUNTIME_STATE"),
        ("store/new", "is inside of the folder of RUNTIME_STORE"),
        (".", "has inside of it the folder of RUNTIME_ROOT"),
        ("dangling", "leads nowhere"),
        ("plain", "is not a directory"),
        ("to-file", "is not a directory"),
        ("none/../empty", "is not there"),
        (".root.restoring", "working folders"),
    ] {
        let target = shown(&folder.join(target));
        let outcome = host.run(&["restore", "--target", &target]).expect(64);
        assert!(
            outcome.sentence().contains(part),
            "{target}: {}",
            outcome.stderr
        );
    }
    assert_same(&before, &describe(folder));
    let target = shown(&folder.join("to-in-use"));
    let outcome = host.run(&["restore", "--target", &target]).expect(64);
    assert!(outcome.sentence().contains("is not empty"), "{outcome:?}");
    // Followed, and still a link.
    let target = shown(&folder.join("to-empty"));
    let _ = host.run(&["restore", "--target", &target]).expect(0);
    assert!(folder.join("to-empty").is_symlink());
    assert_eq!(
        fs::read(folder.join("empty/file")).expect("it is there"),
        b"content"
    );
    // Relative to where a person is.
    let outcome = Command::new(e2e::binaries::binary("backup-agent"))
        .args(["restore", "--target", "../new"])
        .env_clear()
        .envs(
            host.command(&["list"])
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .current_dir(folder.join("in-use"))
        .output()
        .expect("it runs");
    assert!(outcome.status.success(), "{outcome:?}");
    assert!(folder.join("new/file").is_file());
}

#[test]
fn an_import_reads_nothing_that_a_restore_would_replace() {
    let host = host();
    for (from, part) in [
        ("root/old", "is inside of the folder of RUNTIME_ROOT"),
        ("root", "is the folder of RUNTIME_ROOT"),
        ("state/import", "is inside of the folder of RUNTIME_STATE"),
    ] {
        let from = format!("file://{}", shown(&host.folder.path().join(from)));
        let import = ["import", "--from", &from, "--instance", "another"];
        let outcome = host.run(&import).expect(64);
        assert!(outcome.sentence().contains(part), "{}", outcome.stderr);
    }
}

#[test]
fn a_root_that_is_a_link_is_followed_and_stays_one() {
    let mut host = host();
    let link = host.folder.path().join("link");
    symlink("root", &link).expect("can link");
    host.set("RUNTIME_ROOT", shown(&link));
    let first = host.backup();
    let before = describe(&host.root);
    tree::write(&host.root, "file", "changed");
    host.backup();
    let _ = host.run(&["restore", &first, "--yes"]).expect(0);
    assert!(link.is_symlink());
    assert_same(&before, &describe(&host.root));
    let names = fs::read_dir(host.folder.path()).expect("it stays");
    let is_left = |name: &std::ffi::OsStr| name.to_string_lossy().ends_with(".restoring");
    assert!(!names.flatten().any(|entry| is_left(&entry.file_name())));
    fs::remove_file(&link).expect("it is there");
    symlink("none", &link).expect("can link");
    assert_refused_by(&ON_THE_ROOT, &host, "is a symbolic link that leads nowhere");
    host.set("RUNTIME_ROOT", shown(&host.root.join("file")));
    assert_refused_by(&ON_THE_ROOT, &host, "is not a directory");
    // To look at what there is takes no root.
    let _ = host.run(&["list"]).expect(0);
    assert_eq!(
        host.run(&["backup", "--json"]).expect(74).json()["code"],
        "root_lost"
    );
}

#[test]
fn a_link_that_another_user_made_is_not_followed() {
    if !is_root() {
        return;
    }
    for (name, prefix, target) in [
        ("RUNTIME_ROOT", "", "root"),
        ("RUNTIME_STATE", "", "state"),
        ("RUNTIME_STORE", "file://", "store"),
    ] {
        let mut host = host();
        let link = host.folder.path().join("link");
        symlink(target, &link).expect("can link");
        std::os::unix::fs::lchown(&link, Some(SOMEBODY), None).expect("we are root");
        host.set(name, format!("{prefix}{}", shown(&link)));
        let part = format!("is a symbolic link that user {SOMEBODY} made");
        if name == "RUNTIME_ROOT" {
            assert_refused_by(&ON_THE_ROOT, &host, &part);
            // It is not the directory that was there.
            let refused = host.run(&["backup", "--json"]).expect(74);
            assert_eq!(refused.json()["code"], "root_lost");
        } else {
            assert_refused(&host, &part);
        }
    }
}

#[test]
fn a_state_or_store_in_other_hands_is_refused() {
    if !is_root() {
        return;
    }
    for name in ["state", "store"] {
        for (mode, owner, part) in [
            (0o722, 0, "other users may write into"),
            (0o720, 0, "other users may write into"),
            (0o702, 0, "other users may write into"),
            (0o700, SOMEBODY, "belongs to user 61235"),
            (0o700, GATEWAY, "belongs to user 61234"),
        ] {
            let host = host();
            let path = host.folder.path().join(name);
            fs::set_permissions(&path, Permissions::from_mode(mode)).expect("it is ours");
            chown(&path, Some(owner), None).expect("we are root");
            assert_refused(&host, part);
        }
    }
    // As a fresh tmpfs is: others may add to it, and what they add is not taken for ours.
    let fresh = host();
    for name in ["state", "store"] {
        let path = fresh.folder.path().join(name);
        fs::set_permissions(&path, Permissions::from_mode(0o1777)).expect("it is ours");
    }
    fresh.backup();
    for name in ["lock", "state.json", "index"] {
        let host = host();
        let path = host.state.join(name);
        let _ = fs::remove_file(&path);
        fs::write(&path, "{}").expect("can write");
        chown(&path, Some(SOMEBODY), None).expect("we are root");
        tree::write(&host.root, "file", "changed");
        let sentence = host.run(&["backup"]).expect(74).sentence();
        assert!(sentence.contains(&shown(&path)), "{sentence}");
        assert!(sentence.contains("another user made it"), "{sentence}");
    }
    // Below the store's folder, the instance's own.
    let host = host();
    let instance = host.folder.path().join("store").join(e2e::agent::INSTANCE);
    chown(&instance, Some(SOMEBODY), None).expect("we are root");
    assert_refused(&host, "belongs to user 61235");
}

#[test]
fn the_gateways_user_cannot_put_something_else_in_the_place_of_state_or_store() {
    if !is_root() {
        return;
    }
    let part = "so put something else in its place";
    for (mode, owner, is_bad) in [
        (0o755, 0, false),
        (0o1777, 0, false),
        (0o755, SOMEBODY, false),
        (0o777, 0, true),
        (0o755, GATEWAY, true),
        (0o1755, GATEWAY, true),
    ] {
        let mut host = host();
        fs::set_permissions(host.folder.path(), Permissions::from_mode(mode)).expect("it is ours");
        chown(host.folder.path(), Some(owner), None).expect("we are root");
        // As one user there is nobody to fear.
        let _ = host.run(&["check"]).expect(0);
        host.set("RUNTIME_GATEWAY_USER", GATEWAY.to_string());
        if is_bad {
            assert_refused(&host, part);
        } else {
            let _ = host.run(&["check"]).expect(0);
        }
    }
}

/// What is planted in a state folder that was open once, and is in order now.
#[test]
fn no_file_of_the_state_is_followed_out_of_it() {
    let host = host();
    let victim = host.folder.path().join("victim");
    fs::write(&victim, "somebody's own").expect("can write");
    fs::set_permissions(&victim, Permissions::from_mode(0o600)).expect("it is ours");
    for name in ["state.json.new", "index.new", "scratch.new"] {
        for is_hard in [false, true] {
            let path = host.state.join(name);
            let _ = fs::remove_file(&path);
            if is_hard {
                fs::hard_link(&victim, &path).expect("can link");
            } else {
                symlink(&victim, &path).expect("can link");
            }
            tree::write(&host.root, "file", format!("{name} {is_hard}"));
            host.backup();
        }
    }
    for name in ["lock", "state.json", "index", "index.part"] {
        // A run that finds such a file has lost what it remembered.
        let host = self::host();
        let path = host.state.join(name);
        let _ = fs::remove_file(&path);
        symlink(&victim, &path).expect("can link");
        tree::write(&host.root, "file", name);
        let outcome = host.run(&["backup"]);
        if outcome.code != Some(0) {
            let outcome = outcome.expect(74);
            let sentence = outcome.sentence();
            assert!(sentence.contains(&shown(&path)), "{sentence}");
            assert!(
                sentence.contains("a symbolic link is never followed here"),
                "{sentence}"
            );
        }
    }
    let status = fs::metadata(&victim).expect("it is there");
    assert_eq!(fs::read(&victim).expect("it is there"), b"somebody's own");
    assert_eq!(status.mode() & 0o777, 0o600);
}

/// Holds the lock of a state as something else does that writes nothing into it.
fn hold(host: &Host) -> File {
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(host.state.join("lock"))
        .expect("can open the lock");
    lock.lock().expect("nobody holds it");
    lock
}

#[test]
fn a_run_that_waits_for_the_lock_says_who_holds_it() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    host.backup();
    place
        .s3()
        .add_fault(e2e::s3::Kind::Get, "head.json", 1, e2e::s3::Effect::Stall);
    place.s3().take_requests();
    let first = host.start(&["restore", "--timeout", "1m"]);
    place.s3().wait_for(e2e::s3::Kind::Get, "head.json");
    let who = format!("is held by pid {}, restore, since 2", first.pid());
    let second = host.run(&["backup", "--timeout", "2500ms"]).expect(124);
    let logged = second.logged("waiting for the lock of the state folder");
    assert_eq!(logged.len(), 1, "{}", second.stderr);
    let holder = logged[0]["holder"].as_str().expect("it is named");
    assert!(holder.contains(&who), "{holder}");
    assert!(holder.contains(&shown(&host.state)), "{holder}");
    let sentence = second.sentence();
    assert!(sentence.contains(&who), "{sentence}");
    assert!(
        sentence.contains("wait for that run to end, or end it"),
        "{sentence}"
    );
    first.signal(Signal::TERM);
    let _ = first.wait().expect(143);
    // Nobody holds it now, and the file says so.
    assert_eq!(fs::read(host.state.join("lock")).expect("it is there"), b"");
    host.backup();
}

#[test]
fn what_a_lock_says_is_shown_and_never_believed() {
    let place = Place::directory();
    let host = Host::new(&place);
    fs::create_dir(&host.state).expect("can make a folder");
    for (content, shown) in [
        (Vec::new(), "is held by another run:".to_owned()),
        (
            b"\x1b[31mpid\n\0 1; {}\xff".to_vec(),
            "is held by 31mpid 1 :".to_owned(),
        ),
        (
            vec![b'x'; 1 << 20],
            format!("is held by {}:", "x".repeat(100)),
        ),
    ] {
        let lock = hold(&host);
        fs::write(host.state.join("lock"), content).expect("can write");
        let outcome = host.run(&["backup", "--timeout", "300ms"]).expect(124);
        let sentence = outcome.sentence();
        assert!(sentence.contains(&shown), "{sentence}");
        drop(lock);
    }
}

#[test]
fn a_full_state_names_its_folder_and_the_remedy_wherever_it_happens() {
    let place = Place::directory();
    let host = Host::new(&place);
    for number in 0..200 {
        tree::write(
            &host.root,
            format!("file-{number}"),
            tree::noise(number, 100),
        );
    }
    let mut codes = Vec::new();
    // From no room for a name to room for everything but the last page.
    for pages in 1..40 {
        let Some(_disk) = tmpfs(&host.state, &format!("size={}k,mode=700", 4 * pages)) else {
            return;
        };
        let outcome = host.run(&["backup"]);
        if outcome.code == Some(0) {
            codes.push(0);
            break;
        }
        let outcome = outcome.expect(74);
        let sentence = outcome.sentence();
        codes.push(74);
        let is_named = sentence.contains(&shown(&host.state)) || sentence.contains("RUNTIME_STATE");
        assert!(is_named, "{pages} pages: {sentence}");
        assert!(
            sentence.contains("make room on that file system"),
            "{sentence}"
        );
    }
    assert_eq!(codes.first(), Some(&74), "one page is not enough");
    assert_eq!(codes.last(), Some(&0), "a few pages are: {codes:?}");
    // No room for a name.
    let Some(_disk) = tmpfs(&host.state, "size=1m,nr_inodes=1,mode=700") else {
        return;
    };
    let sentence = host.run(&["backup"]).expect(74).sentence();
    assert!(
        sentence.contains(&shown(&host.state.join("lock"))),
        "{sentence}"
    );
    assert!(
        sentence.contains("make room on that file system"),
        "{sentence}"
    );
}

#[test]
fn a_gateway_lives_where_the_link_of_its_root_leads() {
    let place = Place::directory();
    let setup = Setup::new().on(&place);
    let real = setup.folder.path().join("real");
    fs::create_dir(&real).expect("can make a folder");
    let link = setup.folder.path().join("link");
    symlink("real", &link).expect("can link");
    let owner = if is_root() {
        GATEWAY
    } else {
        nix::unistd::geteuid().as_raw()
    };
    let setup = setup
        .with("RUNTIME_ROOT", &shown(&link))
        .with("RUNTIME_GATEWAY_USER", &owner.to_string());
    let supervisor = setup.start();
    supervisor.until_running(1);
    assert_eq!(fs::metadata(&real).expect("it is there").uid(), owner);
    assert_ne!(
        fs::symlink_metadata(&link).expect("it is there").uid(),
        GATEWAY
    );
    fs::write(real.join("file"), "content").expect("can write");
    let answer = supervisor.post("/v1/backup");
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(link.is_symlink());
}

/// The log line of a start that failed.
fn failed_start(setup: Setup) -> Value {
    let mut supervisor = setup.start();
    let find = |log: &str| {
        let mut lines = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.find(|line| line["msg"] == "cannot start the program")
    };
    until("a start that fails", || find(&supervisor.log()).is_some());
    let line = find(&supervisor.log()).expect("it was just there");
    let last = supervisor.status()["gateway"]["lastExit"]["code"].clone();
    let is_missing = line["reason"]
        .as_str()
        .is_some_and(|reason| reason.contains("os error 2)"));
    let is_program = line["setting"].is_null();
    assert_eq!(
        last,
        if is_missing && is_program { 127 } else { 126 },
        "{line}"
    );
    supervisor.stop();
    line
}

#[test]
fn what_a_start_of_the_gateway_could_not_do_is_named_with_its_setting() {
    if !is_root() {
        return;
    }
    let gateway = GATEWAY.to_string();
    let apart = || Setup::new().with("RUNTIME_GATEWAY_USER", &gateway);
    // More than any kernel lets a process have.
    let line = failed_start(apart().with("RUNTIME_GATEWAY_LIMITS", "nproc=64,nofile=999999999999"));
    assert_eq!(line["setting"], "RUNTIME_GATEWAY_LIMITS");
    assert_eq!(line["failed"], "set the limit nofile=999999999999");

    let setup = apart();
    let root = setup.root();
    fs::create_dir(&root).expect("can make the root");
    chown(&root, Some(SOMEBODY), Some(SOMEBODY)).expect("we are root");
    fs::set_permissions(&root, Permissions::from_mode(0o700)).expect("we are root");
    let line = failed_start(setup);
    assert_eq!(line["setting"], "RUNTIME_ROOT");
    assert_eq!(
        line["failed"],
        format!("enter {} as {gateway}", shown(&root))
    );

    let line = failed_start(apart().command(&["/no/such/program"]));
    assert_eq!(line["setting"], Value::Null);
    assert_eq!(line["failed"], "execute /no/such/program");
    let line = failed_start(apart().command(&["/etc"]));
    assert_eq!(line["failed"], "execute /etc");
}

#[test]
fn a_supervisor_without_the_right_to_change_users_names_the_user() {
    if !is_root() {
        return;
    }
    let setup = Setup::new().with("RUNTIME_GATEWAY_USER", &GATEWAY.to_string());
    let program = setup.program_below(&[
        "setpriv",
        "--bounding-set",
        "-setgid",
        "--inh-caps",
        "-setgid",
    ]);
    let supervisor = setup.start_as(program);
    until("a start that fails", || {
        supervisor.log().contains("cannot start the program")
    });
    let log = supervisor.log();
    assert!(
        log.contains("\"setting\":\"RUNTIME_GATEWAY_USER\""),
        "{log}"
    );
}
