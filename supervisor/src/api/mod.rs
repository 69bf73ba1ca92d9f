//! The HTTP API: `listen` binds its address, `server` takes connections and `places` decides whose may stay, `auth` checks the token, `paths` tells which
//! route it is, `routes` answers, `envelope` gives answers their form, and `wire` those that hyper makes by itself.
//!
//! It owns no state: it reads what the owner publishes, and sends it commands that carry their own way back.

pub mod auth;
pub mod devices;
pub mod envelope;
pub mod listen;
mod paths;
pub mod places;
pub mod routes;
pub mod server;
mod wire;
