//! What the times of files cannot tell: shared mappings, times of whole seconds, clocks that are behind, and writes that the
//! kernel ends later. Whatever a file's times say, the next snapshot has its content.

use std::fs::{self, File, FileTimes};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use e2e::agent::{Host, Place, Running};
use e2e::mount::{Mount, mount, tmpfs};
use e2e::supervisor::is_root;
use e2e::tree;
use e2e::wait::until;
use serde_json::Value;

/// Longest pause of the tests: long enough for a busy machine.
const PAUSE: &str = "20s";

/// What the process of a [`Gateway`] does, by orders on its standard input. It says `done` after each.
const ORDERS: &str = r#"
import ctypes, mmap, os, platform, select, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
EXIT, IO_SETUP, IO_GETEVENTS, IO_SUBMIT = (60, 206, 208, 209) if platform.machine() == "x86_64" else (93, 0, 4, 2)
maps, files, ring, memory = {}, {}, ctypes.c_ulong(0), []
def check(answer):
    if answer < 0: sys.exit(os.strerror(ctypes.get_errno()))
def run():
    for line in sys.stdin:
        order, *rest = line.split()
        if order == "map":
            name, path = rest
            file = os.open(path, os.O_RDWR)
            maps[name] = mmap.mmap(file, 0)
            os.close(file)
            maps[name][0]  # The page is there: on tmpfs no write to it sets a time.
        elif order == "write":
            name, text = rest
            maps[name][0:len(text)] = text.encode()
        elif order == "unmap":
            maps.pop(rest[0]).close()
        elif order == "fork":
            if os.fork(): os._exit(0)
        elif order == "leave":
            # Its first thread ends, and another one goes on.
            threading.Thread(target=run).start()
            print("done", flush=True)
            libc.syscall(EXIT, 0)
        elif order == "count":
            # What is mapped has what the file has, or one more, at any instant.
            name, path = rest
            file, number = os.open(path, os.O_WRONLY), 0
            print("done", flush=True)
            while not select.select([sys.stdin], [], [], 0)[0]:
                number += 1
                maps[name][0:10] = b"%010d" % number
                os.pwrite(file, b"%010d" % number, 0)
            continue
        elif order == "direct":
            # Writes a page past the cache, and does not wait for its end.
            path, text, descriptor = rest
            file = os.open(path, os.O_RDWR | os.O_DIRECT)
            page = mmap.mmap(-1, 4096)
            page[:] = (text * 4096)[:4096].encode()
            memory.append(page)
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            check(libc.syscall(IO_SETUP, 8, ctypes.byref(ring)))
            block = ctypes.create_string_buffer(struct.pack("<QIIHhIQQqQII", 0, 0, 0, 1, 0, file, address, 4096, 0, 0, 0, 0))
            blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
            memory.append((block, blocks))
            check(libc.syscall(IO_SUBMIT, ring, 1, blocks))
            if descriptor == "closed": os.close(file)
        elif order == "landed":
            events = ctypes.create_string_buffer(32)
            check(libc.syscall(IO_GETEVENTS, ring, 1, 1, events, None))
        elif order == "open":
            name, path = rest
            files[name] = os.open(path, os.O_RDWR | os.O_DIRECT)
        print("done", flush=True)
run()
"#;

/// A process of the gateway's user.
struct Gateway {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Gateway {
    fn start(user: u32) -> Self {
        let mut child = Command::new("python3")
            // Where every user may run it.
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .args(["-c", ORDERS])
            .uid(user)
            .gid(user)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is there for every user");
        let orders = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("it is piped"));
        Self {
            child,
            orders,
            answers,
        }
    }

    fn does(&mut self, order: &str) {
        self.send(order);
        self.answer(order);
    }

    fn send(&mut self, order: &str) {
        let orders = self.orders.as_mut().expect("it has not ended");
        writeln!(orders, "{order}").expect("it takes orders");
    }

    fn answer(&mut self, order: &str) {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        assert_eq!(line, "done\n", "{order}");
    }

    /// Ends it, with all processes that it has forked.
    fn end(mut self) {
        self.orders = None;
        let mut rest = String::new();
        while self.answers.read_line(&mut rest).expect("it ends") > 0 {}
        let _ = self.child.wait();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.orders = None;
        let _ = self.child.wait();
    }
}

