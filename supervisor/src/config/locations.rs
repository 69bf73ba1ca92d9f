//! How it is written where something is (an address, a directory, a file, the store), and the half sentence for what is not
//! written so. Only of a file is it asked whether it is there.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Component, Path, PathBuf};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    S3,
    File(PathBuf),
}

impl StoreKind {
    pub fn word(&self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::File(_) => "file",
        }
    }
}

pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| format!("{text:?} is not an address such as 0.0.0.0:8080"))
}

/// An absolute path of plain names, so that comparing two of them means something.
pub fn directory(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let mut components = path.components();
    let is_plain = components.next() == Some(Component::RootDir)
        && components.clone().next().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)));
    if is_plain {
        Ok(path.components().collect())
    } else {
        Err(format!(
            "{text:?} is not an absolute path of a directory below /, without \"..\""
        ))
    }
}

pub fn file(text: &str) -> Result<PathBuf, String> {
    let path = directory(text)?;
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("there is no file {text:?}"))
    }
}

pub fn store(text: &str) -> Result<StoreKind, String> {
    if let Some(path) = text.strip_prefix("file://") {
        return directory(path)
            .map(StoreKind::File)
            .map_err(|_| format!("{text:?} is not file:// and an absolute path"));
    }
    let bucket = text
        .strip_prefix("s3://")
        .map(|rest| rest.split('/').next().unwrap_or_default());
    let fits = bucket.is_some_and(|bucket| {
        (3..=63).contains(&bucket.len())
            && bucket
                .bytes()
                .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
    });
    if fits {
        Ok(StoreKind::S3)
    } else {
        Err(format!(
            "{text:?} is neither s3://bucket/prefix nor file:///directory"
        ))
    }
}

pub fn endpoint(text: &str) -> Result<String, String> {
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"));
    match rest {
        // Credentials in a URL would end up in logs.
        Some(rest)
            if !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic() && b != b'@') =>
        {
            Ok(text.to_owned())
        }
        _ => Err("it is not http:// or https:// and a host".to_owned()),
    }
}

/// An IP address or `localhost`: a name would need a resolver, and the gateway listens on loopback only.
pub fn gateway_url(text: &str) -> Result<SocketAddr, String> {
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
    fn directories_are_absolute_and_plain() {
        assert_eq!(directory("/data/"), Ok(PathBuf::from("/data")));
        for text in ["", "/", "data", "/data/../etc", "./data"] {
            assert!(directory(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn stores() {
        assert_eq!(store("s3://bucket/a/b"), Ok(StoreKind::S3));
        assert_eq!(store("file:///x"), Ok(StoreKind::File("/x".into())));
        for text in [
            "",
            "bucket",
            "s3://",
            "s3://B/x",
            "file://x",
            "file:///",
            "https://x",
        ] {
            assert!(store(text).is_err(), "{text:?}");
        }
    }

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
    }
}
