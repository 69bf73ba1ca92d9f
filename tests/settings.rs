//! Settings: what is refused, how it is said, and that the documentation lists what there is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use e2e::binaries::binary;
use e2e::golden;
use e2e::supervisor::{TOKEN, place};
use e2e::surroundings::{self, folder, program};

fn run(program: &str, arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    surroundings::program(program)
        .args(arguments)
        .envs(settings.iter().copied())
        .output()
        .expect("can be executed")
}

/// What stands for the settings of a test that are none of its business, so that nothing depends on this machine.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new() -> Self {
        let folder = folder();
        std::fs::create_dir(folder.path().join("root")).expect("can make a folder");
        Self(folder)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &[u8]) {
        std::fs::write(self.0.path().join(name), text).expect("can write");
    }

    /// Both programs' check of the same settings. `FOLDER` is this folder.
    fn check(&self, settings: &[(&str, &str)]) -> [Output; 2] {
        let folder = self.path("");
        let folder = folder.trim_end_matches('/');
        let user = surroundings::caller();
        let (root, state) = (self.path("root"), self.path("state"));
        let mut all = vec![
            ("RUNTIME_SERVICE_TOKEN", TOKEN.to_owned()),
            ("RUNTIME_ROOT", root),
            ("RUNTIME_STATE", state),
            ("RUNTIME_GATEWAY_USER", user),
        ];
        all.retain(|(name, _)| {
            let is_given =
                |(other, _): &(&str, &str)| other == name || *other == format!("{name}_FILE");
            !settings.iter().any(is_given)
        });
        let given = settings.iter();
        all.extend(given.map(|(name, value)| (*name, value.replace("FOLDER", folder))));
        let all: Vec<(&str, &str)> = all
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        ["backup-agent", "supervisor"].map(|program| run(program, &["check"], &all))
    }
}

