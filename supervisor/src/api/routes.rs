//! Which request means what. The token comes before everything: a stranger learns nothing about paths or methods.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as _, Bytes, Incoming};
use hyper::{Method, Request, StatusCode};
use serde_json::json;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, timeout};

use super::auth;
use super::devices::{self, Approvals};
use super::envelope::{Answer, Problem, body, rendered, success};
use super::places::Stage;
use crate::config::Config;
use crate::log::log;
use crate::owner::{Event, Events};
use crate::status::Status;

/// No request needs a body; one this small is read and forgotten.
const MAX_BODY: u64 = 16 * 1024;

const BODY_TIME_LIMIT: Duration = Duration::from_secs(10);

/// For the owner's own answers: it never waits, so this is only missed when something is broken.
const OWNER_TIME_LIMIT: Duration = Duration::from_secs(5);

/// Beyond the agent's own bound: its backstop and the exit.
const BACKUP_SLACK: Duration = Duration::from_secs(20);

/// Lines about requests without a token: one at once, then one for all that come within this.
const REFUSAL_INTERVAL: Duration = Duration::from_secs(1);

pub struct Context {
    pub config: Arc<Config>,
    pub status: watch::Receiver<Status>,
    pub events: Events,
    pub approvals: Approvals,
    pub booted: Instant,
    pub refusals: Mutex<Refusals>,
    pub known: Mutex<Option<Known>>,
}

/// The last answer to `GET /v1/status`. It is the same for a second, unless another status is published.
pub struct Known {
    version: u64,
    uptime_seconds: u64,
    body: Bytes,
}

/// Requests without a token that no line has told of yet, and when the last line was.
#[derive(Default)]
pub struct Refusals {
    count: u64,
    told: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum Route {
    Status,
    Restart,
    Backup,
    Devices,
    /// With the request id.
    Approve(String),
}

/// Nothing of a request is logged but method, pattern of the path, status and time; of one without the token, that it came.
pub async fn handle(context: Arc<Context>, request: Request<Incoming>, stage: Stage) -> Answer {
    if !auth::is_authorized(request.headers(), &context.config.service_token) {
        refused(&context.refusals);
        return Problem::Unauthorized.answer();
    }
    stage.begin();
    let begun = Instant::now();
    let method = known(request.method());
    let route = route(request.uri().path());
    let pattern = route.as_ref().map_or("none", Route::pattern);
    let answer = match answer(&context, route, request).await {
        Ok(answer) => answer,
        Err(problem) => problem.answer(),
    };
    let status = answer.status().as_u16();
    let duration_ms = begun.elapsed().as_secs_f64() * 1000.0;
    // Whoever watches asks for the status every few seconds.
    if method == "GET" {
        log!(
            Debug,
            "request",
            method = method,
            route = pattern,
            status = status,
            duration_ms = duration_ms
        );
    } else {
        log!(
            Info,
            "request",
            method = method,
            route = pattern,
            status = status,
            duration_ms = duration_ms
        );
    }
    answer
}

/// Whether the answer takes more than a look at what is known here.
pub fn waits(request: &Request<Incoming>) -> bool {
    request.uri().path() != "/v1/status"
}

/// A name that is nobody's own words.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        _ => "other",
    }
}

fn refused(refusals: &Mutex<Refusals>) {
    let mut refusals = refusals.lock().unwrap_or_else(PoisonError::into_inner);
    refusals.count += 1;
    let is_due = refusals
        .told
        .is_none_or(|told| told.elapsed() >= REFUSAL_INTERVAL);
    if is_due {
        log!(
            Warn,
            "request without a valid token",
            count = refusals.count
        );
        *refusals = Refusals {
            count: 0,
            told: Some(Instant::now()),
        };
    }
}

impl Route {
    fn pattern(&self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::Restart => "/v1/restart",
            Self::Backup => "/v1/backup",
            Self::Devices => "/v1/devices",
            Self::Approve(_) => "/v1/devices/{requestId}/approve",
        }
    }
}

async fn answer(
    context: &Context,
    route: Result<Route, Problem>,
    request: Request<Incoming>,
) -> Result<Answer, Problem> {
    let route = route?;
    let allowed = match route {
        Route::Status | Route::Devices => Method::GET,
        Route::Restart | Route::Backup | Route::Approve(_) => Method::POST,
    };
    if request.method() != allowed {
        let allow = if allowed == Method::GET {
            "GET"
        } else {
            "POST"
        };
        return Err(Problem::MethodNotAllowed(allow));
    }
    discard_body(request.into_body()).await?;
    let config = &context.config;
    match route {
        Route::Status => {
            let uptime_seconds = context.booted.elapsed().as_secs();
            let status = context.status.borrow();
            let mut known = context.known.lock().unwrap_or_else(PoisonError::into_inner);
            let is_this = |known: &Known| {
                (known.version, known.uptime_seconds) == (status.version, uptime_seconds)
            };
            let known = match known.take().filter(is_this) {
                Some(same) => known.insert(same),
                None => known.insert(Known {
                    version: status.version,
                    uptime_seconds,
                    body: body(status.render(config, uptime_seconds)),
                }),
            };
            Ok(rendered(StatusCode::OK, known.body.clone()))
        }
        Route::Restart => {
            let generation = ask(context, Event::Restart, OWNER_TIME_LIMIT).await??;
            let data = json!({ "message": "restarting", "generation": generation });
            Ok(success(StatusCode::ACCEPTED, data))
        }
        Route::Backup => {
            // It may have to wait for a scheduled run before its own.
            let limit = 2 * (config.backup_timeout + BACKUP_SLACK);
            let data = ask(context, Event::Backup, limit).await??;
            Ok(success(StatusCode::OK, data))
        }
        // In boxes: these are large, and every request would carry the room for them.
        Route::Devices => {
            must_run(context)?;
            Ok(success(
                StatusCode::OK,
                Box::pin(devices::list(config)).await?,
            ))
        }
        Route::Approve(request) => {
            must_run(context)?;
            let data = Box::pin(devices::approve(config, &context.approvals, &request)).await?;
            Ok(success(StatusCode::OK, data))
        }
    }
}

