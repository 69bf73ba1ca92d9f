//! Medians of a workload as a table, with the agent's ratios to the best peer and to what costs no store.

use std::fmt::Write as _;

use crate::report::{Operation, Report, Sample, Workload, median};
use crate::tools::{Floor, Tool};

/// The table of a workload, near the store or far from it.
pub struct Table<'a> {
    report: &'a Report,
    workload: Workload,
    is_far: bool,
    /// Those there are samples of.
    operations: Vec<Operation>,
}

type Figure = fn(&Sample) -> f64;

const SECONDS: Figure = |sample| sample.cost.seconds;
const PROCESSOR: Figure = |sample| sample.cost.user + sample.cost.system;
const PEAK: Figure = |sample| sample.cost.peak / 1024.0;
const REQUESTS: Figure = |sample| sample.traffic.requests as f64;
const UP: Figure = |sample| sample.traffic.received as f64 / 1e6;
const DOWN: Figure = |sample| sample.traffic.sent as f64 / 1e6;

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

fn floor(operation: Operation) -> Option<Floor> {
    match operation {
        Operation::Full => Some(Floor::Pack),
        Operation::Unchanged => Some(Floor::Walk),
        Operation::Restore => Some(Floor::Unpack),
        Operation::Changed | Operation::Used => None,
    }
}

impl<'a> Table<'a> {
    /// Nothing where there are no samples.
    pub fn of(report: &'a Report, workload: Workload, is_far: bool) -> Option<Self> {
        let mut table = Self {
            report,
            workload,
            is_far,
            operations: Operation::ALL.to_vec(),
        };
        let agent = Tool::Agent.name();
        let mut operations = Operation::ALL.to_vec();
        operations.retain(|one| table.value(agent, *one, SECONDS).is_some());
        table.operations = operations;
        (!table.operations.is_empty()).then_some(table)
    }

    fn value(&self, name: &str, operation: Operation, figure: Figure) -> Option<f64> {
        let samples = self
            .report
            .samples(self.workload, self.is_far, name, operation);
        median(samples, figure)
    }

    fn cells(&self, of: impl Fn(Operation) -> Option<f64>, digits: usize) -> Vec<String> {
        let cells = self.operations.iter().map(|one| cell(of(*one), digits));
        cells.collect()
    }

    fn best(&self, operation: Operation) -> Option<f64> {
        let peers = self
            .report
            .tools()
            .iter()
            .filter(|tool| **tool != Tool::Agent);
        peers
            .filter_map(|tool| self.value(tool.name(), operation, SECONDS))
            .min_by(f64::total_cmp)
    }

    fn floor(&self, operation: Operation, figure: Figure) -> Option<f64> {
        self.value(floor(operation)?.name(), operation, figure)
    }

    fn ratios(&self, to: impl Fn(Operation) -> Option<f64>) -> String {
        let agent = |operation| self.value(Tool::Agent.name(), operation, SECONDS);
        let ratio = |operation| Some(agent(operation)? / to(operation)?);
        self.cells(ratio, 2).join(" | ")
    }

    fn tool(&self, name: &str) -> String {
        let cells = |figure, digits| self.cells(|one| self.value(name, one, figure), digits);
        let mut row = format!(
            "| {name} | {} | {} | {} | {} | {} |",
            cells(SECONDS, 3).join(" | "),
            cells(PROCESSOR, 2).join(", "),
            cells(PEAK, 0).join(", "),
            cells(REQUESTS, 0).join(", "),
            // Of backups: the first three.
            cells(UP, 2)[..3.min(self.operations.len())].join(", ")
        );
        if !self.is_far {
            let down = cell(self.value(name, Operation::Restore, DOWN), 0);
            // A string takes everything.
            let _ = write!(row, " {down} |");
        }
        row
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let names: Vec<&str> = self.operations.iter().map(|one| one.name()).collect();
        let (far, down) = if self.is_far {
            (", 40 ms added to each request", "")
        } else {
            ("", " MB down by restore |")
        };
        let columns = names.len() + if self.is_far { 5 } else { 6 };
        let mut lines = vec![
            format!("## {}{far}\n", self.workload.title()),
            format!(
                "| | {}, s | processor s ({}) | peak MiB | requests | MB up |{down}",
                names.join(", s | "),
                names.join(", ")
            ),
            format!("|{}", " --- |".repeat(columns)),
        ];
        let tools = self.report.tools().iter().map(|tool| tool.name());
        let measured = tools.filter(|name| self.value(name, Operation::Full, SECONDS).is_some());
        lines.extend(measured.map(|name| self.tool(name)));
        let rest = " |".repeat(columns - names.len() - 1);
        let best = self.ratios(|one| self.best(one));
        lines.push(format!("| **agent / best peer** | {best} |{rest}"));
        if !self.is_far {
            let seconds = self.cells(|one| self.floor(one, SECONDS), 3).join(" | ");
            let processor = self.cells(|one| self.floor(one, PROCESSOR), 2).join(", ");
            lines.push(format!(
                "| floor without a store | {seconds} | {processor} |{}",
                &rest[2..]
            ));
            let ratios = self.ratios(|one| self.floor(one, SECONDS));
            lines.push(format!("| **agent / floor** | {ratios} |{rest}"));
        }
        lines.join("\n") + "\n\n"
    }
}