/// A file system of its own with a root on it, which belongs to the gateway's user.
struct Disk {
    host: Host,
    user: u32,
    image: PathBuf,
    at: PathBuf,
    mounted: Option<Mount>,
}

const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F"];
/// Its inodes have no room for nanoseconds.
const SECONDS: &[&str] = &["mkfs.ext4", "-q", "-F", "-I", "128"];
/// Its times are of two seconds, and it has no owners.
const FAT: &[&str] = &["mkfs.vfat"];

impl Disk {
    /// Made by this command; of memory, if that is empty. `None`, with a word about it, where this machine cannot.
    fn new(place: &Place, user: u32, make: &[&str]) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let mut host = Host::new(place).with("RUNTIME_GATEWAY_USER", user.to_string());
        let folder = host.folder.path();
        let (image, at) = (folder.join("image"), folder.join("disk"));
        if let [program, arguments @ ..] = make {
            let file = File::create(&image).expect("can make a file");
            file.set_len(64 << 20).expect("it can be sparse");
            let run = Command::new(program).args(arguments).arg(&image).output();
            if !run.as_ref().is_ok_and(|run| run.status.success()) {
                eprintln!("skipped: cannot run {make:?}: {run:?}");
                return None;
            }
        }
        host.root = at.join("root");
        host.set("RUNTIME_ROOT", host.root.display().to_string());
        let mut disk = Self {
            host,
            user,
            image,
            at,
            mounted: None,
        };
        disk.mounted = Some(if make.is_empty() {
            tmpfs(&disk.at, "size=64m")?
        } else {
            disk.mount(make == FAT)?
        });
        fs::create_dir(&disk.host.root).expect("can make the root");
        if make != FAT {
            chown(&disk.host.root, Some(user), Some(user)).expect("root can give it away");
        }
        Some(disk)
    }

    fn mount(&self, has_no_owners: bool) -> Option<Mount> {
        let owner = format!("loop,uid={0},gid={0}", self.user);
        let options = if has_no_owners { &owner } else { "loop" };
        let image = self.image.to_str().expect("it is UTF-8");
        mount(&self.at, &["-o", options, image])
    }

    fn path(&self, name: &str) -> String {
        let path = self.host.root.join(name);
        path.to_str().expect("it is UTF-8").to_owned()
    }

    /// Writes a file of the gateway's user.
    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        tree::write(&self.host.root, name, content);
        // Where files have no owners, they are that user's already.
        let _ = chown(self.path(name), Some(self.user), Some(self.user));
    }

    /// Takes a snapshot while the gateway works.
    fn backup(&self) -> Value {
        self.host.json(&["backup"])
    }

    /// Takes a snapshot while the gateway is held.
    fn backup_held(&self) -> Value {
        let user = self.user.to_string();
        let held = ["backup", "--freeze-user", &user, "--max-pause", PAUSE];
        self.host.json(&held)
    }

    /// What a snapshot has of a file.
    fn saved(&self, answer: &Value, name: &str) -> String {
        saved(&self.host, answer, name)
    }
}

fn saved(host: &Host, answer: &Value, name: &str) -> String {
    let snapshot = answer["snapshot"].as_str().expect("it has an id");
    let target = host.folder.path().join("target");
    let path = target.to_str().expect("it is UTF-8");
    let _ = host.json(&["restore", snapshot, "--target", path]);
    let content = fs::read_to_string(target.join(name)).expect("the snapshot has it");
    fs::remove_dir_all(target).expect("it is ours");
    content.trim_end_matches('\0').to_owned()
}

/// A page, which begins with a text.
fn page(text: &str) -> Vec<u8> {
    let mut page = text.as_bytes().to_vec();
    page.resize(4096, 0);
    page
}

