//! Stands in for the gateway: `/startupz`, the WebSocket protocol with its pairing lists, and every way to misbehave.
//!
//! `fake-gateway PORT FOLDER`. `FOLDER/behaviour.json` says what this start does, so that a test can change its mind
//! between two starts; `FOLDER/starts.jsonl` gets a line with what the process found itself to be.

mod forks;

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use signal_hook::consts::SIGTERM;
use tungstenite::{Message, WebSocket};

fn main() {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("there is a clock");
    let started = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
    let mut arguments = std::env::args().skip(1);
    let port: u16 = arguments
        .next()
        .and_then(|port| port.parse().ok())
        .expect("is given a port");
    let folder = PathBuf::from(arguments.next().expect("is given a folder"));
    let behaviour = read(&folder.join("behaviour.json"));
    let found = who_am_i(&behaviour, &folder, started);
    note(&folder.join("starts.jsonl"), &found);

    let [output, error] =
        ["stdout", "stderr"].map(|name| behaviour[name].as_str().unwrap_or_default());
    if !(output.is_empty() && error.is_empty()) {
        for _ in 0..behaviour["repeat"].as_u64().unwrap_or(1) {
            let mut stdout = std::io::stdout();
            stdout.write_all(output.as_bytes()).expect("can write");
            stdout.flush().expect("can write");
            let mut stderr = std::io::stderr();
            stderr.write_all(error.as_bytes()).expect("can write");
        }
        note(
            &folder.join("written.jsonl"),
            &json!({ "pid": std::process::id() }),
        );
    }
    if let Some(count) = behaviour["endedOrphans"].as_u64() {
        forks::orphans(count);
    }
    if let Some(code) = behaviour["exit"].as_i64() {
        std::process::exit(i32::try_from(code).expect("is an exit code"));
    }
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap_or_else(|_| {
        // The real one refuses to be the second one like this.
        std::process::exit(78)
    });
    if behaviour["holder"] == true {
        forks::holder();
    }
    if behaviour["stopped"] == true {
        forks::stopped();
    }
    let number = |name: &str| behaviour[name].as_u64().unwrap_or_default();
    forks::rabbits(
        number("rabbits"),
        Duration::from_millis(number("rabbitsRestMs")),
    );
    take_sigterm(&behaviour, &folder);
    for stream in listener.incoming().flatten() {
        let (folder, behaviour) = (folder.clone(), behaviour.clone());
        std::thread::spawn(move || serve(stream, &folder, &behaviour));
    }
}

/// Deaf to SIGTERM, or in no hurry: a gateway that drains ends when there is a file `drained`.
fn take_sigterm(behaviour: &Value, folder: &Path) {
    if behaviour["deaf"] != true && behaviour["drains"] != true {
        return;
    }
    let is_asked = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTERM, is_asked.clone()).expect("SIGTERM can be caught");
    if behaviour["drains"] == true {
        let drained = folder.join("drained");
        std::thread::spawn(move || {
            while !(is_asked.load(Ordering::Relaxed) && drained.exists()) {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::process::exit(0);
        });
    }
}

fn read(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn note(path: &Path, line: &Value) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .expect("can note");
    file.write_all(format!("{line}\n").as_bytes())
        .expect("can note");
}

