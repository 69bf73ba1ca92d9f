//! One run of a program, measured as a whole: a process in between whose only children are the program and what it starts,
//! so that the kernel's figures for children are about those alone.

use std::fs;
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
    /// Share of the processors that programs had which are not part of the benchmark: above a few hundredths, the time
    /// that passed says more about them.
    pub others: f64,
}

/// Clock ticks that count the time of processors, per second, on every Linux there is.
const TICKS: f64 = 100.0;

/// Seconds that all processors worked for anybody, that they could have worked, and that they worked for a process.
fn processors(of: u32) -> Outcome<[f64; 3]> {
    let ticks = |text: &str| -> Vec<f64> { text.split(' ').flat_map(str::parse).collect() };
    let stat = fs::read_to_string("/proc/stat")?;
    let all = ticks(stat.lines().next().unwrap_or_default());
    let own = fs::read_to_string(format!("/proc/{of}/stat"))?;
    // Behind the name in parentheses, which may hold anything, and the state.
    let own = ticks(own.rsplit_once(") ").map_or("", |(_, rest)| &rest[2..]));
    let (Some(&[user, nice, system, idle, wait, hard, soft, steal]), Some(own)) =
        (all.first_chunk(), own.get(10..12))
    else {
        return Err("cannot read the processors' times in /proc".into());
    };
    let busy = user + nice + system + hard + soft + steal;
    Ok([busy, busy + idle + wait, own.iter().sum()].map(|ticks: f64| ticks / TICKS))
}

/// Runs it to its end, beside a server.
pub fn measure(run: &Run, server: u32) -> Outcome<Cost> {
    let before = processors(server)?;
    let output = Command::new(std::env::current_exe()?)
        .arg("measure")
        .arg(&run.program)
        .args(&run.arguments)
        .current_dir(&run.folder)
        .env_clear()
        .envs(run.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .output()?;
    let answer = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = answer.split_whitespace().flat_map(str::parse).collect();
    let [seconds, peak, user, system] = numbers[..] else {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cannot run {}: {said}", run.program.display()).into());
    };
    let after = processors(server)?;
    let [busy, possible, serving] = [0, 1, 2].map(|at| after[at] - before[at]);
    Ok(Cost {
        seconds,
        peak,
        user,
        system,
        // Ticks are coarse: a short run may get a share below nothing.
        others: ((busy - serving - user - system) / possible.max(1.0 / TICKS)).clamp(0.0, 1.0),
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
