//! Settings: the environment becomes one `Config`, or every setting that is wrong is reported at once.
//!
//! Whatever is read here was written by the operator and is trusted; it is checked for mistakes, not for attacks.

mod environment;
mod locations;
mod reader;
mod values;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::gateway::process::User;
use crate::log::Level;
use crate::secret::{Secret, Secrets};
pub use locations::StoreKind;
use reader::{Reader, SecretFile};
pub use values::Limit;

/// Where the image keeps the prepare script.
const PREPARE: &str = "/usr/local/lib/openclaw-runtime/prepare.mjs";

#[derive(Debug)]
pub struct Config {
    pub service_token: Secret,
    pub listen: SocketAddr,
    pub instance_id: String,
    pub instance_type: Option<String>,
    pub root: PathBuf,
    /// Files of the runtime itself.
    pub state: PathBuf,
    pub store: StoreKind,
    pub gateway_address: SocketAddr,
    pub gateway_token: Secret,
    pub user: User,
    pub limits: Vec<Limit>,
    pub command: Vec<OsString>,
    pub gateway_environment: Vec<(OsString, OsString)>,
    pub state_directory: PathBuf,
    pub prepare: Option<PathBuf>,
    pub startup_timeout: Duration,
    pub stop_grace: Duration,
    /// Zero: no periodic backups.
    pub backup_interval: Duration,
    pub backup_timeout: Duration,
    pub restore_timeout: Duration,
    pub hold: bool,
    pub log: Level,
    pub agent_environment: Vec<(OsString, OsString)>,
    pub secrets: Secrets,
    pub secret_files: Vec<SecretFile>,
    /// Names that begin with `RUNTIME_` and mean nothing.
    pub unknown: Vec<String>,
    /// Name and value of every setting as used, secrets redacted.
    pub effective: Vec<(String, String)>,
}

/// What the agent's own check says: its settings as used, or what is wrong with them.
#[derive(Debug, Default)]
pub struct Checked {
    pub settings: BTreeMap<String, String>,
    pub problems: Vec<String>,
}

/// Every variable with its value, as `std::env::vars_os` gives them.
pub type Variables = Vec<(OsString, OsString)>;

impl Config {
    /// Reads the settings. `command` is what follows `--`; empty means the default.
    pub fn read(
        variables: &Variables,
        command: Vec<OsString>,
        agent_environment: Variables,
        checked: &Checked,
    ) -> Result<Self, Vec<String>> {
        let mut reader = Reader::new(variables, checked);
        let (service_token, listen) = read_api(&mut reader);
        let instance_type = reader.optional("RUNTIME_INSTANCE_TYPE", values::word);
        let root = PathBuf::from(reader.checked("RUNTIME_ROOT", "/data", as_it_is));
        // A link that the agent has let pass leads to the same place for as long as we run.
        let root = std::fs::canonicalize(&root).unwrap_or(root);
        for name in [
            "RUNTIME_S3_ACCESS_KEY_ID",
            "RUNTIME_S3_SECRET_ACCESS_KEY",
            "RUNTIME_S3_SESSION_TOKEN",
        ] {
            reader.secret_of_the_agent(name);
        }
        for name in environment::PROXIES {
            reader.secret_of_a_proxy(name);
        }
        let user = reader.value(
            "RUNTIME_GATEWAY_USER",
            &values::default_user(),
            values::user,
        );
        let gateway_address = reader.value(
            "RUNTIME_GATEWAY_URL",
            "http://127.0.0.1:18789",
            locations::gateway_url,
        );
        let gateway_token = reader
            .secret("RUNTIME_GATEWAY_TOKEN", values::credential)
            .or_else(|| inherited_gateway_token(variables))
            .unwrap_or_else(|| Secret::new(hex(32)));
        let prepare = if Path::new(PREPARE).is_file() {
            Some(reader.value("RUNTIME_GATEWAY_PREPARE", PREPARE, locations::file))
        } else {
            reader.optional("RUNTIME_GATEWAY_PREPARE", locations::file)
        };
        let startup_timeout = reader.value("RUNTIME_STARTUP_TIMEOUT", "180s", values::positive);
        let stop_grace = reader.value("RUNTIME_STOP_GRACE", "30s", values::duration);
        let limits = reader.optional("RUNTIME_GATEWAY_LIMITS", values::limits);
        let backup_interval = reader.value("RUNTIME_BACKUP_INTERVAL", "5m", values::interval);
        let hold = reader.value("RUNTIME_ON_RESTORE_FAILURE", "hold", values::hold);
        let backup_timeout = reader.checked("RUNTIME_BACKUP_TIMEOUT", "2m", values::duration);
        let restore_timeout = reader.checked("RUNTIME_RESTORE_TIMEOUT", "10m", values::duration);
        let log = reader.checked("RUNTIME_LOG", "info", values::level);
        let instance_id = reader.checked("RUNTIME_INSTANCE_ID", "local", as_it_is);
        let state = reader.checked("RUNTIME_STATE", "/var/lib/openclaw-runtime", as_it_is);
        let store = reader.checked("RUNTIME_STORE", "file:///", as_it_is);

        let (unknown, secret_files) = (reader.unknown(), reader.secret_files());
        let (errors, effective, mut secrets) = reader.finish();
        let Some(service_token) = service_token.filter(|_| errors.is_empty()) else {
            return Err(errors);
        };
        secrets.push(gateway_token.clone());
        let command = if command.is_empty() {
            default_command(gateway_address)
        } else {
            command
        };
        Ok(Self {
            gateway_environment: environment::gateway(variables, &root, &gateway_token),
            agent_environment,
            state_directory: environment::state_directory(variables, &root),
            service_token,
            listen,
            instance_id,
            instance_type,
            root,
            state: PathBuf::from(state),
            store: if store.starts_with("s3://") {
                StoreKind::S3
            } else {
                StoreKind::File
            },
            gateway_address,
            gateway_token,
            user,
            limits: limits.unwrap_or_default(),
            command,
            prepare,
            startup_timeout,
            stop_grace,
            backup_interval,
            backup_timeout,
            restore_timeout,
            hold,
            log,
            secrets: Secrets(secrets),
            secret_files,
            unknown,
            effective,
        })
    }
}

