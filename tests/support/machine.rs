//! A machine that runs the real gateway under the real supervisor and agent: a disk, and a store elsewhere.

use std::error::Error;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::binaries::binary;
use crate::device::{Device, Welcome};
use crate::openclaw::{OpenClaw, prepare_script};
use crate::supervisor::{Setup, Supervisor, place};
use crate::surroundings::around;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// What the gateway and its clients share.
pub const GATEWAY_TOKEN: &str = "gateway-token-0123456789abcdefghij";

/// Ready takes 10 to 20 seconds, a minute on a busy machine.
const READY_DEADLINE: Duration = Duration::from_mins(3);

/// A disk, and the runtime's place on it. The store is elsewhere.
pub struct Machine {
    pub openclaw: OpenClaw,
    pub disk: PathBuf,
    pub store: Vec<(&'static str, String)>,
}

impl Machine {
    pub fn root(&self) -> PathBuf {
        self.disk.join("root")
    }

    /// A supervisor that will run the real gateway and the real agent.
    fn setup(&self) -> Outcome<(Setup, Command)> {
        let mut setup = Setup::new()
            .with("RUNTIME_ROOT", &self.root().display().to_string())
            .with(
                "RUNTIME_STATE",
                &self.disk.join("state").display().to_string(),
            )
            .with("RUNTIME_GATEWAY_TOKEN", GATEWAY_TOKEN)
            .with(
                "RUNTIME_GATEWAY_PREPARE",
                &prepare_script().display().to_string(),
            );
        for (name, value) in &self.store {
            setup = setup.with(name, value);
        }
        let port = setup.gateway.port().to_string();
        let command =
            format!("openclaw gateway run --port {port} --bind loopback --allow-unconfigured");
        let setup = setup.command(&command.split(' ').collect::<Vec<_>>());
        let agent = setup.folder.path().join("bin/backup-agent");
        fs::remove_file(&agent)?;
        place(&binary("backup-agent"), &agent);
        let mut program = setup.program();
        program
            .env("PATH", self.openclaw.search_path())
            .stdout(Stdio::null());
        Ok((setup, program))
    }

    pub fn start(&self) -> Outcome<Supervisor> {
        let (setup, program) = self.setup()?;
        ready(setup.start_as(program))
    }

    /// Starts as if on a machine with another name.
    pub fn start_elsewhere(&self) -> Outcome<Supervisor> {
        let (setup, program) = self.setup()?;
        let elsewhere = within("--uts", "hostname elsewhere", &program);
        ready(setup.start_as(elsewhere))
    }

    /// Starts with a gateway that is another user, as in the image. The disk has to let that user in.
    pub fn start_apart(&self, uid: u32) -> Outcome<Supervisor> {
        let (setup, _) = self.setup()?;
        let setup = setup.with("RUNTIME_GATEWAY_USER", &uid.to_string());
        // The installation is in our own home, where no other user gets to; here they get to it.
        let installed = self.disk.join("openclaw");
        fs::create_dir_all(&installed)?;
        let mut program = setup.program();
        let bin = installed.join("bin").display().to_string();
        program.env("PATH", format!("{bin}:/usr/local/bin:/usr/bin:/bin"));
        let mount = format!(
            "mount --bind '{}' '{}'",
            self.openclaw.folder().display(),
            installed.display()
        );
        ready(setup.start_as(within("--mount", &mount, &program)))
    }
}

/// The program in a namespace of its own, which a command prepares.
fn within(namespace: &str, prepare: &str, program: &Command) -> Command {
    let mut within = Command::new("unshare");
    within
        .args([namespace, "sh", "-c"])
        .arg(format!("{prepare} && exec \"$0\" \"$@\""));
    let mut within = around(within, program);
    within.stdout(Stdio::null());
    within
}

/// Waits for the gateway, which takes longer than anything else in these tests.
fn ready(supervisor: Supervisor) -> Outcome<Supervisor> {
    let start = Instant::now();
    while start.elapsed() < READY_DEADLINE {
        match supervisor.status()["gateway"]["status"].as_str() {
            Some("running") => return Ok(supervisor),
            Some("restoring" | "starting") => std::thread::sleep(Duration::from_millis(100)),
            other => return Err(format!("the gateway is {other:?}\n{}", supervisor.log()).into()),
        }
    }
    Err(format!("the gateway never became ready\n{}", supervisor.log()).into())
}

/// `data` of a request that succeeds.
pub fn data(supervisor: &Supervisor, method: &str, path: &str) -> Outcome<Value> {
    let mut answer = supervisor.request(method, path);
    if answer.status == 200 && answer.body["ok"] == true {
        return Ok(answer.body["data"].take());
    }
    Err(format!("{method} {path}: {answer:?}\n{}", supervisor.log()).into())
}

/// The entry of a list that has this value, or null.
pub fn find<'a>(list: &'a Value, key: &str, value: &str) -> &'a Value {
    let mut entries = list.as_array().into_iter().flatten();
    entries
        .find(|entry| entry[key] == value)
        .unwrap_or(&Value::Null)
}

/// Pairs the first device through the API.
pub fn pair_device(supervisor: &Supervisor) -> Outcome<Device> {
    let devices = data(supervisor, "GET", "/v1/devices")?;
    assert_eq!(devices["paired"], Value::Array(Vec::new()));
    pair_another(supervisor)
}

/// Pairs a device through the API.
pub fn pair_another(supervisor: &Supervisor) -> Outcome<Device> {
    let gateway = supervisor.setup.gateway;
    let device = Device::new()?;
    let Welcome::Pending(request) = device.connect(gateway, GATEWAY_TOKEN)? else {
        return Err("the gateway let an unknown device in".into());
    };
    let devices = data(supervisor, "GET", "/v1/devices")?;
    assert_eq!(
        find(&devices["pending"], "requestId", &request)["deviceId"],
        device.id()
    );

    let approval = data(
        supervisor,
        "POST",
        &format!("/v1/devices/{request}/approve"),
    )?;
    assert_eq!(approval["approved"], true);
    assert_eq!(approval["requestId"], request);
    assert_eq!(approval["device"]["deviceId"], device.id());
    assert_eq!(device.connect(gateway, GATEWAY_TOKEN)?, Welcome::Paired);
    Ok(device)
}
