//! A real gateway, supervised, backed up, lost with its disk and restored: what the runtime is for.
//!
//! Each test is two machines that share a store and nothing else. On the first a device is paired and a file
//! written; the second has to know both.

use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use e2e::device::{Device, Welcome};
use e2e::machine::{GATEWAY_TOKEN, Machine, data, find, pair_another, pair_device};
use e2e::moto::Moto;
use e2e::openclaw::{OpenClaw, prepare_script, require_approval};
use e2e::supervisor::{Supervisor, is_root};
use e2e::surroundings::{self, folder, program};
use e2e::wait::until;
use serde_json::{Value, json};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn notes(machine: &Machine) -> PathBuf {
    machine.root().join(".openclaw/workspace/notes.bin")
}

/// Pairs a device through the API and leaves a file, then takes a snapshot of both.
fn leave_traces(machine: &Machine, supervisor: &Supervisor) -> Outcome<Device> {
    let device = pair_device(supervisor)?;
    let notes = notes(machine);
    fs::create_dir_all(notes.parent().ok_or("a file has a folder")?)?;
    fs::write(&notes, contents())?;

    let backup = data(supervisor, "POST", "/v1/backup")?;
    assert!(backup["snapshot"].is_string(), "{backup}");
    assert_eq!(backup["unchanged"], false);
    Ok(device)
}

/// Everything that was there is there again.
fn check_traces(machine: &Machine, supervisor: &mut Supervisor, device: &Device) -> Outcome {
    let restore = supervisor.status()["restore"].take();
    assert!(restore["snapshot"].is_string(), "{restore}");
    assert_eq!(restore["error"], Value::Null);

    let devices = data(supervisor, "GET", "/v1/devices")?;
    let paired = find(&devices["paired"], "deviceId", &device.id());
    assert_eq!(paired["clientId"], "openclaw-ios", "{devices}");
    assert_eq!(
        device.connect(supervisor.setup.gateway, GATEWAY_TOKEN)?,
        Welcome::Paired
    );
    assert!(
        fs::read(notes(machine))? == contents(),
        "the file is another"
    );

    assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());
    let scratch = folder();
    machine
        .openclaw
        .check_databases(&machine.root(), scratch.path())
}

/// Bytes of every value, over more than one frame of a layer, and not compressible to nothing.
fn contents() -> Vec<u8> {
    let mut state = 1_u32;
    let step = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    std::iter::repeat_with(step).take(5 << 20).collect()
}

fn machine(folder: &Path, store: Vec<(&'static str, String)>) -> Outcome<Machine> {
    let machine = Machine {
        openclaw: OpenClaw::install()?,
        disk: folder.join("disk"),
        store,
    };
    require_approval(&machine.root())?;
    Ok(machine)
}

/// The whole story, with an orderly stop in the middle.
fn survives_the_loss_of_the_disk(machine: &Machine) -> Outcome {
    let mut supervisor = machine.start()?;
    let device = leave_traces(machine, &supervisor)?;
    assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());
    drop(supervisor);

    fs::remove_dir_all(&machine.disk)?;

    let mut supervisor = machine.start()?;
    check_traces(machine, &mut supervisor, &device)
}

#[test]
fn gateway_survives_the_loss_of_the_disk_with_a_directory_store() -> Outcome {
    let folder = folder();
    let store = format!("file://{}", folder.path().join("store").display());
    survives_the_loss_of_the_disk(&machine(folder.path(), vec![("RUNTIME_STORE", store)])?)
}

#[test]
fn gateway_survives_the_loss_of_the_disk_with_an_s3_store() -> Outcome {
    let folder = folder();
    let moto = Moto::shared();
    moto.make_bucket("gateways");
    let store = vec![
        ("RUNTIME_STORE", "s3://gateways/some/prefix".to_owned()),
        ("RUNTIME_S3_ENDPOINT", format!("http://{}", moto.address)),
        ("RUNTIME_S3_ACCESS_KEY_ID", "key-id".to_owned()),
        ("RUNTIME_S3_SECRET_ACCESS_KEY", "secret-key".to_owned()),
    ];
    survives_the_loss_of_the_disk(&machine(folder.path(), store)?)
}

/// The machine dies without a word, so the snapshot holds a lease that its host has minutes yet to renew.
#[test]
fn gateway_killed_on_one_host_starts_on_another() -> Outcome {
    if !is_root() {
        return Ok(());
    }
    let folder = folder();
    let store = format!("file://{}", folder.path().join("store").display());
    let machine = machine(folder.path(), vec![("RUNTIME_STORE", store)])?;
    let mut supervisor = machine.start()?;
    let device = leave_traces(&machine, &supervisor)?;
    supervisor.kill_container();
    drop(supervisor);
    fs::remove_dir_all(&machine.disk)?;

    let mut supervisor = machine.start_elsewhere()?;
    check_traces(&machine, &mut supervisor, &device)
}

/// Whose gateway is stopped for a moment at each snapshot.
const APART: u32 = 54_410;

/// Calls of the gateway's protocol.
const CREATE: &str = "sessions.create";
const LIST: &str = "sessions.list";

