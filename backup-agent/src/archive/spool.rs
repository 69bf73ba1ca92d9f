//! A working file that many readers read at once, each from its own place.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    sync::Arc,
};

/// A file that was written and is only read from now on.
#[derive(Clone)]
pub struct Spool(Arc<File>);

impl Spool {
    pub fn new(file: File) -> Self {
        Self(Arc::new(file))
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// A reader from the start on.
    pub fn reader(&self) -> SpoolReader {
        SpoolReader {
            file: self.0.clone(),
            at: 0,
        }
    }
}

/// Reads a spool from its own position.
pub struct SpoolReader {
    file: Arc<File>,
    at: u64,
}

impl Read for SpoolReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}