/// What a running supervisor is asked by: where it listens, and its token.
pub fn read_api_alone(variables: &Variables) -> Result<(SocketAddr, Secret), Vec<String>> {
    let checked = Checked::default();
    let mut reader = Reader::new(variables, &checked);
    let (token, listen) = read_api(&mut reader);
    let (errors, ..) = reader.finish();
    match token {
        Some(token) if errors.is_empty() => Ok((listen, token)),
        _ => Err(errors),
    }
}

fn read_api(reader: &mut Reader<'_>) -> (Option<Secret>, SocketAddr) {
    let token = reader.secret("RUNTIME_SERVICE_TOKEN", values::service_token);
    if token.is_none() {
        reader.required("RUNTIME_SERVICE_TOKEN");
    }
    let listen = reader.value("RUNTIME_LISTEN", "0.0.0.0:8080", locations::address);
    (token, listen)
}

/// What the agent is given, in the name of this boot.
pub fn agent_environment(variables: &Variables) -> Variables {
    environment::agent(variables, &hex(16))
}

#[expect(clippy::unnecessary_wraps, reason = "it stands beside parsers")]
fn as_it_is(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn default_command(gateway: SocketAddr) -> Vec<OsString> {
    let port = gateway.port().to_string();
    [
        "openclaw",
        "gateway",
        "run",
        "--port",
        &port,
        "--bind",
        "loopback",
        "--allow-unconfigured",
    ]
    .map(OsString::from)
    .to_vec()
}

fn lookup<'a>(variables: &'a Variables, name: &str) -> Option<&'a OsStr> {
    variables
        .iter()
        .find(|(key, value)| key == name && !value.is_empty())
        .map(|(_, value)| value.as_os_str())
}

fn inherited_gateway_token(variables: &Variables) -> Option<Secret> {
    let token = lookup(variables, "OPENCLAW_GATEWAY_TOKEN")?.to_str()?;
    Some(Secret::new(token.to_owned()))
}

/// `bytes` random bytes in hex.
fn hex(bytes: usize) -> String {
    use std::fmt::Write as _;

    let mut random = vec![0; bytes];
    getrandom::fill(&mut random).expect("the kernel has random bytes for everyone");
    random.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_is_unknown_and_another_parts_name_is_not() {
        let variables: Variables = [
            ("RUNTIME_SERVICE_TOKEN", "0123456789abcdef0123456789abcdef"),
            ("RUNTIME_BACKUP_INTERVALL", "5m"),
            ("RUNTIME_LIFECYCLE", "always"),
            ("RUNTIME_BOOT_ID", "x"),
            ("RUNTIME_STORE", "s3://bucket"),
            ("RUNTIME_S3_ENDPOINT_FILE", "/run/endpoint"),
            ("RUNTIMES", "are not ours"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into_iter()
        .collect();
        let mut checked = Checked::default();
        for name in ["RUNTIME_STORE", "RUNTIME_S3_ENDPOINT_FILE"] {
            checked.settings.insert(name.to_owned(), String::new());
        }
        let config = Config::read(&variables, Vec::new(), Vec::new(), &checked);
        let config = config.map(|config| config.unknown);
        assert_eq!(config, Ok(vec!["RUNTIME_BACKUP_INTERVALL".to_owned()]));
    }
}
