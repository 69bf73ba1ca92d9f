//! Where settings come from: one method for each kind of value, each noting what is wrong and going on, so that every bad
//! setting is reported at once.

use std::{ffi::OsString, fmt, io::Read, num::NonZeroU64, path::PathBuf, time::Duration};

use nix::unistd::{Gid, Uid, User};
use url::Url;

use super::{Bucket, Location, Secret, parse_duration};
use crate::{
    cli::Backup,
    snapshot::retention::Policy,
    tree::{exclude::Excludes, freeze::Freezer, identity::Identity},
};

/// An identity to assume: root's own is none.
fn apart(identity: Identity) -> Option<Identity> {
    (!identity.uid.is_root()).then_some(identity)
}

/// A user by number, with an optional group as in `1000:1000`; it may have no name here.
fn by_number(text: &str) -> Option<Identity> {
    let (uid, gid) = text
        .split_once(':')
        .map_or((text, None), |(uid, gid)| (uid, Some(gid)));
    let uid = Uid::from_raw(uid.parse().ok()?);
    let gid = match gid {
        Some(gid) => Gid::from_raw(gid.parse().ok()?),
        None => match User::from_uid(uid) {
            Ok(Some(user)) => user.gid,
            _ => Gid::from_raw(uid.as_raw()),
        },
    };
    Some(Identity { uid, gid })
}

/// The longest stop of the gateway unless told otherwise: nobody notices it in a conversation.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// Longest content of a `*_FILE` secret: session tokens are the longest, at about 2 KiB.
const SECRET_LIMIT: u64 = 16 * 1024;

/// The environment, and what was found wrong with it.
pub struct Source<'a> {
    pub env: &'a dyn Fn(&str) -> Option<OsString>,
    pub problems: Vec<String>,
    /// Of every store that is named.
    pub bandwidth: Option<NonZeroU64>,
}

