//! All snapshots of an instance together: reading their records, and which of them the head follows.

use std::collections::HashSet;

use futures_util::{StreamExt, stream};

use crate::{
    error::Error,
    log,
    snapshot::{
        id,
        record::{self, Record},
    },
    store::{Store, StoreError},
};

/// Requests under way at once where there is one for each of many objects: it hides the round trips, and stays far below
/// what a service takes from one client.
pub const AT_ONCE: usize = 8;

async fn fetch(store: &dyn Store, ids: &[String]) -> Vec<Result<Record, Error>> {
    let reads = stream::iter(ids).map(|id| record::read(store, id));
    reads.buffered(AT_ONCE).collect().await
}

fn is_absent(read: &Result<Record, Error>) -> bool {
    matches!(read, Err(Error::UnknownSnapshot { .. }))
}

/// Reads these records, which a listing names. One that is not there has to be gone from the next listing, too: an object that
/// is listed and absent is the word of a store that cannot be trusted.
pub async fn read_listed(
    store: &dyn Store,
    ids: &[String],
) -> Result<Vec<Result<Record, Error>>, Error> {
    let mut reads = fetch(store, ids).await;
    if reads.iter().any(is_absent) {
        let listed: HashSet<String> = record::list(store).await?.into_iter().collect();
        let absent = reads.iter().zip(ids).filter(|(read, _)| is_absent(read));
        if let Some((_, id)) = absent.into_iter().find(|(_, id)| listed.contains(*id)) {
            return Err(absent_though_listed(id));
        }
    }
    reads.retain(|read| !is_absent(read));
    Ok(reads)
}

/// The error of a record that a listing names and that is not there.
pub fn absent_though_listed(id: &str) -> Error {
    let contradiction = StoreError::Listing("it names what is not there");
    Error::store("read", record::key(id))(contradiction)
}

/// What is there of the snapshots that the head and listed records name and the listing does not: such a listing cannot be
/// trusted. Parents that were pruned are not there.
pub async fn left_out(
    store: &dyn Store,
    listed: &[String],
    records: &[Record],
    head: Option<&str>,
) -> Vec<Result<Record, Error>> {
    let mut known: HashSet<String> = listed.iter().cloned().collect();
    let mut found = Vec::new();
    let mut named = parents(records);
    named.extend(head.map(str::to_owned));
    loop {
        named.retain(|id| id::is_valid(id) && known.insert(id.clone()));
        if named.is_empty() {
            return found;
        }
        let mut reads = fetch(store, &named).await;
        reads.retain(|read| !is_absent(read));
        named = parents(reads.iter().flatten());
        found.extend(reads);
    }
}

fn parents<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<String> {
    let parents = records.into_iter();
    parents.filter_map(|record| record.parent.clone()).collect()
}

/// Every record of the instance, oldest first, with those that the listing left out.
pub async fn all(
    store: &dyn Store,
    head: Option<&str>,
) -> Result<Vec<Result<Record, Error>>, Error> {
    let ids = record::list(store).await?;
    let mut reads = read_listed(store, &ids).await?;
    let records: Vec<Record> = reads.iter().flatten().cloned().collect();
    let left_out = left_out(store, &ids, &records, head).await;
    if !left_out.is_empty() {
        log::warn(
            "the listing of the store leaves out snapshots that are there",
            &[("count", left_out.len().into())],
        );
        reads.extend(left_out);
        reads.sort_by_key(|read| read.as_ref().ok().map(|record| record.id.clone()));
    }
    Ok(reads)
}

/// The snapshot `tip` and what it follows, newest first. Every other snapshot is a fork.
///
/// Where the parent was removed, the line goes on with the snapshot of the next lower sequence. One with the parent's own
/// sequence is a fork that left there, since the parent's id is known; forks below it have the child of where they left
/// kept as long as they are (see `retention`), so that the line is never lost to one of them.
pub fn line<'a>(records: &'a [Record], tip: Option<&str>) -> Vec<&'a Record> {
    let named = |id: &str| records.iter().find(|record| record.id == id);
    let mut line = Vec::new();
    let mut next = tip.and_then(named);
    while let Some(record) = next {
        line.push(record);
        next = record.parent.as_deref().and_then(|parent| {
            let parent = named(parent).filter(|parent| parent.sequence < record.sequence);
            parent.or_else(|| {
                let is_older =
                    |other: &&Record| !other.fork && other.sequence + 1 < record.sequence;
                let older = records.iter().filter(is_older);
                older.max_by_key(|other| (other.sequence, &other.id))
            })
        });
    }
    line
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::{
        snapshot::record::{Consistency, FORMAT, Totals},
        tree::miss::Unread,
    };

    /// A record of 1,000 bytes in 10 files without layers.
    pub fn record(id: &str, parent: Option<&str>, sequence: u64) -> Record {
        Record {
            format: FORMAT,
            id: id.to_owned(),
            parent: parent.map(str::to_owned),
            sequence,
            time: String::new(),
            writer: String::new(),
            tool: String::new(),
            consistency: Consistency::Instant,
            reason: None,
            unread: Unread::default(),
            rounds: 1,
            pause_ms: None,
            fork: false,
            totals: Totals {
                files: 10,
                bytes: 1000,
                ..Totals::default()
            },
            layers: Vec::new(),
        }
    }

    fn ids(records: &[Record], tip: &str) -> String {
        let line = line(records, Some(tip)).into_iter();
        line.map(|record| record.id.as_str()).collect()
    }

    #[test]
    fn the_line_follows_parents_and_leaves_forks_aside() {
        let known = record("x", Some("a"), 2);
        let knowing = Record {
            fork: true,
            ..record("y", Some("b"), 3)
        };
        let records = [
            record("a", None, 1),
            record("b", Some("a"), 2),
            record("c", Some("b"), 3),
            known,
            knowing,
        ];
        assert_eq!(ids(&records, "c"), "cba");
        assert_eq!(ids(&records, "y"), "yba");
        assert_eq!(ids(&records, "gone"), "");
        assert!(line(&records, None).is_empty());
    }

    #[test]
    fn the_line_goes_on_over_a_removed_snapshot() {
        let fork = Record {
            fork: true,
            ..record("y", Some("c"), 4)
        };
        let records = [
            record("a", None, 1),
            record("c", Some("b"), 3),
            fork,
            record("f", Some("e"), 6),
        ];
        assert_eq!(ids(&records, "f"), "fca");
    }

    #[test]
    fn a_loser_with_the_sequence_of_the_removed_parent_is_not_taken_for_it() {
        let records = [
            record("a", None, 1),
            record("x", Some("b"), 3),
            record("d", Some("c"), 4),
        ];
        assert_eq!(ids(&records, "d"), "da");
    }

    #[test]
    fn parents_in_a_circle_end() {
        let records = [record("a", Some("b"), 2), record("b", Some("a"), 2)];
        assert_eq!(ids(&records, "b"), "b");
    }
}
