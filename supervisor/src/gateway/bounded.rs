//! A connection from which no more than so many bytes are read, and that lets others have a turn while it is flooded.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::yield_now;

/// Read in a row. Of the smallest frames these are thousands, which take about a millisecond.
const TURN: usize = 16 * 1024;

pub struct Bounded<S> {
    stream: S,
    left: usize,
    turn: usize,
}

impl<S> Bounded<S> {
    pub fn new(stream: S, most: usize) -> Self {
        Self {
            stream,
            left: most,
            turn: TURN,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn == 0 {
            self.turn = TURN;
            // Unlike a wake-up of ourselves, this comes after whatever else is ready.
            ready!(pin!(yield_now()).poll(context));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let count = buffer.filled().len() - before;
        self.turn = self.turn.saturating_sub(count);
        let Some(left) = self.left.checked_sub(count) else {
            // With an error nothing was read.
            buffer.set_filled(before);
            return Poll::Ready(Err(io::ErrorKind::QuotaExceeded.into()));
        };
        self.left = left;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn as_much_as_is_allowed_is_read_and_no_more() {
        for (most, is_read) in [(99_999, false), (100_000, true)] {
            let sent = vec![0; 100_000];
            let mut stream = Bounded::new(&sent[..], most);
            let mut read = Vec::new();
            let result = stream.read_to_end(&mut read).await;
            assert_eq!(result.map_err(|error| error.kind()).is_ok(), is_read);
        }
    }

    #[tokio::test]
    async fn a_flood_lets_others_have_a_turn() {
        let mut stream = Bounded::new(tokio::io::repeat(0), usize::MAX);
        let other = tokio::spawn(async {});
        let mut turns = 0;
        while !other.is_finished() {
            let mut buffer = [0; 1024];
            let _ = stream.read(&mut buffer).await.expect("it is endless");
            turns += 1;
            assert!(turns <= 1 + TURN / 1024, "nobody else had a turn");
        }
    }
}
