//! Where a store is and with what keys: its address, and the settings of S3 in the runtime's names or, by hand, in those that
//! the services' own tools use. Nothing is requested; whether the keys open anything is for the store to find out.

use std::{fmt, io::Read, num::NonZeroU64, path::PathBuf};

use url::{Host, Url};

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

const ENDPOINT: &str = "RUNTIME_S3_ENDPOINT";
const REGION: &str = "RUNTIME_S3_REGION";
const AUTO: &str = "auto";
const KEY_ID: &str = "RUNTIME_S3_ACCESS_KEY_ID";
const KEY: &str = "RUNTIME_S3_SECRET_ACCESS_KEY";
const TOKEN: &str = "RUNTIME_S3_SESSION_TOKEN";

/// What of a credential is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Whole,
    Redacted,
}

/// The settings of S3, whichever store is in use.
#[derive(Default)]
struct Credentials {
    endpoint: Option<String>,
    region: Option<String>,
    key_id: Option<String>,
    key: Option<String>,
    token: Option<String>,
}

impl Source<'_> {
    /// An AWS name: for people only, a runtime passes its own settings.
    fn by_hand(&mut self, names: &[&str]) -> Option<String> {
        if (self.env)("RUNTIME_BOOT_ID").is_some() {
            return None;
        }
        names.iter().find_map(|name| self.printable_word(name))
    }

    fn printable_word(&mut self, name: &str) -> Option<String> {
        let text = self.text(name)?;
        self.word(name, text)
    }

    /// Printable ASCII without spaces, or `None`: most often the rest of something that was copied with it. Never shown.
    fn word(&mut self, name: &str, text: String) -> Option<String> {
        if text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Some(text);
        }
        self.reject(name, "it is not printable ASCII without spaces");
        None
    }

    /// From its variable, from the file that its `*_FILE` names, or, by hand, from its AWS names.
    fn credential(&mut self, name: &str, shown: Shown, by_hand: &[&str]) -> Option<String> {
        let default = if name == REGION { AUTO } else { "" };
        let file_name = format!("{name}_FILE");
        let (value, file) = (self.text(name), self.text(&file_name));
        let value = match (value, &file) {
            (Some(_), Some(_)) => {
                self.reject(
                    name,
                    format_args!("{file_name} is set too; set one of them"),
                );
                None
            }
            (Some(value), None) => self.word(name, value),
            (None, Some(path)) => match read_secret(path) {
                Ok(text) => self.word(&file_name, text),
                Err(reason) => {
                    self.reject(&file_name, reason);
                    None
                }
            },
            (None, None) => self.by_hand(by_hand),
        };
        let text = value.as_deref().unwrap_or(default);
        let is_secret = shown == Shown::Redacted && !text.is_empty();
        self.note(name, if is_secret { "[redacted]" } else { text });
        if let Some(path) = file {
            self.note(&file_name, path);
        }
        value
    }

    /// Every setting of S3. They are looked at for any store, so that a mistake does not wait for the day it is needed; the
    /// names of other tools only where `is_used`.
    fn credentials(&mut self, is_used: bool) -> Credentials {
        let aws = |names: &'static [&'static str]| if is_used { names } else { &[] };
        // The second one is the name that the services' own tools use.
        let endpoint = aws(&["AWS_ENDPOINT", "AWS_ENDPOINT_URL"]);
        let endpoint = self.credential(ENDPOINT, Shown::Whole, endpoint);
        let region = self.credential(REGION, Shown::Whole, aws(&["AWS_REGION"]));
        let is_region = |region: &String| {
            let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            region.len() <= 64 && region.bytes().all(is_known)
        };
        if !region.as_ref().is_none_or(is_region) {
            self.reject(
                REGION,
                "it is not a region's name such as auto or us-east-1",
            );
        }
        let key_id = self.credential(KEY_ID, Shown::Redacted, aws(&["AWS_ACCESS_KEY_ID"]));
        let key = self.credential(KEY, Shown::Redacted, aws(&["AWS_SECRET_ACCESS_KEY"]));
        let token = self.credential(TOKEN, Shown::Redacted, aws(&["AWS_SESSION_TOKEN"]));
        Credentials {
            endpoint,
            region,
            key_id,
            key,
            token,
        }
    }

    pub fn location(&mut self, name: &str, url: &str) -> Option<Location> {
        if let Some(path) = url.strip_prefix("file://") {
            self.authorities(false);
            let credentials = self.credentials(false);
            if let Some(text) = credentials.endpoint {
                self.endpoint(&text, "");
            }
            let path = self.plain(name, url, path)?;
            return Some(Location::Directory(path));
        }
        let credentials = self.credentials(true);
        let Some(rest) = url.strip_prefix("s3://") else {
            let reason = "is neither s3://bucket/prefix nor file:///directory";
            self.reject(name, format_args!("{} {reason}", quoted(url)));
            return None;
        };
        match bucket_and_prefix(rest) {
            Ok((bucket, prefix)) => self.s3(bucket, prefix, credentials),
            Err(reason) => {
                self.reject(name, format_args!("{} {reason}", quoted(url)));
                // What else is wrong is said, too.
                let _ = self.s3("", "", credentials);
                None
            }
        }
    }

    fn endpoint(&mut self, text: &str, bucket: &str) -> Option<(Url, bool)> {
        let parsed = endpoint(text, bucket);
        parsed.map_err(|reason| self.reject(ENDPOINT, reason)).ok()
    }

    fn s3(&mut self, bucket: &str, prefix: &str, credentials: Credentials) -> Option<Location> {
        let Credentials { key_id, key, .. } = credentials;
        for (name, value) in [(KEY_ID, &key_id), (KEY, &key)] {
            // One that is there and cannot be used has been named already.
            if value.is_none() && !self.problems.iter().any(|known| known.contains(name)) {
                self.reject(
                    name,
                    format_args!("it is not set (nor {name}_FILE), and the store is on S3"),
                );
            }
        }
        let region = credentials.region.unwrap_or_else(|| AUTO.to_owned());
        let (endpoint, is_virtual_host) = match credentials.endpoint {
            Some(text) => self.endpoint(&text, bucket)?,
            None if self.problems.iter().any(|known| known.contains(ENDPOINT)) => return None,
            None if region != AUTO => self.endpoint(&of_aws(&region, bucket), bucket)?,
            None => {
                let reason =
                    "it is not set, and RUNTIME_S3_REGION, which is auto, names no region of AWS";
                self.reject(ENDPOINT, reason);
                return None;
            }
        };
        let network = self.network(&endpoint);
        Some(Location::S3(Box::new(Bucket {
            name: bucket.to_owned(),
            prefix: if prefix.is_empty() {
                String::new()
            } else {
                format!("{prefix}/")
            },
            network,
            endpoint,
            is_virtual_host,
            region,
            access_key_id: key_id?,
            secret_access_key: Secret(key?),
            session_token: credentials.token.map(Secret),
            bandwidth: self.bandwidth,
        })))
    }
}

