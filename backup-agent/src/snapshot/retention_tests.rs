//! The rules in tables, and over random histories.

use super::*;
use crate::snapshot::history::tests::record;

/// A Sunday.
const NOW: &str = "2026-11-22T12:00:00Z";

fn now() -> Timestamp {
    NOW.parse().expect("it is a time")
}

fn id_at(time: Timestamp, number: usize) -> String {
    let time = time.to_zoned(TimeZone::UTC);
    format!("{}-{number:08x}", time.strftime("%Y%m%dT%H%M%S%3fZ"))
}

/// A history with a snapshot at each of these times, oldest first.
fn history(times: &[&str]) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    for (at, time) in times.iter().enumerate() {
        let parent = records.last().map(|record| record.id.clone());
        let id = id_at(time.parse().expect("it is a time"), at);
        records.push(record(&id, parent.as_deref(), at as u64 + 1));
    }
    records
}

fn head(records: &[Record]) -> Option<&str> {
    records.last().map(|record| record.id.as_str())
}

/// The verdicts in one line each: `+ reason` or `- reason`.
fn judged(records: &[Record], head: Option<&str>, policy: &str) -> Vec<String> {
    let policy = Policy::parse(policy).expect("it is a policy");
    let verdicts = judge(records, head, &policy, now());
    let line = |verdict: Verdict| {
        let sign = if verdict.keep { '+' } else { '-' };
        format!("{sign} {}", verdict.reason)
    };
    verdicts.into_iter().map(line).collect()
}

#[test]
fn a_policy_is_a_list_of_rules() {
    let default = Policy::parse(Policy::DEFAULT);
    let want = Policy {
        last: 24,
        hourly: 24,
        daily: 7,
        weekly: 4,
    };
    assert_eq!(default, Some(want));
    let one = Policy::parse("daily=3").expect("one rule is a policy");
    assert_eq!((one.daily, one.last), (3, 0));
    for bad in [
        "", "last", "last=", "last=all", "last=-1", "yearly=1", "last=1;", "last=1,",
    ] {
        assert_eq!(Policy::parse(bad), None, "{bad}");
    }
}

#[test]
fn each_rule_keeps_the_newest_of_each_of_its_last_buckets() {
    let records = history(&[
        "2026-11-01T10:00:00Z",
        "2026-11-08T23:59:59Z",
        "2026-11-09T00:00:00Z",
        "2026-11-20T08:00:00Z",
        "2026-11-20T08:30:00Z",
        "2026-11-21T09:59:00Z",
        "2026-11-21T10:00:00Z",
        "2026-11-22T09:00:00Z",
        "2026-11-22T10:00:00Z",
    ]);
    let weekly = [
        "- no rule keeps it",
        // The last second of an ISO week, and the first one of the next.
        "+ weekly 2026-W45",
        "+ weekly 2026-W46",
        "- no rule keeps it",
        "- no rule keeps it",
        "- no rule keeps it",
        "- no rule keeps it",
        "- no rule keeps it",
        "+ the head",
    ];
    assert_eq!(judged(&records, head(&records), "weekly=3"), weekly);
    let mixed = [
        "- no rule keeps it",
        "- no rule keeps it",
        "- no rule keeps it",
        "- no rule keeps it",
        "+ daily 2026-11-20",
        "+ hourly 2026-11-21T09",
        "+ hourly 2026-11-21T10",
        "+ last 2 of 2",
        "+ the head",
    ];
    assert_eq!(
        judged(&records, head(&records), "last=2,hourly=4,daily=3"),
        mixed
    );
}

#[test]
fn the_year_of_a_week_is_that_of_its_thursday() {
    let mut records = history(&["2024-12-30T10:00:00Z", "2026-11-22T10:00:00Z"]);
    records[1].totals.bytes = 10_000;
    assert_eq!(
        judged(&records, head(&records), "weekly=2")[0],
        "+ weekly 2025-W01"
    );
}

#[test]
fn what_is_young_or_from_the_future_stays_and_the_future_takes_no_place() {
    let records = history(&[
        "2026-11-22T09:00:00Z",
        "2026-11-22T10:59:59Z",
        "2026-11-22T11:00:00.001Z",
        "2026-11-22T12:00:00.001Z",
        "2027-01-01T00:00:00Z",
    ]);
    let want = [
        "- no rule keeps it",
        "+ last 2 of 2",
        "+ newer than one hour",
        "+ its time is in the future",
        "+ the head",
    ];
    assert_eq!(judged(&records, head(&records), "last=2"), want);
}