/// A test for every kind of disk.
macro_rules! on_disks {
    ($($test:ident($user:literal)),* $(,)?) => {
        mod on_ext4 {
            $(#[test] fn $test() { super::$test($user, super::EXT4); })*
        }
        mod on_tmpfs {
            $(#[test] fn $test() { super::$test($user + 1, &[]); })*
        }
    };
}

on_disks!(
    what_is_written_through_a_mapping_is_in_the_next_snapshot(54_600),
    what_was_mapped_at_the_snapshot_before_is_in_the_next_one(54_610),
    a_child_that_keeps_a_mapping_is_seen(54_620),
    a_process_whose_first_thread_has_ended_is_seen(54_625),
    a_mapping_is_seen_whichever_name_it_was_made_by(54_630),
    a_mapping_that_nobody_writes_to_costs_one_snapshot(54_640),
    a_mapping_that_is_written_while_the_gateway_is_held_is_of_the_instant(54_650),
    a_restore_is_not_up_to_date_over_what_a_mapping_has_changed(54_660),
);

fn what_is_written_through_a_mapping_is_in_the_next_snapshot(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    disk.write("mapped", page("one"));
    // On tmpfs, nothing but the mapping itself tells that it was written to since.
    let mut taken = vec![("one", disk.backup())];
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("mapped")));
    for text in ["two", "ten", "six"] {
        gateway.does(&format!("write it {text}"));
        taken.push((text, disk.backup()));
    }
    for text in ["new", "old"] {
        gateway.does(&format!("write it {text}"));
        let answer = disk.backup_held();
        assert_eq!(answer["consistency"], "instant", "{answer}");
        taken.push((text, answer));
    }
    for (text, answer) in &taken {
        assert_eq!(disk.saved(answer, "mapped"), *text, "{answer}");
    }
}

fn what_was_mapped_at_the_snapshot_before_is_in_the_next_one(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    for name in ["unmapped", "ended"] {
        disk.write(name, page("one"));
    }
    let mut gateway = Gateway::start(user);
    for name in ["unmapped", "ended"] {
        gateway.does(&format!("map {name} {}", disk.path(name)));
        gateway.does(&format!("write {name} two"));
    }
    disk.backup();
    // The second time round, the look that finds nothing must not forget what it saw.
    for text in ["two", "six"] {
        for name in ["unmapped", "ended"] {
            gateway.does(&format!("write {name} {text}"));
        }
        let answer = disk.backup();
        assert_eq!(answer["unchanged"], text == "two", "{answer}");
    }
    gateway.does("write unmapped ten");
    gateway.does("write ended ten");
    gateway.does("unmap unmapped");
    gateway.end();
    let answer = disk.backup();
    for name in ["unmapped", "ended"] {
        assert_eq!(disk.saved(&answer, name), "ten", "{name} in {answer}");
    }
    assert_eq!(disk.backup()["unchanged"], true);
}

fn a_child_that_keeps_a_mapping_is_seen(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    disk.write("mapped", page("one"));
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("mapped")));
    gateway.does("write it two");
    disk.backup();
    gateway.does("fork");
    for text in ["six", "ten"] {
        gateway.does(&format!("write it {text}"));
        let answer = disk.backup();
        assert_eq!(disk.saved(&answer, "mapped"), text, "{answer}");
    }
}

fn a_process_whose_first_thread_has_ended_is_seen(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    disk.write("mapped", page("one"));
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("mapped")));
    gateway.does("write it two");
    gateway.does("leave");
    let state = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", gateway.child.id()));
        stat.expect("it has not ended").contains(") Z ")
    };
    until("its first thread has ended", state);
    disk.backup();
    for text in ["six", "ten"] {
        gateway.does(&format!("write it {text}"));
        let answer = disk.backup();
        assert_eq!(disk.saved(&answer, "mapped"), text, "{answer}");
    }
}

fn a_mapping_is_seen_whichever_name_it_was_made_by(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    disk.write("b", page("one"));
    // One name comes before it in a walk, and two after it; one is gone when the file is written to.
    for name in ["a", "c", "d"] {
        fs::hard_link(disk.path("b"), disk.path(name)).expect("can make a link");
    }
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("c")));
    gateway.does("write it two");
    fs::remove_file(disk.path("c")).expect("it is there");
    disk.backup();
    gateway.does("write it six");
    let answer = disk.backup();
    for name in ["a", "b", "d"] {
        assert_eq!(disk.saved(&answer, name), "six", "{name} in {answer}");
    }
    // Its name in the mapping is of another file now.
    disk.write("c", page("new"));
    disk.backup();
    gateway.does("write it ten");
    let answer = disk.backup();
    assert_eq!(disk.saved(&answer, "d"), "ten", "{answer}");
    assert_eq!(disk.saved(&answer, "c"), "new", "{answer}");
}

