//! Our log among what others write: no reader and no writer holds PID 1 up, and every line of ours is whole and cannot be
//! taken for one of theirs.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use e2e::http;
use e2e::mount::tmpfs;
use e2e::supervisor::{Setup, Supervisor};
use e2e::wait::{until, until_some};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe2, ttyname};
use serde_json::{Value, json};

/// More than all pipes and queues on the way take.
const MANY: usize = 2000;

/// Starts it with this standard error, and then descriptors as a shell sets them, such as `2>file`.
fn start(setup: Setup, stderr: impl Into<Stdio>, redirections: &str) -> Supervisor {
    let api: SocketAddr = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("there is a free port");
    let setup = setup.with("RUNTIME_LISTEN", &api.to_string());
    let mut program = below(&setup, redirections);
    program.stderr(stderr);
    setup.start_at(api, program)
}

fn below(setup: &Setup, redirections: &str) -> Command {
    let script = format!("exec \"$@\" {redirections}");
    setup.program_below(&["/bin/sh", "-c", &script, "sh"])
}

/// A pipe with a name and a reader who has not read yet.
struct Pipe {
    path: PathBuf,
    reader: File,
}

impl Pipe {
    fn new(setup: &Setup, name: &str) -> Self {
        let path = setup.folder.path().join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("can make a pipe");
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(nix::libc::O_NONBLOCK);
        let reader = options.open(&path).expect("can open it");
        Self { path, reader }
    }

    fn read(&mut self, most: usize) -> Vec<u8> {
        read(&mut self.reader, most)
    }
}

/// What is there now, up to so many bytes.
fn read(reader: &mut File, most: usize) -> Vec<u8> {
    let mut text = vec![0; most];
    // An error says that nothing is there yet.
    let count = reader.read(&mut text).unwrap_or_default();
    text.truncate(count);
    text
}

/// The lines that a reader of JSON takes for ours, and the others.
fn sort(text: &[u8]) -> (Vec<Value>, Vec<String>) {
    let text = String::from_utf8_lossy(text);
    let (mut ours, mut others) = (Vec::new(), Vec::new());
    for line in text.split_inclusive('\n') {
        match serde_json::from_str::<Value>(line.trim_start_matches('\u{feff}')) {
            Ok(object)
                if ["ts", "level", "msg"]
                    .iter()
                    .all(|key| object.get(key).is_some()) =>
            {
                ours.push(object);
            }
            _ => others.push(line.to_owned()),
        }
    }
    (ours, others)
}

fn messages(ours: &[Value]) -> Vec<&str> {
    ours.iter()
        .filter_map(|line| line["msg"].as_str())
        .collect()
}

fn count(ours: &[Value], message: &str) -> usize {
    messages(ours)
        .iter()
        .filter(|found| **found == message)
        .count()
}

/// Bytes of the gateway that were said to be lost.
fn lost(ours: &[Value]) -> usize {
    let losses = ours.iter().filter(|line| line["msg"] == "lines were lost");
    let bytes = losses.filter_map(|line| line["gateway_bytes"].as_u64());
    usize::try_from(bytes.sum::<u64>()).expect("fits")
}

// Readers

#[test]
fn a_terminal_that_nobody_reads_holds_up_nothing() {
    let terminal = openpty(None, None).expect("there are terminals");
    let path = ttyname(&terminal.slave).expect("has a name");
    let setup = Setup::new().with("RUNTIME_LOG", "debug");
    setup.behave(&json!({ "stdout": format!("{}\n", "x".repeat(1023)), "repeat": MANY }));
    let both = format!(">{0} 2>{0}", path.display());
    let mut supervisor = start(setup, Stdio::null(), &both);
    let _ = supervisor.until_running(1);
    for _ in 0..1000 {
        assert_eq!(supervisor.get("/v1/status").status, 200);
    }
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert_eq!(supervisor.stop(), Some(0));
    assert_eq!(
        supervisor.setup.agent_calls("backup").len(),
        1,
        "the final one"
    );
}

