//! Who sees which variable: everything named `RUNTIME_*` is the runtime's, the rest is the gateway's.
//!
//! This rule is what keeps the service token and the store's credentials from the gateway.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::{Variables, lookup};
use crate::secret::Secret;

/// What `execvp` needs when whoever started us set no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Marks of another service manager: with one of them the gateway would hand its restarts to that one instead of us.
const UNSET: [&str; 5] = [
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "SYSTEMD_EXEC_PID",
    "OPENCLAW_SYSTEMD_UNIT",
    "OPENCLAW_NO_RESPAWN",
];

/// The agent is never given these: it needs neither.
const NOT_FOR_THE_AGENT: [&str; 5] = [
    "RUNTIME_SERVICE_TOKEN",
    "RUNTIME_SERVICE_TOKEN_FILE",
    "RUNTIME_GATEWAY_TOKEN",
    "RUNTIME_GATEWAY_TOKEN_FILE",
    "RUNTIME_BOOT_ID",
];

/// The gateway's state: `OPENCLAW_STATE_DIR`, or `.openclaw` in its home.
pub fn state_directory(variables: &Variables, root: &Path) -> PathBuf {
    lookup(variables, "OPENCLAW_STATE_DIR")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| root.join(".openclaw"))
}

pub fn belongs_to_the_runtime(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"RUNTIME_")
}

/// Everything but `RUNTIME_*`, with its home, a `PATH` and what tells it who supervises.
pub fn gateway(variables: &Variables, root: &Path, token: &Secret) -> Variables {
    let own: [(&str, &OsStr); 3] = [
        ("HOME", root.as_os_str()),
        ("OPENCLAW_SUPERVISOR_MODE", OsStr::new("external")),
        ("OPENCLAW_GATEWAY_TOKEN", OsStr::new(token.expose())),
    ];
    let mut environment: Variables = variables
        .iter()
        .filter(|(name, _)| {
            !belongs_to_the_runtime(name)
                && !UNSET.iter().any(|unset| name == unset)
                && !own.iter().any(|(own, _)| name == own)
        })
        .cloned()
        .collect();
    environment.extend(own.map(|(name, value)| (name.into(), value.into())));
    if lookup(variables, "PATH").is_none() {
        environment.retain(|(name, _)| name != "PATH");
        environment.push(("PATH".into(), DEFAULT_PATH.into()));
    }
    environment
}

pub fn agent(variables: &Variables, boot_id: &str) -> Variables {
    let mut environment: Variables = variables
        .iter()
        .filter(|(name, _)| {
            belongs_to_the_runtime(name) && !NOT_FOR_THE_AGENT.iter().any(|other| name == other)
        })
        .cloned()
        .collect();
    environment.push(("RUNTIME_BOOT_ID".into(), boot_id.into()));
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        pairs
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect()
    }

    #[test]
    fn the_gateway_sees_everything_but_the_runtimes_settings() {
        let given = variables(&[
            ("RUNTIME_SERVICE_TOKEN", "s"),
            ("RUNTIME_ANYTHING", "s"),
            ("ANTHROPIC_API_KEY", "k"),
            ("HOME", "/root"),
            ("PATH", "/opt/bin"),
            ("INVOCATION_ID", "1"),
            ("OPENCLAW_NO_RESPAWN", "1"),
            ("OPENCLAW_LOG", "x"),
            ("OPENCLAW_GATEWAY_TOKEN", "old"),
        ]);
        let token = Secret::new("new".into());
        let mut seen = gateway(&given, Path::new("/data"), &token);
        seen.sort();
        let expected = variables(&[
            ("ANTHROPIC_API_KEY", "k"),
            ("HOME", "/data"),
            ("OPENCLAW_GATEWAY_TOKEN", "new"),
            ("OPENCLAW_LOG", "x"),
            ("OPENCLAW_SUPERVISOR_MODE", "external"),
            ("PATH", "/opt/bin"),
        ]);
        assert_eq!(seen, expected);
    }

    #[test]
    fn the_agent_sees_the_runtimes_settings_but_no_token_of_the_others() {
        let given = variables(&[
            ("RUNTIME_SERVICE_TOKEN", "s"),
            ("RUNTIME_GATEWAY_TOKEN_FILE", "/run/t"),
            ("RUNTIME_BOOT_ID", "from outside"),
            ("RUNTIME_STORE", "s3://b"),
            ("PATH", "/bin"),
        ]);
        let expected = variables(&[("RUNTIME_STORE", "s3://b"), ("RUNTIME_BOOT_ID", "id")]);
        assert_eq!(agent(&given, "id"), expected);
    }
}
