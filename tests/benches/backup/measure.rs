//! One run of a program, measured as a whole: a process in between whose only children are the program and what it starts,
//! so that the kernel's figures for children are about those alone.

use std::process::{Command, Stdio};
use std::time::Instant;

use nix::sys::resource::{UsageWho, getrusage};

use crate::Outcome;
use crate::tools::Run;

/// What a run took.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub seconds: f64,
    /// Of the largest of its processes, in KiB.
    pub peak: f64,
    /// In the processors, of all of them.
    pub user: f64,
    pub system: f64,
}

/// Runs it to its end.
pub fn measure(run: &Run) -> Outcome<Cost> {
    let output = Command::new(std::env::current_exe()?)
        .arg("measure")
        .arg(&run.program)
        .args(&run.arguments)
        .current_dir(&run.folder)
        .env_clear()
        .envs(run.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.split_whitespace().flat_map(str::parse).collect();
    let [seconds, peak, user, system] = numbers[..] else {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cannot run {:?} {:?}: {said}", run.program, run.arguments).into());
    };
    Ok(Cost {
        seconds,
        peak,
        user,
        system,
    })
}

/// The process in between.
pub fn between(program: &str, arguments: &[String]) -> Outcome {
    let begun = Instant::now();
    let status = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .status()?;
    let took = begun.elapsed().as_secs_f64();
    if !status.success() {
        return Err(status.to_string().into());
    }
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| {
        // No run takes so long that this loses anything.
        time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6
    };
    println!(
        "{took} {} {} {}",
        usage.max_rss(),
        seconds(usage.user_time()),
        seconds(usage.system_time())
    );
    Ok(())
}
