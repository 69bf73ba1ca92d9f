//! The agent's peak memory where it could grow: a million files in one folder and in many, and one huge hole.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::measure::measure;
use crate::server::Server;
use crate::tools::{Lane, Tool};
use crate::{MEMORY_DISK, Outcome};

const FILES: usize = 1_000_000;
const IN_A_FOLDER: usize = 1_000;
const HOLE: u64 = 20 << 30;
const BLOCKS: u64 = 64;

/// Makes each tree, backs it up twice, restores it, and prints the peaks.
pub fn run() -> Outcome {
    println!("| peak resident, KiB | full | unchanged | restore |\n| --- | --- | --- | --- |");
    case("one hole of 20 GiB", hole)?;
    case("1,000,000 files in one folder", |tree| files(tree, FILES))?;
    case("1,000,000 files, 1,000 to a folder", |tree| {
        files(tree, IN_A_FOLDER)
    })
}

fn case(what: &str, make: impl Fn(&Path) -> Outcome) -> Outcome {
    let folder = tempfile::Builder::new()
        .prefix("backup-bench-")
        .tempdir_in(MEMORY_DISK)?;
    let server = Server::start()?;
    let lane = Lane {
        tool: Tool::Agent,
        tree: folder.path().join("tree"),
        state: folder.path().join("state"),
        target: folder.path().join("target"),
        endpoint: server.address,
    };
    for path in [&lane.tree, &lane.state, &lane.target] {
        fs::create_dir(path)?;
    }
    make(&lane.tree)?;
    let mut row = format!("| {what} |");
    for run in [lane.backup(), lane.backup(), lane.restore()] {
        let cost = measure(&run, server.pid())?;
        // A string takes everything.
        let _ = write!(row, " {:.0} ({:.1} s) |", cost.peak, cost.seconds);
    }
    println!("{row}");
    Ok(())
}

/// A short name each and a few bytes: what counts is how many there are.
fn files(tree: &Path, in_a_folder: usize) -> Outcome {
    for at in 0..FILES {
        let folder = tree.join(format!("{:04}", at / in_a_folder));
        if at % in_a_folder == 0 {
            fs::create_dir(&folder)?;
        }
        fs::write(folder.join(format!("{at:07}.txt")), at.to_string())?;
    }
    Ok(())
}

fn hole(tree: &Path) -> Outcome {
    let file = File::create(tree.join("disk.img"))?;
    file.set_len(HOLE)?;
    for at in 0..BLOCKS {
        file.write_all_at(&[1; 4096], at * (HOLE / BLOCKS))?;
    }
    Ok(())
}
