//! The real gateway: where the pinned one is installed, and what its own tools say of its state.

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::machine::GATEWAY_TOKEN;

/// The pinned gateway and its Node.js, as `gateway/install.sh` installs them.
pub struct OpenClaw {
    bin: PathBuf,
}

impl OpenClaw {
    /// Finds the installation, and makes it first where there is none yet.
    pub fn install() -> Result<Self, Box<dyn Error>> {
        let output = Command::new(repository().join("gateway/install.sh"))
            .stderr(Stdio::inherit())
            .output()?;
        if !output.status.success() {
            return Err(format!("gateway/install.sh failed: {}", output.status).into());
        }
        let folder = String::from_utf8(output.stdout)?;
        Ok(Self {
            bin: Path::new(folder.trim_end()).join("bin"),
        })
    }

    /// Where it is installed: `bin` is in there.
    pub fn folder(&self) -> &Path {
        self.bin.parent().unwrap_or(&self.bin)
    }

    /// The search path to run it with: its own programs first, then the system's.
    #[must_use]
    pub fn search_path(&self) -> OsString {
        let mut path = OsString::from(&self.bin);
        path.push(":/usr/local/bin:/usr/bin:/bin");
        path
    }

    /// What a command of its own that answers in JSON says of the state in a home.
    pub fn ask(&self, home: &Path, arguments: &[&str]) -> Result<Value, Box<dyn Error>> {
        let output = Command::new(self.bin.join("openclaw"))
            .args(arguments)
            .env_clear()
            .env("HOME", home)
            .env("PATH", self.search_path())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let wrong = |error| format!("openclaw {}: {error}: {said}", arguments.join(" "));
        Ok(serde_json::from_slice(&output.stdout).map_err(wrong)?)
    }

    /// What a running gateway answers to a call by its own command line, which has a home of its own.
    pub fn call(
        &self,
        gateway: SocketAddr,
        home: &Path,
        method: &str,
        params: &Value,
    ) -> Result<Value, Box<dyn Error>> {
        let (url, params) = (format!("ws://{gateway}"), params.to_string());
        let call = ["gateway", "call", method, "--params", &params, "--json"];
        let there = ["--url", &url, "--token", GATEWAY_TOKEN];
        self.ask(home, &[&call[..], &there].concat())
    }

    /// Checks the databases of a gateway that is not running with its own tools: its backup command runs a full
    /// integrity check of each and verifies the copies. `scratch` is an empty directory for the copies.
    pub fn check_databases(&self, home: &Path, scratch: &Path) -> Result<(), Box<dyn Error>> {
        let output = Command::new(self.bin.join("openclaw"))
            .args(["backup", "create", "--verify", "--json"])
            .arg("--output")
            .arg(scratch.join("openclaw.tar.gz"))
            .env_clear()
            .env("HOME", home)
            .env("PATH", self.search_path())
            .output()?;
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if output.status.success() && report["verified"] == true {
            return Ok(());
        }
        Err(format!(
            "openclaw does not verify its databases in {}: {}{}",
            home.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
        .into())
    }
}

/// Configures a gateway that has not run yet so that every device needs approval: it would otherwise let
/// those on loopback in by itself. Done before the first start, as an operator's image would.
pub fn require_approval(home: &Path) -> Result<(), Box<dyn Error>> {
    let state = home.join(".openclaw");
    fs::create_dir_all(&state)?;
    fs::write(
        state.join("openclaw.json"),
        r#"{"gateway":{"mode":"local","nodes":{"pairing":{"autoApproveLocal":false}}}}"#,
    )?;
    Ok(())
}

/// The script that clears an old host's leases after a restore.
#[must_use]
pub fn prepare_script() -> PathBuf {
    repository().join("gateway/prepare.mjs")
}

/// The clone that these tests were built in.
pub fn repository() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}
