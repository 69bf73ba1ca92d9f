//! The edge on real parts: workerd runs the bundled Worker with its object, which owns a container of the image, and the
//! container reaches an S3 server outside. What Cloudflare has more of, a test of this kind cannot see.
//!
//! Everything made here carries a name of its own and is removed when it is dropped.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;
use tempfile::TempDir;

use crate::http::{self, Response};
use crate::moto::Moto;
use crate::openclaw::repository;
use crate::surroundings::folder;
use crate::wait::{slowly_until_some, until_some};

pub const TOKEN: &str = "edge-token-0123456789abcdefghijkl";
pub const GATEWAY_TOKEN: &str = "gateway-token-0123456789abcdefghij";
pub const INSTANCE: &str = "ada";

/// Runs `docker` and returns its standard output; it has to succeed.
pub fn docker(arguments: &[&str]) -> String {
    String::from_utf8(succeed(Command::new("docker").args(arguments).output())).expect("it is text")
}

fn succeed(output: std::io::Result<Output>) -> Vec<u8> {
    let output = output.unwrap_or_else(|error| panic!("docker is not there: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "docker failed: {said}");
    output.stdout
}

/// A name that no other run has.
fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("openclaw-edge-{}-{count}", std::process::id())
}

/// The image under test: `E2E_IMAGE`, or what `make image` builds.
pub fn image() -> String {
    std::env::var("E2E_IMAGE").unwrap_or_else(|_| "openclaw-runtime".to_owned())
}

/// An image made from the one under test.
pub struct Variant {
    pub name: String,
}

impl Variant {
    /// With these lines of a Dockerfile added: the object has no way to say what a container is to run.
    pub fn new(lines: &str) -> Self {
        let name = unique();
        let mut build = Command::new("docker")
            .args(["build", "--quiet", "--tag", &name, "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker is there");
        let mut stdin = build.stdin.take().expect("it is piped");
        write!(stdin, "FROM {}\n{lines}\n", image()).expect("docker reads");
        drop(stdin);
        succeed(build.wait_with_output());
        Self { name }
    }

    /// A stand-in for the gateway: it never gets ready, starts at once, and takes no memory.
    pub fn idle() -> Self {
        Self::new(r#"CMD ["--", "sleep", "infinity"]"#)
    }

    /// The real gateway, which would let every device on loopback in by itself unless it is told not to.
    pub fn gateway() -> Self {
        Self::new(
            r#"USER openclaw
RUN mkdir -p /data/.openclaw && echo '{"gateway":{"mode":"local","nodes":{"pairing":{"autoApproveLocal":false}}}}' >/data/.openclaw/openclaw.json
USER root"#,
        )
    }
}

impl Drop for Variant {
    fn drop(&mut self) {
        let _ = Command::new("docker")
            .args(["rmi", "--force", &self.name])
            .output();
    }
}

/// Where snapshots go: a bucket on a server that containers can reach.
#[derive(Clone)]
pub struct Store {
    pub moto: Arc<Moto>,
    pub bucket: String,
}

impl Store {
    pub fn new() -> Self {
        let bridge = docker(&[
            "network",
            "inspect",
            "bridge",
            "--format",
            "{{(index .IPAM.Config 0).Gateway}}",
        ]);
        let bridge: Ipv4Addr = bridge
            .trim()
            .parse()
            .expect("Docker's bridge has an address");
        let (moto, bucket) = (Moto::shared_on(bridge), unique());
        moto.make_bucket(&bucket);
        Self { moto, bucket }
    }

    /// Keys below a folder of the instance.
    pub fn keys(&self, folder: &str) -> Vec<String> {
        let prefix = format!("instances/{INSTANCE}/{folder}");
        let mut keys = self.moto.keys(&self.bucket);
        keys.retain(|key| key.starts_with(&prefix));
        keys
    }

    /// The id of the snapshot that the head names.
    pub fn head(&self) -> Value {
        let key = format!("instances/{INSTANCE}/head.json");
        let head = self.moto.get(&self.bucket, &key);
        let head: Value = serde_json::from_slice(&head).expect("the head is JSON");
        head["snapshot"].clone()
    }
}

impl Default for Store {
    fn default() -> Self {
        Self::new()
    }
}

/// A Worker in front of one object with one container.
pub struct Edge {
    pub address: SocketAddr,
    /// Held, because the server ends with the last who does.
    _store: Store,
    folder: TempDir,
    /// Part of the name of everything that workerd starts.
    key: String,
    workerd: Child,
}

impl Edge {
    /// Containers will be of this image; the settings are added to those that lead to the store.
    pub fn start(image: &str, store: &Store, settings: &[(&str, &str)]) -> Self {
        let folder = folder();
        let key = unique();
        let bundle = repository().join("dist/worker/index.js");
        fs::copy(&bundle, folder.path().join("index.js")).unwrap_or_else(|error| {
            panic!("{}: {error}; `make worker` bundles it", bundle.display())
        });
        fs::create_dir(folder.path().join("objects")).expect("can make a folder");
        let endpoint = format!("http://{}", store.moto.address);
        let place = format!("s3://{}/instances", store.bucket);
        let usual = [
            ("RUNTIME_SERVICE_TOKEN", TOKEN),
            ("RUNTIME_GATEWAY_TOKEN", GATEWAY_TOKEN),
            ("RUNTIME_INSTANCE_ID", INSTANCE),
            ("RUNTIME_BACKUP_INTERVAL", "0"),
            ("RUNTIME_STOP_GRACE", "10s"),
            ("RUNTIME_STORE", &place),
            ("RUNTIME_S3_ENDPOINT", &endpoint),
            ("RUNTIME_S3_ACCESS_KEY_ID", "edge-key-id"),
            ("RUNTIME_S3_SECRET_ACCESS_KEY", "edge-secret-access-key"),
        ];
        let config = config(&key, image, usual.iter().chain(settings));
        fs::write(folder.path().join("config.capnp"), config).expect("can write");
        let (workerd, address) = serve(folder.path());
        Self {
            address,
            _store: store.clone(),
            folder,
            key,
            workerd,
        }
    }

    /// The object is lost and made again from what it stored, as by a deployment. Its container is not told.
    pub fn reset(&mut self) {
        // workerd ends its containers when it is asked to end, and leaves them alone when it is not.
        self.workerd.kill().expect("workerd runs");
        let _ = self.workerd.wait();
        (self.workerd, self.address) = serve(self.folder.path());
    }

    /// A request with the right token.
    pub fn request(&self, method: &str, path: &str) -> Response {
        self.request_as(&format!("Bearer {TOKEN}"), method, path)
    }

    pub fn request_as(&self, authorization: &str, method: &str, path: &str) -> Response {
        http::request(
            self.address,
            method,
            path,
            &[("Authorization", authorization)],
            b"",
        )
    }

    /// `data` of the answer to a request, which has to succeed.
    pub fn data(&self, method: &str, path: &str) -> Value {
        let mut answer = self.request(method, path);
        assert_eq!(
            answer.status,
            200,
            "{method} {path}: {answer:?}\n{}",
            self.log()
        );
        assert_eq!(answer.body["ok"], true, "{method} {path}: {answer:?}");
        answer.body["data"].take()
    }

    pub fn status(&self) -> Value {
        self.data("GET", "/v1/status")
    }

    /// The status, if it can be had and is as wanted.
    fn status_if(&self, is_so: impl Fn(&Value) -> bool) -> Option<Value> {
        let mut answer = self.request("GET", "/v1/status");
        let data = answer.body["data"].take();
        (answer.status == 200 && is_so(&data)).then_some(data)
    }

    /// Waits until the status is as wanted, through whatever comes before, and returns it.
    pub fn until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        until_some(what, || self.status_if(&is_so))
    }

    pub fn until_gateway(&self, wanted: &str) -> Value {
        slowly_until_some(&format!("a gateway that is {wanted}"), || {
            self.status_if(|status| status["gateway"]["status"] == wanted)
        })
    }

    /// Waits for the end of the restore, and returns the status.
    pub fn until_restored(&self) -> Value {
        self.until("a restore", |status| {
            ["done", "empty"]
                .iter()
                .any(|word| status["restore"]["status"] == *word)
        })
    }

    /// Containers of this object, running or not, by their ids.
    pub fn containers(&self) -> Vec<String> {
        let listed = docker(&[
            "ps",
            "--all",
            "--no-trunc",
            "--filter",
            &self.filter(),
            "--format",
            "{{.ID}} {{.Names}}",
        ]);
        // Beside each there is one of workerd's own, for its network.
        let own = listed.lines().filter(|line| !line.ends_with("-proxy"));
        own.filter_map(|line| Some(line.split_once(' ')?.0.to_owned()))
            .collect()
    }

    /// The one container.
    pub fn container(&self) -> String {
        let mut containers = self.containers();
        assert_eq!(
            containers.len(),
            1,
            "one container: {containers:?}\n{}",
            self.log()
        );
        containers.remove(0)
    }

    /// The address of the container's own port, past Worker and object.
    pub fn direct(&self) -> SocketAddr {
        let mut name = docker(&["inspect", "--format", "{{.Name}}", &self.container()]);
        name.truncate(name.trim_end().len());
        let format = "{{.NetworkSettings.IPAddress}}";
        let ip = docker(&["inspect", "--format", format, &format!("{name}-proxy")]);
        SocketAddr::new(ip.trim().parse().expect("a container has an address"), 8080)
    }

    /// Runs a command in the container as the gateway's user; its standard output.
    pub fn run(&self, command: &[&str]) -> Vec<u8> {
        let container = self.container();
        let mut docker = Command::new("docker");
        docker.args(["exec", "--user", "openclaw", &container]);
        succeed(docker.args(command).output())
    }

    /// Runs a script there likewise.
    pub fn shell(&self, script: &str) -> Vec<u8> {
        self.run(&["sh", "-c", script])
    }

    /// Sends a signal to the container's first process.
    pub fn signal(&self, signal: &str) {
        docker(&["kill", "--signal", signal, &self.container()]);
    }

    /// An address that leads one connection to the gateway, which listens on the container's loopback only: a process in
    /// there relays it, so that the gateway sees a local client.
    pub fn tunnel(&self) -> SocketAddr {
        const RELAY: &str = r#"const s = require("net").connect(18789, "127.0.0.1"); process.stdin.pipe(s).pipe(process.stdout)"#;
        let container = self.container();
        let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
        let address = listener.local_addr().expect("it is bound");
        std::thread::spawn(move || {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            // It ends where either side closes.
            let input = OwnedFd::from(stream.try_clone().expect("a socket can be shared"));
            let _ = Command::new("docker")
                .args(["exec", "--interactive", &container, "node", "-e", RELAY])
                .stdin(input)
                .stdout(OwnedFd::from(stream))
                .status();
        });
        address
    }

    /// What workerd and the object said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn filter(&self) -> String {
        format!("name=^/?workerd-{}-", self.key)
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- workerd\n{}", self.log());
        }
        let _ = self.workerd.kill();
        let _ = self.workerd.wait();
        let listed = Command::new("docker")
            .args(["ps", "--all", "--quiet", "--filter", &self.filter()])
            .output();
        let listed = listed
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default();
        if !listed.is_empty() {
            let _ = Command::new("docker")
                .args(["rm", "--force", "--volumes"])
                .args(listed.lines())
                .output();
        }
    }
}

