//! Who may stay connected, and who may wait for an answer.
//!
//! Invariants: whoever holds the token gets in, because without a free place the oldest connection goes that has not shown it;
//! and a request that is answered at once finds a place, because those that wait never have all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
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
        let _ = self.end_oldest(STRANGE) || self.end_oldest(IDLE);
    }

    /// Ends the oldest connection without a token; whether there was one.
    pub fn shed_stranger(&mut self) -> bool {
        self.end_oldest(STRANGE)
    }

    fn end_oldest(&mut self, wanted: u8) -> bool {
        let is_it = |(connection, stage): &(AbortHandle, Stage)| {
            stage.is(wanted) && !connection.is_finished()
        };
        let found = self.0.iter().position(is_it);
        if let Some(at) = found {
            self.0.remove(at).0.abort();
        }
        found.is_some()
    }
}

/// Requests that wait, for their body or for their answer. Each kind has a bound of its own, so that many of one kind do not
/// keep out those of another.
pub struct Waiting<const KINDS: usize> {
    all: Arc<Semaphore>,
    kinds: [Arc<Semaphore>; KINDS],
}

/// One request that waits, until it is dropped.
pub struct Wait {
    _of_all: OwnedSemaphorePermit,
    _of_kind: OwnedSemaphorePermit,
}

impl<const KINDS: usize> Waiting<KINDS> {
    /// Each kind may have an eighth of the connections' places; with few places, all kinds together leave one free.
    pub fn new(places: usize) -> Self {
        let semaphore = |count: usize| Arc::new(Semaphore::new(count.max(1)));
        Self {
            all: semaphore(places.saturating_sub(1).min(KINDS * (places / 8).max(1))),
            kinds: std::array::from_fn(|_| semaphore(places / 8)),
        }
    }

    /// None when as many wait as may.
    pub fn take(&self, kind: usize) -> Option<Wait> {
        let take = |semaphore: &Arc<Semaphore>| semaphore.clone().try_acquire_owned().ok();
        Some(Wait {
            _of_all: take(&self.all)?,
            _of_kind: take(&self.kinds[kind])?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_requests_leave_places_for_other_kinds_and_for_short_requests() {
        for (places, of_one_kind, of_all) in
            [(256, 32, 160), (16, 2, 10), (8, 1, 5), (4, 1, 3), (2, 1, 1)]
        {
            let waiting = Waiting::<5>::new(places);
            let take = |kind| std::iter::from_fn(|| waiting.take(kind)).collect::<Vec<_>>();
            assert_eq!(take(0).len(), of_one_kind, "{places} places");
            let all: Vec<Wait> = (0..5).flat_map(take).collect();
            assert_eq!(all.len(), of_all, "{places} places");
            assert!(waiting.take(4).is_none() && all.len() < places);
            drop(all);
            assert!(waiting.take(4).is_some(), "{places} places");
        }
    }

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
