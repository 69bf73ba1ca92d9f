//! The API among strangers: whatever they send, however many there are, whoever holds the token is answered.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use e2e::http::{self, Response};
use e2e::supervisor::{Setup, Supervisor, TOKEN};
use e2e::wait::until;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use rustix::net::{self, AddressFamily, SocketType, sockopt};
use serde_json::{Value, json};

fn running(setup: Setup) -> Supervisor {
    let supervisor = setup.start();
    supervisor.until_running(1);
    supervisor
}

fn head(method: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n")
}

fn status_request() -> String {
    head("GET", "/v1/status") + "\r\n"
}

/// One answer on a connection that stays.
fn ask(stream: &mut TcpStream) -> Option<Response> {
    stream.write_all(status_request().as_bytes()).ok()?;
    let mut text = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let count = stream.read(&mut piece).ok().filter(|count| *count > 0)?;
        text.extend_from_slice(&piece[..count]);
        if let Some(answers) = http::answers(&String::from_utf8_lossy(&text)) {
            return answers.into_iter().next();
        }
    }
}

#[test]
fn ten_thousand_connections_do_not_keep_the_token_out() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("there is one");
    let supervisor = running(Setup::new());
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit anybody may");
    let at_once = usize::try_from(hard)
        .unwrap_or(usize::MAX)
        .saturating_sub(200)
        .min(10_000);
    let mut owner = TcpStream::connect(supervisor.api).expect("can connect");
    assert_eq!(ask(&mut owner).expect("is answered").status, 200);
    let mut strangers = Vec::new();
    for number in 0..10_000 {
        if strangers.len() == at_once {
            strangers.clear();
        }
        let mut stranger = TcpStream::connect(supervisor.api).expect("is taken");
        // Some say nothing, some begin a request and never end it.
        if number % 2 == 0 {
            let _ = stranger.write_all(b"GET /v1/status HTTP/1.1\r\nX: ");
        }
        strangers.push(stranger);
        if number % 100 == 99 {
            assert_eq!(supervisor.get("/v1/status").status, 200, "after {number}");
            let answer = ask(&mut owner).expect("a connection that has shown the token stays");
            assert_eq!(answer.status, 200);
        }
    }
    if nix::unistd::geteuid().is_root() {
        let folder = format!("/proc/{}/fd", supervisor.pid());
        let open = || std::fs::read_dir(&folder).expect("is there").count();
        assert!(open() < 256 + 32, "{} descriptors", open());
    }
}

/// The kernel takes connections for it meanwhile; one that it has to drop is tried again a second later at the soonest.
#[test]
fn whoever_connects_while_it_has_no_time_waits_in_line() {
    let longest = std::fs::read_to_string("/proc/sys/net/core/somaxconn").expect("is there");
    let longest: usize = longest.trim().parse().expect("is a number");
    let supervisor = running(Setup::new());
    let api = supervisor.api;
    kill(supervisor.pid(), Signal::SIGSTOP).expect("is there");
    let connect = || TcpStream::connect_timeout(&api, Duration::from_secs(10));
    let strangers: Result<Vec<_>, _> = (1..longest.min(500)).map(|_| connect()).collect();
    let owner = connect();
    kill(supervisor.pid(), Signal::SIGCONT).expect("is there");
    assert!(strangers.is_ok(), "{strangers:?}");
    let answer = ask(&mut owner.expect("there is room for it"));
    assert_eq!(answer.expect("is answered").status, 200);
}

/// Whether another process can listen there, whatever it does for it.
fn can_listen(address: SocketAddr) -> bool {
    let listen = |reuse_address, reuse_port| {
        let family = if address.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let socket = net::socket(family, SocketType::STREAM, None).expect("can make a socket");
        sockopt::set_socket_reuseaddr(&socket, reuse_address).expect("can be set");
        sockopt::set_socket_reuseport(&socket, reuse_port).expect("can be set");
        if address.is_ipv6() {
            sockopt::set_ipv6_v6only(&socket, true).expect("can be set");
        }
        net::bind(&socket, &address).is_ok() && net::listen(&socket, 1).is_ok()
    };
    [(false, false), (true, false), (false, true), (true, true)]
        .into_iter()
        .any(|(reuse_address, reuse_port)| listen(reuse_address, reuse_port))
}