#[test]
fn the_head_stays_whatever_its_time_and_without_one_the_newest() {
    let records = history(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]);
    assert_eq!(
        judged(&records, Some(&records[0].id), "last=0"),
        ["+ the head", "- no rule keeps it"]
    );
    assert_eq!(
        judged(&records, None, "last=0"),
        ["- no rule keeps it", "+ the newest"]
    );
}

#[test]
fn the_last_snapshot_before_the_tree_shrank_stays_until_three_agree_and_a_week_has_passed() {
    let mut records = history(&[
        "2026-11-14T09:00:00Z",
        "2026-11-14T10:00:00Z",
        "2026-11-14T11:00:00Z",
        "2026-11-14T12:00:00Z",
        "2026-11-14T13:00:00Z",
    ]);
    let shrank = "+ before the tree shrank";
    let verdict = |records: &[Record]| judged(records, head(records), "last=0").swap_remove(1);
    assert_eq!(verdict(&records), "- no rule keeps it");
    // Exactly half is not more than half.
    for record in &mut records[2..] {
        record.totals.bytes = 500;
    }
    assert_eq!(verdict(&records), "- no rule keeps it");
    for record in &mut records[2..] {
        record.totals.bytes = 499;
    }
    assert_eq!(verdict(&records[..3]), shrank);
    assert_eq!(verdict(&records[..4]), shrank);
    assert_eq!(verdict(&records), "- no rule keeps it");
    // Files count as bytes do.
    for record in &mut records[2..] {
        record.totals.bytes = 1000;
        record.totals.files = 4;
    }
    assert_eq!(verdict(&records[..4]), shrank);
    // It grew again.
    records[3].totals.files = 10;
    assert_eq!(verdict(&records[..4]), "- no rule keeps it");

    let mut recent = history(&[
        "2026-11-22T07:00:00Z",
        "2026-11-22T07:05:00Z",
        "2026-11-22T07:10:00Z",
        "2026-11-22T07:15:00Z",
        "2026-11-22T07:20:00Z",
    ]);
    for record in &mut recent[2..] {
        record.totals.bytes = 0;
    }
    assert_eq!(verdict(&recent), shrank, "a quarter of an hour is no time");
}

#[test]
fn forks_are_counted_apart_and_stay_seven_days() {
    let mut records = history(&[
        "2026-11-01T00:00:00Z",
        "2026-11-02T00:00:00Z",
        "2026-11-15T12:00:01Z",
        "2026-11-22T10:00:00Z",
    ]);
    records[3].parent = Some(records[0].id.clone());
    for fork in &mut records[1..3] {
        fork.fork = true;
    }
    let verdicts = judged(&records, head(&records), "last=1");
    assert_eq!(
        verdicts[1..3],
        ["- no rule keeps it", "+ a fork, last 1 of 1"]
    );
    let verdicts = judged(&records, head(&records), "last=0");
    assert_eq!(
        verdicts[1..3],
        ["- no rule keeps it", "+ a fork, kept for 7 days"]
    );
}

#[test]
fn a_fork_that_was_not_meant_as_one_is_still_told_from_the_history_later() {
    let mut records = history(&[
        "2026-11-01T00:00:00Z",
        "2026-11-20T00:00:00Z",
        "2026-11-20T00:00:01Z",
        "2026-11-20T00:05:00Z",
        "2026-11-20T00:10:00Z",
    ]);
    // The second lost against the third: both follow the first.
    records[2].parent = Some(records[0].id.clone());
    for (record, sequence) in records.iter_mut().zip([1, 2, 2, 3, 4]) {
        record.sequence = sequence;
    }
    let verdicts = judged(&records, head(&records), "last=0");
    assert_eq!(verdicts[1], "+ a fork, kept for 7 days");
    assert_eq!(verdicts[2], "- no rule keeps it");
    assert_eq!(
        verdicts[3],
        format!("+ tells the fork {} from the history", records[1].id)
    );
}

