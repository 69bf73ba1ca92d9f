//! Snapshots of a tree on a store.
fn main() {}
