//! What is no reason for a restore to fail: attributes, owners, modes and times that a file system cannot keep or a caller may not
//! give are named, and the rest comes back. And what gives rights comes back right or not at all, whatever the caller's umask.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2e::agent::{Host, Place, Running, folder};
use e2e::mount::{Mount, mount, tmpfs};
use e2e::supervisor::Setup;
use e2e::surroundings::around;
use e2e::tree::{self, assert_same, chown, describe, is_root, set_mode, set_mtime};
use e2e::wait::until_some;
use rustix::fs::{XattrFlags, getxattr, setxattr};
use serde_json::{Value, json};

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Tags of an ACL's entries.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// An ACL as the kernel has it: the owner, user 1234 with all rights, the group, the mask, others.
fn acl(owner: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    let none = u32::MAX;
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, rights, id) in [
        (USER_OBJ, owner, none),
        (USER, 7, 1234),
        (GROUP_OBJ, group, none),
        (MASK, mask, none),
        (OTHER, other, none),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rights.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn set(path: &Path, name: &str, value: &[u8]) {
    setxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|error| panic!("{name} of {}: {error}", path.display()));
}

fn get(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 65_536];
    let length = getxattr(path, name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

fn mode(path: &Path) -> u32 {
    let found = fs::symlink_metadata(path).expect("it is there");
    found.permissions().mode() & 0o7777
}

/// A file system of its own; `None`, with a word about it, where this machine cannot make one.
fn ext4(folder: &Path, name: &str, flags: &[&str], options: &str) -> Option<(Mount, PathBuf)> {
    let (image, at) = (folder.join(format!("{name}.image")), folder.join(name));
    let file = File::create(&image).expect("can make a file");
    file.set_len(32 << 20).expect("it can be sparse");
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-b", "4096"])
        .args(flags)
        .arg(&image)
        .output();
    if !made.as_ref().is_ok_and(|made| made.status.success()) {
        eprintln!("skipped: cannot run mkfs.ext4: {made:?}");
        return None;
    }
    let options = format!("loop{options}");
    let image = image.display().to_string();
    Some((mount(&at, &["-o", &options, &image])?, at))
}

/// A host whose root can keep attributes of any size.
fn roomy(place: &Place) -> Option<(Mount, Host)> {
    let host = Host::new(place);
    let mounted = tmpfs(&host.root, "size=16m")?;
    if setxattr(&host.root, "user.try", b"", XattrFlags::empty()).is_err() {
        eprintln!("skipped: tmpfs keeps no attributes here");
        return None;
    }
    Some((mounted, host))
}

fn lost(answer: &Value) -> (u64, Vec<&str>) {
    let lost = &answer["attributesLost"];
    let paths = lost["paths"].as_array().expect("they are named");
    let paths = paths.iter().map(|path| path.as_str().expect("it is text"));
    (
        lost["count"].as_u64().expect("they are counted"),
        paths.collect(),
    )
}

#[test]
fn attributes_without_room_are_named_and_stay_in_the_history_until_their_file_goes() {
    let place = Place::directory();
    let Some((_source, host)) = roomy(&place) else {
        return;
    };
    let large = vec![b'x'; 20_000];
    tree::write(&host.root, "note", "hello");
    tree::write(&host.root, "gone", "hello");
    tree::write(&host.root, "d/other", "other");
    for path in ["", "note", "gone", "d"] {
        set(&host.root.join(path), "user.small", b"small");
        set(&host.root.join(path), "user.preview", &large);
    }
    let first = host.backup();
    let folder = folder();
    let Some((_disk, at)) = ext4(folder.path(), "disk", &[], "") else {
        return;
    };

    // The root, by exchange and with a state of its own.
    let root = at.join("root");
    let mut other = Host::new(&place).with("RUNTIME_ROOT", root.display().to_string());
    other.root = root.clone();
    let outcome = other.run(&["restore", "--json"]).expect(0);
    let want = (4, vec![".", "d", "gone", "note"]);
    assert_eq!(lost(&outcome.json()), want);
    assert!(
        outcome.stderr.contains("user.preview: No space left"),
        "{}",
        outcome.stderr
    );
    for path in ["", "note", "gone", "d"] {
        let path = root.join(path);
        assert_eq!(get(&path, "user.small").as_deref(), Some(&b"small"[..]));
        assert_eq!(get(&path, "user.preview"), None);
    }
    assert_eq!(
        fs::read(root.join("d/other")).expect("it is back"),
        b"other"
    );

    // It is the snapshot's tree, as far as the disk can have it.
    for arguments in [&["backup"][..], &["backup", "--confirm"], &["backup"]] {
        let answer = other.json(arguments);
        assert_eq!(
            (&answer["unchanged"], &answer["snapshot"]),
            (&json!(true), &json!(first))
        );
    }
    assert_eq!(other.json(&["restore"])["unchanged"], true);

    // A change of the file keeps what the disk had no room for, and another file in its place does not.
    fs::write(root.join("note"), "changed").expect("can write");
    tree::write(&root, "d/new", "new");
    fs::write(root.join("instead"), "another").expect("can write");
    fs::rename(root.join("instead"), root.join("gone")).expect("can rename");
    let second = other.json(&["backup"]);
    assert_eq!(second["unchanged"], false);
    assert_eq!(other.json(&["backup"])["unchanged"], true);
    let target = host.root.join("target");
    let path = target.display().to_string();
    // Of another machine, whose root is elsewhere.
    let answer = Host::new(&place).json(&["restore", "--target", &path]);
    assert_eq!(lost(&answer), (0, Vec::new()));
    for path in ["", "note", "d"] {
        let value = get(&target.join(path), "user.preview");
        assert_eq!(value.as_deref(), Some(&large[..]), "{path:?}");
    }
    assert_eq!(get(&target.join("gone"), "user.preview"), None);
    assert_eq!(
        fs::read(target.join("note")).expect("it is back"),
        b"changed"
    );

    // For people: a line for each.
    let target = at.join("for people").display().to_string();
    let said = other
        .run(&["restore", &first, "--target", &target])
        .expect(0)
        .stdout;
    assert!(
        said.contains("\nnote lacks a part of its status: "),
        "{said}"
    );
}

#[test]
fn very_many_losses_are_counted_and_few_are_named() {
    let place = Place::directory();
    let Some((_source, host)) = roomy(&place) else {
        return;
    };
    for number in 0..200 {
        let name = format!("file-{number}");
        tree::write(&host.root, &name, "");
        set(&host.root.join(name), "user.preview", &[b'x'; 8000]);
    }
    host.backup();
    let folder = folder();
    let Some((_disk, at)) = ext4(folder.path(), "disk", &[], "") else {
        return;
    };
    let target = at.join("target").display().to_string();
    let outcome = host
        .run(&["restore", "--target", &target, "--json"])
        .expect(0);
    let answer = outcome.json();
    let (count, paths) = lost(&answer);
    assert_eq!((count, paths.len()), (200, 16));
    let warnings = outcome
        .stderr
        .lines()
        .filter(|line| line.contains("\"lost\""));
    assert_eq!(warnings.count(), 16);
}

/// A tree with ACLs: of a file, of a directory, and for what will be made in one.
fn make_acls(root: &Path) {
    tree::write(root, "shared", "shared");
    tree::write(root, "d/plain", "plain");
    fs::create_dir(root.join("d/below")).expect("can make a directory");
    tree::write(root, "d/below/mine", "mine");
    set_mode(&root.join("d/plain"), 0o600);
    set_mode(&root.join("d/below"), 0o700);
    set_mode(&root.join("d/below/mine"), 0o640);
    set(&root.join("shared"), ACCESS, &acl(6, 4, 7, 0));
    set(&root.join("d"), ACCESS, &acl(7, 0, 7, 0));
    set(&root.join("d"), DEFAULT, &acl(7, 5, 7, 0));
}

#[test]
fn acls_come_back_and_nothing_gets_one_that_had_none() {
    let users = if is_root() {
        &["0", "54711"][..]
    } else {
        &["0"]
    };
    for user in users {
        let place = Place::directory();
        let host = Host::new(&place).with("RUNTIME_GATEWAY_USER", *user);
        make_acls(&host.root);
        let uid = user.parse().expect("it is a number");
        if is_root() {
            for path in ["", "shared", "d", "d/plain", "d/below", "d/below/mine"] {
                chown(&host.root.join(path), uid, uid);
            }
        }
        let before = describe(&host.root);
        assert_eq!(
            mode(&host.root.join("shared")),
            0o670,
            "the bits of the group are the mask"
        );
        host.backup();
        // Whatever is made in there would get an ACL.
        let parent = host.folder.path().join("parent");
        fs::create_dir(&parent).expect("can make a directory");
        set(&parent, DEFAULT, &acl(7, 7, 7, 7));
        let target = parent.join("target");
        let path = target.display().to_string();
        assert_eq!(
            lost(&host.json(&["restore", "--target", &path])),
            (0, Vec::new())
        );
        assert_same(&before, &describe(&target));
        for (path, name) in [("shared", ACCESS), ("d", ACCESS), ("d", DEFAULT)] {
            let [want, got] = [&host.root, &target].map(|root| get(&root.join(path), name));
            assert!(want.is_some() && want == got, "{name} of {path}");
        }
        for path in ["", "d/plain", "d/below", "d/below/mine"] {
            let path = target.join(path);
            assert_eq!(
                (get(&path, ACCESS), get(&path, DEFAULT)),
                (None, None),
                "{path:?}"
            );
        }
        // An ACL that changes is a change, and one that does not is none.
        assert_eq!(host.json(&["backup"])["unchanged"], true);
        set(&host.root.join("shared"), ACCESS, &acl(6, 4, 6, 0));
        assert_eq!(host.json(&["backup"])["unchanged"], false);
    }
}

#[test]
fn a_root_that_is_a_mount_point_gets_its_own_attributes_and_nothing_else_does() {
    let place = Place::directory();
    let Some((_mount, host)) = roomy(&place) else {
        return;
    };
    make_acls(&host.root);
    set(&host.root, ACCESS, &acl(7, 0, 5, 0));
    set(&host.root, "user.own", b"own");
    let before = describe(&host.root);
    host.backup();
    // What it has now goes, and is nothing that new entries get.
    set(&host.root, ACCESS, &acl(7, 7, 7, 7));
    set(&host.root, DEFAULT, &acl(7, 7, 7, 7));
    set(&host.root, "user.other", b"other");
    fs::write(host.root.join("shared"), "changed").expect("can write");
    assert_eq!(lost(&host.json(&["restore"])), (0, Vec::new()));
    assert_same(&before, &describe(&host.root));
    assert_eq!(get(&host.root, ACCESS), Some(acl(7, 0, 5, 0)));
    let gone = [DEFAULT, "user.other"].map(|name| get(&host.root, name));
    assert_eq!(gone, [None, None]);
    assert_eq!(get(&host.root.join("d/plain"), ACCESS), None);
    assert_eq!(host.json(&["backup"])["unchanged"], true);
}

#[test]
fn an_acl_that_cannot_come_back_gives_nobody_its_rights() {
    let place = Place::directory();
    let host = Host::new(&place);
    make_acls(&host.root);
    host.backup();
    let at = host.folder.path().join("disk");
    let Some(_disk) = mount(&at, &["-t", "ramfs", "ramfs"]) else {
        return;
    };
    let target = at.join("target");
    let path = target.display().to_string();
    let answer = host.json(&["restore", "--target", &path]);
    assert_eq!(lost(&answer), (2, vec!["d", "shared"]));
    assert_eq!(mode(&target.join("shared")), 0o640);
    assert_eq!(mode(&target.join("d")), 0o700);

    // tar has no ACLs of ours either.
    let layer = place.keys("layers/").remove(0);
    let object = &place.objects()[&layer];
    let data = zstd::decode_all(&object[..]).expect("a layer unpacks");
    let member = data
        .windows(6)
        .position(|window| window == b"shared")
        .expect("it is there");
    assert_eq!(&data[member + 100..member + 107], b"0000640");
}

/// `cap_net_bind_service=ep`, in version 2.
const BIND: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn capabilities_and_set_id_bits_come_back_with_their_owner_only() {
    if !is_root() {
        return;
    }
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "program", "program");
    tree::write(&host.root, "other", "other");
    fs::create_dir(host.root.join("sticky")).expect("can make a directory");
    chown(&host.root.join("other"), 1234, 1234);
    set_mode(&host.root.join("program"), 0o755);
    set_mode(&host.root.join("other"), 0o6755);
    set_mode(&host.root.join("sticky"), 0o3777);
    set(&host.root.join("program"), "security.capability", &BIND);
    host.backup();
    let restore = |settings: &[(&str, &str)], before: &[&str], name: &str| {
        let target = host.folder.path().join(name);
        let path = target.display().to_string();
        let inner = host.command(&["restore", "--json", "--target", &path]);
        let mut command = Command::new("setpriv");
        command.args(before);
        let mut command = around(command, &inner);
        command.envs(settings.iter().copied());
        let answer = Running::start(&mut command).wait().expect(0).json();
        let (_, paths) = lost(&answer);
        let paths = paths.join(" ");
        let found = ["program", "other", "sticky"].map(|path| mode(&target.join(path)));
        let capability = get(&target.join("program"), "security.capability");
        let owner = fs::metadata(target.join("other"))
            .expect("it is back")
            .uid();
        (paths, found, capability.as_deref() == Some(&BIND), owner)
    };
    // As root: everything.
    let all = restore(&[], &["--"], "all");
    assert_eq!(all, (String::new(), [0o755, 0o6755, 0o3777], true, 1234));
    // Without the right to give files away.
    let own = restore(&[], &["--bounding-set=-chown", "--"], "kept");
    assert_eq!(own, ("other".to_owned(), [0o755, 0o755, 0o3777], true, 0));
    // For another user: nothing is lent to it.
    let user = [("RUNTIME_GATEWAY_USER", "54712")];
    let (paths, modes, has_capability, owner) = restore(&user, &["--"], "apart");
    assert!(
        paths.contains("program") && paths.contains("other"),
        "{paths}"
    );
    assert_eq!(
        (modes[0], modes[1], has_capability, owner),
        (0o755, 0o755, false, 54712)
    );
}