fn check(settings: &[(&str, &str)]) -> Output {
    let [_, output] = Disk::new().check(settings);
    output
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Settings, and a part of the sentence that refuses them, if any does.
type Row<'a> = (&'a [(&'a str, &'a str)], Option<&'a str>);

/// A store on S3 that lacks nothing.
macro_rules! s3 {
    ($store:expr, $endpoint:expr) => {
        &[
            ("RUNTIME_STORE", $store),
            ("RUNTIME_S3_ENDPOINT", $endpoint),
            ("RUNTIME_S3_ACCESS_KEY_ID", "key-id"),
            ("RUNTIME_S3_SECRET_ACCESS_KEY", "a-secret"),
        ]
    };
}

/// Every setting that the agent reads, at its best and at its worst.
const AGENTS: &[Row<'_>] = &[
    (&[], None),
    (&[("RUNTIME_INSTANCE_ID", "a-1")], None),
    (
        &[("RUNTIME_INSTANCE_ID", "Not/Valid")],
        Some("is not 1 to 63 of lower-case"),
    ),
    (&[("RUNTIME_INSTANCE_ID", "a\n")], Some("line break")),
    (&[("RUNTIME_ROOT", "FOLDER/new")], None),
    (&[("RUNTIME_ROOT", "FOLDER/link")], None),
    (&[("RUNTIME_ROOT", "data")], Some("is not an absolute path")),
    (&[("RUNTIME_ROOT", "/")], Some("is not an absolute path")),
    (
        &[("RUNTIME_ROOT", "FOLDER/root/../x")],
        Some("without \"..\""),
    ),
    (
        &[("RUNTIME_ROOT", "FOLDER/key")],
        Some("is not a directory"),
    ),
    (
        &[("RUNTIME_ROOT", "FOLDER/key/x")],
        Some("is not a directory"),
    ),
    (
        &[("RUNTIME_ROOT", "FOLDER/nowhere")],
        Some("a symbolic link that leads nowhere"),
    ),
    (
        &[("RUNTIME_ROOT", "FOLDER/loop")],
        Some("a loop of symbolic links"),
    ),
    (
        &[("RUNTIME_ROOT", "FOLDER/.x.restoring")],
        Some("a restore's working folders"),
    ),
    (
        &[("RUNTIME_STATE", "state")],
        Some("is not an absolute path"),
    ),
    (
        &[("RUNTIME_STATE", "FOLDER/root/state")],
        Some("is inside of the folder of RUNTIME_ROOT"),
    ),
    (
        &[("RUNTIME_STATE", "FOLDER/link/state")],
        Some("is inside of the folder of RUNTIME_ROOT"),
    ),
    (
        &[("RUNTIME_STATE", "FOLDER")],
        Some("has inside of it the folder of RUNTIME_ROOT"),
    ),
    (
        &[("RUNTIME_STATE", "FOLDER/root")],
        Some("is the folder of RUNTIME_ROOT"),
    ),
    (&[("RUNTIME_STATE", "FOLDER/open")], Some("chmod go-w")),
    (&[("RUNTIME_STATE", "FOLDER/group")], Some("chmod go-w")),
    (&[("RUNTIME_STORE", "file://FOLDER/store")], None),
    (&[("RUNTIME_STORE", "file://FOLDER/state")], None),
    (
        &[("RUNTIME_STORE", "file://FOLDER/open")],
        Some("chmod go-w"),
    ),
    (
        &[("RUNTIME_STORE", "file://FOLDER/root/store")],
        Some("is inside of the folder of RUNTIME_ROOT"),
    ),
    (
        &[("RUNTIME_STORE", "file://FOLDER/link/../root")],
        Some("without \"..\""),
    ),
    (
        &[("RUNTIME_STORE", "file://FOLDER")],
        Some("has inside of it the folder of RUNTIME_ROOT"),
    ),
    (
        &[("RUNTIME_STORE", "file://FOLDER/state/import")],
        Some("among the working files of RUNTIME_STATE"),
    ),
    (
        &[
            ("RUNTIME_STORE", "file://FOLDER/state"),
            ("RUNTIME_INSTANCE_ID", "lock"),
        ],
        Some("among the working files of RUNTIME_STATE"),
    ),
    (
        &[
            ("RUNTIME_STORE", "file://FOLDER/store"),
            ("RUNTIME_STATE", "FOLDER/store/local"),
        ],
        Some("has inside of it the folder of RUNTIME_STATE"),
    ),
    (
        &[("RUNTIME_STORE", "ftp://x")],
        Some("is neither s3://bucket/prefix nor file:///directory"),
    ),
    (
        &[("RUNTIME_STORE", "file://relative")],
        Some("is not an absolute path"),
    ),
    (
        &[("RUNTIME_STORE", "s3://bucket/prefix")],
        Some("RUNTIME_S3_ENDPOINT: it is not set"),
    ),
    (s3!("s3://bucket/prefix", "https://host"), None),
    (s3!("s3://bucket", "http://127.0.0.1:9000/"), None),
    (s3!("s3://bucket/a/b/", "https://{bucket}.s3.example"), None),
    (s3!("s3://", "https://host"), Some("has no bucket's name")),
    (
        s3!("s3://Bucket", "https://host"),
        Some("has no bucket's name"),
    ),
    (
        s3!("s3://bu..cket", "https://host"),
        Some("has no bucket's name"),
    ),
    (
        s3!("s3://key:a-secret@bucket", "https://host"),
        Some("has no bucket's name"),
    ),
    (
        s3!("s3://bucket/../other", "https://host"),
        Some("is empty, \".\" or \"..\""),
    ),
    (
        s3!("s3://bucket/./x", "https://host"),
        Some("is empty, \".\" or \"..\""),
    ),
    (
        s3!("s3://bucket/a//b", "https://host"),
        Some("is empty, \".\" or \"..\""),
    ),
    (
        s3!("s3://bucket/a?b=a-secret", "https://host"),
        Some("a character in its prefix"),
    ),
    (s3!("s3://bucket", "host"), Some("is not an address")),
    (s3!("s3://bucket", "ftp://host"), Some("is not an address")),
    (
        s3!("s3://bucket", "https://host?a-secret"),
        Some("no query and no fragment"),
    ),
    (
        s3!("s3://bucket", "https://host/#a"),
        Some("no query and no fragment"),
    ),
    (
        s3!("s3://bucket", "https://me:a-secret@host"),
        Some("no user name"),
    ),
    (
        s3!("s3://bucket", "https://host/bucket"),
        Some("write https://host, and the bucket into"),
    ),
    (s3!("s3://bucket", "https://host/storage/v1"), None),
    (
        s3!("s3://bucket", "https://host/storage/../v1"),
        Some("a path that no service has"),
    ),
    (
        s3!("s3://bucket", "https://bucket.s3.example"),
        Some("write https://{bucket}.s3.example"),
    ),
    (
        s3!("s3://bucket", "https://host:0"),
        Some("its port is not a number"),
    ),
    (
        s3!("s3://bucket", "https://host:99999"),
        Some("its port is not a number"),
    ),
    (
        s3!("s3://bucket", "https://host:x"),
        Some("its port is not a number"),
    ),
    (
        s3!("s3://bucket", "https://ho st"),
        Some("not printable ASCII"),
    ),
    // Looked at whatever the store is.
    (
        &[("RUNTIME_S3_ENDPOINT", "https://host?x=1")],
        Some("no query and no fragment"),
    ),
    (&[("RUNTIME_S3_ENDPOINT_FILE", "FOLDER/endpoint")], None),
    (
        &[
            ("RUNTIME_S3_ENDPOINT", "https://host"),
            ("RUNTIME_S3_ENDPOINT_FILE", "FOLDER/endpoint"),
        ],
        Some("RUNTIME_S3_ENDPOINT_FILE is set too"),
    ),
    (&[("RUNTIME_S3_REGION", "a b")], Some("not printable ASCII")),
    (
        &[("RUNTIME_S3_REGION", "eu/../x")],
        Some("not a region's name"),
    ),
    (&[("RUNTIME_S3_REGION_FILE", "FOLDER/region")], None),
    (
        &[("RUNTIME_S3_ACCESS_KEY_ID", "a b")],
        Some("not printable ASCII"),
    ),
    (
        &[("RUNTIME_S3_ACCESS_KEY_ID", "a-secret\n")],
        Some("line break"),
    ),
    (
        &[("RUNTIME_S3_SECRET_ACCESS_KEY", "a-secret\tb")],
        Some("control character"),
    ),
    (
        &[("RUNTIME_S3_SESSION_TOKEN", "a-secret\u{e9}")],
        Some("not printable ASCII"),
    ),
    (&[("RUNTIME_S3_ACCESS_KEY_ID_FILE", "FOLDER/key")], None),
    (&[("RUNTIME_S3_ACCESS_KEY_ID_FILE", "FOLDER/dos")], None),
    (
        &[("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", "FOLDER/two")],
        Some("_FILE: it is not printable ASCII"),
    ),
    (
        &[("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", "FOLDER/space")],
        Some("_FILE: it is not printable ASCII"),
    ),
    (
        &[("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", "FOLDER/none")],
        Some("No such file"),
    ),
    (
        &[("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", "FOLDER/empty")],
        Some("is empty"),
    ),
    (
        &[("RUNTIME_S3_SESSION_TOKEN_FILE", "FOLDER/long")],
        Some("has more than 16 KiB"),
    ),
    (
        &[("RUNTIME_S3_SESSION_TOKEN_FILE", "FOLDER/root")],
        Some("is not a file"),
    ),
    (
        &[("RUNTIME_S3_SESSION_TOKEN_FILE", "FOLDER/pipe")],
        Some("is not a file"),
    ),
    (&[("RUNTIME_MAX_PAUSE", "0")], None),
    (
        &[("RUNTIME_MAX_PAUSE", "1 s")],
        Some("is neither 0 nor a duration"),
    ),
    (
        &[("RUNTIME_MAX_PAUSE", "99999999999h")],
        Some("is neither 0 nor a duration"),
    ),
    (&[("RUNTIME_BACKUP_TIMEOUT", "8760h")], None),
    (
        &[("RUNTIME_BACKUP_TIMEOUT", "8761h")],
        Some("at most a year"),
    ),
    (&[("RUNTIME_BACKUP_TIMEOUT", "0s")], Some("longer than 0")),
    (
        &[("RUNTIME_RESTORE_TIMEOUT", "5")],
        Some("is not a duration"),
    ),
    (
        &[("RUNTIME_RESTORE_TIMEOUT", "18446744073709551615h")],
        Some("is not a duration"),
    ),
    (&[("RUNTIME_STORE_UNFENCED", "allow")], None),
    (&[("RUNTIME_STORE_UNFENCED", "yes")], Some("is not allow")),
    (&[("RUNTIME_RETENTION", "last=1")], None),
    (
        &[("RUNTIME_RETENTION", "last=all")],
        Some("is not a list such as"),
    ),
    (
        &[("RUNTIME_RETENTION", "last=4294967296")],
        Some("is not a list such as"),
    ),
    (
        &[("RUNTIME_RETENTION", "yearly=1")],
        Some("is not a list such as"),
    ),
    (&[("RUNTIME_EXCLUDE", "*.{log,tmp},/cache/")], None),
    (&[("RUNTIME_EXCLUDE", "[a")], Some("is not a pattern")),
    (&[("RUNTIME_EXCLUDE", "*.{log")], Some("is not a pattern")),
    (&[("RUNTIME_EXCLUDE", "a,,b")], Some("is an empty pattern")),
    (&[("RUNTIME_EXCLUDE", "a\nb")], Some("line break")),
    (&[("RUNTIME_LOG", "debug")], None),
    (
        &[("RUNTIME_LOG", "verbose")],
        Some("is none of error, warn, info and debug"),
    ),
];

/// A folder with everything in it that the table names.
fn disk() -> Disk {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    let disk = Disk::new();
    for (name, text) in [
        ("key", &b"a-secret\n"[..]),
        ("dos", b"a-secret\r\n"),
        ("endpoint", b"https://host\n"),
        ("region", b"eu-west-1\n"),
        ("two", b"a-secret\n\n"),
        ("space", b"a-secret \n"),
        ("empty", b"\n"),
        ("long", "x".repeat(16 * 1024 + 1).as_bytes()),
    ] {
        disk.write(name, text);
    }
    for (name, mode) in [("open", 0o707), ("group", 0o770)] {
        let path = disk.path(name);
        std::fs::create_dir(&path).expect("can make a folder");
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(path, mode).expect("it is ours");
    }
    for (name, target) in [("link", "root"), ("nowhere", "none"), ("loop", "loop")] {
        symlink(target, disk.path(name)).expect("can make a link");
    }
    let mode = nix::sys::stat::Mode::S_IRUSR;
    nix::unistd::mkfifo(Path::new(&disk.path("pipe")), mode).expect("can make a pipe");
    disk
}

#[test]
fn both_programs_judge_every_setting_of_the_agent_alike_and_show_no_secret() {
    let disk = disk();
    let mut golden = String::new();
    for (settings, refused) in AGENTS {
        let [agent, supervisor] = disk.check(settings);
        let code = if refused.is_some() { 64 } else { 0 };
        let said = [&agent, &supervisor].map(|output| text(&output.stderr));
        assert_eq!(agent.status.code(), Some(code), "{settings:?}: {}", said[0]);
        assert_eq!(
            supervisor.status.code(),
            Some(code),
            "{settings:?}: {}",
            said[1]
        );
        let same = said[0].replace("backup-agent: ", "supervisor: ");
        assert_eq!(said[1], same, "{settings:?}");
        for output in [agent, supervisor] {
            let all = text(&output.stdout) + &text(&output.stderr);
            assert!(!all.contains("a-secret"), "{settings:?}: {all}");
        }
        let Some(part) = refused else { continue };
        assert!(said[0].contains(part), "{settings:?}: {}", said[0]);
        for (name, value) in *settings {
            let _ = writeln!(golden, "{name}={}", value.escape_debug());
        }
        let folder = disk.path("");
        golden.push_str(&said[0].replace(folder.trim_end_matches('/'), "FOLDER"));
        golden.push('\n');
    }
    golden::compare("agent-settings.txt", &golden);
}

#[test]
fn settings_that_pass_the_check_serve_every_verb() {
    for (settings, refused) in AGENTS {
        let is_here =
            |(name, value): &(&str, &str)| *name != "RUNTIME_STORE" || value.starts_with("file://");
        if refused.is_some() || !settings.iter().all(is_here) {
            continue;
        }
        let disk = disk();
        let (root, state) = (disk.path("root"), disk.path("other-state"));
        let folder = disk.path("");
        let mut all = vec![
            ("RUNTIME_ROOT", root),
            ("RUNTIME_STATE", state),
            ("RUNTIME_GATEWAY_USER", surroundings::caller()),
        ];
        all.retain(|(name, _)| !settings.iter().any(|(other, _)| other == name));
        let given = settings.iter();
        all.extend(
            given.map(|(name, value)| {
                (*name, value.replace("FOLDER", folder.trim_end_matches('/')))
            }),
        );
        let all: Vec<(&str, &str)> = all
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        for (arguments, codes) in [
            (&["list"][..], &[0][..]),
            // There may be no root, and no snapshot.
            (&["backup"], &[0, 74]),
            (&["restore", "--yes"], &[0, 10]),
            (&["prune"], &[0]),
            (&["verify"], &[0, 10]),
        ] {
            let output = run("backup-agent", arguments, &all);
            let code = output.status.code().expect("it was not killed");
            let said = text(&output.stderr);
            assert!(
                codes.contains(&code),
                "{settings:?} {arguments:?}: {code} {said}"
            );
        }
    }
}

#[test]
fn each_bad_value_has_its_sentence() {
    let long = "x".repeat(513);
    let rows: Vec<Vec<(&str, &str)>> = vec![
        vec![("RUNTIME_SERVICE_TOKEN", "")],
        vec![("RUNTIME_SERVICE_TOKEN", "short")],
        vec![(
            "RUNTIME_SERVICE_TOKEN",
            "with a space 0123456789abcdefghijkl",
        )],
        vec![("RUNTIME_SERVICE_TOKEN", &long)],
        vec![("RUNTIME_SERVICE_TOKEN_FILE", "/no/such/file")],
        vec![("RUNTIME_SERVICE_TOKEN_FILE", "/proc/self")],
        vec![("RUNTIME_SERVICE_TOKEN_FILE", "/dev/zero")],
        vec![
            ("RUNTIME_SERVICE_TOKEN", TOKEN),
            ("RUNTIME_SERVICE_TOKEN_FILE", "/etc/hostname"),
        ],
        vec![("RUNTIME_LISTEN", "8080")],
        vec![("RUNTIME_LISTEN", "localhost:8080")],
        vec![("RUNTIME_LISTEN", "0.0.0.0:99999")],
        vec![("RUNTIME_INSTANCE_TYPE", "two words")],
        vec![("RUNTIME_GATEWAY_USER", "no-such-user")],
        vec![("RUNTIME_GATEWAY_USER", "4294967295")],
        vec![("RUNTIME_GATEWAY_URL", "https://127.0.0.1:1")],
        vec![("RUNTIME_GATEWAY_URL", "http://gateway:18789")],
        vec![("RUNTIME_GATEWAY_TOKEN", "a b")],
        vec![("RUNTIME_GATEWAY_PREPARE", "/no/such/file")],
        vec![("RUNTIME_STARTUP_TIMEOUT", "soon")],
        vec![("RUNTIME_STARTUP_TIMEOUT", "0")],
        vec![("RUNTIME_STOP_GRACE", "30")],
        vec![("RUNTIME_BACKUP_INTERVAL", "10ms")],
        vec![("RUNTIME_BACKUP_INTERVAL", "-5m")],
        vec![("RUNTIME_ON_RESTORE_FAILURE", "ignore")],
        vec![("RUNTIME_GATEWAY_LIMITS", "nofile")],
        vec![("RUNTIME_GATEWAY_LIMITS", "stack=1")],
    ];
    let mut golden = String::new();
    for row in rows {
        let output = check(&row);
        assert_eq!(output.status.code(), Some(64), "{row:?}");
        assert!(output.stdout.is_empty(), "{row:?}");
        let said = text(&output.stderr);
        assert!(
            said.starts_with("supervisor: cannot use RUNTIME_"),
            "{said}"
        );
        assert!(!said.contains(TOKEN), "{said}");
        for (name, value) in &row {
            let value = if *value == long { "x * 513" } else { value };
            let _ = writeln!(golden, "{name}={value}");
        }
        golden.push_str(&said);
        golden.push('\n');
    }
    golden::compare("settings.txt", &golden);
}

#[test]
fn a_value_that_is_not_text_is_refused() {
    use std::os::unix::ffi::OsStrExt as _;

    let output = program("supervisor")
        .arg("check")
        .env("RUNTIME_SERVICE_TOKEN", TOKEN)
        .env("RUNTIME_ROOT", std::ffi::OsStr::from_bytes(b"/data\xff"))
        .output()
        .expect("can be executed");
    assert_eq!(output.status.code(), Some(64));
    assert_eq!(
        text(&output.stderr),
        "supervisor: cannot use RUNTIME_ROOT: it is not valid UTF-8\n"
    );
}

#[test]
fn all_bad_settings_are_reported_at_once_and_nothing_starts() {
    let settings = [
        ("RUNTIME_LISTEN", "x"),
        ("RUNTIME_LOG", "x"),
        ("RUNTIME_STOP_GRACE", "x"),
        ("RUNTIME_RETENTION", "x"),
        ("RUNTIME_GATEWAY_USER", "no-such-user"),
    ];
    for (arguments, count) in [
        (&["check"][..], 6),
        (&["--", "true"], 6),
        (&[], 6),
        // It asks the one that runs, which has its own.
        (&["healthcheck"], 2),
    ] {
        let output = run("supervisor", arguments, &settings);
        assert_eq!(output.status.code(), Some(64));
        let said = text(&output.stderr);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), count, "{said}");
        assert!(
            lines
                .iter()
                .all(|line| line.starts_with("supervisor: cannot use RUNTIME_"))
        );
    }
}

