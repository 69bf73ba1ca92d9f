//! Where settings come from: one method for each kind of value, each noting what is wrong and going on, so that every bad
//! setting is reported at once. The longest of them, where a store is, has a file of its own.

use std::{
    ffi::OsString,
    fmt,
    num::NonZeroU64,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use nix::unistd::{Gid, Uid, User};

use super::{parse_duration, places};
use crate::{
    cli::{Backup, Flags},
    log,
    snapshot::retention::Policy,
    tree::{exclude::Excludes, freeze::Freezer, identity::Identity, staging},
};

/// An identity to assume: root's own is none.
fn apart(identity: Identity) -> Option<Identity> {
    (!identity.uid.is_root()).then_some(identity)
}

/// A user by number, with an optional group as in `1000:1000`; it may have no name here.
fn by_number(text: &str) -> Option<Identity> {
    let (uid, gid) = text
        .split_once(':')
        .map_or((text, None), |(uid, gid)| (uid, Some(gid)));
    // The last number stands for nobody: calls that are given it change nothing.
    let number = |text: &str| text.parse().ok().filter(|number| *number != u32::MAX);
    let uid = Uid::from_raw(number(uid)?);
    let gid = match gid {
        Some(gid) => Gid::from_raw(number(gid)?),
        None => match User::from_uid(uid) {
            Ok(Some(user)) => user.gid,
            _ => Gid::from_raw(uid.as_raw()),
        },
    };
    Some(Identity { uid, gid })
}

/// The longest stop of the gateway unless told otherwise: nobody notices it in a conversation.
const MAX_PAUSE: &str = "250ms";

/// The environment, and what was found wrong with it.
pub struct Source<'a> {
    pub env: &'a dyn Fn(&str) -> Option<OsString>,
    pub problems: Vec<String>,
    /// Name and value of every setting as used, secrets redacted.
    pub effective: Vec<(String, String)>,
    /// Of every store that is named.
    pub bandwidth: Option<NonZeroU64>,
}

