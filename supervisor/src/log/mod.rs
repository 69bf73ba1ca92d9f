//! Logs: one JSON object per line on standard error, one line per change of state.
//!
//! A message is constant; what varies is in the fields. PID 1 does not die of a full disk or a closed pipe, and waits for no
//! reader. Nothing passed in here may hold a secret; text that others wrote goes through `Secrets::scrub` first.

mod relay;
pub mod shape;
mod sink;
mod tail;
pub mod terminal;

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::SystemTime;

use serde_json::Value;

use crate::clock;
pub use relay::Relay;
use sink::Piece;
pub use sink::{Source, flush, stderr, stdout};
pub use tail::{SHOWN, Tail};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl Level {
    pub const ALL: [Self; 4] = [Self::Error, Self::Warn, Self::Info, Self::Debug];

    pub fn word(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        }
    }
}

static LEVEL: AtomicU8 = AtomicU8::new(Level::Info as u8);

pub fn set_level(level: Level) {
    LEVEL.store(level as u8, Ordering::Relaxed);
}

/// Whether lines of this level are written.
pub fn is_on(level: Level) -> bool {
    level as u8 <= LEVEL.load(Ordering::Relaxed)
}

/// Writes one line. Use it through `log!`.
pub fn write(level: Level, message: &'static str, fields: &[(&'static str, Value)]) {
    say(line(SystemTime::now(), level, message, fields));
}

/// Writes a line that is not JSON: why the supervisor cannot start.
pub fn say(line: String) {
    stderr().push(Piece::ours(line));
}

fn line(
    at: SystemTime,
    level: Level,
    message: &'static str,
    fields: &[(&'static str, Value)],
) -> String {
    use std::fmt::Write as _;

    let mut line = format!(
        r#"{{"ts":"{}","level":"{}","msg":{}"#,
        clock::rfc3339(at),
        level.word(),
        Value::from(message)
    );
    for (name, value) in fields {
        let _ = write!(line, r#","{name}":{value}"#);
    }
    line.push_str("}\n");
    one_line(line)
}

/// JSON leaves characters as they are that some readers take for the end of a line, or that change how it is shown.
fn one_line(line: String) -> String {
    use std::fmt::Write as _;

    let is_odd = |c: char| {
        matches!(c, '\u{80}'..='\u{9f}' | '\u{2028}' | '\u{2029}') || terminal::is_invisible(c)
    };
    if !line.contains(is_odd) {
        return line;
    }
    let mut escaped = String::with_capacity(line.len());
    for c in line.chars() {
        if is_odd(c) {
            let _ = write!(escaped, "\\u{:04x}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// `log!(Warn, "child exited", pid = 42)`; the fields are made only where the line is written.
macro_rules! log {
    ($level:ident, $message:literal $(, $name:ident = $value:expr)* $(,)?) => {
        if $crate::log::is_on($crate::log::Level::$level) {
            $crate::log::write(
                $crate::log::Level::$level,
                $message,
                &[$((stringify!($name), serde_json::Value::from($value))),*],
            );
        }
    };
}
pub(crate) use log;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_json_object_in_a_fixed_order() {
        let text = line(
            SystemTime::UNIX_EPOCH,
            Level::Warn,
            "child exited",
            &[
                ("pid", 42.into()),
                ("signal", "a\n\"b\u{2028}\u{202e}".into()),
            ],
        );
        assert_eq!(
            text,
            "{\"ts\":\"1970-01-01T00:00:00.000Z\",\"level\":\"warn\",\"msg\":\"child exited\",\"pid\":42,\"signal\":\"a\\n\\\"b\\u2028\\u202e\"}\n"
        );
    }
}
