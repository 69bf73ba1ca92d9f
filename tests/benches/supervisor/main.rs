//! The supervisor beside its peers: memory, size, restart, requests, orphans. In one run, in pairs where times are compared.
//!
//! `make bench-supervisor` measures everything in some minutes, and writes `docs/benchmarks/supervisor.md`, its plot and the
//! raw run. Peers are taken from `PATH` (`tests/install-supervisors.sh` puts them somewhere); whatever is missing is left out.

#![expect(
    clippy::cast_precision_loss,
    reason = "nothing that is measured here has more digits than a float"
)]

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e::http;
use e2e::supervisor::{Setup, TOKEN, children, descendants};
use e2e::wait::until_some;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Map, Value, json};

use self::attack::Attack;
use self::load::{Line, load};
use self::peers::{Peer, Tree};

mod attack;
#[path = "../backup/chart.rs"]
mod chart;
mod load;
mod peers;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const ROUNDS: usize = 3;
const LOAD_TIME: Duration = Duration::from_secs(2);
const ATTACK_TIME: Duration = Duration::from_secs(5);
const LINES: [(&str, Line); 2] = [("kept", Line::Kept), ("new each time", Line::Fresh)];
const ORPHANS: usize = 1000;

fn main() -> Outcome {
    let mut run = Map::new();
    run.insert("machine".to_owned(), machine()?.into());
    for peer in Peer::ALL {
        if !peer.is_installed() {
            eprintln!("left out: {} is not installed", peer.name());
            continue;
        }
        eprintln!("{}", peer.name());
        let (resident, proportional, restarts) = keep(peer)?;
        let orphans = orphans(peer)
            .inspect_err(|error| eprintln!("orphans: {error}"))
            .ok();
        let sizes = peer
            .programs()
            .into_iter()
            .map(|path| fs::metadata(path).map(|found| found.len()));
        run.insert(
            peer.name().to_owned(),
            json!({
                "bytes": sizes.sum::<Result<u64, _>>()?,
                "residentKiB": resident,
                "proportionalKiB": proportional,
                "restartMs": restarts,
                "orphansPerSecond": orphans.map(|(rate, _)| rate),
                "orphansLeft": orphans.map(|(_, left)| left),
            }),
        );
    }
    eprintln!("requests");
    run.insert("requests".to_owned(), requests()?);
    eprintln!("attacks");
    run.insert("attacks".to_owned(), attacks()?);
    let run = Value::Object(run);
    let today = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
    fs::write(
        repository().join(format!("tests/benches/runs/{today}-supervisor.json")),
        format!("{run:#}\n"),
    )?;
    let page = page(&run, &today);
    println!("{page}");
    fs::write(repository().join("docs/benchmarks/supervisor.md"), page)?;
    fs::write(
        repository().join("docs/benchmarks/supervisor.svg"),
        plot(&run),
    )?;
    Ok(())
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().flat_map(serde_json::from_str).collect()
}

/// Memory in KiB while it keeps the fake gateway running, and milliseconds from the gateway's exit to the first instruction
/// of the next one.
fn keep(peer: Peer) -> Outcome<(u64, u64, Vec<f64>)> {
    let setup = Setup::new();
    let (fake, gateway) = (setup.fake(), setup.gateway);
    fs::copy(path_in("E2E_STATIC_GATEWAY")?, fake.join("fake-gateway"))?;
    let program = [
        fake.join("fake-gateway").display().to_string(),
        gateway.port().to_string(),
        fake.display().to_string(),
    ];
    let tree = Tree::start(&mut peer.command(&setup, &program)?)?;
    let started = |count| {
        until_some("a start", || {
            let starts = lines(&fake.join("starts.jsonl"));
            (starts.len() >= count).then_some(starts)
        })
    };
    let latest = started(1);
    // Ready for the probe too, so that an exit is a clean one, and at rest.
    std::thread::sleep(Duration::from_secs(1));
    let gateway_pid = latest
        .last()
        .and_then(|start| start["pid"].as_i64())
        .unwrap_or_default();
    let own = std::iter::once(tree.pid()).chain(descendants(tree.pid()));
    let own: Vec<i32> = own.filter(|pid| i64::from(*pid) != gateway_pid).collect();
    let memory = |field: &str| {
        own.iter()
            .map(|pid| memory(*pid, "smaps_rollup", field))
            .sum::<Outcome<u64>>()
    };
    let (resident, proportional) = (memory("Rss:")?, memory("Pss:")?);

    let mut restarts = Vec::new();
    for number in 1..=peer.restarts() {
        let _ = http::raw(gateway, b"GET /exit/0 HTTP/1.1\r\n\r\n");
        let starts = started(number + 1);
        let exits = lines(&fake.join("exits.jsonl"));
        let (from, to) = (
            exits[number - 1]["monotonic"].as_f64(),
            starts[number]["monotonic"].as_f64(),
        );
        restarts.push((to.ok_or("no time")? - from.ok_or("no time")?) / 1e6);
        // Its readiness is looked for ten times a second.
        std::thread::sleep(Duration::from_millis(300));
    }
    Ok((resident, proportional, restarts))
}

