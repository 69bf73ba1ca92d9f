//! The commands in docs/snapshot-format.md that bring a snapshot back without this tool, as the page has them: by root, on trees
//! that try to lead it elsewhere, in several shells.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use e2e::agent::{Host, INSTANCE, Place, folder};
use e2e::seeds::{Choices, rounds};
use e2e::tree::{self, Tree, assert_same, describe};

/// Each with its arguments before the script's file.
const SHELLS: [&[&str]; 3] = [&["dash"], &["bash"], &["busybox", "sh"]];

/// Names that a careless script takes for something else.
fn odd_names() -> Vec<OsString> {
    let mut names: Vec<Vec<u8>> = [
        &b"new\nline"[..],
        b"-rf",
        b"--",
        b"'quote",
        b"\"quotes' $(x) `y`",
        b"*?[a]{b}",
        b"back\\slash\\n",
        b"end\\",
        b" spaces ",
        b"tab\tbell\x07escape\x1b",
        b"\x01\x7f",
        b"\xff\xfe",
        b"caf\xe9",
        b"~",
        b"!x",
        b"#c",
        b"=",
        b"(",
        b"...",
        b".wh.",
        b".wh.own",
        b".wh..wh.own",
        b".wh..wh..opq",
        b"plain",
        "\u{fc}ml\u{e4}ut".as_bytes(),
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    names.extend([99, 101, 251, 252, 255].map(|length| vec![b'n'; length]));
    names.into_iter().map(OsString::from_vec).collect()
}

/// What the page says.
fn script() -> &'static str {
    let page = include_str!("../docs/snapshot-format.md");
    let script = page.split("<!-- tar and zstd alone -->\n```sh\n").nth(1);
    let script = script.and_then(|rest| rest.split("\n```").next());
    script.expect("the page has the commands")
}

/// A store in a folder, a host, and files outside of every tree that links may lead to.
struct Case {
    place: Place,
    host: Host,
    outside: PathBuf,
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let place = Place::directory();
        let host = Host::new(&place);
        let folder = folder();
        let outside = folder.path().join("outside");
        for name in odd_names() {
            tree::write(&outside, &name, "precious");
        }
        Self {
            place,
            host,
            outside,
            folder,
        }
    }

    fn instance(&self) -> PathBuf {
        let Place::Directory(store) = &self.place else {
            unreachable!("it is one");
        };
        store.path().join("store").join(INSTANCE)
    }

    /// Runs the page's commands into a fresh directory.
    fn run(&self, shell: &[&str], target: &Path) -> Output {
        let file = self.folder.path().join("script");
        fs::write(&file, script()).expect("can write");
        fs::create_dir(target).expect("can make a directory");
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).arg(file);
        command
            .current_dir(self.instance())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("TARGET", target)
            .output()
            .unwrap_or_else(|error| panic!("{shell:?}: {error}"))
    }

    /// The page's commands bring back what the agent does, and touch nothing else.
    fn check(&self, shell: &[&str]) {
        let (want, got) = (
            self.folder.path().join("want"),
            self.folder.path().join("got"),
        );
        let before = describe(&self.outside);
        let path = want.display().to_string();
        let _ = self.host.run(&["restore", "--target", &path]).expect(0);
        let done = self.run(shell, &got);
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{shell:?}: {said}");
        assert_same(
            &without_times(describe(&want)),
            &without_times(describe(&got)),
        );
        assert_same(&before, &describe(&self.outside));
        for tree in [want, got] {
            fs::remove_dir_all(tree).expect("it is there");
        }
    }
}

/// A file that is written anew changes the time of its directory.
fn without_times(tree: Tree) -> Tree {
    let plain = tree.into_iter().map(|(path, mut node)| {
        if node.kind == "directory" {
            node.mtime = 0;
        }
        (path, node)
    });
    plain.collect()
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path).expect("it is there"),
        Ok(_) => fs::remove_file(path).expect("it is there"),
        Err(_) => {}
    }
}

