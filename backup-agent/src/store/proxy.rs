//! A proxy between this machine and the service: which one the environment names, and the way through it. Its user and
//! password are never shown.

use std::net::IpAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use hyper::{Uri, header::HeaderValue};
use percent_encoding::percent_decode_str;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use url::{Host, Url};

/// Longest head of an answer to CONNECT.
const HEAD: usize = 8 << 10;

/// A proxy that is spoken to without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// The setting that names it.
    name: String,
    pub address: Uri,
    /// Marked as sensitive, so that it is not printed.
    pub authorization: Option<HeaderValue>,
}

impl Proxy {
    /// The proxy that a value such as `http://user:password@host:3128` names.
    pub fn parse(name: &str, value: &str) -> Result<Self, &'static str> {
        const WRONG: &str = "it is not an address such as http://host:3128";
        let value = if value.contains("://") {
            value.to_owned()
        } else {
            format!("http://{value}")
        };
        let url = Url::parse(&value).map_err(|_| WRONG)?;
        match url.scheme() {
            "http" => {}
            "https" => {
                return Err(
                    "a proxy that speaks TLS itself is not supported; name one with http://",
                );
            }
            _ => return Err("a SOCKS proxy is not supported; name one with http://"),
        }
        let host = url.host_str().ok_or(WRONG)?;
        let port = url.port_or_known_default().unwrap_or(80);
        let address = format!("http://{host}:{port}/")
            .parse()
            .map_err(|_| WRONG)?;
        let decode = |text| percent_decode_str(text).collect::<Vec<u8>>();
        let authorization = if url.username().is_empty() && url.password().is_none() {
            None
        } else {
            let password = url.password().unwrap_or_default();
            let pair = [decode(url.username()), b":".to_vec(), decode(password)].concat();
            let text = format!("Basic {}", BASE64_STANDARD.encode(pair));
            let mut value = HeaderValue::from_str(&text).map_err(|_| WRONG)?;
            value.set_sensitive(true);
            Some(value)
        };
        Ok(Self {
            name: name.to_owned(),
            address,
            authorization,
        })
    }

    /// The error of a connection that got no further than here.
    pub fn failed(&self, reason: &str) -> Failed {
        let place = self.address.authority().map(ToString::to_string);
        Failed(format!(
            "the proxy {} ({}): {reason}",
            place.unwrap_or_default(),
            self.name
        ))
    }

    /// Asks for a tunnel to the host of an https address.
    pub async fn tunnel(&self, stream: &mut TcpStream, target: &Uri) -> Result<(), Failed> {
        let lost = |error: std::io::Error| self.failed(&error.to_string());
        let host = target.host().unwrap_or_default();
        let place = format!("{host}:{}", target.port_u16().unwrap_or(443));
        let mut ask = format!("CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n").into_bytes();
        if let Some(value) = &self.authorization {
            ask.extend_from_slice(b"Proxy-Authorization: ");
            ask.extend_from_slice(value.as_bytes());
            ask.extend_from_slice(b"\r\n");
        }
        ask.extend_from_slice(b"\r\n");
        stream.write_all(&ask).await.map_err(lost)?;
        let mut head = Vec::new();
        // The server says nothing before we do, so nothing of it is read here.
        while !head.windows(4).any(|end| end == b"\r\n\r\n") {
            if head.len() > HEAD || stream.read_buf(&mut head).await.map_err(lost)? == 0 {
                return Err(self.failed("it does not answer as a proxy does"));
            }
        }
        let status = String::from_utf8_lossy(&head);
        match status.split(' ').nth(1) {
            Some("200") => Ok(()),
            Some("407") => {
                Err(self.failed("it wants a user and a password: http://user:password@host"))
            }
            Some(status) if status.len() == 3 && status.bytes().all(|b| b.is_ascii_digit()) => {
                Err(self.failed(&format!("it answered {status} to CONNECT {place}")))
            }
            _ => Err(self.failed("it does not answer as a proxy does")),
        }
    }
}

/// Why there is no way through the proxy.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(String);

