//! What was measured: kept raw, and as tables of medians with the agent's ratio to the best peer.

use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::chart;
use crate::measure::Cost;
use crate::server::Traffic;
use crate::table::Table;
use crate::tools::{self, Tool};
use crate::{Outcome, UNCHANGED};

/// The tree that is backed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    Workspace,
    Small,
}

impl Workload {
    pub fn parse(word: &str) -> Outcome<Self> {
        match word {
            "W1" => Ok(Self::Workspace),
            "W2" => Ok(Self::Small),
            _ => Err(format!("{word:?} is none of W1, W2, memory, render FILE").into()),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Workspace => "W1",
            Self::Small => "W2",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Workspace => {
                "W1: a workspace of 12,000 files, 600 MB, and a file of 256 MiB that is a hole mostly"
            }
            Self::Small => "W2: 100,000 files of 1 KiB",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Full,
    Unchanged,
    Changed,
    /// Long sessions and large databases, some of each.
    Used,
    Restore,
}

impl Operation {
    pub const ALL: [Self; 5] = [
        Self::Full,
        Self::Unchanged,
        Self::Changed,
        Self::Used,
        Self::Restore,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Unchanged => "unchanged",
            Self::Changed => "1 % changed",
            Self::Used => "12 sessions and 4 databases changed",
            Self::Restore => "restore",
        }
    }
}

/// One run of one tool.
pub struct Sample {
    pub workload: Workload,
    /// Time was added to each request.
    pub is_far: bool,
    pub name: String,
    pub operation: Operation,
    pub cost: Cost,
    pub traffic: Traffic,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cost, traffic, .. } = self;
        write!(
            f,
            "{}{} {:<12} {:<36} {:7.3} s, {:7.3} user, {:7.3} system, {:6.1} MiB, {} requests, {} up, {} down, others {:.0} %",
            self.workload.name(),
            if self.is_far { " far" } else { "" },
            self.operation.name(),
            self.name,
            cost.seconds,
            cost.user,
            cost.system,
            cost.peak / 1024.0,
            traffic.requests,
            traffic.received,
            traffic.sent,
            cost.others * 100.0,
        )
    }
}

/// A run of the benchmark.
pub struct Report {
    date: String,
    machine: String,
    versions: Vec<String>,
    tools: Vec<Tool>,
    samples: Vec<Sample>,
}

/// The first line that a program prints.
fn first_line(program: &str, argument: &str) -> Outcome<String> {
    let output = Command::new(program).arg(argument).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// A program's name and its version: of what it prints, the first number with dots.
fn version(program: &str, flag: &str) -> Outcome<String> {
    let line = first_line(program, flag)?;
    let words = line.split([' ', '/', ',']);
    let mut words = words.map(|word| word.trim_start_matches('v'));
    let is_version =
        |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    let version = words.find(is_version).ok_or("it prints no version")?;
    Ok(format!("{program} {version}"))
}

/// The value behind a name in one of the kernel's files.
fn kernel_value(file: &str, name: &str) -> Outcome<String> {
    let text = fs::read_to_string(file)?;
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_once(':'));
    Ok(value
        .map_or("unknown", |(_, value)| value.trim())
        .to_owned())
}

impl Report {
    /// A report about these tools, without samples yet.
    pub fn new(tools: &[Tool]) -> Outcome<Self> {
        let memory: u64 = kernel_value("/proc/meminfo", "MemTotal")?
            .trim_end_matches(" kB")
            .parse()?;
        let machine = format!(
            "{} processors ({}), {} GiB of memory",
            std::thread::available_parallelism()?,
            kernel_value("/proc/cpuinfo", "model name")?,
            memory.div_ceil(1 << 20)
        );
        let mut versions = Vec::new();
        for tool in tools {
            for (program, flag) in tool.programs() {
                versions.push(version(program, flag)?);
            }
        }
        Ok(Self {
            date: first_line("date", "+%F")?,
            machine,
            versions,
            tools: tools.to_vec(),
            samples: Vec::new(),
        })
    }

