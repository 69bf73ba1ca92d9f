//! Which snapshots stay. Pure: records, policy and time in, a verdict with its reason out.
//!
//! The rules are those of restic's `forget`: `last=N` keeps the N newest, `hourly=N` the newest of each of the N most recent
//! hours that have one, likewise days and ISO weeks, all in UTC. A snapshot stays if any rule keeps it. On top of them come
//! what no policy may remove: the head, what is young, and what a person may still miss.

use std::collections::{HashMap, HashSet};

use jiff::{SignedDuration, Timestamp, tz::TimeZone};

use crate::snapshot::{
    history, id,
    record::{Record, Totals},
};

/// Nothing younger is removed: it may belong to a run under way, here or elsewhere.
pub const YOUNG: SignedDuration = SignedDuration::from_hours(1);
/// A layer that no record has ever named, or an open upload, is nobody's after that. R2 ends uploads of that age, too.
pub const ABANDONED: SignedDuration = SignedDuration::from_hours(7 * 24);
/// A backup goes on from layers that no record names until they are so old. The day up to [`ABANDONED`] is for its own run,
/// and for clocks of two hosts that differ.
const LONGEST_PART: SignedDuration = SignedDuration::from_hours(6 * 24);
/// Time for a person to notice that a tree was wiped, or that a fork holds what they need.
const ATTENTION: SignedDuration = SignedDuration::from_hours(7 * 24);
/// Snapshots in a row that have to agree before a tree counts as shrunken for good: the first one and two more.
const AGREEING: usize = 3;

/// How many snapshots each rule keeps; a rule that is not named keeps none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    pub last: u32,
    pub hourly: u32,
    pub daily: u32,
    pub weekly: u32,
}

impl Policy {
    /// What is kept unless told otherwise.
    pub const DEFAULT: &str = "last=24,hourly=24,daily=7,weekly=4";

    /// Parses the form of [`Self::DEFAULT`].
    pub fn parse(text: &str) -> Option<Self> {
        let mut policy = Self::default();
        for part in text.split(',') {
            let (name, value) = part.split_once('=')?;
            let rule = match name {
                "last" => &mut policy.last,
                "hourly" => &mut policy.hourly,
                "daily" => &mut policy.daily,
                "weekly" => &mut policy.weekly,
                _ => return None,
            };
            *rule = value.parse().ok()?;
        }
        Some(policy)
    }
}

/// What becomes of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub keep: bool,
    /// In words, for a person.
    pub reason: String,
}

/// Judges every snapshot; verdicts come in the order of `records`. Without a head the newest snapshot takes its place, as
/// it does in a restore.
pub fn judge(
    records: &[Record],
    head: Option<&str>,
    policy: &Policy,
    now: Timestamp,
) -> Vec<Verdict> {
    let newest = records.iter().map(|record| record.id.as_str()).max();
    let tip = head.or(newest);
    let line = history::line(records, tip);
    let members: HashSet<&str> = line.iter().map(|record| record.id.as_str()).collect();
    // A writer's clock that ran ahead must not take the places of the others.
    let past = |record: &&Record| age(record, now) >= SignedDuration::ZERO;
    let in_line = |record: &&Record| members.contains(record.id.as_str());
    let forks = records.iter().filter(|record| !in_line(record));
    let of_forks = by_policy(forks.filter(past).collect(), policy);
    let of_line = by_policy(
        records.iter().filter(in_line).filter(past).collect(),
        policy,
    );
    let shrunken = before_shrinking(&line, now);

    let reason = |record: &Record| {
        let id = record.id.as_str();
        let age = age(record, now);
        if tip == Some(id) {
            let place = if head.is_some() {
                "the head"
            } else {
                "the newest"
            };
            return Some(place.to_owned());
        }
        if age < SignedDuration::ZERO {
            return Some("its time is in the future".to_owned());
        }
        if age < YOUNG {
            return Some("newer than one hour".to_owned());
        }
        if members.contains(id) {
            let known = of_line.get(id).cloned();
            return known.or_else(|| {
                let is_last = shrunken.contains(id);
                is_last.then(|| "before the tree shrank".to_owned())
            });
        }
        match of_forks.get(id) {
            Some(rule) => Some(format!("a fork, {rule}")),
            None if age < ATTENTION => Some("a fork, kept for 7 days".to_owned()),
            None => None,
        }
    };
    let mut reasons: Vec<Option<String>> = records.iter().map(reason).collect();

    // Where the line has gaps, a fork that was not meant as one can only be told by what came next in the line.
    let is_kept_fork = |(record, reason): &(&Record, &Option<String>)| {
        reason.is_some() && !record.fork && !members.contains(record.id.as_str())
    };
    let left: HashMap<u64, String> = records
        .iter()
        .zip(&reasons)
        .filter(is_kept_fork)
        .map(|(fork, _)| (fork.sequence + 1, fork.id.clone()))
        .collect();
    for (record, reason) in records.iter().zip(&mut reasons) {
        if reason.is_none() && members.contains(record.id.as_str()) {
            let fork = left.get(&record.sequence);
            *reason = fork.map(|fork| format!("tells the fork {fork} from the history"));
        }
    }
    let verdict = |reason: Option<String>| Verdict {
        keep: reason.is_some(),
        reason: reason.unwrap_or_else(|| "no rule keeps it".to_owned()),
    };
    reasons.into_iter().map(verdict).collect()
}

