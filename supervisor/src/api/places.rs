//! Who may stay connected. There are so many places, and strangers can take them all: then the oldest of those who have
//! not shown the token goes, so that whoever holds it gets in, however many others there are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

/// What a connection is at.
#[derive(Clone)]
pub struct Stage(Arc<State>);

struct State {
    stage: AtomicU8,
    opened: Instant,
    /// Milliseconds from then to the end of the last request.
    quiet_after: AtomicU64,
}

const STRANGE: u8 = 0;
const IDLE: u8 = 1;
const BUSY: u8 = 2;

impl Stage {
    /// Of a new connection.
    pub fn new() -> Self {
        Self(Arc::new(State {
            stage: AtomicU8::new(STRANGE),
            opened: Instant::now(),
            quiet_after: AtomicU64::new(0),
        }))
    }

    /// A request with the token is being answered.
    pub fn begin(&self) {
        self.0.stage.store(BUSY, Ordering::Relaxed);
    }

    /// No request is.
    pub fn end(&self) {
        let passed = u64::try_from(self.0.opened.elapsed().as_millis());
        let passed = passed.unwrap_or(u64::MAX);
        self.0.quiet_after.store(passed, Ordering::Relaxed);
        let _ = (self.0.stage).compare_exchange(BUSY, IDLE, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Since when there has been no request; none while one is being answered.
    pub fn quiet_since(&self) -> Option<Instant> {
        let after = Duration::from_millis(self.0.quiet_after.load(Ordering::Relaxed));
        (!self.is(BUSY)).then(|| self.0.opened + after)
    }

    pub fn opened(&self) -> Instant {
        self.0.opened
    }

    fn is(&self, stage: u8) -> bool {
        self.0.stage.load(Ordering::Relaxed) == stage
    }
}

/// Connections, oldest first.
#[derive(Default)]
pub struct Places(Vec<(AbortHandle, Stage)>);

impl Places {
    pub fn add(&mut self, connection: AbortHandle, stage: Stage) {
        self.0.retain(|(connection, _)| !connection.is_finished());
        self.0.push((connection, stage));
    }

    /// Ends the oldest connection without a token, or else the oldest without a request. Work is never cut.
    pub fn shed(&mut self) {
        let oldest = |wanted| {
            let mut places = self.0.iter();
            places.position(|(connection, stage)| stage.is(wanted) && !connection.is_finished())
        };
        if let Some(at) = oldest(STRANGE).or_else(|| oldest(IDLE)) {
            self.0.remove(at).0.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_go_first_then_the_idle_and_the_busy_never() {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("can be built").block_on(async {
            let mut places = Places::default();
            let mut connections = Vec::new();
            for stage in [BUSY, IDLE, STRANGE, STRANGE] {
                let connection = tokio::spawn(std::future::pending::<()>());
                let now = Stage::new();
                now.0.stage.store(stage, Ordering::Relaxed);
                places.add(connection.abort_handle(), now);
                connections.push(connection);
            }
            let mut order = Vec::new();
            for _ in 0..4 {
                places.shed();
                tokio::task::yield_now().await;
                let is_new = |at: &usize| connections[*at].is_finished() && !order.contains(at);
                let gone = (0..4).find(is_new);
                order.extend(gone);
            }
            assert_eq!(order, [2, 3, 1]);
        });
    }
}
