//! The backup agent beside its peers: whole processes in pairs, on the same tree and the same S3 server, in one run.
//!
//! `make bench-backup` measures everything, and writes `docs/benchmarks/backup.md`, its plot and the raw run.
//! `cargo bench -p e2e --bench backup -- WORD…` measures or prints only what the words name: the workloads `W1` and `W2`, how
//! many rounds (a number), `instant` (how many backups of a tree that is written to are of one instant), `memory` (the agent's
//! peak with a million files, and with one huge hole), `render FILE` (the page of a raw run).
//! Peers are taken from `PATH` ([`tests/install-peers.sh`] puts them somewhere); whatever is missing is left out and named.

#![expect(
    clippy::cast_precision_loss,
    reason = "nothing that is measured here has more digits than a float"
)]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e::tree::{assert_same, describe};
use e2e::workspace::{Scale, generate, many_small, touch_one_percent, touch_sessions};
use tempfile::TempDir;

use self::measure::measure;
use self::report::{Operation, Report, Sample, Workload};
use self::server::Server;
use self::tools::{Floor, Lane, Run, Tool};

mod chart;
mod instant;
mod measure;
mod memory;
mod report;
mod server;
mod table;
mod tools;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Restores to a disk measure the disk.
const MEMORY_DISK: &str = "/dev/shm";
const SEED: u64 = 1;
/// Each is a full backup, unchanged ones, a changed one and a restore by every tool.
const ROUNDS: usize = 5;
/// The short ones are measured more often in a round.
const UNCHANGED: usize = 3;
/// Far from the store: added to each request.
const FAR: Duration = Duration::from_millis(40);
const FAR_ROUNDS: usize = 3;
const SMALL_FILES: usize = 100_000;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // What `cargo bench` adds by itself.
    let words: Vec<&str> = arguments
        .iter()
        .map(String::as_str)
        .filter(|word| *word != "--bench")
        .collect();
    match words[..] {
        ["serve"] => server::serve(),
        ["measure", program, ..] => measure::between(program, &arguments[2..]),
        ["memory"] => memory::run(),
        ["instant"] => instant::run(&found()),
        ["render", file] => {
            let report = Report::read(Path::new(file))?;
            report.write_page(Path::new(file))
        }
        _ => compare_all(&words),
    }
}

/// The workloads that are named; or all, and then the page is written anew.
fn compare_all(words: &[&str]) -> Outcome {
    let (mut rounds, mut workloads) = (ROUNDS, Vec::new());
    for word in words {
        match word.parse() {
            Ok(number) => rounds = number,
            Err(_) => workloads.push(Workload::parse(word)?),
        }
    }
    let is_whole = workloads.is_empty();
    if is_whole {
        workloads = vec![Workload::Workspace, Workload::Small];
    }
    let mut report = Report::new(&found())?;
    for workload in workloads {
        compare(&mut report, workload, rounds)?;
    }
    print!("{}", report.tables());
    if is_whole {
        let file = report.keep()?;
        report.write_page(&file)?;
    }
    Ok(())
}

/// The agent and those peers whose programs are all in `PATH`.
fn found() -> Vec<Tool> {
    let mut found = Vec::new();
    for tool in tools::ALL {
        let mut programs = tool.programs().iter();
        let missing = programs.find(|(name, flag)| Command::new(name).arg(flag).output().is_err());
        match missing {
            None => found.push(tool),
            Some((name, _)) => eprintln!("left out: {}, there is no {name} in PATH", tool.name()),
        }
    }
    found
}

/// A workload's tree and what the tools need around it.
struct Field {
    workload: Workload,
    folder: TempDir,
    tree: PathBuf,
    lanes: Vec<Lane>,
    server: Server,
    changes: u64,
}

/// Runs a workload with all tools and adds the samples to the report.
fn compare(report: &mut Report, workload: Workload, rounds: usize) -> Outcome {
    let folder = tempfile::Builder::new()
        .prefix("backup-bench-")
        .tempdir_in(MEMORY_DISK)?;
    let server = Server::start()?;
    let tree = folder.path().join("tree");
    fs::create_dir(&tree)?;
    match workload {
        Workload::Workspace => generate(&tree, SEED, Scale::FULL)?,
        Workload::Small => many_small(&tree, SMALL_FILES)?,
    }
    let mut lanes = Vec::new();
    for &tool in report.tools() {
        // A request or two for each file: a hundred thousand of them take minutes and say nothing new.
        if tool == Tool::Rclone && workload == Workload::Small {
            continue;
        }
        let own = folder.path().join(tool.bucket());
        lanes.push(Lane {
            tool,
            tree: tree.clone(),
            state: own.join("state"),
            target: own.join("target"),
            endpoint: server.address,
        });
    }
    let mut field = Field {
        workload,
        folder,
        tree,
        lanes,
        server,
        changes: SEED,
    };
    for round in 0..rounds {
        eprintln!("{}, round {} of {rounds}", workload.name(), round + 1);
        field.round(report, round, Duration::ZERO)?;
    }
    // A minute for each run of that tool, whose requests are one after the other.
    field.lanes.retain(|lane| lane.tool != Tool::Rclone);
    if workload == Workload::Workspace {
        for round in 0..rounds.min(FAR_ROUNDS) {
            eprintln!("{}, far away, round {}", workload.name(), round + 1);
            field.round(report, round, FAR)?;
        }
    }
    Ok(())
}

