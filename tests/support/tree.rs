//! Trees of every kind of entry, and a comparison that misses nothing: type, mode, owner, time, size, content, holes,
//! link targets, groups of hard links, attributes.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, digest};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

/// One block of every file system that tests meet; holes are counted in these.
pub const BLOCK: u64 = 4096;

/// What is known about one entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: &'static str,
    pub mode: u32,
    pub owner: (u32, u32),
    /// Nanoseconds since 1970.
    pub mtime: i128,
    pub size: u64,
    /// Of the data, one run after the other.
    pub sha256: String,
    /// Where the data are, as offset and length.
    pub data: Vec<(u64, u64)>,
    pub target: Option<OsString>,
    /// The first path of the same file, where it has several.
    pub same_as: Option<PathBuf>,
    pub attributes: BTreeMap<OsString, Vec<u8>>,
}

/// Every entry below a directory and the directory itself, under its empty path.
pub type Tree = BTreeMap<PathBuf, Node>;

/// Whether tests run with root's rights.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Describes a tree.
pub fn describe(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut first_names = HashMap::new();
    let mut waiting = vec![PathBuf::new()];
    // Sorted by path, so that the first name of a file is the same in every tree.
    while let Some(path) = waiting.pop() {
        let full = if path.as_os_str().is_empty() {
            root.to_owned()
        } else {
            root.join(&path)
        };
        let status = fs::symlink_metadata(&full)
            .unwrap_or_else(|error| panic!("{}: {error}", full.display()));
        if status.is_dir() {
            let mut names: Vec<OsString> = fs::read_dir(&full)
                .unwrap_or_else(|error| panic!("{}: {error}", full.display()))
                .map(|entry| entry.expect("the directory stays").file_name())
                .collect();
            names.sort_unstable_by(|a, b| b.cmp(a));
            waiting.extend(names.into_iter().map(|name| path.join(name)));
        }
        let mut node = node(&full, &status);
        if !status.is_dir() && status.nlink() > 1 {
            let first = first_names
                .entry((status.dev(), status.ino()))
                .or_insert_with(|| path.clone());
            node.same_as = Some(first.clone());
        }
        tree.insert(path, node);
    }
    tree
}

fn node(path: &Path, status: &fs::Metadata) -> Node {
    let kind = status.file_type();
    let kind = match () {
        () if kind.is_file() => "file",
        () if kind.is_dir() => "directory",
        () if kind.is_symlink() => "link",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () => "device",
    };
    let is_plain = matches!(kind, "file" | "directory");
    let data = if kind == "file" {
        data(path, status.size())
    } else {
        Vec::new()
    };
    Node {
        kind,
        mode: status.mode() & 0o7777,
        owner: (status.uid(), status.gid()),
        mtime: i128::from(status.mtime()) * 1_000_000_000 + i128::from(status.mtime_nsec()),
        size: if kind == "file" { status.size() } else { 0 },
        sha256: if kind == "file" {
            sha256(path, &data)
        } else {
            String::new()
        },
        data,
        target: (kind == "link").then(|| {
            fs::read_link(path)
                .expect("a link has a target")
                .into_os_string()
        }),
        same_as: None,
        attributes: if is_plain {
            attributes(path)
        } else {
            BTreeMap::new()
        },
    }
}

/// Of the data, holes left out: reading a hole of a terabyte takes minutes.
fn sha256(path: &Path, data: &[(u64, u64)]) -> String {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut sum = ring::digest::Context::new(&SHA256);
    for &(offset, length) in data {
        let mut bytes = vec![0; usize::try_from(length).expect("it fits into memory")];
        file.read_exact_at(&mut bytes, offset)
            .expect("a file can be read");
        sum.update(&bytes);
    }
    hex(sum.finish().as_ref())
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)]))
        .collect()
}

/// The sha256 of bytes in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

/// Where a file's data are.
fn data(path: &Path, size: u64) -> Vec<(u64, u64)> {
    use rustix::fs::{SeekFrom, seek};

    let file = File::open(path).expect("it was read a moment ago");
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(start) = seek(&file, SeekFrom::Data(at)) else {
            break;
        };
        let end = seek(&file, SeekFrom::Hole(start))
            .expect("behind data there is a hole")
            .min(size);
        found.push((start, end - start));
        at = end;
    }
    found
}

