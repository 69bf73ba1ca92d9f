//! What `status` and the log tell whoever is woken at night: why, since when, how far, and no secret.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Stdio};

use e2e::http;
use e2e::supervisor::{Setup, TOKEN};
use e2e::wait::{until, until_some};
use serde_json::{Value, json};

// Words, which no rule about looks would take out.
const GIVEN: &str = "correct horse";
const STORE_KEY: &str = "battery-staple";

/// A supervisor that might hang is not left behind by a test that fails.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bearer() -> String {
    format!("Bearer {TOKEN}")
}

#[test]
fn a_gateway_that_never_comes_up_shows_what_it_wrote_without_secrets() {
    let setup = Setup::new()
        .with("RUNTIME_GATEWAY_TOKEN", "gateway-token-of-ours")
        .with("RUNTIME_S3_ACCESS_KEY_ID", "store-name")
        .with("RUNTIME_S3_SECRET_ACCESS_KEY", STORE_KEY)
        .with("SOME_API_KEY", GIVEN);
    let line = format!(
        "cannot open the database\n{GIVEN} {TOKEN} gateway-token-of-ours {STORE_KEY}\nAuthorization: Bearer abcdef\nsk-live-0123456789\n"
    );
    setup.behave(&json!({ "exit": 1, "stderr": line, "repeat": 100 }));
    let supervisor = setup.start();
    let first = supervisor.until_gateway("backoff");
    assert_eq!(first["gateway"]["stderrTail"], Value::Null);
    assert!(first["gateway"]["nextAttemptAt"].is_string());
    let status = until_some("what it wrote", || {
        let status = supervisor.status();
        status["gateway"]["stderrTail"]
            .is_string()
            .then_some(status)
    });
    assert!(supervisor.setup.starts().len() >= 5);
    let tail = status["gateway"]["stderrTail"].as_str().expect("is text");
    assert!(
        tail.contains("cannot open the database") && tail.len() <= 4096,
        "{tail}"
    );
    for secret in [
        "horse",
        TOKEN,
        "gateway-token-of-ours",
        STORE_KEY,
        "abcdef",
        "0123456789",
    ] {
        assert!(!tail.contains(secret), "{secret}: {tail}");
    }

    supervisor.setup.behave(&json!({}));
    supervisor.until_gateway("running");
    let status = supervisor.status();
    assert_eq!(status["gateway"]["stderrTail"], Value::Null);
    assert_eq!(status["gateway"]["nextAttemptAt"], Value::Null);
}

/// As a mailer, an address, JSON, Node.js and a shell write them.
#[test]
fn known_secrets_are_not_shown_in_any_escaping() {
    let written = [
        "login of bob with correct-horse refused",
        "GET https://h.example/login?p=p%40ss%2fword%2Bx 401",
        "pin 84729184 wrong",
        "{ key: 'k\\'ey with a quote' }",
        "{\"key\":\"k\\u0027ey with a quote\"}",
        "cannot decrypt with zebra-crossing",
    ];
    let setup = Setup::new()
        .with("SMTP_PASS", "correct-horse")
        .with("DB_PASSWORD", "p@ss/word+x")
        .with("API_PIN", "84729184")
        .with("OPENAI_API_KEY", "k'ey with a quote")
        .with("ENCRYPTION_KEY_2", "zebra-crossing");
    setup.behave(&json!({ "exit": 78, "stderr": written.join("\n") }));
    let supervisor = setup.start();
    supervisor.until_gateway("failed");
    let shown = until_some("what it wrote", || {
        let mut status = supervisor.status();
        let tail = status["gateway"]["stderrTail"].take();
        tail.as_str().map(str::to_owned)
    });
    let expected = [
        "login of bob with [redacted] refused",
        "GET https://h.example/login?p=[redacted] 401",
        "pin [redacted] wrong",
        "{ key: '[redacted]' }",
        "{\"key\":\"[redacted]\"}",
        "cannot decrypt with [redacted]",
    ];
    assert_eq!(shown, expected.join("\n"));
}

#[test]
fn a_gateway_that_refuses_its_configuration_shows_why_at_once() {
    let setup = Setup::new();
    setup.behave(&json!({ "exit": 78, "stderr": "gateway.port must be a number" }));
    let supervisor = setup.start();
    supervisor.until_gateway("failed");
    until("what it wrote", || {
        supervisor.status()["gateway"]["stderrTail"] == "gateway.port must be a number"
    });
    assert!(supervisor.status()["gateway"]["nextAttemptAt"].is_string());
}

