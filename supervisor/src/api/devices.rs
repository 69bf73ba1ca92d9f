//! The gateway's paired devices and pairing requests, by its own protocol.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::envelope::Problem;
use crate::config::Config;
use crate::gateway::rpc::{self, RpcError};
use crate::log::log;
use crate::secret::Secrets;

/// Approvals that are remembered. Pairing requests live for five minutes, so this is far more than can be repeated.
const MAX_APPROVALS: usize = 256;

/// A field is dropped when its name has one of these in it, whatever its case.
const SECRET_NAMES: [&str; 4] = ["token", "secret", "password", "privatekey"];

/// What this boot has approved, newest last. The gateway forgets a request once it is approved, and the list of paired
/// devices does not name it: only memory tells "already approved" from "never heard of".
#[derive(Default)]
pub struct Approvals(Mutex<VecDeque<(String, Value)>>);

impl Approvals {
    fn get(&self, request: &str) -> Option<Value> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, device) = known.iter().find(|(id, _)| id == request)?;
        Some(device.clone())
    }

    fn add(&self, request: &str, device: Value) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() == MAX_APPROVALS {
            known.pop_front();
        }
        known.push_back((request.to_owned(), device));
    }
}

pub async fn list(config: &Config) -> Result<Value, Problem> {
    let answer = rpc::call(config, "device.pair.list", json!({})).await;
    let mut lists = answer.map_err(|error| problem(&error, &config.secrets))?;
    let mut entries = |name: &str| match lists[name].take() {
        Value::Array(entries) => entries.into_iter().map(without_secrets).collect(),
        _ => Vec::new(),
    };
    Ok(json!({ "pending": entries("pending"), "paired": entries("paired") }))
}

pub async fn approve(
    config: &Config,
    approvals: &Approvals,
    request: &str,
) -> Result<Value, Problem> {
    let params = json!({ "requestId": request });
    let device = match rpc::call(config, "device.pair.approve", params).await {
        Ok(mut answer) => {
            let device = without_secrets(answer["device"].take());
            approvals.add(request, device.clone());
            log!(Info, "device approved");
            device
        }
        Err(error) if is_unknown(&error) => {
            approvals.get(request).ok_or(Problem::UnknownRequest)?
        }
        Err(error) => return Err(problem(&error, &config.secrets)),
    };
    Ok(json!({ "approved": true, "requestId": request, "device": device }))
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

/// Drops every field whose name says that it holds a secret, however deep.
fn without_secrets(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(name, _)| !is_secret(name))
            .map(|(name, value)| (name, without_secrets(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_secrets).collect(),
        other => other,
    }
}

fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_dropped_at_any_depth() {
        let device = json!({
            "deviceId": "d", "publicKey": "k", "tokens": [{ "role": "x" }],
            "meta": [{ "authToken": "t", "name": "n", "clientSecret": "s" }],
        });
        let clean = json!({ "deviceId": "d", "publicKey": "k", "meta": [{ "name": "n" }] });
        assert_eq!(without_secrets(device), clean);
    }

    #[test]
    fn approvals_are_remembered_up_to_a_bound() {
        let approvals = Approvals::default();
        for number in 0..=MAX_APPROVALS {
            approvals.add(&number.to_string(), json!(number));
        }
        assert_eq!(approvals.get("0"), None);
        assert_eq!(approvals.get("1"), Some(json!(1)));
    }
}
