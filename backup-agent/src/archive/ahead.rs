//! The entries of an index, parsed ahead on a thread of their own: whoever takes them has the longer half of the work.

use std::{
    collections::VecDeque,
    io::{self, Read},
    sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
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
    batches: Option<Receiver<io::Result<Batch>>>,
    batch: Batch,
    /// Empty batches go back to be filled again.
    returns: Sender<Batch>,
}

type Batch = VecDeque<Entry>;

impl Ahead {
    /// Those that follow in an index.
    pub fn new<R: Read + Send + 'static>(lines: IndexReader<R>) -> io::Result<Self> {
        let (sender, batches) = sync_channel(2);
        let (returns, spare) = channel();
        thread::Builder::new()
            .name("index".to_owned())
            .spawn(move || read(lines, &sender, &spare))?;
        Ok(Self {
            batches: Some(batches),
            batch: Batch::new(),
            returns,
        })
    }

    /// The next entry.
    pub fn next(&mut self) -> io::Result<Option<Entry>> {
        if self.batch.is_empty()
            && let Some(batches) = &self.batches
        {
            // The end comes as an empty batch; a thread that ends without a word has failed.
            let ended = |_| io::Error::other("its reading ended early");
            let next = batches.recv().map_err(ended)??;
            if next.is_empty() {
                self.batches = None;
            }
            // Nobody waits for it after the last one.
            let _ = self.returns.send(std::mem::replace(&mut self.batch, next));
        }
        Ok(self.batch.pop_front())
    }
}

/// Reads to the end, for as long as somebody takes what there is.
fn read<R: Read>(
    mut lines: IndexReader<R>,
    sender: &SyncSender<io::Result<Batch>>,
    spare: &Receiver<Batch>,
) {
    loop {
        let empty = spare.try_recv();
        let empty = empty.unwrap_or_else(|_| Batch::with_capacity(BATCH));
        let batch = fill(empty, &mut lines);
        let is_over = batch.as_ref().map_or(true, Batch::is_empty);
        if sender.send(batch).is_err() || is_over {
            return;
        }
    }
}

fn fill<R: Read>(mut batch: Batch, lines: &mut IndexReader<R>) -> io::Result<Batch> {
    let mut bytes = 0;
    while batch.len() < BATCH && bytes < BATCH_BYTES {
        let Some(entry) = lines.entry()? else { break };
        bytes += lines.length();
        batch.push_back(entry);
    }
    Ok(batch)
}