/// Whether a record may still name these layers that no record names yet: a prune on another host may remove older ones
/// between any two looks at the store.
pub fn may_be_named<'a>(layers: impl IntoIterator<Item = &'a str>, now: Timestamp) -> bool {
    let is_young = |id| id::time(id).is_some_and(|time| now.duration_since(time) < LONGEST_PART);
    layers.into_iter().all(is_young)
}

/// The age of a snapshot; one whose id is no time counts as new.
fn age(record: &Record, now: Timestamp) -> SignedDuration {
    id::time(&record.id).map_or(SignedDuration::ZERO, |time| now.duration_since(time))
}

/// The reason of each snapshot that the policy keeps, by id.
fn by_policy<'a>(mut records: Vec<&'a Record>, policy: &Policy) -> HashMap<&'a str, String> {
    records.sort_unstable_by(|a, b| b.id.cmp(&a.id));
    let mut kept = HashMap::new();
    for (at, record) in (1..=policy.last).zip(&records) {
        kept.insert(record.id.as_str(), format!("last {at} of {}", policy.last));
    }
    for (name, count, format) in [
        ("hourly", policy.hourly, "%Y-%m-%dT%H"),
        ("daily", policy.daily, "%Y-%m-%d"),
        ("weekly", policy.weekly, "%G-W%V"),
    ] {
        let (mut left, mut bucket) = (count, String::new());
        for record in &records {
            let time = id::time(&record.id).unwrap_or_default();
            let time = time.to_zoned(TimeZone::UTC).strftime(format).to_string();
            if left > 0 && time != bucket {
                left -= 1;
                kept.entry(record.id.as_str())
                    .or_insert_with(|| format!("{name} {time}"));
                bucket = time;
            }
        }
    }
    kept
}

/// The last snapshots before the tree lost more than half of its bytes or of its files and did not grow again.
fn before_shrinking<'a>(line: &[&'a Record], now: Timestamp) -> HashSet<&'a str> {
    let is_half_gone = |new: &Totals, old: &Totals| {
        new.bytes < old.bytes.div_ceil(2) || new.files < old.files.div_ceil(2)
    };
    let is_last = |at: usize| {
        let (record, newer) = (line[at], &line[..at]);
        newer
            .iter()
            .all(|newer| is_half_gone(&newer.totals, &record.totals))
            && (at < AGREEING || age(record, now) < ATTENTION)
    };
    (1..line.len())
        .filter(|&at| is_last(at))
        .map(|at| line[at].id.as_str())
        .collect()
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
