//! Harness of the end-to-end tests: finds the binaries, starts servers on free ports, compares trees.

pub mod device;
pub mod openclaw;