/// Sends the owner a command and waits for its answer, within a bound.
async fn ask<T>(
    context: &Context,
    command: impl FnOnce(oneshot::Sender<T>) -> Event,
    limit: Duration,
) -> Result<T, Problem> {
    let (reply, answer) = oneshot::channel();
    let is_gone = || Problem::GatewayUnavailable("the runtime is shutting down".to_owned());
    context.events.send(command(reply)).map_err(|_| is_gone())?;
    match timeout(limit, answer).await {
        Ok(answer) => answer.map_err(|_| is_gone()),
        Err(_) => Err(Problem::Timeout(
            "the operation did not finish in time".to_owned(),
        )),
    }
}

fn must_run(context: &Context) -> Result<(), Problem> {
    match context.status.borrow().gateway {
        "running" => Ok(()),
        status => Err(Problem::GatewayUnavailable(format!(
            "the gateway is not running but {status}"
        ))),
    }
}

async fn discard_body(body: Incoming) -> Result<(), Problem> {
    const TOO_LARGE: Problem = Problem::InvalidRequest("the body is larger than 16 KiB");
    if body.is_end_stream() {
        return Ok(());
    }
    if body.size_hint().lower() > MAX_BODY {
        return Err(TOO_LARGE);
    }
    let limit = usize::try_from(MAX_BODY).expect("16 KiB fit");
    match timeout(BODY_TIME_LIMIT, Limited::new(body, limit).collect()).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(TOO_LARGE),
        Ok(Err(_)) => Err(Problem::InvalidRequest("the body is malformed")),
        Err(_) => Err(Problem::InvalidRequest("the body did not arrive in time")),
    }
}

fn route(path: &str) -> Result<Route, Problem> {
    if !path.starts_with('/') || !is_well_escaped(path) {
        return Err(Problem::InvalidRequest("the path is malformed"));
    }
    match path {
        "/v1/status" => Ok(Route::Status),
        "/v1/restart" => Ok(Route::Restart),
        "/v1/backup" => Ok(Route::Backup),
        "/v1/devices" => Ok(Route::Devices),
        _ => path
            .strip_prefix("/v1/devices/")
            .and_then(|rest| rest.strip_suffix("/approve"))
            .filter(|id| !id.contains('/'))
            .ok_or(Problem::NotFound)
            .and_then(request_id)
            .map(Route::Approve),
    }
}

fn is_well_escaped(path: &str) -> bool {
    path.split('%').skip(1).all(|rest| {
        let digits = rest.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

/// The escapes in `segment`, which are well formed, are decoded: clients may escape the colon.
fn request_id(segment: &str) -> Result<String, Problem> {
    let mut parts = segment.split('%');
    let mut id = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (digits, rest) = part.split_at(2);
        let byte = u8::from_str_radix(digits, 16).unwrap_or_default();
        id.push(char::from(byte));
        id.push_str(rest);
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    if (1..=128).contains(&id.len()) && id.chars().all(fits) {
        Ok(id)
    } else {
        Err(Problem::InvalidRequest(
            "a request id has 1 to 128 letters, digits, dots, underscores, colons and dashes",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_literally() {
        assert_eq!(route("/v1/status"), Ok(Route::Status));
        for path in [
            "/",
            "/v1",
            "/v1/",
            "/v1/status/",
            "/v1//status",
            "/V1/status",
            "/v1/stat%75s",
            "/v2/status",
            "/v1/devices/",
            "/v1/devices/x",
            "/v1/devices/x/",
            "/v1/devices/x/approve/",
            "/v1/devices/x/y/approve",
            "/v1/devices/approve",
        ] {
            assert_eq!(route(path), Err(Problem::NotFound), "{path}");
        }
        for path in [
            "",
            "*",
            "v1/status",
            "/v1/%",
            "/v1/%4",
            "/v1/%zz",
            "/v1/status%",
        ] {
            assert!(
                matches!(route(path), Err(Problem::InvalidRequest(_))),
                "{path}"
            );
        }
    }

    #[test]
    fn request_ids_are_decoded_once_and_checked() {
        let id = |segment: &str| route(&format!("/v1/devices/{segment}/approve"));
        assert_eq!(id("a.B_9:-"), Ok(Route::Approve("a.B_9:-".into())));
        assert_eq!(id("a%3Ab"), Ok(Route::Approve("a:b".into())));
        assert!(id(&"x".repeat(128)).is_ok());
        for segment in [
            "",
            "a%2fb",
            "a%00",
            "a%20b",
            "a%253A",
            "%c3%a9",
            "a b",
            &"x".repeat(129),
        ] {
            assert!(
                matches!(id(segment), Err(Problem::InvalidRequest(_))),
                "{segment}"
            );
        }
    }
}
