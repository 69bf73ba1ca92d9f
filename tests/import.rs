//! Moving in from the set-up that copies its folders to R2 with rclone: what a real rclone wrote becomes a first snapshot
//! that a real gateway starts from.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use e2e::agent::{Host, Outcome as Ended, Place, folder};
use e2e::device::Welcome;
use e2e::machine::{GATEWAY_TOKEN, Machine, data, find, pair_device};
use e2e::moto::Moto;
use e2e::openclaw::OpenClaw;
use e2e::rclone;
use e2e::s3::{BUCKET, Effect, Kind};
use e2e::supervisor::Supervisor;
use e2e::tree::{self, chown, describe, is_root, path_of, set_mtime};
use rustix::process::Signal;
use serde_json::{Value, json};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// What the old set-up leaves out of its copies.
const STATE_EXCLUDES: [&str; 4] = ["*.lock", "*.log", "*.tmp", ".git/**"];
const WORKSPACE_EXCLUDES: [&str; 3] = ["skills/**", ".git/**", "node_modules/**"];

/// A skill that the gateway's own does not have.
const SKILL: &str = "---\nname: greeting\ndescription: Says hello\n---\nSay hello.\n";

/// A bucket of the shared server.
fn bucket(name: &str) -> (std::sync::Arc<Moto>, Vec<(&'static str, String)>) {
    let moto = Moto::shared();
    moto.make_bucket(name);
    let settings = vec![
        ("RUNTIME_STORE", format!("s3://{name}/runtime")),
        ("RUNTIME_S3_ENDPOINT", format!("http://{}", moto.address)),
        ("RUNTIME_S3_REGION", "us-east-1".to_owned()),
        ("RUNTIME_S3_ACCESS_KEY_ID", "anyone".to_owned()),
        ("RUNTIME_S3_SECRET_ACCESS_KEY", "anything".to_owned()),
    ];
    (moto, settings)
}

/// A host that imports from S3 in memory into a directory of its own: source, store and host.
fn strangers() -> (Place, Place, Host) {
    let (source, place) = (Place::memory(), Place::directory());
    let mut host = Host::new(&source);
    for (name, value) in place.settings() {
        host.set(&name, value);
    }
    (source, place, host)
}

fn from_bucket() -> [String; 3] {
    ["import", "--from", &format!("s3://{BUCKET}/old")].map(str::to_owned)
}

/// Puts an object where `from_bucket` looks.
fn put(source: &Place, key: &str, bytes: &[u8]) {
    source.s3().put(&format!("old/{key}"), bytes.to_vec());
}

/// A restored copy of the newest snapshot.
fn restored(host: &Host) -> PathBuf {
    let target = host.folder.path().join("target");
    let arguments = ["restore", "--target", &target.display().to_string()];
    let _ = host.run(&arguments).expect(0);
    target
}

/// Times and contents of the files below a directory.
fn files(root: &Path) -> BTreeMap<PathBuf, (i128, String)> {
    let files = describe(root)
        .into_iter()
        .filter(|(_, node)| node.kind == "file");
    files
        .map(|(path, node)| (path, (node.mtime, node.sha256)))
        .collect()
}

/// Imports for the machine as an operator would, and gives the answer.
fn import(machine: &Machine, from: &str) -> Outcome<Value> {
    let output = e2e::surroundings::program("backup-agent")
        .args(["import", "--json", "--from", from])
        .envs(machine.store.iter().map(|(name, value)| (name, value)))
        .env("RUNTIME_ROOT", machine.disk.join("elsewhere"))
        .env("RUNTIME_STATE", machine.disk.join("elsewhere-state"))
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The gateway's own word on its workspace and on the skill in it.
fn check_workspace(machine: &Machine, workspace: &Path) -> Outcome {
    let agents = machine
        .openclaw
        .ask(&machine.root(), &["agents", "list", "--json"])?;
    assert_eq!(agents[0]["workspace"], json!(workspace), "{agents}");
    let skills = machine
        .openclaw
        .ask(&machine.root(), &["skills", "list", "--json"])?;
    let skill = find(&skills["skills"], "name", "greeting");
    assert_eq!(skill["source"], "openclaw-workspace", "{skills}");
    Ok(())
}

fn restored_snapshot(supervisor: &Supervisor) -> Value {
    supervisor.status()["restore"]["snapshot"].take()
}

#[test]
fn gateway_moves_in_with_its_devices_configuration_and_workspace() -> Outcome {
    let folder = folder();
    let (moto, store) = bucket("moved-gateway");
    let machine = |name: &str| -> Outcome<Machine> {
        Ok(Machine {
            openclaw: OpenClaw::install()?,
            disk: folder.path().join(name),
            store: store.clone(),
        })
    };
    // The old host, whose home is not /root here.
    let old = Machine {
        store: vec![(
            "RUNTIME_STORE",
            format!("file://{}/unused", folder.path().display()),
        )],
        ..machine("old")?
    };
    let configuration = |workspace: &str| {
        json!({
            "agents": { "defaults": { "workspace": workspace } },
            "gateway": { "mode": "local", "nodes": { "pairing": { "autoApproveLocal": false } } },
        })
        .to_string()
    };
    tree::write(
        &old.root(),
        ".openclaw/openclaw.json",
        configuration("~/clawd"),
    );
    tree::write(&old.root(), "clawd/notes.md", "remember the milk");
    tree::write(&old.root(), "clawd/skills/greeting/SKILL.md", SKILL);
    let mut supervisor = old.start()?;
    let device = pair_device(&supervisor)?;
    assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());

    tree::write(
        &old.root(),
        ".openclaw/openclaw.json",
        configuration("/root/clawd"),
    );
    for (from, to, excludes) in [
        (".openclaw/", "openclaw/", &STATE_EXCLUDES[..]),
        ("clawd/", "workspace/", &WORKSPACE_EXCLUDES[..]),
        ("clawd/skills/", "skills/", &[][..]),
    ] {
        let place = format!("moved-gateway/{to}");
        rclone::sync(&moto, &old.root().join(from), &place, excludes);
    }
    fs::remove_dir_all(&old.disk)?;

    let new = machine("new")?;
    let answer = import(&new, "s3://moved-gateway")?;
    assert_eq!(answer["workspace"], "clawd");
    assert!(answer["databases"].as_u64() >= Some(2), "{answer}");
    let mut supervisor = new.start()?;
    assert_eq!(restored_snapshot(&supervisor), answer["snapshot"]);
    let devices = data(&supervisor, "GET", "/v1/devices")?;
    let paired = find(&devices["paired"], "deviceId", &device.id());
    assert_eq!(paired["clientId"], "openclaw-ios", "{devices}");
    let gateway = supervisor.setup.gateway;
    assert_eq!(device.connect(gateway, GATEWAY_TOKEN)?, Welcome::Paired);
    // The setting came along: another device still has to ask.
    let other = e2e::device::Device::new()?;
    assert!(matches!(
        other.connect(gateway, GATEWAY_TOKEN)?,
        Welcome::Pending(_)
    ));
    let notes = new.root().join("clawd/notes.md");
    assert_eq!(fs::read_to_string(notes)?, "remember the milk");
    check_workspace(&new, &new.root().join("clawd"))?;
    assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());
    let scratch = e2e::agent::folder();
    new.openclaw.check_databases(&new.root(), scratch.path())
}

