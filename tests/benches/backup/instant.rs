//! How many backups of a tree that is written to meanwhile are of one instant: the agent's with and without its pause, and
//! the peers'. Writes `docs/benchmarks/instant.md`.

use std::fmt::Write as _;
use std::fs;

use e2e::ledger::{Ledger, check};
use e2e::openclaw::{OpenClaw, repository};
use serde_json::Value;

use crate::measure::measure;
use crate::report::Report;
use crate::server::Server;
use crate::tools::{Lane, Run, Tool};
use crate::{MEMORY_DISK, Outcome};

const SNAPSHOTS: usize = 50;
/// Whoever writes: a user of their own, so that they can be told from the tools.
const WRITER: u32 = 54_420;
/// Files between the databases and the logs in the order of a walk.
const OTHERS: usize = 1_000;

const INTRODUCTION: &str = "\
# Snapshots of one instant beside other tools

`cargo bench -p e2e --bench backup -- instant`, as root. Two processes move money from one SQLite database (WAL mode) to another one
(rollback mode), note each move in a file that is replaced by rename and then in a log, and begin the next, at full speed;
1,000 other files lie in between. Each tool backs that up again and again; every backup is restored and looked at: the databases
pass `PRAGMA integrity_check`, and the four counts are of one instant. *Broken* ones are not. *Failed* is a tool that ends with an
error, as tar does when a file changed while it was read; what it left is looked at, too.

| tool | backups | failed | broken | said `per-file` | broken without a word | median pause, ms |
| --- | --- | --- | --- | --- | --- | --- |
";

/// Backs up with every tool while the writers write.
pub fn run(tools: &[Tool]) -> Outcome {
    let mut page = INTRODUCTION.to_owned();
    let limit = ["--max-pause", "250ms"];
    let pause = ["--freeze-user", &WRITER.to_string(), limit[0], limit[1]].map(str::to_owned);
    for &tool in tools {
        if tool == Tool::Agent {
            page.push_str(&row("backup-agent", tool, &pause)?);
            page.push_str(&row("backup-agent, never pausing", tool, &[])?);
        } else {
            page.push_str(&row(tool.name(), tool, &[])?);
        }
    }
    writeln!(page, "\n{}.", Report::new(tools)?.origin())?;
    print!("{page}");
    fs::write(repository().join("docs/benchmarks/instant.md"), page)?;
    Ok(())
}

fn row(name: &str, tool: Tool, arguments: &[String]) -> Outcome<String> {
    let openclaw = OpenClaw::install()?;
    let folder = tempfile::Builder::new()
        .prefix("backup-bench-")
        .tempdir_in(MEMORY_DISK)?;
    // The writers get to the tree through it.
    fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    let server = Server::start()?;
    let lane = Lane {
        tool,
        tree: folder.path().join("tree"),
        state: folder.path().join("state"),
        target: folder.path().join("target"),
        endpoint: server.address,
    };
    for path in [&lane.tree, &lane.state, &lane.tree.join("c")] {
        fs::create_dir(path)?;
    }
    for number in 0..OTHERS {
        fs::write(lane.tree.join(format!("c/{number}")), "content")?;
    }
    if let Some(prepare) = lane.prepare()? {
        measure(&prepare, server.pid())?;
    }
    let ledger = Ledger::start(&openclaw, &lane.tree, WRITER);
    let [mut failed, mut broken, mut told, mut untold] = [0; 4];
    let mut pauses = Vec::new();
    for _ in 0..SNAPSHOTS {
        let mut backup = lane.backup();
        backup.arguments.extend(arguments.iter().map(Into::into));
        let said = output(&backup)?;
        failed += usize::from(said.is_none());
        let answer = said.as_deref().map(serde_json::from_str::<Value>);
        let answer = answer.and_then(Result::ok).unwrap_or_default();
        pauses.extend(answer["pauseMs"].as_u64());
        let is_per_file = answer["consistency"] == "per-file";
        told += usize::from(is_per_file);
        fs::create_dir(&lane.target)?;
        if output(&lane.restore())?.is_none() || check(&openclaw, &[&lane.target])[0].is_some() {
            broken += 1;
            untold += usize::from(said.is_some() && !is_per_file);
        }
        fs::remove_dir_all(&lane.target)?;
        ledger.go_on();
    }
    pauses.sort_unstable();
    let pause = pauses.get(pauses.len() / 2);
    let pause = pause.map_or_else(|| "–".to_owned(), u64::to_string);
    let told = if tool == Tool::Agent {
        told.to_string()
    } else {
        "–".to_owned()
    };
    Ok(format!(
        "| {name} | {SNAPSHOTS} | {failed} | {broken} | {told} | {untold} | {pause} |\n"
    ))
}

/// What a program says when it succeeds.
fn output(run: &Run) -> Outcome<Option<String>> {
    let output = std::process::Command::new(&run.program)
        .args(&run.arguments)
        .current_dir(&run.folder)
        .env_clear()
        .envs(run.environment.iter().map(|(name, value)| (name, value)))
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(output.status.success().then_some(said))
}