/// A text for a sentence, unless keys may have been put into it.
fn quoted(text: &str) -> String {
    if text.contains(['@', '?', '&', '%']) {
        "it".to_owned()
    } else {
        format!("{text:?}")
    }
}

/// The content of a file, one line break at its end aside.
fn read_secret(path: &str) -> Result<String, String> {
    let status = std::fs::metadata(path).map_err(|error| format!("cannot read {path}: {error}"))?;
    // A pipe would be empty the next time, or hold up this one.
    if !status.is_file() {
        return Err(format!("{path} is not a file"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(SECRET_LIMIT + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("cannot read {path}: {error}"))?;
    if bytes.len() as u64 > SECRET_LIMIT {
        return Err(format!("{path} has more than {} KiB", SECRET_LIMIT / 1024));
    }
    let text = String::from_utf8(bytes).map_err(|_| format!("{path} has no text in it"))?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.is_empty() {
        return Err(format!("{path} is empty"));
    }
    Ok(line.to_owned())
}

/// Of `bucket/prefix`, without slashes at the ends, or what is wrong with it. Any service's rules for buckets are narrower.
fn bucket_and_prefix(rest: &str) -> Result<(&str, &str), &'static str> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let prefix = prefix.trim_matches('/');
    let is_end = |byte: Option<&u8>| {
        byte.is_some_and(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    let bytes = bucket.as_bytes();
    let is_bucket = (3..=63).contains(&bytes.len())
        && is_end(bytes.first())
        && is_end(bytes.last())
        && !bucket.contains("..")
        && bytes
            .iter()
            .all(|byte| is_end(Some(byte)) || b"-_.".contains(byte));
    if !is_bucket {
        return Err(
            "has no bucket's name, which is 3 to 63 of lower-case letters, digits, dashes and dots, \
             as in s3://bucket/prefix",
        );
    }
    if prefix.contains(char::is_control) || prefix.contains(['?', '#', '\\', '%']) {
        return Err("has a character in its prefix that addresses have for something else");
    }
    let is_odd = |part: &str| part.is_empty() || part == "." || part == ".." || part.trim() != part;
    if !prefix.is_empty() && prefix.split('/').any(is_odd) {
        return Err("has a part of its prefix that is empty, \".\" or \"..\", or ends in a space");
    }
    if prefix.len() > 512 {
        return Err("has a prefix of more than 512 bytes");
    }
    Ok((bucket, prefix))
}

/// Where AWS has a bucket. A name with dots is not covered by the certificate of its own host.
fn of_aws(region: &str, bucket: &str) -> String {
    let host = if bucket.contains('.') {
        ""
    } else {
        "{bucket}."
    };
    let china = if region.starts_with("cn-") { ".cn" } else { "" };
    format!("https://{host}s3.{region}.amazonaws.com{china}")
}

/// The address without the bucket, and whether that goes into the host name. The reason never has the text: it may hold keys.
fn endpoint(text: &str, bucket: &str) -> Result<(Url, bool), String> {
    const BUCKET: &str = "{bucket}";
    let shape = || "it is not an address such as https://host or https://host:9000".to_owned();

    let (scheme, rest) = text.split_once("://").ok_or_else(shape)?;
    if !matches!(scheme, "http" | "https") || text.contains('\\') {
        return Err(shape());
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, tail) = rest.split_at(end);
    if rest.contains('@') {
        return Err(
            "it must have no user name and no password: keys have their own settings".into(),
        );
    }
    if tail.contains(['?', '#']) {
        return Err("it must have no query and no fragment".to_owned());
    }
    let host = authority.strip_prefix("{bucket}.");
    let (plain, is_virtual_host) = host.map_or((authority, false), |host| (host, true));
    if plain.contains(['{', '}']) {
        return Err(format!(
            "{BUCKET} must be the first part of the host, as in https://{BUCKET}.s3.example"
        ));
    }
    let (name, port) = match plain.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, Some(port)),
        _ => (plain, None),
    };
    let is_port = |port: &str| {
        port.bytes().all(|byte| byte.is_ascii_digit())
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    };
    if !port.is_none_or(is_port) {
        return Err("its port is not a number from 1 to 65535".to_owned());
    }
    let is_label = |label: &str| {
        let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        (1..=63).contains(&label.len()) && label.bytes().all(is_known)
    };
    let labels = name.strip_suffix('.').unwrap_or(name);
    let is_name = name.starts_with('[') || labels.split('.').all(is_label);
    // With the bucket, which no number and no longest name can take.
    let whole = if is_virtual_host && !bucket.is_empty() {
        format!("{scheme}://{bucket}.{plain}")
    } else {
        format!("{scheme}://{plain}")
    };
    let is_whole = Url::parse(&whole).is_ok_and(|url| {
        let is_domain = matches!(url.host(), Some(Host::Domain(_)));
        is_domain || (!is_virtual_host && url.host().is_some())
    });
    let url = Url::parse(&format!("{scheme}://{plain}")).ok();
    let url = url.filter(|_| is_name && is_whole).ok_or_else(shape)?;
    let path = tail.strip_prefix('/').unwrap_or(tail);
    let path = path.strip_suffix('/').unwrap_or(path);
    let parts: Vec<&str> = path.split('/').filter(|_| !path.is_empty()).collect();
    if parts.contains(&bucket) {
        return Err(format!(
            "it has the bucket behind the host; write {scheme}://{authority}, and the bucket into RUNTIME_STORE"
        ));
    }
    // Some services have their S3 below a path.
    let is_odd = tail.contains("//") || !parts.iter().all(|part| is_label(part));
    if is_odd || (is_virtual_host && !parts.is_empty()) {
        return Err(format!(
            "it has a path that no service has; write {scheme}://{authority}, or the path that the service names"
        ));
    }
    let url = if parts.is_empty() {
        url
    } else {
        url.join(&format!("{path}/")).map_err(|_| shape())?
    };
    // Signed as if the bucket came in the path, objects would land beside those that are there.
    let own_host = name
        .strip_prefix(bucket)
        .and_then(|rest| rest.strip_prefix('.'));
    let is_own = own_host.is_some_and(|rest| {
        rest.split('.')
            .any(|label| label.starts_with("s3") || label == "r2")
    });
    if !bucket.is_empty() && !is_virtual_host && is_own {
        let rest = &plain[bucket.len()..];
        return Err(format!(
            "it has the bucket in the host; write {scheme}://{BUCKET}{rest}"
        ));
    }
    Ok((url, is_virtual_host))
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
            effective: Vec::new(),
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
            (
                "https://account.example/",
                false,
                "https://account.example/",
            ),
            ("https://{bucket}.s3.example", true, "https://s3.example/"),
            ("http://[::1]:9000", false, "http://[::1]:9000/"),
            // A service may be called what its bucket is.
            (
                "https://bucket.example:444",
                false,
                "https://bucket.example:444/",
            ),
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
    fn a_region_of_aws_names_its_endpoint() {
        for (bucket, region, is_virtual, url) in [
            (
                "bucket",
                "eu-west-1",
                true,
                "https://s3.eu-west-1.amazonaws.com/",
            ),
            (
                "my.bucket",
                "eu-west-1",
                false,
                "https://s3.eu-west-1.amazonaws.com/",
            ),
            (
                "bucket",
                "cn-north-1",
                true,
                "https://s3.cn-north-1.amazonaws.com.cn/",
            ),
        ] {
            let env = [("RUNTIME_S3_REGION", region), S3[1], S3[2]];
            let location = locate(&format!("s3://{bucket}"), &env).expect("complete");
            let Location::S3(bucket) = location else {
                panic!("{location} is not on S3");
            };
            assert_eq!(bucket.is_virtual_host, is_virtual);
            assert_eq!(bucket.endpoint.as_str(), url);
        }
    }

    #[test]
    fn an_endpoint_that_leads_elsewhere_is_refused_and_says_what_to_write() {
        for (endpoint, part) in [
            (
                "https://account.example/bucket",
                "write https://account.example, and the bucket",
            ),
            (
                "https://account.example/bucket/p",
                "the bucket behind the host",
            ),
            (
                "https://{bucket}.s3.example/bucket",
                "write https://{bucket}.s3.example,",
            ),
            (
                "https://account.example/storage/../s3",
                "a path that no service",
            ),
            ("https://account.example//", "a path that no service"),
            (
                "https://bucket.s3.example",
                "write https://{bucket}.s3.example",
            ),
            (
                "https://bucket.0a.r2.cloudflarestorage.com:443",
                "write https://{bucket}.0a.r2",
            ),
            ("https://s3.{bucket}.example", "must be the first part"),
            ("https://{bucket}", "must be the first part"),
            ("https://{bucket}.127.0.0.1", "is not an address"),
            ("https://{bucket}.[::1]", "is not an address"),
            ("https://me:very-secret@host", "no user name"),
            ("https://host/very-secret@x", "no user name"),
            ("https://host?very-secret", "no query"),
            ("https://host/#very-secret", "no query and no fragment"),
            ("https://host:0", "its port"),
            ("https://host:65536", "its port"),
            ("https://host:+1", "its port"),
            ("https://host:", "its port"),
            ("ftp://host", "is not an address"),
            ("https:host", "is not an address"),
            ("https://", "is not an address"),
            ("https:///host", "is not an address"),
            ("https:\\\\host", "is not an address"),
            ("https://a..b", "is not an address"),
            ("https://%61", "is not an address"),
            ("https://ho st", "printable ASCII"),
            ("https://host\n", "line break"),
            ("https://stra\u{df}e.EXAMPLE", "printable ASCII"),
            ("https://\u{fffd}A", "printable ASCII"),
            ("https://999.999.999.999", "is not an address"),
        ] {
            let mut env = S3.to_vec();
            env[0].1 = endpoint;
            let problems = locate("s3://bucket/p", &env).expect_err(endpoint);
            assert_eq!(problems.len(), 1, "{endpoint}: {problems:?}");
            assert!(problems[0].contains(part), "{endpoint}: {problems:?}");
            assert!(!problems[0].contains("very-secret"), "{problems:?}");
        }
    }

    #[test]
    fn buckets_and_prefixes_are_plain() {
        for url in [
            "s3://",
            "s3://ab",
            "s3://Bucket",
            "s3://-bucket",
            "s3://bucket-",
            "s3://buc..ket",
            "s3://buc ket",
            "s3://key:secret@bucket/x",
            "s3://bucket/../other",
            "s3://bucket/a/./b",
            "s3://bucket/a//b",
            "s3://bucket/a?b",
            "s3://bucket/a#b",
            "s3://bucket/a%20b",
            "s3://bucket/a\\b",
            "s3://bucket/ a",
            "s3://bucket/a\tb",
            "bucket",
            "ftp://bucket",
            "file://relative",
            "file:///",
            "file:///a/../b",
        ] {
            let problems = locate(url, &S3).expect_err(url);
            assert_eq!(problems.len(), 1, "{url}: {problems:?}");
            assert!(!problems[0].contains("secret"), "{problems:?}");
        }
        for url in [
            "s3://my.bucket_1",
            "s3://bucket//a b/\u{fc}/",
            "file:///a//b/",
        ] {
            assert!(locate(url, &S3).is_ok(), "{url}");
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