#[test]
fn times_that_a_disk_cannot_keep_are_named() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "late", "late");
    tree::write(&host.root, "now", "now");
    fs::create_dir(host.root.join("late-directory")).expect("can make a directory");
    symlink("late", host.root.join("late-link")).expect("can link");
    for path in ["late", "late-directory", "late-link"] {
        // In 2049: too late for 32 bits.
        set_mtime(&host.root.join(path), 2_500_000_000, 5);
    }
    host.backup();
    let folder = folder();
    let Some((_disk, at)) = ext4(folder.path(), "disk", &["-I", "128"], "") else {
        return;
    };
    let root = at.join("root");
    let mut other = Host::new(&place).with("RUNTIME_ROOT", root.display().to_string());
    other.root = root.clone();
    let answer = other.json(&["restore"]);
    let (_, paths) = lost(&answer);
    assert_eq!(paths, ["late", "late-directory", "late-link"]);
    assert_eq!(fs::read(root.join("late")).expect("it is back"), b"late");
    assert_eq!(other.json(&["backup"])["unchanged"], true);
}

/// Runs a program with a umask.
fn with_umask(mask: &str, inner: &Command) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "umask \"$1\" && shift && exec \"$@\"", "sh", mask]);
    around(command, inner)
}

/// The modes of everything below a folder.
fn modes(folder: &Path) -> BTreeMap<PathBuf, u32> {
    let tree = describe(folder).into_iter();
    // Names of objects have times and random digits in them.
    let named = tree.map(|(path, node)| {
        let is_object = path
            .extension()
            .is_some_and(|end| end == "json" || end == "zst");
        let path = match path.parent() {
            Some(parent) if is_object => parent.join("an object"),
            _ => path,
        };
        (path, node.mode)
    });
    named.collect()
}

