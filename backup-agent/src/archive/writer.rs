//! Writes one layer from entries in the order of the walk: tar stream, frames, index, footer, all at once and all as a
//! stream.

use std::{
    fs::File,
    io::{Read, Seek},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use sha2::{Digest, Sha256};

use super::{
    entry::Entry,
    extents::extents,
    footer::{self, Footer},
    frames::{Effort, FrameWriter},
    index::{IndexWriter, LayerHeader, compress_header},
    line::Scope,
    parts::{Flow, PartWriter, UploadStopped},
    tarball::{self, TRAILER, padding},
};
use crate::{
    error::Error,
    local_index::Unreadable,
    progress,
    snapshot::{
        id::hex,
        record::{FORMAT, Layer},
    },
    tree::{
        miss::Miss,
        read::{Data, miss},
    },
};

/// Why a layer could not be written.
pub enum Halt {
    /// The upload ended first; it knows why.
    Stopped,
    Failed(Error),
}

impl From<UploadStopped> for Halt {
    fn from(_: UploadStopped) -> Self {
        Self::Stopped
    }
}

impl From<Unreadable> for Halt {
    fn from(unreadable: Unreadable) -> Self {
        Self::Failed(unreadable.into())
    }
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// One layer under way.
pub struct LayerWriter {
    id: String,
    frames: FrameWriter,
    flow: Arc<Flow>,
    /// The index's lines wait in a file, because they follow the data and their number has no bound.
    lines: IndexWriter,
    /// The last path that a whiteout was written for: it stands for everything below, too.
    gone: Option<Vec<u8>>,
}

impl LayerWriter {
    /// A layer that goes to `sink`; `spool` is an empty file for the index.
    pub fn new(id: &str, sink: PartWriter, spool: File, effort: Effort) -> Result<Self, Error> {
        Ok(Self {
            id: id.to_owned(),
            flow: sink.flow(),
            frames: FrameWriter::new(sink, effort)
                .map_err(Error::local("start", "the compression"))?,
            lines: IndexWriter::new(spool, Scope::Layer).map_err(Error::local("set up", "zstd"))?,
            gone: None,
        })
    }

    /// Bytes that the upload has still to send: at most, since some are not compressed yet.
    pub fn behind(&self) -> u64 {
        let given = self.flow.given.load(Relaxed);
        self.frames.waiting() + given.saturating_sub(self.landed())
    }

    /// Bytes that have arrived.
    pub fn landed(&self) -> u64 {
        self.flow.landed.load(Relaxed)
    }

    /// Appends an entry without content.
    pub fn add(&mut self, entry: &Entry) -> Result<(), Halt> {
        self.frames.write(&tarball::header(entry, None))?;
        self.index(entry)
    }

    /// Appends a regular file; fills in the hash and the extents of what was read.
    ///
    /// A file that cannot be read to its end spoils the layer: the head of its member promises more than there is.
    pub fn add_file(&mut self, entry: &mut Entry, data: &Data) -> Result<Result<(), Miss>, Halt> {
        enum End {
            Miss(Miss),
            Halt(Halt),
        }

        let runs = data.runs();
        let sparse = data.is_sparse(entry.size).then_some(runs);
        self.frames.write(&tarball::header(entry, sparse))?;
        let start = self.frames.position();
        let mut sum = Sha256::new();
        let frames = &mut self.frames;
        let copied = data.read(
            |error| End::Miss(miss(&error)),
            |bytes| {
                sum.update(bytes);
                progress::add(bytes.len() as u64);
                frames.write(bytes).map_err(|stop| End::Halt(stop.into()))
            },
        );
        match copied {
            Ok(()) => {}
            Err(End::Miss(miss)) => return Ok(Err(miss)),
            Err(End::Halt(halt)) => return Err(halt),
        }
        self.frames.write(padding(self.frames.position() - start))?;
        entry.sha256 = Some(sum.finalize().into());
        entry.extents = extents(runs, entry.size, start);
        self.index(entry).map(Ok)
    }

    /// Appends a deletion: a line in the index, and for tar a whiteout, named as in OCI images.
    pub fn delete(&mut self, path: &[u8]) -> Result<(), Halt> {
        let is_below = |outer: &Vec<u8>| {
            path.strip_prefix(&outer[..])
                .is_some_and(|rest| rest.starts_with(b"/"))
        };
        if !self.gone.as_ref().is_some_and(is_below) {
            let name = path
                .iter()
                .rposition(|byte| *byte == b'/')
                .map_or(0, |slash| slash + 1);
            let whiteout = Entry::deleted([&path[..name], b".wh.", &path[name..]].concat());
            self.frames.write(&tarball::header(&whiteout, None))?;
            self.gone = Some(path.to_vec());
        }
        self.index(&Entry::deleted(path.to_vec()))
    }

    /// Ends the layer: index and footer follow the data.
    pub fn finish(mut self) -> Result<Layer, Halt> {
        let cannot_spool = |source| Error::Local {
            op: "use",
            path: "the index under way in RUNTIME_STATE".into(),
            source,
        };
        self.frames.write(&TRAILER)?;
        let raw_size = self.frames.position();
        let (table, mut sink) = self.frames.finish()?;
        let header = LayerHeader {
            format: FORMAT,
            layers: vec![self.id.clone()],
            frames: table,
        };
        let header = compress_header(&header).map_err(Error::local("set up", "zstd"))?;
        let mut spool = self.lines.finish().map_err(cannot_spool)?;
        let spooled = spool.stream_position().map_err(cannot_spool)?;
        spool.rewind().map_err(cannot_spool)?;

        let index_size = header.len() as u64 + spooled;
        let content = u32::try_from(index_size).map_err(|_| Error::Local {
            op: "write",
            path: "an index of more than 4 GiB".into(),
            source: std::io::ErrorKind::FileTooLarge.into(),
        })?;
        sink.write(&footer::skippable_header(content))?;
        let index_offset = sink.position();
        let mut sum = Sha256::new();
        sum.update(&header);
        sink.write(&header)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = spool.read(&mut buffer).map_err(cannot_spool)?;
            if read == 0 {
                break;
            }
            sum.update(&buffer[..read]);
            sink.write(&buffer[..read])?;
        }
        let index_sha256 = sum.finalize().into();
        let footer = Footer {
            index_offset,
            index_size,
            raw_size,
            index_sha256,
        };
        sink.write(&footer.to_bytes())?;
        let (size, sha256) = sink.finish()?;
        Ok(Layer {
            id: self.id,
            size,
            raw_size,
            sha256: hex(&sha256),
            index_offset,
            index_size,
            index_sha256: hex(&index_sha256),
        })
    }

    fn index(&mut self, entry: &Entry) -> Result<(), Halt> {
        let written = self.lines.entry(entry);
        Ok(written.map_err(Error::local(
            "write",
            "the index under way in RUNTIME_STATE",
        ))?)
    }
}
