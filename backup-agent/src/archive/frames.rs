//! Independent zstd frames of one size of raw bytes: any of them can be fetched and unpacked without the others, and all
//! of them be made at the same time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread::{self, JoinHandle},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use zstd::{
    bulk::Compressor,
    zstd_safe::{CParameter, compress_bound},
};

use super::parts::{PartWriter, UploadStopped};
use crate::snapshot::id::hex;

/// Raw bytes of a frame. Less costs ratio (each starts without history), more costs memory and makes single files dear.
pub const RAW: usize = 4 << 20;
/// What a reader takes at most, from whatever writer: its buffers have that size.
pub const LARGEST: usize = 16 << 20;
/// How much work goes into compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// zstd's level.
    pub level: i32,
    /// Threads that compress.
    pub jobs: usize,
}

/// One frame: a row of the frame table, as `[raw, stored, sha256]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64, String)", into = "(u64, u64, String)")]
pub struct Frame {
    /// Bytes before compression.
    pub raw: u64,
    /// Bytes in the object.
    pub stored: u64,
    /// Of the stored bytes.
    pub sha256: String,
}

impl From<(u64, u64, String)> for Frame {
    fn from((raw, stored, sha256): (u64, u64, String)) -> Self {
        Self {
            raw,
            stored,
            sha256,
        }
    }
}

impl From<Frame> for (u64, u64, String) {
    fn from(frame: Frame) -> Self {
        (frame.raw, frame.stored, frame.sha256)
    }
}

/// Takes the raw tar stream, has its frames compressed on several threads, gives them to the upload in order and keeps
/// their table.
///
/// Frames go round the lanes in turn, so the packer, which goes round with them, finds them in order. A lane takes the next
/// frame when it is done with the last: nothing queues, and memory is a raw and a compressed frame for each.
pub struct FrameWriter {
    raw: Vec<u8>,
    lanes: Vec<Lane>,
    turn: usize,
    position: u64,
    /// Raw bytes of the frames that were given to the upload.
    given: Arc<AtomicU64>,
    packer: JoinHandle<Result<(Vec<Frame>, PartWriter), UploadStopped>>,
}

/// The writer's ends of one compressing thread.
struct Lane {
    raw: SyncSender<Vec<u8>>,
    /// Buffers come back here to be filled again.
    spare: Receiver<Vec<u8>>,
}

/// A finished frame, and where its buffer goes back to.
type Finished = (Frame, Vec<u8>);

impl FrameWriter {
    pub fn new(sink: PartWriter, effort: Effort) -> std::io::Result<Self> {
        let mut lanes = Vec::new();
        let mut finished = Vec::new();
        for _ in 0..effort.jobs.max(1) {
            let mut compressor = Compressor::new(effort.level)?;
            compressor.set_parameter(CParameter::ChecksumFlag(true))?;
            let (raw, raws) = sync_channel(0);
            let (spares, spare) = channel();
            let (frames, packed) = sync_channel(0);
            let (returns, returned) = channel();
            thread::Builder::new()
                .name("compressor".to_owned())
                .spawn(move || compress(compressor, &raws, &spares, &frames, &returned))?;
            lanes.push(Lane { raw, spare });
            finished.push((packed, returns));
        }
        let given = Arc::new(AtomicU64::new(0));
        let count = given.clone();
        let packer = thread::Builder::new()
            .name("packer".to_owned())
            .spawn(move || pack(&finished, sink, &count))?;
        Ok(Self {
            raw: Vec::with_capacity(RAW),
            lanes,
            turn: 0,
            position: 0,
            given,
            packer,
        })
    }

    /// Bytes of the raw stream so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Bytes of the raw stream that the upload was not given yet.
    pub fn waiting(&self) -> u64 {
        self.position.saturating_sub(self.given.load(Relaxed))
    }