/// The first layout: the gateway's former name in folder and file, no `workspace/`, a marker, directories as objects.
/// Devices are in a JSON file, as gateways of that time kept them.
#[test]
fn gateway_starts_from_the_older_layout() -> Outcome {
    let folder = folder();
    let (moto, store) = bucket("older-layout");
    let id = "f5e1d43ba0fd68dec1154517d58126fef6da4095a2e896a4809c13e1faa93fa3";
    let scopes = ["operator.read", "operator.write"];
    let paired = json!({ id: {
        "deviceId": id, "publicKey": "R0Oy1Hv-IyS3yYrOCQlMRTKYb2y0XJC6sHizUlhftIw", "platform": "ios",
        "clientId": "phone", "clientMode": "ui", "role": "operator", "roles": ["operator"], "scopes": scopes,
        "tokens": { "operator": { "token": "1f01bab6633a4d8f8932321d5cb47969", "role": "operator", "scopes": scopes,
            "createdAtMs": 1_795_349_271_178_u64 } },
        "createdAtMs": 1_795_349_271_178_u64, "approvedAtMs": 1_795_349_271_178_u64,
    } });
    let configuration = r#"{ "agents": { "defaults": { "workspace": "/root/clawd" } },
        "gateway": { "port": 18789, "mode": "local", "trustedProxies": ["10.1.0.0"] }, "channels": {} }"#;
    for (key, text) in [
        (".last-sync", "2026-02-01T00:00:00+00:00\n"),
        ("clawdbot/", ""),
        ("clawdbot/.last-sync", "2026-02-01T00:00:00+00:00\n"),
        ("clawdbot/clawdbot.json", configuration),
        ("clawdbot/devices/", ""),
        ("clawdbot/devices/paired.json", &paired.to_string()),
        ("clawdbot/devices/pending.json", "{}"),
        ("skills/greeting/SKILL.md", SKILL),
    ] {
        moto.put("older-layout", key, text.as_bytes());
    }
    let machine = Machine {
        openclaw: OpenClaw::install()?,
        disk: folder.path().join("disk"),
        store,
    };
    let answer = import(&machine, "s3://older-layout")?;
    assert_eq!(
        (&answer["files"], &answer["databases"]),
        (&json!(4), &json!(0))
    );
    let mut supervisor = machine.start()?;
    assert_eq!(restored_snapshot(&supervisor), answer["snapshot"]);
    let devices = data(&supervisor, "GET", "/v1/devices")?;
    let phone = find(&devices["paired"], "deviceId", id);
    assert_eq!(phone["clientId"], "phone", "{devices}");
    check_workspace(&machine, &machine.root().join("clawd"))?;
    assert_eq!(supervisor.stop(), Some(0), "{}", supervisor.log());
    Ok(())
}

