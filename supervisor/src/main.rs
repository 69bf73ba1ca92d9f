//! PID 1 of the container.
fn main() {}
