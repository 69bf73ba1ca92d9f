//! The agent and its peers: how each is run, and where it is found.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use e2e::binaries::binary;

use crate::Outcome;

const KEY_ID: &str = "key-id-of-the-benchmark";
const SECRET: &str = "secret-key-of-the-benchmark";
const PASSWORD: &str = "a password";

/// What makes and restores backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    Agent,
    Tar,
    Restic,
    Rustic,
    Rclone,
}

/// All of them, the agent first.
pub const ALL: [Tool; 5] = [
    Tool::Agent,
    Tool::Tar,
    Tool::Restic,
    Tool::Rustic,
    Tool::Rclone,
];

/// What a tool works on and with, all its own but the tree.
pub struct Lane {
    pub tool: Tool,
    pub tree: PathBuf,
    /// What it keeps between runs: index, cache, settings.
    pub state: PathBuf,
    /// Where it restores to.
    pub target: PathBuf,
    pub endpoint: SocketAddr,
}

/// A program to be run, with what it needs.
pub struct Run {
    pub program: OsString,
    pub arguments: Vec<OsString>,
    pub folder: PathBuf,
    pub environment: Vec<(&'static str, OsString)>,
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Self::Agent => "backup-agent",
            Self::Tar => "tar, zstd, aws",
            Self::Restic => "restic",
            Self::Rustic => "rustic",
            Self::Rclone => "rclone sync",
        }
    }

    /// The name of its bucket.
    pub fn bucket(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Tar => "tar",
            Self::Restic => "restic",
            Self::Rustic => "rustic",
            Self::Rclone => "rclone",
        }
    }

    /// Programs that it takes, in `PATH` for all but the agent, and how to ask their version.
    pub fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Agent => &[],
            Self::Tar => &[
                ("tar", "--version"),
                ("zstd", "--version"),
                ("aws", "--version"),
            ],
            Self::Restic => &[("restic", "version")],
            Self::Rustic => &[("rustic", "--version")],
            Self::Rclone => &[("rclone", "version")],
        }
    }
}

impl Lane {
    fn run<S: AsRef<OsStr>>(&self, program: impl Into<OsString>, arguments: &[S]) -> Run {
        let endpoint = format!("http://{}", self.endpoint);
        let mut environment = vec![
            ("AWS_ACCESS_KEY_ID", KEY_ID.into()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.into()),
            ("AWS_DEFAULT_REGION", "us-east-1".into()),
            ("AWS_EC2_METADATA_DISABLED", "true".into()),
            ("HOME", self.state.clone().into()),
            ("PATH", std::env::var_os("PATH").unwrap_or_default()),
            // For pipelines.
            ("ENDPOINT", endpoint.clone().into()),
            ("TREE", self.tree.clone().into()),
            ("TARGET", self.target.clone().into()),
        ];
        let bucket = self.tool.bucket();
        let own: &[(&str, OsString)] = match self.tool {
            Tool::Agent => &[
                ("RUNTIME_ROOT", self.tree.clone().into()),
                ("RUNTIME_STATE", self.state.join("agent").into()),
                ("RUNTIME_STORE", format!("s3://{bucket}/prefix").into()),
                ("RUNTIME_S3_ENDPOINT", endpoint.into()),
                ("RUNTIME_S3_ACCESS_KEY_ID", KEY_ID.into()),
                ("RUNTIME_S3_SECRET_ACCESS_KEY", SECRET.into()),
                // As the peers: with the rights of the caller.
                (
                    "RUNTIME_GATEWAY_USER",
                    nix::unistd::geteuid().to_string().into(),
                ),
                ("RUNTIME_BACKUP_TIMEOUT", "30m".into()),
                ("RUNTIME_RESTORE_TIMEOUT", "30m".into()),
            ],
            Tool::Restic => &[
                (
                    "RESTIC_REPOSITORY",
                    format!("s3:{endpoint}/{bucket}").into(),
                ),
                ("RESTIC_PASSWORD", PASSWORD.into()),
                ("RESTIC_CACHE_DIR", self.state.join("cache").into()),
            ],
            Tool::Tar | Tool::Rustic => &[],
            Tool::Rclone => &[
                ("RCLONE_CONFIG_BENCH_TYPE", "s3".into()),
                ("RCLONE_CONFIG_BENCH_PROVIDER", "Other".into()),
                ("RCLONE_CONFIG_BENCH_ENDPOINT", endpoint.into()),
                ("RCLONE_CONFIG_BENCH_ACCESS_KEY_ID", KEY_ID.into()),
                ("RCLONE_CONFIG_BENCH_SECRET_ACCESS_KEY", SECRET.into()),
            ],
        };
        environment.extend_from_slice(own);
        Run {
            program: program.into(),
            arguments: arguments.iter().map(Into::into).collect(),
            folder: self.tree.clone(),
            environment,
        }
    }

