//! Rounds of a test by seeds: the same seed makes the same choices, and a failure says how to repeat it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// How many rounds, instead of the number that CI runs.
const ROUNDS: &str = "E2E_ROUNDS";
/// The first seed; the others follow it.
const SEED: &str = "E2E_SEED";

/// Choices that follow from a seed (`SplitMix64`).
pub struct Choices(u64);

impl Choices {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// One of the numbers below.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    /// Whether what happens once in so many times happens now.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let at = self.below(all.len() as u64);
        &all[usize::try_from(at).expect("an index fits")]
    }
}

/// Runs `round` with each seed, `threads` at a time. `test` is the suite and the test, as in `torture a_kill`; CI runs
/// `rounds` of them.
pub fn rounds(test: &str, rounds: u64, threads: usize, round: impl Fn(&mut Choices) + Sync) {
    let first = number(SEED).unwrap_or(1);
    let end = first + number(ROUNDS).unwrap_or(rounds);
    let next = AtomicU64::new(first);
    let failed = Mutex::new(Vec::new());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            let run = AssertUnwindSafe(|| round(&mut Choices::new(seed)));
            if catch_unwind(run).is_err() {
                failed.lock().expect("nobody panics with it").push(seed);
                // Others would only repeat it.
                next.store(end, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let (suite, name) = test.split_once(' ').expect("suite and test");
    let failed = failed.into_inner().expect("nobody panics with it");
    let again = failed.iter().map(|seed| {
        format!("{SEED}={seed} {ROUNDS}=1 cargo test -p e2e --test {suite} -- {name}\n")
    });
    let again: String = again.collect();
    assert!(failed.is_empty(), "it failed; again by\n{again}");
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}: {text} is no number")))
}
