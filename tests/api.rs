//! Every row of the API's tables, over real connections.

use std::io::Write as _;
use std::net::TcpStream;
use std::thread;

use e2e::http::{self, Response};
use e2e::supervisor::{Setup, Supervisor, TOKEN, failure};
use e2e::wait::until;
use serde_json::json;

const WRONG: &str = "service-token-0123456789abcdefghiX";

const PATHS: [(&str, &str); 5] = [
    ("/v1/status", "GET"),
    ("/v1/restart", "POST"),
    ("/v1/backup", "POST"),
    ("/v1/devices", "GET"),
    ("/v1/devices/some-id/approve", "POST"),
];

const METHODS: [&str; 8] = [
    "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW",
];

fn running(setup: Setup) -> Supervisor {
    let supervisor = setup.start();
    supervisor.until_running(1);
    supervisor
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

// Tokens

#[test]
fn without_a_valid_token_every_path_and_method_is_401() {
    let supervisor = running(Setup::new());
    let bearers = [
        bearer(WRONG),
        bearer(""),
        bearer(&TOKEN[1..]),
        TOKEN.to_owned(),
        format!("Basic {TOKEN}"),
    ];
    let mut wrong: Vec<Vec<(&str, &str)>> =
        vec![vec![], vec![("X-OpenAgents-Service-Token", WRONG)]];
    wrong.extend(
        bearers
            .iter()
            .map(|value| vec![("Authorization", value.as_str())]),
    );
    let paths = PATHS.map(|(path, _)| path);
    for path in paths
        .iter()
        .chain(&["/", "/nothing", "/v1/status/", "/v1/%zz"])
    {
        for method in METHODS {
            for headers in &wrong {
                let answer = http::request(supervisor.api, method, path, headers, b"");
                assert_eq!(
                    (answer.status, answer.code()),
                    (401, "unauthorized"),
                    "{method} {path} {headers:?}"
                );
                assert!(answer.is_enveloped());
            }
        }
    }
    assert_eq!(supervisor.setup.starts().len(), 1);
    assert!(supervisor.setup.agent_calls("backup").is_empty());
    assert!(!supervisor.log().contains(WRONG) && !supervisor.log().contains("/nothing"));
}

#[test]
fn either_header_with_the_token_is_enough() {
    let supervisor = running(Setup::new());
    let (right, wrong) = (bearer(TOKEN), bearer(WRONG));
    for headers in [
        vec![("Authorization", right.as_str())],
        vec![("authorization", right.as_str())],
        vec![("X-OpenAgents-Service-Token", TOKEN)],
        vec![
            ("Authorization", wrong.as_str()),
            ("X-OpenAgents-Service-Token", TOKEN),
        ],
        vec![
            ("Authorization", right.as_str()),
            ("X-OpenAgents-Service-Token", WRONG),
        ],
    ] {
        let answer = http::request(supervisor.api, "GET", "/v1/status", &headers, b"");
        assert_eq!(answer.status, 200, "{headers:?}");
    }
}

// Paths, methods, bodies

#[test]
fn every_path_takes_its_one_method_and_names_it_to_others() {
    let supervisor = running(Setup::new());
    for (path, allowed) in PATHS {
        for method in METHODS {
            let answer = supervisor.request(method, path);
            assert!(answer.is_enveloped(), "{method} {path} {answer:?}");
            if method == allowed {
                assert_ne!(answer.status, 405, "{method} {path}");
            } else {
                assert_eq!(
                    (answer.status, answer.code()),
                    (405, "method_not_allowed"),
                    "{method} {path}"
                );
                assert_eq!(answer.header("allow"), Some(allowed));
            }
        }
    }
    // A HEAD has no body to look at.
    assert_eq!(supervisor.request("HEAD", "/v1/status").status, 405);
}

#[test]
fn everything_else_is_404_and_malformed_paths_are_400() {
    let supervisor = running(Setup::new());
    for path in [
        "/",
        "/v1",
        "/v1/status/",
        "/v1//status",
        "/V1/status",
        "/v1/devices/x",
        "/v1/devices/a/b/approve",
        "/healthz",
    ] {
        let answer = supervisor.get(path);
        assert_eq!((answer.status, answer.code()), (404, "not_found"), "{path}");
        assert!(answer.is_enveloped());
    }
    for path in ["/v1/%", "/v1/%zz", "/v1/status%2", "*"] {
        let method = if path == "*" { "OPTIONS" } else { "GET" };
        let answer = supervisor.request(method, path);
        assert_eq!(
            (answer.status, answer.code()),
            (400, "invalid_request"),
            "{path}"
        );
    }
    let long = format!("/v1/devices/{}/approve", "x".repeat(129));
    for path in [
        "/v1/devices//approve",
        "/v1/devices/a%2Fb/approve",
        "/v1/devices/a%00/approve",
        "/v1/devices/%C3%A9/approve",
        long.as_str(),
    ] {
        let answer = supervisor.post(path);
        assert_eq!(
            (answer.status, answer.code()),
            (400, "invalid_request"),
            "{path}"
        );
    }
    assert_eq!(supervisor.get("/v1/status?verbose=1").status, 200);
}

#[test]
fn a_small_body_is_ignored_and_a_large_one_refused() {
    let supervisor = running(Setup::new());
    let token = bearer(TOKEN);
    let headers = [("Authorization", token.as_str())];
    let send = |body: &[u8]| http::request(supervisor.api, "POST", "/v1/backup", &headers, body);
    assert_eq!(send(b"{}").status, 200);
    assert_eq!(send(&vec![b'x'; 16 * 1024]).status, 200);
    let is_refused = |answer: &Response| {
        answer.status == 400 && answer.body["error"] == "the body is larger than 16 KiB"
    };
    assert!(is_refused(&send(&vec![b'x'; 16 * 1024 + 1])));
    // Its length may be told only as it comes, or promised and never come.
    let head = format!("POST /v1/backup HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n");
    let chunk = format!("1000\r\n{}\r\n", "x".repeat(4096));
    let chunks = chunk.repeat(5);
    for rest in [
        format!("Transfer-Encoding: chunked\r\n\r\n{chunks}0\r\n\r\n"),
        "Content-Length: 99999999999\r\n\r\nx".to_owned(),
    ] {
        let answer = http::raw(supervisor.api, format!("{head}{rest}").as_bytes());
        assert!(
            is_refused(&http::parse(&answer).expect("is answered")),
            "{answer}"
        );
    }
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 2);
}