fn attributes(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut names = vec![0_u8; 65_536];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => panic!("{}: {error}", path.display()),
    };
    let mut found = BTreeMap::new();
    for name in names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| name.starts_with(b"user."))
    {
        let mut value = vec![0_u8; 65_536];
        let length =
            rustix::fs::lgetxattr(path, name, &mut value[..]).expect("it was listed a moment ago");
        value.truncate(length);
        found.insert(OsStr::from_bytes(name).to_owned(), value);
    }
    found
}

/// Compares two trees.
pub fn assert_same(want: &Tree, got: &Tree) {
    let differences = differences(want, got);
    assert!(
        differences.is_empty(),
        "the trees differ in {} places:\n{}",
        differences.len(),
        differences.join("\n")
    );
}

/// One line for each difference.
pub fn differences(want: &Tree, got: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, want) in want {
        let Some(got) = got.get(path) else {
            lines.push(format!("missing: {}", path.display()));
            continue;
        };
        let mut compare = |what: &str, want: &dyn std::fmt::Debug, got: &dyn std::fmt::Debug| {
            let (want, got) = (format!("{want:?}"), format!("{got:?}"));
            if want != got {
                lines.push(format!(
                    "{what} of {}: want {want}, got {got}",
                    path.display()
                ));
            }
        };
        compare("type", &want.kind, &got.kind);
        compare(
            "mode",
            &format_args!("{:o}", want.mode),
            &format_args!("{:o}", got.mode),
        );
        compare("owner", &want.owner, &got.owner);
        compare("mtime", &want.mtime, &got.mtime);
        compare("size", &want.size, &got.size);
        compare("content", &want.sha256, &got.sha256);
        compare("data segments", &want.data, &got.data);
        compare("link target", &want.target, &got.target);
        compare("hard links", &want.same_as, &got.same_as);
        compare("attributes", &want.attributes, &got.attributes);
    }
    for path in got.keys().filter(|path| !want.contains_key(*path)) {
        lines.push(format!("too much: {}", path.display()));
    }
    lines
}

/// What a snapshot keeps of a tree: neither fifos nor sockets.
pub fn kept(mut tree: Tree) -> Tree {
    tree.retain(|_, node| !matches!(node.kind, "fifo" | "socket"));
    tree
}

/// Writes a file, and the directories above it.
pub fn write(root: &Path, path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().expect("the path has a parent"))
        .expect("can make directories");
    fs::write(path, content).expect("can write a file");
}

/// Bytes that compression cannot shrink, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64*: short, and noise enough for zstd.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Makes a tree with every kind of entry that a file system has.
pub fn make(root: &Path) {
    fs::create_dir_all(root).expect("can make the root");
    make_names(root);
    make_sparse(&root.join("sparse"));
    make_links(&root.join("links"));
    make_attributes(&root.join("attributes"));
    make_specials(&root.join("specials"));
    if is_root() {
        make_owners(&root.join("owners"));
    }
    // Last: what is made below would change the times of directories.
    make_times(&root.join("times"));
    make_modes(&root.join("modes"));
    fs::set_permissions(root, fs::Permissions::from_mode(0o750)).expect("can set a mode");
    set_mtime(root, 1_234_567_890, 987_654_321);
}

