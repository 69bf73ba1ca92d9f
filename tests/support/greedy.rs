//! A gateway that the test itself speaks for, byte by byte: what the supervisor starts only sleeps.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tungstenite::handshake::derive_accept_key;

use crate::supervisor::{Setup, Supervisor};

pub const TEXT: u8 = 1;
pub const CONTINUATION: u8 = 0;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;

/// The last frame of its message, and the flag of a compressed one.
pub const LAST: u8 = 0x80;
pub const COMPRESSED: u8 = 0x40;

/// What the gateway does with a call, from its handshake on. An error is the end of the connection.
type Act = Arc<dyn Fn(&mut Peer) -> io::Result<()> + Send + Sync>;

pub struct Greedy {
    pub supervisor: Supervisor,
    act: Arc<Mutex<Act>>,
}

impl Greedy {
    /// A supervisor whose gateway is ready and has told its version; it takes calls and answers none.
    pub fn start(setup: Setup) -> Self {
        let listener = TcpListener::bind(setup.gateway).expect("the port is free");
        let quiet: Act = Arc::new(|peer| peer.hello().map(drop));
        let act = Arc::new(Mutex::new(quiet));
        let shared = act.clone();
        // Until the process of the test ends: nobody knows its port afterwards.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let act = shared.lock().unwrap_or_else(PoisonError::into_inner);
                let act = act.clone();
                std::thread::spawn(move || serve(stream, &act));
            }
        });
        let supervisor = setup.command(&["/bin/sleep", "1000"]).start();
        crate::wait::until("the version", || {
            supervisor.status()["version"]["openclaw"].is_string()
        });
        Self { supervisor, act }
    }

    /// From the next call on.
    pub fn act(&self, act: impl Fn(&mut Peer) -> io::Result<()> + Send + Sync + 'static) {
        *self.act.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(act);
    }

    /// Answers each call with this as its payload.
    pub fn answer(&self, payload: impl Into<String>) {
        let payload = payload.into();
        self.act(move |peer| {
            let _ = peer.hello()?;
            peer.answer(&payload)
        });
    }

    /// KiB that the supervisor has had at most.
    pub fn peak(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// KiB that it has now.
    pub fn resident(&self) -> u64 {
        self.memory("VmRSS:")
    }

    fn memory(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.supervisor.pid());
        let status = std::fs::read_to_string(path).expect("it runs");
        let found = status.lines().find_map(|line| line.strip_prefix(name));
        let number = found.and_then(|rest| rest.split_whitespace().next());
        let number = number.and_then(|number| number.parse().ok());
        number.expect("is a number of KiB")
    }
}

fn serve(mut stream: TcpStream, act: &Act) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_exact(&mut byte).is_err() {
            return;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if head.starts_with("GET /startupz") {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"status\":\"started\"}");
        return;
    }
    let key = head.lines().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        (name.eq_ignore_ascii_case("sec-websocket-key")).then(|| value.trim().to_owned())
    });
    let key = key.expect("it is a WebSocket");
    // Whatever it does, the supervisor may hang up on it.
    let _ = act(&mut Peer { stream, key });
}

/// The gateway's end of one call.
pub struct Peer {
    pub stream: TcpStream,
    key: String,
}

impl Peer {
    /// Takes the WebSocket.
    pub fn upgrade(&mut self) -> io::Result<()> {
        let accept = derive_accept_key(self.key.as_bytes());
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\n\r\n"
        );
        self.stream.write_all(head.as_bytes())
    }

    /// Takes the WebSocket and the token, and gives the call that comes then.
    pub fn hello(&mut self) -> io::Result<Value> {
        self.upgrade()?;
        self.text(r#"{"type":"event","event":"connect.challenge","payload":{"nonce":"n"}}"#)?;
        let connect = self.request()?;
        let hello = json!({ "server": { "version": "2026.9.6\u{1b}[31m-fake" } });
        let hello = json!({ "type": "res", "id": connect["id"], "ok": true, "payload": hello });
        self.text(&hello.to_string())?;
        self.request()
    }

    /// Answers the call.
    pub fn answer(&mut self, payload: &str) -> io::Result<()> {
        self.text(&format!(
            r#"{{"type":"res","id":"call","ok":true,"payload":{payload}}}"#
        ))
    }

    pub fn text(&mut self, text: &str) -> io::Result<()> {
        self.frame(LAST | TEXT, text.as_bytes())
    }

    pub fn frame(&mut self, kind: u8, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&frame(kind, data))
    }

    /// Writes the same for ever.
    pub fn flood(&mut self, bytes: &[u8]) -> io::Result<()> {
        let many = bytes.repeat(1 + 65_536 / bytes.len());
        loop {
            self.stream.write_all(&many)?;
        }
    }

    /// Waits until the supervisor hangs up.
    pub fn wait(&mut self) -> io::Result<()> {
        self.stream.read_to_end(&mut Vec::new()).map(drop)
    }

    /// The next message of the supervisor.
    pub fn request(&mut self) -> io::Result<Value> {
        let mut start = [0; 2];
        self.stream.read_exact(&mut start)?;
        let size = match start[1] & 0x7f {
            126 => {
                let mut size = [0; 2];
                self.stream.read_exact(&mut size)?;
                u16::from_be_bytes(size).into()
            }
            size => usize::from(size),
        };
        let mut mask = [0; 4];
        self.stream.read_exact(&mut mask)?;
        let mut data = vec![0; size];
        self.stream.read_exact(&mut data)?;
        for (byte, mask) in data.iter_mut().zip(mask.iter().cycle()) {
            *byte ^= mask;
        }
        Ok(serde_json::from_slice(&data).unwrap_or_default())
    }
}

pub fn frame(kind: u8, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    match (u8::try_from(data.len()), u16::try_from(data.len())) {
        (Ok(size @ ..126), _) => frame.push(size),
        (_, Ok(size)) => {
            frame.push(126);
            frame.extend(size.to_be_bytes());
        }
        _ => {
            frame.push(127);
            frame.extend((data.len() as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(data);
    frame
}
