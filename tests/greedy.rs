//! A gateway that wants the memory and the time of PID 1: whatever it sends, or writes into its own files, a call ends with an
//! answer, the memory of PID 1 stays bounded, and the status is answered all along.

use std::fs;
use std::io::{self, Write as _};
use std::thread;
use std::time::Duration;

use e2e::greedy::{COMPRESSED, CONTINUATION, Greedy, LAST, PING, Peer, TEXT, frame};
use e2e::http::{self, Response};
use e2e::hung;
use e2e::supervisor::{Setup, TOKEN};
use e2e::wait::until;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const KIB: usize = 1024;

/// KiB beyond what a supervisor has that was asked for nothing: a large list as it came and as it leaves, and the room that a
/// buffer has while it grows. A tree of one list of 1 MiB is 20 MiB.
const MOST: u64 = 6 * 1024;

/// Small arrays of about this many bytes, which take 20 times their size as a tree.
fn arrays(size: usize) -> String {
    format!("[{}[0]]", "[0],".repeat(size / 4))
}

/// Asks, and meanwhile for the status again and again.
fn asked(greedy: &Greedy, method: &str, path: &str) -> Response {
    let supervisor = &greedy.supervisor;
    thread::scope(|scope| {
        let call = scope.spawn(|| supervisor.request(method, path));
        loop {
            assert_eq!(supervisor.get("/v1/status").status, 200);
            if call.is_finished() {
                return call.join().expect("is answered");
            }
        }
    })
}

fn assert_fails(what: &str, answer: &Response, part: &str) {
    assert_eq!(
        (answer.status, answer.code()),
        (503, "gateway_unavailable"),
        "{what}: {answer:?}"
    );
    let sentence = answer.body["error"].as_str().unwrap_or_default();
    assert!(sentence.contains(part), "{what}: {sentence}");
    assert!(sentence.len() < KIB, "{what}: {sentence}");
    assert!(!sentence.contains(char::is_control), "{what}: {sentence:?}");
}

