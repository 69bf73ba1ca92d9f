//! How a run of the backup agent ended: its exit code decides, and its answer is what there is to say about it.
//!
//! Nothing that the agent printed is trusted to be there or to be JSON. What it says may hold a secret; whoever started the
//! run takes it out.

use nix::unistd::Pid;
use serde_json::Value;

use crate::reaper::Exit;

pub mod code {
    pub const NO_SNAPSHOT: i32 = 10;
    pub const FENCED: i32 = 12;
    pub const UNREACHABLE: i32 = 75;
    pub const TIMEOUT: i32 = 124;
    pub const INTERRUPTED: i32 = 143;
}

/// A run that failed: the exit code of the contract, and a sentence without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub code: i32,
    pub error: String,
    pub word: Option<Word>,
}

impl Failure {
    /// An agent does not end after SIGKILL, or one from before has not.
    pub fn stuck(pid: Pid) -> Self {
        Self {
            code: code::TIMEOUT,
            error: format!(
                "backup-agent (process {pid}) does not end after SIGKILL: it hangs in the kernel, as on a dead disk; \
                 check the disks below the root, the state and the store"
            ),
            word: None,
        }
    }
}

/// The words of an answer that say more than the exit code: after these only a restore helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// The root is not the directory that the last restore or backup left.
    RootLost,
    /// A restore was killed or failed half-way.
    RestoreUnfinished,
}

impl Word {
    fn read(answer: &Value) -> Option<Self> {
        match answer["code"].as_str()? {
            "root_lost" => Some(Self::RootLost),
            "restore_unfinished" => Some(Self::RestoreUnfinished),
            _ => None,
        }
    }
}

pub type Outcome = Result<Value, Failure>;

pub(super) fn judge(exit: Exit, is_late: bool, output: &[u8]) -> Outcome {
    let answer: Option<Value> = serde_json::from_slice(output).ok().filter(Value::is_object);
    let word = answer.as_ref().and_then(Word::read);
    let failure = |code, error: &str| {
        let error = error.to_owned();
        Err(Failure { code, error, word })
    };
    if is_late {
        return failure(
            code::TIMEOUT,
            "backup-agent did not end within its time and was stopped",
        );
    }
    match (exit.code, answer) {
        (Some(0), Some(answer)) => Ok(answer),
        (Some(0), None) => failure(1, "backup-agent did not answer with a JSON object"),
        (Some(code), answer) => {
            let sentence = answer.as_ref().and_then(|answer| answer["error"].as_str());
            match sentence {
                Some(sentence) => failure(code, sentence),
                None => failure(code, &format!("backup-agent ended with exit code {code}")),
            }
        }
        (None, _) => {
            let signal = exit.signal_name().unwrap_or_default();
            failure(
                128 + exit.signal.unwrap_or_default(),
                &format!("backup-agent was killed by {signal}"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ended(code: i32) -> Exit {
        Exit {
            code: Some(code),
            signal: None,
        }
    }

    #[test]
    fn an_outcome_is_read_from_exit_code_and_answer() {
        let killed = Exit {
            code: None,
            signal: Some(9),
        };
        let ours = "backup-agent ended with exit code 75";
        for (exit, is_late, output, expected) in [
            (
                ended(75),
                false,
                r#"{"error":"no route","code":"x"}"#,
                (75, "no route"),
            ),
            (ended(75), false, "", (75, ours)),
            (ended(75), false, "[1]", (75, ours)),
            (
                ended(0),
                false,
                "oops",
                (1, "backup-agent did not answer with a JSON object"),
            ),
            (
                killed,
                false,
                "",
                (137, "backup-agent was killed by SIGKILL"),
            ),
            (
                killed,
                true,
                "{}",
                (
                    124,
                    "backup-agent did not end within its time and was stopped",
                ),
            ),
        ] {
            let failure = judge(exit, is_late, output.as_bytes()).expect_err("is a failure");
            assert_eq!((failure.code, failure.error.as_str()), expected);
        }
        for (word, expected) in [
            ("root_lost", Some(Word::RootLost)),
            ("restore_unfinished", Some(Word::RestoreUnfinished)),
            ("local", None),
        ] {
            let output = format!(r#"{{"error":"gone","code":"{word}"}}"#);
            let failure = judge(ended(74), false, output.as_bytes()).expect_err("is a failure");
            assert_eq!((failure.code, failure.word), (74, expected));
        }
        let answer = judge(ended(0), false, br#"{"files":3}"#).expect("is an answer");
        assert_eq!(answer["files"], 3);
    }
}
