//! `supervisor healthcheck`: asks the running one for its status, for Docker's HEALTHCHECK.
//!
//! Healthy is a supervisor that answers and whose gateway has not given up. One that restores, starts or backs off is
//! healthy: replacing it would only lose time.

use std::net::{Ipv4Addr, SocketAddr};

use crate::error::Error;
use crate::gateway::probe;
use crate::json::Json;
use crate::secret::Secret;

/// Longer than any status of a gateway.
const MAX_STATUS: usize = 64;

pub async fn check(listen: SocketAddr, token: &Secret) -> Result<String, Error> {
    let address = reachable(listen);
    let unhealthy = |reason: String| Error::Unhealthy { address, reason };
    let header = format!("Authorization: Bearer {}\r\n", token.expose());
    let (status, body) = probe::get(address, "/v1/status", &header)
        .await
        .map_err(|error| unhealthy(error.kind().to_string()))?;
    let gateway = Json::read(&body).and_then(|body| body.at(&["data", "gateway", "status"]));
    let gateway = gateway.and_then(|gateway| gateway.text(MAX_STATUS));
    match gateway.as_deref() {
        Some("failed") => Err(unhealthy("the gateway has failed".to_owned())),
        Some(gateway) if status == 200 => Ok(gateway.to_owned()),
        _ => Err(unhealthy(format!("it answered {status}"))),
    }
}

/// Of every address, loopback is one. Its IPv4 is there where IPv6 is not, and is ours whichever of the two was set.
fn reachable(listen: SocketAddr) -> SocketAddr {
    match listen.ip().to_canonical() {
        ip if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), listen.port()),
        ip => SocketAddr::new(ip, listen.port()),
    }
}
