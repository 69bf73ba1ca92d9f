//! How it is written where something of ours is: an address, a file. Only of a file is it asked whether it is there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Component, Path, PathBuf};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    S3,
    File,
}

impl StoreKind {
    pub fn word(&self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::File => "file",
        }
    }
}

pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not an address such as 0.0.0.0:8080"))
}

/// A file by its absolute path: we run in another directory than whoever wrote it.
pub fn file(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let mut components = path.components();
    let is_plain = components.next() == Some(Component::RootDir)
        && components.all(|component| matches!(component, Component::Normal(_)));
    if is_plain && path.is_file() {
        Ok(path.to_owned())
    } else {
        Err(format!("there is no file {text:?}"))
    }
}

/// An IP address or `localhost`: a name would need a resolver, and the gateway listens on loopback only.
pub fn gateway_url(text: &str) -> Result<SocketAddr, String> {
    if text.contains('@') {
        // Not shown: a password may be in it.
        return Err("it must have no user name and no password".to_owned());
    }
    let authority = text
        .strip_prefix("http://")
        .map(|rest| rest.strip_suffix('/').unwrap_or(rest));
    authority
        .and_then(|authority| match authority.strip_prefix("localhost:") {
            Some(port) => port
                .parse()
                .ok()
                .map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)),
            None => authority.parse().ok(),
        })
        .ok_or_else(|| format!("{text:?} is not a URL such as http://127.0.0.1:18789"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateways_are_on_an_address() {
        for text in [
            "http://127.0.0.1:18789",
            "http://localhost:18789/",
            "http://[::1]:1",
        ] {
            assert!(gateway_url(text).is_ok(), "{text:?}");
        }
        for text in [
            "",
            "127.0.0.1:1",
            "https://127.0.0.1:1",
            "http://host:1",
            "http://127.0.0.1",
        ] {
            assert!(gateway_url(text).is_err(), "{text:?}");
        }
        let refused = gateway_url("http://user:a-secret@127.0.0.1:1");
        assert!(refused.is_err_and(|problem| !problem.contains("a-secret")));
    }
}