#[test]
fn every_kind_of_entry_comes_back_in_every_shell() {
    let case = Case::new();
    tree::make(&case.host.root);
    case.host.backup();
    tree::write(&case.host.root, "text", "other text\n");
    remove(&case.host.root.join("name-directories"));
    tree::write(&case.host.root, "name-directories", "a file now");
    remove(&case.host.root.join("empty"));
    fs::create_dir(case.host.root.join("empty")).expect("it is gone");
    remove(&case.host.root.join("names/..."));
    case.host.backup();
    tree::write(&case.host.root, "names/...", "back");
    case.host.backup();
    for shell in SHELLS {
        case.check(shell);
    }
}

#[test]
fn odd_names_are_deleted_and_kept_in_every_shell() {
    let case = Case::new();
    let root = &case.host.root;
    // Large enough that the second layer takes nothing over.
    tree::write(root, "bulk", tree::noise(1, 1 << 20));
    for name in odd_names() {
        tree::write(root, Path::new("gone").join(&name), "");
        tree::write(root, Path::new("kept").join(&name), "");
        tree::write(root, Path::new("gone-below").join(&name).join(&name), "");
        tree::write(root, Path::new("kept-below").join(&name).join(&name), "");
    }
    tree::write(root, "both/own", "");
    case.host.backup();
    for name in odd_names() {
        remove(&root.join("gone").join(&name));
        remove(&root.join("gone-below").join(&name));
    }
    // The whiteout of one has the name of the other.
    remove(&root.join("both/own"));
    tree::write(root, "both/.wh.own", "a file");
    case.host.backup();
    assert_eq!(case.place.keys("layers").len(), 2);
    for shell in SHELLS {
        case.check(shell);
    }
}

#[test]
fn no_link_of_the_tree_is_followed_in_any_shell() {
    let case = Case::new();
    let root = &case.host.root;
    tree::write(root, "bulk", tree::noise(1, 1 << 20));
    let link = |name: &str| symlink(&case.outside, root.join(name)).expect("can link");
    link("to-directory");
    link("to-file");
    symlink(case.outside.join("plain"), root.join("over-file")).expect("can link");
    for directory in ["to-link", "deep/to-link"] {
        tree::write(root, Path::new(directory).join("plain"), "own");
        tree::write(root, Path::new(directory).join(".wh.own"), "own");
    }
    case.host.backup();
    for name in ["to-directory", "to-file", "over-file"] {
        remove(&root.join(name));
    }
    // A directory with the names of what is outside, and a file that looks like the whiteout of one.
    for name in odd_names() {
        tree::write(root, Path::new("to-directory").join(name), "own");
    }
    tree::write(root, "to-directory/.wh.plain", "");
    tree::write(root, "to-file", "own");
    tree::write(root, "over-file", "own");
    for directory in ["to-link", "deep/to-link"] {
        remove(&root.join(directory));
        link(directory);
    }
    case.host.backup();
    // Deletions behind the link stay in the newest layer when this one is taken over.
    tree::write(root, "small", "small");
    case.host.backup();
    for shell in SHELLS {
        case.check(shell);
    }
}

#[test]
fn what_is_missing_or_damaged_fails_in_every_shell() {
    type Damage = fn(&Path);
    let layer = |instance: &Path| {
        let mut layers = fs::read_dir(instance.join("layers")).expect("it is there");
        layers
            .next()
            .expect("there is one")
            .expect("it stays")
            .path()
    };
    let cases: [(&str, Damage); 7] = [
        ("the head", |instance| remove(&instance.join("head.json"))),
        ("a head without a snapshot", |instance| {
            fs::write(instance.join("head.json"), "{\"snapshot\":null}\n").expect("can write");
        }),
        ("the records", |instance| {
            remove(&instance.join("snapshots"));
        }),
        ("a layer", |instance| {
            remove(&instance.join("layers"));
            fs::create_dir(instance.join("layers")).expect("can make a directory");
        }),
        ("the end of a layer", |instance| {
            for layer in fs::read_dir(instance.join("layers")).expect("it is there") {
                let path = layer.expect("it stays").path();
                let size = fs::metadata(&path).expect("it is there").size();
                let file = fs::File::options().write(true).open(path);
                let cut = file.and_then(|file| file.set_len(size / 2));
                cut.expect("can cut");
            }
        }),
        ("a byte", |instance| flip(instance, 1000)),
        ("a byte of the index", |instance| {
            // The footer is the last 72 bytes, and the index is before it.
            flip(instance, -100);
        }),
    ];
    for (what, damage) in cases {
        for shell in SHELLS {
            let case = Case::new();
            tree::write(&case.host.root, "file", tree::noise(1, 1 << 16));
            case.host.backup();
            assert!(layer(&case.instance()).is_file());
            damage(&case.instance());
            let done = case.run(shell, &case.folder.path().join("target"));
            assert!(!done.status.success(), "{shell:?} without {what}: {done:?}");
        }
    }
}

