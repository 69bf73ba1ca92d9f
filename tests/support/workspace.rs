//! A large workspace like those that users have, made from a seed: the same bytes, names, modes and times every time.
//!
//! Text, JSON lines, source trees, `SQLite` databases, media, and what is hard to put back: links, holes, attributes, empty
//! folders, names that are not UTF-8. For benchmarks, and for tests that need a backup to take a while.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags, utimensat};
use serde_json::{Value, json};

use crate::openclaw::OpenClaw;

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// In thousandths of the full workspace.
    thousandths: usize,
}

impl Scale {
    /// About 12,000 files that take 600 MB, half of it when compressed, and a file of 256 MiB that is a hole mostly.
    pub const FULL: Self = Self { thousandths: 1000 };
    /// A twentieth of that.
    pub const SMALL: Self = Self { thousandths: 50 };

    fn of(self, count: usize) -> usize {
        (count * self.thousandths).div_ceil(1000)
    }
}

/// Files by kind at full scale, and the bytes that one of them has on average.
const SOURCES: (usize, usize) = (10_600, 7_200);
const NOTES: (usize, usize) = (1_000, 16_000);
const SESSIONS: (usize, usize) = (160, 1_150_000);
const DATABASES: (usize, usize) = (24, 5_400_000);
const MEDIA: (usize, usize) = (120, 1_600_000);
const HOLE: usize = 256 << 20;

/// What [`touch_sessions`] changes.
const TOUCHED_SESSIONS: usize = 12;
const TOUCHED_DATABASES: usize = 4;
/// Of the files that [`touch_one_percent`] changes, how many are only renamed.
const RENAMED: usize = 4;

const WORDS: usize = 4_096;
const PROJECT_FILES: usize = 220;
/// 2026-01-01T00:00:00Z: everything was last changed in the half year after it.
const NEW_YEAR: u64 = 1_767_225_600;
const HALF_A_YEAR: u64 = 183 * 86_400;

/// Numbers that only look random (`SplitMix64`): fast, and the same everywhere.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        // The remainder is below a `usize`, and its slight bias is of no matter here.
        usize::try_from(self.next() % limit as u64).unwrap_or_default()
    }

    /// Sizes are uneven: from a quarter of the average to a bit less than twice as much.
    fn size(&mut self, average: usize) -> usize {
        average / 4 + self.below(average * 3 / 2)
    }

    /// Words are uneven too, or text would hardly compress.
    fn word<'a>(&mut self, words: &'a [String]) -> &'a str {
        let skewed = self.below(words.len()).min(self.below(words.len()));
        &words[skewed.min(self.below(words.len()))]
    }
}

/// What is written into a file.
#[derive(Clone, Copy)]
enum Content {
    Source,
    Note,
    Session,
    Media,
}

/// One file that is to be made.
struct Plan {
    path: PathBuf,
    content: Content,
    size: usize,
    mode: u32,
    seed: u64,
}

/// Makes the workspace in a directory, which may exist.
pub fn generate(dir: &Path, seed: u64, scale: Scale) -> io::Result<()> {
    let words = words(seed);
    let mut random = Random(seed);
    let plans = plan(&mut random, &words, scale);
    let databases: Vec<(PathBuf, usize, u64)> = (0..scale.of(DATABASES.0))
        .map(|at| {
            let path = format!("databases/{}-{at}.sqlite", words[at]);
            (path.into(), random.size(DATABASES.1), random.next())
        })
        .collect();

    let mut folders: Vec<&Path> = plans.iter().filter_map(|plan| plan.path.parent()).collect();
    folders.dedup();
    for folder in folders {
        fs::create_dir_all(dir.join(folder))?;
    }
    fs::create_dir_all(dir.join("databases"))?;
    let tasks = databases
        .iter()
        .map(|(path, size, seed)| json!({ "path": dir.join(path), "size": size, "seed": seed >> 33, "change": 0 }))
        .collect();
    // The databases are another program's work; the files are shared between two threads.
    std::thread::scope(|scope| {
        let databases = scope.spawn(|| sqlite(&tasks));
        let halves = [0, 1].map(|half| {
            let (plans, words) = (&plans, &words);
            scope.spawn(move || {
                let mut text = Vec::new();
                let mut mine = plans.iter().skip(half).step_by(2);
                mine.try_for_each(|plan| write(dir, plan, words, &mut text))
            })
        });
        for half in halves {
            half.join().expect("nothing panics there")?;
        }
        databases.join().expect("nothing panics there")
    })?;
    add_the_unusual(dir, &mut random, &plans)?;
    set_times(dir, &mut random)
}