fn make_names(root: &Path) {
    write(root, "empty", b"");
    write(root, "text", b"some text\n");
    // More than one part of an upload, and more than one frame of an archive.
    write(root, "large", noise(1, 9 << 20));
    for directory in ["empty-directory", "empty-tree/below/it"] {
        fs::create_dir_all(root.join(directory)).expect("can make directories");
    }
    let names: [&[u8]; 12] = [
        b"\xff\xfe\x80",
        b"caf\xe9.txt",
        b"new\nline",
        b"tab\tbell\x07escape\x1b[31m",
        b" leading and trailing ",
        b"-rf",
        b"*?[a]{b}\\",
        b"\"quotes' $(x) `y`",
        b".wh.not-a-deletion",
        b".hidden",
        b"...",
        "ümläut-日本語".as_bytes(),
    ];
    for name in names {
        write(root, Path::new("names").join(OsStr::from_bytes(name)), name);
        let below = Path::new("name-directories").join(OsStr::from_bytes(name));
        write(root, below.join(OsStr::from_bytes(name)), name);
    }
    for length in [99, 100, 101, 155, 254, 255] {
        write(
            root,
            Path::new("lengths").join("n".repeat(length)),
            length.to_string(),
        );
        fs::create_dir_all(root.join("lengths/directories").join("d".repeat(length)))
            .expect("can make directories");
    }
    // Paths around the limits of the ustar header: 100 bytes, and 155 + 1 + 100.
    for depth in [3, 9, 10, 25, 60] {
        let mut path = PathBuf::from("deep");
        path.extend(std::iter::repeat_n("ten-bytes", depth));
        write(root, path.join(format!("file-{depth}")), depth.to_string());
    }
    // Sorting by bytes of the whole path and by components are not the same.
    for path in ["order/a/z", "order/a-/z", "order/a.b", "order/a0"] {
        write(root, path, path);
    }
}

fn make_sparse(root: &Path) {
    fs::create_dir_all(root).expect("can make directories");
    let make = |name: &str, size: u64, runs: &[(u64, usize)]| {
        let mut file = File::create(root.join(name)).expect("can make a file");
        for &(offset, length) in runs {
            file.seek(SeekFrom::Start(offset)).expect("can seek");
            file.write_all(&noise(offset + 1, length))
                .expect("can write");
        }
        file.set_len(size).expect("can set a length");
    };
    make("only-a-hole", 1 << 20, &[]);
    make("hole-at-start", 1 << 20, &[((1 << 20) - 8192, 8192)]);
    make(
        "hole-in-middle",
        1 << 20,
        &[(0, 4096), ((1 << 20) - 4096, 4096)],
    );
    make("hole-at-end", 1 << 20, &[(0, 4096)]);
    make("odd-sizes", 1_000_003, &[(40_960, 100), (200_000, 12_345)]);
    make("huge", 1 << 40, &[(1 << 39, 10)]);
    let many: Vec<(u64, usize)> = (0..300).map(|at| (at * 16_384, 4096)).collect();
    make("many-holes", 300 * 16_384, &many);
    make(&"s".repeat(255), 1 << 20, &[(65_536, 1)]);
}

fn make_links(root: &Path) {
    use std::os::unix::fs::symlink;

    write(root, "target", b"the target\n");
    fs::create_dir_all(root.join("directory")).expect("can make directories");
    let links: [(&str, &[u8]); 8] = [
        ("relative", b"target"),
        ("to-a-directory", b"directory"),
        ("dangling", b"nowhere/at/all"),
        ("absolute", b"/etc/hostname"),
        ("above", b"../../../outside"),
        ("itself", b"itself"),
        ("strange", b"\xff\n\x1b"),
        ("in-place-of-its-own-directory/link", b"."),
    ];
    for (name, target) in links {
        let link = root.join(name);
        fs::create_dir_all(link.parent().expect("it has one")).expect("can make directories");
        symlink(OsStr::from_bytes(target), link).expect("can make a link");
    }
    for length in [99, 100, 101, 300, 4000] {
        symlink("t".repeat(length), root.join(format!("target-of-{length}")))
            .expect("can make a link");
    }
    write(root, "hard/a", b"one file, three names");
    fs::create_dir_all(root.join("hard/later")).expect("can make directories");
    for other in ["hard/b", "hard/later/c"] {
        fs::hard_link(root.join("hard/a"), root.join(other)).expect("can make a hard link");
    }
    let long = Path::new("hard").join("l".repeat(200));
    write(root, &long, b"a long name of a hard link");
    fs::hard_link(root.join(&long), root.join("hard/m")).expect("can make a hard link");
}

fn make_attributes(root: &Path) {
    write(root, "file", b"with attributes");
    fs::create_dir_all(root.join("directory")).expect("can make directories");
    let binary: Vec<u8> = (0..=255).collect();
    let pairs: [(&str, &[u8]); 6] = [
        ("user.text", b"value"),
        ("user.empty", b""),
        ("user.binary", &binary),
        ("user.newline", b"a\nb=c\n"),
        ("user.with=equals", b"1"),
        ("user.with%percent", b"2"),
    ];
    for name in ["file", "directory"] {
        for (key, value) in pairs {
            set_attribute(&root.join(name), key, value);
        }
    }
    write(root, "large", b"");
    set_attribute(&root.join("large"), "user.large", &noise(7, 3000));
}

