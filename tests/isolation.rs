//! What runs as the gateway's user reaches nothing of its keeper: `fake_assistant.rs` tries, and gets nothing.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Stdio;

use e2e::binaries::binary;
use e2e::supervisor::{Setup, Supervisor, TOKEN, is_alive, is_root, place, snapshot};
use e2e::surroundings::{folder, program};
use e2e::wait::{until, until_some};
use serde_json::{Value, json};

const STORE_SECRET: &str = "store-secret-0123456789";
const STATE_SECRET: &str = "state-secret-0123456789";

const READABLE: &str = "the gateway's user can read a secret";

fn lines(report: &Path) -> Vec<Value> {
    let text = fs::read_to_string(report).unwrap_or_default();
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// Waits for the end of a report and returns its tries.
fn tries(report: &Path) -> Vec<Value> {
    let all = until_some("the report", || {
        let lines = lines(report);
        lines
            .iter()
            .any(|line| line["done"] == true)
            .then_some(lines)
    });
    all.into_iter()
        .filter(|line| line["try"].is_string())
        .collect()
}

/// Whether we have the capability `SETPCAP`, as root in most containers has.
fn may_empty_bounding_set() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("knows itself");
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = u64::from_str_radix(set.expect("is there").trim(), 16);
    set.expect("is a set") >> 8 & 1 == 1
}

fn write(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("can write");
    fs::rename(new, path).expect("can rename");
}

/// A folder that is nobody else's, with a file in it.
fn secret_file(setup: &Setup, folder: &str, text: &str) -> String {
    let folder = setup.folder.path().join(folder);
    fs::create_dir(&folder).expect("can make a folder");
    fs::set_permissions(&folder, Permissions::from_mode(0o700)).expect("is ours");
    let file = folder.join("secret");
    fs::write(&file, text).expect("can write");
    fs::set_permissions(&file, Permissions::from_mode(0o600)).expect("is ours");
    file.display().to_string()
}

/// A supervisor whose gateway is the assistant, with an agent at work; and where it reports.
fn kept(user: &str) -> (Supervisor, std::path::PathBuf) {
    let setup = Setup::new();
    let token = secret_file(&setup, "token", TOKEN);
    let store = secret_file(&setup, "store-key", STORE_SECRET);
    let state = secret_file(&setup, "state", STATE_SECRET);
    let (plan, report) = (setup.fake().join("plan"), setup.fake().join("report"));
    place(
        &binary("fake-assistant"),
        &setup.fake().join("fake-assistant"),
    );
    // A way in that is no part of the runtime: whoever may write to a folder owns what is in it.
    fs::set_permissions(setup.folder.path(), Permissions::from_mode(0o755)).expect("is ours");
    setup.agent(
        "backup",
        &json!([{ "gate": "go" }, snapshot("snapshot-2")[0]]),
    );
    let (program, plan_text) = (
        setup.fake().join("fake-assistant"),
        plan.display().to_string(),
    );
    let program = program.display().to_string();
    let setup = setup
        .with("RUNTIME_GATEWAY_USER", user)
        .with("RUNTIME_GATEWAY_LIMITS", "nofile=512,nproc=256,as=2G")
        .with("RUNTIME_SERVICE_TOKEN", "")
        .with("RUNTIME_SERVICE_TOKEN_FILE", &token)
        .with("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", &store)
        .with("RUNTIME_S3_ACCESS_KEY_ID", STORE_SECRET)
        .command(&[&program, &plan_text]);
    // With capabilities that a change of user and an exec would pass on.
    let generous = ["--inh-caps", "+chown", "--ambient-caps", "+chown"];
    let program = setup.program_below(&[&["setpriv"], &generous[..]].concat());
    let supervisor = setup.start_as(program);
    supervisor.until_gateway("starting");
    let files = [&token, &store, &state].map(|file| {
        [
            file.clone(),
            Path::new(file).with_file_name("").display().to_string(),
        ]
    });
    let guesses = [
        "x",
        &TOKEN[..31],
        &format!("{TOKEN}x"),
        "service-token-0123456789abcdefghik",
        &TOKEN.to_uppercase(),
        STATE_SECRET,
    ];
    std::thread::scope(|scope| {
        scope.spawn(|| supervisor.post("/v1/backup"));
        let agent = until_some("the agent", || supervisor.setup.agent_calls("backup").pop());
        let script =
            "#!/bin/sh\nid -u >> /tmp/$(basename \"$(dirname \"$(dirname \"$0\")\")\").ran\n";
        let order = json!({
            "report": report, "files": files.concat(), "api": supervisor.api.to_string(), "guesses": guesses, "machine": true,
            "planted": script, "victims": [
                { "name": "supervisor", "pid": supervisor.pid().as_raw() }, { "name": "agent", "pid": agent["pid"] },
            ],
        });
        write(&plan, &order.to_string());
        let _ = tries(&report);
        assert!(
            is_alive(agent["pid"].as_i64().expect("is a pid")),
            "the agent is gone"
        );
        supervisor.setup.open_gate("go");
    });
    (supervisor, report)
}