fn a_mapping_that_nobody_writes_to_costs_one_snapshot(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    disk.write("mapped", page("one"));
    disk.write("other", "other");
    assert_eq!(disk.backup_held()["consistency"], "instant");
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("mapped")));
    let objects = place.objects();
    for answer in [disk.backup(), disk.backup_held(), disk.backup()] {
        assert_eq!(
            (&answer["unchanged"], &answer["consistency"]),
            (&true.into(), &"instant".into()),
            "{answer}"
        );
    }
    assert!(place.objects() == objects, "nothing is uploaded");
    // The rest of the tree is of an instant, too, when something else changes.
    disk.write("other", "changed");
    let answer = disk.backup_held();
    assert_eq!(answer["consistency"], "instant", "{answer}");
    assert_eq!(disk.backup_held()["unchanged"], true);
}

fn a_mapping_that_is_written_while_the_gateway_is_held_is_of_the_instant(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    // Many pages lie between the two in the order of the walk.
    for name in ["a", "z"] {
        disk.write(name, page("0000000000"));
    }
    for number in 0..40 {
        disk.write(&format!("m/{number}"), page("other"));
    }
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("a")));
    gateway.does(&format!("count it {}", disk.path("z")));
    let taken: Vec<Value> = (0..4).map(|_| disk.backup_held()).collect();
    gateway.does("write it 9999999999");
    let mut last = 0;
    for answer in taken {
        assert_eq!(answer["consistency"], "instant", "{answer}");
        let [mapped, written] = ["a", "z"].map(|name| -> u64 {
            let text = disk.saved(&answer, name);
            text.parse().expect("it is a number")
        });
        assert!(
            written == mapped || written + 1 == mapped,
            "{mapped} and {written} in {answer}"
        );
        assert!(mapped > last, "{answer} has a page of long ago");
        last = mapped;
    }
}

fn a_restore_is_not_up_to_date_over_what_a_mapping_has_changed(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    disk.write("mapped", page("one"));
    disk.backup();
    let mut gateway = Gateway::start(user);
    gateway.does(&format!("map it {}", disk.path("mapped")));
    gateway.does("write it two");
    let answer = disk.host.json(&["restore", "--yes"]);
    assert_eq!(answer["unchanged"], false, "{answer}");
    let content = fs::read(disk.path("mapped")).expect("it is restored");
    assert!(content == page("one"));
}

/// Sets the modification time back to what it was.
fn write_in_secret(path: &str, content: &[u8]) {
    let file = File::options().write(true).open(path).expect("it is there");
    let before = file.metadata().expect("it is open");
    file.write_all_at(content, 0).expect("can write");
    let times = FileTimes::new()
        .set_modified(before.modified().expect("it has one"))
        .set_accessed(before.accessed().expect("it has one"));
    file.set_times(times).expect("can set times");
}

fn ctime(path: &str) -> (i64, i64) {
    let status = fs::metadata(path).expect("it is there");
    (status.ctime(), status.ctime_nsec())
}

/// Changes a file's content, and neither size nor any time; whether that came in time.
fn change_unseen(path: &str, content: &[u8]) -> bool {
    let before = ctime(path);
    write_in_secret(path, content);
    ctime(path) == before
}

/// Waits until a unit of the file system's times has just begun.
fn begin_of_unit(seconds: i64) {
    let now = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).expect("it is known");
    let begun = now().tv_sec() / seconds;
    until("the next unit begins", || now().tv_sec() / seconds > begun);
}

/// How a snapshot is taken in a test of times.
type Backup = fn(&Disk) -> Value;