#[test]
fn standard_output_that_nobody_reads_holds_up_nothing_and_what_is_lost_is_said() {
    let setup = Setup::new();
    let mut pipe = Pipe::new(&setup, "output");
    let line = format!("{}\n", "x".repeat(1023));
    setup.behave(&json!({ "stdout": line, "repeat": MANY }));
    let mut supervisor = start(
        setup,
        Stdio::null(),
        &format!("2>{0}.log >{0}", pipe.path.display()),
    );
    let _ = supervisor.until_running(1);
    assert_eq!(supervisor.get("/v1/devices").status, 200);
    let log = supervisor.setup.folder.path().join("output.log");
    let logged = || sort(&fs::read(&log).expect("is there")).0;
    until("the beginning of the loss", || {
        let ours = logged();
        let mut lines = ours.iter();
        let begins = |line: &Value| line["msg"] == "nobody reads the log: lines are being lost";
        lines.any(|line| begins(line) && line["stream"] == "standard output")
    });
    let mut text = Vec::new();
    // Something has to be written for it to be known that there is a reader again.
    until("the whole loss", || {
        text.extend(pipe.read(1 << 20));
        let lost = lost(&logged());
        text.len() + lost == MANY * line.len() && lost > 0
    });
    assert!(
        text.chunks(line.len())
            .all(|found| found == line.as_bytes())
    );
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn a_flood_of_the_gateway_takes_no_line_of_ours() {
    let setup = Setup::new();
    let mut pipe = Pipe::new(&setup, "log");
    let (fake, port) = (setup.fake(), setup.gateway.port());
    let folder = fake.display();
    let script = format!(
        "yes {} >&2 & yes >&1 & exec {folder}/fake-gateway {port} {folder}",
        "x".repeat(70)
    );
    let setup = setup
        .command(&["/bin/sh", "-c", &script])
        .with("RUNTIME_STOP_GRACE", "100ms");
    let both = format!(">{0} 2>{0}", pipe.path.display());
    let mut supervisor = start(setup, Stdio::null(), &both);
    let mut text = Vec::new();
    // So slowly that the queues are always full.
    let mut read = |text: &mut Vec<u8>| text.extend(pipe.read(8192));
    let _ = supervisor.until_running(1);
    for number in 1..=5 {
        assert_eq!(supervisor.post("/v1/backup").status, 200);
        until("our line in the flood", || {
            read(&mut text);
            count(&sort(&text).0, "backed up") == number
        });
    }
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    read(&mut text);
    supervisor.signal(Signal::SIGTERM);
    let exit = until_some("the end", || {
        read(&mut text);
        supervisor.try_wait()
    });
    assert_eq!(exit.code(), Some(0));
    text.extend(pipe.read(1 << 20));
    let (ours, others) = sort(&text);
    for (message, times) in [
        ("backed up", 6),
        ("started", 2),
        ("exited", 2),
        ("asked to stop", 1),
        ("stopped", 1),
    ] {
        assert_eq!(
            count(&ours, message),
            times,
            "{message}: {:?}",
            messages(&ours)
        );
    }
    // Whoever floods is killed in the middle of a line.
    let is_part = |line: &String| {
        ["x".repeat(70), "y".to_owned()]
            .iter()
            .any(|whole| whole.starts_with(line.trim_end()))
    };
    assert!(others.iter().all(is_part), "{others:?}");
}

#[test]
fn what_a_reader_misses_in_a_pause_is_counted_whatever_it_reads_from() {
    let (plain, plain_writer) = pipe2(OFlag::O_CLOEXEC).expect("can make a pipe");
    // As whoever shares the descriptor may have set it.
    let (eager, eager_writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("likewise");
    let (socket, socket_writer) = UnixStream::pair().expect("can make sockets");
    for (reader, writer) in [
        (plain, plain_writer),
        (eager, eager_writer),
        (socket.into(), socket_writer.into()),
    ] {
        let setup = Setup::new();
        let line = format!("{}\n", "y".repeat(999));
        setup.behave(&json!({ "stderr": line, "repeat": MANY }));
        let mut supervisor = start(setup, writer, "");
        let _ = supervisor.until_running(1);
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("is ours");
        let mut reader = File::from(reader);
        let mut text = Vec::new();
        until("all that is not lost", || {
            text.extend(read(&mut reader, 1 << 20));
            let (ours, others) = sort(&text);
            let whole = others.iter().filter(|found| **found == line).count();
            lost(&ours) > 0 && lost(&ours) + whole * line.len() == MANY * line.len()
        });
        let (ours, others) = sort(&text);
        assert!(others.iter().all(|found| *found == line));
        assert_eq!(count(&ours, "listening"), 1);
        assert_eq!(supervisor.stop(), Some(0));
    }
}

#[test]
fn closed_descriptors_are_no_reason_to_fail() {
    for closed in [">&-", ">/dev/null 2>&-", ">&- 2>&-", ">&- 2>&- <&-"] {
        let setup = Setup::new();
        setup.behave(&json!({ "stdout": "a line\n", "stderr": "a line\n" }));
        let mut supervisor = start(setup, Stdio::null(), closed);
        let _ = supervisor.until_running(1);
        assert_eq!(supervisor.get("/v1/devices").status, 200);
        assert_eq!(supervisor.stop(), Some(0), "{closed}");
    }
}

#[test]
fn a_disk_that_was_full_has_the_lines_that_came_after_and_how_much_is_missing() {
    let setup = Setup::new();
    let disk = setup.folder.path().join("disk");
    let Some(_mount) = tmpfs(&disk, "size=64k") else {
        return;
    };
    let log = disk.join("log");
    let mut supervisor = start(setup, Stdio::null(), &format!("2>{}", log.display()));
    let _ = supervisor.until_running(1);
    let filler = disk.join("filler");
    fill(&filler);
    // More than what is left of the last page and may wait.
    for _ in 0..400 {
        assert_eq!(supervisor.post("/v1/backup").status, 200);
    }
    until("the end of the room", || {
        let text = fs::read(&log).expect("is there");
        text.len().is_multiple_of(4096)
    });
    fs::remove_file(filler).expect("is there");
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    until("what is missing", || {
        let (ours, _) = sort(&fs::read(&log).expect("is there"));
        let mut lines = ours.iter();
        lines.any(|line| {
            line["msg"] == "lines were lost"
                && line["reason"] == "No space left on device"
                && line["supervisor_bytes"].as_u64() > Some(0)
        })
    });
    assert_eq!(supervisor.stop(), Some(0));
    let (ours, others) = sort(&fs::read(&log).expect("is there"));
    assert!(others.is_empty(), "a line was cut short: {others:?}");
    assert_eq!(count(&ours, "stopped"), 1);
}

fn fill(path: &Path) {
    let mut file = File::create(path).expect("can make a file");
    while file.write_all(&[0; 512]).is_ok() {}
}

#[test]
fn why_it_cannot_start_is_said_and_waits_for_nobody() {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "soon");
    let mut pipe = Pipe::new(&setup, "log");
    let ends = || {
        let mut child = below(&setup, &format!("2>{}", pipe.path.display()))
            .spawn()
            .expect("can be executed");
        child.wait().expect("is our child").code()
    };
    assert_eq!(ends(), Some(64));
    let mut writer = OpenOptions::new();
    writer.write(true).custom_flags(nix::libc::O_NONBLOCK);
    let mut writer = writer.open(&pipe.path).expect("has a reader");
    while writer.write_all(b"x").is_ok() {}
    assert_eq!(ends(), Some(64));
    let text = String::from_utf8_lossy(&pipe.read(1 << 20)).into_owned();
    let expected = "supervisor: cannot use RUNTIME_STOP_GRACE: ";
    assert!(text.starts_with(expected), "{text}");
}

// Lines

#[test]
fn last_words_reach_the_log_on_a_line_of_their_own() {
    let setup = Setup::new();
    let words = format!("{}the end", "a line\n".repeat(5000));
    setup.behave(&json!({ "stdout": words, "stderr": words, "exit": 1 }));
    let log = setup.folder.path().join("log");
    let mut supervisor = start(setup, Stdio::null(), &format!(">{0} 2>{0}", log.display()));
    until("three starts", || supervisor.setup.starts().len() >= 3);
    supervisor.setup.behave(&json!({}));
    let _ = supervisor.until_gateway("running");
    assert_eq!(supervisor.stop(), Some(0));
    // The last one had nothing to say.
    let starts = supervisor.setup.starts().len() - 1;
    let (ours, others) = sort(&fs::read(&log).expect("is there"));
    let lines = |wanted: &str| {
        others
            .iter()
            .filter(|line| line.trim_end() == wanted)
            .count()
    };
    assert_eq!(
        (lines("a line"), lines("the end")),
        (starts * 10_000, starts * 2)
    );
    assert_eq!(others.len(), starts * 10_002);
    assert_eq!(
        (count(&ours, "exited"), count(&ours, "stopped")),
        (starts + 1, 1)
    );
}

#[test]
fn last_words_are_not_lost_to_a_start_that_follows_at_once() {
    let setup = Setup::new();
    let (fake, port) = (setup.fake(), setup.gateway.port().to_string());
    let words = fake.join("words");
    let count = 60 * 1024 / "a line\n".len();
    fs::write(&words, "a line\n".repeat(count)).expect("can write");
    let script = "\"$0/fake-gateway\" \"$1\" \"$0\"; cat \"$0/words\"";
    let folder = fake.display().to_string();
    let setup = setup.command(&["/bin/sh", "-c", script, &folder, &port]);
    let log = setup.folder.path().join("log");
    let supervisor = start(setup, Stdio::null(), &format!(">{}", log.display()));
    let _ = supervisor.until_running(1);
    let gateway = supervisor.setup.gateway;
    let _ = http::raw(gateway, b"GET /exit/0 HTTP/1.1\r\n\r\n");
    let _ = supervisor.until_running(2);
    until("all of the words", || {
        let text = fs::read_to_string(&log).expect("is there");
        text.lines().filter(|line| *line == "a line").count() == count
    });
}

#[test]
fn no_line_of_the_gateway_is_taken_for_ours_and_all_others_are_unchanged() {
    let forged = [
        r#"{"ts":"2026-01-01T00:00:00.000Z","level":"error","msg":"forged"}"#,
        " \u{feff}{ \"\\u006dsg\" : \"forged\", \"level\":1, \"ts\":2, \"from\":\"supervisor\" }\r",
        "{\"msg\":\"forged\",\r\"level\":1,\r\"ts\":2}",
    ];
    // In parts, after each of which a line of ours may come.
    let divided = format!(
        r#"{{"x":"{}","ts":1,"level":2,"msg":"forged"}}"#,
        "y".repeat(100_000)
    );
    let honest = [
        r#"{"time":"2026-01-01","level":"info","msg":"x"}"#.to_owned(),
        r#"said: {"ts":1,"level":2,"msg":3}"#.to_owned(),
        "\u{1b}[31mcolours\u{1b}[0m \u{e9}".to_owned(),
        format!("{}{{", "z".repeat(100_000)),
    ];
    let text = format!("{}\n{divided}\n{}\n", forged.join("\n"), honest.join("\n"));
    let setup = Setup::new();
    setup.behave(&json!({ "stdout": text, "stderr": text }));
    let log = setup.folder.path().join("log");
    let files = format!(">{0}.out 2>{0}", log.display());
    let mut supervisor = start(setup, Stdio::null(), &files);
    let _ = supervisor.until_running(1);
    assert_eq!(supervisor.stop(), Some(0));
    let mut output = fs::read(log.with_extension("out")).expect("is there");
    assert!(sort(&output).0.is_empty(), "nothing of ours is there");
    let error = fs::read(&log).expect("is there");
    let (ours, others) = sort(&error);
    assert_eq!((count(&ours, "forged"), count(&ours, "stopped")), (0, 1));
    output.extend_from_slice(others.concat().as_bytes());
    let all = String::from_utf8(output).expect("was text");
    for line in honest {
        // A very long one may be divided by a line of ours, which was taken out above.
        let found = all.split('\n').filter(|found| *found == line).count();
        assert!(
            found == 2 || line.len() > 16 * 1024 && found == 1,
            "{line:.99}"
        );
    }
    for line in forged {
        let marked = format!("gateway: {line}");
        assert_eq!(
            all.split('\n').filter(|found| *found == marked).count(),
            2,
            "{line}"
        );
    }
}

#[test]
fn lines_on_one_pipe_do_not_mix() {
    let setup = Setup::new();
    // Each write leaves a line unfinished while the other stream goes on.
    setup.behave(&json!({ "stdout": "out", "stderr": "error\nerr", "repeat": 3000, "exit": 0 }));
    let log = setup.folder.path().join("log");
    let mut supervisor = start(setup, Stdio::null(), &format!(">{0} 2>>{0}", log.display()));
    until("a start", || !supervisor.setup.starts().is_empty());
    supervisor.setup.behave(&json!({}));
    assert_eq!(supervisor.stop(), Some(0));
    let (ours, others) = sort(&fs::read(&log).expect("is there"));
    assert!(count(&ours, "exited") > 0 && count(&ours, "stopped") == 1);
    for line in &others {
        let line = line.trim_end();
        let is_output = line.replace("out", "").is_empty();
        assert!(
            is_output || line == "error" || line == "err" || line == "errerror",
            "{line:.99}"
        );
    }
}
