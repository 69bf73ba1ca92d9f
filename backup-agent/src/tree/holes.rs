//! Finds where the data of a sparse file are. Whatever the file, the runs in memory, the system calls and the zeros that are
//! read in place of holes have a bound.

use super::miss::Miss;
use crate::archive::extents::Runs;
use nix::{errno::Errno, unistd::Whence};

/// Runs of data that are told apart in one file. A database has few holes, and a file made to have millions must not cost
/// memory: of more holes than that, the smallest are stored as zeros.
const MOST_RUNS: usize = 16_384;
/// Calls of lseek(2) for one file: about a second.
const MOST_SEEKS: u32 = 1_000_000;
/// Bytes of holes that are read as zeros for any file. A file with more data than this may have as many zeros as data.
const MOST_FILLED: u64 = 1 << 30;

/// Why a file is left out: to read it would be to read zeros, above all.
const TOO_MANY: Miss = Miss::LeftOut("it has too many holes");

/// Whether a file of that size on so many bytes of disk may be one with too many holes.
pub fn may_be_too_many(size: u64, allocated: u64) -> bool {
    allocated < size && size > MOST_FILLED
}

/// The runs of data of a file. `seek` is lseek(2) on it.
pub fn find_runs(
    size: u64,
    allocated: u64,
    mut seek: impl FnMut(u64, Whence) -> Result<u64, Errno>,
) -> Result<Runs, Miss> {
    let whole = || (size > 0).then_some((0, size)).into_iter().collect();
    if allocated >= size {
        return Ok(whole());
    }
    let mut found = Runs::new();
    let (mut at, mut filled, mut seeks) = (0, 0, 0);
    while at < size {
        seeks += 2;
        if seeks > MOST_SEEKS {
            return Err(TOO_MANY);
        }
        let start = match seek(at, Whence::SeekData) {
            Ok(start) if start < size => start,
            // Nothing but a hole up to the end.
            Ok(_) | Err(Errno::ENXIO) => break,
            // The file system knows no holes.
            Err(Errno::EINVAL) => return Ok(whole()),
            Err(error) => return Err(error.into()),
        };
        let end = match seek(start, Whence::SeekHole) {
            Ok(end) => end.min(size),
            // The data were cut off meanwhile.
            Err(Errno::ENXIO) => size,
            Err(error) => return Err(error.into()),
        };
        found.push((start, end - start));
        at = end;
        if found.len() == 2 * MOST_RUNS {
            filled += fill_smallest(&mut found, MOST_RUNS);
        }
    }
    filled += fill_smallest(&mut found, MOST_RUNS);
    let all: u64 = found.iter().map(|(_, length)| length).sum();
    if filled > MOST_FILLED.max(all - filled) {
        return Err(TOO_MANY);
    }
    Ok(found)
}