#[test]
fn names_times_and_bytes_are_those_that_rclone_copied() {
    let (moto, _) = bucket("strange-names");
    let place = Place::directory();
    let host = Host::new(&place)
        .with("RUNTIME_S3_ENDPOINT", format!("http://{}", moto.address))
        .with("RUNTIME_S3_ACCESS_KEY_ID", "anyone")
        .with("RUNTIME_S3_SECRET_ACCESS_KEY", "anything");
    let old = host.folder.path().join("old");
    for name in [
        &b"openclaw.json"[..],
        b"empty",
        b"a+b %20 &<x>?",
        b"caf\xe9/\xff",
        b"back\\slash",
        b"tab\tescape\x1b",
        ".hidden/ümläut-日".as_bytes(),
        "．．".as_bytes(),
    ] {
        let bytes = if name == b"empty" { b"" } else { name };
        tree::write(&old, path_of(name), bytes);
        set_mtime(&old.join(path_of(name)), 1_577_934_245, 123_456_789);
    }
    // More than one piece, and not a whole number of them.
    tree::write(&old, "large", tree::noise(1, (5 << 20) + 1));
    fs::write(old.join("openclaw.json"), "{ \"order\": 1, \"kept\": 2 }").expect("can write");
    rclone::sync(&moto, &old, "strange-names/openclaw", &[]);

    let from = ["import", "--from", "s3://strange-names"];
    assert_eq!(host.json(&from)["workspace"], ".openclaw/workspace");
    assert_eq!(files(&restored(&host).join(".openclaw")), files(&old));
    fs::remove_dir_all(&old).expect("it is there");
    fs::remove_dir_all(host.folder.path().join("target")).expect("it is there");
    assert_eq!(host.leftovers(), [""; 0]);

    // The same from a directory, which has no way to write the name that is not UTF-8.
    moto.remove("strange-names", "openclaw/caf%E2%80%9BE9/%E2%80%9BFF");
    let copy = folder();
    rclone::copy_back(&moto, "strange-names", copy.path());
    let from = format!("file://{}", copy.path().display());
    let other = Host::new(&place).with("RUNTIME_INSTANCE_ID", "other");
    let _ = other.run(&["import", "--from", &from]).expect(0);
    assert_eq!(
        files(&restored(&other).join(".openclaw")),
        files(&copy.path().join("openclaw"))
    );
}

