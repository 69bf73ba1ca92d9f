//! `check`: the settings in force. That they are good was found out when they were read; the store is not asked.

use serde_json::{Map, Value, json};

use super::Answer;
use crate::config::Config;

/// Shows every setting as used, secrets redacted.
pub fn run(config: &Config) -> Answer {
    let mut settings = config.effective.clone();
    settings.sort_unstable();
    settings.dedup();
    let lines = settings
        .iter()
        .map(|(name, value)| format!("{name}={value}\n"));
    let text = lines.collect();
    let object: Map<String, Value> = settings
        .into_iter()
        .map(|(name, value)| (name, value.into()))
        .collect();
    Answer::new(text, json!({ "settings": object }))
}
