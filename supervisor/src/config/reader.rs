//! Reads variables one by one, and keeps count of what was wrong and of what is in force.
//!
//! An empty variable counts as unset. A secret comes from `NAME` or from the file that `NAME_FILE` names, never from both.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use super::Variables;
use crate::error::SettingError;
use crate::secret::{REDACTED, Secret};

/// Longest secret file. The tokens of clouds are a few KiB at most.
const MAX_SECRET_FILE: u64 = 16 * 1024;

pub struct Reader<'a> {
    variables: &'a Variables,
    errors: Vec<SettingError>,
    effective: Vec<(&'static str, String)>,
    secrets: Vec<Secret>,
    secret_files: Vec<SecretFile>,
}

/// The setting that names a file, and the file.
pub type SecretFile = (&'static str, PathBuf);

/// Turns text into a value, or says in half a sentence why it cannot.
type Parser<T> = fn(&str) -> Result<T, String>;

impl<'a> Reader<'a> {
    pub fn new(variables: &'a Variables) -> Self {
        Self {
            variables,
            errors: Vec::new(),
            effective: Vec::new(),
            secrets: Vec::new(),
            secret_files: Vec::new(),
        }
    }

    pub fn finish(self) -> (Vec<SettingError>, Vec<(&'static str, String)>, Vec<Secret>) {
        (self.errors, self.effective, self.secrets)
    }

    /// Where secrets came from.
    pub fn secret_files(&mut self) -> Vec<SecretFile> {
        std::mem::take(&mut self.secret_files)
    }

    pub fn refuse(&mut self, name: &'static str, reason: String) {
        self.errors.push(SettingError { name, reason });
    }

    /// Nothing more is said about a setting that is wrong already.
    pub fn refuse_once(&mut self, name: &'static str, reason: &str) {
        if !self.errors.iter().any(|error| error.name == name) {
            self.refuse(name, reason.to_owned());
        }
    }

    pub fn required(&mut self, name: &'static str) {
        self.refuse_once(name, &format!("it is required (or {name}_FILE)"));
    }

    /// A setting with a default, which also stands in for a wrong value until the errors are reported.
    pub fn value<T>(&mut self, name: &'static str, default: &str, parse: Parser<T>) -> T {
        let text = self.text(name);
        let shown = text.as_deref().unwrap_or(default);
        self.effective.push((name, shown.to_owned()));
        let parsed = parse(shown);
        parsed.unwrap_or_else(|reason| {
            self.refuse(name, reason);
            parse(default).unwrap_or_else(|reason| panic!("the default of {name}: {reason}"))
        })
    }

    pub fn optional<T>(&mut self, name: &'static str, parse: Parser<T>) -> Option<T> {
        let text = self.text(name);
        self.effective
            .push((name, text.clone().unwrap_or_default()));
        match parse(&text?) {
            Ok(value) => Some(value),
            Err(reason) => {
                self.refuse(name, reason);
                None
            }
        }
    }

    pub fn secret(&mut self, name: &'static str, check: Parser<()>) -> Option<Secret> {
        let direct = self.text(name);
        let file = super::lookup(self.variables, &format!("{name}_FILE"));
        let shown = match (&direct, file) {
            (None, None) => "",
            _ => REDACTED,
        };
        self.effective.push((name, shown.to_owned()));
        let text = match (direct, file) {
            (Some(_), Some(_)) => {
                self.refuse(name, format!("{name}_FILE is set too; set one of them"));
                return None;
            }
            (Some(text), None) => text,
            (None, Some(path)) => match read_secret(path) {
                Ok(text) => {
                    self.secret_files.push((name, path.into()));
                    text
                }
                Err(reason) => {
                    self.refuse(name, format!("its file {}: {reason}", path.display()));
                    return None;
                }
            },
            (None, None) => return None,
        };
        match check(&text) {
            Ok(()) => {
                let secret = Secret::new(text);
                self.secrets.push(secret.clone());
                Some(secret)
            }
            Err(reason) => {
                self.refuse(name, reason);
                None
            }
        }
    }

    fn text(&mut self, name: &'static str) -> Option<String> {
        let text = super::lookup(self.variables, name)?.to_str();
        if text.is_none() {
            self.refuse(name, "it is not UTF-8".to_owned());
        }
        text.map(str::to_owned)
    }

    /// Names that look like ours and are not: most likely a misspelling.
    pub fn unknown(&self) -> Vec<String> {
        let is_known = |name: &str| {
            self.effective.iter().any(|(known, shown)| {
                name == *known || name.strip_suffix("_FILE") == Some(known) && shown == REDACTED
            }) || NOT_OURS.contains(&name)
        };
        self.variables
            .iter()
            .filter(|(name, value)| {
                super::environment::belongs_to_the_runtime(name) && !value.is_empty()
            })
            .map(|(name, _)| name.to_string_lossy().into_owned())
            .filter(|name| !is_known(name))
            .collect()
    }
}

/// Known names that are no settings of the supervisor: what it hands to the agent, and what is the Worker's.
const NOT_OURS: [&str; 2] = ["RUNTIME_BOOT_ID", "RUNTIME_LIFECYCLE"];

fn read_secret(path: &OsStr) -> Result<String, String> {
    let mut text = String::new();
    let read =
        File::open(path).and_then(|file| file.take(MAX_SECRET_FILE + 1).read_to_string(&mut text));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            Err("it is not UTF-8".to_owned())
        }
        Err(error) => Err(error.to_string()),
        Ok(length) if length as u64 > MAX_SECRET_FILE => {
            Err(format!("it is longer than {} KiB", MAX_SECRET_FILE / 1024))
        }
        Ok(_) => {
            let line = text.strip_suffix('\n').unwrap_or(&text);
            Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
        }
    }
}
