//! Log lines: one JSON object each on standard error, constant message first, facts as fields.

use std::{
    io::Write,
    sync::atomic::{AtomicU8, Ordering},
};

use serde_json::{Map, Value};

use crate::progress;

/// Severity, in the order in which `RUNTIME_LOG` cuts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

impl Level {
    const NAMES: [(&'static str, Self); 4] = [
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
    ];

    /// The level of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, level)| *level)
    }

    fn name(self) -> &'static str {
        Self::NAMES[self as usize].0
    }
}

static LIMIT: AtomicU8 = AtomicU8::new(Level::Info as u8);

/// Drops every line above this level from now on.
pub fn set_limit(level: Level) {
    LIMIT.store(level as u8, Ordering::Relaxed);
}

/// Writes one line. A standard error that is gone is no reason to fail.
pub fn write(level: Level, msg: &str, fields: &[(&str, Value)]) {
    if level as u8 <= LIMIT.load(Ordering::Relaxed) {
        print(level, msg, fields);
    }
}

/// How far the work is, for the supervisor to show: a result rather than a record, so no level drops it.
pub fn progress(what: &'static str, done: u64, total: u64, rate: u64) {
    let fields = [
        ("work", what.into()),
        ("doneBytes", done.into()),
        ("totalBytes", total.into()),
        ("bytesPerSecond", rate.into()),
    ];
    print(Level::Info, "progress", &fields);
}

fn print(level: Level, msg: &str, fields: &[(&str, Value)]) {
    let mut line = Map::new();
    line.insert("ts".into(), crate::snapshot::id::now().1.into());
    line.insert("level".into(), level.name().into());
    line.insert("msg".into(), msg.into());
    for (name, value) in fields {
        line.insert((*name).into(), value.clone());
    }
    progress::beside(|| {
        let _ = writeln!(std::io::stderr(), "{}", Value::Object(line));
    });
}

/// A line that an operator should see.
pub fn warn(msg: &str, fields: &[(&str, Value)]) {
    write(Level::Warn, msg, fields);
}

/// A line about the normal course of things.
pub fn info(msg: &str, fields: &[(&str, Value)]) {
    write(Level::Info, msg, fields);
}

/// A line for whoever looks for a fault.
pub fn debug(msg: &str, fields: &[(&str, Value)]) {
    write(Level::Debug, msg, fields);
}