/// Starts workerd in its folder and waits for the address that it listens on.
fn serve(folder: &Path) -> (Child, SocketAddr) {
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join("log"))
        .expect("can write a log");
    let mut workerd = Command::new(workerd())
        .args(["serve", "--experimental", "--control-fd=1", "config.capnp"])
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().expect("a file can be shared"))
        .spawn()
        .expect("workerd can be run");
    let mut lines = BufReader::new(workerd.stdout.take().expect("it is piped")).lines();
    let port = lines.by_ref().map_while(Result::ok).find_map(|line| {
        let event: Value = serde_json::from_str(&line).ok()?;
        (event["event"] == "listen").then(|| event["port"].as_u64())?
    });
    let Some(port) = port.and_then(|port| u16::try_from(port).ok()) else {
        let _ = workerd.kill();
        let _ = workerd.wait();
        panic!(
            "workerd does not listen: {}",
            fs::read_to_string(folder.join("log")).unwrap_or_default()
        );
    };
    std::thread::spawn(move || {
        let mut log = log;
        for line in lines.map_while(Result::ok) {
            // The folder may be gone already, and so may its reader.
            let _ = writeln!(log, "{line}");
        }
    });
    (workerd, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

fn config<'a>(
    key: &str,
    image: &str,
    settings: impl Iterator<Item = &'a (&'a str, &'a str)>,
) -> String {
    let bindings: Vec<String> = settings
        .map(|(name, value)| format!("(name = {name:?}, text = {value:?})"))
        .collect();
    format!(
        r#"using Workerd = import "/workerd/workerd.capnp";
const config :Workerd.Config = (
  services = [
    (name = "main", worker = .worker),
    (name = "objects", disk = (path = "objects", writable = true)),
    (name = "internet", network = (allow = ["public", "private"])),
  ],
  sockets = [(name = "http", address = "127.0.0.1:0", http = (), service = "main")],
);
const worker :Workerd.Worker = (
  modules = [(name = "index.js", esModule = embed "index.js")],
  compatibilityDate = {date:?},
  bindings = [(name = "RUNTIME", durableObjectNamespace = "Runtime"), {bindings}],
  durableObjectNamespaces = [
    (className = "Runtime", uniqueKey = {key:?}, enableSql = true, container = (imageName = {image:?})),
  ],
  durableObjectStorage = (localDisk = "objects"),
  containerEngine = (localDocker = (socketPath = {socket:?}, containerEgressInterceptorImage = {sidecar:?})),
);
"#,
        date = compatibility_date(),
        bindings = bindings.join(", "),
        socket = socket(),
        sidecar = sidecar(),
    )
}