#[test]
fn a_workspace_inside_of_the_state_keeps_its_place() {
    let (source, _place, host) = strangers();
    put(
        &source,
        "openclaw/moltbot.json",
        br#"{"agents":{"defaults":{"workspace":"/root/.openclaw/workspace"}}}"#,
    );
    put(&source, "openclaw/workspace/SOUL.md", b"the gateway's");
    put(&source, "workspace/SOUL.md", b"another");
    put(&source, "skills/a/SKILL.md", b"skill");
    // The newer folder has a configuration, so the older one is history.
    put(&source, "clawdbot/clawdbot.json", b"{}");
    let outcome = host.run(&from_bucket()).expect(0);
    assert!(
        outcome.stdout.contains("the workspace to ~/clawd\n"),
        "{}",
        outcome.stdout
    );
    assert_eq!(outcome.logged("the state has the gateway's workspace in it; workspace/ and skills/ go where they were, beside it").len(), 1);
    let target = restored(&host);
    let text = |path: &str| fs::read_to_string(target.join(path)).expect("it is there");
    assert_eq!(text(".openclaw/workspace/SOUL.md"), "the gateway's");
    assert_eq!(text("clawd/SOUL.md"), "another");
    assert_eq!(text("clawd/skills/a/SKILL.md"), "skill");
    let configuration: Value =
        serde_json::from_str(&text(".openclaw/openclaw.json")).expect("JSON");
    assert_eq!(
        configuration["agents"]["defaults"]["workspace"],
        "~/.openclaw/workspace"
    );
    assert_eq!(files(&target).len(), 4);
}

#[test]
fn the_root_is_left_alone_and_what_is_written_is_the_gateway_users() {
    let (source, _place, mut host) = strangers();
    put(&source, "openclaw/openclaw.json", b"{}");
    put(&source, "workspace/a/b", b"content");
    tree::write(&host.root, "live", "untouched");
    if is_root() {
        host.set("RUNTIME_GATEWAY_USER", "nobody");
        chown(&host.root, 65_534, 65_534);
    }
    let before = describe(&host.root);
    let _ = host.run(&from_bucket()).expect(0);
    tree::assert_same(&before, &describe(&host.root));
    assert_eq!(host.leftovers(), [""; 0]);
    let kept = fs::read_dir(&host.state).expect("it is there");
    let kept: Vec<_> = kept
        .map(|entry| entry.expect("it stays").file_name())
        .collect();
    assert_eq!(
        kept,
        ["lock"],
        "nothing is remembered of a tree that is gone"
    );

    host.unset("RUNTIME_GATEWAY_USER");
    let tree = describe(&restored(&host));
    let owner = before[Path::new("")].owner;
    for (path, node) in &tree {
        let mode = if node.kind == "file" { 0o600 } else { 0o700 };
        assert_eq!((node.mode, node.owner), (mode, owner), "{}", path.display());
    }
    assert_eq!(files(&host.folder.path().join("target")).len(), 2);
}

/// An import that fails with this code, leaves nothing anywhere, and says why.
fn refused(host: &Host, place: &Place, code: i32) -> String {
    let before = place.objects();
    let outcome: Ended = host.run(&from_bucket()).expect(code);
    assert_eq!(place.objects(), before);
    assert_eq!(host.leftovers(), [""; 0]);
    outcome.sentence()
}

#[test]
fn an_instance_that_was_used_is_refused() {
    let (source, place, host) = strangers();
    put(&source, "openclaw/openclaw.json", b"{}");
    let runtime = Host::new(&place).booted('a');
    let _ = runtime.run(&["restore"]).expect(10);
    let said = refused(&host, &place, 64);
    assert!(said.contains("a runtime has started on it"), "{said}");
    let snapshot = runtime.backup();
    let said = refused(&host, &place, 64);
    assert!(
        said.contains(&format!("it has snapshot {snapshot}")),
        "{said}"
    );
    // The head alone does not decide.
    place.remove("head.json");
    let said = refused(&host, &place, 64);
    assert!(
        said.contains(&format!("it has snapshot {snapshot}")),
        "{said}"
    );
}

