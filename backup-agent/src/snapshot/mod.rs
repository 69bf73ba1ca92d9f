//! Snapshots as the store has them: ids, records, the head. What is inside of a layer is `archive`'s.

pub mod head;
pub mod history;
pub mod id;
pub mod layers;
pub mod record;
pub mod retention;
pub mod sealed;