#[test]
fn malformed_requests_are_refused_and_hurt_nobody() {
    let supervisor = running(Setup::new());
    let many = "X: y\r\n".repeat(200);
    for request in [
        "\r\n\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        "GET /v1/status HTTP/9.9\r\n\r\n".to_owned(),
        "GET /v1/status HTTP/1.1\r\nbroken header\r\n\r\n".to_owned(),
        "GET /v1/st atus HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        format!(
            "GET /v1/status HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
            "y".repeat(100_000)
        ),
        format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "y".repeat(100_000)),
        format!("GET /v1/status HTTP/1.1\r\n{many}\r\n"),
        "POST /v1/backup HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n".to_owned(),
        "POST /v1/backup HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
            .to_owned(),
        "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}\u{1}\u{fc}\u{3}\u{3}".to_owned() + &"\0".repeat(500),
    ] {
        let answer = http::raw(supervisor.api, request.as_bytes());
        let is_refused = |answer: Response| answer.status >= 400 && answer.is_enveloped();
        assert!(
            http::parse(&answer).is_none_or(is_refused),
            "{request:?}: {answer:?}"
        );
    }
    assert_eq!(supervisor.get("/v1/status").status, 200);
}

#[test]
fn connections_that_say_nothing_do_not_keep_others_out() {
    let supervisor = running(Setup::new());
    let silent: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = TcpStream::connect(supervisor.api).expect("can connect");
            stream
                .write_all(b"GET /v1/status HTTP/1.1\r\nX: ")
                .expect("can write");
            stream
        })
        .collect();
    assert_eq!(supervisor.get("/v1/status").status, 200);
    drop(silent);
}

// Status and restart