impl Source<'_> {
    pub fn reject(&mut self, name: &str, reason: impl fmt::Display) {
        let problem = places::sentence(name, &reason.to_string());
        // The store and what is imported may share what they lack.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// Takes note of a value that is used.
    pub fn note(&mut self, name: &str, value: impl Into<String>) {
        self.effective.push((name.to_owned(), value.into()));
    }

    /// The variable's text; set to nothing is as good as unset.
    pub fn text(&mut self, name: &str) -> Option<String> {
        let Ok(text) = (self.env)(name)?.into_string() else {
            self.reject(name, "it is not valid UTF-8");
            return None;
        };
        self.printable(name, text)
    }

    /// Unchanged. What has a line break is two values, or a file read with one too many.
    fn printable(&mut self, name: &str, text: String) -> Option<String> {
        if text.contains(char::is_control) {
            self.reject(name, "it has a line break or another control character");
            return None;
        }
        Some(text).filter(|text| !text.is_empty())
    }

    /// The text of the flag, of the variable, or the default, and which of the two to blame for it.
    fn given(
        &mut self,
        (flag, text): (&'static str, Option<&String>),
        name: &'static str,
        default: &str,
    ) -> (&'static str, String) {
        let (blamed, text) = match text {
            Some(text) => (flag, self.printable(flag, text.clone())),
            None => (name, self.text(name)),
        };
        let text = text.unwrap_or_else(|| default.to_owned());
        self.note(name, text.clone());
        (blamed, text)
    }

    pub fn level(&mut self) -> log::Level {
        const NAME: &str = "RUNTIME_LOG";
        let text = self.text(NAME).unwrap_or_else(|| "info".to_owned());
        let level = log::Level::parse(&text).unwrap_or_else(|| {
            let reason = format_args!("{text:?} is none of error, warn, info and debug");
            self.reject(NAME, reason);
            log::Level::Info
        });
        self.note(NAME, text);
        level
    }

    /// A bound of a verb.
    pub fn duration(&mut self, name: &'static str, default: &str) -> Duration {
        let text = self.text(name).unwrap_or_else(|| default.to_owned());
        self.note(name, text.clone());
        self.bound(name, &text)
    }

    pub fn bound(&mut self, name: &str, text: &str) -> Duration {
        let parsed = parse_duration(text).filter(|duration| !duration.is_zero());
        parsed.unwrap_or_else(|| {
            let reason = format_args!(
                "{text:?} is not a duration such as 500ms, 30s, 5m or 2h, longer than 0 and at most a year"
            );
            self.reject(name, reason);
            Duration::ZERO
        })
    }

    /// The name to blame and the path; `None` when it is none.
    pub fn directory(
        &mut self,
        flag: (&'static str, Option<&String>),
        name: &'static str,
        default: &str,
    ) -> Option<places::Named> {
        let (blamed, text) = self.given(flag, name, default);
        let path = self.plain(blamed, &text, &text)?;
        Some(places::Named { name: blamed, path })
    }

    /// An absolute path of plain names, so that comparing two of them means something.
    pub fn plain(&mut self, name: &str, shown: &str, path: &str) -> Option<PathBuf> {
        let path = Path::new(path);
        let mut names = path.components().skip(1).peekable();
        let is_plain = path.is_absolute()
            && names.peek().is_some()
            && names.all(|name| matches!(name, Component::Normal(_)));
        if !is_plain {
            let reason = format_args!(
                "{shown:?} is not an absolute path of a directory below /, without \"..\""
            );
            self.reject(name, reason);
            return None;
        }
        if path.iter().any(is_working) {
            self.reject(name, is_working_name());
            return None;
        }
        // The working folder of a restore is called after it: `.NAME.restoring`.
        let longest = 255 - 1 - staging::INSIDE.len();
        let length = path.file_name().map_or(0, std::ffi::OsStr::len);
        if length > longest || path.as_os_str().len() > LONGEST_PATH {
            let reason = format_args!(
                "its path or its last name is too long: {longest} bytes for a name, {LONGEST_PATH} for the path"
            );
            self.reject(name, reason);
            return None;
        }
        Some(path.components().collect())
    }

    /// Where to unpack to, as a person writes it.
    pub fn target(&mut self, target: &Path) -> Option<places::Named> {
        const NAME: &str = "--target";
        match std::path::absolute(target) {
            Ok(path) if path.iter().any(is_working) => {
                self.reject(NAME, is_working_name());
                None
            }
            Ok(path) => Some(places::Named { name: NAME, path }),
            Err(error) => {
                self.reject(NAME, format_args!("{}: {error}", target.display()));
                None
            }
        }
    }

    pub fn instance(&mut self, flags: &Flags) -> String {
        let flag = ("--instance", flags.instance.as_ref());
        let (blamed, id) = self.given(flag, "RUNTIME_INSTANCE_ID", "local");
        let is_known =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if id.is_empty() || id.len() > 63 || !id.bytes().all(is_known) {
            let reason =
                format_args!("{id:?} is not 1 to 63 of lower-case letters, digits and dashes");
            self.reject(blamed, reason);
        }
        id
    }

    /// The store's address, the name to blame for it, and whether anybody gave one.
    pub fn store(&mut self, flags: &Flags, state: &str) -> (&'static str, String, bool) {
        const NAME: &str = "RUNTIME_STORE";
        let is_given = flags.store.is_some() || self.text(NAME).is_some();
        let default = format!("file://{}/store", state.trim_end_matches('/'));
        let (blamed, url) = self.given(("--store", flags.store.as_ref()), NAME, &default);
        (blamed, url, is_given)
    }

    /// Where more certificate authorities are.
    pub fn note_authorities(&mut self) {
        const NAME: &str = "RUNTIME_CA_FILE";
        let path = self.text(NAME).or_else(|| self.text("SSL_CERT_FILE"));
        self.note(NAME, path.unwrap_or_default());
    }

    pub fn is_unfenced_allowed(&mut self) -> bool {
        const NAME: &str = "RUNTIME_STORE_UNFENCED";
        let text = self.text(NAME).unwrap_or_default();
        let is_allowed = text == "allow";
        if !is_allowed && !text.is_empty() {
            self.reject(NAME, format_args!("{text:?} is not allow"));
        }
        self.note(NAME, text);
        is_allowed
    }

    pub fn boot_id(&mut self) -> Option<String> {
        let id = self.text("RUNTIME_BOOT_ID")?;
        if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            self.reject("RUNTIME_BOOT_ID", "it is not 32 hexadecimal digits");
        }
        Some(id)
    }

    pub fn identity(&mut self) -> Option<Identity> {
        let wanted = self.text("RUNTIME_GATEWAY_USER");
        if !Uid::effective().is_root() {
            self.note("RUNTIME_GATEWAY_USER", wanted.unwrap_or_default());
            return None;
        }
        let name = wanted.as_deref().unwrap_or("openclaw");
        let found = User::from_name(name);
        let is_used = wanted.is_some() || matches!(found, Ok(Some(_)));
        self.note("RUNTIME_GATEWAY_USER", if is_used { name } else { "" });
        match found {
            Ok(Some(user)) => apart(Identity {
                uid: user.uid,
                gid: user.gid,
            }),
            Ok(None) if wanted.is_none() => None,
            Ok(None) => {
                let identity = by_number(name);
                if identity.is_none() {
                    self.reject(
                        "RUNTIME_GATEWAY_USER",
                        format_args!(
                            "{name:?} is neither a user of this system nor a number such as 1000 or 1000:1000"
                        ),
                    );
                }
                identity.and_then(apart)
            }
            Err(error) => {
                self.reject(
                    "RUNTIME_GATEWAY_USER",
                    format_args!("looking up {name:?} failed: {error}"),
                );
                None
            }
        }
    }

    /// Whom to stop for a snapshot: the gateway's own user when a runtime runs us, by hand whoever is named.
    pub fn freezer(
        &mut self,
        options: &Backup,
        limit: Option<Duration>,
        is_runtime: bool,
        identity: Option<Identity>,
    ) -> Option<Freezer> {
        let user = match &options.freeze_user {
            None => identity.filter(|_| is_runtime).map(|identity| identity.uid),
            Some(name) => {
                let known = User::from_name(name).ok().flatten().map(|user| user.uid);
                let uid = known.or_else(|| by_number(name).map(|identity| identity.uid));
                let other = uid.filter(|uid| *uid != Uid::current() && *uid != Uid::effective());
                if other.is_none() {
                    self.reject(
                        "--freeze-user",
                        format_args!("{name:?} must be a user here, and not the one who runs this"),
                    );
                }
                other
            }
        };
        let limit = limit.filter(|limit| !limit.is_zero())?;
        Some(Freezer { user: user?, limit })
    }

    /// The longest pause, which may be none.
    pub fn pause(&mut self, flag: Option<&String>) -> Option<Duration> {
        let (blamed, text) = self.given(("--max-pause", flag), "RUNTIME_MAX_PAUSE", MAX_PAUSE);
        let pause = match text.as_str() {
            "0" => Some(Duration::ZERO),
            text => parse_duration(text),
        };
        if pause.is_none() {
            let reason =
                format_args!("{text:?} is neither 0 nor a duration such as 250ms, at most a year");
            self.reject(blamed, reason);
        }
        pause
    }

    pub fn excludes(&mut self) -> Excludes {
        const NAME: &str = "RUNTIME_EXCLUDE";
        let extra = self.text(NAME).unwrap_or_default();
        let excludes = Excludes::new(&extra).unwrap_or_else(|problem| {
            self.reject(NAME, problem);
            Excludes::default()
        });
        self.note(NAME, extra);
        excludes
    }

    pub fn retention(&mut self) -> Policy {
        const NAME: &str = "RUNTIME_RETENTION";
        let text = self.text(NAME).unwrap_or_else(|| Policy::DEFAULT.into());
        let policy = Policy::parse(&text).unwrap_or_else(|| {
            let reason = format_args!("{text:?} is not a list such as {}", Policy::DEFAULT);
            self.reject(NAME, reason);
            Policy::default()
        });
        self.note(NAME, text);
        policy
    }
}

/// What the kernel takes as a path is 4,095 bytes; names of the agent's own files come behind it.
const LONGEST_PATH: usize = 3500;

fn is_working_name() -> String {
    let working = staging::INSIDE;
    format!(
        "names that end in {working} are those of a restore's working folders, which it removes"
    )
}

/// The name of a working folder.
fn is_working(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes()
        .ends_with(staging::INSIDE.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_may_be_a_number_without_a_name() {
        let identity = |uid, gid| {
            Some(Identity {
                uid: Uid::from_raw(uid),
                gid: Gid::from_raw(gid),
            })
        };
        assert_eq!(by_number("54321"), identity(54321, 54321));
        assert_eq!(by_number("54321:7"), identity(54321, 7));
        assert_eq!(apart(by_number("0:0").expect("two numbers")), None);
        assert_eq!(by_number("nobody-here"), None);
        assert_eq!(by_number("1:x"), None);
        assert_eq!(by_number("4294967295"), None);
    }
}
