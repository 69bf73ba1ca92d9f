//! The gateway's own protocol (4) over WebSocket on loopback: one connection per call, bounded in time and size.
//!
//! `gateway-client` in mode `backend` with the shared token on direct loopback is upstream's documented exception to device
//! identity. No proxy header may be sent: it would make the connection count as a remote one.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::files;
use crate::config::Config;

/// A call takes milliseconds; a gateway busy with its own start may take seconds.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Largest message of the gateway: a list of devices, never more than this many bytes.
const MAX_MESSAGE: usize = 1 << 20;
const BUFFER: usize = 4 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    #[error("cannot reach the gateway")]
    Connect(#[from] std::io::Error),
    #[error("cannot talk to the gateway")]
    Socket(#[from] Box<tungstenite::Error>),
    #[error("the gateway closed the connection")]
    Closed,
    #[error("the gateway sent what is not its protocol")]
    Protocol,
    /// `message` is the gateway's own sentence, so it is hostile.
    #[error("the gateway refused: {code} {message}")]
    Refused { code: String, message: String },
    #[error("the gateway did not answer in time")]
    TimedOut,
}

impl From<tungstenite::Error> for RpcError {
    fn from(error: tungstenite::Error) -> Self {
        Self::Socket(Box::new(error))
    }
}

/// Connects and makes one call.
pub async fn call(config: &Config, method: &str, params: Value) -> Result<Value, RpcError> {
    timeout(TIME_LIMIT, async {
        let (mut connection, _) = Connection::open(config).await?;
        connection.request("call", method, params).await
    })
    .await
    .map_err(|_| RpcError::TimedOut)?
}

/// The version that the gateway reports of itself.
pub async fn version(config: &Config) -> Result<Option<String>, RpcError> {
    let (_, hello) = timeout(TIME_LIMIT, Connection::open(config))
        .await
        .map_err(|_| RpcError::TimedOut)??;
    let version = hello["server"]["version"].as_str();
    Ok(version.map(|text| text.chars().take(64).collect()))
}

struct Connection(WebSocketStream<TcpStream>);

impl Connection {
    async fn open(config: &Config) -> Result<(Self, Value), RpcError> {
        let limits = WebSocketConfig::default()
            .read_buffer_size(BUFFER)
            .write_buffer_size(0)
            .max_message_size(Some(MAX_MESSAGE))
            .max_frame_size(Some(MAX_MESSAGE));
        let stream = TcpStream::connect(config.gateway_address).await?;
        stream.set_nodelay(true)?;
        let url = format!("ws://{}/", config.gateway_address);
        let (socket, _) = client_async_with_config(url, stream, Some(limits)).await?;
        let mut connection = Self(socket);
        while connection.receive().await?["event"] != "connect.challenge" {}
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
            "auth": { "token": files::token(config) },
        });
        let hello = connection.request("connect", "connect", params).await?;
        Ok((connection, hello))
    }

    async fn request(&mut self, id: &str, method: &str, params: Value) -> Result<Value, RpcError> {
        let request = json!({ "type": "req", "id": id, "method": method, "params": params });
        self.0.send(Message::text(request.to_string())).await?;
        loop {
            let mut answer = self.receive().await?;
            if answer["type"] != "res" || answer["id"] != id {
                continue;
            }
            if answer["ok"] == true {
                return Ok(answer["payload"].take());
            }
            let text = |value: &Value| {
                value
                    .as_str()
                    .unwrap_or_default()
                    .chars()
                    .take(200)
                    .collect()
            };
            return Err(RpcError::Refused {
                code: text(&answer["error"]["code"]),
                message: text(&answer["error"]["message"]),
            });
        }
    }

    async fn receive(&mut self) -> Result<Value, RpcError> {
        loop {
            match self.0.next().await.ok_or(RpcError::Closed)?? {
                Message::Text(text) => {
                    return serde_json::from_str(&text).map_err(|_| RpcError::Protocol);
                }
                Message::Close(_) => return Err(RpcError::Closed),
                // Pings are answered by the library.
                _ => {}
            }
        }
    }
}
