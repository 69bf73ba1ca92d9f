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

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    let variables: config::Variables = text
        .lines()
        .filter_map(|line| line.split_once('='))
        // Whatever file somebody made up is not read.
        .filter(|(name, value)| !name.ends_with("_FILE") && !value.contains('\0'))
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    if let Ok(config) = config::Config::read(&variables, Vec::new()) {
        let token = config.service_token.expose();
        assert!(token.len() >= 32);
        if text.matches(token).count() > 1 {
            // In the place of something that may be shown.
            return;
        }
        let shown = |(_, value): &(&str, String)| value.contains(token);
        assert!(!config.effective.iter().any(shown), "a token is shown");
        assert!(!format!("{config:?}").contains(token), "a token is shown");
    }
});
