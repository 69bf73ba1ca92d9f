//! One-shot command of the runtime: takes, restores, checks and prunes snapshots of a directory tree.
//!
//! Results go to standard output, everything else to standard error; the exit code is part of the interface.

mod archive;
mod capabilities;
mod cli;
mod commands;
mod config;
mod error;
mod interrupt;
mod local_index;
mod log;
mod progress;
mod snapshot;
mod state;
mod store;
mod tree;
pub mod untrusted;

use std::{
    io::{IsTerminal, Write},
    process::ExitCode,
};

use clap::Parser;
use nix::sys::stat::{Mode, umask};
use serde_json::json;

use crate::{
    cli::{Cli, Verb},
    commands::{check, completions},
    config::Config,
    error::Error,
};

/// Does what the command line says, and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    // What is made here has the mode that is asked for, whatever the caller's own files are to get.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(help) => {
            let is_mistake = help.use_stderr();
            let is_json = is_mistake && wants_json();
            if is_json {
                let object = json!({ "error": usage(&help), "code": "usage" });
                let _ = writeln!(std::io::stdout(), "{object}");
            }
            if !is_json || std::io::stderr().is_terminal() {
                // Printing fails only when nobody reads it.
                let _ = help.print();
            }
            return ExitCode::from(if is_mistake { 64 } else { 0 });
        }
    };
    if let Verb::Completions { shell } = &cli.verb {
        // A script for a shell, whatever the settings of this machine.
        let _ = std::io::stdout().write_all(&completions(*shell));
        return ExitCode::SUCCESS;
    }
    let json = cli.flags.json;
    match std::io::stderr().is_terminal() {
        _ if cli.flags.quiet => {}
        true => progress::show(),
        false if json => progress::tell(),
        false => {}
    }
    let result =
        Config::load(&cli, |name| std::env::var_os(name)).and_then(|config| match &cli.verb {
            Verb::Check => Ok(check::run(&config)),
            verb => interrupt::bounded(&config, verb),
        });
    progress::end();
    match result {
        Ok(answer) => {
            let text = if json {
                format!("{}\n", answer.json)
            } else {
                answer.text
            };
            // A reader that went away (`| head`) changes nothing about what was done.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::from(answer.exit)
        }
        Err(error) => {
            let (exit, word) = error.code();
            let sentence = error.sentence();
            if json {
                let mut object = json!({ "error": sentence, "code": word });
                if let (Verb::Check, Error::Settings(problems)) = (&cli.verb, &error) {
                    object["problems"] = json!(problems);
                }
                let _ = writeln!(std::io::stdout(), "{object}");
            }
            // The runtime reads the object; people and scripts without --json read the sentence.
            if !json || std::io::stderr().is_terminal() {
                eprintln!("backup-agent: {sentence}");
            }
            ExitCode::from(exit)
        }
    }
}

/// Whether a command line that makes no sense asks for JSON.
fn wants_json() -> bool {
    let words = std::env::args_os().skip(1);
    let mut words = words.take_while(|word| word != "--");
    words.any(|word| word.as_encoded_bytes().starts_with(b"--json"))
}

/// What is wrong with the command line, in one sentence.
fn usage(error: &clap::Error) -> String {
    let text = error.to_string();
    let sentence = text.split("\n\n").next().unwrap_or_default();
    let sentence = sentence.strip_prefix("error: ").unwrap_or(sentence);
    let words: Vec<&str> = sentence.split_whitespace().collect();
    format!(
        "cannot understand the command line: {}; see backup-agent --help",
        words.join(" ")
    )
}