/// Numbers that look random and are the same in each run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    fn policy(&mut self) -> Policy {
        let mut count = || u32::try_from(self.below(5)).expect("it is small");
        Policy {
            last: count(),
            hourly: count(),
            daily: count(),
            weekly: count(),
        }
    }

    /// A history with forks of every kind, clocks that jump, trees that shrink and grow, and the head's id.
    fn records(&mut self) -> (Vec<Record>, Option<String>) {
        let mut records: Vec<Record> = Vec::new();
        let mut time: Timestamp = "2026-10-20T00:00:00Z".parse().expect("it is a time");
        let mut head: Option<usize> = None;
        for number in 0..=usize::try_from(self.below(60)).expect("it is small") {
            let spans = [60, 3600, 40_000, 200_000];
            let span = spans[usize::try_from(self.below(4)).expect("it is small")];
            let step = i64::try_from(self.below(span)).expect("it is small");
            let back = if self.below(20) == 0 { -3 } else { 1 };
            time += SignedDuration::from_secs(back * step);
            // A head that somebody removed: the next snapshot begins anew.
            let follows = head.filter(|_| self.below(40) > 0);
            let parent = follows.map(|at| &records[at]);
            let sequence = parent.map_or(1, |parent| parent.sequence + 1);
            let parent = parent.map(|parent| parent.id.clone());
            let mut next = record(&id_at(time, number), parent.as_deref(), sequence);
            next.totals.bytes = [1000, 900, 400, 0][usize::try_from(self.below(4)).expect("4")];
            let kind = self.below(8);
            next.fork = kind == 0;
            if kind > 1 {
                head = Some(records.len());
            }
            records.push(next);
        }
        let head = head.map(|at| records[at].id.clone());
        records.sort_by(|a, b| a.id.cmp(&b.id));
        (records, head.filter(|_| self.below(10) > 0))
    }
}

fn kept(records: &[Record], head: Option<&str>, policy: &Policy) -> Vec<Record> {
    let verdicts = judge(records, head, policy, now());
    assert_eq!(verdicts.len(), records.len());
    let pairs = records.iter().zip(verdicts);
    pairs
        .filter(|(_, verdict)| verdict.keep)
        .map(|(record, _)| record.clone())
        .collect()
}

#[test]
fn of_any_history_the_head_stays_a_second_run_removes_nothing_and_more_keeps_more() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..1000 {
        let (records, head) = random.records();
        let (head, policy) = (head.as_deref(), random.policy());
        let once = kept(&records, head, &policy);
        let newest = records.last().map(|record| record.id.as_str());
        assert!(
            once.iter()
                .any(|record| Some(record.id.as_str()) == head.or(newest)),
            "round {round}: the head is gone"
        );
        assert_eq!(once, kept(&once, head, &policy), "round {round}");

        // What is left is told apart as before.
        let tip = head.or(newest);
        let names = |records: &[Record]| -> HashSet<String> {
            let line = history::line(records, tip).into_iter();
            line.map(|record| record.id.clone()).collect()
        };
        let (before, after) = (names(&records), names(&once));
        for record in &once {
            let is_member = |names: &HashSet<String>| names.contains(&record.id);
            assert_eq!(is_member(&before), is_member(&after), "round {round}");
        }

        let mut larger = policy;
        larger.last += u32::try_from(random.below(3)).expect("it is small");
        larger.hourly += u32::try_from(random.below(3)).expect("it is small");
        larger.daily += u32::try_from(random.below(3)).expect("it is small");
        larger.weekly += u32::try_from(random.below(3)).expect("it is small");
        let more = kept(&records, head, &larger);
        for record in &once {
            assert!(
                more.contains(record),
                "round {round}: {} is gone",
                record.id
            );
        }
        for record in &records {
            let is_old = age(record, now()) >= YOUNG;
            assert!(
                is_old || once.contains(record),
                "round {round}: it is young"
            );
        }
    }
}

#[test]
fn layers_may_be_named_for_a_day_less_than_a_prune_leaves_them() {
    let layer = |age: SignedDuration| id_at(now() - age, 1);
    let margin = SignedDuration::from_hours(24);
    let (young, old) = (
        layer(ABANDONED - margin - SignedDuration::from_millis(1)),
        layer(ABANDONED - margin),
    );
    for (layers, want) in [
        (vec![], true),
        (vec![young.as_str()], true),
        (vec![young.as_str(), old.as_str()], false),
        (vec!["no-time"], false),
    ] {
        assert_eq!(may_be_named(layers.clone(), now()), want, "{layers:?}");
    }
}