fn node_modules() -> PathBuf {
    repository().join("worker/node_modules")
}

fn workerd() -> PathBuf {
    let architecture = match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "64",
    };
    node_modules().join(format!(
        "@cloudflare/workerd-linux-{architecture}/bin/workerd"
    ))
}

/// The text between quotes that follows a mark in a file.
fn quoted(path: &Path, mark: &str) -> String {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let rest = text
        .split_once(mark)
        .and_then(|(_, rest)| rest.split_once('"'));
    let value = rest.and_then(|(_, rest)| rest.split_once('"'));
    value
        .unwrap_or_else(|| panic!("{}: no {mark}", path.display()))
        .0
        .to_owned()
}

fn compatibility_date() -> String {
    quoted(
        &repository().join("wrangler.jsonc"),
        "\"compatibility_date\":",
    )
}

/// The image of what workerd starts beside a container, for its network: wrangler's own choice, under wrangler's own name.
fn sidecar() -> String {
    let name = std::env::var("MINIFLARE_CONTAINER_EGRESS_IMAGE").unwrap_or_else(|_| {
        quoted(
            &node_modules().join("miniflare/dist/src/index.js"),
            "DEFAULT_CONTAINER_EGRESS_INTERCEPTOR_IMAGE =",
        )
    });
    // workerd does not fetch it.
    let is_here = Command::new("docker")
        .args(["image", "inspect", &name])
        .output();
    if !is_here.is_ok_and(|output| output.status.success()) {
        docker(&["pull", "--quiet", &name]);
    }
    name
}

/// Of the engine that `docker` talks to, as workerd wants it.
fn socket() -> String {
    let host = docker(&[
        "context",
        "inspect",
        "--format",
        "{{.Endpoints.docker.Host}}",
    ]);
    let path = host.trim().strip_prefix("unix://");
    format!(
        "unix:{}",
        path.unwrap_or_else(|| panic!("the Docker engine is not on this machine: {host}"))
    )
}