/// A change that no time tells, directly after `backup`, has to be in the next snapshot, and is not taken for restored.
fn keeps_what_changed_within_the_unit(user: u32, make: &[&str], unit: i64, backup: Backup) {
    const TRIES: u32 = 10;
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, make) else {
        return;
    };
    let mut hits = 0;
    for number in 0..TRIES {
        begin_of_unit(unit);
        disk.write("file", format!("A{number:06}"));
        let first = backup(&disk);
        let changed = format!("B{number:06}");
        if !change_unseen(&disk.path("file"), changed.as_bytes()) {
            continue;
        }
        hits += 1;
        if hits == 1 {
            // By hand, a tree that was changed is brought back.
            let answer = disk.host.json(&["restore"]);
            assert_eq!(answer["unchanged"], false, "{answer}");
            let content = fs::read_to_string(disk.path("file")).expect("it is there");
            assert_eq!(content, format!("A{number:06}"));
            continue;
        }
        let second = backup(&disk);
        assert_eq!(second["unchanged"], false, "{second}");
        assert_eq!(disk.saved(&second, "file"), changed, "{first} {second}");
        if hits == 3 {
            return;
        }
    }
    panic!("{hits} of {TRIES} changes came within the unit");
}

#[test]
fn a_change_within_the_second_of_a_held_snapshot_is_in_the_next_one() {
    keeps_what_changed_within_the_unit(54_670, SECONDS, 1, Disk::backup_held);
}

#[test]
fn a_change_within_the_two_seconds_of_a_held_snapshot_is_in_the_next_one() {
    keeps_what_changed_within_the_unit(54_671, FAT, 2, Disk::backup_held);
}

#[test]
fn a_snapshot_of_a_working_gateway_waits_until_the_second_of_its_files_is_over() {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, 54_672, SECONDS) else {
        return;
    };
    for number in 0..2 {
        disk.write("file", format!("A{number}"));
        let first = disk.backup();
        let changed = format!("B{number}");
        let is_unseen = change_unseen(&disk.path("file"), changed.as_bytes());
        assert!(!is_unseen, "a change after {first} has the time of before");
        let second = disk.backup();
        assert_eq!(disk.saved(&second, "file"), changed);
        assert_eq!(second["consistency"], "instant", "{second}");
        assert_eq!(disk.backup()["unchanged"], true);
    }
}

#[test]
fn a_change_within_the_second_of_a_restore_is_in_the_next_snapshot() {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, 54_673, SECONDS) else {
        return;
    };
    disk.write("file", "A");
    disk.backup();
    disk.write("file", "B");
    let unseen = (0..10).find(|_| {
        disk.write("file", "B");
        begin_of_unit(1);
        let _ = disk.host.json(&["restore"]);
        change_unseen(&disk.path("file"), b"C")
    });
    assert!(unseen.is_some(), "no change came within the second");
    let answer = disk.backup();
    assert_eq!(disk.saved(&answer, "file"), "C", "{answer}");
}

#[test]
fn an_attribute_that_is_set_within_the_second_of_a_snapshot_is_in_the_next_one() {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, 54_674, SECONDS) else {
        return;
    };
    let names = ["file", "directory"];
    let set = |name: &str, value: &str| {
        let flags = rustix::fs::XattrFlags::empty();
        let path = disk.host.root.join(name);
        rustix::fs::setxattr(path, "user.test", value.as_bytes(), flags).expect("can be set");
    };
    disk.write("directory/inside", "");
    let unseen = (0..10).find(|_| {
        begin_of_unit(1);
        disk.write("file", "content");
        for name in names {
            set(name, "A");
        }
        disk.backup_held();
        let before = names.map(|name| ctime(&disk.path(name)));
        for name in names {
            set(name, "B");
        }
        names.map(|name| ctime(&disk.path(name))) == before
    });
    assert!(unseen.is_some(), "no change came within the second");
    let answer = disk.backup_held();
    let snapshot = answer["snapshot"].as_str().expect("it has an id");
    let target = disk.at.join("target");
    let path = target.to_str().expect("it is UTF-8");
    let _ = disk.host.json(&["restore", snapshot, "--target", path]);
    let restored = tree::describe(&target);
    for name in names {
        let attributes = &restored[Path::new(name)].attributes;
        let value = attributes.values().next().expect("it has one");
        assert_eq!(value, b"B", "{name} in {answer}");
    }
}

/// Gives every file of the tree a change time that is still to come, as a clock that was ahead does.
fn move_times_ahead(disk: &mut Disk, names: &[&str]) -> bool {
    disk.mounted = None;
    for name in names {
        let order = format!("set_inode_field /root/{name} ctime @0x7fff0000");
        let output = Command::new("debugfs")
            .args(["-w", "-R", &order])
            .arg(&disk.image)
            .output();
        if !output.is_ok_and(|output| output.status.success()) {
            eprintln!("skipped: cannot run debugfs");
            return false;
        }
    }
    disk.mounted = disk.mount(false);
    disk.mounted.is_some()
}