/// Changes one file of a hundred: people and programs that write texts, source code, notes. A few are renamed, the rest
/// are rewritten.
pub fn touch_one_percent(dir: &Path, seed: u64) -> io::Result<()> {
    let words = words(seed);
    let mut random = Random(seed ^ 0x5eed);
    let mut texts = files(&dir.join("notes"))?;
    texts.extend(files(&dir.join("projects"))?);
    let mut count = texts.len();
    for kind in ["sessions", "databases", "media"] {
        count += files(&dir.join(kind))?.len();
    }
    let mut text = Vec::new();
    for number in 0..count / 100 {
        let at = random.below(texts.len());
        let path = texts.swap_remove(at);
        // In the proportion that it has at full scale.
        if number < (RENAMED * count).div_ceil(12_000) {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(".old");
            fs::rename(&path, path.with_file_name(name))?;
            continue;
        }
        let content = if path.extension() == Some(OsStr::new("md")) {
            Content::Note
        } else {
            Content::Source
        };
        fill(&mut text, content, SOURCES.1, &mut random, &words);
        fs::write(path, &text)?;
    }
    Ok(())
}

/// Changes what a gateway at work changes: lines are appended to some long sessions, rows change in some large databases.
pub fn touch_sessions(dir: &Path, seed: u64) -> io::Result<()> {
    let words = words(seed);
    let mut random = Random(seed ^ 0x5e55);
    let mut pick = |folder: &str, count: usize| -> io::Result<Vec<PathBuf>> {
        let mut left = files(&dir.join(folder))?;
        let count = count.min(left.len());
        Ok((0..count)
            .map(|_| left.swap_remove(random.below(left.len())))
            .collect())
    };
    let sessions = pick("sessions", TOUCHED_SESSIONS)?;
    let databases = pick("databases", TOUCHED_DATABASES)?;
    let mut text = Vec::new();
    for path in sessions {
        fill(&mut text, Content::Session, 4_000, &mut random, &words);
        OpenOptions::new()
            .append(true)
            .open(path)?
            .write_all(&text)?;
    }
    let tasks = databases
        .iter()
        .map(|path| json!({ "path": path, "size": 0, "seed": random.next() >> 33, "change": 6 }))
        .collect();
    sqlite(&tasks)
}

/// Makes this many files of 1 KiB, 250 to a folder, each half random and half not.
pub fn many_small(dir: &Path, count: usize) -> io::Result<()> {
    let mut random = Random(count as u64);
    let mut bytes = [b' '; 1024];
    for at in 0..count {
        let folder = dir.join(format!("{:04}", at / 250));
        if at % 250 == 0 {
            fs::create_dir_all(&folder)?;
        }
        for eight in bytes[..512].chunks_exact_mut(8) {
            eight.copy_from_slice(&random.next().to_le_bytes());
        }
        fs::write(folder.join(format!("{at:06}.dat")), bytes)?;
    }
    Ok(())
}

/// A vocabulary of pronounceable words, none twice.
fn words(seed: u64) -> Vec<String> {
    const SYLLABLES: [&str; 32] = [
        "a", "be", "con", "da", "en", "fi", "ga", "hu", "in", "jo", "ka", "le", "mo", "na", "or",
        "pre", "qui", "re", "sta", "ti", "un", "ver", "wi", "ex", "yo", "ze", "ing", "er", "tion",
        "al", "ment", "ly",
    ];
    let mut random = Random(seed ^ 0x770d);
    (0..WORDS)
        .map(|at| {
            let mut word = String::new();
            for _ in 0..random.below(3) {
                word.push_str(SYLLABLES[random.below(32)]);
            }
            // The last two say which it is.
            word.push_str(SYLLABLES[at / 32 % 32]);
            word.push_str(SYLLABLES[at % 32]);
            word
        })
        .collect()
}

