//! Reads layers back: index and frames are checked against their sha256 before anything is made of them.

use std::{
    fs::File,
    io::{Seek, Write},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

use hyper::body::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};
use zstd::bulk::Decompressor;

use super::{
    footer,
    frames::{Frame, LARGEST},
    index::{IndexReader, LayerHeader},
    spool::{Spool, SpoolReader},
    writer::Halt,
};
use crate::{
    error::Error,
    snapshot::{
        id::hex,
        record::{FORMAT, Layer, layer_key},
    },
    store::{Store, twice},
};

/// Bytes that are fetched with one request: about one frame that does not compress.
const RANGE: u64 = 4 << 20;
/// Requests on their way at once. Each costs twice its range and a frame in memory, and hides one round trip.
const LANES: usize = 4;

fn damaged(layer: &Layer, reason: impl Into<String>) -> Error {
    Error::Damaged {
        key: layer_key(&layer.id),
        reason: reason.into(),
    }
}

/// The index of a layer, on the local disk.
pub struct LayerIndex {
    pub layer: Layer,
    pub frames: Vec<Frame>,
    spool: Spool,
}

impl LayerIndex {
    /// Fetches the index of a layer into `file`, and judges it.
    pub async fn fetch(store: &dyn Store, layer: &Layer, mut file: File) -> Result<Self, Error> {
        twice(async || {
            file.rewind().map_err(Error::local(
                "write",
                "the index under way in RUNTIME_STATE",
            ))?;
            fetch_index(store, layer, &mut file).await
        })
        .await?;
        Self::judge(layer, file)
    }

    /// An index in a file, if its header can be believed.
    pub fn judge(layer: &Layer, file: File) -> Result<Self, Error> {
        let mut index = Self {
            layer: layer.clone(),
            frames: Vec::new(),
            spool: Spool::new(file),
        };
        let mut lines = index.open()?;
        index.frames = check_header(layer, lines.line().ok().flatten())?.frames;
        Ok(index)
    }

    /// Its lines behind the header.
    pub fn lines(&self) -> Result<IndexReader<SpoolReader>, Error> {
        let mut lines = self.open()?;
        match lines.line() {
            Ok(Some(_)) => Ok(lines),
            Ok(None) | Err(_) => Err(damaged(&self.layer, "its index has no header")),
        }
    }

    fn open(&self) -> Result<IndexReader<SpoolReader>, Error> {
        IndexReader::new(self.spool.reader()).map_err(Error::local("set up", "zstd"))
    }
}

async fn fetch_index(store: &dyn Store, layer: &Layer, file: &mut File) -> Result<(), Error> {
    let key = layer_key(&layer.id);
    let mut sum = Sha256::new();
    let mut at = 0;
    while at < layer.index_size {
        let length = RANGE.min(layer.index_size - at);
        let bytes = range(store, &key, layer.index_offset + at, length).await?;
        sum.update(&bytes);
        file.write_all(&bytes).map_err(Error::local(
            "write",
            "the index under way in RUNTIME_STATE",
        ))?;
        at += length;
    }
    let got = hex(&sum.finalize());
    if got == layer.index_sha256 {
        return Ok(());
    }
    let want = &layer.index_sha256;
    let reason = format!("expected sha256 {want} of its index, got {got}");
    Err(damaged(layer, reason))
}

/// Judges the first line of a layer's index.
fn check_header(layer: &Layer, line: Option<&[u8]>) -> Result<LayerHeader, Error> {
    let header: LayerHeader = line
        .and_then(|line| serde_json::from_slice(line).ok())
        .ok_or_else(|| damaged(layer, "its index has no header"))?;
    if header.format != FORMAT {
        let reason = format!("it has format {}, this tool reads {FORMAT}", header.format);
        return Err(damaged(layer, reason));
    }
    if header.layers.first() != Some(&layer.id) {
        return Err(damaged(layer, "its index is another layer's"));
    }
    let too_large = |frame: &&Frame| frame.raw.max(frame.stored) > LARGEST as u64;
    if header.frames.iter().find(too_large).is_some() {
        return Err(damaged(layer, "a frame is larger than any writer makes it"));
    }
    let stored: u64 = header.frames.iter().map(|frame| frame.stored).sum();
    if stored + footer::HEADER as u64 != layer.index_offset {
        return Err(damaged(
            layer,
            "its frames do not end where its index begins",
        ));
    }
    Ok(header)
}

async fn range(store: &dyn Store, key: &str, offset: u64, length: u64) -> Result<Bytes, Error> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    store
        .get_range(key, offset, length)
        .await
        .map_err(|error| match error {
            crate::store::StoreError::NotFound => Error::Damaged {
                key: key.to_owned(),
                reason: "a snapshot names it, and it is not there".to_owned(),
            },
            crate::store::StoreError::TooShort => Error::Damaged {
                key: key.to_owned(),
                reason: "it ends before what a snapshot names".to_owned(),
            },
            other => Error::store("read", key)(other),
        })
}

