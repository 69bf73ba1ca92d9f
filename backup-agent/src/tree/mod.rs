//! The tree on disk: walking it, reading it, making it again. All by descriptor, no link followed, with the rights of the
//! user whom the tree belongs to: that user runs commands for strangers, so every name in the tree may be a trap.

pub mod apply;
pub mod cursor;
pub mod exclude;
pub mod freeze;
pub mod holes;
pub mod identity;
pub mod miss;
pub mod old;
pub mod process;
pub mod read;
pub mod remove;
pub mod root;
pub mod scan;
pub mod staging;
pub mod status;
pub mod swap;
pub mod users;
pub mod writers;