#[test]
fn what_the_gateway_writes_is_passed_on_unchanged() {
    let setup = Setup::new();
    let lines = [
        "short".to_owned(),
        "  \u{1b}[31mcolours\u{1b}[0m and \t {\"json\":\"sk-live-0123456789\"}".to_owned(),
        "x".repeat(4095),
        "y".repeat(4096),
        "z".repeat(30_000),
        "without an end".to_owned(),
    ];
    setup.behave(&json!({ "stderr": lines.join("\n"), "exit": 0 }));
    let supervisor = setup.start();
    supervisor.until_gateway("backoff");
    until("all lines", || {
        let log = supervisor.log();
        lines
            .iter()
            .all(|line| log.lines().any(|found| found.starts_with(line)))
    });
}

#[test]
fn a_log_that_nobody_reads_holds_up_neither_the_gateway_nor_the_api() {
    let api: SocketAddr = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("there is a free port");
    let setup = Setup::new()
        .with("RUNTIME_LISTEN", &api.to_string())
        .with("RUNTIME_LOG", "debug");
    setup.behave(&json!({ "stderr": format!("{}\n", "x".repeat(1023)), "repeat": 2000 }));
    let mut program = setup.program();
    let child = program.stderr(Stdio::piped()).spawn();
    let mut child = Killed(child.expect("can be executed"));
    let authorization = bearer();
    let get = || {
        std::net::TcpStream::connect(api).ok()?;
        let headers = [("Authorization", authorization.as_str())];
        Some(http::request(api, "GET", "/v1/status", &headers, b""))
    };
    let is_running =
        || get().is_some_and(|answer| answer.body["data"]["gateway"]["status"] == "running");
    until("a gateway that runs", is_running);
    for _ in 0..1000 {
        assert_eq!(get().expect("is answered").status, 200);
    }
    // As the pipe is still held, only the signal ends it.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.0.id()).expect("pids fit"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("is ours");
    let status = until_some("its end", || child.0.try_wait().expect("is our child"));
    assert_eq!(status.code(), Some(0));
}

#[test]
fn work_under_way_says_how_far_it_is() {
    let setup = Setup::new();
    let line = |done: u64| {
        json!({ "ts": "t", "level": "info", "msg": "progress", "work": "x", "doneBytes": done, "totalBytes": 900,
            "bytesPerSecond": 7 })
        .to_string()
    };
    let answer = json!({ "snapshot": "s", "time": "2026-11-22T09:00:45.000Z", "unchanged": false, "pauseMs": 12,
        "rounds": 2 });
    let steps = |first: u64| json!([{ "stderr": [line(first), "another line", line(first + 1)], "gate": format!("go-{first}"), "answer": answer }]);
    setup.agent("restore", &steps(10));
    setup.agent("backup", &steps(20));
    let supervisor = setup.start();
    let progress = |part: &str, done: u64| {
        until(&format!("progress of {part}"), || {
            supervisor.status()[part]["progress"]["doneBytes"] == done
        });
        let status = supervisor.status();
        assert_eq!(status[part]["progress"]["totalBytes"], 900);
        assert!(status[part]["progress"]["bytesPerSecond"].is_u64());
        status
    };
    let status = progress("restore", 11);
    assert_eq!(status["backup"]["progress"], Value::Null);
    supervisor.setup.open_gate("go-10");
    supervisor.until_running(1);
    assert_eq!(supervisor.status()["restore"]["progress"], Value::Null);
    std::thread::scope(|scope| {
        let call = scope.spawn(|| supervisor.post("/v1/backup"));
        let status = progress("backup", 21);
        assert_eq!(status["backup"]["pauseMs"], Value::Null);
        supervisor.setup.open_gate("go-20");
        let answer = call.join().expect("answers");
        assert_eq!(
            (
                &answer.body["data"]["pauseMs"],
                &answer.body["data"]["rounds"]
            ),
            (&json!(12), &json!(2))
        );
    });
    let backup = &supervisor.status()["backup"];
    assert_eq!(backup["progress"], Value::Null);
    assert_eq!(
        (&backup["pauseMs"], &backup["rounds"]),
        (&json!(12), &json!(2))
    );
    let log = supervisor.log();
    assert!(
        log.contains("another line") && !log.contains("doneBytes"),
        "{log}"
    );
}

