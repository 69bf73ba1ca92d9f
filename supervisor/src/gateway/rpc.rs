//! The gateway's own protocol (4) over WebSocket on loopback: one connection per call, bounded in time, bytes and messages.
//!
//! `gateway-client` in mode `backend` with the shared token on direct loopback is upstream's documented exception to device
//! identity. No proxy header may be sent: it would make the connection count as a remote one.

use std::io;
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message, Utf8Bytes};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::bounded::Bounded;
use super::files;
use crate::blocking;
use crate::config::Config;
use crate::json::Json;

/// A call takes milliseconds; a gateway busy with its own start may take seconds.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);

const KIB: usize = 1024;
const BUFFER: usize = 4 * KIB;

/// What is read on the event loop: it takes less than a millisecond. Larger messages are read on a thread.
const MAX_SHORT: usize = 64 * KIB;

/// Messages and pings of one call. A real gateway sends a handful.
const MAX_MESSAGES: usize = 1000;

/// Pongs and requests that the gateway has not read yet.
const MAX_UNREAD: usize = 64 * KIB;

/// Codes and sentences of the gateway, in characters. Those of more than `MAX_WRITTEN` bytes are left out.
const MAX_CODE: usize = 200;
const MAX_VERSION: usize = 64;
const MAX_WRITTEN: usize = 4 * KIB;

/// Large messages that are read at once, each on a thread with a copy of its own.
static LARGE: Semaphore = Semaphore::const_new(1);

#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    #[error("cannot reach the gateway: {0}")]
    Connect(io::Error),
    #[error("cannot read the token in the gateway's openclaw.json: {0}")]
    Token(io::Error),
    #[error("cannot talk to the gateway: {0}")]
    Socket(Box<tungstenite::Error>),
    #[error("cannot talk to the gateway: it closed the connection before its answer")]
    Closed,
    #[error("cannot read the gateway's answer: it is not of protocol 4, or nested too deeply")]
    Protocol,
    #[error("cannot take the gateway's answer: it sent more than a call may, or reads nothing")]
    TooMuch,
    #[error("cannot read the gateway's answer: no thread for a large one: {0}")]
    NoThread(io::Error),
    /// Both are the gateway's own words, so they are hostile.
    #[error("the gateway refused: {code} {message}")]
    Refused { code: String, message: String },
    #[error("cannot get an answer of the gateway within 10 seconds")]
    TimedOut,
}

impl From<tungstenite::Error> for RpcError {
    fn from(error: tungstenite::Error) -> Self {
        use tungstenite::Error::{AttackAttempt, Capacity, Io, WriteBufferFull};
        match error {
            AttackAttempt | Capacity(_) | WriteBufferFull(_) => Self::TooMuch,
            Io(error) if error.kind() == io::ErrorKind::QuotaExceeded => Self::TooMuch,
            error => Self::Socket(Box::new(error)),
        }
    }
}

