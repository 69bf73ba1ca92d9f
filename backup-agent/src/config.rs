//! Settings: flags over environment over defaults, every bad one reported at once, secrets never printed.

use std::{ffi::OsString, fmt, io::Read, path::PathBuf, time::Duration};

use nix::unistd::{Uid, User};
use url::Url;

use crate::{
    cli::{Flags, Verb},
    error::Error,
    log,
    tree::{exclude::Excludes, identity::Identity},
};

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
    /// The bucket is part of the host name instead of the path.
    pub is_virtual_host: bool,
    pub region: String,
    pub access_key_id: String,
    pub secret_access_key: Secret,
    pub session_token: Option<Secret>,
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

/// Everything the agent was told.
#[derive(Debug)]
pub struct Config {
    pub location: Location,
    pub instance: String,
    pub root: PathBuf,
    pub state: PathBuf,
    /// Whose rights file work is done with; `None`: the caller's.
    pub identity: Option<Identity>,
    pub excludes: Excludes,
    /// The operator answers for a store without conditional writes.
    pub is_unfenced_allowed: bool,
    /// Set when a runtime runs the agent: the name in which it owns the instance.
    pub boot_id: Option<String>,
    backup_timeout: Duration,
    restore_timeout: Duration,
    timeout: Option<Duration>,
}

impl Config {
    /// Reads the settings; `env` is `std::env::var_os` outside of tests.
    pub fn load(flags: &Flags, env: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let mut source = Source {
            env: &env,
            problems: Vec::new(),
        };
        let level = match source.text("RUNTIME_LOG") {
            None => log::Level::Info,
            Some(name) => log::Level::parse(&name).unwrap_or_else(|| {
                source.reject("RUNTIME_LOG", "must be one of error, warn, info, debug");
                log::Level::Info
            }),
        };
        log::set_limit(if flags.quiet {
            log::Level::Error
        } else {
            level
        });

        let state = source.directory(
            "RUNTIME_STATE",
            flags.state.as_ref(),
            "/var/lib/openclaw-runtime",
        );
        let root = source.directory("RUNTIME_ROOT", flags.root.as_ref(), "/data");
        let instance = source.instance(flags.instance.as_ref());
        let store = flags
            .store
            .clone()
            .or_else(|| source.text("RUNTIME_STORE"))
            .unwrap_or_else(|| format!("file://{}/store", state.display()));
        let location = source.location(&store);
        let config = Self {
            location: location.unwrap_or_else(|| Location::Directory(PathBuf::new())),
            instance,
            root,
            state,
            identity: source.identity(),
            excludes: source.excludes(),
            is_unfenced_allowed: match source.text("RUNTIME_STORE_UNFENCED").as_deref() {
                None => false,
                Some("allow") => true,
                Some(_) => {
                    source.reject("RUNTIME_STORE_UNFENCED", "must be unset or allow");
                    false
                }
            },
            boot_id: source.boot_id(),
            backup_timeout: source.duration("RUNTIME_BACKUP_TIMEOUT", None, 120),
            restore_timeout: source.duration("RUNTIME_RESTORE_TIMEOUT", None, 600),
            timeout: flags
                .timeout
                .as_ref()
                .map(|text| source.duration("--timeout", Some(text), 0)),
        };
        if source.problems.is_empty() {
            Ok(config)
        } else {
            Err(Error::Settings(source.problems))
        }
    }

    /// The hard bound of a verb.
    pub fn bound(&self, verb: &Verb) -> Duration {
        self.timeout.unwrap_or(match verb {
            Verb::Backup { .. } => self.backup_timeout,
            Verb::Restore { .. } | Verb::List => self.restore_timeout,
        })
    }

    /// The store and the instance on it, as people write it.
    pub fn place(&self) -> String {
        format!(
            "{}/{}",
            self.location.to_string().trim_end_matches('/'),
            self.instance
        )
    }
}

/// Parses `500ms`, `30s`, `5m`, `2h`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let count: u64 = text[..digits].parse().ok()?;
    let millis = match &text[digits..] {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    count.checked_mul(millis).map(Duration::from_millis)
}

/// Longest content of a `*_FILE` secret: session tokens are the longest, at about 2 KiB.
const SECRET_LIMIT: u64 = 16 * 1024;

struct Source<'a> {
    env: &'a dyn Fn(&str) -> Option<OsString>,
    problems: Vec<String>,
}

