//! Settings of the way to a service: `RUNTIME_CA_FILE`, and the proxy in the names that other programs use.

use std::{fs::File, io::Read};

use rustls::pki_types::CertificateDer;
use url::Url;

use super::source::Source;
use crate::store::{
    network::Network,
    proxy::{Proxy, is_exempt},
    tls,
};

/// Longest file of certificates; a whole system's has 200 KiB.
const CERTIFICATES: u64 = 4 << 20;

impl Source<'_> {
    /// The certificates of more authorities. Those that are meant for other
    /// programs, too, are only looked at for TLS.
    pub fn authorities(&mut self, is_https: bool) -> Vec<CertificateDer<'static>> {
        let is_by_hand = (self.env)("RUNTIME_BOOT_ID").is_none();
        let names = ["RUNTIME_CA_FILE", "SSL_CERT_FILE", "AWS_CA_BUNDLE"].into_iter();
        let mut names = names.take(match (is_https, is_by_hand) {
            (false, _) => 1,
            (true, false) => 2,
            (true, true) => 3,
        });
        let Some((name, path)) = names.find_map(|name| Some((name, self.text(name)?))) else {
            return Vec::new();
        };
        certificates(&path).unwrap_or_else(|problem| {
            self.reject(name, format_args!("{path}: {problem}"));
            Vec::new()
        })
    }

    /// The way to a service at this address.
    pub fn network(&mut self, endpoint: &Url) -> Network {
        let is_https = endpoint.scheme() == "https";
        let mut network = Network {
            authorities: self.authorities(is_https),
            proxy: None,
        };
        let no_proxy = ["NO_PROXY", "no_proxy"];
        let no_proxy = no_proxy.into_iter().find_map(|name| self.text(name));
        if is_exempt(&no_proxy.unwrap_or_default(), endpoint) {
            return network;
        }
        let names = if is_https {
            ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
        } else {
            ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]
        };
        for name in names {
            let Some(value) = self.text(name) else {
                continue;
            };
            match Proxy::parse(name, &value) {
                Ok(proxy) => network.proxy = Some(proxy),
                Err(problem) => self.reject(
                    name,
                    format_args!("{problem}, or name the store's host in NO_PROXY"),
                ),
            }
            break;
        }
        network
    }
}

fn certificates(path: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut bytes = Vec::new();
    let status = std::fs::metadata(path).map_err(|error| error.to_string())?;
    // A pipe would wait for its writer.
    if !status.is_file() {
        return Err("it is not a file".to_owned());
    }
    File::open(path)
        .and_then(|file| file.take(CERTIFICATES).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    tls::authorities(&bytes)
}
