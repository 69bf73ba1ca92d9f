//! The gateway: when it starts and stops (`state`), how it is started (`process`), how nothing of it is left behind
//! (`sweep`), and how it is talked to (`probe`, `rpc`, `files`).

pub mod backoff;
pub mod files;
pub mod probe;
pub mod process;
pub mod rpc;
pub mod state;
pub mod sweep;
