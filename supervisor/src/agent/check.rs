//! `backup-agent check`, before anything starts: the one judge of the settings that are the agent's.
//!
//! There is no event loop yet. A thread waits for the agent, so that one that hangs holds us up for a bounded time only.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::blocking;
use crate::config::{Checked, Variables};
use crate::error::Error;

/// Its own bound is ten seconds; a dead file system under root, state or store takes all of them.
const BOUND: Duration = Duration::from_secs(15);

/// Longest line of a broken agent that is shown.
const MAX_LINE: usize = 200;

/// Runs it, and reads what it says.
pub fn run(executable: &Path, environment: &Variables) -> Result<Checked, Error> {
    let not_executed = |source| Error::NoAgent {
        executable: executable.to_owned(),
        source,
    };
    let unusable = |reason| Error::NoCheck {
        executable: executable.to_owned(),
        reason,
    };
    let mut command = Command::new(executable);
    command
        .args(["check", "--json"])
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::inherit())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let (process_sender, process) = mpsc::channel();
    let run = move || {
        let child = command.spawn()?;
        let _ = process_sender.send(child.id());
        child.wait_with_output()
    };
    let output: io::Result<Output> = match blocking::within_now(BOUND, run) {
        Ok(output) => output,
        Err(error) => {
            // Its end has not been waited for, so the number is still its own.
            if let Ok(Ok(pid)) = process.try_recv().map(i32::try_from) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            let reason = match error.kind() {
                io::ErrorKind::TimedOut => format!(
                    "did not end within {} s: the disk below the root, the state, the store or a file that the settings name may hang",
                    BOUND.as_secs()
                ),
                _ => format!("cannot be waited for: {error}"),
            };
            return Err(unusable(reason));
        }
    };
    let output = output.map_err(not_executed)?;
    judge(&output).map_err(unusable)
}

/// Good settings, bad ones, or the reason why it is not known.
fn judge(output: &Output) -> Result<Checked, String> {
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let text = |value: &Value| value.as_str().map(str::to_owned);
    if let (true, Some(settings)) = (output.status.success(), answer["settings"].as_object()) {
        let settings = settings.iter();
        let settings = settings.filter_map(|(name, value)| Some((name.clone(), text(value)?)));
        return Ok(Checked {
            settings: settings.collect::<BTreeMap<_, _>>(),
            problems: Vec::new(),
        });
    }
    let problems = answer["problems"].as_array().into_iter().flatten();
    let problems: Vec<String> = problems.filter_map(text).collect();
    if !problems.is_empty() {
        return Ok(Checked {
            settings: BTreeMap::new(),
            problems,
        });
    }
    let shown = |said: &str| -> String {
        let printable = said.chars().filter(|c| !c.is_control());
        printable.take(MAX_LINE).collect()
    };
    // It could not tell: a folder did not answer, say.
    if let Some(sentence) = answer["error"].as_str() {
        return Err(format!("says {:?}", shown(sentence)));
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let mut lines = said.lines().map(str::trim);
    let said = match lines.find(|line| !line.is_empty()) {
        Some(line) => format!(" and said {:?}", shown(line)),
        None => String::new(),
    };
    Err(format!(
        "is not the agent of this supervisor, or is broken: it ended with {}{said}",
        output.status
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn output(code: i32, stdout: &str, stderr: &str) -> Output {
        Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: stdout.into(),
            stderr: stderr.into(),
        }
    }

    #[test]
    fn an_answer_is_read_and_nothing_else_is_taken_for_good_settings() {
        let good = output(0, r#"{"settings":{"RUNTIME_ROOT":"/data","X":1}}"#, "");
        let checked = judge(&good).expect("is an answer");
        assert_eq!(checked.settings.len(), 1);
        assert_eq!(checked.settings["RUNTIME_ROOT"], "/data");
        let bad = r#"{"error":"a\nb","code":"usage","problems":["a","b"]}"#;
        let checked = judge(&output(64, bad, "")).expect("is an answer");
        assert_eq!(checked.problems, ["a", "b"]);
        for (code, stdout, stderr, part) in [
            (0, "", "", "exit status: 0"),
            (0, "[]", "", "exit status: 0"),
            (1, r#"{"settings":{}}"#, "", "exit status: 1"),
            (64, r#"{"problems":[]}"#, "", "exit status: 64"),
            (
                124,
                r#"{"error":"stopped","code":"timeout"}"#,
                "x",
                "stopped",
            ),
            (64, "", "error: no such verb\n\nUsage", "no such verb"),
        ] {
            let reason = judge(&output(code, stdout, stderr)).expect_err(stdout);
            assert!(reason.contains(part), "{reason}");
        }
    }
}
