//! Reads variables one by one, and keeps count of what was wrong and of what is in force.
//!
//! What is the agent's comes from its own check, which is the only one. An empty variable counts as unset. A secret comes from `NAME` or from the file that `NAME_FILE` names, never from both.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use super::{Checked, Variables};
use crate::error::SettingError;
use crate::secret::{REDACTED, Secret};

/// Longest secret file. The tokens of clouds are a few KiB at most.
const MAX_SECRET_FILE: u64 = 16 * 1024;

/// Shortest password of a proxy that is looked for by itself.
const MIN_PASSWORD: usize = 4;

pub struct Reader<'a> {
    variables: &'a Variables,
    checked: &'a Checked,
    errors: Vec<SettingError>,
    effective: Vec<(String, String)>,
    secrets: Vec<Secret>,
    secret_files: Vec<SecretFile>,
}

/// The setting that names a file, and the file.
pub type SecretFile = (&'static str, PathBuf);

/// Turns text into a value, or says in half a sentence why it cannot.
type Parser<T> = fn(&str) -> Result<T, String>;

impl<'a> Reader<'a> {
    pub fn new(variables: &'a Variables, checked: &'a Checked) -> Self {
        Self {
            variables,
            checked,
            errors: Vec::new(),
            effective: Vec::new(),
            secrets: Vec::new(),
            secret_files: Vec::new(),
        }
    }

    /// What is wrong, of ours and of the agent's; what is in force; and what must not be shown. A setting of both is judged by
    /// the agent first.
    pub fn finish(mut self) -> (Vec<String>, Vec<(String, String)>, Vec<Secret>) {
        let problems = &self.checked.problems;
        let is_known = |error: &SettingError| {
            let begin = format!("cannot use {}:", error.name);
            problems.iter().any(|problem| problem.starts_with(&begin))
        };
        let ours = self.errors.iter().filter(|error| !is_known(error));
        let ours = ours.map(ToString::to_string);
        let errors = ours.chain(problems.iter().cloned()).collect();
        let agents = self.checked.settings.iter();
        let agents = agents.map(|(name, value)| (name.clone(), value.clone()));
        let agents: Vec<_> = agents.filter(|(name, _)| !self.shows(name)).collect();
        self.effective.extend(agents);
        (errors, self.effective, self.secrets)
    }

    fn shows(&self, name: &str) -> bool {
        self.effective.iter().any(|(known, _)| known == name)
    }

    /// A value that the agent has found good. There is none when it has found some setting bad.
    pub fn checked<T>(&self, name: &str, default: &str, parse: Parser<T>) -> T {
        let text = self.checked.settings.get(name);
        let text = text.map_or(default, String::as_str);
        let parsed = parse(text).or_else(|_| parse(default));
        parsed.unwrap_or_else(|reason| panic!("the default of {name}: {reason}"))
    }

    /// A secret of the agent's, which judges it; we only have to know it where it is repeated.
    pub fn secret_of_the_agent(&mut self, name: &'static str) {
        let direct = super::lookup(self.variables, name).and_then(OsStr::to_str);
        let file = super::lookup(self.variables, &format!("{name}_FILE"));
        let text = match (direct, file) {
            (Some(text), _) => text.to_owned(),
            (None, Some(path)) => {
                self.secret_files.push((name, path.into()));
                read_secret(path).unwrap_or_default()
            }
            (None, None) => return,
        };
        self.secrets.push(Secret::new(text));
    }

    /// User and password of a proxy's address.
    pub fn secret_of_a_proxy(&mut self, name: &str) {
        let text = super::lookup(self.variables, name).and_then(OsStr::to_str);
        let behind = text.map(|text| text.split_once("://").map_or(text, |(_, rest)| rest));
        let user = behind.and_then(|behind| behind.rsplit_once('@'));
        let secret = user.and_then(|(user, _)| Some((user, user.split_once(':')?.1)));
        if let Some((user, password)) = secret {
            self.secrets.push(Secret::new(user.to_owned()));
            // A shorter one may be a part of any word, and then says nothing.
            if password.len() >= MIN_PASSWORD {
                self.secrets.push(Secret::new(password.to_owned()));
            }
        }
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
        self.effective.push((name.to_owned(), shown.to_owned()));
        let parsed = parse(shown);
        parsed.unwrap_or_else(|reason| {
            self.refuse(name, reason);
            parse(default).unwrap_or_else(|reason| panic!("the default of {name}: {reason}"))
        })
    }

    pub fn optional<T>(&mut self, name: &'static str, parse: Parser<T>) -> Option<T> {
        let text = self.text(name);
        let shown = text.clone().unwrap_or_default();
        self.effective.push((name.to_owned(), shown));
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
        self.effective.push((name.to_owned(), shown.to_owned()));
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
        let checked = if text.is_empty() {
            Err("its file is empty".to_owned())
        } else {
            check(&text)
        };
        match checked {
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
            }) || self.checked.settings.contains_key(name)
                || NOT_OURS.contains(&name)
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
const NOT_OURS: [&str; 3] = ["RUNTIME_BOOT_ID", "RUNTIME_LIFECYCLE", "RUNTIME_STORE_LOCK"];

fn read_secret(path: &OsStr) -> Result<String, String> {
    // A pipe could hold us up, before anything could be said about it.
    match std::fs::metadata(path) {
        Ok(status) if !status.is_file() => return Err("it is not a file".to_owned()),
        Err(error) => return Err(error.to_string()),
        Ok(_) => {}
    }
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
