//! The end of what a child wrote, for an operator who asks why it failed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Shown of what a child has written.
pub const SHOWN: usize = 4096;

/// Kept of it: a secret that begins before what is shown is recognised as a whole.
const KEPT: usize = 3 * SHOWN;

/// The end of what children wrote, shared with whoever shows it.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    pub fn add(&self, text: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = &text[text.len().saturating_sub(KEPT)..];
        let surplus = (kept.len() + text.len()).saturating_sub(KEPT);
        kept.drain(..surplus);
        kept.extend(text);
    }

    pub fn get(&self) -> Vec<u8> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_end_of_what_was_written() {
        let tail = Tail::default();
        assert_eq!(tail.get(), b"");
        tail.add(b"first\n");
        assert_eq!(tail.get(), b"first\n");
        let line = [b'x'; 1000];
        for _ in 0..=KEPT / 1000 {
            tail.add(&line);
        }
        tail.add(b"last\n");
        let text = tail.get();
        assert!(text.len() == KEPT && text.ends_with(b"xlast\n"));
        tail.add(&vec![b'y'; 3 * KEPT]);
        assert_eq!(tail.get(), vec![b'y'; KEPT]);
    }
}
