//! Where a store is and with what keys: its address, and the settings of S3 in the runtime's names or, by hand, in those that
//! the services' own tools use. Nothing is requested; whether the keys open anything is for the store to find out.

use std::{fmt, io::Read, num::NonZeroU64, path::PathBuf};

use url::Url;

use super::source::Source;
use crate::store::network::Network;

/// A value that must never be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The value itself: for signing only.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// Where snapshots are kept, without the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A directory of this machine.
    Directory(PathBuf),
    /// A prefix of a bucket.
    S3(Box<Bucket>),
}

/// A prefix of a bucket and how to get at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    pub name: String,
    /// Empty, or ends in `/`.
    pub prefix: String,
    pub endpoint: Url,
    pub network: Network,
    /// The bucket is part of the host name instead of the path.
    pub is_virtual_host: bool,
    pub region: String,
    pub access_key_id: String,
    pub secret_access_key: Secret,
    pub session_token: Option<Secret>,
    /// Bytes per second, both ways together.
    pub bandwidth: Option<NonZeroU64>,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "file://{}", path.display()),
            Self::S3(bucket) => {
                let prefix = bucket.prefix.trim_end_matches('/');
                write!(f, "s3://{}/{prefix}", bucket.name)
            }
        }
    }
}

/// Longest content of a `*_FILE` secret: session tokens are the longest, at about 2 KiB.
const SECRET_LIMIT: u64 = 16 * 1024;

