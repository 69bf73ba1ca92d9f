//! The command line: verbs and flags, nothing decided here.

use std::{num::NonZeroU64, path::PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};

const EXAMPLES: &str = "\
Examples:
  backup-agent list --store s3://bucket/prefix --instance alice
  backup-agent restore --dry-run
  backup-agent restore 20260102T030405006Z-89abcdef --target /tmp/look --path '*.sqlite*'
  backup-agent verify all --deep
  backup-agent prune --dry-run
Settings come from RUNTIME_* variables; flags override them.";

/// Keeps a directory tree as snapshots on an S3-compatible store or in a directory.
#[derive(Debug, Parser)]
#[command(name = "backup-agent", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub verb: Verb,
    #[command(flatten)]
    pub flags: Flags,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Take a snapshot of the root; uploads nothing when nothing changed
    Backup(Backup),
    /// Bring a snapshot back; a tree that already equals it is left alone
    Restore(Restore),
    /// Check that everything a snapshot names is there and what it was written as
    Verify {
        /// A snapshot's id, `latest`, or `all`
        #[arg(default_value = "latest")]
        snapshot: String,
        /// Unpack everything, too, and compare the hash of every file
        #[arg(long)]
        deep: bool,
    },
    /// Show the snapshots of this instance, newest first
    List,
    /// Remove the snapshots that the retention policy does not keep, and what only they needed
    Prune {
        /// Only say what would be removed, and why
        #[arg(long)]
        dry_run: bool,
    },
    /// Check all settings, and show those in force, without asking the store
    Check,
    /// Print a script that completes commands in a shell
    Completions {
        /// Such as bash, zsh or fish
        shell: Shell,
    },
    /// Make the first snapshot of an instance out of the folders that another set-up keeps
    Import {
        /// What holds the folders: <s3://bucket/prefix> or <file:///dir>
        #[arg(long, value_name = "URL")]
        from: String,
    },
}

impl Verb {
    /// Whether it writes to the root or beside it; `check` speaks for those that do.
    pub fn replaces_root(&self) -> bool {
        match self {
            Self::Restore(options) => options.target.is_none(),
            Self::Prune { .. } | Self::Import { .. } | Self::Check => true,
            Self::Backup(_) | Self::Verify { .. } | Self::List | Self::Completions { .. } => false,
        }
    }

    /// As it is written.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Backup(_) => "backup",
            Self::Restore(_) => "restore",
            Self::Verify { .. } => "verify",
            Self::List => "list",
            Self::Prune { .. } => "prune",
            Self::Check => "check",
            Self::Completions { .. } => "completions",
            Self::Import { .. } => "import",
        }
    }
}

/// A shell that completions can be had for.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shell {
    Bash,
    Fish,
    Zsh,
}

/// How to take a snapshot.
#[derive(Debug, Clone, Default, Args)]
pub struct Backup {
    /// Write the snapshot beside the history, as a fork: the head stays where it is
    #[arg(long)]
    pub fork: bool,
    /// Stop every process of this user for a moment, so that the snapshot is of one instant
    #[arg(long, value_name = "USER")]
    pub freeze_user: Option<String>,
    /// The longest that moment may be, such as 250ms; 0 for never
    #[arg(long, value_name = "DURATION")]
    pub max_pause: Option<String>,
    /// Ask the store whether it has the last snapshot, even when nothing changed; else that is done once an hour
    #[arg(long)]
    pub confirm: bool,
    /// Build on no earlier snapshot: where layers of the last one are missing or damaged, this one is whole again
    #[arg(long)]
    pub whole: bool,
}

/// What to bring back, and where to.
#[derive(Debug, Args)]
pub struct Restore {
    /// A snapshot's id as `list` shows it, or `latest`
    #[arg(default_value = "latest")]
    pub snapshot: String,
    /// Unpack into this new or empty directory instead of replacing the root
    #[arg(long, value_name = "DIR")]
    pub target: Option<PathBuf>,
    /// Only what matches, with everything below; gitignore-style, can be given again
    #[arg(long = "path", value_name = "PATTERN", requires = "target")]
    pub paths: Vec<String>,
    /// Only say how the root differs from the snapshot
    #[arg(long, conflicts_with = "target")]
    pub dry_run: bool,
    /// Replace the root without asking; only a person at a terminal is asked
    #[arg(long, short)]
    pub yes: bool,
}

/// Flags of every verb; each overrides its RUNTIME_ variable.
#[derive(Debug, Args)]
pub struct Flags {
    /// <s3://bucket/prefix> or <file:///dir>
    #[arg(long, global = true, value_name = "URL")]
    pub store: Option<String>,
    /// Instance id: whose snapshots
    #[arg(long, global = true, value_name = "ID")]
    pub instance: Option<String>,
    /// The tree that is backed up
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<String>,
    /// Working files: index of the last snapshot, lock
    #[arg(long, global = true, value_name = "DIR")]
    pub state: Option<String>,
    /// zstd's level: less is faster, more is smaller
    #[arg(long, global = true, value_name = "LEVEL", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=12))]
    pub level: i32,
    /// Threads that compress; each takes about 12 MiB of memory [default: one for each processor, at most 2]
    #[arg(long, global = true, value_name = "COUNT", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub jobs: Option<u8>,
    /// Bytes per second to and from S3, both together
    #[arg(long, global = true, value_name = "BYTES")]
    pub bandwidth: Option<NonZeroU64>,
    /// Hard bound of the whole command, such as 30s, 5m
    #[arg(long, global = true, value_name = "DURATION")]
    pub timeout: Option<String>,
    /// One JSON object on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Nothing on standard error but errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
}