#[test]
fn fifty_requests_at_once_during_a_restart_are_all_answered() {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "500ms");
    setup.behave(&json!({ "deaf": true }));
    let supervisor = running(setup);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    thread::scope(|scope| {
        let calls: Vec<_> = (0..50)
            .map(|number| {
                let supervisor = &supervisor;
                scope.spawn(move || match number % 5 {
                    0 => (supervisor.post("/v1/restart"), 202),
                    1 => (supervisor.post("/v1/backup"), 200),
                    2 => (supervisor.get("/v1/devices"), 503),
                    _ => (supervisor.get("/v1/status"), 200),
                })
            })
            .collect();
        for call in calls {
            let (answer, expected) = call.join().expect("answers");
            // The restart may be over before the last of them is asked.
            assert!(
                answer.status == expected || answer.status == 200,
                "{answer:?}"
            );
            assert!(answer.is_enveloped());
        }
    });
    supervisor.until_running(2);
}

#[test]
fn restarts_at_once_are_one_restart() {
    let setup = Setup::new().with("RUNTIME_STOP_GRACE", "500ms");
    setup.behave(&json!({ "deaf": true }));
    let supervisor = running(setup);
    thread::scope(|scope| {
        let calls: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| supervisor.post("/v1/restart")))
            .collect();
        for call in calls {
            let answer = call.join().expect("answers");
            assert_eq!(answer.status, 202);
            assert_eq!(
                answer.body["data"],
                json!({ "message": "restarting", "generation": 2 })
            );
        }
    });
    supervisor.until_running(2);
    assert_eq!(supervisor.status()["gateway"]["restarts"], 1);
    let next = supervisor.post("/v1/restart");
    assert_eq!(next.body["data"]["generation"], 3);
}

#[test]
fn a_restart_during_a_backoff_does_not_wait_for_it() {
    let setup = Setup::new();
    setup.behave(&json!({ "exit": 1 }));
    let supervisor = setup.start();
    supervisor.until_gateway("backoff");
    supervisor.setup.behave(&json!({}));
    let answer = supervisor.post("/v1/restart");
    assert_eq!(answer.status, 202);
    let generation = answer.body["data"]["generation"]
        .as_u64()
        .expect("is a number");
    supervisor.until_gateway("running");
    assert_eq!(supervisor.setup.starts().len() as u64, generation);
}

// Backup

#[test]
fn backups_at_once_share_one_run_and_its_answer() {
    let setup = Setup::new();
    setup.agent("backup", &json!([
        { "gate": "go", "answer": { "snapshot": "shared", "time": "2026-11-22T00:00:00.000Z", "unchanged": false,
            "bytesUploaded": 5, "files": 2, "durationMs": 9 } },
        { "answer": { "snapshot": "another" } },
    ]));
    let supervisor = running(setup);
    thread::scope(|scope| {
        let calls: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| supervisor.post("/v1/backup")))
            .collect();
        // All have been sent when none is left in a queue; the status tells the run they share.
        until("the run", || {
            supervisor.status()["backup"]["status"] == "running"
        });
        until("four connections", || connections(&supervisor) == 4);
        supervisor.setup.open_gate("go");
        for call in calls {
            let answer = call.join().expect("answers");
            assert_eq!(answer.status, 200);
            let expected = json!({ "lastBackup": "2026-11-22T00:00:00.000Z", "snapshot": "shared", "unchanged": false,
                "bytesUploaded": 5, "files": 2, "durationMs": 9, "pauseMs": null, "rounds": null, "consistency": null,
                "consistencyReason": null, "skipped": null, "unread": null, "fork": false, "warning": null });
            assert_eq!(answer.body["data"], expected);
        }
    });
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 1);
}

/// Connections to the API that are open and whose request has been read.
fn connections(supervisor: &Supervisor) -> usize {
    let port = format!(":{:04X}", supervisor.api.port());
    let table = std::fs::read_to_string("/proc/net/tcp").expect("is there");
    table
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // Established (01), on the server's side, with nothing left to read.
            (fields[1].ends_with(&port) && fields[3] == "01")
                .then(|| fields[4].ends_with(":00000000"))
        })
        .filter(|is_read| *is_read)
        .count()
}

