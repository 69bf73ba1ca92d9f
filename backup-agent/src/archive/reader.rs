//! Reads layers back: index and frames are checked against their sha256 before anything is made of them.

use std::{fs::File, io::Write};

use hyper::body::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use zstd::bulk::Decompressor;

use super::{
    footer,
    frames::{Frame, LARGEST},
    index::LayerHeader,
    writer::Halt,
};
use crate::{
    error::Error,
    snapshot::{
        id::hex,
        record::{FORMAT, Layer, layer_key},
    },
    store::Store,
};

/// Bytes that are fetched with one request: enough to hide a round trip, small enough to hold two of them.
const RANGE: u64 = 8 << 20;

fn damaged(layer: &Layer, reason: impl Into<String>) -> Error {
    Error::Damaged {
        key: layer_key(&layer.id),
        reason: reason.into(),
    }
}

/// Fetches the index of a layer into a file, as it is stored: compressed.
pub async fn fetch_index(store: &dyn Store, layer: &Layer, file: &mut File) -> Result<(), Error> {
    let key = layer_key(&layer.id);
    let mut sum = Sha256::new();
    let mut at = 0;
    while at < layer.index_size {
        let length = RANGE.min(layer.index_size - at);
        let bytes = range(store, &key, layer.index_offset + at, length).await?;
        sum.update(&bytes);
        file.write_all(&bytes)
            .map_err(Error::local("write", "the index under way"))?;
        at += length;
    }
    let got = hex(&sum.finalize());
    if got == layer.index_sha256 {
        Ok(())
    } else {
        let want = &layer.index_sha256;
        Err(damaged(
            layer,
            format!("expected sha256 {want} of its index, got {got}"),
        ))
    }
}

/// Reads and judges the first line of a layer's index.
pub fn check_header(layer: &Layer, line: Option<&[u8]>) -> Result<LayerHeader, Error> {
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

/// Fetches all frames in order, each checked, and gives them to `sender`. Gives the number of bytes that came.
pub async fn fetch_frames(
    store: &dyn Store,
    layer: &Layer,
    table: &[Frame],
    sender: mpsc::Sender<Bytes>,
) -> Result<u64, Error> {
    let key = layer_key(&layer.id);
    let (mut at, mut next) = (0, 0);
    while next < table.len() {
        // As many whole frames as fit into one request, at least one.
        let (mut length, first) = (0, next);
        while next < table.len() && (next == first || length + table[next].stored <= RANGE) {
            length += table[next].stored;
            next += 1;
        }
        let mut bytes = range(store, &key, at, length).await?;
        at += length;
        for frame in &table[first..next] {
            let stored = bytes.split_to(usize::try_from(frame.stored).unwrap_or(usize::MAX));
            let got = hex(&Sha256::digest(&stored));
            if got != frame.sha256 {
                let want = &frame.sha256;
                let reason = format!("expected sha256 {want} of a frame, got {got}");
                return Err(damaged(layer, reason));
            }
            if sender.send(stored).await.is_err() {
                // Whoever unpacks has failed, and says why.
                return Ok(at);
            }
        }
    }
    Ok(at)
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

/// The raw tar stream of a layer, forward only.
pub struct RawStream {
    layer: Layer,
    table: std::vec::IntoIter<Frame>,
    frames: mpsc::Receiver<Bytes>,
    decompressor: Decompressor<'static>,
    current: Vec<u8>,
    /// Offset of the first byte behind `current`.
    end: u64,
}

impl RawStream {
    pub fn new(
        layer: Layer,
        table: Vec<Frame>,
        frames: mpsc::Receiver<Bytes>,
    ) -> Result<Self, Error> {
        Ok(Self {
            layer,
            table: table.into_iter(),
            frames,
            decompressor: Decompressor::new().map_err(Error::local("set up", "zstd"))?,
            current: Vec::new(),
            end: 0,
        })
    }

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
            let start = self.end - self.current.len() as u64;
            if offset < start {
                return Err(damaged(&self.layer, "its index points backwards").into());
            }
            if offset >= self.end {
                self.advance(offset)?;
                continue;
            }
            let from = usize::try_from(offset - start).unwrap_or(usize::MAX);
            let to = usize::try_from(end.min(self.end) - start).unwrap_or(usize::MAX);
            each(&self.current[from..to])?;
            offset = end.min(self.end);
        }
        Ok(())
    }

    /// Takes the next frame; unpacks it only if it has something at `offset`.
    fn advance(&mut self, offset: u64) -> Result<(), Halt> {
        let Some(frame) = self.table.next() else {
            return Err(damaged(&self.layer, "its index points beyond its end").into());
        };
        let stored = self.frames.blocking_recv().ok_or(Halt::Stopped)?;
        self.end += frame.raw;
        self.current.clear();
        if offset >= self.end {
            return Ok(());
        }
        let raw = usize::try_from(frame.raw).unwrap_or(usize::MAX);
        self.current = self
            .decompressor
            .decompress(&stored, raw)
            .ok()
            .filter(|bytes| bytes.len() == raw)
            .ok_or_else(|| damaged(&self.layer, "a frame does not unpack to its size"))?;
        Ok(())
    }
}
