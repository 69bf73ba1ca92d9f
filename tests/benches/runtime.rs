//! The numbers of the whole: sizes, memory, start, devices against the gateway's own command line, and backup and restore
//! of a fresh gateway. Prints a table; asserts nothing. `make bench` runs it with the released binaries.

use std::error::Error;
use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::binaries::binary;
use e2e::http;
use e2e::openclaw::{OpenClaw, prepare_script, require_approval};
use e2e::supervisor::{Setup, Supervisor, TOKEN, place};
use e2e::table::{figure, head, milliseconds, row};
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const GATEWAY_TOKEN: &str = "gateway-token-0123456789abcdefghij";
const STARTS: usize = 20;
const CALLS: usize = 20;
/// The command line takes seconds for each.
const CLI_CALLS: usize = 5;

fn main() -> Outcome {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [word, program, rest @ ..] = &arguments[..]
        && word == "measure"
    {
        return measure(program, rest);
    }
    head();
    for name in ["supervisor", "backup-agent"] {
        let size = fs::metadata(binary(name))?.len();
        figure(&format!("size of {name}, bytes"), size);
    }
    starts()?;
    real_gateway()
}

/// Runs a program in place of this one's child and reports what it took: a process of its own, so that the kernel's
/// figure for children is about that program alone.
fn measure(program: &str, arguments: &[String]) -> Outcome {
    let begun = Instant::now();
    let status = Command::new(program)
        .args(arguments)
        .stdout(Stdio::null())
        .status()?;
    if !status.success() {
        return Err(format!("{program} failed: {status}").into());
    }
    let took = begun.elapsed();
    let memory = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    println!("{} {memory}", took.as_secs_f64() * 1000.0);
    Ok(())
}

/// Time and peak memory of a run of the agent, in milliseconds and KiB.
fn agent(disk: &Path, arguments: &[&str]) -> Outcome<(f64, f64)> {
    let output = Command::new(std::env::current_exe()?)
        .arg("measure")
        .arg(binary("backup-agent"))
        .args(arguments)
        .env("RUNTIME_ROOT", disk.join("root"))
        .env("RUNTIME_STATE", disk.join("bench-state"))
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let (took, memory) = text.trim().split_once(' ').ok_or("the agent failed")?;
    Ok((took.parse()?, memory.parse()?))
}