    /// Appends to the raw stream; waits while compression or upload is behind.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), UploadStopped> {
        self.position += bytes.len() as u64;
        while !bytes.is_empty() {
            let (now, rest) = bytes.split_at(bytes.len().min(RAW - self.raw.len()));
            self.raw.extend_from_slice(now);
            bytes = rest;
            if self.raw.len() == RAW {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Ends the raw stream; gives the table and what the index goes to.
    pub fn finish(mut self) -> Result<(Vec<Frame>, PartWriter), UploadStopped> {
        if !self.raw.is_empty() {
            self.flush()?;
        }
        drop(self.lanes);
        let (table, sink) = self.packer.join().map_err(|_| UploadStopped)??;
        // A lane that died would look like the end.
        if table.iter().map(|frame| frame.raw).sum::<u64>() == self.position {
            Ok((table, sink))
        } else {
            Err(UploadStopped)
        }
    }

    fn flush(&mut self) -> Result<(), UploadStopped> {
        let lane = &self.lanes[self.turn % self.lanes.len()];
        self.turn += 1;
        let full = std::mem::take(&mut self.raw);
        lane.raw.send(full).map_err(|_| UploadStopped)?;
        // A lane that takes a frame has given back the one before.
        let spare = lane.spare.try_recv();
        self.raw = spare.unwrap_or_else(|_| Vec::with_capacity(RAW));
        Ok(())
    }
}

/// One lane: frames in, frames out, until either end is closed.
fn compress(
    mut compressor: Compressor<'static>,
    raws: &Receiver<Vec<u8>>,
    spares: &Sender<Vec<u8>>,
    frames: &SyncSender<Finished>,
    returned: &Receiver<Vec<u8>>,
) {
    while let Ok(mut raw) = raws.recv() {
        let mut stored = returned
            .try_recv()
            .unwrap_or_else(|_| Vec::with_capacity(compress_bound(RAW)));
        compressor
            .compress_to_buffer(&raw, &mut stored)
            .expect("the buffer has zstd's own bound for the largest frame");
        let frame = Frame {
            raw: raw.len() as u64,
            stored: stored.len() as u64,
            sha256: hex(&Sha256::digest(&stored)),
        };
        raw.clear();
        // Nobody waits for it after the last frame.
        let _ = spares.send(raw);
        if frames.send((frame, stored)).is_err() {
            return;
        }
    }
}

/// Puts the frames of all lanes into the object in order.
fn pack(
    lanes: &[(Receiver<Finished>, Sender<Vec<u8>>)],
    mut sink: PartWriter,
    given: &AtomicU64,
) -> Result<(Vec<Frame>, PartWriter), UploadStopped> {
    let mut table = Vec::new();
    for (finished, returns) in lanes.iter().cycle() {
        let Ok((frame, stored)) = finished.recv() else {
            break;
        };
        sink.write(&stored)?;
        given.fetch_add(frame.raw, Relaxed);
        table.push(frame);
        let _ = returns.send(stored);
    }
    Ok((table, sink))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_unpacks_alone_and_all_together_are_the_stream() {
        let effort = Effort { level: 3, jobs: 2 };
        let (sink, mut receiver) = PartWriter::new(64 << 20);
        let mut writer = FrameWriter::new(sink, effort).expect("a compressor");
        let content: Vec<u8> = (0..=250).cycle().take(4 * RAW + 17).collect();
        for chunk in content.chunks(100_003) {
            writer.write(chunk).expect("the channel is open");
        }
        assert_eq!(writer.position(), content.len() as u64);
        let (table, sink) = writer.finish().expect("the channel is open");
        sink.finish().expect("the channel is open");
        let object = receiver.blocking_recv().expect("one part").bytes;

        assert_eq!(zstd::decode_all(&object[..]).expect("a stream"), content);
        let raw: Vec<u64> = table.iter().map(|frame| frame.raw).collect();
        assert_eq!(raw, [RAW as u64, RAW as u64, RAW as u64, RAW as u64, 17]);
        let (mut at, mut from) = (0, 0);
        for frame in &table {
            let stored = usize::try_from(frame.stored).expect("small");
            let part = zstd::decode_all(&object[at..at + stored]).expect("a frame of its own");
            assert_eq!(part, content[from..from + part.len()]);
            (at, from) = (at + stored, from + part.len());
        }
        assert_eq!(at, object.len());
    }
}