/// The gateway runs commands for others: one that listens where `localhost` leads to would be given the token.
#[test]
fn localhost_leads_to_nobody_else_in_either_family() {
    if TcpListener::bind("[::1]:0").is_err() {
        eprintln!("skipped: there is no IPv6 here");
        return;
    }
    for listen in [
        "0.0.0.0:0",
        "[::]:0",
        "127.0.0.1:0",
        "[::1]:0",
        "[::ffff:127.0.0.1]:0",
    ] {
        let mut supervisor = running(Setup::new().with("RUNTIME_LISTEN", listen));
        let port = supervisor.api.port();
        for ip in ["127.0.0.1", "[::1]"] {
            let address: SocketAddr = format!("{ip}:{port}").parse().expect("is an address");
            supervisor.api = address;
            assert_eq!(supervisor.get("/v1/status").status, 200, "{listen} {ip}");
            assert!(!can_listen(address), "{listen} {ip}");
        }
        for every in ["0.0.0.0", "[::]"] {
            let address = format!("{every}:{port}").parse().expect("is an address");
            assert!(!can_listen(address), "{listen} {every}");
        }
        let asked = listen.replace(":0", &format!(":{port}")).parse();
        let asked = asked.expect("is an address");
        let healthcheck = supervisor.setup.program_with(&["healthcheck"], asked);
        assert!(healthcheck.status.success(), "{listen}: {healthcheck:?}");
    }
}

/// It may be there before us: left over from a supervisor that was killed.
#[test]
fn nothing_starts_where_somebody_else_listens_in_the_other_family() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        eprintln!("skipped: there is no IPv6 here");
        return;
    };
    let taken = listener.local_addr().expect("is bound");
    for ip in ["127.0.0.1", "0.0.0.0"] {
        let address = format!("{ip}:{}", taken.port());
        let setup = Setup::new();
        let ended = setup.program_with(&["--", "true"], address.parse().expect("is an address"));
        let said = String::from_utf8_lossy(&ended.stderr);
        let expected = if ip == "127.0.0.1" { "[::1]" } else { "[::]" };
        let expected = format!(
            "cannot listen on {expected}:{}: another process",
            taken.port()
        );
        assert_eq!(ended.status.code(), Some(1), "{said}");
        assert!(said.contains(&expected), "{said}");
    }
}

/// As in a container whose network has IPv4 only.
#[test]
fn without_ipv6_it_listens_on_ipv4_alone_and_says_so() {
    let script = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; busybox ifconfig lo 127.0.0.1 up && exec \"$@\"";
    let words = ["unshare", "--net", "/bin/sh", "-c", script, "sh"];
    let probe = Command::new(words[0])
        .args(&words[1..])
        .arg("true")
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no network can be made here");
        return;
    }
    let setup = Setup::new();
    let program = setup.program_below(&words);
    let supervisor = setup.start_as(program);
    until("a gateway that runs", || {
        supervisor.log().contains("\"running\"")
    });
    let log = supervisor.log();
    let line = log.lines().find(|line| line.contains("\"listening\""));
    let line: Value = serde_json::from_str(line.expect("it listens")).expect("is JSON");
    let other = line["other_family"].as_str().expect("is said");
    assert!(other.starts_with("none: "), "{other}");
}