#[test]
fn the_assistant_gets_nothing_of_its_keeper() {
    if !is_root() {
        return;
    }
    let (mut supervisor, report) = kept("64121");
    let tries = tries(&report);
    assert!(tries.len() > 150, "{}", tries.len());
    let got: Vec<&Value> = tries.iter().filter(|line| line["got"] == true).collect();
    assert!(got.is_empty(), "{got:#?}");
    let text = fs::read_to_string(&report).expect("is there");
    for secret in [TOKEN, STORE_SECRET, STATE_SECRET] {
        assert!(!text.contains(secret), "{secret} is in the report");
    }
    // Nothing that it left in its home is used by whoever keeps it, who goes on as before.
    assert_eq!(supervisor.post("/v1/backup").status, 200);
    assert_eq!(supervisor.post("/v1/restart").status, 202);
    let ran = supervisor.setup.fake().join("ran");
    assert!(!ran.exists(), "{:?}", fs::read_to_string(ran));
    assert_eq!(supervisor.setup.agent_calls("backup").len(), 2);
    assert_eq!(supervisor.stop(), Some(0));
}

#[test]
fn the_assistant_has_no_capability_and_its_limits() {
    if !is_root() {
        return;
    }
    let (supervisor, report) = kept("64122");
    let mut found = lines(&report).remove(0);
    let status = found["status"].take();
    let status = status.as_str().expect("is text").to_owned();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).map(str::to_owned)
    };
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        if set == "CapBnd:" && !may_empty_bounding_set() {
            continue;
        }
        assert_eq!(field(set).as_deref(), Some("0000000000000000"), "{set}");
    }
    assert_eq!(field("NoNewPrivs:").as_deref(), Some("1"));
    assert_eq!(field("Uid:").as_deref(), Some("64122\t64122\t64122\t64122"));
    assert_eq!(field("Groups:").as_deref(), Some("64122"));
    let limits = found["limits"].take();
    let limits = limits.as_str().expect("is text").lines();
    let limit = |name: &str| {
        let value = limits.clone().find_map(|line| line.strip_prefix(name));
        let value = value.expect("is there").split_whitespace();
        value.take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max open files"), ["512", "512"]);
    assert_eq!(limit("Max processes"), ["256", "256"]);
    assert_eq!(limit("Max address space"), ["2147483648", "2147483648"]);

    // When memory runs out, it goes first.
    let score = |pid: &Value| {
        let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
        score
            .expect("is there")
            .trim()
            .parse::<i32>()
            .expect("is a number")
    };
    let ours = score(&supervisor.pid().as_raw().into());
    let its = score(&supervisor.status()["gateway"]["pid"]);
    assert_eq!(its, (ours + 500).min(1000));
    assert!(!supervisor.log().contains(READABLE), "{}", supervisor.log());
}

