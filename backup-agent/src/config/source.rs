//! Where settings come from: one method for each kind of value, each noting what is wrong and going on, so that every bad
//! setting is reported at once. The longest of them, where a store is, has a file of its own.

use std::{ffi::OsString, fmt, num::NonZeroU64, path::PathBuf, time::Duration};

use nix::unistd::{Gid, Uid, User};

use super::parse_duration;
use crate::{
    cli::Backup,
    snapshot::retention::Policy,
    tree::{exclude::Excludes, freeze::Freezer, identity::Identity},
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
    let uid = Uid::from_raw(uid.parse().ok()?);
    let gid = match gid {
        Some(gid) => Gid::from_raw(gid.parse().ok()?),
        None => match User::from_uid(uid) {
            Ok(Some(user)) => user.gid,
            _ => Gid::from_raw(uid.as_raw()),
        },
    };
    Some(Identity { uid, gid })
}

/// The longest stop of the gateway unless told otherwise: nobody notices it in a conversation.
const MAX_PAUSE: Duration = Duration::from_millis(250);

/// The environment, and what was found wrong with it.
pub struct Source<'a> {
    pub env: &'a dyn Fn(&str) -> Option<OsString>,
    pub problems: Vec<String>,
    /// Of every store that is named.
    pub bandwidth: Option<NonZeroU64>,
}

impl Source<'_> {
    pub fn reject(&mut self, name: &str, reason: impl fmt::Display) {
        let problem = format!("cannot use {name}: {reason}");
        // The store and what is imported may share what they lack.
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// The variable's text; set to nothing is as good as unset.
    pub fn text(&mut self, name: &str) -> Option<String> {
        let Ok(text) = (self.env)(name)?.into_string() else {
            self.reject(name, "it is not valid UTF-8");
            return None;
        };
        Some(text).filter(|text| !text.is_empty())
    }

    pub fn duration(&mut self, name: &str, text: Option<&str>, default_secs: u64) -> Duration {
        let text = text.map(str::to_owned).or_else(|| self.text(name));
        let Some(text) = text else {
            return Duration::from_secs(default_secs);
        };
        match parse_duration(&text) {
            Some(duration) if !duration.is_zero() => duration,
            _ => {
                self.reject(
                    name,
                    format_args!("{text:?} is not a duration such as 500ms, 30s, 5m or 2h"),
                );
                Duration::ZERO
            }
        }
    }

    pub fn directory(&mut self, name: &str, flag: Option<&String>, default: &str) -> PathBuf {
        let path = flag
            .cloned()
            .or_else(|| self.text(name))
            .unwrap_or_else(|| default.to_owned());
        let path = PathBuf::from(path);
        if !path.is_absolute() || path.parent().is_none() {
            self.reject(
                name,
                format_args!("{} must be an absolute path below /", path.display()),
            );
        }
        path
    }

    pub fn instance(&mut self, flag: Option<&String>) -> String {
        let id = flag
            .cloned()
            .or_else(|| self.text("RUNTIME_INSTANCE_ID"))
            .unwrap_or_else(|| "local".to_owned());
        let is_known =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if id.is_empty() || id.len() > 63 || !id.bytes().all(is_known) {
            self.reject(
                "RUNTIME_INSTANCE_ID",
                format_args!("{id:?} must be 1 to 63 of a-z, 0-9 and -"),
            );
        }
        id
    }

    pub fn boot_id(&mut self) -> Option<String> {
        let id = self.text("RUNTIME_BOOT_ID")?;
        if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            self.reject("RUNTIME_BOOT_ID", "must be 32 hexadecimal digits");
        }
        Some(id)
    }

    pub fn identity(&mut self) -> Option<Identity> {
        let wanted = self.text("RUNTIME_GATEWAY_USER");
        if !Uid::effective().is_root() {
            return None;
        }
        let name = wanted.as_deref().unwrap_or("openclaw");
        match User::from_name(name) {
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
                        format_args!("there is no user {name:?}"),
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
        is_runtime: bool,
        identity: Option<Identity>,
    ) -> Option<Freezer> {
        let limit = self.pause(options.max_pause.as_deref());
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

    fn pause(&mut self, flag: Option<&str>) -> Option<Duration> {
        const NAME: &str = "RUNTIME_MAX_PAUSE";
        let text = flag.map(str::to_owned).or_else(|| self.text(NAME));
        let pause = match text.as_deref() {
            None => Some(MAX_PAUSE),
            Some("0") => Some(Duration::ZERO),
            Some(text) => parse_duration(text),
        };
        if pause.is_none() {
            let text = text.unwrap_or_default();
            self.reject(
                NAME,
                format_args!("{text:?} is neither a duration such as 250ms nor 0"),
            );
        }
        pause
    }

    pub fn excludes(&mut self) -> Excludes {
        let extra = self.text("RUNTIME_EXCLUDE").unwrap_or_default();
        Excludes::new(&extra).unwrap_or_else(|problem| {
            self.reject("RUNTIME_EXCLUDE", problem);
            Excludes::default()
        })
    }

    pub fn retention(&mut self) -> Policy {
        let text = self.text("RUNTIME_RETENTION");
        let text = text.as_deref().unwrap_or(Policy::DEFAULT);
        Policy::parse(text).unwrap_or_else(|| {
            let reason = format_args!("{text:?} is not a list such as {}", Policy::DEFAULT);
            self.reject("RUNTIME_RETENTION", reason);
            Policy::default()
        })
    }
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
    }
}