/// Everything that a test of isolation wants to know, taken before anything else is opened.
fn who_am_i(behaviour: &Value, folder: &Path, started: i64) -> Value {
    let descriptors: Vec<i32> = (0..256)
        .filter(|number| fs::read_link(format!("/proc/self/fd/{number}")).is_ok())
        .collect();
    let status = fs::read_to_string("/proc/self/status").expect("knows itself");
    let field = |name: &str| {
        let line = status
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")));
        line.and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    let supervisor = std::os::unix::process::parent_id();
    let environment: Value = std::env::vars().collect();
    let limits = fs::read_to_string("/proc/self/limits").expect("knows its limits");
    json!({
        "pid": std::process::id(),
        "monotonic": started,
        "session": nix::unistd::getsid(None).expect("has a session").as_raw(),
        "descriptors": descriptors,
        "environment": environment,
        "folder": std::env::current_dir().ok(),
        "uid": field("Uid"), "gid": field("Gid"), "groups": field("Groups"),
        "blocked": field("SigBlk"), "ignored": field("SigIgn"), "noNewPrivileges": field("NoNewPrivs"),
        "files": limits.lines().find(|line| line.starts_with("Max open files")),
        "canReadSupervisor": fs::read(format!("/proc/{supervisor}/environ")).is_ok()
            || fs::read_dir(format!("/proc/{supervisor}/fd")).is_ok(),
        "helpers": helpers(behaviour, folder),
    })
}

/// Processes in sessions of their own, which a signal to the gateway's group misses; and children that outlive their
/// parent and then end, whose zombies only PID 1 can reap.
fn helpers(behaviour: &Value, folder: &Path) -> Vec<u32> {
    if behaviour["orphans"] == true {
        let script = "for i in 1 2 3 4 5 6 7 8 9 10; do (sleep 0.05 &) ; done";
        let parent = Command::new("/bin/sh")
            .args(["-c", script])
            .current_dir(folder)
            .status();
        parent.expect("a shell runs");
    }
    let count = behaviour["helpers"].as_u64().unwrap_or_default();
    (0..count)
        .map(|_| {
            Command::new("setsid")
                .args([
                    "/bin/sh",
                    "-c",
                    "trap '' TERM HUP; sleep 300 & wait; sleep 300",
                ])
                .stdin(Stdio::null())
                .spawn()
                .expect("setsid runs")
                .id()
        })
        .collect()
}

fn serve(mut stream: TcpStream, folder: &Path, behaviour: &Value) {
    let mut start = [0; 64];
    let Ok(length) = stream.peek(&mut start) else {
        return;
    };
    let start = String::from_utf8_lossy(&start[..length]).into_owned();
    if start.starts_with("GET /startupz") {
        let (line, body) = match behaviour["startup"].as_str() {
            None => ("200 OK", r#"{"status":"started"}"#.to_owned()),
            Some("html") => ("200 OK", "<html>".to_owned()),
            Some(status) => (
                "503 Service Unavailable",
                json!({ "status": status }).to_string(),
            ),
        };
        answer(&mut stream, line, &body);
    } else if let Some(code) = start.strip_prefix("GET /exit/") {
        let code = code.split(' ').next().and_then(|code| code.parse().ok());
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("there is a clock");
        let monotonic = now.tv_sec() * 1_000_000_000 + now.tv_nsec();
        note(
            &folder.join("exits.jsonl"),
            &json!({ "monotonic": monotonic }),
        );
        std::process::exit(code.expect("is an exit code"));
    } else if start.starts_with("GET /hog") {
        hog();
    } else if behaviour["silent"] == true {
        // Holds the line without a word until the other side gives up.
        let _ = stream.read_to_end(&mut Vec::new());
    } else if let Ok(socket) = tungstenite::accept(stream) {
        let _ = talk(socket, folder, behaviour);
    }
}

/// Takes memory until somebody objects, or it is more than any test allows.
fn hog() {
    const MIB: usize = 1 << 20;
    let taken: Vec<Vec<u8>> = (0..1024).map(|_| vec![1; MIB]).collect();
    std::process::exit(i32::from(taken.is_empty()));
}

fn answer(stream: &mut TcpStream, line: &str, body: &str) {
    let mut request = [0; 4096];
    let _ = stream.read(&mut request);
    let length = body.len();
    let _ = stream
        .write_all(format!("HTTP/1.1 {line}\r\nContent-Length: {length}\r\n\r\n{body}").as_bytes());
}

fn talk(
    mut socket: WebSocket<TcpStream>,
    folder: &Path,
    behaviour: &Value,
) -> Result<(), Box<tungstenite::Error>> {
    send(
        &mut socket,
        &json!({ "type": "event", "event": "connect.challenge", "payload": { "nonce": "n", "ts": 1 } }),
    )?;
    loop {
        let message = socket.read().map_err(Box::new)?;
        let Message::Text(text) = message else {
            continue;
        };
        let request: Value = serde_json::from_str(&text).unwrap_or_default();
        // An event in between, which a client has to skip.
        send(
            &mut socket,
            &json!({ "type": "event", "event": "tick", "payload": {} }),
        )?;
        let result = respond(&request, folder);
        let is_over = request["method"] == "gateway.restart.request" && result.is_ok();
        let answer = match result {
            Ok(payload) => {
                json!({ "type": "res", "id": request["id"], "ok": true, "payload": payload })
            }
            Err((code, message)) => json!({
                "type": "res", "id": request["id"], "ok": false, "error": { "code": code, "message": message },
            }),
        };
        send(&mut socket, &answer)?;
        if is_over && behaviour["stays"] != true {
            std::process::exit(0);
        }
    }
}

fn send(socket: &mut WebSocket<TcpStream>, value: &Value) -> Result<(), Box<tungstenite::Error>> {
    socket
        .send(Message::text(value.to_string()))
        .map_err(Box::new)
}

/// The token of the configuration file wins over the environment's, as in the real one.
fn token() -> String {
    let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
    let file = read(&home.join(".openclaw/openclaw.json"));
    match file["gateway"]["auth"]["token"].as_str() {
        Some(token) => token.to_owned(),
        None => std::env::var("OPENCLAW_GATEWAY_TOKEN").unwrap_or_default(),
    }
}

fn respond(request: &Value, folder: &Path) -> Result<Value, (&'static str, &'static str)> {
    let params = &request["params"];
    let path = folder.join("devices.json");
    let mut devices = read(&path);
    match request["method"].as_str() {
        Some("connect") if params["auth"]["token"] != token() => Err((
            "AUTH_TOKEN_MISMATCH",
            "unauthorized: gateway token mismatch",
        )),
        Some("connect") if params["minProtocol"] != 4 => {
            Err(("PROTOCOL_MISMATCH", "protocol mismatch"))
        }
        Some("connect") => Ok(
            json!({ "type": "hello-ok", "protocol": 4, "server": { "version": "2026.9.6-fake" } }),
        ),
        Some("device.pair.list") => {
            Ok(json!({ "pending": devices["pending"], "paired": devices["paired"] }))
        }
        Some("device.pair.approve") => {
            let pending = devices["pending"]
                .as_array_mut()
                .ok_or(("INTERNAL", "no list"))?;
            let position = pending
                .iter()
                .position(|entry| entry["requestId"] == params["requestId"])
                .ok_or(("INVALID_REQUEST", "unknown requestId"))?;
            let mut device = pending.remove(position);
            device["tokens"] = json!([{ "role": "operator", "token": "device-secret" }]);
            devices["paired"]
                .as_array_mut()
                .ok_or(("INTERNAL", "no list"))?
                .push(device.clone());
            fs::write(path, devices.to_string()).map_err(|_| ("INTERNAL", "cannot write"))?;
            Ok(json!({ "requestId": params["requestId"], "device": device }))
        }
        Some("gateway.restart.request") => {
            note(&folder.join("asked.jsonl"), params);
            Ok(json!({}))
        }
        _ => Err(("INVALID_REQUEST", "unknown method")),
    }
}
