//! The numbers of the edge on real parts: what Worker and object add to a request, cold starts with and without a workspace
//! to restore, sizes, and memory in the container. Prints a table; asserts nothing. `make bench-edge` runs it.

use std::error::Error;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use e2e::edge::{Edge, Store, TOKEN, Variant, docker, image};
use e2e::http;
use e2e::openclaw::repository;
use e2e::supervisor::children;
use e2e::table::{figure, head, milliseconds, row};
use e2e::workspace::{Scale, generate};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const REQUESTS: usize = 300;
const STARTS: usize = 10;
/// With the real gateway, which takes its time.
const GATEWAY_STARTS: usize = 3;
/// Between two looks at a process's memory, of which the kernel keeps the peak.
const SAMPLE: Duration = Duration::from_millis(5);

fn main() -> Outcome {
    head();
    let bundle = fs::metadata(repository().join("dist/worker/index.js"))?;
    figure("size of the Worker, bytes", bundle.len());
    let size = docker(&["image", "inspect", "--format", "{{.Size}}", &image()]);
    figure(
        "size of the image, MB",
        size.trim().parse::<u64>()? / 1_000_000,
    );
    let idle = Variant::idle();
    warm_requests(&idle)?;
    let first = |_| first_answer(&Store::new(), &idle.name).1;
    row(
        "cold start, first request to its answer, ms",
        (0..STARTS).map(first).collect(),
    )?;
    starts("empty store", Store::new)?;
    let full = Store::new();
    back_up_a_workspace(&full, &idle)?;
    starts("workspace of 600 MB on the store", || full.clone())
}

/// The same request by both ways in turn, each on a connection of its own.
fn warm_requests(idle: &Variant) -> Outcome {
    let edge = Edge::start(&idle.name, &Store::new(), &[]);
    edge.until_restored();
    let (mut through, mut direct, mut added) = (Vec::new(), Vec::new(), Vec::new());
    let ways = [edge.address, edge.direct()];
    let authorization = format!("Bearer {TOKEN}");
    let headers = [("Authorization", authorization.as_str())];
    for _ in 0..REQUESTS {
        let mut took = [0.0; 2];
        for (took, way) in took.iter_mut().zip(ways) {
            let begun = Instant::now();
            let answer = http::request(way, "GET", "/v1/status", &headers, b"");
            *took = milliseconds(begun.elapsed());
            if answer.status != 200 {
                return Err(format!("{way} answered {answer:?}").into());
            }
        }
        through.push(took[0]);
        direct.push(took[1]);
        added.push(took[0] - took[1]);
    }
    row(
        "GET /v1/status through workerd, Worker and object, ms",
        through,
    )?;
    row("the same at the container's own port, ms", direct)?;
    row("the difference, pair by pair, ms", added)?;
    Ok(())
}

/// A new edge and the milliseconds from its first request to the answer.
fn first_answer(store: &Store, image: &str) -> (Edge, f64) {
    let edge = Edge::start(image, store, &[]);
    let begun = Instant::now();
    edge.status();
    let took = milliseconds(begun.elapsed());
    (edge, took)
}

/// Cold starts of the real gateway, each in a container of its own.
fn starts(what: &str, store: impl Fn() -> Store) -> Outcome {
    let (mut first, mut restored, mut running) = (Vec::new(), Vec::new(), Vec::new());
    let mut memory = [Vec::new(), Vec::new()];
    for _ in 0..GATEWAY_STARTS {
        let begun = Instant::now();
        let (edge, took) = first_answer(&store(), &image());
        first.push(took);
        let supervisor = supervisor(&edge)?;
        memory[0].push(peak_of_agent(supervisor, || {
            edge.until_restored();
        })?);
        restored.push(begun.elapsed().as_secs_f64());
        edge.until_gateway("running");
        running.push(begun.elapsed().as_secs_f64());
        memory[1].push(memory_of(supervisor, "VmRSS:").ok_or("the supervisor has memory")?);
    }
    let [agent, supervisor] = memory;
    row(&format!("{what}: first request to its answer, ms"), first)?;
    row(&format!("{what}: to the end of the restore, s"), restored)?;
    row(&format!("{what}: to a gateway that is running, s"), running)?;
    row(
        &format!("{what}: agent's peak resident while it restores, KiB"),
        agent,
    )?;
    row(
        &format!("{what}: supervisor, resident with the gateway running, KiB"),
        supervisor,
    )?;
    Ok(())
}

fn back_up_a_workspace(store: &Store, idle: &Variant) -> Outcome {
    let edge = Edge::start(&idle.name, store, &[]);
    edge.until_restored();
    let folder = tempfile::tempdir()?;
    generate(folder.path(), 1, Scale::FULL)?;
    edge.shell("mkdir /data/workspace");
    // As a tarball, because `docker cp` fills holes.
    let mut pack = Command::new("tar")
        .args(["--sparse", "--create", "--directory"])
        .arg(folder.path())
        .arg(".")
        .stdout(Stdio::piped())
        .spawn()?;
    let unpacked = Command::new("docker")
        .args(["exec", "--interactive", "--user", "openclaw"])
        .args([
            &edge.container(),
            "tar",
            "--extract",
            "--directory",
            "/data/workspace",
        ])
        .stdin(pack.stdout.take().ok_or("it is piped")?)
        .status()?;
    if !(pack.wait()?.success() && unpacked.success()) {
        return Err("the workspace did not get into the container".into());
    }
    let mut answer = serde_json::Value::Null;
    let peak = peak_of_agent(supervisor(&edge)?, || {
        answer = edge.data("POST", "/v1/backup");
    })?;
    let number = |key: &str| answer[key].as_f64().ok_or("a backup has numbers");
    row(
        "POST /v1/backup of the workspace, s",
        vec![number("durationMs")? / 1000.0],
    )?;
    row("the same, files", vec![number("files")?])?;
    row(
        "the same, uploaded, MB",
        vec![number("bytesUploaded")? / 1e6],
    )?;
    row("the same, agent's peak resident, KiB", vec![peak])?;
    Ok(())
}

/// The container's first process, by its id on this machine.
fn supervisor(edge: &Edge) -> Outcome<i32> {
    let pid = docker(&["inspect", "--format", "{{.State.Pid}}", &edge.container()]);
    Ok(pid.trim().parse()?)
}

/// Peak of the resident memory of the agent that a supervisor runs meanwhile, in KiB; 0 when none was seen.
fn peak_of_agent(supervisor: i32, work: impl FnOnce()) -> Outcome<f64> {
    let is_done = AtomicBool::new(false);
    let peak = thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut peak = 0.0_f64;
            while !is_done.load(Ordering::Relaxed) {
                for child in children(supervisor)
                    .into_iter()
                    .filter(|pid| is_agent(*pid))
                {
                    peak = peak.max(memory_of(child, "VmHWM:").unwrap_or_default());
                }
                thread::sleep(SAMPLE);
            }
            peak
        });
        work();
        is_done.store(true, Ordering::Relaxed);
        watch.join()
    });
    peak.map_err(|_| "the watch failed".into())
}

fn is_agent(pid: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    name.is_ok_and(|name| name.trim_end() == "backup-agent")
}

/// A line of a process's status, in KiB, for as long as it lives.
fn memory_of(pid: i32, line: &str) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let rest = status.lines().find_map(|text| text.strip_prefix(line))?;
    rest.trim().trim_end_matches(" kB").parse().ok()
}