/// Whether `NO_PROXY` names this host: `*`, names with all below them, addresses and networks, each with or without a port.
pub fn is_exempt(no_proxy: &str, endpoint: &Url) -> bool {
    let port = endpoint.port_or_known_default();
    let (host, address) = match endpoint.host() {
        Some(Host::Domain(name)) => (name.trim_end_matches('.').to_ascii_lowercase(), None),
        Some(Host::Ipv4(address)) => (address.to_string(), Some(IpAddr::V4(address))),
        Some(Host::Ipv6(address)) => (address.to_string(), Some(IpAddr::V6(address))),
        None => return false,
    };
    no_proxy.split([',', ' ']).map(str::trim).any(|entry| {
        let entry = entry.to_ascii_lowercase();
        let (name, wanted) = match entry.rsplit_once(':') {
            Some((name, digits)) if !name.contains(':') || name.ends_with(']') => {
                (name, digits.parse::<u16>().ok())
            }
            _ => (entry.as_str(), port),
        };
        let name = name.trim_start_matches('[').trim_end_matches(']');
        if name.is_empty() || wanted != port {
            return false;
        }
        let suffix = name.trim_start_matches("*.").trim_start_matches('.');
        name == "*"
            || match address {
                Some(address) => is_within(name, address),
                None => host == suffix || host.ends_with(&format!(".{suffix}")),
            }
    })
}

/// Whether an address is this one, or of this network.
fn is_within(text: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    let (network, length) = text
        .split_once('/')
        .map_or((text, None), |(n, l)| (n, Some(l)));
    let Ok(network) = network.parse::<IpAddr>() else {
        return false;
    };
    let ((network, most), (address, size)) = (bits(network), bits(address));
    let length = length.map_or(Ok(most), str::parse::<u32>);
    match length {
        Ok(length) if length <= most && most == size => {
            let differ = network ^ address;
            differ.checked_shr(128 - length).unwrap_or(0) == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_an_address_whose_password_does_not_show() {
        let proxy = Proxy::parse("HTTPS_PROXY", "http://me:p%40ss@proxy.example:3128/x")
            .expect("it is one");
        assert_eq!(proxy.address, "http://proxy.example:3128/");
        assert_eq!(
            proxy.authorization.as_ref().map(HeaderValue::as_bytes),
            Some(&b"Basic bWU6cEBzcw=="[..])
        );
        let shown = format!("{proxy:?} {}", proxy.failed("no"));
        assert!(
            !shown.contains("bWU6") && !shown.contains("p@ss"),
            "{shown}"
        );
        let plain =
            Proxy::parse("https_proxy", "proxy.example:3128").expect("the scheme may be left out");
        assert_eq!((plain.address, plain.authorization), (proxy.address, None));
        for (value, want) in [
            ("socks5h://host:1", "SOCKS"),
            ("https://host:1", "TLS"),
            ("http://", "not an address"),
            ("http://ho st:1", "not an address"),
            ("host:99999", "not an address"),
        ] {
            let problem = Proxy::parse("HTTPS_PROXY", value).expect_err(value);
            assert!(problem.contains(want), "{value}: {problem}");
        }
    }

    #[test]
    fn hosts_without_a_proxy_are_names_addresses_and_networks() {
        let is_exempt = |entry: &str, endpoint: &str| {
            is_exempt(entry, &Url::parse(endpoint).expect("an address"))
        };
        for (entry, endpoint) in [
            ("*", "https://s3.example"),
            ("other, s3.example", "https://s3.example"),
            (".example", "https://b.S3.example"),
            ("*.example", "https://s3.example"),
            ("EXAMPLE", "https://s3.example"),
            ("s3.example:443", "https://s3.example"),
            ("127.0.0.1", "http://127.0.0.1:9000"),
            ("127.0.0.1:9000", "http://127.0.0.1:9000"),
            ("10.0.0.0/8", "https://10.20.30.40"),
            ("0.0.0.0/0", "https://10.20.30.40"),
            ("::1", "http://[::1]:9000"),
            ("[::1]:9000", "http://[::1]:9000"),
            ("fd00::/8", "http://[fd12::1]"),
        ] {
            assert!(is_exempt(entry, endpoint), "{entry} {endpoint}");
        }
        for (entry, endpoint) in [
            ("", "https://s3.example"),
            (",", "https://s3.example"),
            ("3.example", "https://s3.example"),
            ("s3.example:80", "https://s3.example"),
            ("10.0.0.0/8", "https://11.0.0.1"),
            ("10.0.0.0/99", "https://10.0.0.1"),
            ("::/0", "https://10.0.0.1"),
            ("1", "https://10.0.0.1"),
        ] {
            assert!(!is_exempt(entry, endpoint), "{entry} {endpoint}");
        }
    }
}
