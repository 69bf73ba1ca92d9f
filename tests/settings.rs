//! Settings: what is refused, how it is said, and that the documentation lists what there is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use e2e::binaries::binary;
use e2e::golden;
use e2e::supervisor::{TOKEN, place};
use e2e::surroundings::{self, folder, program};

fn run(arguments: &[&str], settings: &[(&str, &str)]) -> Output {
    program("supervisor")
        .args(arguments)
        .envs(settings.iter().copied())
        .output()
        .expect("can be executed")
}

fn check(settings: &[(&str, &str)]) -> Output {
    let mut all = vec![("RUNTIME_SERVICE_TOKEN", TOKEN)];
    all.retain(|(name, _)| {
        !settings
            .iter()
            .any(|(other, _)| other == name || *other == format!("{name}_FILE"))
    });
    all.extend(settings);
    run(&["check"], &all)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn each_bad_value_has_its_sentence() {
    const S3: [(&str, &str); 1] = [("RUNTIME_STORE", "s3://bucket/prefix")];
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
        vec![("RUNTIME_INSTANCE_ID", "Not/Valid")],
        vec![("RUNTIME_INSTANCE_TYPE", "two words")],
        vec![("RUNTIME_ROOT", "data")],
        vec![("RUNTIME_ROOT", "/")],
        vec![("RUNTIME_ROOT", "/data/../etc")],
        vec![("RUNTIME_STATE", "state")],
        vec![("RUNTIME_STATE", "/data/state")],
        vec![("RUNTIME_STORE", "ftp://x")],
        vec![("RUNTIME_STORE", "s3://")],
        vec![("RUNTIME_STORE", "file://relative")],
        vec![("RUNTIME_STORE", "file:///data/store")],
        S3.to_vec(),
        [
            &S3[..],
            &[("RUNTIME_S3_ENDPOINT", "https://user:secret@host")],
        ]
        .concat(),
        vec![("RUNTIME_S3_ENDPOINT", "host")],
        vec![("RUNTIME_S3_REGION", "a b")],
        vec![("RUNTIME_S3_ACCESS_KEY_ID", "a b")],
        vec![("RUNTIME_S3_SECRET_ACCESS_KEY", "a\tb")],
        vec![("RUNTIME_S3_SESSION_TOKEN_FILE", "/no/such/file")],
        vec![("RUNTIME_GATEWAY_USER", "no-such-user")],
        vec![("RUNTIME_GATEWAY_URL", "https://127.0.0.1:1")],
        vec![("RUNTIME_GATEWAY_URL", "http://gateway:18789")],
        vec![("RUNTIME_GATEWAY_TOKEN", "a b")],
        vec![("RUNTIME_GATEWAY_PREPARE", "/no/such/file")],
        vec![("RUNTIME_STARTUP_TIMEOUT", "soon")],
        vec![("RUNTIME_STARTUP_TIMEOUT", "0")],
        vec![("RUNTIME_STOP_GRACE", "30")],
        vec![("RUNTIME_BACKUP_INTERVAL", "10ms")],
        vec![("RUNTIME_BACKUP_INTERVAL", "-5m")],
        vec![("RUNTIME_MAX_PAUSE", "1 s")],
        vec![("RUNTIME_ON_RESTORE_FAILURE", "ignore")],
        vec![("RUNTIME_BACKUP_TIMEOUT", "0s")],
        vec![("RUNTIME_RESTORE_TIMEOUT", "99999h")],
        vec![("RUNTIME_STORE_UNFENCED", "yes")],
        vec![("RUNTIME_GATEWAY_LIMITS", "nofile")],
        vec![("RUNTIME_GATEWAY_LIMITS", "stack=1")],
        vec![("RUNTIME_RETENTION", "last=all")],
        vec![("RUNTIME_EXCLUDE", "a,,b")],
        vec![("RUNTIME_LOG", "verbose")],
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
        assert!(!said.contains("secret@") && !said.contains(TOKEN), "{said}");
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
        "supervisor: cannot use RUNTIME_ROOT: it is not UTF-8\n"
    );
}

#[test]
fn all_bad_settings_are_reported_at_once_and_nothing_starts() {
    let settings = [
        ("RUNTIME_LISTEN", "x"),
        ("RUNTIME_LOG", "x"),
        ("RUNTIME_STOP_GRACE", "x"),
    ];
    for arguments in [&["check"][..], &["healthcheck"], &["--", "true"], &[]] {
        let output = run(arguments, &settings);
        assert_eq!(output.status.code(), Some(64));
        let said = text(&output.stderr);
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), 4, "{said}");
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
        let output = run(arguments, &[]);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}");
    }
    for arguments in [["--help"], ["--version"]] {
        let output = run(&arguments, &[]);
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
    let mut golden = start(&["--", "true"]);
    std::fs::write(folder.path().join("backup-agent"), "").expect("can write");
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
    let output = check(&[]);
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