impl Source<'_> {
    pub fn reject(&mut self, name: &str, reason: impl fmt::Display) {
        let problem = format!("cannot use {name}: {reason}");
        // The store and what is imported may share what they lack.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// The variable's text; set to nothing is as good as unset.
    pub fn text(&mut self, name: &str) -> Option<String> {
        let Ok(text) = (self.env)(name)?.into_string() else {
            self.reject(name, "it is not valid UTF-8");
            return None;
        };
        Some(text).filter(|text| !text.is_empty())
    }

    pub fn duration(&mut self, name: &str, text: Option<&str>, default_secs: u64) -> Duration {
        let text = text.map(str::to_owned).or_else(|| self.text(name));
        let Some(text) = text else {
            return Duration::from_secs(default_secs);
        };
        match parse_duration(&text) {
            Some(duration) if !duration.is_zero() => duration,
            _ => {
                self.reject(
                    name,
                    format_args!("{text:?} is not a duration such as 500ms, 30s, 5m or 2h"),
                );
                Duration::ZERO
            }
        }
    }

    pub fn directory(&mut self, name: &str, flag: Option<&String>, default: &str) -> PathBuf {
        let path = flag
            .cloned()
            .or_else(|| self.text(name))
            .unwrap_or_else(|| default.to_owned());
        let path = PathBuf::from(path);
        if !path.is_absolute() || path.parent().is_none() {
            self.reject(
                name,
                format_args!("{} must be an absolute path below /", path.display()),
            );
        }
        path
    }

    pub fn instance(&mut self, flag: Option<&String>) -> String {
        let id = flag
            .cloned()
            .or_else(|| self.text("RUNTIME_INSTANCE_ID"))
            .unwrap_or_else(|| "local".to_owned());
        let is_known =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if id.is_empty() || id.len() > 63 || !id.bytes().all(is_known) {
            self.reject(
                "RUNTIME_INSTANCE_ID",
                format_args!("{id:?} must be 1 to 63 of a-z, 0-9 and -"),
            );
        }
        id
    }

    pub fn boot_id(&mut self) -> Option<String> {
        let id = self.text("RUNTIME_BOOT_ID")?;
        if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            self.reject("RUNTIME_BOOT_ID", "must be 32 hexadecimal digits");
        }
        Some(id)
    }

    pub fn identity(&mut self) -> Option<Identity> {
        let wanted = self.text("RUNTIME_GATEWAY_USER");
        if !Uid::effective().is_root() {
            return None;
        }
        let name = wanted.as_deref().unwrap_or("openclaw");
        match User::from_name(name) {
            Ok(Some(user)) => apart(Identity {
                uid: user.uid,
                gid: user.gid,
            }),
            Ok(None) if wanted.is_none() => None,
            Ok(None) => {
                let identity = by_number(name);
                if identity.is_none() {
                    self.reject(
                        "RUNTIME_GATEWAY_USER",
                        format_args!("there is no user {name:?}"),
                    );
                }
                identity.and_then(apart)
            }
            Err(error) => {
                self.reject(
                    "RUNTIME_GATEWAY_USER",
                    format_args!("looking up {name:?} failed: {error}"),
                );
                None
            }
        }
    }

    /// Whom to stop for a snapshot: the gateway's own user when a runtime runs us, by hand whoever is named.
    pub fn freezer(
        &mut self,
        options: &Backup,
        is_runtime: bool,
        identity: Option<Identity>,
    ) -> Option<Freezer> {
        let limit = self.pause(options.max_pause.as_deref());
        let user = match &options.freeze_user {
            None => identity.filter(|_| is_runtime).map(|identity| identity.uid),
            Some(name) => {
                let known = User::from_name(name).ok().flatten().map(|user| user.uid);
                let uid = known.or_else(|| by_number(name).map(|identity| identity.uid));
                let other = uid.filter(|uid| *uid != Uid::current() && *uid != Uid::effective());
                if other.is_none() {
                    self.reject(
                        "--freeze-user",
                        format_args!("{name:?} must be a user here, and not the one who runs this"),
                    );
                }
                other
            }
        };
        let limit = limit.filter(|limit| !limit.is_zero())?;
        Some(Freezer { user: user?, limit })
    }

    fn pause(&mut self, flag: Option<&str>) -> Option<Duration> {
        const NAME: &str = "RUNTIME_MAX_PAUSE";
        let text = flag.map(str::to_owned).or_else(|| self.text(NAME));
        let pause = match text.as_deref() {
            None => Some(MAX_PAUSE),
            Some("0") => Some(Duration::ZERO),
            Some(text) => parse_duration(text),
        };
        if pause.is_none() {
            let text = text.unwrap_or_default();
            self.reject(
                NAME,
                format_args!("{text:?} is neither a duration such as 250ms nor 0"),
            );
        }
        pause
    }

    pub fn excludes(&mut self) -> Excludes {
        let extra = self.text("RUNTIME_EXCLUDE").unwrap_or_default();
        Excludes::new(&extra).unwrap_or_else(|problem| {
            self.reject("RUNTIME_EXCLUDE", problem);
            Excludes::default()
        })
    }

    pub fn retention(&mut self) -> Policy {
        let text = self.text("RUNTIME_RETENTION");
        let text = text.as_deref().unwrap_or(Policy::DEFAULT);
        Policy::parse(text).unwrap_or_else(|| {
            let reason = format_args!("{text:?} is not a list such as {}", Policy::DEFAULT);
            self.reject("RUNTIME_RETENTION", reason);
            Policy::default()
        })
    }

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
        let parsed = Url::parse(&plain)
            .ok()
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
    use super::*;

    #[test]
    fn a_user_may_be_a_number_without_a_name() {
        let identity = |uid, gid| {
            Some(Identity {
                uid: Uid::from_raw(uid),
                gid: Gid::from_raw(gid),
            })
        };
        assert_eq!(by_number("54321"), identity(54321, 54321));
        assert_eq!(by_number("54321:7"), identity(54321, 7));
        assert_eq!(apart(by_number("0:0").expect("two numbers")), None);
        assert_eq!(by_number("nobody-here"), None);
        assert_eq!(by_number("1:x"), None);
    }
}