/// A figure of a process in KiB, from that file of its folder in /proc.
fn memory(pid: i32, file: &str, field: &str) -> Outcome<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let number = line
        .ok_or("a process has memory")?
        .trim()
        .trim_end_matches(" kB");
    Ok(number.parse()?)
}

/// A thousand processes that lost their parent end at once: how many are reaped per second, and how many are left after 0.1 s.
fn orphans(peer: Peer) -> Outcome<(f64, usize)> {
    let setup = Setup::new();
    let folder = setup.fake();
    let script = folder.join("orphans.sh");
    let gate = folder.join("gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::from_bits_truncate(0o666))?;
    let text = format!(
        "#!/bin/sh\ni=0\nwhile [ $i -lt {ORPHANS} ]; do ( {{ read x <{0}; }} & ); i=$((i+1)); done\n\
         touch {1}/ready\nexec sleep 1000\n",
        gate.display(),
        folder.display()
    );
    fs::write(&script, text)?;
    let program = ["/bin/sh".to_owned(), script.display().to_string()];
    let setup = setup.command(&program.each_ref().map(String::as_str));
    let inner = peer.command(&setup, &program)?;
    let mut outer = Command::new("unshare");
    outer
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(inner.get_program())
        .args(inner.get_args());
    outer.envs(
        inner
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?))),
    );
    let tree = Tree::start(&mut outer)?;
    until_some("orphans", || folder.join("ready").exists().then_some(()));
    let init = *children(tree.pid()).first().ok_or("no init")?;
    let before = until_some("all of them", || {
        Some(children(init).len()).filter(|count| *count >= ORPHANS)
    });
    let begun = Instant::now();
    drop(fs::OpenOptions::new().write(true).open(&gate)?);
    let mut after = None;
    let took = loop {
        let left = children(init).len().saturating_sub(before - ORPHANS);
        let passed = begun.elapsed();
        if passed >= Duration::from_millis(100) && after.is_none() {
            after = Some(left);
        }
        if left == 0 || passed > Duration::from_secs(10) {
            break passed;
        }
        std::thread::sleep(Duration::from_micros(500));
    };
    Ok((ORPHANS as f64 / took.as_secs_f64(), after.unwrap_or(0)))
}

/// `status` beside a server on the same library that answers a constant.
fn requests() -> Outcome<Value> {
    let supervisor = Setup::new().start();
    supervisor.until_running(1);
    let head = format!("Authorization: Bearer {TOKEN}\r\n");
    let answer = supervisor.get("/v1/status");
    let length = answer.header("content-length").ok_or("no length")?;
    let mut hello = Command::new(path_in("E2E_HELLO")?)
        .arg(length)
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(hello.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let floor: SocketAddr = line.trim().parse()?;
    let mut figures = Map::new();
    for connections in [1, 64] {
        let mut pairs = Vec::new();
        for _ in 0..ROUNDS {
            let own = load(supervisor.api, &head, Line::Kept, connections, LOAD_TIME)?;
            let floor = load(floor, &head, Line::Kept, connections, LOAD_TIME)?;
            let figures = |load: load::Load| json!({ "perSecond": load.rate, "p50Us": load.median, "p99Us": load.slowest });
            pairs.push(json!({ "supervisor": figures(own), "hyper": figures(floor) }));
        }
        figures.insert(connections.to_string(), pairs.into());
    }
    hello.kill()?;
    hello.wait()?;
    Ok(figures.into())
}

/// `status` for whoever has the token, while strangers do their worst.
fn attacks() -> Outcome<Value> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let head = format!("Authorization: Bearer {TOKEN}\r\n");
    let mut figures = Map::new();
    for attack in Attack::ALL {
        let mut of_attack = Map::new();
        for (name, line) in LINES {
            let supervisor = Setup::new().start();
            supervisor.until_running(1);
            let (load, strangers) = attack.beside(supervisor.api, &head, line, ATTACK_TIME)?;
            let peak = memory(supervisor.pid().as_raw(), "status", "VmHWM:")?;
            of_attack.insert(
                name.to_owned(),
                json!({
                    "strangersPerSecond": strangers, "perSecond": load.rate, "p50Us": load.median, "p99Us": load.slowest,
                    "longestUs": load.longest, "lost": load.lost, "peakKiB": peak,
                }),
            );
        }
        figures.insert(attack.name().to_owned(), of_attack.into());
    }
    Ok(figures.into())
}

fn path_in(name: &str) -> Outcome<PathBuf> {
    let path = std::env::var_os(name);
    Ok(path
        .ok_or_else(|| format!("{name} names a program: use make bench-supervisor"))?
        .into())
}

fn machine() -> Outcome<String> {
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let model = processor
        .lines()
        .find_map(|line| line.strip_prefix("model name\t: "))
        .unwrap_or("unknown");
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = fs::read_to_string("/proc/loadavg")?;
    let (load, processors) = (
        load.split(' ').next().unwrap_or_default(),
        std::thread::available_parallelism()?,
    );
    Ok(format!(
        "{processors} × {model}, Linux {}, load {load} before",
        kernel.trim()
    ))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .collect()
}

