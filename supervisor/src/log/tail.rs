//! The end of what a child wrote, for whoever asks why it failed.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Kept of what a child has written.
const TAIL: usize = 4096;

/// The end of what children wrote, shared with whoever shows it.
#[derive(Clone, Debug, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    pub fn add(&self, text: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = &text[text.len().saturating_sub(TAIL)..];
        let surplus = (kept.len() + text.len()).saturating_sub(TAIL);
        kept.drain(..surplus);
        kept.extend(text);
    }

    /// And whether something was before it.
    pub fn get(&self) -> (Vec<u8>, bool) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.iter().copied().collect(), kept.len() == TAIL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_the_end_of_what_was_written() {
        let tail = Tail::default();
        assert_eq!(tail.get(), (Vec::new(), false));
        tail.add(b"first\n");
        assert_eq!(tail.get(), (b"first\n".to_vec(), false));
        let line = [b'x'; 1000];
        for _ in 0..5 {
            tail.add(&line);
        }
        tail.add(b"last\n");
        let (text, is_cut) = tail.get();
        assert!(is_cut && text.len() == TAIL && text.ends_with(b"xlast\n"));
        tail.add(&[b'y'; 3 * TAIL]);
        assert_eq!(tail.get(), (vec![b'y'; TAIL], true));
    }
}
