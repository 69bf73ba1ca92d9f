//! Every reader of bytes that somebody else may have written, as one function each: what the fuzz targets in `tests/fuzz/`
//! call. An assertion here is a promise to the rest of the program that holds for any input.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is how a broken promise is told"
)]

use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::api::devices;
use crate::api::places::Stage;
use crate::api::routes::Context;
use crate::api::server;
use crate::config::{Checked, Config, Variables};
use crate::gateway::files;
use crate::json::Json;
use crate::log::shape;
use crate::status::Status;

/// Nothing else may look like it: whatever is made up could be shown in another place.
const TOKEN: &str = "a-token-of-the-fuzz-target-itself";

/// Bytes that are on their way between the two ends of a connection at most.
const ROOM: usize = 64 * 1024;

/// Settings, `NAME=value` for each variable, a line each.
pub fn settings(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if text.contains(TOKEN) {
        return;
    }
    let variables = text
        .lines()
        .filter_map(|line| line.split_once('='))
        // Whatever file somebody made up is not read.
        .filter(|(name, value)| !name.ends_with("_FILE") && !value.contains('\0'))
        .filter(|(name, _)| *name != "RUNTIME_SERVICE_TOKEN")
        .map(|(name, value)| (name.into(), value.into()));
    let mut variables: Variables = variables.collect();
    variables.push(("RUNTIME_SERVICE_TOKEN".into(), TOKEN.into()));
    let checked = Checked::default();
    if let Ok(config) = Config::read(&variables, Vec::new(), Vec::new(), &checked) {
        let shown = |(_, value): &(String, String)| value.contains(TOKEN);
        assert!(!config.effective.iter().any(shown), "a token is shown");
        assert!(!format!("{config:?}").contains(TOKEN), "a token is shown");
    }
}

/// What the gateway writes into the log.
pub fn lines(bytes: &[u8]) {
    let is_ours = |line: &str| {
        let read: Value = serde_json::from_str(line.trim_matches('\u{feff}')).unwrap_or_default();
        ["ts", "level", "msg"]
            .iter()
            .all(|key| read.get(key).is_some())
    };
    for line in bytes.split(|byte| *byte == b'\n') {
        let mut text = Vec::new();
        if shape::mark(line, false, &mut text) {
            text.splice(0..0, shape::MARK.iter().copied());
        }
        let shown = String::from_utf8_lossy(&text);
        assert!(!is_ours(&shown), "a line is taken for ours");
        let mut parts = shown.split(['\r', '\u{b}', '\u{c}', '\u{1e}', '\u{85}', '\u{2028}']);
        assert!(!parts.any(is_ours), "a part is taken for ours");
        let is_unmarked = !contains(&text, shape::MARK);
        assert!(!is_unmarked || text == line, "something else is changed");
    }
}

/// Everything that a client sends on one connection.
pub fn request(bytes: &[u8]) {
    let variables = vec![("RUNTIME_SERVICE_TOKEN".into(), TOKEN.into())];
    let config = Config::read(&variables, Vec::new(), Vec::new(), &Checked::default());
    let config = config.expect("the token is all that is needed");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("an event loop needs nothing here");
    let answer = runtime.block_on(converse(Arc::new(config), bytes));
    assert!(!contains(&answer, b"HTTP/1.1 500"), "a handler panicked");
    assert!(!contains(&answer, TOKEN.as_bytes()), "a token is shown");
    if !contains(bytes, TOKEN.as_bytes()) {
        assert!(!contains(&answer, b"HTTP/1.1 2"), "a stranger is served");
    }
    let is_enveloped = contains(&answer, b"\"ok\":");
    assert!(
        answer.is_empty() || is_enveloped,
        "an answer has no envelope"
    );
}

/// What the gateway answers to `device.pair.list`: what is passed on is what a parser that builds everything finds, and no
/// field of a secret.
pub fn lists(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let message = format!(r#"{{"type":"res","id":"call","ok":true,"payload":{text}}}"#);
    let passed_on = devices::lists_in(&message);
    if let Some(passed_on) = &passed_on {
        assert!(passed_on.len() <= text.len() + 32, "it became longer");
        let passed_on = std::str::from_utf8(passed_on).expect("it was text");
        assert!(Json::read(passed_on).is_some(), "it became malformed");
    }
    if let Ok(mut known) = serde_json::from_str::<Value>(text) {
        let mut list = |name: &str| match known.get_mut(name).map(Value::take) {
            Some(Value::Array(list)) => without_secrets(Value::Array(list)),
            _ => Value::Array(Vec::new()),
        };
        let known = json!({ "pending": list("pending"), "paired": list("paired") });
        let passed_on = passed_on.expect("it is well formed");
        let passed_on: Value = serde_json::from_slice(&passed_on).expect("all of it was read");
        assert_eq!(passed_on, known);
    }
}

fn without_secrets(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(name, _)| !devices::is_secret(name))
            .map(|(name, value)| (name, without_secrets(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_secrets).collect(),
        other => other,
    }
}

/// The gateway's configuration and its lock: what is found is what a parser that builds everything finds.
pub fn gateway_files(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (token, owner) = (files::token_in(text), files::owner_in(text, 1));
    if let Ok(known) = serde_json::from_str::<Value>(text) {
        let known_token = known["gateway"]["auth"]["token"].as_str();
        assert_eq!(
            token.as_deref(),
            known_token.filter(|token| !token.is_empty())
        );
        let known_owner = Value::from(known["ownerId"].as_str());
        let is_its = known["pid"].as_u64() == Some(1);
        assert_eq!(owner, is_its.then_some(known_owner));
    }
}

/// What comes back until the connection ends.
async fn converse(config: Arc<Config>, bytes: &[u8]) -> Vec<u8> {
    let (_published, status) = watch::channel(Status::boot());
    // Nobody takes commands: the runtime is as good as shutting down.
    let (events, _) = mpsc::unbounded_channel();
    let context = Context::new(config, status, events, server::MAX_CONNECTIONS);
    let place = Arc::new(Semaphore::new(1)).acquire_owned().await;
    let place = place.expect("it is never closed");
    let (client, server) = duplex(ROOM);
    let (_closing, closed) = watch::channel(());
    let serving = server::serve(
        server,
        Arc::new(context),
        closed,
        Stage::new(),
        server::HEAD_TIME_LIMIT,
        place,
    );
    let serving = tokio::spawn(serving);
    let (mut reading, mut writing) = tokio::io::split(client);
    let mut answer = Vec::new();
    let send = async {
        // It may hang up before it has heard all of it.
        let _ = writing.write_all(bytes).await;
        let _ = writing.shutdown().await;
    };
    let (_, ()) = tokio::join!(reading.read_to_end(&mut answer), send);
    let _ = serving.await;
    answer
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
