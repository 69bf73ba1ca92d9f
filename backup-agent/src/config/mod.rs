//! Settings: flags over environment over defaults, every bad one reported at once, secrets never printed.

mod location;
mod network;
mod source;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use nix::unistd::Uid;

pub use self::location::{Bucket, Location};
use self::source::Source;
use crate::{
    archive::frames::Effort,
    cli::{Cli, Verb},
    error::Error,
    log,
    snapshot::retention::Policy,
    tree::{exclude::Excludes, freeze::Freezer, identity::Identity},
};

/// Everything the agent was told.
#[derive(Debug, Clone)]
pub struct Config {
    pub location: Location,
    /// Where `import` takes its files from.
    pub source: Option<Location>,
    pub instance: String,
    pub root: PathBuf,
    pub state: PathBuf,
    /// Whose rights file work is done with; `None`: the caller's.
    pub identity: Option<Identity>,
    pub excludes: Excludes,
    pub effort: Effort,
    /// Whom to stop for a snapshot of one instant.
    pub freezer: Option<Freezer>,
    /// Which snapshots a prune keeps.
    pub retention: Policy,
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
    pub fn load(cli: &Cli, env: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let flags = &cli.flags;
        let mut source = Source {
            env: &env,
            problems: Vec::new(),
            bandwidth: cli.flags.bandwidth,
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
        let location = source.location("RUNTIME_STORE", &store);
        let from = match &cli.verb {
            Verb::Import { from } => source.location("--from", from),
            _ => None,
        };
        let identity = source.identity();
        let boot_id = source.boot_id();
        let freezer = match &cli.verb {
            Verb::Backup(options) => source.freezer(options, boot_id.is_some(), identity),
            _ => None,
        };
        let config = Self {
            location: location.unwrap_or_else(|| Location::Directory(PathBuf::new())),
            source: from,
            instance,
            root,
            state,
            identity,
            excludes: source.excludes(),
            effort: Effort {
                level: flags.level,
                jobs: flags.jobs.map_or_else(default_jobs, usize::from),
            },
            freezer,
            retention: source.retention(),
            is_unfenced_allowed: match source.text("RUNTIME_STORE_UNFENCED").as_deref() {
                None => false,
                Some("allow") => true,
                Some(_) => {
                    source.reject("RUNTIME_STORE_UNFENCED", "must be unset or allow");
                    false
                }
            },
            boot_id,
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
            Verb::Backup(_) | Verb::Prune { .. } => self.backup_timeout,
            Verb::Restore(_)
            | Verb::Verify { .. }
            | Verb::List
            | Verb::Import { .. }
            | Verb::Completions { .. } => self.restore_timeout,
        })
    }

    /// The user whose processes write to the tree.
    pub fn gateway_user(&self) -> Uid {
        let held = self.freezer.map(|freezer| freezer.user);
        let user = held.or(self.identity.map(|identity| identity.uid));
        user.unwrap_or_else(Uid::effective)
    }

    /// What tells this instance's place from every other one, however alike people write them.
    pub fn address(&self) -> String {
        let endpoint = match &self.location {
            Location::Directory(_) => "",
            Location::S3(bucket) => bucket.endpoint.as_str(),
        };
        format!("{endpoint} {}", self.place())
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

/// One for each processor, but no more than memory is promised for.
fn default_jobs() -> usize {
    const MOST: usize = 2;
    std::thread::available_parallelism().map_or(1, |count| count.get().min(MOST))
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
        Config::load(&cli, found).map_err(|error| match error {
            Error::Settings(problems) => problems,
            other => panic!("settings fail as settings, not with {other}"),
        })
    }

    #[test]
    fn defaults_are_those_of_the_table() {
        let config = load(&[], &[]).expect("no setting is needed");
        assert_eq!(
            config.place(),
            "file:///var/lib/openclaw-runtime/store/local"
        );
        assert_eq!(config.root, PathBuf::from("/data"));
        assert_eq!(
            config.bound(&Verb::Prune { dry_run: true }),
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
    fn secrets_do_not_show_in_debug_output() {
        let env = [
            ("RUNTIME_STORE", "s3://bucket/a/b/"),
            ("RUNTIME_S3_ENDPOINT", "https://account.example"),
            ("RUNTIME_S3_ACCESS_KEY_ID", "id"),
            ("RUNTIME_S3_SECRET_ACCESS_KEY", "very-secret"),
        ];
        let config = load(&[], &env).expect("complete");
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
