//! The entries of an index, parsed ahead on a thread of their own: whoever takes them has the longer half of the work.

use std::{
    io::{self, Read},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use super::{entry::Entry, index::IndexReader};

/// Entries that are handed over at once, if their lines are not long.
const BATCH: usize = 256;
/// Bytes of lines that are handed over at once, the last line not counted: attributes make lines long.
const BATCH_BYTES: usize = 128 << 10;

/// Entries in order.
pub struct Ahead {
    /// None after the end.
    batches: Option<Receiver<io::Result<Vec<Entry>>>>,
    batch: std::vec::IntoIter<Entry>,
}

impl Ahead {
    /// Those that follow in an index.
    pub fn new<R: Read + Send + 'static>(lines: IndexReader<R>) -> io::Result<Self> {
        let (sender, batches) = sync_channel(2);
        thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || read(lines, &sender))?;
        Ok(Self {
            batches: Some(batches),
            batch: Vec::new().into_iter(),
        })
    }

    /// The next entry.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        if self.batch.len() == 0
            && let Some(batches) = &self.batches
        {
            // The end comes as an empty batch; a thread that ends without a word has failed.
            let ended = |_| io::Error::other("its reading ended early");
            self.batch = batches.recv().map_err(ended)??.into_iter();
            if self.batch.len() == 0 {
                self.batches = None;
            }
        }
        Ok(self.batch.next())
    }
}

/// Reads to the end, for as long as somebody takes what there is.
fn read<R: Read>(mut lines: IndexReader<R>, sender: &SyncSender<io::Result<Vec<Entry>>>) {
    loop {
        let batch = next_batch(&mut lines);
        let is_over = batch.as_ref().map_or(true, Vec::is_empty);
        if sender.send(batch).is_err() || is_over {
            return;
        }
    }
}

fn next_batch<R: Read>(lines: &mut IndexReader<R>) -> io::Result<Vec<Entry>> {
    let mut batch = Vec::with_capacity(BATCH);
    let mut bytes = 0;
    while batch.len() < BATCH && bytes < BATCH_BYTES {
        let Some(entry) = lines.entry()? else { break };
        bytes += lines.length();
        batch.push(entry);
    }
    Ok(batch)
}