impl Source<'_> {
    fn reject(&mut self, name: &str, reason: impl fmt::Display) {
        self.problems.push(format!("cannot use {name}: {reason}"));
    }

    /// The variable's text; set to nothing is as good as unset.
    fn text(&mut self, name: &str) -> Option<String> {
        let Ok(text) = (self.env)(name)?.into_string() else {
            self.reject(name, "it is not valid UTF-8");
            return None;
        };
        Some(text).filter(|text| !text.is_empty())
    }

    fn duration(&mut self, name: &str, text: Option<&str>, default_secs: u64) -> Duration {
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

    fn directory(&mut self, name: &str, flag: Option<&String>, default: &str) -> PathBuf {
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

    fn instance(&mut self, flag: Option<&String>) -> String {
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

    fn boot_id(&mut self) -> Option<String> {
        let id = self.text("RUNTIME_BOOT_ID")?;
        if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            self.reject("RUNTIME_BOOT_ID", "must be 32 hexadecimal digits");
        }
        Some(id)
    }

    fn identity(&mut self) -> Option<Identity> {
        let wanted = self.text("RUNTIME_GATEWAY_USER");
        if !Uid::effective().is_root() {
            return None;
        }
        let name = wanted.as_deref().unwrap_or("openclaw");
        match User::from_name(name) {
            Ok(Some(user)) if user.uid.is_root() => None,
            Ok(Some(user)) => Some(Identity {
                uid: user.uid,
                gid: user.gid,
            }),
            Ok(None) if wanted.is_none() => None,
            Ok(None) => {
                self.reject(
                    "RUNTIME_GATEWAY_USER",
                    format_args!("there is no user {name:?}"),
                );
                None
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

    fn excludes(&mut self) -> Excludes {
        let extra = self.text("RUNTIME_EXCLUDE").unwrap_or_default();
        Excludes::new(&extra).unwrap_or_else(|problem| {
            self.reject("RUNTIME_EXCLUDE", problem);
            Excludes::default()
        })
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
            // A runtime passes its own settings only; the AWS names are for people.
            (None, None) if (self.env)("RUNTIME_BOOT_ID").is_none() => self.text(&fallback),
            (None, None) => None,
        }
    }

    fn location(&mut self, store: &str) -> Option<Location> {
        if let Some(path) = store.strip_prefix("file://") {
            if path.starts_with('/') && path.len() > 1 {
                return Some(Location::Directory(PathBuf::from(path)));
            }
        } else if let Some(rest) = store.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if !bucket.is_empty() {
                return self.s3(bucket, prefix.trim_matches('/'));
            }
        }
        self.reject(
            "RUNTIME_STORE",
            format_args!("{store:?} is neither s3://bucket/prefix nor file:///dir"),
        );
        None
    }

    fn s3(&mut self, bucket: &str, prefix: &str) -> Option<Location> {
        let region = self
            .secret("S3_REGION")
            .unwrap_or_else(|| "auto".to_owned());
        let endpoint = self.secret("S3_ENDPOINT").or_else(|| {
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
        })))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn load(args: &[&str], env: &[(&str, &str)]) -> Result<Config, Vec<String>> {
        let cli = Cli::try_parse_from([&["backup-agent", "list"], args].concat())
            .expect("the test's arguments are right");
        let found = |name: &str| {
            let pair = env.iter().find(|(known, _)| *known == name);
            pair.map(|(_, value)| OsString::from(*value))
        };
        Config::load(&cli.flags, found).map_err(|error| match error {
            Error::Settings(problems) => problems,
            other => panic!("settings fail as settings, not with {other}"),
        })
    }

    const S3: [(&str, &str); 4] = [
        ("RUNTIME_STORE", "s3://bucket/a/b/"),
        ("RUNTIME_S3_ENDPOINT", "https://account.example"),
        ("RUNTIME_S3_ACCESS_KEY_ID", "id"),
        ("RUNTIME_S3_SECRET_ACCESS_KEY", "very-secret"),
    ];

    #[test]
    fn defaults_are_those_of_the_table() {
        let config = load(&[], &[]).expect("no setting is needed");
        assert_eq!(
            config.place(),
            "file:///var/lib/openclaw-runtime/store/local"
        );
        assert_eq!(config.root, PathBuf::from("/data"));
        assert_eq!(
            config.bound(&Verb::Backup { fork: false }),
            Duration::from_mins(2)
        );
        assert_eq!(config.bound(&Verb::List), Duration::from_mins(10));
    }

    #[test]
    fn a_flag_wins_over_its_variable() {
        let config = load(
            &["--root", "/flag", "--timeout", "3s"],
            &[("RUNTIME_ROOT", "/env")],
        )
        .expect("both are good");
        assert_eq!(config.root, PathBuf::from("/flag"));
        assert_eq!(config.bound(&Verb::List), Duration::from_secs(3));
    }

    #[test]
    fn every_bad_setting_is_reported_at_once() {
        let problems = load(
            &[],
            &[
                ("RUNTIME_ROOT", "data"),
                ("RUNTIME_INSTANCE_ID", "UPPER"),
                ("RUNTIME_STORE", "ftp://x"),
                ("RUNTIME_BACKUP_TIMEOUT", "5"),
                ("RUNTIME_STORE_UNFENCED", "yes"),
                ("RUNTIME_EXCLUDE", "[a"),
                ("RUNTIME_LOG", "loud"),
                ("RUNTIME_BOOT_ID", "x"),
            ],
        )
        .expect_err("all of them are bad");
        assert_eq!(problems.len(), 8, "{problems:#?}");
    }

    #[test]
    fn a_store_on_s3_takes_its_address_style_from_the_endpoint() {
        for (endpoint, is_virtual, url) in [
            ("https://account.example", false, "https://account.example/"),
            ("https://{bucket}.s3.example", true, "https://s3.example/"),
            ("https://bucket.s3.example", true, "https://s3.example/"),
        ] {
            let mut env = S3.to_vec();
            env[1].1 = endpoint;
            let location = load(&[], &env).expect("complete").location;
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
    fn aws_names_serve_people_but_not_a_runtime() {
        let env = [
            ("RUNTIME_STORE", "s3://bucket"),
            ("AWS_ENDPOINT", "http://127.0.0.1:1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "key"),
        ];
        assert!(load(&[], &env).is_ok());
        let boot = [
            &env[..],
            &[("RUNTIME_BOOT_ID", "0123456789abcdef0123456789abcdef")],
        ]
        .concat();
        assert_eq!(
            load(&[], &boot)
                .expect_err("the runtime names its own")
                .len(),
            3
        );
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let config = load(&[], &S3).expect("complete");
        assert!(!format!("{config:?}").contains("very-secret"));
    }

    #[test]
    fn durations_have_a_unit_and_fit() {
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("2h"), Some(Duration::from_hours(2)));
        for bad in [
            "",
            "5",
            "s",
            "5 m",
            "-5m",
            "5d",
            "1.5s",
            "99999999999999999999s",
        ] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