#[test]
fn a_source_without_the_folders_is_refused() {
    let (source, place, host) = strangers();
    put(&source, ".last-sync", b"2026-02-01T00:00:00+00:00\n");
    put(&source, "openclaw.json", b"{}");
    source.s3().put("openclaw/openclaw.json", b"{}".to_vec());
    let said = refused(&host, &place, 64);
    assert!(
        said.contains("has no folder openclaw (or of its former name), workspace or skills"),
        "{said}"
    );
}

#[test]
fn a_name_that_leads_elsewhere_is_refused_and_named() {
    for key in [
        "openclaw/../x",
        "workspace/a/../../../x",
        "skills/./x",
        "openclaw/a//b",
    ] {
        let (source, place, host) = strangers();
        put(&source, "openclaw/openclaw.json", b"{}");
        put(&source, key, b"hostile");
        let said = refused(&host, &place, 11);
        assert_eq!(
            said,
            format!("backup-agent: cannot trust {key}: its name cannot be a file's")
        );
    }
}

#[test]
fn two_objects_for_one_file_are_refused() {
    let (source, place, host) = strangers();
    put(&source, "workspace/skills/a", b"one");
    put(&source, "skills/a", b"another");
    let said = refused(&host, &place, 11);
    assert!(
        said.contains("cannot trust skills/a: another object has its place"),
        "{said}"
    );
}

#[test]
fn an_object_that_changes_meanwhile_is_refused() {
    let (source, place, host) = strangers();
    put(&source, "openclaw/state/openclaw.sqlite", b"before");
    source
        .s3()
        .add_fault(Kind::Get, "openclaw.sqlite", 1, Effect::Hold);
    let running = host.start(&from_bucket());
    source.s3().wait_for(Kind::Get, "openclaw.sqlite");
    put(&source, "openclaw/state/openclaw.sqlite", b"after!");
    source.s3().release();
    let said = running.wait().expect(11).sentence();
    assert!(
        said.contains("it was changed while it was read; stop the old gateway"),
        "{said}"
    );
    assert!(place.objects().is_empty());
    assert_eq!(host.leftovers(), [""; 0]);
}

#[test]
fn an_import_that_is_stopped_changes_nothing_and_can_be_repeated() {
    let (source, place, host) = strangers();
    for at in 0..50 {
        put(&source, &format!("openclaw/{at}"), &tree::noise(at, 1000));
    }
    let stalled = || {
        source.s3().take_requests();
        source
            .s3()
            .add_fault(Kind::Get, "openclaw/49", 1, Effect::Stall);
        let running = host.start(&from_bucket());
        source.s3().wait_for(Kind::Get, "openclaw/49");
        running
    };
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let running = stalled();
        running.signal(signal);
        let _ = running.wait().expect(code);
        assert!(place.objects().is_empty());
        // The next run removes it.
        assert_eq!(host.leftovers(), [".root.restoring"]);
    }
    let running = stalled();
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(9));
    assert!(place.objects().is_empty());

    source.s3().clear_faults();
    source
        .s3()
        .add_fault(Kind::Get, "openclaw/49", 1, Effect::Stall);
    let bounded = [&from_bucket()[..], &["--timeout".into(), "2s".into()]].concat();
    let _ = host.run(&bounded).expect(124);
    assert!(place.objects().is_empty());

    source.s3().clear_faults();
    let _ = host.run(&from_bucket()).expect(0);
    assert_eq!(host.leftovers(), [""; 0]);
    assert_eq!(files(&restored(&host)).len(), 50);
}

#[test]
fn a_large_file_takes_no_more_memory_than_its_pieces() {
    let peak = |size: usize| {
        let (source, _place, host) = strangers();
        put(&source, "openclaw/large", &tree::noise(1, size));
        source
            .s3()
            .add_fault(Kind::Head, "openclaw/large", 1, Effect::Hold);
        let running = host.start(&from_bucket());
        source.s3().wait_for(Kind::Head, "openclaw/large");
        let peak = running.peak_memory();
        source.s3().release();
        let _ = running.wait().expect(0);
        peak
    };
    let (small, large) = (peak(16 << 20), peak(64 << 20));
    assert!(
        large.saturating_sub(small) < 16 << 10,
        "{small} KiB for 16 MiB, {large} KiB for 64 MiB"
    );
}