/// Some neighbouring frames that come with one request.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    offset: u64,
    length: u64,
    /// Each with the place of its first byte in the raw stream.
    frames: Vec<(u64, Frame)>,
}

/// The requests that bring the wanted frames and nothing else.
fn plan(table: &[Frame], wanted: &[bool]) -> Vec<Request> {
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
}

/// The store's ends of one unpacking thread.
struct Supply {
    ranges: mpsc::Sender<(Request, Bytes)>,
    /// Frames that did not come as they are on the store, or are damaged there.
    again: mpsc::Receiver<Again>,
}

/// A frame that is wanted a second time.
struct Again {
    offset: u64,
    length: u64,
    bytes: oneshot::Sender<Bytes>,
}

/// The wanted parts of a layer's raw tar stream, forward only: the half that reads. In between, frames are checked and
/// unpacked on a thread for each lane; requests go round the lanes in turn, so the reader finds the frames in order.
pub struct RawStream {
    layer: Layer,
    lanes: Vec<Lane>,
    /// Frames still to come from each request, in turn.
    due: std::vec::IntoIter<usize>,
    turn: usize,
    left: usize,
    current: Vec<u8>,
    /// Place of `current` in the raw stream.
    start: u64,
    /// Place of the last frame that was not sound.
    broken: Option<(u64, u64)>,
}

/// The reader's ends of one unpacking thread.
struct Lane {
    unpacked: Receiver<Unpacked>,
    /// Buffers go back here to be filled again.
    returns: Sender<Vec<u8>>,
}

/// A frame on its way to the reader: its place in the raw stream, its length there, and its bytes, if it is sound.
struct Unpacked {
    start: u64,
    length: u64,
    bytes: Result<Vec<u8>, Error>,
}

/// What is done with frames on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// Their hashes are compared, and that is all.
    Hash,
    /// They are unpacked, too.
    Unpack,
}

/// Prepares to read the frames of a layer that are wanted.
pub fn stream(
    index: &LayerIndex,
    wanted: &[bool],
    check: Check,
) -> Result<(Download, RawStream), Error> {
    let requests = plan(&index.frames, wanted);
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..LANES.min(requests.len()) {
        let (sender, ranges) = mpsc::channel(1);
        let (asks, again) = mpsc::channel(1);
        let (frames, unpacked) = sync_channel(0);
        let (returns, spare) = channel();
        let layer = index.layer.clone();
        let decompressor = Decompressor::new().map_err(Error::local("set up", "zstd"))?;
        thread::Builder::new()
            .name("unpacker".to_owned())
            .spawn(move || {
                let mut lane = Unpacker {
                    layer,
                    check,
                    decompressor,
                    spare,
                    again: asks,
                };
                lane.run(ranges, &frames);
            })
            .map_err(Error::local("start", "a thread that unpacks"))?;
        senders.push(Supply {
            ranges: sender,
            again,
        });
        receivers.push(Lane { unpacked, returns });
    }
    let due: Vec<usize> = requests.iter().map(|r| r.frames.len()).collect();
    let download = Download {
        layer: index.layer.clone(),
        requests,
        lanes: senders,
    };
    let raw = RawStream {
        layer: index.layer.clone(),
        lanes: receivers,
        due: due.into_iter(),
        turn: 0,
        left: 0,
        current: Vec::new(),
        start: 0,
        broken: None,
    };
    Ok((download, raw))
}

