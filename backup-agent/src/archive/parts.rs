//! Cuts the object's bytes into parts of one size and hands them to the upload, which may be slower: the channel is short,
//! so memory stays bounded.

use hyper::body::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::store::Part;

/// Parts are at least this large; S3 asks for 5 MiB. Larger ones would only hold more memory.
const SMALLEST: u64 = 8 << 20;
/// S3 takes 10,000 parts of one object; the reserve is for what a tree may grow while it is read.
const MOST: u64 = 9_000;

/// The upload stopped taking parts; it knows why.
#[derive(Debug)]
pub struct UploadStopped;

/// The size of part for a layer of about `estimate` bytes.
pub fn part_size(estimate: u64) -> usize {
    let needed = estimate.div_ceil(MOST).max(SMALLEST);
    // Whole megabytes, so that part sizes are easy to recognize at the store.
    usize::try_from(needed.next_multiple_of(1 << 20)).unwrap_or(usize::MAX)
}

/// The writing end of an upload.
pub struct PartWriter {
    sender: mpsc::Sender<Part>,
    part: Vec<u8>,
    part_size: usize,
    sum: Sha256,
    written: u64,
}

impl PartWriter {
    pub fn new(sender: mpsc::Sender<Part>, part_size: usize) -> Self {
        Self {
            sender,
            part: Vec::with_capacity(part_size),
            part_size,
            sum: Sha256::new(),
            written: 0,
        }
    }

    /// Bytes of the object so far.
    pub fn position(&self) -> u64 {
        self.written
    }

    /// Appends to the object; waits while the upload is behind.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), UploadStopped> {
        self.sum.update(bytes);
        self.written += bytes.len() as u64;
        while !bytes.is_empty() {
            // A full part leaves only when another byte comes, because the last one has to say that it is.
            if self.part.len() == self.part_size {
                self.send(false)?;
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

    fn send(&mut self, is_last: bool) -> Result<(), UploadStopped> {
        let room = if is_last { 0 } else { self.part_size };
        let part = std::mem::replace(&mut self.part, Vec::with_capacity(room));
        let bytes = Bytes::from(part);
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
            let (sender, mut receiver) = mpsc::channel(10);
            let mut writer = PartWriter::new(sender, 10);
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
    fn a_large_tree_has_larger_parts_and_never_too_many() {
        assert_eq!(part_size(0), 8 << 20);
        let huge = 1 << 40;
        let size = part_size(huge) as u64;
        assert!(huge.div_ceil(size) <= MOST, "{size}");
    }
}