/// What is taken of an answer, as bytes of any kind. It may run on a thread.
pub type Take = fn(Json<'_>) -> Vec<u8>;

/// What to ask, and how much may come back.
pub struct Call {
    pub method: &'static str,
    pub params: Value,
    pub size: Size,
    pub take: Take,
}

/// The largest message of a call. All messages together may be twice as large, and the events of a busy gateway beside them.
#[derive(Clone, Copy)]
pub enum Size {
    Short,
    /// 1 MiB: a list of devices.
    Long,
}

impl Size {
    fn message(self) -> usize {
        match self {
            Self::Short => MAX_SHORT,
            Self::Long => 1024 * KIB,
        }
    }

    fn call(self) -> usize {
        2 * self.message() + 2 * MAX_SHORT
    }
}

/// Connects and makes one call.
pub async fn call(config: &Config, call: Call) -> Result<Vec<u8>, RpcError> {
    timeout(TIME_LIMIT, async {
        let (mut connection, _) = Connection::open(config, call.size).await?;
        connection
            .request("call", call.method, call.params, call.take)
            .await
    })
    .await
    .map_err(|_| RpcError::TimedOut)?
}

/// The version that the gateway reports of itself.
pub async fn version(config: &Config) -> Result<Option<String>, RpcError> {
    let (_, version) = timeout(TIME_LIMIT, Connection::open(config, Size::Short))
        .await
        .map_err(|_| RpcError::TimedOut)??;
    Ok(version)
}

struct Connection {
    socket: WebSocketStream<Bounded<TcpStream>>,
    messages: usize,
}

impl Connection {
    /// With the version in the gateway's hello.
    async fn open(config: &Config, size: Size) -> Result<(Self, Option<String>), RpcError> {
        let token = files::token(config).await.map_err(RpcError::Token)?;
        let limits = WebSocketConfig::default()
            .read_buffer_size(BUFFER)
            .write_buffer_size(0)
            .max_write_buffer_size(MAX_UNREAD)
            .max_message_size(Some(size.message()))
            .max_frame_size(Some(size.message()));
        let stream = TcpStream::connect(config.gateway_address).await;
        let stream = stream.map_err(RpcError::Connect)?;
        stream.set_nodelay(true).map_err(RpcError::Connect)?;
        let stream = Bounded::new(stream, size.call());
        let url = format!("ws://{}/", config.gateway_address);
        let (socket, _) = client_async_with_config(url, stream, Some(limits)).await?;
        let mut connection = Self {
            socket,
            messages: 0,
        };
        while !is_challenge(&connection.receive().await?)? {}
        let params = json!({
            "minProtocol": 4,
            "maxProtocol": 4,
            "client": {
                "id": "gateway-client",
                "version": env!("CARGO_PKG_VERSION"),
                "platform": "linux",
                "mode": "backend",
            },
            "role": "operator",
            // Approving a device that asks for more than reading needs it.
            "scopes": ["operator.admin"],
            "caps": [],
            "auth": { "token": token },
        });
        let version = connection
            .request("connect", "connect", params, version_in)
            .await?;
        // Empty for a gateway that does not tell it.
        let version = String::from_utf8(version).ok().filter(|v| !v.is_empty());
        Ok((connection, version))
    }

    async fn request(
        &mut self,
        id: &'static str,
        method: &str,
        params: Value,
        take: Take,
    ) -> Result<Vec<u8>, RpcError> {
        let request = json!({ "type": "req", "id": id, "method": method, "params": params });
        self.socket.send(Message::text(request.to_string())).await?;
        loop {
            let text = self.receive().await?;
            let answer = if text.len() > MAX_SHORT {
                // It is never closed, and a call has a limit of its own.
                let turn = LARGE.acquire().await;
                let read = move || {
                    let answer = answer(&text, id, take);
                    drop((text, turn));
                    answer
                };
                let read = blocking::within(TIME_LIMIT, read).await;
                read.map_err(RpcError::NoThread)?
            } else {
                answer(&text, id, take)
            };
            if let Some(answer) = answer? {
                return Ok(answer);
            }
        }
    }

    async fn receive(&mut self) -> Result<Utf8Bytes, RpcError> {
        loop {
            self.messages += 1;
            if self.messages > MAX_MESSAGES {
                return Err(RpcError::TooMuch);
            }
            match self.socket.next().await.ok_or(RpcError::Closed)?? {
                Message::Text(text) => return Ok(text),
                Message::Close(_) => return Err(RpcError::Closed),
                // Pings are answered by the library.
                _ => {}
            }
        }
    }
}

fn is_challenge(text: &str) -> Result<bool, RpcError> {
    // A larger one takes too long here, and comes after the hello only.
    if text.len() > MAX_SHORT {
        return Err(RpcError::TooMuch);
    }
    let message = Json::read(text).ok_or(RpcError::Protocol)?;
    Ok(message.is("event", "connect.challenge"))
}

/// What is wanted of a message, when it is the answer to the request `id`.
pub fn answer(text: &str, id: &str, take: Take) -> Result<Option<Vec<u8>>, RpcError> {
    let message = Json::read(text).ok_or(RpcError::Protocol)?;
    if !message.is("type", "res") || !message.is("id", id) {
        return Ok(None);
    }
    if message.field("ok").is_some_and(|ok| ok.raw() == "true") {
        let payload = message.field("payload").unwrap_or(Json::NULL);
        return Ok(Some(take(payload)));
    }
    let part = |name| words(message.at(&["error", name]), MAX_CODE).unwrap_or_default();
    Err(RpcError::Refused {
        code: part("code"),
        message: part("message"),
    })
}

fn version_in(hello: Json<'_>) -> Vec<u8> {
    let version = words(hello.at(&["server", "version"]), MAX_VERSION);
    version.unwrap_or_default().into_bytes()
}

/// The beginning of a text of the gateway, as part of a line.
fn words(text: Option<Json<'_>>, most: usize) -> Option<String> {
    let text = files::without_token(text?.text(MAX_WRITTEN)?);
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    Some(clean.take(most).collect())
}
