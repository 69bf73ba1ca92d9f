//! Fetches parts of layers from the store: the wanted frames and nothing else, neighbours with one request, several requests
//! on their way at once. What came is for others to judge; a frame that they doubt is fetched once more.

use std::sync::atomic::{AtomicU64, Ordering};

use hyper::body::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::frames::Frame;
use crate::{
    error::Error,
    snapshot::record::{Layer, layer_key},
    store::{Store, StoreError},
};

/// Bytes that are fetched with one request: about one frame that does not compress.
pub const RANGE: u64 = 4 << 20;
/// Requests on their way at once. Each costs twice its range and a frame in memory, and hides one round trip.
const LANES: usize = 4;

/// A part of an object that a snapshot names: that it is not there is damage.
pub async fn range(store: &dyn Store, key: &str, offset: u64, length: u64) -> Result<Bytes, Error> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    store
        .get_range(key, offset, length)
        .await
        .map_err(|error| match error {
            StoreError::NotFound => Error::Damaged {
                key: key.to_owned(),
                reason: "a snapshot names it, and it is not there".to_owned(),
            },
            StoreError::TooShort => Error::Damaged {
                key: key.to_owned(),
                reason: "it ends before what a snapshot names".to_owned(),
            },
            other => Error::store("read", key)(other),
        })
}

/// Some neighbouring frames that come with one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub offset: u64,
    length: u64,
    /// Each with the place of its first byte in the raw stream.
    pub frames: Vec<(u64, Frame)>,
}

/// The requests that bring the wanted frames and nothing else.
pub fn plan(table: &[Frame], wanted: &[bool]) -> Vec<Request> {
    let mut requests: Vec<Request> = Vec::new();
    let (mut stored, mut raw) = (0, 0);
    for (frame, wanted) in table.iter().zip(wanted) {
        if *wanted {
            let fits = |last: &&mut Request| {
                last.offset + last.length == stored && last.length + frame.stored <= RANGE
            };
            if let Some(last) = requests.last_mut().filter(fits) {
                last.length += frame.stored;
                last.frames.push((raw, frame.clone()));
            } else {
                requests.push(Request {
                    offset: stored,
                    length: frame.stored,
                    frames: vec![(raw, frame.clone())],
                });
            }
        }
        stored += frame.stored;
        raw += frame.raw;
    }
    requests
}

/// The frames of a layer on their way: the half that talks to the store.
pub struct Download {
    layer: Layer,
    requests: Vec<Request>,
    lanes: Vec<Supply>,
    start: Start,
}

/// How many requests are on their way at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// As many as ever.
    Full,
    /// One, until so much has come as one brings: with little time and a slow store, it alone may come.
    Slow,
}

/// How many requests may be on their way: as many as there are permits.
struct Gate {
    permits: Semaphore,
    /// Bytes that have to come until all lanes may be under way.
    until_full: AtomicU64,
}

impl Gate {
    fn new(start: Start) -> Self {
        let (permits, until_full) = match start {
            Start::Full => (LANES, 0),
            Start::Slow => (1, RANGE / 2),
        };
        Self {
            permits: Semaphore::new(permits),
            until_full: AtomicU64::new(until_full),
        }
    }

    /// Takes note of what has come.
    fn pass(&self, bytes: u64) {
        let left = self.until_full.load(Ordering::Relaxed);
        self.until_full
            .store(left.saturating_sub(bytes), Ordering::Relaxed);
        if left > 0 && bytes >= left {
            self.permits.add_permits(LANES - 1);
        }
    }
}

/// The store's ends of one unpacking thread.
struct Supply {
    ranges: mpsc::Sender<(Request, Bytes)>,
    /// Frames that did not come as they are on the store, or are damaged there.
    again: mpsc::Receiver<Again>,
}

/// The other ends: what comes, for whoever unpacks it.
pub struct Arrivals {
    ranges: mpsc::Receiver<(Request, Bytes)>,
    again: mpsc::Sender<Again>,
}

/// A frame that is wanted a second time.
struct Again {
    offset: u64,
    length: u64,
    bytes: oneshot::Sender<Bytes>,
}