/// What each of `POST /v1/backup`, `backup` of the status and the log has about the last snapshot.
fn told(supervisor: &e2e::supervisor::Supervisor) -> [Value; 3] {
    let mut answer = supervisor.post("/v1/backup");
    assert_eq!(answer.status, 200, "{answer:?}");
    let backups = supervisor.setup.agent_calls("backup").len();
    let line = until_some("its line", || {
        let log = supervisor.log();
        let mut lines = log.lines().filter(|line| line.contains("\"backed up\""));
        lines.nth(backups - 1).map(str::to_owned)
    });
    let line = serde_json::from_str(&line).expect("is JSON");
    [
        answer.body["data"].take(),
        supervisor.status()["backup"].take(),
        line,
    ]
}

#[test]
fn what_a_snapshot_lacks_is_in_the_answer_the_status_and_the_log() {
    let setup = Setup::new();
    let reason = "root lacks the capability SYS_PTRACE here (docker run --cap-add)";
    let unread = json!({ "count": 2, "paths": ["a/b", "c"] });
    let real = json!({ "snapshot": "s", "unchanged": false, "consistency": "per-file", "consistencyReason": reason,
        "skipped": 3, "unread": unread, "fork": true, "warning": "the tree shrank", "rounds": 2, "pauseMs": 38 });
    let mut unchanged = real.clone();
    unchanged["unchanged"] = true.into();
    unchanged["rounds"] = 0.into();
    unchanged["pauseMs"] = Value::Null;
    let mut good = real.clone();
    good["consistency"] = "instant".into();
    good["consistencyReason"] = Value::Null;
    good["unread"] = json!({ "count": 0, "paths": [] });
    good["skipped"] = 0.into();
    good["fork"] = false.into();
    good["warning"] = Value::Null;
    let steps = [&real, &unchanged, &good, &real].map(|answer| json!({ "answer": answer }));
    setup.agent("backup", &json!(steps));
    let supervisor = setup.start();
    supervisor.until_running(1);
    let before = supervisor.status()["backup"].take();
    assert_eq!(
        (&before["consistency"], &before["unread"], &before["fork"]),
        (&Value::Null, &Value::Null, &json!(false))
    );

    let warnings = || {
        let log = supervisor.log();
        let said = |text: &str| {
            let lines = log.lines().filter(|line| line.contains("\"warn\""));
            lines.filter(|line| line.contains(text)).count()
        };
        (said(reason), said("the tree shrank"))
    };
    for (answer, times) in [(&real, 1), (&unchanged, 1), (&good, 1), (&real, 2)] {
        for (place, found) in ["answer", "status", "log"].iter().zip(told(&supervisor)) {
            for name in ["consistency", "skipped", "unread", "fork"] {
                assert_eq!(found[name], answer[name], "{name} in the {place}");
            }
            // The status keeps what the last real snapshot took.
            let took = if *place == "status" { &real } else { answer };
            let names = match *place {
                "log" => ["rounds", "pause_ms"],
                _ => ["rounds", "pauseMs"],
            };
            for (name, said) in names.iter().zip(["rounds", "pauseMs"]) {
                assert_eq!(found[name], took[said], "{name} in the {place}");
            }
            if *place != "log" {
                assert_eq!(found["warning"], answer["warning"]);
                assert_eq!(found["consistencyReason"], answer["consistencyReason"]);
            }
        }
        // Said when it comes up, not at each backup.
        until("the warnings", || warnings() == (times, times));
    }
}

#[test]
fn what_the_agent_says_is_bounded_before_it_is_kept() {
    let setup = Setup::new();
    let long = "x".repeat(20_000);
    let paths = vec![long.clone(); 40];
    setup.agent(
        "backup",
        &json!([{ "answer": { "snapshot": long, "time": long, "consistency": long, "consistencyReason": long,
            "warning": long, "unread": { "count": 40, "paths": paths }, "files": long, "rounds": [long] } }]),
    );
    let supervisor = setup.start();
    supervisor.until_running(1);
    for found in told(&supervisor) {
        let unread = &found["unread"];
        assert_eq!(unread["count"], 40);
        assert_eq!(unread["paths"].as_array().map(Vec::len), Some(16));
        assert!(found.to_string().len() < 24 * 1024);
    }
}