/// Changes one byte of the only layer; a place below zero counts from its end.
fn flip(instance: &Path, at: i64) {
    let mut layers = fs::read_dir(instance.join("layers")).expect("it is there");
    let path = layers
        .next()
        .expect("there is one")
        .expect("it stays")
        .path();
    let mut bytes = fs::read(&path).expect("can read");
    let length = i64::try_from(bytes.len()).expect("it is small");
    let at = usize::try_from(at.rem_euclid(length)).expect("it is inside");
    bytes[at] ^= 0x40;
    fs::write(path, bytes).expect("can write");
}

#[test]
fn a_directory_that_has_something_is_no_target_in_any_shell() {
    let case = Case::new();
    case.host.backup();
    for (number, shell) in SHELLS.into_iter().enumerate() {
        let target = case.folder.path().join(format!("target-{number}"));
        assert!(case.run(shell, &target).status.success());
        // Again, over what is there now.
        tree::write(&target, "file", "");
        let away = case.folder.path().join(format!("away-{number}"));
        fs::rename(&target, &away).expect("it is there");
        symlink(&away, &target).expect("can link");
        let done = Command::new(shell[0])
            .args(&shell[1..])
            .arg(case.folder.path().join("script"))
            .current_dir(case.instance())
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("TARGET", &target)
            .output()
            .expect("there is a shell");
        assert!(!done.status.success(), "{shell:?}");
        assert!(away.join("file").exists());
    }
}

/// The root after many small changes, some of them of the kind of an entry that has others below it.
fn change(root: &Path, outside: &Path, choices: &mut Choices) {
    let names = odd_names();
    let mut path = root.to_owned();
    for _ in 0..=choices.below(3) {
        path.push(choices.one_of(&names));
    }
    let above = path.parent().expect("it is below the root");
    if fs::create_dir_all(above).is_err() {
        // A file or a link is in the way.
        return;
    }
    let real = |path: &Path| path.canonicalize().expect("it is there");
    let inside = above.strip_prefix(root).expect("it is below the root");
    if real(above) != real(root).join(inside) {
        // A link leads there.
        return;
    }
    match choices.below(7) {
        0 | 1 => {
            remove(&path);
            let size = usize::try_from(choices.below(3000)).expect("it is small");
            fs::write(&path, tree::noise(choices.number(), size)).expect("can write");
        }
        2 => {
            remove(&path);
            let target: &OsStr = match choices.below(3) {
                0 => outside.as_os_str(),
                1 => OsStr::new("."),
                _ => OsStr::new("../plain"),
            };
            symlink(target, &path).expect("can link");
        }
        3 => {
            let _ = fs::create_dir(&path);
        }
        4 => {
            let other = root.join(choices.one_of(&names));
            if fs::symlink_metadata(&other).is_ok_and(|found| found.is_file()) && other != path {
                remove(&path);
                let _ = fs::hard_link(other, &path);
            }
        }
        _ => remove(&path),
    }
}

#[test]
fn any_history_comes_back_in_any_shell() {
    rounds("alone any_history", 12, 2, |choices| {
        let case = Case::new();
        tree::write(&case.host.root, "bulk", tree::noise(1, 1 << 18));
        for _ in 0..5 {
            for _ in 0..=choices.below(60) {
                change(&case.host.root, &case.outside, choices);
            }
            case.host.backup();
        }
        let shell: &&[&str] = choices.one_of(&SHELLS);
        case.check(shell);
    });
}