/// Joins runs across the smallest holes until there are at most so many; gives the bytes of these holes. A hole that is
/// filled in a part of a file is among the smallest of the whole file, too.
fn fill_smallest(runs: &mut Runs, most: usize) -> u64 {
    let surplus = runs.len().saturating_sub(most);
    if surplus == 0 {
        return 0;
    }
    let holes = runs.windows(2).enumerate();
    let mut holes: Vec<(u64, usize)> = holes
        .map(|(at, pair)| (pair[1].0 - (pair[0].0 + pair[0].1), at))
        .collect();
    // Ordered by the place, too: the same file has the same runs each time.
    holes.select_nth_unstable(surplus - 1);
    let mut is_filled = vec![false; holes.len()];
    let mut bytes = 0;
    for (length, at) in &holes[..surplus] {
        is_filled[*at] = true;
        bytes += length;
    }
    let is_joined = std::iter::once(false).chain(is_filled);
    let mut joined = Runs::with_capacity(most);
    for (&(offset, length), is_joined) in runs.iter().zip(is_joined) {
        match joined.last_mut() {
            Some((start, whole)) if is_joined => *whole = offset + length - *start,
            _ => joined.push((offset, length)),
        }
    }
    *runs = joined;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const BLOCK: u64 = 4096;

    /// What is found in a file with data there, and the number of calls that it took.
    fn find(size: u64, data: &[(u64, u64)]) -> (Result<Runs, Miss>, u32) {
        let allocated = data.iter().map(|(_, length)| length).sum();
        let mut calls = 0;
        let seek = |from: u64, whence| {
            calls += 1;
            let at = data.partition_point(|(offset, length)| offset + length <= from);
            match (data.get(at), whence) {
                (None, Whence::SeekData) => Err(Errno::ENXIO),
                (Some((offset, _)), Whence::SeekData) => Ok(from.max(*offset)),
                (Some((offset, length)), _) if *offset <= from => Ok(offset + length),
                _ => Ok(from),
            }
        };
        (find_runs(size, allocated, seek), calls)
    }

    /// So many blocks of data, with holes of that many bytes behind them.
    fn combed(runs: u64, hole: u64) -> Vec<(u64, u64)> {
        (0..runs).map(|run| (run * (BLOCK + hole), BLOCK)).collect()
    }

    #[test]
    fn every_run_of_a_file_with_few_holes_is_told_apart() {
        for data in [&[][..], &[(0, 5)], &[(10, 5)], &[(0, 5), (10, 5), (90, 10)]] {
            assert_eq!(find(100, data).0.as_deref(), Ok(data));
        }
        assert_eq!(find(0, &[]).0.as_deref(), Ok(&[][..]));
        assert_eq!(
            find(100, &[(0, 100)]),
            (Ok([(0, 100)].into_iter().collect()), 0)
        );
    }

    #[test]
    fn a_file_system_without_holes_gives_one_run_and_another_error_is_told() {
        let failing = |error| find_runs(100, 10, |_, _| Err(error));
        assert_eq!(failing(Errno::EINVAL).as_deref(), Ok(&[(0, 100)][..]));
        assert_eq!(failing(Errno::EIO), Err(Miss::Unread(Errno::EIO)));
    }

    #[test]
    fn the_largest_hole_stays_one_however_many_there_are() {
        let mut data = combed(MOST_RUNS as u64, BLOCK);
        data.push((200 * GIB, BLOCK));
        let (found, _) = find(200 * GIB + BLOCK, &data);
        let found = found.expect("few zeros are read for it");
        assert_eq!(found.len(), MOST_RUNS);
        assert_eq!(found[0], (0, 3 * BLOCK), "the first of the smallest");
        assert_eq!(found.last(), data.last());
        let read: u64 = found.iter().map(|(_, length)| length).sum();
        assert_eq!(read, (MOST_RUNS as u64 + 2) * BLOCK);
    }

    #[test]
    fn what_is_filled_in_parts_is_what_is_smallest_of_all() {
        // Holes of every length, in an order without order.
        let mut offset = 0;
        let runs: Vec<(u64, u64)> = (0..1000_u64)
            .map(|run| {
                offset += 1 + run * 7919 % 1000;
                let start = offset;
                offset += 10;
                (start, 10)
            })
            .collect();
        let mut at_once: Runs = runs.iter().copied().collect();
        let bytes = fill_smallest(&mut at_once, 100);
        let mut in_parts = Runs::new();
        let mut sum = 0;
        for run in runs {
            in_parts.push(run);
            if in_parts.len() == 200 {
                sum += fill_smallest(&mut in_parts, 100);
            }
        }
        sum += fill_smallest(&mut in_parts, 100);
        assert_eq!((in_parts, sum), (at_once, bytes));
        // All but the 99 largest holes between two runs.
        let between: u64 = (1..=1000).sum::<u64>() - 1;
        let largest: u64 = (902..=1000).sum();
        assert_eq!(bytes, between - largest);
    }

    #[test]
    fn a_file_of_little_more_than_zeros_is_refused_and_one_with_as_much_data_is_not() {
        let runs = MOST_RUNS as u64 + 2 * (GIB >> 20);
        let sparse = combed(runs, 1 << 20);
        assert_eq!(find(1 << 40, &sparse).0, Err(TOO_MANY));
        assert!(may_be_too_many(1 << 40, runs * BLOCK));
        // A database that gives back a part of each of its pages has holes everywhere, and no fewer bytes than zeros.
        let punched = combed(400_000, BLOCK);
        let (found, _) = find(400_000 * 2 * BLOCK, &punched);
        assert_eq!(found.map(|runs| runs.len()), Ok(MOST_RUNS));
    }

    #[test]
    fn the_calls_for_one_file_have_a_bound() {
        let data = combed(u64::from(MOST_SEEKS), 1);
        let (found, calls) = find(1 << 40, &data);
        assert_eq!((found, calls), (Err(TOO_MANY), MOST_SEEKS));
    }
}
