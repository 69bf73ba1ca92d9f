//! The whole way on real parts: HTTP, workerd, the Worker, its object, a container of the image, the gateway, an S3 server.
//!
//! `make e2e` runs this; it needs a Docker engine. The real gateway is in the cases that are about it.

use std::error::Error;
use std::thread;

use e2e::device::{Device, Welcome};
use e2e::edge::{Edge, GATEWAY_TOKEN, Store, TOKEN, Variant, docker};
use e2e::wait::{slowly_until, until};
use serde_json::{Value, json};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn is_running(container: &str) -> bool {
    docker(&["ps", "--quiet", "--no-trunc"]).contains(container)
}

/// The entry of a list that has this value, or null.
fn find<'a>(list: &'a Value, key: &str, value: &str) -> &'a Value {
    let mut entries = list.as_array().into_iter().flatten();
    entries
        .find(|entry| entry[key] == value)
        .unwrap_or(&Value::Null)
}

#[test]
fn first_request_starts_the_container_and_is_answered() {
    let (store, image) = (Store::new(), Variant::idle());
    let edge = Edge::start(&image.name, &store, &[]);
    assert_eq!(edge.containers(), Vec::<String>::new());
    let status = edge.status();
    let gateway = &status["gateway"]["status"];
    assert!(gateway == "restoring" || gateway == "starting", "{status}");
    assert_eq!(status["instance"]["id"], "ada");
    assert!(is_running(&edge.container()));
}

#[test]
fn what_the_worker_refuses_starts_nothing() {
    let (store, image) = (Store::new(), Variant::idle());
    let edge = Edge::start(&image.name, &store, &[]);
    let right = format!("Bearer {TOKEN}");
    for (authorization, path, status, code) in [
        (
            "Bearer edge-token-0123456789abcdefghijkm",
            "/v1/status",
            401,
            "unauthorized",
        ),
        ("", "/v1/status", 401, "unauthorized"),
        ("", "/elsewhere", 401, "unauthorized"),
        (&right, "/elsewhere", 404, "not_found"),
        (&right, "/", 404, "not_found"),
    ] {
        let answer = edge.request_as(authorization, "GET", path);
        assert_eq!(
            (answer.status, answer.code()),
            (status, code),
            "{path}: {answer:?}"
        );
        assert_eq!(answer.body["ok"], false);
        assert!(answer.body["error"].is_string(), "{answer:?}");
    }
    assert_eq!(edge.containers(), Vec::<String>::new());
}

#[test]
fn device_and_files_survive_a_sleep() -> Outcome {
    let (store, image) = (Store::new(), Variant::gateway());
    let edge = Edge::start(
        &image.name,
        &store,
        &[("RUNTIME_LIFECYCLE", "sleep-after=10s")],
    );
    edge.until_gateway("running");
    let container = edge.container();

    let device = Device::new()?;
    let Welcome::Pending(request) = device.connect(edge.tunnel(), GATEWAY_TOKEN)? else {
        return Err("the gateway let an unknown device in".into());
    };
    let devices = edge.data("GET", "/v1/devices");
    assert_eq!(
        find(&devices["pending"], "requestId", &request)["deviceId"],
        device.id()
    );
    assert_eq!(devices["paired"], json!([]));
    let approval = edge.data("POST", &format!("/v1/devices/{request}/approve"));
    assert_eq!(approval["approved"], true);
    assert_eq!(approval["device"]["deviceId"], device.id());
    assert_eq!(
        device.connect(edge.tunnel(), GATEWAY_TOKEN)?,
        Welcome::Paired
    );

    let make = |name: &str| {
        format!(
            "mkdir -p /data/.openclaw/workspace && cd /data/.openclaw/workspace && head -c 5000000 /dev/urandom >{name} && cat {name}"
        )
    };
    let before = edge.shell(&make("before.bin"));
    let backup = edge.data("POST", "/v1/backup");
    assert_eq!(store.head(), backup["snapshot"]);
    // Only the final snapshot can have this one.
    let after = edge.shell(&make("after.bin"));

    // From here on nobody asks anything.
    slowly_until("the container's sleep", || !is_running(&container));
    assert_ne!(
        store.head(),
        backup["snapshot"],
        "no final snapshot was taken"
    );

    let status = edge.until_gateway("running");
    assert_ne!(edge.container(), container);
    assert_eq!(
        status["restore"],
        json!({ "status": "done", "snapshot": store.head(), "error": null, "progress": null })
    );
    assert!(
        edge.shell("cat /data/.openclaw/workspace/before.bin") == before,
        "the file is another"
    );
    assert!(
        edge.shell("cat /data/.openclaw/workspace/after.bin") == after,
        "the last file is another"
    );
    let devices = edge.data("GET", "/v1/devices");
    assert_eq!(
        find(&devices["paired"], "deviceId", &device.id())["clientId"],
        "openclaw-ios",
        "{devices}"
    );
    assert_eq!(
        device.connect(edge.tunnel(), GATEWAY_TOKEN)?,
        Welcome::Paired
    );
    Ok(())
}

