//! `supervisor healthcheck`: asks the running one for its status, for Docker's HEALTHCHECK.
//!
//! Healthy is a supervisor that answers and whose gateway has not given up. One that restores, starts or backs off is
//! healthy: replacing it would only lose time.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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

/// Listening on every address includes loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