/// From exec of the supervisor to its first answer, and to the first instruction of its gateway (the fake one).
fn starts() -> Outcome {
    let (mut answers, mut gateways, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..STARTS {
        let api = free_address()?;
        let setup = Setup::new().with("RUNTIME_LISTEN", &api.to_string());
        let program = setup.program();
        let clock = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
        let begun = Instant::now();
        // In a thread, because the harness itself waits for a log line.
        let asker = std::thread::spawn(move || {
            while TcpStream::connect(api).is_err() {
                std::thread::yield_now();
            }
            let bearer = format!("Bearer {TOKEN}");
            let headers = [("Authorization", bearer.as_str())];
            let answer = http::request(api, "GET", "/v1/status", &headers, b"");
            (answer.status, begun.elapsed())
        });
        let mut supervisor = setup.start_as(program);
        let (status, took) = asker.join().map_err(|_| "the asker failed")?;
        if status != 200 {
            return Err(format!("the status was answered with {status}").into());
        }
        answers.push(milliseconds(took));
        let start = supervisor.until_running(1);
        let nanos = start["monotonic"].as_i64().ok_or("a start has a time")?;
        let begun = clock.tv_sec() * 1_000_000_000 + clock.tv_nsec();
        gateways.push(milliseconds(Duration::from_nanos(u64::try_from(
            nanos - begun,
        )?)));
        memory.push(resident(&supervisor)?);
        supervisor.stop();
    }
    row("supervisor, exec to first answer of the API, ms", answers)?;
    row(
        "supervisor, exec to first instruction of the gateway, ms",
        gateways,
    )?;
    row(
        "supervisor, resident while a fake gateway runs, KiB",
        memory,
    )
}

fn real_gateway() -> Outcome {
    let openclaw = OpenClaw::install()?;
    let disk = tempfile::tempdir()?;
    let root = disk.path().join("root");
    require_approval(&root)?;
    let supervisor = start(&openclaw, disk.path())?;

    let begun = Instant::now();
    while supervisor.status()["gateway"]["status"] != "running" {
        std::thread::sleep(Duration::from_millis(100));
    }
    row(
        "real gateway, start to ready, s",
        vec![begun.elapsed().as_secs_f64()],
    )?;
    row(
        "supervisor, resident while a real gateway runs, KiB",
        vec![resident(&supervisor)?],
    )?;

    let mut calls = Vec::new();
    for _ in 0..CALLS {
        let begun = Instant::now();
        let answer = supervisor.get("/v1/devices");
        calls.push(milliseconds(begun.elapsed()));
        if answer.status != 200 {
            return Err(format!("devices were answered with {answer:?}").into());
        }
    }
    row("GET /v1/devices, ms", calls)?;
    let mut calls = Vec::new();
    for _ in 0..CLI_CALLS {
        let begun = Instant::now();
        let status = Command::new("openclaw")
            .args(["devices", "list", "--json"])
            .env_clear()
            .env("HOME", &root)
            .env("PATH", openclaw.search_path())
            .env("OPENCLAW_GATEWAY_TOKEN", GATEWAY_TOKEN)
            .env(
                "OPENCLAW_GATEWAY_PORT",
                supervisor.setup.gateway.port().to_string(),
            )
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        if !status.success() {
            return Err(format!("the command line failed: {status}").into());
        }
        calls.push(milliseconds(begun.elapsed()));
    }
    row("openclaw devices list --json, same gateway, ms", calls)?;

    let (mut backups, mut restores, mut memory) =
        (Vec::new(), Vec::new(), (Vec::new(), Vec::new()));
    for round in 0..CLI_CALLS {
        let store = format!("file://{}/store-{round}", disk.path().display());
        let (took, peak) = agent(disk.path(), &["backup", "--store", &store])?;
        backups.push(took);
        memory.0.push(peak);
        let target = format!("{}/restored-{round}", disk.path().display());
        let (took, peak) = agent(
            disk.path(),
            &["restore", "--store", &store, "--target", &target],
        )?;
        restores.push(took);
        memory.1.push(peak);
    }
    row("backup-agent backup of a fresh gateway, ms", backups)?;
    row("the same, peak resident, KiB", memory.0)?;
    row("backup-agent restore of it, ms", restores)?;
    row("the same, peak resident, KiB", memory.1)?;
    let first = supervisor.post("/v1/backup");
    let uploaded = first.body["data"]["bytesUploaded"].as_f64();
    row(
        "bytes uploaded by POST /v1/backup",
        vec![uploaded.ok_or("the backup failed")?],
    )
}

fn start(openclaw: &OpenClaw, disk: &Path) -> Outcome<Supervisor> {
    let setup = Setup::new()
        .with("RUNTIME_ROOT", &disk.join("root").display().to_string())
        .with("RUNTIME_GATEWAY_TOKEN", GATEWAY_TOKEN)
        .with(
            "RUNTIME_GATEWAY_USER",
            &nix::unistd::geteuid().as_raw().to_string(),
        )
        .with(
            "RUNTIME_GATEWAY_PREPARE",
            &prepare_script().display().to_string(),
        );
    let port = setup.gateway.port().to_string();
    let command =
        format!("openclaw gateway run --port {port} --bind loopback --allow-unconfigured");
    let setup = setup.command(&command.split(' ').collect::<Vec<_>>());
    let agent: PathBuf = setup.folder.path().join("bin/backup-agent");
    fs::remove_file(&agent)?;
    place(&binary("backup-agent"), &agent);
    let mut program = setup.program();
    program
        .env("PATH", openclaw.search_path())
        .stdout(Stdio::null());
    Ok(setup.start_as(program))
}

/// Resident memory, in KiB.
fn resident(supervisor: &Supervisor) -> Outcome<f64> {
    let status = fs::read_to_string(format!("/proc/{}/status", supervisor.pid()))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let text = line.ok_or("a process has memory")?;
    let number: String = text.chars().filter(char::is_ascii_digit).collect();
    Ok(number.parse()?)
}

/// An address that nobody listens on now.
fn free_address() -> Outcome<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
