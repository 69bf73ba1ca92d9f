//! A small load generator: so many connections, each asking as soon as it has its answer.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::Outcome;

/// Answers per second, and the median, the 99th percentile and the longest of their times in microseconds.
#[derive(Clone, Copy)]
pub struct Load {
    pub rate: f64,
    pub median: f64,
    pub slowest: f64,
    pub longest: f64,
    /// Requests whose connection was closed without an answer.
    pub lost: usize,
}

/// Which connection a request takes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Line {
    /// The one of the request before.
    Kept,
    /// One of its own; the time for it counts too.
    Fresh,
}

pub fn load(
    address: SocketAddr,
    head: &str,
    line: Line,
    connections: usize,
    time: Duration,
) -> Outcome<Load> {
    let request = format!("GET /v1/status HTTP/1.1\r\nHost: x\r\n{head}\r\n");
    let begun = Instant::now();
    let asked = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|_| scope.spawn(|| ask_on(address, &request, line, begun + time)))
            .collect();
        let all = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| std::io::ErrorKind::Other)?);
        all.collect::<std::io::Result<Vec<_>>>()
    })?;
    let took = begun.elapsed().as_secs_f64();
    let lost = asked.iter().map(|(_, lost)| lost).sum();
    let mut times: Vec<f64> = asked.into_iter().flat_map(|(times, _)| times).collect();
    times.sort_by(f64::total_cmp);
    let (Some(median), Some(slowest), Some(longest)) = (
        times.get(times.len() / 2),
        times.get(times.len() * 99 / 100),
        times.last(),
    ) else {
        return Err("nothing was answered".into());
    };
    Ok(Load {
        rate: times.len() as f64 / took,
        median: *median,
        slowest: *slowest,
        longest: *longest,
        lost,
    })
}

/// Asks again and again; gives the times of the answers, and how many there were not.
fn ask_on(
    address: SocketAddr,
    request: &str,
    line: Line,
    until: Instant,
) -> std::io::Result<(Vec<f64>, usize)> {
    let mut kept = None;
    let (mut times, mut lost) = (Vec::new(), 0);
    while Instant::now() < until {
        let begun = Instant::now();
        let mut stream = match kept.take() {
            Some(stream) => stream,
            None => TcpStream::connect(address)?,
        };
        stream.set_nodelay(true)?;
        match ask(&mut stream, request) {
            Ok(()) => {
                times.push(begun.elapsed().as_secs_f64() * 1e6);
                kept = Some(stream).filter(|_| line == Line::Kept);
            }
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => return Err(error),
            Err(_) => lost += 1,
        }
    }
    Ok((times, lost))
}

fn ask(stream: &mut TcpStream, request: &str) -> std::io::Result<()> {
    let mut buffer = [0; 8192];
    stream.write_all(request.as_bytes())?;
    let mut length = 0;
    loop {
        let count = stream.read(&mut buffer[length..])?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        length += count;
        let text = std::str::from_utf8(&buffer[..length]).unwrap_or_default();
        if !text.starts_with("HTTP/1.1 200") {
            let kind = std::io::ErrorKind::InvalidData;
            return Err(std::io::Error::new(kind, text.to_owned()));
        }
        if whole(text).is_some_and(|whole| whole == length) {
            return Ok(());
        }
    }
}

/// How long an answer is in all, once its head is there.
fn whole(text: &str) -> Option<usize> {
    let (head, _) = text.split_once("\r\n\r\n")?;
    let (_, rest) = head.split_once("content-length: ")?;
    let body: usize = rest.lines().next()?.parse().ok()?;
    Some(head.len() + 4 + body)
}
