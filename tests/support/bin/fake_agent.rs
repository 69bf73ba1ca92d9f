//! Stands in for `backup-agent`: answers as the test has written down beside it, and notes how it was called.
//!
//! `restore.json`, `backup.json` and `prune.json` hold a list of steps, one per run; the last one repeats. A step is
//! `{"exit": 0, "answer": {…}, "gate": "name", "stderr": ["line"], "looks": "path"}`; with a gate the run waits, after those
//! lines, until a file of that name is there; with a path it looks there, which a disk may hold up. `check` is answered by the real agent, `real-agent` beside it, unless `check.json` is there.

use std::fs::{self, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use serde_json::{Value, json};

fn main() -> ExitCode {
    let program = std::env::current_exe().expect("a process knows its program");
    let folder = program.parent().expect("a program is in a folder");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let verb = arguments.first().expect("is called with a verb");
    if verb == "check" && !folder.join("check.json").exists() {
        let error = Command::new(folder.join("real-agent"))
            .args(&arguments)
            .exec();
        panic!("the real agent cannot be executed: {error}");
    }
    let environment: Value = std::env::vars().collect();
    note(
        folder,
        &json!({ "arguments": arguments, "environment": environment, "pid": std::process::id() }),
    );

    let text = fs::read_to_string(folder.join(format!("{verb}.json"))).expect("has a script");
    let steps: Vec<Value> = serde_json::from_str(&text).expect("the script is a list");
    let turn = fs::read_to_string(folder.join("calls.jsonl"))
        .expect("was just written")
        .lines()
        .filter(|line| line.contains(&format!("\"{verb}\"")))
        .count();
    let step = &steps[turn.min(steps.len()) - 1];
    for line in step["stderr"].as_array().into_iter().flatten() {
        eprintln!("{}", line.as_str().expect("is text"));
    }
    if let Some(gate) = step["gate"].as_str() {
        while !folder.join(gate).exists() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    if let Some(path) = step["looks"].as_str() {
        // There is nothing to be found.
        drop(fs::metadata(path));
    }
    if step["closesOutput"] != true {
        println!("{}", step["answer"]);
    }
    if step["aborts"] == true {
        std::process::abort();
    }
    let code = step["exit"].as_u64().unwrap_or_default();
    ExitCode::from(u8::try_from(code).expect("is an exit code"))
}

fn note(folder: &Path, call: &Value) {
    let mut descriptors = String::new();
    // Proof that standard input is empty rather than somebody's terminal.
    std::io::stdin()
        .read_to_string(&mut descriptors)
        .expect("standard input is readable");
    let mut calls = OpenOptions::new()
        .create(true)
        .append(true)
        .open(folder.join("calls.jsonl"))
        .expect("can note the call");
    calls
        .write_all(format!("{call}\n").as_bytes())
        .expect("can note the call");
}