#[test]
fn a_failed_backup_says_what_kind_of_failure_it_is() {
    for (exit, word, status, code, retry) in [
        (12, "fenced", 409, "fenced", None),
        (
            75,
            "store_unavailable",
            503,
            "store_unavailable",
            Some("30"),
        ),
        (124, "timeout", 504, "timeout", None),
        (1, "internal", 500, "internal", None),
        (74, "local", 500, "internal", None),
        (74, "root_lost", 409, "backup_disabled", None),
        (74, "restore_unfinished", 409, "backup_disabled", None),
    ] {
        let setup = Setup::new();
        setup.agent("backup", &failure(exit, word));
        let supervisor = running(setup);
        let answer = supervisor.post("/v1/backup");
        assert_eq!((answer.status, answer.code()), (status, code));
        assert_eq!(answer.header("retry-after"), retry);
        assert!(answer.is_enveloped());
        let backup = &supervisor.status()["backup"];
        assert_eq!(backup["lastError"], format!("the fake says {word}"));
        assert!(backup["lastErrorAt"].is_string());
    }
}

#[test]
fn an_agent_that_dies_or_talks_nonsense_is_a_500_and_the_next_backup_works() {
    let setup = Setup::new();
    setup.agent(
        "backup",
        &json!([
            { "aborts": true, "answer": {} },
            { "closesOutput": true },
            { "answer": "nonsense" },
            { "exit": 75, "answer": null },
            { "answer": { "snapshot": "good" } },
        ]),
    );
    let supervisor = running(setup);
    for (status, code) in [
        (500, "internal"),
        (500, "internal"),
        (500, "internal"),
        (503, "store_unavailable"),
    ] {
        let answer = supervisor.post("/v1/backup");
        assert_eq!((answer.status, answer.code()), (status, code));
    }
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.status()["backup"]["lastError"], json!(null));
}

#[test]
fn a_secret_in_the_agents_words_reaches_neither_answer_nor_log() {
    const SECRETS: [&str; 3] = [
        "s3-secret-key-0123456789",
        "gateway-secret-0123456789",
        TOKEN,
    ];
    let setup = Setup::new()
        .with("RUNTIME_GATEWAY_TOKEN", SECRETS[1])
        .with("RUNTIME_S3_SECRET_ACCESS_KEY", SECRETS[0]);
    setup.agent(
        "backup",
        &json!([{ "exit": 1, "answer": { "error": format!("refused {}", SECRETS.join(" ")) } }]),
    );
    let supervisor = running(setup);
    let answer = supervisor.post("/v1/backup");
    assert_eq!(
        answer.body["error"],
        "refused [redacted] [redacted] [redacted]"
    );
    let everything = format!("{} {}", supervisor.status(), supervisor.log());
    assert!(SECRETS.iter().all(|secret| !everything.contains(secret)));
}

#[test]
fn a_backup_that_outlives_its_caller_still_counts() {
    let setup = Setup::new();
    setup.agent(
        "backup",
        &json!([{ "gate": "go", "answer": { "snapshot": "done" } }]),
    );
    let supervisor = running(setup);
    let mut stream = TcpStream::connect(supervisor.api).expect("can connect");
    let request = format!(
        "POST /v1/backup HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\n\r\n",
        bearer(TOKEN)
    );
    stream.write_all(request.as_bytes()).expect("can write");
    until("the run", || {
        supervisor.setup.agent_calls("backup").len() == 1
    });
    drop(stream);
    supervisor.setup.open_gate("go");
    until("the snapshot", || {
        supervisor.status()["backup"]["snapshot"] == "done"
    });
}

// Devices

fn with_devices() -> Setup {
    let setup = Setup::new();
    setup.devices(&json!({
        "pending": [{ "requestId": "request:1", "deviceId": "d1", "publicKey": "k1", "role": "operator", "ts": 1 }],
        "paired": [{ "deviceId": "d2", "publicKey": "k2", "tokens": [{ "role": "node", "token": "device-secret" }] }],
    }));
    setup
}