#[test]
fn the_umask_of_the_caller_changes_nothing() {
    let user = if is_root() { "61777" } else { "0" };
    let mut seen = Vec::new();
    for mask in ["0000", "0022", "0077", "0177", "0777"] {
        let place = Place::directory();
        let mut host = Host::new(&place).with("RUNTIME_GATEWAY_USER", user);
        tree::write(&host.root, "a/b/file", "content");
        set_mode(&host.root.join("a/b/file"), 0o664);
        set_mode(&host.root.join("a/b"), 0o2775);
        symlink("file", host.root.join("a/b/link")).expect("can link");
        if is_root() {
            for path in ["", "a", "a/b", "a/b/file"] {
                chown(&host.root.join(path), 61777, 61777);
            }
            lchown(host.root.join("a/b/link"), Some(61777), Some(61777)).expect("root can");
            set_mode(&host.root.join("a/b"), 0o2775);
        }
        let before = describe(&host.root);
        let run = |host: &Host, arguments: &[&str]| {
            let _ = Running::start(&mut with_umask(mask, &host.command(arguments)))
                .wait()
                .expect(0);
        };
        run(&host, &["backup"]);
        let new = host.folder.path().join("new/parents");
        let target = new.join("target");
        run(
            &host,
            &["restore", "--target", &target.display().to_string()],
        );
        // Over what is there, and where nothing is.
        fs::write(host.root.join("a/b/file"), "changed").expect("can write");
        run(&host, &["restore", "--yes"]);
        assert_same(&before, &describe(&host.root));
        host.root = new.join("root/of-its-own");
        host.set("RUNTIME_ROOT", host.root.display().to_string());
        run(&host, &["restore", "--yes"]);
        for tree in [&target, &host.root] {
            assert_same(&before, &describe(tree));
        }
        let Place::Directory(store) = &place else {
            unreachable!("it is one");
        };
        let made = [store.path(), &host.state, &host.folder.path().join("new")].map(modes);
        seen.push((mask, made));
    }
    for (mask, made) in &seen[1..] {
        assert_eq!(made, &seen[0].1, "umask {mask}");
    }
    let [store, state, new] = &seen[0].1;
    assert_eq!(
        store[Path::new("store/the-instance/layers/an object")],
        0o600
    );
    assert_eq!(state[Path::new("")], 0o700);
    assert_eq!(new[Path::new("parents")], 0o755);
}

#[test]
fn the_gateway_has_the_umask_that_the_supervisor_was_started_with() {
    for mask in ["0022", "0027", "0077"] {
        let setup = Setup::new();
        let said = setup.fake().join("umask");
        let script = format!(
            "umask >'{0}.new'; mv '{0}.new' '{0}'; sleep 300",
            said.display()
        );
        let setup = setup.command(&["/bin/sh", "-c", &script]);
        // What it says has to be readable here.
        let program = setup.program();
        let mut command = with_umask(mask, &program);
        command.stdout(Stdio::null());
        let mut supervisor = setup.start_as(command);
        let text = until_some("the umask of the gateway", || {
            fs::read_to_string(&said).ok()
        });
        assert_eq!(text.trim(), mask);
        assert_eq!(mode(&supervisor.setup.root()), 0o700);
        let _ = supervisor.stop();
    }
}
