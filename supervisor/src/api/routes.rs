//! What each request does. The token comes before everything: a stranger learns nothing about paths or methods.

use std::pin::Pin;
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
use super::paths::{Route, route};
use super::places::{Stage, Waiting};
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
    config: Arc<Config>,
    status: watch::Receiver<Status>,
    events: Events,
    approvals: Approvals,
    booted: Instant,
    refusals: Mutex<Refusals>,
    known: Mutex<Option<Known>>,
    waiting: Waiting<{ Route::COUNT }>,
}

impl Context {
    /// Of a runtime that boots now, and has this many places for connections.
    pub fn new(
        config: Arc<Config>,
        status: watch::Receiver<Status>,
        events: Events,
        places: usize,
    ) -> Self {
        Self {
            config,
            status,
            events,
            approvals: Approvals::default(),
            booted: Instant::now(),
            refusals: Mutex::default(),
            known: Mutex::default(),
            waiting: Waiting::new(places),
        }
    }
}

/// The last answer to `GET /v1/status`. It is the same for a second, unless another status is published.
struct Known {
    version: u64,
    uptime_seconds: u64,
    body: Bytes,
}

/// Requests without a token that no line has told of yet, and when the last line was.
#[derive(Default)]
struct Refusals {
    count: u64,
    told: Option<Instant>,
}

/// What becomes of a request.
pub enum Handled {
    /// It needs no more than a look at what is known here.
    Now(Answer),
    /// It goes on when its caller hangs up.
    Later(Pin<Box<dyn Future<Output = Answer> + Send>>),
}

/// Nothing of a request is logged but method, pattern of the path, status and time; of one without the token, that it came.
pub fn handle(context: Arc<Context>, request: Request<Incoming>, stage: &Stage) -> Handled {
    if !auth::is_authorized(request.headers(), &context.config.service_token) {
        refused(&context.refusals);
        return Handled::Now(Problem::Unauthorized.answer());
    }
    stage.begin();
    let begun = Instant::now();
    let method = known(request.method());
    let route = route(request.uri().path());
    let pattern = route.as_ref().map_or("none", Route::pattern);
    let route = route.and_then(|route| allowed(route, request.method()));
    let told = move |answer: Answer| {
        tell(method, pattern, answer.status(), begun);
        answer
    };
    match route {
        Ok(Route::Status) if request.body().is_end_stream() => {
            Handled::Now(told(status(&context, begun)))
        }
        Ok(route) => match context.waiting.take(route.number()) {
            Some(place) => Handled::Later(Box::pin(async move {
                let answer = answer(&context, route, request.into_body()).await;
                drop(place);
                told(answer.unwrap_or_else(|problem| problem.answer()))
            })),
            None => Handled::Now(told(Problem::Busy.answer())),
        },
        Err(problem) => Handled::Now(told(problem.answer())),
    }
}

fn tell(method: &str, pattern: &str, status: StatusCode, begun: Instant) {
    let status = status.as_u16();
    let duration_ms = || begun.elapsed().as_secs_f64() * 1000.0;
    // Whoever watches asks for the status every few seconds.
    if method == "GET" {
        log!(
            Debug,
            "request",
            method = method,
            route = pattern,
            status = status,
            duration_ms = duration_ms()
        );
    } else {
        log!(
            Info,
            "request",
            method = method,
            route = pattern,
            status = status,
            duration_ms = duration_ms()
        );
    }
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

/// The route, if it takes this method.
fn allowed(route: Route, method: &Method) -> Result<Route, Problem> {
    let allowed = match route {
        Route::Status | Route::Devices => "GET",
        Route::Restart | Route::Backup | Route::Approve(_) => "POST",
    };
    if method.as_str() == allowed {
        Ok(route)
    } else {
        Err(Problem::MethodNotAllowed(allowed))
    }
}

async fn answer(context: &Context, route: Route, unread: Incoming) -> Result<Answer, Problem> {
    discard_body(unread).await?;
    let config = &context.config;
    match route {
        Route::Status => Ok(status(context, Instant::now())),
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
            let body = Box::pin(devices::list(config)).await?;
            Ok(rendered(StatusCode::OK, body))
        }
        Route::Approve(request) => {
            must_run(context)?;
            let body = Box::pin(devices::approve(config, &context.approvals, &request)).await?;
            Ok(rendered(StatusCode::OK, body))
        }
    }
}

/// The answer is made anew when a second has passed or another status was published.
fn status(context: &Context, now: Instant) -> Answer {
    let uptime_seconds = (now - context.booted).as_secs();
    let status = context.status.borrow();
    let mut known = context.known.lock().unwrap_or_else(PoisonError::into_inner);
    let is_this =
        |known: &Known| (known.version, known.uptime_seconds) == (status.version, uptime_seconds);
    let known = match known.take().filter(is_this) {
        Some(same) => known.insert(same),
        None => known.insert(Known {
            version: status.version,
            uptime_seconds,
            body: body(status.render(&context.config, uptime_seconds)),
        }),
    };
    rendered(StatusCode::OK, known.body.clone())
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