/// A backup that nobody ends, and as many calls for it as there are connections.
#[test]
fn holders_of_the_token_who_wait_keep_out_neither_short_requests_nor_other_kinds() {
    let setup = Setup::new();
    let run = json!({ "gate": "go", "answer": { "snapshot": "shared" } });
    setup.agent("backup", &json!([run]));
    let supervisor = running(setup);
    let send = |request: &str| {
        let mut stream = TcpStream::connect(supervisor.api).expect("can connect");
        stream.write_all(request.as_bytes()).expect("is open");
        stream
    };
    let backup = head("POST", "/v1/backup") + "\r\n";
    let mut waiting: Vec<_> = (0..300).map(|_| send(&backup)).collect();
    // Some of every kind never send their body, some send nothing, some never read.
    for _ in 0..300 {
        for (method, path) in [
            ("POST", "/v1/backup"),
            ("GET", "/v1/status"),
            ("GET", "/v1/devices"),
        ] {
            waiting.push(send(&(head(method, path) + "Content-Length: 9\r\n\r\n")));
        }
        waiting.push(send(&status_request().repeat(3)));
        waiting.push(send(""));
    }
    let refused = supervisor.post("/v1/backup");
    assert_eq!((refused.status, refused.code()), (503, "busy"));
    assert_eq!(refused.header("retry-after"), Some("5"));
    assert!(refused.is_enveloped());
    assert_eq!(supervisor.get("/v1/status").status, 200);
    let approved = supervisor.post("/v1/devices/unknown/approve");
    assert_eq!(approved.code(), "unknown_request");
    let healthcheck = supervisor
        .setup
        .program_with(&["healthcheck"], supervisor.api);
    assert_eq!(healthcheck.status.code(), Some(0), "{healthcheck:?}");
    assert_eq!(supervisor.post("/v1/restart").status, 202);

    // The callers go, and what they asked for goes on; its place is free once it has ended.
    drop(waiting);
    supervisor.setup.open_gate("go");
    until("a free place", || {
        supervisor.post("/v1/backup").status == 200
    });
    assert_eq!(supervisor.get("/v1/status").status, 200);
}

#[test]
fn a_client_that_has_ended_its_side_gets_its_answer() {
    let supervisor = running(Setup::new());
    let backup = head("POST", "/v1/backup") + "\r\n";
    let bodies = head("POST", "/v1/restart") + "Content-Length: 2\r\n\r\n{}" + &status_request();
    for (request, statuses) in [
        (backup, &[200][..]),
        (status_request().repeat(2), &[200, 200]),
        (bodies, &[202, 200]),
        // Half of a request is none.
        (head("GET", "/v1/status"), &[]),
        (String::new(), &[]),
    ] {
        let text = exchange(supervisor.api, request.as_bytes());
        let answers = http::answers(&text).expect("all are whole");
        let found: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        assert_eq!(found, statuses, "{request}");
    }
    // What was promised and does not come.
    let cut = head("POST", "/v1/backup") + "Content-Length: 9\r\n\r\n{}";
    let text = exchange(supervisor.api, cut.as_bytes());
    let answers = http::answers(&text).expect("all are whole");
    assert!(answers.iter().all(|answer| answer.status == 400), "{text}");
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 1);
}

#[test]
fn slow_heads_slow_bodies_and_silence_come_to_an_end() {
    let supervisor = running(Setup::new());
    let api = supervisor.api;
    let drip = move |begin: String| {
        let mut stream = TcpStream::connect(api).expect("can connect");
        stream.write_all(begin.as_bytes()).expect("can write");
        stream
            .set_read_timeout(Some(Duration::from_millis(200)))
            .expect("is a time");
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        // A byte now and then, until the other side has had enough.
        loop {
            match stream.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => answer.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if !begin.is_empty() && stream.write_all(b"x").is_err() {
                        break;
                    }
                }
                Err(_) => break,
            }
        }
        http::answers(&String::from_utf8_lossy(&answer)).expect("whole answers or none")
    };
    let slow_body = head("POST", "/v1/backup") + "Content-Length: 9999\r\n\r\n";
    let [silent, slow_head, slow_body, kept] = [
        String::new(),
        head("GET", "/v1/status"),
        slow_body,
        status_request(),
    ]
    .map(|begin| thread::spawn(move || drip(begin)))
    .map(|thread| thread.join().expect("ends"));
    assert!(silent.is_empty() && slow_head.is_empty());
    assert_eq!(
        slow_body[0].body["error"],
        "the body did not arrive in time"
    );
    assert_eq!(kept[0].status, 200);
    assert_eq!(supervisor.get("/v1/status").status, 200);
    assert!(supervisor.setup.agent_calls("backup").is_empty());
}

