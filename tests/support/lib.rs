//! Harness of the end-to-end tests: finds the binaries, starts servers on free ports, compares trees.

// A harness panics where a test is to fail, and its items are read beside the tests that use them.
#![allow(missing_docs, clippy::missing_panics_doc, clippy::must_use_candidate)]

pub mod agent;
pub mod binaries;
pub mod device;
pub mod edge;
pub mod faults;
pub mod forge;
pub mod front;
pub mod golden;
pub mod greedy;
pub mod held;
pub mod history;
pub mod http;
pub mod hung;
pub mod ledger;
pub mod machine;
pub mod moto;
pub mod mount;
pub mod openclaw;
pub mod past;
pub mod proxy;
pub mod rclone;
pub mod s3;
pub mod seeds;
pub mod signature;
pub mod supervisor;
pub mod surroundings;
#[cfg(target_arch = "x86_64")]
pub mod syscalls;
pub mod table;
pub mod tree;
pub mod wait;
pub mod workspace;
