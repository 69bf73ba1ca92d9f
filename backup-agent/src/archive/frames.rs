//! Independent zstd frames of one size of raw bytes: any of them can be fetched and unpacked without the others.

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
/// zstd's own default: faster levels cost more on the wire than they save here, slower ones gain little.
const LEVEL: i32 = 3;

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

/// Takes the raw tar stream, gives frames to the upload and keeps their table.
pub struct FrameWriter {
    compressor: Compressor<'static>,
    raw: Vec<u8>,
    stored: Vec<u8>,
    table: Vec<Frame>,
    position: u64,
    sink: PartWriter,
}

impl FrameWriter {
    pub fn new(sink: PartWriter) -> std::io::Result<Self> {
        let mut compressor = Compressor::new(LEVEL)?;
        compressor.set_parameter(CParameter::ChecksumFlag(true))?;
        Ok(Self {
            compressor,
            raw: Vec::with_capacity(RAW),
            stored: vec![0; compress_bound(RAW)],
            table: Vec::new(),
            position: 0,
            sink,
        })
    }

    /// Bytes of the raw stream so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Appends to the raw stream.
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
        Ok((self.table, self.sink))
    }

    fn flush(&mut self) -> Result<(), UploadStopped> {
        let length = self
            .compressor
            .compress_to_buffer(&self.raw, &mut self.stored[..])
            .expect("the buffer has zstd's own bound for the largest frame");
        let stored = &self.stored[..length];
        self.table.push(Frame {
            raw: self.raw.len() as u64,
            stored: length as u64,
            sha256: hex(&Sha256::digest(stored)),
        });
        self.raw.clear();
        self.sink.write(stored)
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[test]
    fn every_frame_unpacks_alone_and_all_together_are_the_stream() {
        let (sender, mut receiver) = mpsc::channel(10);
        let mut writer = FrameWriter::new(PartWriter::new(sender, 64 << 20)).expect("a compressor");
        let content: Vec<u8> = (0..=250).cycle().take(2 * RAW + 17).collect();
        for chunk in content.chunks(100_003) {
            writer.write(chunk).expect("the channel is open");
        }
        assert_eq!(writer.position(), content.len() as u64);
        let (table, sink) = writer.finish().expect("the channel is open");
        sink.finish().expect("the channel is open");
        let object = receiver.blocking_recv().expect("one part").bytes;

        assert_eq!(zstd::decode_all(&object[..]).expect("a stream"), content);
        let raw: Vec<u64> = table.iter().map(|frame| frame.raw).collect();
        assert_eq!(raw, [RAW as u64, RAW as u64, 17]);
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
