//! What hyper answers by itself, to what it cannot read, leaves in our envelope like every other answer.
//!
//! It writes a bare head then, and there is no hook for it. An answer of ours always has a content type, so a head with a
//! status from 400 on and without one is hyper's own; it is the last thing on its connection.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::StatusCode;
use hyper::rt::{Read, ReadBufCursor, Write};

use super::envelope::Problem;

pub struct Wire<S>(pub S);

impl<S: Read + Unpin> Read for Wire<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buffer)
    }
}

/// Vectors of buffers are not taken, so hyper hands over a head in one piece.
impl<S: Write + Unpin> Write for Wire<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut self.0);
        match bare(bytes) {
            // A fresh connection has room for it, and one that has none is closed without the rest.
            Some(status) => stream
                .poll_write(context, enveloped(status).as_bytes())
                .map_ok(|_| bytes.len()),
            None => stream.poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// The status of a head that hyper has made up itself.
fn bare(bytes: &[u8]) -> Option<StatusCode> {
    const TYPE: &[u8] = b"content-type:";
    let status = bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
    let status = StatusCode::from_bytes(status).ok()?;
    let is_ours = || bytes.windows(TYPE.len()).any(|part| part == TYPE);
    (status.as_u16() >= 400 && !is_ours()).then_some(status)
}

fn enveloped(status: StatusCode) -> String {
    let body = Problem::Unreadable(status).body().to_string();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncache-control: no-store\r\nconnection: close\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_head_of_an_error_is_replaced() {
        assert_eq!(
            bare(b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n\r\n"),
            Some(StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE)
        );
        for other in [
            &b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n\r\n{}"[..],
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.1 4",
            b"{\"ok\":false}",
            b"",
        ] {
            assert_eq!(bare(other), None);
        }
        let answer = enveloped(StatusCode::URI_TOO_LONG);
        let (head, body) = answer.split_once("\r\n\r\n").expect("has a head");
        assert!(head.starts_with("HTTP/1.1 414 URI Too Long\r\n"));
        assert!(head.ends_with(&format!("content-length: {}", body.len())));
        assert_eq!(bare(answer.as_bytes()), None);
    }
}