fn plan(random: &mut Random, words: &[String], scale: Scale) -> Vec<Plan> {
    let mut plans = Vec::new();
    let mut add = |path: String, content, average, mode, random: &mut Random| {
        let (size, seed) = (random.size(average), random.next());
        plans.push(Plan {
            path: path.into(),
            content,
            size,
            mode,
            seed,
        });
    };
    for at in 0..scale.of(SOURCES.0) {
        let project = at / PROJECT_FILES;
        let folder = ["src", "src/api", "src/store", "tests", "scripts"][at / 44 % 5];
        let (extension, mode) = if folder == "scripts" {
            ("sh", 0o755)
        } else {
            (["rs", "ts", "py"][project % 3], 0o644)
        };
        let path = format!(
            "projects/{}-{project}/{folder}/{}_{at}.{extension}",
            words[project * 7],
            random.word(words)
        );
        add(path, Content::Source, SOURCES.1, mode, random);
    }
    for at in 0..scale.of(NOTES.0) {
        let folder = ["daily", "people", "ideas, and plans", "Übersicht"][at / 25 % 4];
        let path = format!(
            "notes/{folder}/{} {}-{at}.md",
            random.word(words),
            random.word(words)
        );
        add(path, Content::Note, NOTES.1, 0o644, random);
    }
    for at in 0..scale.of(SESSIONS.0) {
        let path = format!("sessions/{:016x}-{at}.jsonl", random.next());
        add(path, Content::Session, SESSIONS.1, 0o600, random);
    }
    for at in 0..scale.of(MEDIA.0) {
        let (folder, extension) =
            [("inbound", "jpg"), ("outbound", "png"), ("voice", "ogg")][at % 3];
        let path = format!("media/{folder}/{:016x}-{at}.{extension}", random.next());
        add(path, Content::Media, MEDIA.1, 0o600, random);
    }
    plans
}

fn write(dir: &Path, plan: &Plan, words: &[String], text: &mut Vec<u8>) -> io::Result<()> {
    fill(text, plan.content, plan.size, &mut Random(plan.seed), words);
    let path = dir.join(&plan.path);
    fs::write(&path, &text)?;
    fs::set_permissions(&path, Permissions::from_mode(plan.mode))
}

/// Puts at least `size` bytes of a kind into an empty buffer.
fn fill(text: &mut Vec<u8>, content: Content, size: usize, random: &mut Random, words: &[String]) {
    text.clear();
    let mut line = String::new();
    while text.len() < size {
        line.clear();
        // Writing into a string cannot fail.
        let _ = match content {
            Content::Media => {
                text.extend((0..512).flat_map(|_| random.next().to_le_bytes()));
                continue;
            }
            Content::Source => source_line(&mut line, random, words),
            Content::Note => {
                sentence(&mut line, 6 + random.below(30), random, words);
                line.push_str(".\n\n");
                Ok(())
            }
            Content::Session => session_line(&mut line, random, words),
        };
        text.extend_from_slice(line.as_bytes());
    }
}

fn source_line(line: &mut String, random: &mut Random, words: &[String]) -> std::fmt::Result {
    let (kind, number) = (random.below(7), random.below(1000));
    let mut word = || random.word(words);
    match kind {
        0 => writeln!(
            line,
            "\n/// {} {} {}\npub fn {}_{}({}: &str) -> usize {{",
            word(),
            word(),
            word(),
            word(),
            word(),
            word()
        ),
        1 => writeln!(
            line,
            "    if {}.{}() > {number} {{\n        return {};\n    }}",
            word(),
            word(),
            word()
        ),
        2 => writeln!(line, "    // {} {} {} {}.", word(), word(), word(), word()),
        3 => writeln!(line, "}}"),
        4 => writeln!(line, "    {}.{}({}, {number});", word(), word(), word()),
        _ => writeln!(
            line,
            "    let {} = {}::{}({});",
            word(),
            word(),
            word(),
            word()
        ),
    }
}

