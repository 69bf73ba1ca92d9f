//! A small load generator: so many connections, each asking as soon as it has its answer.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::Outcome;

/// Requests per second, and the median and 99th percentile of an answer's time in microseconds.
#[derive(Clone, Copy)]
pub struct Load {
    pub rate: f64,
    pub median: f64,
    pub slowest: f64,
}

pub fn load(address: SocketAddr, head: &str, connections: usize, time: Duration) -> Outcome<Load> {
    let request = format!("GET /v1/status HTTP/1.1\r\nHost: x\r\n{head}\r\n");
    let begun = Instant::now();
    let times = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|_| scope.spawn(|| ask(address, &request, begun + time)))
            .collect();
        let all = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| std::io::ErrorKind::Other)?);
        all.collect::<std::io::Result<Vec<_>>>()
    })?;
    let took = begun.elapsed().as_secs_f64();
    let mut times: Vec<f64> = times.into_iter().flatten().collect();
    times.sort_by(f64::total_cmp);
    let (Some(median), Some(slowest)) = (
        times.get(times.len() / 2),
        times.get(times.len() * 99 / 100),
    ) else {
        return Err("nothing was answered".into());
    };
    Ok(Load {
        rate: times.len() as f64 / took,
        median: *median,
        slowest: *slowest,
    })
}

fn ask(address: SocketAddr, request: &str, until: Instant) -> std::io::Result<Vec<f64>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut times = Vec::new();
    let mut buffer = [0; 8192];
    while Instant::now() < until {
        let begun = Instant::now();
        stream.write_all(request.as_bytes())?;
        let mut length = 0;
        loop {
            let count = stream.read(&mut buffer[length..])?;
            length += count;
            let text = std::str::from_utf8(&buffer[..length]).unwrap_or_default();
            if count == 0 || !text.starts_with("HTTP/1.1 200") {
                return Err(std::io::Error::other(text.to_owned()));
            }
            if whole(text).is_some_and(|whole| whole == length) {
                break;
            }
        }
        times.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

/// How long an answer is in all, once its head is there.
fn whole(text: &str) -> Option<usize> {
    let (head, _) = text.split_once("\r\n\r\n")?;
    let (_, rest) = head.split_once("content-length: ")?;
    let body: usize = rest.lines().next()?.parse().ok()?;
    Some(head.len() + 4 + body)
}