fn a_clock_behind_the_files_uploads_nothing_twice(user: u32, make: &[&str]) {
    let place = Place::directory();
    let Some(mut disk) = Disk::new(&place, user, make) else {
        return;
    };
    let names = ["", "a", "b", "large"];
    disk.write("a", "A");
    disk.write("b", "B");
    let large = tree::noise(3, 3 << 20);
    disk.write("large", &large);
    if !move_times_ahead(&mut disk, &names) {
        return;
    }
    assert!(ctime(&disk.path("a")).0 > 2_000_000_000);
    let first = disk.backup_held();
    assert_eq!(
        (&first["consistency"], &first["rounds"]),
        (&"instant".into(), &1.into()),
        "{first}"
    );
    let size = first["bytesUploaded"].as_u64().expect("it is a number");
    assert!(size < 4 << 20, "the tree is uploaded once: {first}");
    let objects = place.objects();
    for answer in [disk.backup(), disk.backup_held()] {
        assert_eq!(answer["unchanged"], true, "{answer}");
    }
    assert!(place.objects() == objects);

    // What changes gets a time of now.
    write_in_secret(&disk.path("a"), b"C");
    let second = disk.backup();
    assert_eq!(
        (&second["consistency"], disk.saved(&second, "a").as_str()),
        (&"instant".into(), "C"),
        "{second}"
    );
    let size = second["bytesUploaded"].as_u64().expect("it is a number");
    assert!(size < 1 << 20, "only what changed is uploaded: {second}");
    let third = disk.backup();
    assert_eq!(third["unchanged"], true, "{third}");
}

#[test]
fn a_clock_behind_the_files_uploads_nothing_twice_on_ext4() {
    a_clock_behind_the_files_uploads_nothing_twice(54_680, EXT4);
}

#[test]
fn a_clock_behind_the_files_uploads_nothing_twice_where_times_are_seconds() {
    a_clock_behind_the_files_uploads_nothing_twice(54_681, SECONDS);
}

/// A library that sets the clock of one program back by an hour.
const CLOCK: &str = r"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, __func__);
    int answer = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec -= 3600;
    return answer;
}
";

/// Takes a snapshot by a clock that was set back meanwhile. `None`, with a word about it, where the agent is a static
/// program, which takes no library.
fn backup_an_hour_ago(host: &Host) -> Option<Value> {
    let folder = host.folder.path();
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    fs::write(&source, CLOCK).expect("can write");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(built.is_ok_and(|built| built.success()), "cc works");
    let mut command = host.command(&["backup", "--json"]);
    command.env("LD_PRELOAD", &library);
    let outcome = Running::start(&mut command).wait().expect(0);
    let answer = outcome.json();
    let listed = host.json(&["list"]);
    let times = |at: usize| listed["snapshots"][at]["time"].as_str().map(str::to_owned);
    if answer["unchanged"] == false && times(0) > times(1) {
        eprintln!("skipped: the agent is static, so its clock cannot be set");
        return None;
    }
    Some(answer)
}

#[test]
fn a_clock_that_is_set_back_after_a_snapshot_hides_no_change_of_its_second() {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, 54_682, SECONDS) else {
        return;
    };
    let unseen = (0..10).find(|_| {
        begin_of_unit(1);
        disk.write("file", "A");
        disk.backup_held();
        change_unseen(&disk.path("file"), b"B")
    });
    assert!(unseen.is_some(), "no change came within the second");
    let Some(answer) = backup_an_hour_ago(&disk.host) else {
        return;
    };
    assert_eq!(answer["unchanged"], false, "{answer}");
    assert_eq!(disk.saved(&answer, "file"), "B", "{answer}");
}

/// Writes into a file that is there.
fn put(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = File::options().write(true).open(path)?;
    file.write_all(text.as_bytes())
}

/// Makes what one process writes to a disk wait in the kernel for as long as this is there.
struct Hold {
    group: PathBuf,
    limit: PathBuf,
    device: String,
    none: &'static str,
}

