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

use crate::{cli::Cli, config::Config};

/// Does what the command line says, and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    // What is made here has the mode that is asked for, whatever the caller's own files are to get.
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(help) => {
            let is_mistake = help.use_stderr();
            // Printing fails only when nobody reads it.
            let _ = help.print();
            return ExitCode::from(if is_mistake { 64 } else { 0 });
        }
    };
    let json = cli.flags.json;
    match std::io::stderr().is_terminal() {
        _ if cli.flags.quiet => {}
        true => progress::show(),
        false if json => progress::tell(),
        false => {}
    }
    let result = Config::load(&cli, |name| std::env::var_os(name))
        .and_then(|config| interrupt::bounded(&config, &cli.verb));
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
                let object = serde_json::json!({ "error": sentence, "code": word });
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
