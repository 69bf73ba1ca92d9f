//! What goes wrong between an agent and its store, chosen by a seed and noted for whoever judges the outcome.

use std::sync::{Arc, Mutex};

use crate::proxy::Proxy;
use crate::s3::{Effect, Kind};
use crate::seeds::Choices;

const fn status(status: u16, code: &'static str) -> Effect {
    Effect::Status {
        status,
        code,
        retry_after: None,
    }
}

const fn busy(status: u16, code: &'static str) -> Effect {
    Effect::Status {
        status,
        code,
        retry_after: Some(1),
    }
}

/// Faults that another try may mend.
const PASSING: [Effect; 13] = [
    status(500, "InternalError"),
    status(503, "SlowDown"),
    busy(503, "SlowDown"),
    busy(429, "TooManyRequests"),
    Effect::ResetBefore,
    Effect::ResetInBody,
    Effect::ResetAfter,
    Effect::Truncate,
    Effect::LoseAnswer,
    Effect::WrongContent,
    Effect::WrongUpload,
    Effect::WrongTag,
    Effect::Slow,
];
/// Faults that end a run.
pub const FINAL: [Effect; 4] = [
    status(403, "RequestTimeTooSkewed"),
    status(403, "ExpiredToken"),
    status(307, "TemporaryRedirect"),
    status(301, "PermanentRedirect"),
];
/// Faults that take a run's whole time.
const STALLS: [Effect; 3] = [Effect::Stall, Effect::StallInBody, Effect::StallAfter];

/// Whether it makes sense there. A listing has no checksum, so nobody can tell an altered one; transport security does.
fn is_possible(effect: Effect, kind: Kind, is_real: bool) -> bool {
    match effect {
        Effect::WrongContent => kind == Kind::Get,
        // The real server of the tests does not compare Content-MD5, as every other one does.
        Effect::WrongUpload => matches!(kind, Kind::Put | Kind::Part) && !is_real,
        Effect::WrongTag => matches!(kind, Kind::Get | Kind::Put),
        _ => true,
    }
}

/// What went wrong with the requests of one run.
pub type Faults = Arc<Mutex<Vec<(Effect, Kind, String)>>>;

/// Chooses what goes wrong, and notes it.
pub fn misbehave(proxy: &Proxy, choices: &mut Choices, one_in: u64, is_real: bool) -> Faults {
    let faults = Faults::default();
    let mut choices = Choices::new(choices.number());
    let note = Arc::clone(&faults);
    proxy.plan(move |kind, key| {
        // The one write that can be taken for somebody else's.
        let is_head = kind == Kind::Put && key.ends_with("head.json");
        if !choices.once_in(if is_head { 2 } else { one_in }) {
            return None;
        }
        let effect = match choices.below(20) {
            0 => *choices.one_of(&FINAL),
            1 => *choices.one_of(&STALLS),
            _ => *choices.one_of(&PASSING),
        };
        if !is_possible(effect, kind, is_real) {
            return None;
        }
        let mut noted = note.lock().expect("nobody panics with it");
        noted.push((effect, kind, key.to_owned()));
        Some(effect)
    });
    faults
}
