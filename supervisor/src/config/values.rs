//! What a value of each kind looks like, and the half sentence for one that does not. How it is written where something is
//! is told by `locations`.

use std::fmt;
use std::time::Duration;

use nix::sys::resource::Resource;

use crate::gateway::process::User;
use crate::log::Level;
use crate::secret::MAX_TOKEN;

/// Longer waits are mistakes, and would overflow clocks.
const MAX_DURATION: Duration = Duration::from_hours(365 * 24);

/// Backups more often than this would never let the machine rest.
const MIN_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    pub resource: Resource,
    pub value: u64,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = LIMITS.iter().find(|(_, known)| *known == self.resource);
        let (name, _) = name.unwrap_or(&LIMITS[0]);
        write!(f, "{name}={}", self.value)
    }
}

const LIMITS: [(&str, Resource); 3] = [
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("as", Resource::RLIMIT_AS),
];

/// More would only repeat themselves.
const MOST_LIMITS: usize = 16;

pub fn service_token(text: &str) -> Result<(), String> {
    if text.len() < 32 || text.len() > MAX_TOKEN {
        return Err(format!("it must have 32 to {MAX_TOKEN} characters"));
    }
    credential(text)
}

pub fn credential(text: &str) -> Result<(), String> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err("it must be printable ASCII without spaces".to_owned())
    }
}

pub fn word(text: &str) -> Result<String, String> {
    if text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(text.to_owned())
    } else {
        Err(format!(
            "{text:?} is not one word of at most 64 ASCII characters"
        ))
    }
}

/// The user `openclaw` when there is one and we may change to it, else whoever we are.
pub fn default_user() -> String {
    let is_root = nix::unistd::geteuid().is_root();
    if is_root && matches!(nix::unistd::User::from_name("openclaw"), Ok(Some(_))) {
        "openclaw".to_owned()
    } else {
        User::caller().name
    }
}

pub fn user(text: &str) -> Result<User, String> {
    let user = User::find(text).ok_or_else(|| {
        format!("{text:?} is neither a user of this system nor a number such as 1000 or 1000:1000")
    })?;
    let caller = User::caller();
    if nix::unistd::geteuid().is_root() || user.uid == caller.uid {
        Ok(user)
    } else {
        Err(format!(
            "only root can run the gateway as {text:?}; this is {:?}",
            caller.name
        ))
    }
}

pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_lowercase());
    let milliseconds = match &text[digits.len()..] {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60_000),
        "h" => Some(3_600_000),
        "" if digits == "0" => Some(0),
        _ => None,
    };
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    milliseconds
        .filter(|_| is_number)
        .and_then(|unit: u64| digits.parse::<u64>().ok()?.checked_mul(unit))
        .map(Duration::from_millis)
        .filter(|duration| *duration <= MAX_DURATION)
        .ok_or_else(|| format!("{text:?} is not a duration such as 500ms, 30s, 5m or 2h"))
}

pub fn positive(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("it must be longer than 0".to_owned()),
        duration => Ok(duration),
    }
}

pub fn interval(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        duration if duration.is_zero() || duration >= MIN_INTERVAL => Ok(duration),
        _ => Err("it must be 0 (off) or at least 1s".to_owned()),
    }
}

pub fn hold(text: &str) -> Result<bool, String> {
    match text {
        "hold" => Ok(true),
        "start" => Ok(false),
        _ => Err(format!("{text:?} is neither hold nor start")),
    }
}

pub fn limits(text: &str) -> Result<Vec<Limit>, String> {
    let limit = |part: &str| {
        let (name, value) = part.split_once('=')?;
        let (_, resource) = *LIMITS.iter().find(|(known, _)| *known == name)?;
        let value = quantity(value)?;
        Some(Limit { resource, value })
    };
    text.split(',')
        .map(limit)
        .collect::<Option<Vec<_>>>()
        .filter(|limits| limits.len() <= MOST_LIMITS)
        .ok_or_else(|| format!("{text:?} is not a list such as nofile=65536,nproc=4096,as=4G"))
}

/// A number, in powers of 1024 with K, M or G.
fn quantity(text: &str) -> Option<u64> {
    let (digits, unit) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 1 << 10),
        Some(digits) if text.ends_with('M') => (digits, 1 << 20),
        Some(digits) => (digits, 1 << 30),
        None => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

pub fn level(text: &str) -> Result<Level, String> {
    Level::ALL
        .into_iter()
        .find(|level| level.word() == text)
        .ok_or_else(|| format!("{text:?} is none of error, warn, info and debug"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, milliseconds) in [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("0", 0)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)));
        }
        for text in [
            "",
            "5",
            "s",
            "-1s",
            "1.5s",
            "1 s",
            "5min",
            "99999999999h",
            "+5s",
            "1d",
        ] {
            assert!(duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn limits_are_numbers_with_binary_units() {
        let parsed = limits("nofile=65536,as=4G").expect("is well formed");
        assert_eq!(parsed[0].value, 65_536);
        assert_eq!(parsed[1].value, 4 << 30);
        for text in [
            "",
            "nofile",
            "nofile=",
            "core=1",
            "as=4T",
            "nofile=1,",
            "as=99999999999999G",
        ] {
            assert!(limits(text).is_err(), "{text:?}");
        }
    }
}
