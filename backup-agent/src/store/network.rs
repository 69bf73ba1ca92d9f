//! What the environment says about the way to the service: more authorities, and a proxy.

use rustls::pki_types::CertificateDer;

use super::proxy::Proxy;

/// The way to a service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// Certificates of authorities beside those that are built in.
    pub authorities: Vec<CertificateDer<'static>>,
    pub proxy: Option<Proxy>,
}
