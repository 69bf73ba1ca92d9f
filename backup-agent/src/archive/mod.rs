//! Layers: a plain tarball in independent zstd frames, its index in a skippable frame, a footer that says where the index
//! is. `docs/snapshot-format.md` is the specification.

pub mod ahead;
pub mod download;
pub mod entry;
pub mod extents;
pub mod footer;
pub mod frames;
pub mod index;
pub mod layer_index;
pub mod line;
pub mod merge;
pub mod parts;
pub mod reader;
pub mod spool;
pub mod tarball;
pub mod writer;
