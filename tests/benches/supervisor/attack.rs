//! Strangers without the token, as many and as fast as one thread can make them.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::Outcome;
use crate::load::{Line, Load, load};

/// Connections that are held open at once, unless the limit on descriptors is lower.
const HELD: usize = 10_000;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Attack {
    None,
    /// Connections that say nothing, and new ones for those that are closed.
    Silence,
    /// The same with heads of requests that never end.
    HalfHeads,
    /// TLS hellos, HTTP/2 prefaces, huge heads and worse, each on a connection of its own.
    Noise,
    /// Whole requests with a wrong token, on one connection after the other.
    Guesses,
}

impl Attack {
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::Silence,
        Self::HalfHeads,
        Self::Noise,
        Self::Guesses,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "nobody",
            Self::Silence => "10,000 silent connections",
            Self::HalfHeads => "10,000 half heads",
            Self::Noise => "what is no request",
            Self::Guesses => "wrong tokens",
        }
    }

    /// What whoever has the token gets meanwhile, and how many strangers came per second.
    pub fn beside(
        self,
        address: SocketAddr,
        head: &str,
        line: Line,
        time: Duration,
    ) -> Outcome<(Load, f64)> {
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let strangers = scope.spawn(|| self.make(address, &is_over));
            let load = load(address, head, line, 1, time);
            is_over.store(true, Ordering::Relaxed);
            let strangers = strangers.join().map_err(|_| "the strangers panicked")?;
            Ok((load?, strangers as f64 / time.as_secs_f64()))
        })
    }

    fn make(self, address: SocketAddr, is_over: &AtomicBool) -> u64 {
        let huge = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
        let noise = [
            &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            huge.as_bytes(),
            b"POST /v1/backup HTTP/1.1\r\nTransfer-Encoding: chunked, chunked\r\n\r\nzz\r\n",
            b"\0\0\0\0\r\n\r\n",
        ];
        let mut held = VecDeque::new();
        let mut count = 0;
        while self != Self::None && !is_over.load(Ordering::Relaxed) {
            // Without a descriptor to spare, some of ours have to go.
            let Ok(mut stream) = TcpStream::connect(address) else {
                held.truncate(held.len() / 2);
                continue;
            };
            // A connection that is cut meanwhile is what it came for.
            let at = usize::try_from(count).unwrap_or_default() % noise.len();
            let _ = stream.write_all(match self {
                Self::None | Self::Silence => b"",
                Self::HalfHeads => b"GET /v1/status HTTP/1.1\r\nX: ",
                Self::Noise => noise[at],
                Self::Guesses => b"GET /v1/status HTTP/1.1\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n",
            });
            if matches!(self, Self::Noise | Self::Guesses) {
                let _ = stream.set_read_timeout(Some(Duration::from_millis(10)));
                let _ = stream.read(&mut [0; 1024]);
            } else {
                held.push_back(stream);
                if held.len() > HELD {
                    held.pop_front();
                }
            }
            count += 1;
        }
        count
    }
}
