//! An index: zstd-compressed JSON lines, the header first, then one line for each path in the order of the walk. It is
//! written and read as a stream, whatever its length.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    thread::{self, JoinHandle},
};

use serde::{Deserialize, Serialize};
use zstd::zstd_safe::CParameter;

use super::{entry::Entry, frames::Frame, line::Scope};

/// A path has at most 4,096 bytes where the kernel is asked in one go, and 64 KiB of attributes; a file of many holes has
/// the longest lines. Anything longer is an attack on memory.
const LONGEST_LINE: u64 = 16 << 20;
/// Compression of a layer's index: it is small beside the data.
const LEVEL: i32 = 3;
/// Compression of what stays on this disk.
const LOCAL_LEVEL: i32 = 1;
/// As a power of two, the bytes that a reader has to hold for each index. Many are read at once, so it is a small one.
const WINDOW: u32 = 18;
/// The window that a reader holds at most; without a bound, whoever wrote an index could ask for 128 MiB. More than writers
/// take today: the header's was larger once.
const LARGEST_WINDOW: u32 = 21;

/// The first line of a layer's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerHeader {
    pub format: u32,
    /// The layers that extents refer to by number; the first is the one that this index belongs to.
    pub layers: Vec<String>,
    pub frames: Vec<Frame>,
}

/// Compresses lines into a file, on a thread of its own: whoever makes them has the longer half of the work.
pub struct IndexWriter {
    /// Whole lines, until there are enough of them to hand over.
    lines: Vec<u8>,
    scope: Scope,
    full: SyncSender<Vec<u8>>,
    /// Buffers come back here to be filled again.
    spare: Receiver<Vec<u8>>,
    /// Taken by whoever asks how it ended.
    compressor: Option<JoinHandle<io::Result<File>>>,
}

/// Bytes of lines that are handed over at once.
const BATCH: usize = 64 << 10;

impl IndexWriter {
    pub fn new(file: File, scope: Scope) -> io::Result<Self> {
        let level = match scope {
            Scope::Layer => LEVEL,
            Scope::Local => LOCAL_LEVEL,
        };
        let mut encoder = zstd::Encoder::new(BufWriter::new(file), level)?;
        encoder.set_parameter(CParameter::WindowLog(WINDOW))?;
        encoder.set_parameter(CParameter::ChecksumFlag(true))?;
        let (full, batches) = sync_channel(1);
        let (returns, spare) = channel();
        let compressor = thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || compress(encoder, &batches, &returns))?;
        Ok(Self {
            lines: Vec::new(),
            scope,
            full,
            spare,
            compressor: Some(compressor),
        })
    }

    /// Appends one entry.
    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        entry.append_line(self.scope, &mut self.lines);
        self.end_line()
    }

    /// Appends one line.
    pub fn line(&mut self, line: &[u8]) -> io::Result<()> {
        self.lines.extend_from_slice(line);
        self.end_line()
    }

    fn end_line(&mut self) -> io::Result<()> {
        self.lines.push(b'\n');
        if self.lines.len() < BATCH {
            return Ok(());
        }
        let lines = std::mem::replace(&mut self.lines, self.spare.try_recv().unwrap_or_default());
        // It ends before us only when it failed.
        let sent = self.full.send(lines);
        sent.or_else(|_| Self::ended(self.compressor.take()).map(drop))
    }

    /// Ends the stream; gives the file back, positioned behind it.
    pub fn finish(mut self) -> io::Result<File> {
        // Were it not taken, the compressor would have failed, and that is what is told.
        let _ = self.full.send(self.lines);
        drop(self.full);
        Self::ended(self.compressor.take())
    }

    /// What came of the compressor: the file, or why it failed.
    fn ended(compressor: Option<JoinHandle<io::Result<File>>>) -> io::Result<File> {
        let ended = compressor.and_then(|compressor| compressor.join().ok());
        ended.unwrap_or_else(|| Err(io::Error::other("its compression ended early")))
    }
}

fn compress(
    mut encoder: zstd::Encoder<'static, BufWriter<File>>,
    batches: &Receiver<Vec<u8>>,
    returns: &Sender<Vec<u8>>,
) -> io::Result<File> {
    while let Ok(mut lines) = batches.recv() {
        encoder.write_all(&lines)?;
        lines.clear();
        // Nobody waits for it after the last one.
        let _ = returns.send(lines);
    }
    let file = encoder.finish()?;
    file.into_inner().map_err(io::IntoInnerError::into_error)
}

/// Compresses a header into a frame of its own: zstd streams are joined by putting one after the other.
pub fn compress_header(header: &LayerHeader) -> io::Result<Vec<u8>> {
    let mut line =
        serde_json::to_vec(header).expect("a header has string keys and no failing serializer");
    line.push(b'\n');
    let mut encoder = zstd::Encoder::new(Vec::new(), LEVEL)?;
    encoder.set_parameter(CParameter::WindowLog(WINDOW))?;
    encoder.write_all(&line)?;
    encoder.finish()
}

/// Reads lines one by one.
pub struct IndexReader<R: Read> {
    lines: BufReader<zstd::Decoder<'static, BufReader<R>>>,
    line: Vec<u8>,
}

impl<R: Read> IndexReader<R> {
    pub fn new(source: R) -> io::Result<Self> {
        let mut decoder = zstd::Decoder::new(source)?;
        decoder.window_log_max(LARGEST_WINDOW)?;
        Ok(Self {
            lines: BufReader::new(decoder),
            line: Vec::new(),
        })
    }

    /// The next line, without its newline; `None` at the end.
    pub fn line(&mut self) -> io::Result<Option<&[u8]>> {
        self.line.clear();
        let read = (&mut self.lines)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut self.line)?;
        if read == 0 {
            return Ok(None);
        }
        if self.line.pop() != Some(b'\n') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a line is cut or far too long",
            ));
        }
        Ok(Some(&self.line))
    }

    /// Bytes of the line that was read last.
    pub fn length(&self) -> usize {
        self.line.len()
    }

    /// The next entry.
    pub fn entry(&mut self) -> io::Result<Option<Entry>> {
        match self.line()? {
            None => Ok(None),
            Some(line) => Entry::from_line(line)
                .map(Some)
                .map_err(|reason| io::Error::new(io::ErrorKind::InvalidData, reason)),
        }
    }
}