#[test]
fn devices_are_listed_and_approved_without_their_tokens() {
    let supervisor = running(with_devices());
    let list = supervisor.get("/v1/devices");
    assert_eq!(list.status, 200);
    assert_eq!(list.body["data"]["pending"][0]["requestId"], "request:1");
    assert_eq!(
        list.body["data"]["paired"],
        json!([{ "deviceId": "d2", "publicKey": "k2" }])
    );

    let first = supervisor.post("/v1/devices/request:1/approve");
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.body["data"]["approved"], true);
    assert_eq!(first.body["data"]["requestId"], "request:1");
    assert_eq!(first.body["data"]["device"]["deviceId"], "d1");
    assert!(!first.body.to_string().contains("device-secret"));

    // Again, escaped differently, and after a restart of the gateway.
    assert_eq!(
        supervisor.post("/v1/devices/request%3A1/approve").body,
        first.body
    );
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    supervisor.until_running(2);
    assert_eq!(
        supervisor.post("/v1/devices/request:1/approve").body,
        first.body
    );
    assert_eq!(
        supervisor.get("/v1/devices").body["data"]["pending"],
        json!([])
    );
}

#[test]
fn an_unknown_pairing_request_is_404() {
    let supervisor = running(with_devices());
    let answer = supervisor.post("/v1/devices/other/approve");
    assert_eq!((answer.status, answer.code()), (404, "unknown_request"));
    assert!(answer.is_enveloped());
}

#[test]
fn a_token_in_the_gateways_configuration_wins_unless_it_cannot_be_used() {
    let supervisor = running(with_devices());
    let folder = supervisor.setup.root().join(".openclaw");
    std::fs::create_dir_all(&folder).expect("can make folders");
    for text in [
        r#"{"gateway":{"auth":{"token":"of-the-file"}}}"#,
        r#"{"gateway":{"auth":{"token":{"source":"env"}}}}"#,
        "{ /* JSON5 */ gateway: {} }",
        "{}",
    ] {
        std::fs::write(folder.join("openclaw.json"), text).expect("can write");
        assert_eq!(supervisor.get("/v1/devices").status, 200, "{text}");
    }
}

#[test]
fn a_link_planted_as_the_gateways_configuration_is_not_followed() {
    let supervisor = running(with_devices());
    let folder = supervisor.setup.root().join(".openclaw");
    std::fs::create_dir_all(&folder).expect("can make folders");
    let elsewhere = supervisor.setup.folder.path().join("elsewhere.json");
    std::fs::write(&elsewhere, r#"{"gateway":{"auth":{"token":"planted"}}}"#).expect("can write");
    std::os::unix::fs::symlink(elsewhere, folder.join("openclaw.json")).expect("can link");
    // The fake follows it and expects "planted"; we do not, so we are refused, and say so.
    let answer = supervisor.get("/v1/devices");
    assert_eq!((answer.status, answer.code()), (503, "gateway_unavailable"));
    assert!(
        answer.body["error"]
            .as_str()
            .expect("is text")
            .contains("AUTH_TOKEN_MISMATCH")
    );
}

#[test]
fn devices_need_a_gateway_that_runs() {
    let setup = with_devices();
    setup.behave(&json!({ "exit": 78 }));
    let supervisor = setup.start();
    supervisor.until_gateway("failed");
    for answer in [
        supervisor.get("/v1/devices"),
        supervisor.post("/v1/devices/x/approve"),
    ] {
        assert_eq!((answer.status, answer.code()), (503, "gateway_unavailable"));
        assert_eq!(answer.header("retry-after"), Some("5"));
    }
}

#[test]
fn a_gateway_that_says_nothing_is_a_timeout_and_keeps_nobody_else_waiting() {
    let setup = with_devices();
    setup.behave(&json!({ "silent": true }));
    let supervisor = running(setup);
    thread::scope(|scope| {
        let call = scope.spawn(|| supervisor.get("/v1/devices"));
        until("the call", || connections(&supervisor) == 1);
        assert_eq!(supervisor.get("/v1/status").status, 200);
        let answer = call.join().expect("answers");
        assert_eq!((answer.status, answer.code()), (504, "timeout"));
    });
}