fn list_fails(act: impl Fn(&mut Peer) -> io::Result<()> + Send + Sync + 'static, part: &str) {
    let greedy = Greedy::start(Setup::new());
    let before = greedy.peak();
    greedy.act(act);
    let answer = asked(&greedy, "GET", "/v1/devices");
    assert_fails("list", &answer, part);
    let more = greedy.peak() - before;
    assert!(more < MOST, "{more} KiB more");
    // And the next call is as good as any.
    greedy.answer(r#"{"pending":[],"paired":[{"deviceId":"d"}]}"#);
    let answer = greedy.supervisor.get("/v1/devices");
    assert_eq!(
        answer.body["data"]["paired"][0]["deviceId"], "d",
        "{answer:?}"
    );
}

#[test]
fn a_gateway_that_pings_and_reads_nothing_is_left() {
    let ping = frame(LAST | PING, &[b'x'; 100]);
    list_fails(
        move |peer| {
            peer.upgrade()?;
            peer.flood(&ping)
        },
        "more than a call may",
    );
}

#[test]
fn a_gateway_that_sends_messages_without_end_is_left() {
    for message in ["{}".to_owned(), arrays(KIB), arrays(60 * KIB)] {
        for is_known in [true, false] {
            let message = frame(LAST | TEXT, message.as_bytes());
            list_fails(
                move |peer| {
                    if is_known {
                        let _ = peer.hello()?;
                    } else {
                        peer.upgrade()?;
                    }
                    peer.flood(&message)
                },
                "more than a call may",
            );
        }
    }
}

#[test]
fn a_gateway_that_sends_pieces_without_end_is_left() {
    for piece in [0, 100, 60_000] {
        let piece = frame(CONTINUATION, &vec![b' '; piece]);
        list_fails(
            move |peer| {
                let _ = peer.hello()?;
                peer.frame(TEXT, b"")?;
                peer.flood(&piece)
            },
            "more than a call may",
        );
    }
}

#[test]
fn a_message_that_is_larger_than_a_list_may_be_is_not_read() {
    // The second is only announced.
    let announced = [&[LAST | TEXT, 127][..], &u64::MAX.to_be_bytes()].concat();
    for frame in [frame(LAST | TEXT, arrays(1100 * KIB).as_bytes()), announced] {
        list_fails(
            move |peer| {
                let _ = peer.hello()?;
                peer.stream.write_all(&frame)?;
                peer.wait()
            },
            "more than a call may",
        );
    }
}

#[test]
fn a_handshake_without_end_is_left() {
    list_fails(
        |peer| {
            peer.stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\n")?;
            peer.flood(b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n")
        },
        "cannot",
    );
}

#[test]
fn what_is_not_the_protocol_is_said() {
    let deep = "[".repeat(200_000) + &"]".repeat(200_000);
    let texts = [
        (
            format!(r#"{{"type":"res","id":"call","ok":true,"payload":{deep}}}"#),
            "nested",
        ),
        (
            r#"{"type":"res","id":"call","ok":true,"payload":"#.to_owned(),
            "not of protocol 4",
        ),
        (arrays(900 * KIB)[1..].to_owned(), "not of protocol 4"),
        (
            json!({ "type": "res", "id": "call", "ok": false, "error":
                { "code": "C".repeat(3 * KIB), "message": "\u{7}\n".repeat(300) } })
            .to_string(),
            "the gateway refused: CCC",
        ),
        (
            json!({ "type": "res", "id": "call", "ok": false, "error":
                { "code": "ODD", "message": "x".repeat(900 * KIB) } })
            .to_string(),
            "the gateway refused: ODD",
        ),
    ];
    for (text, part) in texts {
        list_fails(
            move |peer| {
                let _ = peer.hello()?;
                peer.text(&text)?;
                peer.wait()
            },
            part,
        );
    }
}

#[test]
fn a_connection_that_breaks_is_said() {
    list_fails(|peer| peer.hello().map(drop), "cannot talk to the gateway");
    list_fails(
        |peer| {
            let _ = peer.hello()?;
            let answer = frame(LAST | TEXT, arrays(KIB).as_bytes());
            peer.stream.write_all(&answer[..KIB / 2])
        },
        "cannot talk to the gateway",
    );
    list_fails(
        |peer| {
            let _ = peer.hello()?;
            peer.frame(LAST | COMPRESSED | TEXT, b"{}")?;
            peer.wait()
        },
        "cannot talk to the gateway",
    );
}

/// The time of a call is for all of it, however much comes of its answer.
#[test]
fn a_gateway_that_drips_is_a_timeout() {
    let greedy = Greedy::start(Setup::new());
    greedy.act(|peer| {
        let _ = peer.hello()?;
        loop {
            peer.text("{}")?;
            thread::sleep(Duration::from_millis(100));
        }
    });
    let answer = asked(&greedy, "GET", "/v1/devices");
    assert_eq!((answer.status, answer.code()), (504, "timeout"));
}

#[test]
fn a_large_list_is_passed_on_as_it_is_but_for_secrets() {
    let greedy = Greedy::start(Setup::new());
    let device = |number: usize| {
        format!(
            r#"{{"deviceId":"device-{number}","publicKey":"{key}","token":"SECRET", "big":123456789012345678901234567890,
            "huge":1e400,"half":"\ud83d","twice":1,"twice":2,"tokens":[{{"role":"node","token":"SECRET"}}],
            "meta":{{"authTOKEN":"SECRET","name":"Büro \u00e9","\u0074oken":"SECRET"}}}}"#,
            key = "k".repeat(400)
        )
    };
    let devices: Vec<String> = (0..500).map(device).collect();
    let list = devices.join(" , ");
    assert!(list.len() > 300 * KIB);
    greedy.answer(format!(
        r#"{{"secret":"SECRET","pending":[],"paired":[{list}]}}"#
    ));
    let head = format!("GET /v1/devices HTTP/1.0\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    let answer = http::raw(greedy.supervisor.api, head.as_bytes());
    let (_, body) = answer.split_once("\r\n\r\n").expect("has a head");
    assert!(!body.contains("SECRET"));
    let device = |number: usize| {
        format!(
            r#"{{"deviceId":"device-{number}","publicKey":"{key}","big":123456789012345678901234567890,"huge":1e400,"half":"\ud83d","twice":1,"twice":2,"meta":{{"name":"Büro \u00e9"}}}}"#,
            key = "k".repeat(400)
        )
    };
    let devices: Vec<String> = (0..500).map(device).collect();
    let wanted = format!(
        r#"{{"ok":true,"data":{{"pending":[],"paired":[{}]}}}}"#,
        devices.join(",")
    );
    assert!(body == wanted, "{}", &body[..KIB]);
}

#[test]
fn the_memory_of_large_lists_is_given_back() {
    let greedy = Greedy::start(Setup::new());
    let before = greedy.peak();
    greedy.answer(format!(
        r#"{{"pending":[],"paired":{}}}"#,
        arrays(1000 * KIB)
    ));
    for _ in 0..3 {
        assert_eq!(asked(&greedy, "GET", "/v1/devices").status, 200);
    }
    let more = greedy.peak() - before;
    assert!(more < MOST, "{more} KiB more");
    let settled = greedy.resident();
    greedy.answer(format!(
        r#"{{"pending":[],"paired":{}}}"#,
        arrays(100 * KIB)
    ));
    for _ in 0..100 {
        assert_eq!(greedy.supervisor.get("/v1/devices").status, 200);
    }
    let more = greedy.resident().saturating_sub(settled);
    assert!(more < 2 * 1024, "{more} KiB more");
}

/// Clients that ask and do not read, as many as there are places: a few calls at once have their answers in memory.
#[test]
fn clients_that_do_not_read_their_lists_hold_few_of_them() {
    let greedy = Greedy::start(Setup::new());
    let before = greedy.peak();
    greedy.answer(format!(
        r#"{{"pending":[],"paired":{}}}"#,
        arrays(1000 * KIB)
    ));
    let head =
        format!("GET /v1/devices HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n");
    let clients: Vec<_> = (0..60)
        .map(|_| {
            let mut client =
                std::net::TcpStream::connect(greedy.supervisor.api).expect("can connect");
            client.write_all(head.as_bytes()).expect("can write");
            client
        })
        .collect();
    // The last one waits until others have gone, or for as long as a call may take.
    let answer = asked(&greedy, "GET", "/v1/devices");
    assert!([200, 503, 504].contains(&answer.status), "{answer:?}");
    let more = greedy.peak() - before;
    assert!(more < 14 * 1024, "{more} KiB more");
    drop(clients);
}

// Approvals

fn device(size: usize) -> String {
    json!({ "deviceId": "d", "list": vec![[0]; size / 4], "token": "SECRET" }).to_string()
}

fn approve(greedy: &Greedy, request: &str) -> Response {
    greedy
        .supervisor
        .post(&format!("/v1/devices/{request}/approve"))
}

fn forget(greedy: &Greedy) {
    greedy.act(|peer| {
        let _ = peer.hello()?;
        let error = json!({ "code": "INVALID_REQUEST", "message": "unknown requestId" });
        let answer = json!({ "type": "res", "id": "call", "ok": false, "error": error });
        peer.text(&answer.to_string())
    });
}

#[test]
fn approvals_are_remembered_in_little_memory() {
    let greedy = Greedy::start(Setup::new());
    let before = greedy.peak();
    greedy.answer(format!(r#"{{"device":{}}}"#, arrays(900 * KIB)));
    let answer = asked(&greedy, "POST", "/v1/devices/huge/approve");
    assert_fails("huge", &answer, "more than a call may");

    greedy.answer(format!(r#"{{"device":{}}}"#, device(40 * KIB)));
    let first = approve(&greedy, "large");
    assert_eq!(first.status, 200, "{first:?}");
    assert_eq!(first.body["data"]["device"]["list"][9], json!([0]));
    assert_eq!(first.body["data"]["device"]["token"], Value::Null);
    forget(&greedy);
    let second = approve(&greedy, "large");
    let wanted = json!({ "approved": true, "requestId": "large", "device": {} });
    assert_eq!(second.body["data"], wanted);

    greedy.answer(format!(r#"{{"device":{}}}"#, device(15 * KIB)));
    for number in 0..300 {
        assert_eq!(approve(&greedy, &number.to_string()).status, 200);
    }
    let last = approve(&greedy, "last");
    forget(&greedy);
    assert_eq!(approve(&greedy, "last").body, last.body);
    assert_eq!(approve(&greedy, "large").status, 404);
    let more = greedy.peak() - before;
    assert!(more < MOST, "{more} KiB more");
}

// Its files

#[test]
fn a_configuration_of_small_arrays_costs_nothing() {
    let greedy = Greedy::start(Setup::new());
    let before = greedy.peak();
    let folder = greedy.supervisor.setup.root().join(".openclaw");
    fs::create_dir_all(&folder).expect("can make folders");
    let deep = "[".repeat(400_000) + &"]".repeat(400_000);
    let token = |text: &str| format!(r#"{{"x":{text},"gateway":{{"auth":{{"token":"ab"}}}}}}"#);
    for (text, is_its) in [
        (arrays(1000 * KIB), false),
        (token(&arrays(1000 * KIB)), true),
        (token(&arrays(1024 * KIB)), false),
        (token(&deep), false),
        (token(&format!("\"{}\"", "\\u0000".repeat(100_000))), true),
    ] {
        fs::write(folder.join("openclaw.json"), text).expect("can write");
        greedy.act(move |peer| {
            peer.upgrade()?;
            peer.text(r#"{"type":"event","event":"connect.challenge"}"#)?;
            let connect = peer.request()?;
            let token = connect["params"]["auth"]["token"].clone();
            let hello = json!({ "type": "res", "id": "connect", "ok": true, "payload": {} });
            peer.text(&hello.to_string())?;
            let _ = peer.request()?;
            let is_its = token == "ab";
            peer.answer(&format!(r#"{{"paired":[{is_its}]}}"#))
        });
        let answer = asked(&greedy, "GET", "/v1/devices");
        assert_eq!(answer.body["data"]["paired"], json!([is_its]), "{answer:?}");
    }
    let more = greedy.peak() - before;
    assert!(more < MOST, "{more} KiB more");
}

#[test]
fn a_configuration_on_a_disk_that_hangs_fails_the_call_and_nothing_else() {
    let greedy = Greedy::start(Setup::new());
    let folder = greedy.supervisor.setup.root().join(".openclaw");
    let Some(disk) = hung::disk(&folder, 0) else {
        return;
    };
    disk.hang();
    let threads = || {
        let threads = fs::read_dir(format!("/proc/{}/task", greedy.supervisor.pid()));
        threads.expect("it runs").count()
    };
    let before = threads();
    greedy.answer("{}");
    for _ in 0..3 {
        let answer = asked(&greedy, "GET", "/v1/devices");
        assert_fails("hung", &answer, "cannot read the token");
    }
    // Each of these waits on a thread of its own if anything does.
    assert_eq!(threads(), before + 1);
    drop(disk);
    until("the disk's answer", || {
        greedy.supervisor.get("/v1/devices").status == 200
    });
}

#[test]
fn a_gateway_whose_lock_hangs_is_still_stopped() {
    let mut greedy = Greedy::start(Setup::new());
    let folder = greedy.supervisor.setup.root().join(".openclaw");
    let Some(disk) = hung::disk(&folder, 0) else {
        return;
    };
    disk.hang();
    greedy.supervisor.signal(Signal::SIGTERM);
    until("the end", || {
        greedy.supervisor.log().contains("\"stopped\"")
    });
    // The kernel holds a process whose thread waits for a disk, until that answers.
    drop(disk);
    assert_eq!(greedy.supervisor.wait().code(), Some(0));
}

#[test]
fn a_version_is_one_short_line() {
    let greedy = Greedy::start(Setup::new());
    let version = greedy.supervisor.status()["version"]["openclaw"].take();
    assert_eq!(version, "2026.9.6 [31m-fake");
}
