//! Settings: flags over environment over defaults, every bad one reported at once, secrets never printed.

mod location;
mod network;
mod places;
mod source;

use std::{ffi::OsString, path::PathBuf, sync::mpsc, time::Duration};

use nix::unistd::Uid;

pub use self::{
    location::{Bucket, Location},
    places::{is_open, is_trusted},
};
use self::{
    places::{Named, Places, Real},
    source::Source,
};
use crate::{
    archive::frames::Effort,
    cli::{Cli, Verb},
    error::Error,
    log,
    snapshot::retention::Policy,
    tree::{exclude::Excludes, freeze::Freezer, identity::Identity},
};

/// Of the folders, where no bound is known.
const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// Longer bounds are mistakes, and would overflow clocks.
const LONGEST_DURATION: Duration = Duration::from_hours(365 * 24);

/// Everything the agent was told.
#[derive(Debug, Clone)]
pub struct Config {
    pub location: Location,
    /// Where `import` takes its files from.
    pub source: Option<Location>,
    pub instance: String,
    /// Without symbolic links, as is the state.
    pub root: PathBuf,
    pub state: PathBuf,
    /// Where a restore unpacks to instead.
    pub target: Option<PathBuf>,
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
    /// What this run is about.
    pub verb: &'static str,
    /// Name and value of every setting as used, secrets redacted.
    pub effective: Vec<(String, String)>,
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
            effective: Vec::new(),
            bandwidth: cli.flags.bandwidth,
        };
        let level = source.level();
        log::set_limit(if flags.quiet {
            log::Level::Error
        } else {
            level
        });

        let state = source.directory(
            ("--state", flags.state.as_ref()),
            "RUNTIME_STATE",
            "/var/lib/openclaw-runtime",
        );
        let root = source.directory(("--root", flags.root.as_ref()), "RUNTIME_ROOT", "/data");
        let instance = source.instance(flags);
        let default = state.as_ref().map(|state| state.path.display().to_string());
        let (store_name, store, is_store_given) =
            source.store(flags, &default.unwrap_or_else(|| "/state".to_owned()));
        let location = source.location(store_name, &store);
        let from = match &cli.verb {
            Verb::Import { from } => source.location("--from", from),
            _ => None,
        };
        source.note_authorities();
        let identity = source.identity();
        let boot_id = source.boot_id();
        let options = match &cli.verb {
            Verb::Backup(options) => Some(options),
            _ => None,
        };
        let pause = source.pause(options.and_then(|options| options.max_pause.as_ref()));
        let freezer =
            options.and_then(|options| source.freezer(options, pause, boot_id.is_some(), identity));
        let mut config = Self {
            location: location
                .clone()
                .unwrap_or_else(|| Location::Directory(PathBuf::new())),
            source: from.clone(),
            instance,
            root: PathBuf::new(),
            state: PathBuf::new(),
            target: None,
            identity,
            excludes: source.excludes(),
            effort: Effort {
                level: flags.level,
                jobs: flags.jobs.map_or_else(default_jobs, usize::from),
            },
            freezer,
            retention: source.retention(),
            is_unfenced_allowed: source.is_unfenced_allowed(),
            boot_id,
            verb: cli.verb.name(),
            effective: Vec::new(),
            backup_timeout: source.duration("RUNTIME_BACKUP_TIMEOUT", "2m"),
            restore_timeout: source.duration("RUNTIME_RESTORE_TIMEOUT", "10m"),
            timeout: flags
                .timeout
                .as_ref()
                .map(|text| source.bound("--timeout", text)),
        };
        let directory = |name, location: Option<Location>| match location {
            Some(Location::Directory(path)) => Some(Named { name, path }),
            _ => None,
        };
        let target = match &cli.verb {
            Verb::Restore(options) => options.target.as_ref(),
            _ => None,
        };
        let places = Places {
            root,
            is_root_replaced: cli.verb.replaces_root(),
            state,
            store: directory(store_name, location),
            instance: config.instance.clone(),
            is_store_default: !is_store_given,
            target: target.and_then(|target| source.target(target)),
            source: directory("--from", from),
            gateway: identity,
        };
        let bound = config.bound(&cli.verb);
        match look(places, bound)? {
            Ok(real) => {
                config.root = real.root;
                config.state = real.state;
                config.target = real.target;
            }
            Err(problems) => source.problems.extend(problems),
        }
        config.effective = source.effective;
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
            Verb::Check => LONGEST_LOOK,
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

/// Looks at the folders within the bound: a dead network file system answers nothing, not even to SIGKILL.
fn look(places: Places, bound: Duration) -> Result<Result<Real, Vec<String>>, Error> {
    let (sender, receiver) = mpsc::channel();
    // A bad bound has been named, and is none.
    let bound = if bound.is_zero() { LONGEST_LOOK } else { bound };
    let looking = std::thread::Builder::new().spawn(move || {
        // Nobody waits any more when the bound ran out.
        let _ = sender.send(places.check());
    });
    let looking = looking.map_err(Error::local("start", "a thread"))?;
    let found = receiver.recv_timeout(bound).map_err(|_| Error::Timeout {
        after: bound,
        left:
            "nothing was changed; a file system of the root, the state or the store does not answer"
                .to_owned(),
    })?;
    // The C library asks each thread to give up supplementary groups, too: there should be none that is about to end.
    let _ = looking.join();
    Ok(found)
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
    let duration = count.checked_mul(millis).map(Duration::from_millis);
    duration.filter(|duration| *duration <= LONGEST_DURATION)
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
            "9999999h",
        ] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }
}