    /// When, where and with what.
    pub fn origin(&self) -> String {
        let versions = self.versions.join(", ");
        format!("{}, on {}; {versions}", self.date, self.machine)
    }

    pub fn tools(&self) -> &[Tool] {
        &self.tools
    }

    pub fn add(&mut self, sample: Sample) {
        self.samples.push(sample);
    }

    /// Writes the raw run beside the others and tells where.
    pub fn keep(&self) -> Outcome<PathBuf> {
        let samples: Vec<Value> = self.samples.iter().map(Sample::to_json).collect();
        let mut text = format!(
            "{{\"date\": {}, \"machine\": {}, \"versions\": {}, \"samples\": [\n",
            json!(self.date),
            json!(self.machine),
            json!(self.versions)
        );
        let lines: Vec<String> = samples.iter().map(Value::to_string).collect();
        text.push_str(&lines.join(",\n"));
        text.push_str("\n]}\n");
        let file = repository().join(format!("tests/benches/runs/{}-backup.json", self.date));
        fs::write(&file, text)?;
        Ok(file)
    }

    /// Reads a raw run.
    pub fn read(file: &Path) -> Outcome<Self> {
        let value: Value = serde_json::from_slice(&fs::read(file)?)?;
        let text = |value: &Value| value.as_str().map(ToOwned::to_owned);
        let list = |name: &str| value[name].as_array().map_or(&[][..], Vec::as_slice);
        let samples: Option<Vec<Sample>> = list("samples").iter().map(Sample::from_json).collect();
        let versions: Option<Vec<String>> = list("versions").iter().map(text).collect();
        let (Some(date), Some(machine), Some(versions), Some(samples)) = (
            text(&value["date"]),
            text(&value["machine"]),
            versions,
            samples,
        ) else {
            return Err(format!("{} is no raw run of this benchmark", file.display()).into());
        };
        let has = |tool: &Tool| samples.iter().any(|sample| sample.name == tool.name());
        Ok(Self {
            date,
            machine,
            versions,
            tools: tools::ALL.into_iter().filter(has).collect(),
            samples,
        })
    }

    /// Writes the page and its plot.
    pub fn write_page(&self, raw: &Path) -> Outcome {
        let folder = repository().join("docs/benchmarks");
        fs::create_dir_all(&folder)?;
        let raw = raw.file_name().unwrap_or_default().to_string_lossy();
        let left_out: Vec<&str> = tools::ALL
            .into_iter()
            .filter(|tool| !self.tools.contains(tool))
            .map(Tool::name)
            .collect();
        let agent = Tool::Agent.name();
        let rounds = self
            .samples(Workload::Workspace, false, agent, Operation::Full)
            .count();
        let mut page = format!(
            "# Backup and restore beside other tools\n\n\
             `make bench-backup`, {}, on {}. Whole processes, in turns, with the same tree on tmpfs and the same S3 server in\n\
             memory on loopback. Medians of {rounds} rounds, with {UNCHANGED} unchanged backups in each; [every single run](../../tests/benches/runs/{raw}).\n\
             Memory is the peak of the largest process. Ratios are to the best of the other tools; below 1 the agent takes less.\n\n\
             ![Times of W1](backup.svg)\n\n",
            self.date, self.machine
        );
        let others = median(self.samples.iter(), |sample| sample.cost.others).unwrap_or_default();
        if others > QUIET {
            write!(
                page,
                "**The machine was not idle: other programs had {:.0} % of its processors (median). The seconds are longer than they need to be;\n\
                 processor seconds, memory, bytes and requests say more, and so do ratios.**\n\n",
                others * 100.0
            )?;
        }
        page.push_str(&self.tables());
        page.push_str("## Tools\n\n");
        for version in &self.versions {
            writeln!(page, "- {version}")?;
        }
        if !left_out.is_empty() {
            writeln!(
                page,
                "\nNot installed, so left out: {}.",
                left_out.join("; ")
            )?;
        }
        page.push_str(NOTES);
        fs::write(folder.join("backup.md"), page)?;
        fs::write(folder.join("backup.svg"), self.plot())?;
        Ok(())
    }

