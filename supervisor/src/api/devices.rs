//! The gateway's paired devices and pairing requests, by its own protocol.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use hyper::body::Bytes;
use serde_json::json;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, timeout_at};

use super::envelope::{Problem, body_of};
use crate::config::Config;
use crate::gateway::rpc::{self, Call, RpcError, Size};
use crate::json::Json;
use crate::log::log;
use crate::secret::Secrets;

/// Approvals that are remembered. Pairing requests live for five minutes, so this is far more than can be repeated.
const MAX_APPROVALS: usize = 256;

/// What each of them and all of them together may take. A device takes less than a KiB.
const MAX_DEVICE: usize = 16 * 1024;
const MAX_DEVICES: usize = 256 * 1024;

/// Calls at once. Each may hold two MiB: a list as it came, and as it leaves.
const MAX_CALLS: usize = 4;

static CALLS: Semaphore = Semaphore::const_new(MAX_CALLS);

/// A field is dropped when its name has one of these in it, whatever its case and what is no letter or digit aside.
const SECRET_NAMES: [&str; 6] = [
    "token",
    "secret",
    "passw",
    "passphrase",
    "privatekey",
    "apikey",
];

/// What this boot has approved, newest last, with the device as JSON. The gateway forgets a request once it is approved, and
/// the list of paired devices does not name it: only memory tells "already approved" from "never heard of".
#[derive(Default)]
pub struct Approvals(Mutex<VecDeque<(String, Box<[u8]>)>>);

impl Approvals {
    fn get(&self, request: &str) -> Option<Box<[u8]>> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, device) = known.iter().find(|(id, _)| id == request)?;
        Some(device.clone())
    }

    fn add(&self, request: &str, device: &[u8]) {
        let is_kept = device.len() <= MAX_DEVICE;
        let device = if is_kept { device } else { b"{}" };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.push_back((request.to_owned(), device.into()));
        let size = |(id, device): &(String, Box<[u8]>)| id.len() + device.len();
        while known.len() > MAX_APPROVALS || known.iter().map(size).sum::<usize>() > MAX_DEVICES {
            known.pop_front();
        }
    }
}

/// The body of the answer.
pub async fn list(config: &Config) -> Result<Bytes, Problem> {
    let call = Call {
        method: "device.pair.list",
        params: json!({}),
        size: Size::Long,
        take: |lists| body_of(lists.raw().len(), |out| write_lists(lists, out)),
    };
    let (body, place) = in_turn(config, call).await?;
    let body = body.map_err(|error| problem(&error, &config.secrets))?;
    Ok(Bytes::from_owner(Held {
        body,
        _place: place,
    }))
}

/// Likewise.
pub async fn approve(
    config: &Config,
    approvals: &Approvals,
    request: &str,
) -> Result<Bytes, Problem> {
    let call = Call {
        method: "device.pair.approve",
        params: json!({ "requestId": request }),
        size: Size::Short,
        take: |answer| {
            let mut device = Vec::new();
            let found = answer.field("device").unwrap_or(Json::NULL);
            found.copy_without(is_secret, &mut device);
            device
        },
    };
    let (device, _) = in_turn(config, call).await?;
    let device = match device {
        Ok(device) => {
            approvals.add(request, &device);
            log!(Info, "device approved");
            device.into()
        }
        Err(error) if is_unknown(&error) => {
            approvals.get(request).ok_or(Problem::UnknownRequest)?
        }
        Err(error) => return Err(problem(&error, &config.secrets)),
    };
    let body = body_of(device.len(), |out| {
        let start = format!(
            r#"{{"approved":true,"requestId":{},"device":"#,
            json!(request)
        );
        out.extend_from_slice(start.as_bytes());
        out.extend_from_slice(&device);
        out.push(b'}');
    });
    Ok(body.into())
}

