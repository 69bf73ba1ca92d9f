//! Writers that keep one invariant across two databases and two files while they write at full speed, and a check of
//! copies: one that is not of one instant breaks it (`ledger.js`).

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::openclaw::{OpenClaw, repository};
use crate::wait::until;

/// The two writers; they end when this is dropped.
pub struct Ledger {
    /// Every process of it.
    children: [Child; 2],
    log: PathBuf,
}

impl Ledger {
    /// Starts writing below `folder`, as this user where we are root.
    pub fn start(openclaw: &OpenClaw, folder: &Path, uid: u32) -> Self {
        if nix::unistd::geteuid().is_root() {
            chown(folder, Some(uid), Some(uid)).expect("root can give a folder away");
        }
        let writer = |mode: &str, input: Stdio, output: Stdio| {
            node(openclaw)
                .arg(mode)
                .arg(folder)
                .arg(uid.to_string())
                .stdin(input)
                .stdout(output)
                .spawn()
                .expect("node can be executed")
        };
        let mut files = writer("files", Stdio::piped(), Stdio::piped());
        let (orders, answers) = (files.stdin.take(), files.stdout.take());
        let databases = writer(
            "databases",
            answers.expect("was piped").into(),
            orders.expect("was piped").into(),
        );
        let ledger = Self {
            children: [databases, files],
            log: folder.join("z.jsonl"),
        };
        ledger.go_on();
        ledger
    }

    /// Waits until more was written.
    pub fn go_on(&self) {
        let length = || fs::metadata(&self.log).map_or(0, |file| file.len());
        let before = length();
        until("the writers write", || length() > before);
    }

    /// Whether any of its processes is held or stopped.
    pub fn is_held(&self) -> bool {
        self.children.iter().any(|child| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", child.id()));
            let stat = stat.unwrap_or_default();
            stat.rsplit_once(") ")
                .is_some_and(|(_, fields)| fields.starts_with(['t', 'T']))
        })
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        for child in &mut self.children {
            // The other one may have ended it already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What is wrong with each of these copies, if anything.
pub fn check<P: AsRef<OsStr>>(openclaw: &OpenClaw, copies: &[P]) -> Vec<Option<String>> {
    let output = node(openclaw).arg("check").args(copies).output();
    let output = output.expect("node can be executed");
    let text = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let found = text.lines().map(|line| {
        let line: Value = serde_json::from_str(line).expect("each line is JSON");
        line["problem"].as_str().map(str::to_owned)
    });
    let found: Vec<_> = found.collect();
    assert_eq!(found.len(), copies.len(), "{text}");
    found
}

fn node(openclaw: &OpenClaw) -> Command {
    let mut node = Command::new("node");
    node.env_clear()
        .env("PATH", openclaw.search_path())
        .arg(repository().join("tests/support/ledger.js"));
    node
}
