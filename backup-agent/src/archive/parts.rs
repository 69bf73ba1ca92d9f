//! Cuts the object's bytes into parts of one size and hands them to the upload, which may be slower: their buffers are
//! counted, so memory stays bounded.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use hyper::body::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::store::Part;

/// Parts are at least this large, as S3 asks. Larger ones would only hold more memory.
pub const SMALLEST: u64 = 5 << 20;
/// S3 takes 10,000 parts of one object; the reserve is for what a tree may grow while it is read.
const MOST: u64 = 9_000;

/// Bytes in parts that are being filled or are on their way. Three of the smallest keep a distant store's line busy while
/// the next one is filled.
const IN_MEMORY: usize = 20 << 20;

/// The upload stopped taking parts; it knows why.
#[derive(Debug)]
pub struct UploadStopped;

/// The size of part for a layer of about `estimate` bytes.
pub fn part_size(estimate: u64) -> usize {
    let needed = estimate.div_ceil(MOST).max(SMALLEST);
    // Whole megabytes, so that part sizes are easy to recognize at the store.
    usize::try_from(needed.next_multiple_of(1 << 20)).unwrap_or(usize::MAX)
}

/// How far an upload has come, in bytes of the object.
#[derive(Debug, Default)]
pub struct Flow {
    /// Given to the upload.
    pub given: AtomicU64,
    /// Not needed by the upload any more.
    pub landed: AtomicU64,
}

/// The writing end of an upload.
pub struct PartWriter {
    flow: Arc<Flow>,
    sender: mpsc::Sender<Part>,
    part: Vec<u8>,
    /// Buffers that were not made yet.
    unmade: usize,
    /// Buffers of parts that were sent come back, to be filled again.
    spare: std::sync::mpsc::Receiver<Vec<u8>>,
    returns: std::sync::mpsc::Sender<Vec<u8>>,
    part_size: usize,
    sum: Sha256,
    written: u64,
}

/// A part's bytes for as long as anybody needs them.
struct Lent {
    flow: Arc<Flow>,
    bytes: Vec<u8>,
    returns: std::sync::mpsc::Sender<Vec<u8>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        self.flow.landed.fetch_add(bytes.len() as u64, Relaxed);
        bytes.clear();
        // Nobody waits for it after the last part.
        let _ = self.returns.send(bytes);
    }
}

impl PartWriter {
    /// Both ends.
    pub fn new(part_size: usize) -> (Self, mpsc::Receiver<Part>) {
        let (returns, spare) = std::sync::mpsc::channel();
        // One to fill and one on its way at least.
        let buffers = (IN_MEMORY / part_size).max(2);
        let (sender, parts) = mpsc::channel(buffers);
        let writer = Self {
            flow: Arc::default(),
            sender,
            part: Vec::with_capacity(part_size),
            unmade: buffers - 1,
            spare,
            returns,
            part_size,
            sum: Sha256::new(),
            written: 0,
        };
        (writer, parts)
    }

    /// How far the upload has come, for as long as it goes on.
    pub fn flow(&self) -> Arc<Flow> {
        self.flow.clone()
    }

    /// Bytes of the object so far.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Appends to the object; waits while the upload is behind.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), UploadStopped> {
        self.sum.update(bytes);
        self.written += bytes.len() as u64;
        self.flow.given.store(self.written, Relaxed);
        while !bytes.is_empty() {
            // A full part leaves only when another byte comes, because the last one has to say that it is.
            if self.part.len() == self.part_size {
                self.send(false)?;
                self.part = self.empty()?;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(self.part_size - self.part.len()));
            self.part.extend_from_slice(now);
            bytes = rest;
        }
        Ok(())
    }

    /// Ends the object; gives its size and sha256.
    pub fn finish(mut self) -> Result<(u64, [u8; 32]), UploadStopped> {
        self.send(true)?;
        Ok((self.written, self.sum.finalize().into()))
    }

    /// A buffer; waits for one while all are on their way.
    fn empty(&mut self) -> Result<Vec<u8>, UploadStopped> {
        if let Ok(buffer) = self.spare.try_recv() {
            return Ok(buffer);
        }
        if self.unmade > 0 {
            self.unmade -= 1;
            return Ok(Vec::with_capacity(self.part_size));
        }
        self.spare.recv().map_err(|_| UploadStopped)
    }

    fn send(&mut self, is_last: bool) -> Result<(), UploadStopped> {
        let bytes = Bytes::from_owner(Lent {
            flow: self.flow.clone(),
            bytes: std::mem::take(&mut self.part),
            returns: self.returns.clone(),
        });
        self.sender
            .blocking_send(Part { bytes, is_last })
            .map_err(|_| UploadStopped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_but_the_last_have_one_size() {
        for (total, want) in [
            (0, vec![0]),
            (9, vec![9]),
            (10, vec![10]),
            (11, vec![10, 1]),
            (30, vec![10, 10, 10]),
        ] {
            let (mut writer, mut receiver) = PartWriter::new(10);
            for byte in 0..total {
                writer.write(&[byte]).expect("the channel is open");
            }
            let (size, _) = writer.finish().expect("the channel is open");
            assert_eq!(size, u64::from(total));
            let mut sizes = Vec::new();
            let mut last = Vec::new();
            while let Some(part) = receiver.blocking_recv() {
                sizes.push(part.bytes.len());
                last.push(part.is_last);
            }
            assert_eq!(sizes, want);
            assert_eq!(last.iter().filter(|is_last| **is_last).count(), 1);
            assert_eq!(last.last(), Some(&true));
        }
    }

    #[test]
    fn no_part_is_begun_while_all_buffers_are_on_their_way() {
        let size = IN_MEMORY / 4;
        let (mut writer, mut receiver) = PartWriter::new(size);
        let filler = std::thread::spawn(move || {
            for _ in 0..40 {
                writer.write(&vec![1; size])?;
            }
            writer.finish()
        });
        let mut next = || receiver.blocking_recv();
        let mut held: std::collections::VecDeque<Part> =
            std::iter::from_fn(&mut next).take(4).collect();
        while let Some(first) = held.pop_front() {
            let freed = first.bytes.as_ptr();
            drop(first);
            let Some(part) = next() else { break };
            assert_eq!(part.bytes.as_ptr(), freed);
            held.push_back(part);
        }
        let (written, _) = filler.join().expect("no panic").expect("nobody stopped it");
        assert_eq!(written, 40 * size as u64);
    }

    #[test]
    fn who_waits_for_a_buffer_learns_that_the_upload_has_ended() {
        let size = IN_MEMORY / 2;
        let (mut writer, receiver) = PartWriter::new(size);
        let filler =
            std::thread::spawn(move || (0..40).try_for_each(|_| writer.write(&vec![1; size])));
        drop(receiver);
        assert!(filler.join().expect("no panic").is_err());
    }

    #[test]
    fn a_large_tree_has_larger_parts_and_never_too_many() {
        assert_eq!(part_size(0), 5 << 20);
        let huge = 1 << 40;
        let size = part_size(huge) as u64;
        assert!(huge.div_ceil(size) <= MOST, "{size}");
    }
}