#[test]
fn what_is_not_a_request_gets_the_envelope_or_no_answer() {
    let supervisor = running(Setup::new());
    let token = format!("Authorization: Bearer {TOKEN}\r\n");
    let long = "y".repeat(100_000);
    let tls =
        "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}\u{1}\u{fc}\u{3}\u{3}".to_owned() + &"\0".repeat(500);
    for (what, bytes, status) in [
        ("a TLS hello", tls, Some(400)),
        (
            "the preface of HTTP/2",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
            None,
        ),
        ("no method", "\r\n \r\n\r\n".to_owned(), Some(400)),
        (
            "another version",
            format!("GET /v1/status HTTP/3.0\r\n{token}\r\n"),
            Some(400),
        ),
        (
            "a line without a colon",
            format!("GET /v1/status HTTP/1.1\r\n{token}x y\r\n\r\n"),
            Some(400),
        ),
        (
            "a huge header",
            format!("GET /v1/status HTTP/1.1\r\n{token}X: {long}\r\n\r\n"),
            Some(431),
        ),
        (
            "many headers",
            format!(
                "GET /v1/status HTTP/1.1\r\n{token}{}\r\n",
                "X: y\r\n".repeat(65)
            ),
            Some(431),
        ),
        (
            "a huge path",
            format!("GET /{long} HTTP/1.1\r\n{token}\r\n"),
            Some(431),
        ),
        (
            "a length that is none",
            format!("GET /v1/status HTTP/1.1\r\n{token}Content-Length: +1\r\n\r\n"),
            Some(400),
        ),
        (
            "two lengths",
            format!(
                "GET /v1/status HTTP/1.1\r\n{token}Content-Length: 1\r\nContent-Length: 2\r\n\r\nx"
            ),
            Some(400),
        ),
        (
            "a coding that is not known",
            format!("POST /v1/backup HTTP/1.1\r\n{token}Transfer-Encoding: gzip\r\n\r\n"),
            Some(400),
        ),
        (
            "chunks that are none",
            format!("POST /v1/backup HTTP/1.1\r\n{token}Transfer-Encoding: chunked\r\n\r\nzz\r\n"),
            Some(400),
        ),
        (
            "a proxy's request",
            format!("CONNECT a.example:443 HTTP/1.1\r\n{token}\r\n"),
            Some(400),
        ),
        (
            "an escape that is none",
            format!("GET /v1/%zz HTTP/1.1\r\n{token}\r\n"),
            Some(400),
        ),
    ] {
        let text = http::raw(supervisor.api, bytes.as_bytes());
        let answers = http::answers(&text).unwrap_or_else(|| panic!("{what}: {text:?}"));
        assert_eq!(
            answers.first().map(|answer| answer.status),
            status,
            "{what}: {text:?}"
        );
        for answer in answers {
            assert!(
                answer.is_enveloped() && answer.code() == "invalid_request",
                "{what}: {text:?}"
            );
        }
    }
    assert_eq!(supervisor.get("/v1/status").status, 200);
    assert!(supervisor.setup.agent_calls("backup").is_empty());
}

#[test]
fn requests_in_a_row_are_answered_in_a_row_until_one_has_no_token() {
    let supervisor = running(Setup::new());
    let stranger = "GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n";
    let requests = (head("GET", "/nothing") + "\r\n" + &status_request()).repeat(50);
    let text = http::raw(
        supervisor.api,
        format!("{requests}{stranger}{}", status_request()).as_bytes(),
    );
    let answers = http::answers(&text).expect("all are whole");
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    let mut expected = [404, 200].repeat(50);
    expected.push(401);
    assert_eq!(statuses, expected);
}

const SEED: u64 = 20_261_125;
const MUTANTS: usize = 4000;

/// A generator of which only the high bits are used (Knuth's MMIX constants).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("fits") % limit.max(1)
    }
}

fn mutate(dice: &mut Dice, seeds: &[String]) -> Vec<u8> {
    const SPICES: [&[u8]; 14] = [
        b"\r\n",
        b"\r\n\r\n",
        b"\n",
        b"\0",
        b"%",
        b"%2F..",
        b" ",
        b":",
        b"\xff\xfe",
        b"\xc3\xa9",
        b"Content-Length: 7\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"99999999999999999999",
    ];
    let mut bytes = seeds[dice.below(seeds.len())].clone().into_bytes();
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len() + 1);
        let end = (at + dice.below(20)).min(bytes.len());
        match dice.below(6) {
            0 => drop(bytes.drain(at..end)),
            1 => drop(bytes.splice(at..at, SPICES[dice.below(SPICES.len())].iter().copied())),
            2 => bytes[at..end]
                .iter_mut()
                .for_each(|byte| *byte ^= 1 << dice.below(8)),
            3 => {
                let piece = bytes[at..end].repeat(1 + dice.below(60));
                drop(bytes.splice(at..at, piece));
            }
            4 => bytes.truncate(at),
            _ => {
                let other = &seeds[dice.below(seeds.len())];
                bytes.truncate(at);
                bytes.extend_from_slice(&other.as_bytes()[dice.below(other.len())..]);
            }
        }
    }
    bytes
}

