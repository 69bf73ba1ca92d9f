//! The supervisor's settings, `NAME=value` for each variable, a line each. It has no library: its files are taken by their
//! paths.

#![no_main]
#![allow(dead_code, unused_imports, unused_macros)]

#[path = "../../../supervisor/src/clock.rs"]
mod clock;
#[path = "../../../supervisor/src/config/mod.rs"]
mod config;
#[path = "../../../supervisor/src/error.rs"]
mod error;
#[path = "../../../supervisor/src/log.rs"]
mod log;
#[path = "../../../supervisor/src/gateway/process.rs"]
mod process;
#[path = "../../../supervisor/src/secret.rs"]
mod secret;

mod gateway {
    pub(crate) use super::process;
}

/// Nothing else may look like it: whatever is made up could be shown in another place.
const TOKEN: &str = "a-token-of-the-fuzz-target-itself";

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let mut variables: config::Variables = text
        .lines()
        .filter_map(|line| line.split_once('='))
        // Whatever file somebody made up is not read.
        .filter(|(name, value)| !name.ends_with("_FILE") && !value.contains('\0'))
        .filter(|(name, _)| *name != "RUNTIME_SERVICE_TOKEN")
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    if text.contains(TOKEN) {
        return;
    }
    variables.push(("RUNTIME_SERVICE_TOKEN".into(), TOKEN.into()));
    if let Ok(config) = config::Config::read(&variables, Vec::new()) {
        let shown = |(_, value): &(&str, String)| value.contains(TOKEN);
        assert!(!config.effective.iter().any(shown), "a token is shown");
        assert!(!format!("{config:?}").contains(TOKEN), "a token is shown");
    }
});
