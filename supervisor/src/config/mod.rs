//! Settings: the environment becomes one `Config`, or every setting that is wrong is reported at once.
//!
//! Whatever is read here was written by the operator and is trusted; it is checked for mistakes, not for attacks.

mod environment;
mod locations;
mod reader;
mod values;

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::SettingError;
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
    pub effective: Vec<(&'static str, String)>,
}

/// Every variable with its value, as `std::env::vars_os` gives them.
pub type Variables = Vec<(OsString, OsString)>;

impl Config {
    /// Reads the settings. `command` is what follows `--`; empty means the default.
    pub fn read(variables: &Variables, command: Vec<OsString>) -> Result<Self, Vec<SettingError>> {
        let mut reader = Reader::new(variables);
        let service_token = reader.secret("RUNTIME_SERVICE_TOKEN", values::service_token);
        if service_token.is_none() {
            reader.required("RUNTIME_SERVICE_TOKEN");
        }
        let listen = reader.value("RUNTIME_LISTEN", "0.0.0.0:8080", locations::address);
        let instance_id = reader.value("RUNTIME_INSTANCE_ID", "local", values::instance);
        let instance_type = reader.optional("RUNTIME_INSTANCE_TYPE", values::word);
        let (root, store) = read_places(&mut reader);
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
        let backup_timeout = reader.value("RUNTIME_BACKUP_TIMEOUT", "2m", values::positive);
        let restore_timeout = reader.value("RUNTIME_RESTORE_TIMEOUT", "10m", values::positive);
        let hold = reader.value("RUNTIME_ON_RESTORE_FAILURE", "hold", values::hold);
        let log = reader.value("RUNTIME_LOG", "info", values::level);
        check_what_is_for_the_agent(&mut reader);

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
            agent_environment: environment::agent(variables, &hex(16)),
            state_directory: environment::state_directory(variables, &root),
            service_token,
            listen,
            instance_id,
            instance_type,
            root,
            store,
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

/// The root and the store, which must not be one inside the other.
fn read_places(reader: &mut Reader<'_>) -> (PathBuf, StoreKind) {
    let root = reader.value("RUNTIME_ROOT", "/data", locations::directory);
    let state = reader.value(
        "RUNTIME_STATE",
        "/var/lib/openclaw-runtime",
        locations::directory,
    );
    if state.starts_with(&root) {
        let reason = "it must not be inside RUNTIME_ROOT, where the gateway could read it";
        reader.refuse("RUNTIME_STATE", reason.into());
    }
    let default = format!("file://{}/store", state.display());
    let store = reader.value("RUNTIME_STORE", &default, locations::store);
    if let StoreKind::File(path) = &store
        && path.starts_with(&root)
    {
        let reason = "it must not be inside RUNTIME_ROOT, which it is to survive";
        reader.refuse_once("RUNTIME_STORE", reason);
    }
    let endpoint = reader.optional("RUNTIME_S3_ENDPOINT", locations::endpoint);
    let region = reader.value("RUNTIME_S3_REGION", "auto", values::word);
    let key = reader.secret("RUNTIME_S3_ACCESS_KEY_ID", values::credential);
    let secret = reader.secret("RUNTIME_S3_SECRET_ACCESS_KEY", values::credential);
    reader.secret("RUNTIME_S3_SESSION_TOKEN", values::credential);
    if store == StoreKind::S3 {
        if key.is_none() {
            reader.required("RUNTIME_S3_ACCESS_KEY_ID");
        }
        if secret.is_none() {
            reader.required("RUNTIME_S3_SECRET_ACCESS_KEY");
        }
        if endpoint.is_none() && region == "auto" {
            let reason = "an s3:// store needs it, unless RUNTIME_S3_REGION names a region of AWS";
            reader.refuse_once("RUNTIME_S3_ENDPOINT", reason);
        }
    }
    (root, store)
}

/// We do not use these; mistakes in them are to be found before anything starts, not at the first backup.
fn check_what_is_for_the_agent(reader: &mut Reader<'_>) {
    reader.value("RUNTIME_MAX_PAUSE", "250ms", values::duration);
    reader.optional("RUNTIME_STORE_UNFENCED", values::allow);
    let retention = "last=24,hourly=24,daily=7,weekly=4";
    reader.value("RUNTIME_RETENTION", retention, values::retention);
    reader.optional("RUNTIME_EXCLUDE", values::patterns);
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
            ("RUNTIMES", "are not ours"),
        ]
        .map(|(name, value)| (name.into(), value.into()))
        .into_iter()
        .collect();
        let config = Config::read(&variables, Vec::new()).map(|config| config.unknown);
        assert_eq!(config, Ok(vec!["RUNTIME_BACKUP_INTERVALL".to_owned()]));
    }
}
