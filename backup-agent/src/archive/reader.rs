//! Reads the frames of layers back: each is checked against its sha256 before anything is made of it, and unpacked. How they
//! come from the store is the download's business.

use std::{
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread,
};

use sha2::{Digest, Sha256};
use zstd::bulk::Decompressor;

use super::{
    download::{Arrivals, Download, Start, plan},
    frames::Frame,
    layer_index::LayerIndex,
    writer::Halt,
};
use crate::{
    error::Error,
    snapshot::{id::hex, record::Layer},
};

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
    start: Start,
) -> Result<(Download, RawStream), Error> {
    let requests = plan(&index.frames, wanted);
    let due: Vec<usize> = requests.iter().map(|r| r.frames.len()).collect();
    let (download, arrivals) = Download::new(&index.layer, requests, start);
    let mut lanes = Vec::new();
    for arrivals in arrivals {
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
                };
                lane.run(arrivals, &frames);
            })
            .map_err(Error::local("start", "a thread that unpacks"))?;
        lanes.push(Lane { unpacked, returns });
    }
    let raw = RawStream {
        layer: index.layer.clone(),
        lanes,
        due: due.into_iter(),
        turn: 0,
        left: 0,
        current: Vec::new(),
        start: 0,
        broken: None,
    };
    Ok((download, raw))
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
        let end = end.ok_or_else(|| self.layer.damaged("its index points beyond its end"))?;
        while offset < end {
            let here = self.start + self.current.len() as u64;
            if offset < self.start {
                return Err(self.layer.damaged("its index points backwards").into());
            }
            if offset >= here {
                let Some(frame) = self.next()? else {
                    return Err(self.layer.damaged("its index points beyond its end").into());
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

/// One lane: ranges in, unpacked frames out, until either end is closed.
struct Unpacker {
    layer: Layer,
    check: Check,
    decompressor: Decompressor<'static>,
    spare: Receiver<Vec<u8>>,
}

impl Unpacker {
    fn run(&mut self, mut arrivals: Arrivals, frames: &SyncSender<Unpacked>) {
        while let Some((request, mut bytes)) = arrivals.next() {
            let mut offset = request.offset;
            for (start, frame) in request.frames {
                let stored = bytes.split_to(usize::try_from(frame.stored).unwrap_or(usize::MAX));
                let mut raw = self.unpack(&frame, &stored);
                if raw.is_err() {
                    // Altered on its way, or on the store: a second look tells.
                    let Some(stored) = arrivals.ask(offset, frame.stored) else {
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
            Err(self.layer.damaged("a frame does not unpack to its size"))
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
    let mut lane = Unpacker {
        layer: layer.clone(),
        check: Check::Unpack,
        decompressor,
        spare,
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
    Err(layer.damaged(reason))
}
