//! What the agent says of a snapshot, bounded: `status` keeps it in PID 1, and the paths in it are of the gateway's making.

use serde_json::{Value, json};

use crate::secret::Secrets;

const MAX_PATHS: usize = 16;

/// In bytes.
const MAX_TEXT: usize = 1024;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub consistency: Option<String>,
    /// Why it is not of one instant.
    pub consistency_reason: Option<String>,
    pub skipped: Option<u64>,
    unread: Option<Unread>,
    /// Whether it lies beside the head.
    pub fork: bool,
    pub rounds: Option<u64>,
    pub pause_ms: Option<u64>,
    /// For an operator.
    pub warning: Option<String>,
}

/// What could not be read: the snapshot has it as the one before had it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unread {
    count: u64,
    /// The first ones.
    paths: Vec<String>,
}

impl Report {
    pub fn read(answer: &Value, secrets: &Secrets) -> Self {
        let text = |value: &Value| Some(secrets.take_out(value.as_str()?, MAX_TEXT));
        let unread = |unread: &Value| {
            let paths = unread["paths"].as_array().into_iter().flatten();
            Some(Unread {
                count: unread["count"].as_u64()?,
                paths: paths.filter_map(text).take(MAX_PATHS).collect(),
            })
        };
        Self {
            consistency: text(&answer["consistency"]),
            consistency_reason: text(&answer["consistencyReason"]),
            skipped: answer["skipped"].as_u64(),
            unread: unread(&answer["unread"]),
            fork: answer["fork"] == true,
            rounds: answer["rounds"].as_u64(),
            pause_ms: answer["pauseMs"].as_u64(),
            warning: text(&answer["warning"]),
        }
    }

    pub fn unread(&self) -> Value {
        self.unread.as_ref().map_or(
            Value::Null,
            |unread| json!({ "count": unread.count, "paths": unread.paths }),
        )
    }

    /// Adds what `status` and the answer to a call have in common.
    pub fn add_to(&self, fields: &mut Value) {
        fields["consistency"] = json!(self.consistency);
        fields["consistencyReason"] = json!(self.consistency_reason);
        fields["skipped"] = json!(self.skipped);
        fields["unread"] = self.unread();
        fields["fork"] = json!(self.fork);
        fields["rounds"] = json!(self.rounds);
        fields["pauseMs"] = json!(self.pause_ms);
        fields["warning"] = json!(self.warning);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    #[test]
    fn what_the_agent_says_is_bounded_and_has_no_secret() {
        let secrets = Secrets(vec![Secret::new("hunter2".into())]);
        let long = "ä".repeat(4096);
        let paths: Vec<&str> = std::iter::repeat_n(long.as_str(), 1000).collect();
        let answer = json!({
            "consistency": long, "consistencyReason": format!("x{long}"), "skipped": 3,
            "unread": { "count": 1000, "paths": paths }, "fork": true, "rounds": 2, "pauseMs": 38,
            "warning": "hunter2 was seen",
        });
        let report = Report::read(&answer, &secrets);
        let unread = report.unread.clone().expect("is said");
        assert_eq!((unread.count, unread.paths.len()), (1000, MAX_PATHS));
        assert!(unread.paths.iter().all(|path| path.len() == MAX_TEXT));
        // A letter of two bytes is not cut in the middle.
        let reason = report.consistency_reason.clone().expect("is said");
        assert_eq!(reason.len(), MAX_TEXT - 1);
        assert_eq!(report.warning.as_deref(), Some("[redacted] was seen"));
        let mut fields = json!({});
        report.add_to(&mut fields);
        assert_eq!(
            (
                &fields["fork"],
                &fields["skipped"],
                &fields["rounds"],
                &fields["pauseMs"]
            ),
            (&json!(true), &json!(3), &json!(2), &json!(38))
        );
    }

    #[test]
    fn what_the_agent_does_not_say_is_null() {
        for answer in [
            json!({}),
            json!({ "consistency": 1, "skipped": "x", "unread": [], "fork": "yes", "rounds": -1, "pauseMs": {} }),
            json!({ "unread": { "count": "many", "paths": [] } }),
        ] {
            assert_eq!(
                Report::read(&answer, &Secrets::default()),
                Report::default()
            );
        }
    }
}