/// Snapshots in the middle of pairings and of new sessions, which write to databases of the gateway: each starts a gateway that
/// knows every device and every session of before.
#[test]
fn snapshots_of_a_gateway_at_work_start_a_gateway() -> Outcome {
    if !is_root() {
        return Ok(());
    }
    let folder = folder();
    let store = folder.path().join("store");
    let settings = || vec![("RUNTIME_STORE", format!("file://{}", store.display()))];
    let first = machine(folder.path(), settings())?;
    give(&first.root(), APART)?;
    let mut supervisor = first.start_apart(APART)?;
    let home = surroundings::folder();
    let mut snapshots = Vec::new();
    let (paired, begun) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let is_over = AtomicBool::new(false);
    let again = |done: &AtomicUsize, step: &dyn Fn() -> Outcome| -> Result<(), String> {
        while !is_over.load(Ordering::Relaxed) {
            step().map_err(|error| error.to_string())?;
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Outcome {
        let pairing = scope.spawn(|| again(&paired, &|| pair_another(&supervisor).map(drop)));
        let talking = scope.spawn(|| {
            again(&begun, &|| {
                let label = json!({ "label": begun.load(Ordering::Relaxed).to_string() });
                let gateway = supervisor.setup.gateway;
                let session = (first.openclaw).call(gateway, home.path(), CREATE, &label)?;
                assert_eq!(session["ok"], true, "{session}");
                Ok(())
            })
        });
        let taken = (1..=2).try_for_each(|count| -> Outcome {
            until("devices are paired and sessions begun", || {
                let is_enough =
                    |done: &AtomicUsize, each: usize| done.load(Ordering::Relaxed) > each * count;
                let is_lost = pairing.is_finished() || talking.is_finished();
                is_lost || is_enough(&paired, 3) && is_enough(&begun, 1)
            });
            let known = [&paired, &begun].map(|done| done.load(Ordering::Relaxed));
            let backup = data(&supervisor, "POST", "/v1/backup")?;
            let id = backup["snapshot"].as_str().ok_or("an id")?.to_owned();
            snapshots.push((id, known));
            Ok(())
        });
        is_over.store(true, Ordering::Relaxed);
        pairing.join().map_err(|_| "the pairing panicked")??;
        talking.join().map_err(|_| "the sessions panicked")??;
        taken
    })?;
    assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());
    drop(supervisor);

    for (id, known) in snapshots {
        let record = store.join(format!("local/snapshots/{id}.json"));
        let record: Value = serde_json::from_slice(&fs::read(record)?)?;
        assert_eq!(record["consistency"], "instant", "{record:#}");
        assert!(record["pauseMs"].is_u64(), "{record:#}");

        let second = machine(&folder.path().join(&id), Vec::new())?;
        fs::remove_dir_all(second.root())?;
        let restored = program("backup-agent")
            .args(["restore", &id, "--target"])
            .arg(second.root())
            .envs(settings())
            .env("RUNTIME_STATE", folder.path().join("by-hand"))
            .output()?;
        assert!(restored.status.success(), "{restored:?}");
        let mut supervisor = second.start_elsewhere()?;
        let devices = data(&supervisor, "GET", "/v1/devices")?;
        let gateway = supervisor.setup.gateway;
        let sessions = (second.openclaw).call(gateway, home.path(), LIST, &json!({}))?;
        let there = [
            devices["paired"].as_array().map_or(0, Vec::len),
            usize::try_from(sessions["totalCount"].as_u64().ok_or("a count")?)?,
        ];
        let is_known = there
            .iter()
            .zip(known)
            .all(|(there, known)| *there >= known);
        assert!(is_known, "devices and sessions: {there:?} of {known:?}");
        assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());
        let scratch = surroundings::folder();
        second
            .openclaw
            .check_databases(&second.root(), scratch.path())?;
    }
    Ok(())
}

/// Everything below belongs to this user from now on.
fn give(path: &Path, uid: u32) -> Outcome {
    let owner = format!("{uid}:{uid}");
    let status = Command::new("chown")
        .arg("-R")
        .arg(owner)
        .arg(path)
        .status()?;
    assert!(status.success());
    Ok(())
}

/// The script alone, where a gateway would hide what it did.
#[test]
fn prepare_clears_leases_and_only_complains_of_what_it_cannot_open() -> Outcome {
    let openclaw = OpenClaw::install()?;
    let home = folder();
    let database = home.path().join(".openclaw/state/openclaw.sqlite");
    let run = |program: &OsStr, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("HOME", home.path());
        command.env("PATH", openclaw.search_path()).output()
    };
    let prepare = || run(prepare_script().as_os_str(), &[]);

    let nothing = prepare()?;
    assert!(
        nothing.status.success() && nothing.stderr.is_empty(),
        "{nothing:?}"
    );

    fs::create_dir_all(home.path().join(".openclaw/state"))?;
    let path = database.display().to_string();
    let open = "const { DatabaseSync } = require('node:sqlite'); const db = new DatabaseSync(process.argv[1]);";
    let fill = "db.exec(\"CREATE TABLE state_leases (owner); CREATE TABLE agent_database_leases (owner); \
                CREATE TABLE devices (id); INSERT INTO state_leases VALUES ('old'); \
                INSERT INTO agent_database_leases VALUES ('old'); INSERT INTO devices VALUES ('kept')\")";
    let count = "console.log(['state_leases', 'agent_database_leases', 'devices'] \
                 .map((table) => db.prepare('SELECT count(*) AS n FROM ' + table).get().n).join(' '))";
    let filled = run(OsStr::new("node"), &["-e", &format!("{open}{fill}"), &path])?;
    assert!(filled.status.success(), "{filled:?}");
    let cleared = prepare()?;
    assert!(
        cleared.status.success() && cleared.stderr.is_empty(),
        "{cleared:?}"
    );
    let counted = run(
        OsStr::new("node"),
        &["-e", &format!("{open}{count}"), &path],
    )?;
    assert_eq!(String::from_utf8(counted.stdout)?, "0 0 1\n");

    fs::write(
        &database,
        "not a database, but long enough to be taken for one",
    )?;
    let refused = prepare()?;
    let sentence = String::from_utf8(refused.stderr)?;
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        sentence.starts_with("prepare: cannot clear the old host's leases in "),
        "{sentence}"
    );
    Ok(())
}
