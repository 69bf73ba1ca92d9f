//! One small HTTP request on loopback: the gateway's readiness, and our own status for `healthcheck`.
//!
//! HTTP/1.0, so the answer ends with the connection and is never chunked: that is all there is to parse, and a client
//! library would be larger than the rest of this program's networking. Bounded in time and size: the answer is hostile.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use crate::json::Json;

const TIME_LIMIT: Duration = Duration::from_secs(2);
const MAX_ANSWER: u64 = 64 * 1024;

/// Between two looks at a gateway that starts. A refused connection costs microseconds, its start takes seconds.
const INTERVAL: Duration = Duration::from_millis(100);

/// Waits until the gateway says that it has started. An open port, or a page at that path, is not enough.
pub async fn until_ready(gateway: SocketAddr) {
    loop {
        if let Ok((200, body)) = get(gateway, "/startupz", "").await
            && Json::read(&body).is_some_and(|body| body.is("status", "started"))
        {
            return;
        }
        sleep(INTERVAL).await;
    }
}

/// Status and body of `path`. `headers` is empty or lines that end in CR LF.
pub async fn get(address: SocketAddr, path: &str, headers: &str) -> io::Result<(u16, String)> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n{headers}\r\n");
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer = match timeout(TIME_LIMIT, exchange).await {
        Ok(answer) => answer?,
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    parse(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn parse(answer: &[u8]) -> Option<(u16, String)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let line = answer.strip_prefix(b"HTTP/1.")?.get(2..5)?;
    let status = std::str::from_utf8(line).ok()?.parse().ok()?;
    let body = std::str::from_utf8(answer.get(end + 4..)?).ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_of_http_count() {
        let started = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n{\"status\":\"started\"}";
        let (status, body) = parse(started).expect("is an answer");
        assert_eq!((status, body.as_str()), (200, "{\"status\":\"started\"}"));
        for answer in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n\r\n\xff",
            b"HTTP/1.1\r\n\r\n{}",
            b"SSH-2.0\r\n\r\n{}",
            b"HTTP/1.1 200 OK\r\n{}",
        ] {
            assert!(parse(answer).is_none());
        }
    }
}
