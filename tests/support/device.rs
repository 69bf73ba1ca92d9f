//! A second client of the gateway: a device with a key of its own that asks to be paired.
//!
//! It speaks the gateway's protocol 4 from the outside, as a phone would, and shares no code with the
//! supervisor, so that a wrong idea of the protocol cannot confirm itself.

use std::error::Error;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

use crate::tree::hex;

/// Longest wait for one message: a busy machine answers within seconds, a hung gateway never.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Not the backend client, which the gateway spares the pairing, but one that users pair.
const CLIENT_ID: &str = "openclaw-ios";
const CLIENT_MODE: &str = "ui";
const PLATFORM: &str = "ios";
const ROLE: &str = "operator";
const SCOPES: [&str; 2] = ["operator.read", "operator.write"];

/// What the gateway says to a device that connects.
#[derive(Debug, PartialEq, Eq)]
pub enum Welcome {
    /// The device is paired: the gateway let it in.
    Paired,
    /// It is not: a pairing request with this id waits for approval.
    Pending(String),
}

/// A device's identity, kept for as long as the value lives.
pub struct Device {
    key: Ed25519KeyPair,
}

impl Device {
    /// Makes a device that no gateway has seen.
    pub fn new() -> Result<Self, Box<dyn Error>> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| "cannot make an ed25519 key")?;
        let key = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref())
            .map_err(|_| "cannot read the key just made")?;
        Ok(Self { key })
    }

    /// The id that the gateway derives from the public key: its SHA-256, in hex.
    #[must_use]
    pub fn id(&self) -> String {
        hex(digest(&SHA256, self.key.public_key().as_ref()).as_ref())
    }

    /// Connects once with the gateway's shared token and reports the welcome.
    pub fn connect(&self, gateway: SocketAddr, token: &str) -> Result<Welcome, Box<dyn Error>> {
        let stream = TcpStream::connect_timeout(&gateway, ANSWER_TIMEOUT)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        let (mut socket, _) = tungstenite::client(format!("ws://{gateway}/"), stream)?;

        let challenge = receive(&mut socket, |m| m["event"] == "connect.challenge")?;
        let request = self.connect_request(&challenge["payload"], token)?;
        socket.send(Message::text(request.to_string()))?;
        let answer = receive(&mut socket, |m| m["type"] == "res")?;

        if answer["payload"]["type"] == "hello-ok" {
            return Ok(Welcome::Paired);
        }
        match &answer["error"]["details"]["requestId"] {
            Value::String(id) => Ok(Welcome::Pending(id.clone())),
            _ => Err(format!("the gateway refused the device: {answer}").into()),
        }
    }

    fn connect_request(&self, challenge: &Value, token: &str) -> Result<Value, Box<dyn Error>> {
        let nonce = challenge["nonce"]
            .as_str()
            .ok_or("a challenge without nonce")?;
        let signed_at = challenge["ts"].as_i64().ok_or("a challenge without time")?;
        let id = self.id();
        // The last field, the device family, is empty here and still has its separator.
        let text = format!(
            "v3|{id}|{CLIENT_ID}|{CLIENT_MODE}|{ROLE}|{}|{signed_at}|{token}|{nonce}|{PLATFORM}|",
            SCOPES.join(",")
        );
        let signature = self.key.sign(text.as_bytes());
        Ok(json!({
            "type": "req",
            "id": "1",
            "method": "connect",
            "params": {
                "minProtocol": 4,
                "maxProtocol": 4,
                "client": { "id": CLIENT_ID, "version": "1.0.0", "platform": PLATFORM, "mode": CLIENT_MODE },
                "role": ROLE,
                "scopes": SCOPES,
                "caps": [],
                "auth": { "token": token },
                "device": {
                    "id": id,
                    "publicKey": URL_SAFE_NO_PAD.encode(self.key.public_key()),
                    "signature": URL_SAFE_NO_PAD.encode(signature),
                    "signedAt": signed_at,
                    "nonce": nonce,
                },
            },
        }))
    }
}

/// Reads until a message matches: the gateway may send events between challenge and answer.
fn receive(
    socket: &mut WebSocket<TcpStream>,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value, Box<dyn Error>> {
    loop {
        let message = socket.read()?;
        if message.is_text() {
            let value = serde_json::from_str(message.to_text()?)?;
            if wanted(&value) {
                return Ok(value);
            }
        }
    }
}