#[test]
fn container_killed_in_mid_backup_comes_back_with_the_last_snapshot() -> Outcome {
    let (store, image) = (Store::new(), Variant::idle());
    let edge = Edge::start(&image.name, &store, &[]);
    edge.until_restored();
    edge.shell("echo kept >/data/kept");
    let good = edge.data("POST", "/v1/backup")["snapshot"].clone();

    // Too much for one request, and nothing that compresses.
    edge.shell("mkdir /data/large && for i in 1 2 3 4 5 6 7 8; do head -c 40000000 /dev/urandom >/data/large/$i; done");
    let container = edge.container();
    let address = edge.address;
    let backup = thread::spawn(move || {
        let authorization = format!("Bearer {TOKEN}");
        e2e::http::request(
            address,
            "POST",
            "/v1/backup",
            &[("Authorization", &authorization)],
            b"",
        )
    });
    edge.until("a backup under way", |status| {
        status["backup"]["status"] == "running"
    });
    until("a part of it on the store", || {
        store.moto.open_uploads(&store.bucket) == 1
    });
    edge.signal("KILL");
    let answer = backup.join().map_err(|_| "nobody answered the backup")?;
    assert_eq!(
        (answer.status, answer.code()),
        (503, "container_unavailable"),
        "{answer:?}"
    );

    let status = edge.until_restored();
    assert_ne!(edge.container(), container);
    assert_eq!(
        status["restore"],
        json!({ "status": "done", "snapshot": good, "error": null, "progress": null })
    );
    assert_eq!(store.head(), good);
    assert_eq!(store.keys("snapshots/").len(), 1, "{:?}", store.keys(""));
    assert_eq!(store.keys("layers/").len(), 1, "{:?}", store.keys(""));
    assert_eq!(
        String::from_utf8(edge.shell("cd /data && cat kept && ls"))?,
        "kept\nkept\n"
    );
    Ok(())
}

#[test]
fn new_object_goes_on_with_the_running_container() {
    let (store, image) = (Store::new(), Variant::gateway());
    let mut edge = Edge::start(&image.name, &store, &[]);
    let pid = edge.until_gateway("running")["gateway"]["pid"].clone();
    assert!(pid.is_number(), "{pid}");
    let container = edge.container();

    edge.reset();
    let gateway = edge.status()["gateway"].take();
    assert_eq!(
        (&gateway["status"], &gateway["pid"]),
        (&json!("running"), &pid)
    );
    assert_eq!(edge.container(), container);
    // It sees to what follows its end, too, and needs no request for that.
    edge.signal("KILL");
    slowly_until("another container", || {
        let containers = edge.containers();
        containers.len() == 1 && containers[0] != container
    });
}

#[test]
fn container_that_never_listens_is_unavailable_with_a_reason() {
    let store = Store::new();
    let image = Variant::new(r#"ENTRYPOINT ["sleep", "infinity"]"#);
    let edge = Edge::start(&image.name, &store, &[]);
    let answer = edge.request("GET", "/v1/status");
    assert_eq!(
        (answer.status, answer.code()),
        (503, "container_unavailable"),
        "{answer:?}"
    );
    assert_eq!(
        answer.body["error"],
        "No container: nothing answers on its port."
    );
    let seconds: u32 = answer
        .header("retry-after")
        .and_then(|text| text.parse().ok())
        .unwrap_or(0);
    assert!(seconds > 0, "{answer:?}");
    assert!(
        is_running(&edge.container()),
        "a slow start is no reason to end it"
    );
    // Nor does the log say more than that.
    until("the reason in the log", || {
        edge.log().contains("nothing answers on its port")
    });
    for secret in [TOKEN, GATEWAY_TOKEN, "edge-secret-access-key"] {
        assert!(!edge.log().contains(secret), "{}", edge.log());
    }
}

#[test]
fn older_of_two_containers_is_fenced() {
    let (store, image) = (Store::new(), Variant::gateway());
    let old = Edge::start(&image.name, &store, &[]);
    old.until_gateway("running");
    old.shell(
        "mkdir -p /data/.openclaw/workspace && echo old >/data/.openclaw/workspace/of-the-old",
    );
    let first = old.data("POST", "/v1/backup")["snapshot"].clone();

    // A rollout: the new container starts while the old one still works.
    let new = Edge::start(&image.name, &store, &[]);
    let status = new.until_gateway("running");
    assert_eq!(status["restore"]["snapshot"], first);
    old.shell("echo late >/data/.openclaw/workspace/too-late");
    let refused = old.request("POST", "/v1/backup");
    assert_eq!(
        (refused.status, refused.code()),
        (409, "fenced"),
        "{refused:?}"
    );
    let status = old.status();
    assert_eq!(status["backup"]["status"], "fenced");
    assert_eq!(status["gateway"]["status"], "running");

    new.shell("echo new >/data/.openclaw/workspace/of-the-new");
    let second = new.data("POST", "/v1/backup")["snapshot"].clone();
    assert_eq!(store.head(), second);
    assert_eq!(new.status()["gateway"]["status"], "running");
    let listed = new.shell("cd /data/.openclaw/workspace && ls | grep -e ^of- -e ^too-");
    assert_eq!(String::from_utf8_lossy(&listed), "of-the-new\nof-the-old\n");
}