impl Source<'_> {
    /// An AWS name: for people only, a runtime passes its own settings.
    fn by_hand(&mut self, name: &str) -> Option<String> {
        if (self.env)("RUNTIME_BOOT_ID").is_some() {
            return None;
        }
        self.text(name)
    }

    /// A secret from its variable, from the file that its `*_FILE` names, or, by hand, from its AWS name.
    fn secret(&mut self, name: &str) -> Option<String> {
        let runtime = format!("RUNTIME_{name}");
        let file_name = format!("{runtime}_FILE");
        let fallback = format!("AWS_{}", name.trim_start_matches("S3_"));
        let (value, file) = (self.text(&runtime), self.text(&file_name));
        match (value, file) {
            (Some(_), Some(_)) => {
                self.reject(
                    &runtime,
                    format_args!("{file_name} is set too; set one of them"),
                );
                None
            }
            (Some(value), None) => Some(value),
            (None, Some(path)) => {
                let mut text = String::new();
                let read = std::fs::File::open(&path)
                    .and_then(|file| file.take(SECRET_LIMIT).read_to_string(&mut text));
                match read {
                    Ok(_) if !text.trim().is_empty() => Some(text.trim().to_owned()),
                    Ok(_) => {
                        self.reject(&file_name, format_args!("{path} is empty"));
                        None
                    }
                    Err(error) => {
                        self.reject(&file_name, format_args!("cannot read {path}: {error}"));
                        None
                    }
                }
            }
            (None, None) => self.by_hand(&fallback),
        }
    }

    pub fn location(&mut self, name: &str, url: &str) -> Option<Location> {
        if let Some(path) = url.strip_prefix("file://") {
            if path.starts_with('/') && path.len() > 1 {
                self.authorities(false);
                return Some(Location::Directory(PathBuf::from(path)));
            }
        } else if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if !bucket.is_empty() {
                return self.s3(bucket, prefix.trim_matches('/'));
            }
        }
        self.reject(
            name,
            format_args!("{url:?} is neither s3://bucket/prefix nor file:///dir"),
        );
        None
    }

    fn s3(&mut self, bucket: &str, prefix: &str) -> Option<Location> {
        let region = self
            .secret("S3_REGION")
            .unwrap_or_else(|| "auto".to_owned());
        let endpoint = self.secret("S3_ENDPOINT");
        // The name that the services' own tools use.
        let endpoint = endpoint.or_else(|| self.by_hand("AWS_ENDPOINT_URL"));
        let endpoint = endpoint.or_else(|| {
            (region != "auto").then(|| format!("https://{{bucket}}.s3.{region}.amazonaws.com"))
        });
        let id = self.secret("S3_ACCESS_KEY_ID");
        let key = self.secret("S3_SECRET_ACCESS_KEY");
        let token = self.secret("S3_SESSION_TOKEN");
        for (name, value) in [("ACCESS_KEY_ID", &id), ("SECRET_ACCESS_KEY", &key)] {
            let name = format!("RUNTIME_S3_{name}");
            // One that is there and cannot be used has been named already.
            if value.is_none() && !self.problems.iter().any(|known| known.contains(&name)) {
                self.reject(&name, "it is not set, and the store is on S3");
            }
        }
        let Some(endpoint) = endpoint else {
            self.reject(
                "RUNTIME_S3_ENDPOINT",
                "it is not set, and the region auto names no endpoint",
            );
            return None;
        };
        // The bucket goes into the host name where the endpoint says so, or already has it there.
        let host = format!("://{bucket}.");
        let (plain, is_virtual_host) = if endpoint.contains("://{bucket}.") {
            (endpoint.replace("://{bucket}.", "://"), true)
        } else if endpoint.contains(&host) {
            (endpoint.replace(&host, "://"), true)
        } else {
            (endpoint.clone(), false)
        };
        // Hosts have no other letters, and the parser of those asserts what it was not given.
        let parsed = (plain.is_ascii().then(|| Url::parse(&plain).ok()))
            .flatten()
            .filter(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some());
        let Some(url) = parsed else {
            self.reject(
                "RUNTIME_S3_ENDPOINT",
                format_args!("{endpoint:?} is not an address such as https://host"),
            );
            return None;
        };
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
            self.reject(
                "RUNTIME_S3_ENDPOINT",
                "it must have no user, password or query",
            );
            return None;
        }
        Some(Location::S3(Box::new(Bucket {
            name: bucket.to_owned(),
            prefix: if prefix.is_empty() {
                String::new()
            } else {
                format!("{prefix}/")
            },
            network: self.network(&url),
            endpoint: url,
            is_virtual_host,
            region,
            access_key_id: id?,
            secret_access_key: Secret(key?),
            session_token: token.map(Secret),
            bandwidth: self.bandwidth,
        })))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn locate(url: &str, env: &[(&str, &str)]) -> Result<Location, Vec<String>> {
        let found = |name: &str| {
            let pair = env.iter().find(|(known, _)| *known == name);
            pair.map(|(_, value)| OsString::from(*value))
        };
        let mut source = Source {
            env: &found,
            problems: Vec::new(),
            bandwidth: None,
        };
        let location = source.location("RUNTIME_STORE", url);
        location.ok_or(source.problems)
    }

    const S3: [(&str, &str); 3] = [
        ("RUNTIME_S3_ENDPOINT", "https://account.example"),
        ("RUNTIME_S3_ACCESS_KEY_ID", "id"),
        ("RUNTIME_S3_SECRET_ACCESS_KEY", "very-secret"),
    ];

    #[test]
    fn a_store_on_s3_takes_its_address_style_from_the_endpoint() {
        for (endpoint, is_virtual, url) in [
            ("https://account.example", false, "https://account.example/"),
            ("https://{bucket}.s3.example", true, "https://s3.example/"),
            ("https://bucket.s3.example", true, "https://s3.example/"),
        ] {
            let mut env = S3.to_vec();
            env[0].1 = endpoint;
            let location = locate("s3://bucket/a/b/", &env).expect("complete");
            let Location::S3(bucket) = location else {
                panic!("{location} is not on S3");
            };
            assert_eq!(
                (bucket.prefix.as_str(), bucket.region.as_str()),
                ("a/b/", "auto")
            );
            assert_eq!(bucket.is_virtual_host, is_virtual);
            assert_eq!(bucket.endpoint.as_str(), url);
        }
    }

    #[test]
    fn an_endpoint_of_other_letters_is_refused_and_not_asserted() {
        for endpoint in ["https://stra\u{df}e.EXAMPLE", "https://\u{fffd}A"] {
            let mut env = S3.to_vec();
            env[0].1 = endpoint;
            let problems = locate("s3://bucket", &env).expect_err("it is no host");
            assert!(problems[0].contains("is not an address"), "{problems:?}");
        }
    }

    #[test]
    fn aws_names_serve_people_but_not_a_runtime() {
        let env = [
            ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "key"),
        ];
        assert!(locate("s3://bucket", &env).is_ok());
        let boot = [
            &env[..],
            &[("RUNTIME_BOOT_ID", "0123456789abcdef0123456789abcdef")],
        ]
        .concat();
        assert_eq!(
            locate("s3://bucket", &boot)
                .expect_err("the runtime names its own")
                .len(),
            3
        );
    }
}