fn cell(value: Option<f64>, digits: usize) -> String {
    value.map_or("–".to_owned(), |value| format!("{value:.digits$}"))
}

fn requests_of(run: &Value, connections: &str, name: &str, figure: &str) -> Option<f64> {
    let rounds = run["requests"][connections].as_array()?.iter();
    median(
        rounds
            .filter_map(|round| round[name][figure].as_f64())
            .collect(),
    )
}

fn page(run: &Value, today: &str) -> String {
    let mut text = format!(
        "# The supervisor beside its peers\n\nMeasured on {today} with `make bench-supervisor`, {}; \
         [the raw run](../../tests/benches/runs/{today}-supervisor.json). Medians.\n\n![Plot](supervisor.svg)\n\n\
         | | size KiB | RSS KiB | PSS KiB | exit of the child to the next one's first instruction, ms | orphans reaped per second | left of {ORPHANS} after 0.1 s |\n\
         | --- | --- | --- | --- | --- | --- | --- |\n",
        run["machine"].as_str().unwrap_or_default()
    );
    for peer in Peer::ALL {
        let of = &run[peer.name()];
        if of.is_null() {
            continue;
        }
        let figure = |name: &str| of[name].as_f64();
        let cells = [
            cell(figure("bytes").map(|bytes| bytes / 1024.0), 0),
            cell(figure("residentKiB"), 0),
            cell(figure("proportionalKiB"), 0),
            cell(median(numbers(&of["restartMs"])), 2),
            cell(figure("orphansPerSecond"), 0),
            cell(figure("orphansLeft"), 0),
        ];
        // A string takes everything.
        let _ = writeln!(text, "| {} | {} |", peer.name(), cells.join(" | "));
    }
    text += "\n| `GET /v1/status` | connections | per second | p50 µs | p99 µs |\n| --- | --- | --- | --- | --- |\n";
    for connections in ["1", "64"] {
        for name in ["supervisor", "hyper"] {
            let of = |figure, digits| cell(requests_of(run, connections, name, figure), digits);
            let _ = writeln!(
                text,
                "| {name} | {connections} | {} | {} | {} |",
                of("perSecond", 0),
                of("p50Us", 0),
                of("p99Us", 0)
            );
        }
    }
    text += "\n| `GET /v1/status` beside | on a connection that is | strangers per second | p50 µs | p99 µs | longest ms | unanswered | peak KiB |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    for attack in Attack::ALL {
        for (name, _) in LINES {
            let of = &run["attacks"][attack.name()][name];
            let cell = |figure: &str, scale: f64, digits| {
                cell(of[figure].as_f64().map(|value| value * scale), digits)
            };
            let cells = [
                cell("strangersPerSecond", 1.0, 0),
                cell("p50Us", 1.0, 0),
                cell("p99Us", 1.0, 0),
                cell("longestUs", 0.001, 1),
                cell("lost", 1.0, 0),
                cell("peakKiB", 1.0, 0),
            ];
            let _ = writeln!(
                text,
                "| {} | {name} | {} |",
                attack.name(),
                cells.join(" | ")
            );
        }
    }
    text + NOTES
}

const NOTES: &str = "\n## How to read it\n\n\
- Memory is that of everything that runs all the time: of s6 and runit two programs, which share Debian's C library; size is that\n  \
of these programs without libraries, of supervisord its script without Python.\n\
- The child exits with 0 while it is well, so no delay is due to the supervisor. s6 waits a second by design, runit from the second\n  \
start on; tini starts nothing again. The child is a static program, so what is measured ends with exec and not with a loader; a\n  \
loop of the shell that does nothing else is the floor.\n\
- Orphans wait at a pipe in a pid namespace of their own, the tool being PID 1, and end at once. The time includes their own.\n\
- `hyper` is a static server on the same library that gets the same requests and has a constant answer of the\n  \
same length, in pairs with the supervisor. The supervisor checks the token, holds each connection to its time, and contains\n  \
a panic of its own.\n\
- Beside an attack, one client with the token asks as fast as it is answered, while strangers come as fast as one thread of the\n  \
same machine can make them. Its processors are shared by all three.\n";

fn plot(run: &Value) -> String {
    let bars = |of: &dyn Fn(&Value) -> Option<f64>| -> Vec<(&str, f64)> {
        let bars = Peer::ALL
            .into_iter()
            .filter_map(|peer| Some((peer.name(), of(&run[peer.name()])?)));
        bars.collect()
    };
    let rate = |connections| {
        let names = ["supervisor", "hyper"].into_iter();
        names
            .filter_map(|name| Some((name, requests_of(run, connections, name, "perSecond")?)))
            .collect()
    };
    chart::bars(
        "supervisor and peers",
        &[
            (
                "RSS, KiB, less is better",
                bars(&|of| of["residentKiB"].as_f64()),
            ),
            (
                "restart, ms, less is better",
                bars(&|of| median(numbers(&of["restartMs"]))),
            ),
            (
                "status at 1 connection, per second, more is better",
                rate("1"),
            ),
            (
                "status at 64 connections, per second, more is better",
                rate("64"),
            ),
        ],
    )
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