impl Hold {
    /// `None`, with a word about it, where the kernel cannot.
    fn new(path: &str, pid: u32) -> Option<Self> {
        let device = fs::metadata(path).expect("it is there").dev();
        let device = format!(
            "{}:{}",
            rustix::fs::major(device),
            rustix::fs::minor(device)
        );
        let groups = Path::new("/sys/fs/cgroup");
        // What the second version has must be switched on; the first one may not be there.
        let _ = put(&groups.join("cgroup.subtree_control"), "+io");
        let name = format!("e2e-hold-{pid}");
        let kinds = [
            ("", "io.max", "wbps=1", "wbps=max"),
            ("blkio", "blkio.throttle.write_bps_device", "1", "0"),
        ];
        for (hierarchy, setting, least, none) in kinds {
            let group = groups.join(hierarchy).join(&name);
            if fs::create_dir(&group).is_err() {
                continue;
            }
            let hold = Self {
                limit: group.join(setting),
                group,
                device: device.clone(),
                none,
            };
            let is_limited = put(&hold.limit, &format!("{device} {least}")).is_ok();
            if is_limited && put(&hold.group.join("cgroup.procs"), &pid.to_string()).is_ok() {
                return Some(hold);
            }
        }
        eprintln!("skipped: there is no control group that can hold a write");
        None
    }

    /// Lets all go on.
    fn release(&self) {
        put(&self.limit, &format!("{} {}", self.device, self.none)).expect("it was written");
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // All of it fails where the group was of no use.
        let _ = put(&self.limit, &format!("{} {}", self.device, self.none));
        let pids = fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        for pid in pids.lines() {
            let _ = put(&self.group.with_file_name("cgroup.procs"), pid);
        }
        let _ = fs::remove_dir(&self.group);
    }
}

/// A write past the cache that the kernel has taken and not ended when a snapshot is taken.
fn a_late_write_is_not_of_the_instant(user: u32, descriptor: &str) {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, user, EXT4) else {
        return;
    };
    disk.write("file", "A".repeat(4096));
    let file = File::open(disk.path("file")).expect("it is there");
    file.sync_all().expect("it can be synced");
    assert_eq!(disk.backup_held()["consistency"], "instant");
    for text in ["B", "C"] {
        let mut gateway = Gateway::start(user);
        let Some(hold) = Hold::new(&disk.path("file"), gateway.child.id()) else {
            return;
        };
        let path = disk.path("file");
        let before = fs::read(&path).expect("it is there")[0];
        gateway.does(&format!("direct {path} {text} {descriptor}"));
        let during = disk.backup_held();
        assert_eq!(
            fs::read(&path).expect("it is there")[0],
            before,
            "it is held"
        );
        hold.release();
        gateway.does("landed");
        drop(hold);
        gateway.end();
        let after = disk.backup_held();
        assert_eq!(disk.saved(&after, "file"), text.repeat(4096), "{after}");
        assert_eq!(after["consistency"], "instant", "{after}");
        assert_eq!(during["consistency"], "per-file", "{during}");
        let reason = during["consistencyReason"].as_str();
        assert!(
            reason.is_some_and(|reason| reason.contains("O_DIRECT")),
            "{during}"
        );
    }
}

#[test]
fn a_write_that_ends_after_the_snapshot_is_in_the_next_one() {
    a_late_write_is_not_of_the_instant(54_690, "open");
}

#[test]
fn a_write_that_ends_after_the_snapshot_is_in_the_next_one_though_its_descriptor_is_closed() {
    a_late_write_is_not_of_the_instant(54_691, "closed");
}

#[test]
fn a_file_that_is_only_open_past_the_cache_leaves_a_snapshot_of_one_instant() {
    let place = Place::directory();
    let Some(disk) = Disk::new(&place, 54_692, EXT4) else {
        return;
    };
    disk.write("file", page("one"));
    let mut gateway = Gateway::start(disk.user);
    gateway.does(&format!("open it {}", disk.path("file")));
    let answer = disk.backup_held();
    assert_eq!(answer["consistency"], "instant", "{answer}");
    assert_eq!(disk.backup_held()["unchanged"], true);
    assert_eq!(disk.backup()["unchanged"], true);
}
