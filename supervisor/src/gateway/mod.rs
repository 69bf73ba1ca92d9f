//! The gateway: when it starts and stops (`state`, `transitions`), how it is started (`process`), how nothing of it is left
//! behind (`sweep`, with `process_table`), and how it is talked to (`probe`, `rpc` over `bounded`, `files`).

pub mod backoff;
mod bounded;
pub mod files;
pub mod probe;
pub mod process;
pub mod process_table;
pub mod root;
pub mod rpc;
pub mod state;
pub mod sweep;
pub mod transitions;