#[test]
fn secrets_come_from_files_too_and_are_never_printed() {
    let folder = folder();
    let path = folder.path().join("token");
    std::fs::write(&path, format!("{TOKEN}\n")).expect("can write");
    let path = path.to_str().expect("is text");
    let output = check(&[
        ("RUNTIME_SERVICE_TOKEN_FILE", path),
        ("RUNTIME_GATEWAY_TOKEN", "gateway-secret"),
        ("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", path),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let printed = text(&output.stdout);
    for name in [
        "RUNTIME_SERVICE_TOKEN",
        "RUNTIME_GATEWAY_TOKEN",
        "RUNTIME_S3_SECRET_ACCESS_KEY",
    ] {
        assert!(
            printed.contains(&format!("{name}=[redacted]\n")),
            "{printed}"
        );
    }
    assert!(!printed.contains(TOKEN) && !printed.contains("gateway-secret"));
}

#[test]
fn an_s3_store_needs_credentials_and_is_fine_with_them() {
    let output = check(&[
        ("RUNTIME_STORE", "s3://bucket/prefix"),
        (
            "RUNTIME_S3_ENDPOINT",
            "https://account.r2.cloudflarestorage.com",
        ),
        ("RUNTIME_S3_ACCESS_KEY_ID", "key"),
        ("RUNTIME_S3_SECRET_ACCESS_KEY", "secret"),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn an_unknown_command_line_is_a_usage_error() {
    for arguments in [&["run"][..], &["--check"], &["check", "now"], &["openclaw"]] {
        let output = run("supervisor", arguments, &[]);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
    }
    for arguments in [["--help"], ["--version"]] {
        let output = run("supervisor", &arguments, &[]);
        assert_eq!(output.status.code(), Some(0));
        assert!(text(&output.stdout).contains("supervisor"));
    }
}

#[test]
fn what_stops_a_start_is_said_in_one_sentence() {
    let folder = folder();
    let program = folder.path().join("supervisor");
    place(&binary("supervisor"), &program);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = taken.local_addr().expect("is bound").to_string();
    let start = |arguments: &[&str]| {
        let mut command = Command::new(&program);
        surroundings::empty(&mut command);
        let output = command
            .args(arguments)
            .env("RUNTIME_SERVICE_TOKEN", TOKEN)
            .env("RUNTIME_LISTEN", &address)
            .output()
            .expect("can be executed");
        let said = text(&output.stderr).replace(&address, "ADDRESS");
        let said = said.replace(&folder.path().display().to_string(), "FOLDER");
        // The two C libraries word this differently.
        let said = said.replace("Address in use", "Address already in use");
        let lines: Vec<&str> = said.lines().filter(|line| !line.starts_with('{')).collect();
        format!(
            "{arguments:?} exits {:?}: {}\n",
            output.status.code(),
            lines.join("\n")
        )
    };
    let agent = folder.path().join("backup-agent");
    let mut golden = start(&["--", "true"]);
    std::fs::write(&agent, "").expect("can write");
    golden.push_str(&start(&["check"]));
    std::fs::remove_file(&agent).expect("it is there");
    // Something else, as after half of an update.
    place(Path::new("/bin/false"), &agent);
    golden.push_str(&start(&["check"]));
    std::fs::remove_file(&agent).expect("it is there");
    place(&binary("backup-agent"), &agent);
    golden.push_str(&start(&["--", "true"]));
    golden.push_str(&start(&["walk"]));
    drop(taken);
    golden.push_str(&start(&["healthcheck"]));
    golden::compare("startup.txt", &golden);
}

#[test]
fn the_documented_table_is_the_one_in_the_code() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/settings.md");
    let document = std::fs::read_to_string(document).expect("is there");
    let documented: BTreeMap<String, String> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `RUNTIME_"))
        .map(|row| {
            let (name, rest) = row.split_once('`').expect("the name is code");
            let default = rest
                .split('|')
                .nth(1)
                .expect("the second column is the default");
            (
                format!("RUNTIME_{name}"),
                default.trim().trim_matches('`').to_owned(),
            )
        })
        .collect();
    let token = [("RUNTIME_SERVICE_TOKEN", TOKEN)];
    let output = run("supervisor", &["check"], &token);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let in_force: BTreeMap<String, String> = text(&output.stdout)
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let names = |map: &BTreeMap<String, String>| map.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&documented), names(&in_force));
    for (name, value) in in_force {
        // These depend on the machine; the document says how.
        let varies = [
            "RUNTIME_SERVICE_TOKEN",
            "RUNTIME_GATEWAY_USER",
            "RUNTIME_GATEWAY_PREPARE",
        ];
        if !varies.contains(&name.as_str()) {
            let default = documented[&name].replace("$RUNTIME_STATE", "/var/lib/openclaw-runtime");
            assert_eq!(default.replace("unset", ""), value, "{name}");
        }
    }
}
