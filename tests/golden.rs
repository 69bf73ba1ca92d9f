//! The JSON of every answer, frozen: others parse it.

use e2e::golden;
use e2e::greedy::{CLOSE, COMPRESSED, Greedy, LAST, Peer, TEXT, frame};
use e2e::http::Response;
use e2e::supervisor::{Setup, Supervisor, TOKEN, failure, snapshot};
use e2e::wait::until;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::TcpStream;

/// Takes notes of answers, with what differs from run to run replaced.
#[derive(Default)]
struct Notes(String);

impl Notes {
    fn add(&mut self, title: &str, answer: &Response) {
        let mut body = answer.body.clone();
        steady(&mut body);
        let body = serde_json::to_string_pretty(&body).expect("is JSON");
        let _ = write!(self.0, "## {title}\n{}", answer.status);
        for name in ["allow", "retry-after", "www-authenticate"] {
            if let Some(value) = answer.header(name) {
                let _ = write!(self.0, " {name}: {value}");
            }
        }
        let _ = write!(self.0, "\n{body}\n\n");
    }
}

fn steady(value: &mut Value) {
    const CHANGING: [&str; 7] = [
        "pid",
        "since",
        "at",
        "nextAt",
        "nextAttemptAt",
        "lastErrorAt",
        "uptimeSeconds",
    ];
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                if CHANGING.contains(&name.as_str()) && !value.is_null() {
                    *value = json!(format!("<{name}>"));
                }
                steady(value);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(steady),
        _ => {}
    }
}

fn running(setup: Setup) -> Supervisor {
    let supervisor = setup.start();
    supervisor.until_running(1);
    until("the version", || {
        supervisor.status()["version"]["openclaw"].is_string()
    });
    supervisor
}

#[test]
fn answers_when_all_is_well() {
    let setup = Setup::new()
        .with("RUNTIME_INSTANCE_ID", "someone")
        .with("RUNTIME_INSTANCE_TYPE", "standard-1");
    setup.agent("restore", &snapshot("snapshot-0"));
    setup.devices(&json!({
        "pending": [{ "requestId": "r1", "deviceId": "d1", "platform": "ios", "ts": 1 }],
        "paired": [{ "deviceId": "d2", "platform": "linux", "tokens": [{ "role": "node" }] }],
    }));
    let supervisor = running(setup);
    let mut notes = Notes::default();
    notes.add("GET /v1/status", &supervisor.get("/v1/status"));
    notes.add("POST /v1/backup", &supervisor.post("/v1/backup"));
    notes.add("GET /v1/devices", &supervisor.get("/v1/devices"));
    notes.add(
        "POST /v1/devices/r1/approve",
        &supervisor.post("/v1/devices/r1/approve"),
    );
    notes.add("POST /v1/restart", &supervisor.post("/v1/restart"));
    supervisor.until_running(2);
    notes.add(
        "GET /v1/status after a backup and a restart",
        &supervisor.get("/v1/status"),
    );
    golden::compare("answers.txt", &notes.0);
}

#[test]
fn answers_when_something_is_wrong() {
    let mut notes = Notes::default();
    let supervisor = running(Setup::new());
    let stranger = e2e::http::request(supervisor.api, "GET", "/v1/status", &[], b"");
    notes.add("GET /v1/status without a token", &stranger);
    notes.add("GET /", &supervisor.get("/"));
    notes.add("GET /v1/%zz", &supervisor.get("/v1/%zz"));
    notes.add(
        "DELETE /v1/status",
        &supervisor.request("DELETE", "/v1/status"),
    );
    notes.add("GET /v1/restart", &supervisor.get("/v1/restart"));
    notes.add(
        "POST /v1/devices/a%20b/approve",
        &supervisor.post("/v1/devices/a%20b/approve"),
    );
    notes.add(
        "POST /v1/devices/unknown/approve",
        &supervisor.post("/v1/devices/unknown/approve"),
    );
    let head = format!(
        "POST /v1/devices/unknown/approve HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 9\r\n\r\n"
    );
    let without_body = |_| {
        let mut stream = TcpStream::connect(supervisor.api).expect("listens");
        stream.write_all(head.as_bytes()).expect("is open");
        stream
    };
    let waiting: Vec<_> = (0..40).map(without_body).collect();
    notes.add(
        "POST /v1/devices/unknown/approve while 32 wait",
        &supervisor.post("/v1/devices/unknown/approve"),
    );
    drop(waiting);
    until("a free place", || {
        supervisor.post("/v1/devices/unknown/approve").status == 404
    });
    for (exit, code) in [
        (1, "internal"),
        (75, "store_unavailable"),
        (124, "timeout"),
        (12, "fenced"),
    ] {
        supervisor.setup.agent("backup", &failure(exit, code));
        notes.add(
            &format!("POST /v1/backup, agent exits {exit}"),
            &supervisor.post("/v1/backup"),
        );
    }
    notes.add("GET /v1/status once fenced", &supervisor.get("/v1/status"));
    drop(supervisor);

    let setup = Setup::new();
    setup.agent("restore", &failure(75, "store_unavailable"));
    let supervisor = setup.start();
    until("the failure", || {
        supervisor.status()["restore"]["error"].is_string()
    });
    until("the wait", || {
        supervisor.status()["restore"]["status"] == "failed"
    });
    notes.add(
        "GET /v1/status after a failed restore",
        &supervisor.get("/v1/status"),
    );
    notes.add(
        "POST /v1/backup after a failed restore",
        &supervisor.post("/v1/backup"),
    );
    notes.add(
        "GET /v1/devices after a failed restore",
        &supervisor.get("/v1/devices"),
    );
    golden::compare("problems.txt", &notes.0);
}

/// What a gateway does with a call, on the connection that it has taken.
type Act = fn(&mut Peer) -> io::Result<()>;

#[test]
fn answers_when_the_gateway_misbehaves() {
    let mut notes = Notes::default();
    let greedy = Greedy::start(Setup::new());
    let acts: [(&str, Act); 6] = [
        ("closes the connection properly", |peer| {
            peer.frame(LAST | CLOSE, b"")
        }),
        ("breaks off", |peer| peer.frame(TEXT, b"{")),
        ("sends something compressed", |peer| {
            peer.frame(LAST | COMPRESSED | TEXT, b"{}")?;
            peer.wait()
        }),
        ("does not speak JSON", |peer| {
            peer.text("<html>")?;
            peer.wait()
        }),
        ("sends too much", |peer| {
            peer.flood(&frame(LAST | TEXT, b"{}"))
        }),
        ("refuses", |peer| {
            peer.text(
                r#"{"type":"res","id":"call","ok":false,"error":{"code":"NO","message":"not\nyou"}}"#,
            )?;
            peer.wait()
        }),
    ];
    for (does, act) in acts {
        greedy.act(move |peer| {
            let _ = peer.hello()?;
            act(peer)
        });
        notes.add(
            &format!("GET /v1/devices, the gateway {does}"),
            &greedy.supervisor.get("/v1/devices"),
        );
    }
    greedy.act(|peer| peer.stream.write_all(b"HTTP/1.1 404 Not Found\r\n\r\n"));
    notes.add(
        "GET /v1/devices, the gateway takes no WebSocket",
        &greedy.supervisor.get("/v1/devices"),
    );
    greedy.act(Peer::wait);
    notes.add(
        "GET /v1/devices, the gateway says nothing",
        &greedy.supervisor.get("/v1/devices"),
    );
    golden::compare("gateway-problems.txt", &notes.0);
}