    /// A pipeline that fails when one of its programs does.
    fn pipeline(&self, script: &str) -> Run {
        self.run("bash", &["-e", "-o", "pipefail", "-c", script])
    }

    fn rustic<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Run {
        let profile = self.state.join("rustic").into_os_string();
        let mut all = vec!["-P".into(), profile, "--no-progress".into()];
        all.extend(arguments.iter().map(Into::into));
        self.run("rustic", &all)
    }

    /// What has to be done once before the first backup and is not measured.
    pub fn prepare(&self) -> Outcome<Option<Run>> {
        match self.tool {
            Tool::Restic => Ok(Some(self.run("restic", &["init", "--quiet"]))),
            Tool::Rustic => {
                let profile = format!(
                    "[repository]\nrepository = \"opendal:s3\"\npassword = \"{PASSWORD}\"\ncache-dir = \"{}\"\n\n\
                     [repository.options]\nbucket = \"{}\"\nroot = \"/\"\nendpoint = \"http://{}\"\nregion = \"auto\"\n\
                     access_key_id = \"{KEY_ID}\"\nsecret_access_key = \"{SECRET}\"\n",
                    self.state.join("cache").display(),
                    self.tool.bucket(),
                    self.endpoint
                );
                fs::write(self.state.join("rustic.toml"), profile)?;
                Ok(Some(self.rustic(&["init"])))
            }
            Tool::Agent | Tool::Tar | Tool::Rclone => Ok(None),
        }
    }

    /// A backup: the first, one of an unchanged tree, or one of a changed tree; the tool finds out.
    pub fn backup(&self) -> Run {
        match self.tool {
            Tool::Agent => self.run(binary("backup-agent"), &["backup", "--quiet", "--json"]),
            Tool::Tar => self.pipeline(
                "tar -S --xattrs -C \"$TREE\" -c . | zstd -3 -T2 -q | aws --endpoint-url \"$ENDPOINT\" s3 cp --quiet - s3://tar/tree.tar.zst",
            ),
            Tool::Restic => self.run("restic", &["backup", "--quiet", "."]),
            Tool::Rustic => self.rustic(&["backup", "."]),
            Tool::Rclone => {
                self.run("rclone", &["sync", "--quiet", "--links", ".", "bench:rclone"])
            }
        }
    }

    /// A restore of the newest backup into the empty target.
    pub fn restore(&self) -> Run {
        let target: &Path = &self.target;
        let words = |words: &[&str]| -> Vec<OsString> { words.iter().map(Into::into).collect() };
        match self.tool {
            Tool::Agent => {
                let mut arguments = words(&["restore", "--quiet", "--json", "--target"]);
                arguments.push(target.into());
                self.run(binary("backup-agent"), &arguments)
            }
            Tool::Tar => self.pipeline(
                "aws --endpoint-url \"$ENDPOINT\" s3 cp --quiet s3://tar/tree.tar.zst - | zstd -dc | tar --xattrs -C \"$TARGET\" -x",
            ),
            Tool::Restic => {
                let mut arguments = words(&["restore", "--quiet", "latest", "--target"]);
                arguments.push(target.into());
                self.run("restic", &arguments)
            }
            Tool::Rustic => self.rustic(&[OsStr::new("restore"), OsStr::new("latest"), target.as_ref()]),
            Tool::Rclone => {
                let mut arguments = words(&["sync", "--quiet", "--links", "bench:rclone"]);
                arguments.push(target.into());
                self.run("rclone", &arguments)
            }
        }
    }
}

/// What nobody can beat: the same work without a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// Of a full backup.
    Pack,
    /// Of an unchanged one.
    Walk,
    /// Of a restore; needs what [`archive`] makes.
    Unpack,
}

impl Floor {
    pub fn name(self) -> &'static str {
        match self {
            Self::Pack => "floor: tar, zstd to nowhere",
            Self::Walk => "floor: find -printf",
            Self::Unpack => "floor: zstd, tar from a local file",
        }
    }

    pub fn run(self, lane: &Lane) -> Run {
        lane.pipeline(match self {
            Self::Pack => "tar -S --xattrs -C \"$TREE\" -c . | zstd -3 -T2 -q >/dev/null",
            Self::Walk => {
                "exec find \"$TREE\" -printf '%p %y %m %U %G %s %T@ %C@ %i\\n' >/dev/null"
            }
            Self::Unpack => "zstd -dc \"$HOME/tree.tar.zst\" | tar --xattrs -C \"$TARGET\" -x",
        })
    }
}

/// Makes the local file that [`Floor::Unpack`] reads.
pub fn archive(lane: &Lane) -> Run {
    lane.pipeline("tar -S --xattrs -C \"$TREE\" -c . | zstd -3 -T2 -q -f -o \"$HOME/tree.tar.zst\"")
}
