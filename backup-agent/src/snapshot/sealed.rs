//! Small JSON objects that carry their own checksum: the last member is `sha256`, of every byte before its comma.

use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest, Sha256};

use crate::{error::Error, snapshot::id::hex};

const OPENING: &str = ",\"sha256\":\"";
const CLOSING: &str = "\"}\n";

/// Encodes an object (not another JSON value) with its checksum.
pub fn seal(object: &impl Serialize) -> Vec<u8> {
    let mut bytes =
        serde_json::to_vec(object).expect("records have string keys and no failing serializer");
    bytes.pop();
    close(bytes)
}

/// Puts the checksum behind an object that lacks its last brace.
pub fn close(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = hex(&Sha256::digest(&bytes));
    bytes.extend([OPENING, &sum, CLOSING].concat().into_bytes());
    bytes
}

/// Decodes an object after its checksum was found to be right.
pub fn open<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, Error> {
    let damaged = |reason: String| Error::Damaged {
        key: key.to_owned(),
        reason,
    };
    let body = bytes
        .strip_suffix(CLOSING.as_bytes())
        .and_then(|rest| rest.split_last_chunk::<64>())
        .and_then(|(rest, sum)| Some((rest.strip_suffix(OPENING.as_bytes())?, sum)));
    let Some((body, want)) = body else {
        return Err(damaged("it does not end in its checksum".to_owned()));
    };
    let got = hex(&Sha256::digest(body));
    if got.as_bytes() != want {
        let want = String::from_utf8_lossy(want);
        return Err(damaged(format!("expected sha256 {want}, got {got}")));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        damaged(format!(
            "it was written by another version of this tool: {error}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_and_is_plain_json() {
        let bytes = seal(&serde_json::json!({"a": 1}));
        let value: serde_json::Value = open("k", &bytes).expect("nothing was changed");
        assert_eq!(value["a"], 1);
    }

    #[test]
    fn every_single_changed_byte_is_found() {
        let sound = seal(&serde_json::json!({"key": "value", "n": 12}));
        for at in 0..sound.len() {
            let mut bytes = sound.clone();
            bytes[at] ^= 1;
            let opened: Result<serde_json::Value, _> = open("k", &bytes);
            assert!(matches!(opened, Err(Error::Damaged { .. })), "byte {at}");
        }
        for length in 0..sound.len() {
            let opened: Result<serde_json::Value, _> = open("k", &sound[..length]);
            assert!(opened.is_err(), "cut to {length}");
        }
    }
}
