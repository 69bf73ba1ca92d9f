//! Where the programs under test are: in `E2E_BIN_DIR` (the released ones), or built here once.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::surroundings::settle;

/// The path of a program of this workspace. The tests' own fakes are never taken from `E2E_BIN_DIR`.
pub fn binary(name: &str) -> PathBuf {
    settle();
    let is_fake = name.starts_with("fake-");
    match std::env::var_os("E2E_BIN_DIR") {
        Some(directory) if !is_fake => PathBuf::from(directory).join(name),
        _ => built().join(name),
    }
}

/// `target[/triple]/profile`, with every program in it. `cargo test` alone does not build those of other packages.
fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let test = std::env::current_exe().expect("a process knows its program");
        let folder = test
            .ancestors()
            .find(|folder| folder.join("deps").is_dir())
            .expect("tests run from target/PROFILE/deps")
            .to_owned();
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") => "dev",
            Some(other) => other,
            None => unreachable!("the folder of a profile has a name"),
        };
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args(["build", "--quiet", "--bins", "--profile", profile])
            // The released programs are there already; only the fakes are missing.
            .args(match std::env::var_os("E2E_BIN_DIR") {
                Some(_) => &["--package", "e2e"][..],
                None => &["--workspace"],
            })
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        // target/TRIPLE/PROFILE, when the tests were built for a triple by name.
        let parent = folder.parent().and_then(Path::file_name);
        if let Some(triple) = parent.and_then(|name| name.to_str())
            && triple.contains("-linux-")
        {
            cargo.args(["--target", triple]);
        }
        let status = cargo.status().expect("cargo runs, it runs us");
        assert!(status.success(), "the programs under test do not build");
        folder
    })
}