    fn plot(&self) -> String {
        let groups: Vec<(&str, Vec<(&str, f64)>)> = Operation::ALL
            .into_iter()
            .map(|operation| {
                let bars = self.tools.iter().filter_map(|tool| {
                    let samples = self.samples(Workload::Workspace, false, tool.name(), operation);
                    Some((tool.name(), median(samples, |sample| sample.cost.seconds)?))
                });
                (operation.name(), bars.collect())
            })
            .collect();
        chart::bars("W1: seconds, less is better", &groups)
    }

    pub fn samples<'a>(
        &'a self,
        workload: Workload,
        is_far: bool,
        name: &'a str,
        operation: Operation,
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.workload == workload
                && sample.is_far == is_far
                && sample.name == name
                && sample.operation == operation
        })
    }

    /// All tables there are samples for.
    pub fn tables(&self) -> String {
        let mut text = String::new();
        for workload in [Workload::Workspace, Workload::Small] {
            let tables = [false, true].map(|is_far| Table::of(self, workload, is_far));
            text.extend(tables.iter().flatten().map(Table::markdown));
        }
        text
    }
}

/// Share of the processors that others may have before seconds are about them too.
const QUIET: f64 = 0.05;

/// What the numbers do not say.
const NOTES: &str = "\n## How to read it\n\n\
- Processor seconds are user and system time of all processes of a tool together.\n\
- Each round begins with an empty bucket and no cache. The repositories that restic and rustic need are made outside of the\n  \
measurement.\n\
- `tar, zstd, aws` is `tar | zstd -3 -T2 | aws s3 cp`: whatever has changed, it does all of it again.\n\
- `rclone sync` makes a request or two for each file, so it is left out where that takes minutes. It keeps no modes, hard\n  \
links, holes, attributes or empty folders.\n\
- The floors do the same work without a store: `tar | zstd -3 -T2` to nowhere, `find -printf`, and `zstd -dc | tar x` from a\n  \
local file.\n\
- In the first round the agent's restored tree is compared with the original: types, modes, owners, times, contents, holes,\n  \
links, attributes.\n";

impl Sample {
    fn to_json(&self) -> Value {
        json!({
            "workload": self.workload.name(),
            "far": self.is_far,
            "name": self.name,
            "operation": self.operation.name(),
            "seconds": self.cost.seconds,
            "peakKiB": self.cost.peak,
            "user": self.cost.user,
            "system": self.cost.system,
            "others": self.cost.others,
            "requests": self.traffic.requests,
            "up": self.traffic.received,
            "down": self.traffic.sent,
        })
    }

    fn from_json(value: &Value) -> Option<Self> {
        let operation = value["operation"].as_str()?;
        Some(Self {
            workload: Workload::parse(value["workload"].as_str()?).ok()?,
            is_far: value["far"].as_bool()?,
            name: value["name"].as_str()?.to_owned(),
            operation: Operation::ALL
                .into_iter()
                .find(|one| one.name() == operation)?,
            cost: Cost {
                seconds: value["seconds"].as_f64()?,
                peak: value["peakKiB"].as_f64()?,
                user: value["user"].as_f64()?,
                system: value["system"].as_f64()?,
                others: value["others"].as_f64()?,
            },
            traffic: Traffic {
                requests: value["requests"].as_u64()?,
                received: value["up"].as_u64()?,
                sent: value["down"].as_u64()?,
            },
        })
    }
}

/// The middle one of a figure's values.
pub fn median<'a>(
    samples: impl Iterator<Item = &'a Sample>,
    of: fn(&Sample) -> f64,
) -> Option<f64> {
    let mut values: Vec<f64> = samples.map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