fn exchange(api: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(api).expect("somebody listens");
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn thousands_of_broken_requests_get_whole_answers_or_none() {
    let supervisor = running(Setup::new());
    let seeds = [
        status_request(),
        head("GET", "/v1/status?verbose=1") + "Content-Length: 5\r\n\r\nhello",
        head("POST", "/v1/devices/some%3Aid/approve")
            + "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        head("GET", "/v1/devices") + "Connection: keep-alive\r\n\r\n" + &status_request(),
        head("DELETE", "/v1/backup") + "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        "GET /v1/status HTTP/1.0\r\nX-OpenAgents-Service-Token: wrong\r\n\r\n".to_owned(),
    ];
    let mut dice = Dice(SEED);
    let mut seen = std::collections::BTreeMap::new();
    for number in 0..MUTANTS {
        let bytes = mutate(&mut dice, &seeds);
        let text = exchange(supervisor.api, &bytes);
        let request = String::from_utf8_lossy(&bytes);
        let answers = http::answers(&text)
            .unwrap_or_else(|| panic!("seed {SEED}, {number}: {request:?}: {text:?}"));
        for answer in answers {
            *seen.entry(answer.status).or_insert(0) += 1;
            assert!(
                answer.is_enveloped() && answer.status != 500,
                "seed {SEED}, {number}: {request:?}: {text:?}"
            );
        }
    }
    // It would prove little if all of them failed in the same way.
    for status in [200, 400, 401, 404, 405] {
        assert!(seen.contains_key(&status), "{seen:?}");
    }
    assert_eq!(supervisor.get("/v1/status").status, 200);
    assert!(!supervisor.log().contains("panicked"));
}

#[test]
fn the_log_tells_of_requests_and_nothing_that_they_carry() {
    let supervisor = running(Setup::new().with("RUNTIME_LOG", "debug"));
    let headers = [
        ("Authorization", &*format!("Bearer {TOKEN}")),
        ("X-Mine", "in-a-header"),
    ];
    let send =
        |method, path| http::request(supervisor.api, method, path, &headers, b"in-a-body").status;
    assert_eq!(send("GET", "/v1/status?in=query"), 200);
    assert_eq!(send("POST", "/v1/devices/in-an-id/approve"), 404);
    assert_eq!(send("BREW", "/in-a-path"), 404);
    for _ in 0..200 {
        let stranger = http::request(
            supervisor.api,
            "GET",
            "/in-a-path",
            &[("X-Mine", "in-a-header")],
            b"",
        );
        assert_eq!(stranger.status, 401);
    }
    let lines = |message: &str| -> Vec<Value> {
        let log = supervisor.log();
        let lines = log
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        lines
            .filter(|line: &Value| line["msg"] == message)
            .collect()
    };
    until("the lines", || {
        lines("request")
            .iter()
            .any(|line| line["method"] == "other")
    });
    for (method, route, status, level) in [
        ("GET", "/v1/status", 200, "debug"),
        ("POST", "/v1/devices/{requestId}/approve", 404, "info"),
        ("other", "none", 404, "info"),
    ] {
        let is_it = |line: &&Value| {
            line["method"] == method && line["route"] == route && line["status"] == status
        };
        let line = lines("request")
            .iter()
            .find(is_it)
            .cloned()
            .unwrap_or_default();
        assert!(
            line["duration_ms"].is_f64() && line["level"] == level,
            "{method}: {line}"
        );
        assert_eq!(line.as_object().map(serde_json::Map::len), Some(7));
    }
    // They came within moments of each other, and each moment has one line.
    let refusals = lines("request without a valid token");
    assert!(!refusals.is_empty() && refusals.len() < 200);
    assert!(
        refusals
            .iter()
            .all(|line| line.as_object().map(serde_json::Map::len) == Some(4))
    );
    let log = supervisor.log();
    for word in [
        "in-a-header",
        "in=query",
        "in-an-id",
        "in-a-path",
        "in-a-body",
        TOKEN,
    ] {
        assert!(!log.contains(word), "{word}");
    }
}
