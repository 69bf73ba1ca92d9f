//! The tool that other set-ups copy their files with, and its copies of a folder to the S3 server of the tests.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::moto::Moto;

/// What such a set-up tells it, its excludes aside.
const FLAGS: [&str; 3] = ["--transfers=16", "--fast-list", "--s3-no-check-bucket"];

/// Makes `place` (a bucket and a prefix) a copy of `folder`; `excludes` are patterns of its own.
pub fn sync(moto: &Moto, folder: &Path, place: &str, excludes: &[&str]) {
    run(
        moto,
        "sync",
        &folder.display().to_string(),
        &format!("r2:{place}"),
        excludes,
    );
}

/// Makes `folder` a copy of `place`.
pub fn copy_back(moto: &Moto, place: &str, folder: &Path) {
    run(
        moto,
        "copy",
        &format!("r2:{place}"),
        &folder.display().to_string(),
        &[],
    );
}

fn run(moto: &Moto, verb: &str, from: &str, to: &str, excludes: &[&str]) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("install-rclone.sh");
    let installed = Command::new(script)
        .stderr(Stdio::inherit())
        .output()
        .expect("the script can be run");
    assert!(installed.status.success(), "rclone cannot be installed");
    let program = String::from_utf8(installed.stdout).expect("a path of ours is UTF-8");
    let remote = [
        ("TYPE", "s3"),
        ("PROVIDER", "Cloudflare"),
        ("ACCESS_KEY_ID", "anyone"),
        ("SECRET_ACCESS_KEY", "anything"),
        ("ENDPOINT", &format!("http://{}", moto.address)),
        ("ACL", "private"),
    ];
    let output = Command::new(program.trim_end())
        .args(["--config", "/dev/null", verb, from, to])
        .args(FLAGS)
        .args(
            excludes
                .iter()
                .map(|pattern| format!("--exclude={pattern}")),
        )
        .env_clear()
        .envs(remote.map(|(name, value)| (format!("RCLONE_CONFIG_R2_{name}"), value)))
        .output()
        .expect("rclone can be run");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "rclone {verb}: {said}");
}
