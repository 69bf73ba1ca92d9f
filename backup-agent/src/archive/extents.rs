//! Where a file's bytes are: runs of data in the raw tar streams of layers, and holes between them, in the file's order.

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// A run of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(Option<u32>, u64, u64)", into = "(Option<u32>, u64, u64)")]
pub enum Extent {
    /// In the raw tar stream of a layer, by its number in the index's own list.
    Data {
        layer: u32,
        offset: u64,
        length: u64,
    },
    /// Zeros that take no room.
    Hole { length: u64 },
}

impl From<(Option<u32>, u64, u64)> for Extent {
    fn from((layer, offset, length): (Option<u32>, u64, u64)) -> Self {
        match layer {
            Some(layer) => Self::Data {
                layer,
                offset,
                length,
            },
            None => Self::Hole { length },
        }
    }
}

impl From<Extent> for (Option<u32>, u64, u64) {
    fn from(extent: Extent) -> Self {
        match extent {
            Extent::Data {
                layer,
                offset,
                length,
            } => (Some(layer), offset, length),
            Extent::Hole { length } => (None, 0, length),
        }
    }
}

/// All of a file's. Most files are one run, which takes no memory of its own.
pub type Extents = SmallVec<[Extent; 1]>;

/// Runs of data in a file: offset and length of each, ascending.
pub type Runs = SmallVec<[(u64, u64); 1]>;

/// Where a file's bytes are: its runs of data (offset and length, ascending) one after the other from `start` on, holes
/// between them.
pub fn extents(runs: &[(u64, u64)], size: u64, start: u64) -> Extents {
    let mut extents = Extents::with_capacity(runs.len());
    let (mut at, mut stored) = (0, start);
    for &(offset, length) in runs {
        if offset > at {
            extents.push(Extent::Hole {
                length: offset - at,
            });
        }
        if length > 0 {
            extents.push(Extent::Data {
                layer: 0,
                offset: stored,
                length,
            });
        }
        stored += length;
        at = offset + length;
    }
    if size > at {
        extents.push(Extent::Hole { length: size - at });
    }
    extents
}

/// The runs of data that extents stand for, as offset in the file and length.
pub fn runs(extents: &[Extent]) -> Runs {
    let mut offset = 0;
    let mut runs = Runs::new();
    for extent in extents {
        let (Extent::Data { length, .. } | Extent::Hole { length }) = *extent;
        if matches!(extent, Extent::Data { .. }) {
            runs.push((offset, length));
        }
        // An index from the store may claim anything.
        offset = u64::saturating_add(offset, length);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_cover_the_file_with_its_holes() {
        let data = |offset, length| Extent::Data {
            layer: 0,
            offset,
            length,
        };
        let hole = |length| Extent::Hole { length };
        for (all, size, want) in [
            (&[(0, 10)][..], 10, vec![data(512, 10)]),
            (&[], 10, vec![hole(10)]),
            (&[], 0, vec![]),
            (
                &[(4, 2), (8, 1)],
                12,
                vec![hole(4), data(512, 2), hole(2), data(514, 1), hole(3)],
            ),
        ] {
            assert_eq!(extents(all, size, 512)[..], want);
            assert_eq!(runs(&want)[..], *all);
        }
    }
}