fn session_line(line: &mut String, random: &mut Random, words: &[String]) -> std::fmt::Result {
    let role = ["user", "assistant", "tool"][random.below(3)];
    let (id, time) = (
        random.next(),
        1_767_225_600_000 + random.below(15_000_000_000),
    );
    write!(
        line,
        r#"{{"type":"message","id":"{id:016x}","timestamp":{time},"message":{{"role":"{role}","content":""#
    )?;
    sentence(line, 10 + random.below(60), random, words);
    writeln!(
        line,
        r#""}},"usage":{{"input":{},"output":{}}}}}"#,
        random.below(9_000),
        random.below(900)
    )
}

fn sentence(line: &mut String, count: usize, random: &mut Random, words: &[String]) {
    for at in 0..count {
        if at > 0 {
            line.push(' ');
        }
        line.push_str(random.word(words));
    }
}

/// Makes or changes databases by the pinned Node.js: `SQLite` of one version, and none that has to be compiled for this.
fn sqlite(tasks: &Value) -> io::Result<()> {
    let openclaw = OpenClaw::install().map_err(|error| io::Error::other(error.to_string()))?;
    let mut node = Command::new("node")
        .args(["--no-warnings", "-"])
        .env_clear()
        .env("PATH", openclaw.search_path())
        .env("TASKS", tasks.to_string())
        .stdin(Stdio::piped())
        .spawn()?;
    // Dropped at once: the script ends where its input does.
    if let Some(mut stdin) = node.stdin.take() {
        stdin.write_all(include_bytes!("workspace.js"))?;
    }
    let status = node.wait()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!(
            "node cannot write databases: {status}"
        )))
    }
}

/// What tools like to lose.
fn add_the_unusual(dir: &Path, random: &mut Random, plans: &[Plan]) -> io::Result<()> {
    let unusual = dir.join("unusual");
    fs::create_dir_all(unusual.join("empty/and/nested"))?;
    fs::create_dir_all(unusual.join("private"))?;
    fs::set_permissions(unusual.join("private"), Permissions::from_mode(0o700))?;
    fs::write(unusual.join("empty file"), "")?;
    fs::write(
        unusual.join(OsStr::from_bytes(b"not-utf8-\xff\xfe.txt")),
        "the name counts\n",
    )?;
    symlink("/nowhere/at/all", unusual.join("dangling"))?;
    symlink("../projects", unusual.join("to-a-folder"))?;
    for at in 0..12 {
        let path = &plans[random.below(plans.len())].path;
        fs::hard_link(dir.join(path), unusual.join(format!("hard-{at}")))?;
        symlink(
            Path::new("..").join(path),
            unusual.join(format!("soft-{at}")),
        )?;
        let attribute = format!("https://example.com/{}", random.next());
        match rustix::fs::lsetxattr(
            dir.join(path),
            "user.origin",
            attribute.as_bytes(),
            XattrFlags::empty(),
        ) {
            // Not every file system has them.
            Ok(()) | Err(rustix::io::Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let sparse = File::create(unusual.join("disk.img"))?;
    sparse.set_len(HOLE as u64)?;
    for at in 0..16 {
        let mut block = [0; 4096];
        for eight in block.chunks_exact_mut(8) {
            eight.copy_from_slice(&random.next().to_le_bytes());
        }
        sparse.write_all_at(&block, at * (HOLE as u64 / 16))?;
    }
    Ok(())
}

/// Gives everything a time in the past, folders after what is in them. Files changed a moment ago would be special.
fn set_times(dir: &Path, random: &mut Random) -> io::Result<()> {
    for name in names(dir)? {
        let path = dir.join(name);
        if fs::symlink_metadata(&path)?.is_dir() {
            set_times(&path, random)?;
        } else {
            set_time(&path, random)?;
        }
    }
    set_time(dir, random)
}

fn set_time(path: &Path, random: &mut Random) -> io::Result<()> {
    let time = Timespec {
        tv_sec: i64::try_from(NEW_YEAR + random.next() % HALF_A_YEAR).map_err(io::Error::other)?,
        tv_nsec: i64::try_from(random.next() % 1_000_000_000).map_err(io::Error::other)?,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Names in a folder, sorted: the order of a directory is the file system's own.
fn names(dir: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let entries = fs::read_dir(dir)?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Plain files below a folder, sorted.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in names(dir)? {
        let path = dir.join(name);
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            found.extend(files(&path)?);
        } else if kind.is_file() {
            found.push(path);
        }
    }
    Ok(found)
}