impl Field {
    /// Everything once by every tool, in an order that turns from round to round.
    fn round(&mut self, report: &mut Report, round: usize, delay: Duration) -> Outcome {
        let turn = round % self.lanes.len();
        let order: Vec<usize> = (0..self.lanes.len())
            .map(|at| (at + turn) % self.lanes.len())
            .collect();
        self.server.delay(Duration::ZERO)?;
        for &at in &order {
            self.make_empty(at)?;
        }
        self.server.delay(delay)?;
        for &at in &order {
            self.sample(report, at, Operation::Full, delay)?;
        }
        if delay.is_zero() {
            self.floor(report, Floor::Pack, Operation::Full)?;
        }
        for _ in 0..UNCHANGED {
            for &at in &order {
                self.sample(report, at, Operation::Unchanged, delay)?;
            }
            if delay.is_zero() {
                self.floor(report, Floor::Walk, Operation::Unchanged)?;
            }
        }
        self.changes += 1;
        match self.workload {
            Workload::Workspace => touch_one_percent(&self.tree, self.changes)?,
            Workload::Small => touch_small(&self.tree, self.changes)?,
        }
        for &at in &order {
            self.sample(report, at, Operation::Changed, delay)?;
        }
        if !delay.is_zero() {
            return Ok(());
        }
        if self.workload == Workload::Workspace {
            touch_sessions(&self.tree, self.changes)?;
            for &at in &order {
                self.sample(report, at, Operation::Used, delay)?;
            }
        }
        for &at in &order {
            fs::create_dir(&self.lanes[at].target)?;
            self.sample(report, at, Operation::Restore, delay)?;
            if round == 0 && self.lanes[at].tool == Tool::Agent {
                assert_same(&describe(&self.tree), &describe(&self.lanes[at].target));
            }
            fs::remove_dir_all(&self.lanes[at].target)?;
        }
        measure(&tools::archive(&self.lanes[0]), self.server.pid())?;
        fs::create_dir(&self.lanes[0].target)?;
        self.floor(report, Floor::Unpack, Operation::Restore)?;
        fs::remove_dir_all(&self.lanes[0].target)?;
        Ok(())
    }

    /// Forgets what a tool has stored, and what it knows about it.
    fn make_empty(&mut self, at: usize) -> Outcome {
        let lane = &self.lanes[at];
        self.server.clear(lane.tool.bucket())?;
        let own = self.folder.path().join(lane.tool.bucket());
        if own.exists() {
            fs::remove_dir_all(&own)?;
        }
        fs::create_dir_all(&lane.state)?;
        if let Some(run) = lane.prepare()? {
            measure(&run, self.server.pid())?;
        }
        Ok(())
    }

    fn sample(
        &mut self,
        report: &mut Report,
        at: usize,
        operation: Operation,
        delay: Duration,
    ) -> Outcome {
        let lane = &self.lanes[at];
        let run = match operation {
            Operation::Restore => lane.restore(),
            _ => lane.backup(),
        };
        let name = lane.tool.name();
        self.take(report, &run, name, operation, delay)
    }

    fn floor(&mut self, report: &mut Report, floor: Floor, operation: Operation) -> Outcome {
        let run = floor.run(&self.lanes[0]);
        self.take(report, &run, floor.name(), operation, Duration::ZERO)
    }

    fn take(
        &mut self,
        report: &mut Report,
        run: &Run,
        name: &str,
        operation: Operation,
        delay: Duration,
    ) -> Outcome {
        self.server.take_traffic()?;
        let cost = measure(run, self.server.pid())?;
        let sample = Sample {
            workload: self.workload,
            is_far: !delay.is_zero(),
            name: name.to_owned(),
            operation,
            cost,
            traffic: self.server.take_traffic()?,
        };
        eprintln!("{sample}");
        report.add(sample);
        Ok(())
    }
}

/// Rewrites every hundredth file, others each time.
fn touch_small(tree: &Path, change: u64) -> Outcome {
    let first = usize::try_from(change)? % 100;
    for at in (first..SMALL_FILES).step_by(100) {
        let path = tree.join(format!("{:04}/{at:06}.dat", at / 250));
        fs::write(path, format!("{change:>8} {at:>8} ").repeat(64))?;
    }
    Ok(())
}