impl Download {
    /// Fetches everything, for as long as somebody reads. Gives the number of bytes that came.
    pub async fn run(self, store: &dyn Store) -> Result<u64, Error> {
        let Self {
            layer,
            requests,
            lanes,
        } = self;
        let key = layer_key(&layer.id);
        let mut lanes = lanes.into_iter();
        let mut run = |first: usize| {
            let supply = lanes.next();
            let mine: Vec<Request> = requests
                .iter()
                .skip(first)
                .step_by(LANES)
                .cloned()
                .collect();
            lane(store, &key, mine, supply)
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
        let bytes = range(store, key, request.offset, request.length).await?;
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

/// One lane: ranges in, unpacked frames out, until either end is closed.
struct Unpacker {
    layer: Layer,
    check: Check,
    decompressor: Decompressor<'static>,
    spare: Receiver<Vec<u8>>,
    again: mpsc::Sender<Again>,
}

impl Unpacker {
    fn run(&mut self, mut ranges: mpsc::Receiver<(Request, Bytes)>, frames: &SyncSender<Unpacked>) {
        while let Some((request, mut bytes)) = ranges.blocking_recv() {
            let mut offset = request.offset;
            for (start, frame) in request.frames {
                let stored = bytes.split_to(usize::try_from(frame.stored).unwrap_or(usize::MAX));
                let mut raw = self.unpack(&frame, &stored);
                if raw.is_err() {
                    // Altered on its way, or on the store: a second look tells.
                    let Some(stored) = self.ask(offset, frame.stored) else {
                        return;
                    };
                    raw = self.unpack(&frame, &stored);
                }
                offset += frame.stored;
                let unpacked = Unpacked {
                    start,
                    length: frame.raw,
                    bytes: raw,
                };
                if frames.send(unpacked).is_err() {
                    return;
                }
            }
        }
    }

    /// Fetches a frame once more; `None` where that failed, which the other half says.
    fn ask(&self, offset: u64, length: u64) -> Option<Bytes> {
        let (bytes, answer) = oneshot::channel();
        let again = Again {
            offset,
            length,
            bytes,
        };
        self.again.blocking_send(again).ok()?;
        answer.blocking_recv().ok()
    }

    /// A frame's raw bytes, if it is what its row says.
    fn unpack(&mut self, frame: &Frame, stored: &[u8]) -> Result<Vec<u8>, Error> {
        has_hash(&self.layer, frame, stored)?;
        if self.check == Check::Hash {
            return Ok(Vec::new());
        }
        let size = usize::try_from(frame.raw).unwrap_or(usize::MAX);
        let mut raw = self.spare.try_recv().unwrap_or_default();
        raw.clear();
        raw.reserve_exact(size);
        let unpacked = self.decompressor.decompress_to_buffer(stored, &mut raw);
        if unpacked.is_ok_and(|length| length == size) {
            Ok(raw)
        } else {
            Err(damaged(&self.layer, "a frame does not unpack to its size"))
        }
    }
}

/// Fetches the wanted frames out of an object in memory and unpacks them: what a download does, without threads and store.
pub fn unpack_all(
    layer: &Layer,
    table: &[Frame],
    wanted: &[bool],
    object: &[u8],
) -> Vec<(Frame, Option<Vec<u8>>)> {
    let mut unpacked = Vec::new();
    let Ok(decompressor) = Decompressor::new() else {
        return unpacked;
    };
    let (_, spare) = channel();
    let (again, _) = mpsc::channel(1);
    let mut lane = Unpacker {
        layer: layer.clone(),
        check: Check::Unpack,
        decompressor,
        spare,
        again,
    };
    for request in plan(table, wanted) {
        let mut at = usize::try_from(request.offset).unwrap_or(usize::MAX);
        for (_, frame) in request.frames {
            let end = at + usize::try_from(frame.stored).unwrap_or(usize::MAX);
            let raw = lane.unpack(&frame, &object[at..end]).ok();
            unpacked.push((frame, raw));
            at = end;
        }
    }
    unpacked
}

fn has_hash(layer: &Layer, frame: &Frame, stored: &[u8]) -> Result<(), Error> {
    let got = hex(&Sha256::digest(stored));
    if got == frame.sha256 {
        return Ok(());
    }
    let want = &frame.sha256;
    let reason = format!("expected sha256 {want} of a frame, got {got}");
    Err(damaged(layer, reason))
}

impl RawStream {
    /// Gives `length` bytes from `offset` on to `each`, in pieces. Offsets may only grow.
    pub fn read(
        &mut self,
        mut offset: u64,
        length: u64,
        mut each: impl FnMut(&[u8]) -> Result<(), Halt>,
    ) -> Result<(), Halt> {
        let end = offset.checked_add(length);
        let end = end.ok_or_else(|| damaged(&self.layer, "its index points beyond its end"))?;
        while offset < end {
            let here = self.start + self.current.len() as u64;
            if offset < self.start {
                return Err(damaged(&self.layer, "its index points backwards").into());
            }
            if offset >= here {
                let Some(frame) = self.next()? else {
                    return Err(damaged(&self.layer, "its index points beyond its end").into());
                };
                frame.sound?;
                continue;
            }
            let from = usize::try_from(offset - self.start).unwrap_or(usize::MAX);
            let to = usize::try_from(end.min(here) - self.start).unwrap_or(usize::MAX);
            each(&self.current[from..to])?;
            offset = end.min(here);
        }
        Ok(())
    }

    /// Takes the next frame that was asked for; `None` after the last one.
    pub fn next(&mut self) -> Result<Option<Passed>, Halt> {
        while self.left == 0 {
            let Some(due) = self.due.next() else {
                return Ok(None);
            };
            self.left = due;
            self.turn += 1;
        }
        self.left -= 1;
        let lane = &self.lanes[(self.turn - 1) % self.lanes.len()];
        // Back before the next one is taken, to whoever may need it next. It has gone when the lane was at its end.
        let _ = lane.returns.send(std::mem::take(&mut self.current));
        let frame = lane.unpacked.recv().map_err(|_| Halt::Stopped)?;
        self.start = frame.start;
        let end = frame.start + frame.length;
        let sound = frame.bytes.map(|bytes| self.current = bytes);
        if sound.is_err() {
            self.broken = Some((frame.start, end));
        }
        Ok(Some(Passed {
            start: frame.start,
            end,
            sound,
        }))
    }

    /// Where the last frame was that was not sound.
    pub fn broken(&self) -> Option<(u64, u64)> {
        self.broken
    }
}

/// A frame that went by: its place in the raw stream, and what is wrong with it.
pub struct Passed {
    pub start: u64,
    pub end: u64,
    pub sound: Result<(), Error>,
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