/// Gives an attribute, where the file system has them.
fn set_attribute(path: &Path, key: &str, value: &[u8]) {
    match rustix::fs::setxattr(path, key, value, XattrFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOTSUP) => {}
        Err(error) => panic!("{key} on {}: {error}", path.display()),
    }
}

fn make_specials(root: &Path) {
    fs::create_dir_all(root).expect("can make directories");
    rustix::fs::mknodat(
        CWD,
        root.join("fifo"),
        FileType::Fifo,
        Mode::RUSR | Mode::WUSR,
        0,
    )
    .expect("can make a fifo");
    // The name of a socket is short, so it is bound from inside of a short path and moved.
    let short =
        tempfile::tempdir_in(root.parent().expect("it has one")).expect("can make a directory");
    let path = short.path().join("s");
    drop(UnixListener::bind(&path).expect("can make a socket"));
    fs::rename(path, root.join("socket")).expect("can move it");
}

fn make_owners(root: &Path) {
    for (name, uid, gid) in [
        ("nobody", 65_534, 65_534),
        ("mixed", 1000, 0),
        ("large", 3_000_000, 4_000_000_000),
    ] {
        write(root, name, name);
        chown(&root.join(name), uid, gid);
        fs::create_dir(root.join(format!("{name}-directory"))).expect("can make a directory");
        chown(&root.join(format!("{name}-directory")), uid, gid);
    }
    std::os::unix::fs::symlink("nobody", root.join("link")).expect("can make a link");
    std::os::unix::fs::lchown(root.join("link"), Some(1234), Some(4321)).expect("root can");
}

/// Gives a file away.
pub fn chown(path: &Path, uid: u32, gid: u32) {
    std::os::unix::fs::chown(path, Some(uid), Some(gid)).expect("root can");
}

fn make_times(root: &Path) {
    fs::create_dir_all(root).expect("can make directories");
    let times = [
        ("nanoseconds", 1_700_000_000, 123_456_789),
        ("one-nanosecond", 1_700_000_000, 1),
        ("epoch", 0, 0),
        ("before-1970", -1_000_000, 250_000_000),
        ("just-before-1970", -1, 999_999_999),
        ("after-2038", 2_500_000_000, 5),
    ];
    for (name, seconds, nanos) in times {
        write(root, name, name);
        set_mtime(&root.join(name), seconds, nanos);
        fs::create_dir(root.join(format!("{name}-directory"))).expect("can make a directory");
        write(
            root,
            Path::new(&format!("{name}-directory")).join("inside"),
            b"",
        );
        set_mtime(&root.join(format!("{name}-directory")), seconds, nanos);
        let link = root.join(format!("{name}-link"));
        std::os::unix::fs::symlink(name, &link).expect("can make a link");
        set_mtime(&link, seconds, nanos);
    }
}

/// Sets the time of an entry itself, links too.
pub fn set_mtime(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).expect("can set a time");
}

fn make_modes(root: &Path) {
    let readable = if is_root() { 0 } else { 0o400 };
    for mode in [
        0o000, 0o400, 0o444, 0o600, 0o644, 0o755, 0o777, 0o1644, 0o2755, 0o4755, 0o6711, 0o7777,
    ] {
        let name = format!("file-{mode:04o}");
        write(root, &name, &name);
        set_mode(&root.join(name), mode | readable);
    }
    let searchable = if is_root() { 0 } else { 0o500 };
    for mode in [0o000, 0o500, 0o555, 0o700, 0o755, 0o1777, 0o2755, 0o3770] {
        let name = format!("directory-{mode:04o}");
        write(root, Path::new(&name).join("inside"), b"inside");
        set_mode(&root.join(name), mode | searchable);
    }
}

/// Sets a mode, special bits too.
pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("can set a mode");
}

/// A path of bytes.
pub fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes.to_vec()))
}
