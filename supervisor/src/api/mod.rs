//! The HTTP API: `server` takes connections, `auth` checks the token, `routes` answers, `envelope` gives answers their form.
//!
//! It owns no state: it reads what the owner publishes, and sends it commands that carry their own way back.

pub mod auth;
pub mod devices;
pub mod envelope;
pub mod routes;
pub mod server;
