//! Every reader of bytes that somebody else may have written, as one function each: what the fuzz targets in `tests/fuzz/`
//! call. An assertion here is a promise to the rest of the program that holds for any input.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is how a broken promise is told"
)]

use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::api::places::Stage;
use crate::api::routes::Context;
use crate::api::server;
use crate::config::{Checked, Config, Variables};
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