#[test]
fn a_secret_that_the_gateways_user_can_read_is_told() {
    if !is_root() {
        return;
    }
    let setup = Setup::new();
    let token = secret_file(&setup, "token", TOKEN);
    for path in [Path::new(&token), &setup.folder.path().join("token")] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).expect("is ours");
    }
    let setup = setup
        .with("RUNTIME_GATEWAY_USER", "64124")
        .with("RUNTIME_SERVICE_TOKEN", "")
        .with("RUNTIME_SERVICE_TOKEN_FILE", &token);
    let supervisor = setup.start();
    until("the line", || {
        let log = supervisor.log();
        let mut lines = log.lines().filter(|line| line.contains(READABLE));
        lines.any(|line| line.contains("\"error\"") && line.contains("RUNTIME_SERVICE_TOKEN_FILE"))
    });
}

#[test]
fn a_link_planted_where_root_reads_is_not_followed() {
    if !is_root() {
        return;
    }
    let setup = Setup::new();
    let foreign = json!({ "gateway": { "auth": { "token": "of-somebody-else" } } });
    let foreign = secret_file(&setup, "foreign", &foreign.to_string());
    let supervisor = setup.with("RUNTIME_GATEWAY_USER", "64123").start();
    supervisor.until_running(1);
    let folder = supervisor.setup.root().join(".openclaw");
    fs::create_dir_all(&folder).expect("can make a folder");
    symlink(&foreign, folder.join("openclaw.json")).expect("can link");
    // The gateway cannot read it, and so it expects its own token: a supervisor that could would send the other one.
    assert_eq!(supervisor.get("/v1/devices").status, 200);

    fs::remove_file(folder.join("openclaw.json")).expect("is there");
    let own = fs::read(&foreign).expect("is there");
    fs::write(folder.join("openclaw.json"), own).expect("can write");
    fs::set_permissions(&folder, Permissions::from_mode(0o755)).expect("is ours");
    assert_eq!(supervisor.get("/v1/devices").status, 200);
}

#[test]
fn the_same_tries_work_on_a_process_of_its_own() {
    // As whoever runs this, on its own child, own files and with the right token: the tries above are able to succeed.
    let supervisor = Setup::new().start();
    let folder = folder();
    let secret = folder.path().join("secret");
    fs::write(&secret, STATE_SECRET).expect("can write");
    fs::create_dir(folder.path().join("inner")).expect("can make a folder");
    let (plan, report) = (folder.path().join("plan"), folder.path().join("report"));
    let order = json!({
        "report": report, "files": [secret, folder.path().join("inner")], "api": supervisor.api.to_string(), "guesses": [TOKEN], "victims": [{ "name": "own" }],
    });
    write(&plan, &order.to_string());
    let mut assistant = program("fake-assistant")
        .arg(&plan)
        .env("HOME", folder.path())
        .stdin(Stdio::null())
        .spawn()
        .expect("can be executed");
    until("the report", || {
        lines(&report).iter().any(|line| line["done"] == true)
    });
    assistant.kill().expect("is our child");
    assistant.wait().expect("is our child");
    let all = tries(&report);
    // Which file or folder does not matter: one cannot be listed, the other not be appended to.
    let kind = |line: &Value| {
        let name = line["try"].as_str().expect("has a name").to_owned();
        let is_file = name.starts_with("file ");
        is_file
            .then(|| name.rsplit(": ").next().map(str::to_owned))
            .flatten()
            .unwrap_or(name)
    };
    let got: Vec<String> = all
        .iter()
        .filter(|line| line["got"] == true)
        .map(kind)
        .collect();
    let mut refused: Vec<String> = all.iter().map(kind).collect();
    refused.retain(|kind| !got.contains(kind) && !kind.starts_with("api"));
    assert_eq!(refused, [""; 0], "{all:#?}");
    let text = fs::read_to_string(&report).expect("is there");
    assert!(text.contains(STATE_SECRET));
    assert!(all.iter().any(|line| line["try"]
        == "api: GET /v1/status with Authorization: Bearer guess"
        && line["got"] == true));
}
