//! Which layers a new one takes over, so that their number stays logarithmic and little of them is dead.
//!
//! The files are on the local disk, so taking a layer over costs an upload and no download. It is a pure function of sizes.

/// A layer of the last snapshot, in bytes of its tar stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub whole: u64,
    /// What of it the tree still needs.
    pub live: u64,
    /// A file whose content is in it cannot be read on the disk now.
    pub is_pinned: bool,
}

/// Which of `layers` (oldest first) a new layer with `changed` bytes takes over: every one that is mostly dead, and every
/// one that is not at least twice as large as what the new layer then has.
///
/// So each layer is at least twice the size of the next newer one, and at least half alive: a restore downloads at most
/// twice the live bytes, and the number of layers is at most 2 + log2(live bytes / newest layer).
pub fn taken_over(layers: &[Size], changed: u64) -> Vec<bool> {
    let mut taken = vec![false; layers.len()];
    let mut new = changed;
    loop {
        let next = (0..layers.len()).rev().find(|&at| {
            let Size {
                whole,
                live,
                is_pinned,
            } = layers[at];
            !taken[at] && !is_pinned && (live.saturating_mul(2) < whole || whole / 2 < new)
        });
        let Some(at) = next else { return taken };
        taken[at] = true;
        new = new.saturating_add(layers[at].live);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(whole: u64, live: u64) -> Size {
        Size {
            whole,
            live,
            is_pinned: false,
        }
    }

    fn taken(layers: &[(u64, u64)], changed: u64) -> Vec<bool> {
        let layers: Vec<Size> = layers
            .iter()
            .map(|&(whole, live)| size(whole, live))
            .collect();
        taken_over(&layers, changed)
    }

    #[test]
    fn small_layers_are_taken_over_and_large_ones_stay() {
        assert_eq!(taken(&[], 5), [] as [bool; 0]);
        assert_eq!(taken(&[(100, 100)], 10), [false]);
        assert_eq!(taken(&[(100, 100)], 51), [true]);
        // What was taken over counts for the next older one.
        assert_eq!(taken(&[(100, 100), (40, 40)], 25), [true, true]);
        assert_eq!(taken(&[(1000, 1000), (40, 40)], 25), [false, true]);
    }

    #[test]
    fn a_layer_that_is_mostly_dead_is_taken_over_wherever_it_is() {
        assert_eq!(
            taken(&[(1000, 400), (300, 300), (100, 100)], 1),
            [true, true, true]
        );
        assert_eq!(taken(&[(1000, 1000), (100, 0)], 1), [false, true]);
        assert_eq!(taken(&[(1000, 10), (300, 300)], 1), [true, false]);
    }

    #[test]
    fn a_layer_with_a_file_that_cannot_be_read_stays() {
        let mut pinned = size(100, 10);
        assert_eq!(taken_over(&[pinned], 500), [true]);
        pinned.is_pinned = true;
        assert_eq!(taken_over(&[pinned, size(40, 40)], 500), [false, true]);
    }

    #[test]
    fn whatever_was_written_before_layers_double_and_are_mostly_alive() {
        let mut random = 1_u64;
        let mut next = |limit: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % limit
        };
        let mut layers: Vec<Size> = Vec::new();
        for _ in 0..5_000 {
            let magnitude = next(30);
            let changed = 1 + next(1 << magnitude);
            for layer in &mut layers {
                layer.live -= next(layer.live / 4 + 1);
            }
            let taken = taken_over(&layers, changed);
            let mut new = changed;
            let mut kept = Vec::new();
            for (layer, taken) in layers.iter().zip(taken) {
                if taken {
                    new += layer.live;
                } else {
                    kept.push(*layer);
                }
            }
            kept.push(size(new, new));
            layers = kept;
            for pair in layers.windows(2) {
                assert!(pair[0].whole / 2 >= pair[1].whole, "{layers:?}");
            }
            assert!(layers.iter().all(|layer| layer.live * 2 >= layer.whole));
            let live: u64 = layers.iter().map(|layer| layer.live).sum();
            let bound = 2 + (live / new).checked_ilog2().unwrap_or(0);
            assert!(layers.len() <= bound as usize + 1, "{layers:?}");
        }
    }
}