/// A body that keeps its call's place until it has left: whoever reads slowly holds no more than that place.
struct Held {
    body: Vec<u8>,
    _place: SemaphorePermit<'static>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

/// Waits for a place and makes the call, all of it within the time of one call.
async fn in_turn(
    config: &Config,
    call: Call,
) -> Result<(Result<Vec<u8>, RpcError>, SemaphorePermit<'static>), Problem> {
    let end = Instant::now() + rpc::TIME_LIMIT;
    let busy = "too many calls to the gateway are under way: try again later";
    let Ok(Ok(place)) = timeout_at(end, CALLS.acquire()).await else {
        return Err(Problem::GatewayUnavailable(busy.to_owned()));
    };
    let answer = timeout_at(end, rpc::call(config, call)).await;
    Ok((answer.unwrap_or(Err(RpcError::TimedOut)), place))
}

/// The two lists, whatever else the gateway says.
fn write_lists(lists: Json<'_>, out: &mut Vec<u8>) {
    for (start, name) in [
        (&b"{\"pending\":"[..], "pending"),
        (b",\"paired\":", "paired"),
    ] {
        out.extend_from_slice(start);
        match lists.field(name).filter(|list| list.is_array()) {
            Some(list) => list.copy_without(is_secret, out),
            None => out.extend_from_slice(b"[]"),
        }
    }
    out.push(b'}');
}

fn is_unknown(error: &RpcError) -> bool {
    matches!(error, RpcError::Refused { code, message }
        if code == "INVALID_REQUEST" && message.contains("unknown requestId"))
}

fn problem(error: &RpcError, secrets: &Secrets) -> Problem {
    let sentence = secrets.scrub(&error.to_string());
    match error {
        RpcError::TimedOut => Problem::Timeout(sentence),
        _ => Problem::GatewayUnavailable(sentence),
    }
}

pub fn is_secret(name: &str) -> bool {
    // The long s and the sign of kelvin are letters of ours in another case.
    let letters = name.chars().map(|c| match c {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    });
    let name: String = letters.filter(char::is_ascii_alphanumeric).collect();
    SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

/// What comes of an answer to `device.pair.list`; the fuzz target's way in.
pub fn lists_in(text: &str) -> Option<Vec<u8>> {
    let take = |lists: Json<'_>| {
        let mut out = Vec::new();
        write_lists(lists, &mut out);
        out
    };
    rpc::answer(text, "call", take).ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_dropped_at_any_depth() {
        let lists = r#"{"type":"res","id":"call","ok":true,"payload":{"paired":[{"deviceId":"d","tokens":[{"role":"x"}],
            "meta":[{"authToken":"t","name":"n","clientSecret":"s"}]}],"token":"t","pending":7}}"#;
        let clean = r#"{"pending":[],"paired":[{"deviceId":"d","meta":[{"name":"n"}]}]}"#;
        let lists = lists_in(lists).expect("is an answer");
        assert_eq!(std::str::from_utf8(&lists), Ok(clean));
    }

    #[test]
    fn names_are_secret_whatever_their_case() {
        for name in [
            "token",
            "authToken",
            "TOKENS",
            "PrivateKeyPem",
            "private_key",
            "to\u{212a}en",
            "\u{17f}ecret",
        ] {
            assert!(is_secret(name), "{name}");
        }
        for name in ["publicKey", "", "tok", "toke1n"] {
            assert!(!is_secret(name), "{name}");
        }
    }

    #[test]
    fn approvals_are_remembered_up_to_a_bound() {
        let approvals = Approvals::default();
        for number in 0..=MAX_APPROVALS {
            approvals.add(&number.to_string(), number.to_string().as_bytes());
        }
        assert_eq!(approvals.get("0"), None);
        assert_eq!(approvals.get("1").as_deref(), Some(&b"1"[..]));
    }

    #[test]
    fn large_devices_are_not_remembered_and_all_together_have_a_bound() {
        let approvals = Approvals::default();
        approvals.add("huge", &vec![b'x'; MAX_DEVICE + 1]);
        assert_eq!(approvals.get("huge").as_deref(), Some(&b"{}"[..]));
        for number in 0..MAX_APPROVALS {
            approvals.add(&number.to_string(), &vec![b'x'; MAX_DEVICE]);
        }
        let known = approvals.0.lock().expect("nobody panics with it");
        let size: usize = known.iter().map(|(_, device)| device.len()).sum();
        assert_eq!(size / MAX_DEVICE, MAX_DEVICES / MAX_DEVICE - 1);
        assert_eq!(known.back().map(|(id, _)| id.as_str()), Some("255"));
    }
}