impl Download {
    /// A download of what was planned, and what will come of it: a lane each, and requests go round the lanes in turn.
    pub fn new(layer: &Layer, requests: Vec<Request>, start: Start) -> (Self, Vec<Arrivals>) {
        let lane = |_| {
            let (sender, ranges) = mpsc::channel(1);
            let (asks, again) = mpsc::channel(1);
            let supply = Supply {
                ranges: sender,
                again,
            };
            let arrivals = Arrivals {
                ranges,
                again: asks,
            };
            (supply, arrivals)
        };
        let (lanes, arrivals) = (0..LANES.min(requests.len())).map(lane).unzip();
        let download = Self {
            layer: layer.clone(),
            requests,
            lanes,
            start,
        };
        (download, arrivals)
    }

    /// Fetches everything, for as long as somebody reads. Gives the number of bytes that came.
    pub async fn run(self, store: &dyn Store) -> Result<u64, Error> {
        let Self {
            layer,
            requests,
            lanes,
            start,
        } = self;
        let key = layer_key(&layer.id);
        let gate = Gate::new(start);
        let mut lanes = lanes.into_iter();
        let mut run = |first: usize| {
            let supply = lanes.next();
            let mine: Vec<Request> = requests
                .iter()
                .skip(first)
                .step_by(LANES)
                .cloned()
                .collect();
            lane(store, &key, mine, supply, &gate)
        };
        let (a, b, c, d) = tokio::join!(run(0), run(1), run(2), run(3));
        Ok(a? + b? + c? + d?)
    }
}

async fn lane(
    store: &dyn Store,
    key: &str,
    requests: Vec<Request>,
    supply: Option<Supply>,
    gate: &Gate,
) -> Result<u64, Error> {
    let mut got = 0;
    let Some(Supply { ranges, mut again }) = supply else {
        return Ok(0);
    };
    for request in requests {
        // The place first: what is fetched has somewhere to go. Without a reader there is nothing left to do; it says why.
        let place = loop {
            tokio::select! {
                place = ranges.reserve() => break place,
                Some(frame) = again.recv() => got += frame.fetch(store, key).await?,
            }
        };
        let Ok(place) = place else {
            break;
        };
        // In turn, as the requests are: the semaphore is fair, and is never closed.
        let permit = gate.permits.acquire().await;
        let bytes = range(store, key, request.offset, request.length).await?;
        drop(permit);
        gate.pass(request.length);
        got += request.length;
        place.send((request, bytes));
    }
    drop(ranges);
    while let Some(frame) = again.recv().await {
        got += frame.fetch(store, key).await?;
    }
    Ok(got)
}

impl Again {
    async fn fetch(self, store: &dyn Store, key: &str) -> Result<u64, Error> {
        let bytes = range(store, key, self.offset, self.length).await?;
        // Nobody takes it when the reader has gone.
        let _ = self.bytes.send(bytes);
        Ok(self.length)
    }
}

impl Arrivals {
    /// The next request with what it brought; `None` after the last one, or where one failed, which the download says.
    pub fn next(&mut self) -> Option<(Request, Bytes)> {
        self.ranges.blocking_recv()
    }

    /// Fetches a frame once more; `None` where that failed, which the download says.
    pub fn ask(&self, offset: u64, length: u64) -> Option<Bytes> {
        let (bytes, answer) = oneshot::channel();
        let again = Again {
            offset,
            length,
            bytes,
        };
        self.again.blocking_send(again).ok()?;
        answer.blocking_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wanted_frames_are_asked_for_and_neighbours_together() {
        let frame = |stored| Frame {
            raw: 10,
            stored,
            sha256: String::new(),
        };
        let table = [frame(100), frame(RANGE), frame(5), frame(6), frame(7)];
        let places = |wanted: [bool; 5]| -> Vec<(u64, u64, u64)> {
            let requests = plan(&table, &wanted);
            let first = |request: &Request| request.frames[0].0;
            requests
                .iter()
                .map(|request| (request.offset, request.length, first(request)))
                .collect()
        };
        assert_eq!(places([false; 5]), []);
        assert_eq!(
            places([true; 5]),
            [(0, 100, 0), (100, RANGE, 10), (100 + RANGE, 18, 20)]
        );
        assert_eq!(
            places([true, false, true, false, true]),
            [(0, 100, 0), (100 + RANGE, 5, 20), (111 + RANGE, 7, 40)]
        );
    }
}
