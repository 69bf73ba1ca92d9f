//! The S3 store against a server that misbehaves: what is tried again, what is not, and what is found out.

use e2e::agent::{Host, Place, boot_id, folder};
use e2e::s3::{BUCKET, Effect, Fault, Kind, Request, S3};
use e2e::signature::Identity;
use e2e::surroundings::around;
use e2e::tree::{self, assert_same, describe, kept};

/// Enough noise for three parts of an upload.
const SEVERAL_PARTS: usize = 20 << 20;

fn count(requests: &[Request], kind: Kind) -> usize {
    requests
        .iter()
        .filter(|request| request.kind == kind)
        .count()
}

#[test]
fn a_small_backup_needs_few_requests_and_a_restore_fewer() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    host.backup();
    tree::write(&host.root, "file", "other content");
    place.s3().take_requests();

    host.backup();
    let requests = place.s3().take_requests();
    let kinds: Vec<_> = requests
        .iter()
        .map(|request| (request.kind, request.key.as_str()))
        .collect();
    assert_eq!(kinds[0], (Kind::Get, "some/prefix/the-instance/head.json"));
    assert!(
        kinds[1].0 == Kind::Put && kinds[1].1.contains("/layers/"),
        "{kinds:?}"
    );
    assert!(
        kinds[2].0 == Kind::Put && kinds[2].1.contains("/snapshots/"),
        "{kinds:?}"
    );
    assert_eq!(
        kinds[3],
        (Kind::Put, "some/prefix/the-instance/head.json"),
        "the head comes last"
    );
    assert_eq!(kinds.len(), 4, "{kinds:?}");

    host.lose_everything();
    let answer = host.json(&["restore"]);
    let requests = place.s3().take_requests();
    assert!(
        requests.iter().all(|request| request.kind == Kind::Get),
        "{requests:#?}"
    );
    assert_eq!(
        requests.len(),
        4,
        "head, record, index, data: {requests:#?}"
    );
    let layer = requests
        .iter()
        .filter(|request| request.key.contains("/layers/"));
    let sent: usize = layer.map(|request| request.sent).sum();
    assert_eq!(answer["bytesDownloaded"], sent, "what it says is what came");
}

#[test]
fn the_first_backup_asks_once_whether_ranges_and_conditions_are_honoured() {
    let place = Place::memory();
    let host = Host::new(&place);
    for round in 0..2 {
        tree::write(&host.root, "file", round.to_string());
        host.backup();
        let requests = place.s3().take_requests();
        let probes: Vec<_> = requests
            .iter()
            .filter(|request| request.key.contains("/probe-"))
            .collect();
        let statuses: Vec<_> = probes.iter().map(|request| request.status).collect();
        let want: &[u16] = if round == 0 {
            &[200, 200, 206, 200, 412, 412, 204]
        } else {
            &[]
        };
        assert_eq!(statuses, want);
    }
    assert!(place.keys("probe-").is_empty(), "the probe is removed");
}

#[test]
fn a_large_backup_goes_up_in_equal_parts_and_comes_back() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "noise", tree::noise(1, SEVERAL_PARTS));
    let before = describe(&host.root);
    host.backup();
    let requests = place.s3().take_requests();
    let counts =
        [Kind::Create, Kind::Part, Kind::Complete, Kind::Abort].map(|kind| count(&requests, kind));
    assert_eq!(counts, [1, 5, 1, 0]);
    assert_eq!(place.s3().open_uploads(), 0);
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    assert_same(&before, &describe(&host.root));
    place.s3().assert_no_complaints();
}

#[test]
fn a_layer_of_exactly_one_part_needs_no_multipart() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "noise", tree::noise(1, 4 << 20));
    host.backup();
    let requests = place.s3().take_requests();
    assert_eq!(count(&requests, Kind::Create), 0);
    place.s3().assert_no_complaints();
}

/// Every kind of request that a backup, a restore and a list make.
const EVERY_REQUEST: [(Kind, &str); 12] = [
    (Kind::Put, "probe-"),
    (Kind::Delete, "probe-"),
    (Kind::Get, "head.json"),
    (Kind::Create, "layers/"),
    (Kind::Part, "layers/"),
    (Kind::Complete, "layers/"),
    (Kind::Put, "snapshots/"),
    (Kind::Put, "head.json"),
    (Kind::Get, "snapshots/"),
    (Kind::Get, "layers/"),
    (Kind::List, "snapshots/"),
    (Kind::Delete, "probe-"),
];

/// Backup, loss and restore, where each of these requests goes wrong once in this way.
fn survive(effect: Effect, requests: &[(Kind, &'static str)]) {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::make(&host.root);
    let before = kept(describe(&host.root));
    for &(kind, key) in requests {
        place.s3().add_fault(kind, key, 1, effect);
    }
    let snapshot = host.backup();
    assert_eq!(place.head()["snapshot"], snapshot);
    assert_eq!(place.keys("snapshots/").len(), 1);
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    assert_same(&before, &describe(&host.root));
    assert_eq!(
        host.json(&["list"])["snapshots"].as_array().map(Vec::len),
        Some(1)
    );
    // The id of an upload whose creation was answered to nobody is known to nobody.
    let is_lost = effect != Effect::ResetBefore && !matches!(effect, Effect::Status { .. });
    assert_eq!(place.s3().open_uploads(), usize::from(is_lost));
    place.s3().assert_no_complaints();
}

fn status(status: u16, code: &'static str) -> Effect {
    Effect::Status {
        status,
        code,
        retry_after: None,
    }
}

#[test]
fn transient_answers_are_tried_again() {
    for effect in [
        status(500, "InternalError"),
        status(503, "SlowDown"),
        status(429, "TooManyRequests"),
        status(408, "RequestTimeout"),
        status(400, "RequestTimeout"),
        status(502, ""),
    ] {
        survive(effect, &EVERY_REQUEST);
    }
}

#[test]
fn connections_that_break_are_tried_again() {
    survive(Effect::ResetBefore, &EVERY_REQUEST);
    survive(Effect::LoseAnswer, &EVERY_REQUEST);
}

#[test]
fn answers_that_break_off_are_tried_again() {
    let with_body: Vec<_> = EVERY_REQUEST
        .into_iter()
        .filter(|(kind, _)| matches!(kind, Kind::Get | Kind::List | Kind::Create | Kind::Complete))
        .collect();
    survive(Effect::ResetInBody, &with_body);
    survive(Effect::Truncate, &with_body);
}

#[test]
fn a_wish_to_wait_is_heard() {
    let place = Place::memory();
    let host = Host::new(&place).with("RUNTIME_LOG", "debug");
    tree::write(&host.root, "file", "content");
    let busy = Effect::Status {
        status: 503,
        code: "SlowDown",
        retry_after: Some(1),
    };
    place.s3().add_fault(Kind::Put, "snapshots/", 2, busy);
    let outcome = host.run(&["backup"]).expect(0);
    let waits: Vec<_> = outcome
        .logged("store request failed, trying again")
        .iter()
        .map(|line| line["delay_ms"].as_u64().unwrap_or_default())
        .collect();
    assert_eq!(waits, [1000, 1000]);
}

#[test]
fn a_wish_to_wait_beyond_the_bound_ends_it_at_once() {
    let place = Place::memory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    let busy = Effect::Status {
        status: 503,
        code: "SlowDown",
        retry_after: Some(3600),
    };
    place.s3().add_fault(Kind::Get, "head.json", 10, busy);
    let answer = host.run(&["backup", "--json"]).expect(75).json();
    assert_eq!(answer["code"], "store_unavailable");
    let requests = place.s3().take_requests();
    assert_eq!(
        requests
            .iter()
            .filter(|request| request.key.ends_with("head.json"))
            .count(),
        1
    );
}

#[test]
fn refusals_are_not_tried_again() {
    for (effect, name) in [
        (status(403, "AccessDenied"), "403 AccessDenied"),
        (status(400, "InvalidRequest"), "400 InvalidRequest"),
        (status(301, "PermanentRedirect"), "301 PermanentRedirect"),
        (status(404, "NoSuchBucket"), "404 NoSuchBucket"),
    ] {
        for verb in ["backup", "restore", "list"] {
            let place = Place::memory();
            let host = Host::new(&place);
            tree::write(&host.root, "file", "content");
            place.s3().add_fault(Kind::Get, "head.json", 10, effect);
            let answer = host.run(&[verb, "--json"]).expect(75).json();
            assert_eq!(answer["code"], "store_unavailable");
            let error = answer["error"].as_str().expect("it is a sentence");
            assert!(error.contains(name), "{error}");
            let mut requests = place.s3().take_requests();
            requests.retain(|request| request.key.ends_with("head.json"));
            assert_eq!(count(&requests, Kind::Get), 1, "{verb}: {requests:#?}");
        }
    }
}

#[test]
fn a_store_that_cannot_be_listed_is_never_called_empty() {
    for effect in [
        status(403, "AccessDenied"),
        status(404, "NoSuchBucket"),
        status(404, ""),
    ] {
        let place = Place::memory();
        let host = Host::new(&place);
        place.s3().add_fault(Kind::List, "snapshots/", 10, effect);
        let _ = host.run(&["restore"]).expect(75);
    }
    let place = Place::memory();
    place.s3().remove_bucket();
    let host = Host::new(&place).with("RUNTIME_BOOT_ID", boot_id('a'));
    let _ = host.run(&["restore"]).expect(75);
}

#[test]
fn a_store_that_nobody_serves_is_unavailable() {
    let place = Place::memory();
    // A port that was free a moment ago.
    let address = S3::start().address;
    let host = Host::new(&place)
        .with("RUNTIME_S3_ENDPOINT", format!("http://{address}"))
        .with("RUNTIME_RESTORE_TIMEOUT", "30s");
    let answer = host.run(&["restore", "--json"]).expect(75).json();
    let error = answer["error"]
        .as_str()
        .expect("it is a sentence")
        .to_owned();
    assert!(error.contains("127.0.0.1"), "{error}");
}

#[test]
fn an_upload_that_fails_for_good_is_aborted() {
    for (kind, skip) in [(Kind::Part, 0), (Kind::Part, 2), (Kind::Complete, 0)] {
        let place = Place::memory();
        let host = Host::new(&place);
        tree::write(&host.root, "noise", tree::noise(1, SEVERAL_PARTS));
        let effect = status(403, "AccessDenied");
        place.s3().add(Fault {
            kind,
            key: "layers/",
            skip,
            times: 1,
            effect,
        });
        let _ = host.run(&["backup"]).expect(75);
        assert_eq!(place.s3().open_uploads(), 0);
        assert_eq!(place.objects().len(), 0);
        host.backup();
    }
}

#[test]
fn a_store_that_ignores_conditions_is_refused_unless_the_operator_answers_for_it() {
    let place = Place::memory();
    place.s3().ignore_conditions();
    let mut host = Host::new(&place).booted('a');
    tree::write(&host.root, "file", "content");
    for verb in ["backup", "restore"] {
        let answer = host.run(&[verb, "--json"]).expect(64).json();
        let error = answer["error"]
            .as_str()
            .expect("it is a sentence")
            .to_owned();
        assert!(error.contains("RUNTIME_STORE_UNFENCED=allow"), "{error}");
        assert!(
            place.objects().is_empty(),
            "nothing is left there: {:?}",
            place.keys("")
        );
    }
    host.set("RUNTIME_STORE_UNFENCED", "allow");
    let _ = host.run(&["restore"]).expect(10);
    let snapshot = host.backup();
    host.unset("RUNTIME_BOOT_ID");
    host.lose_everything();
    assert_eq!(host.json(&["restore"])["snapshot"], snapshot);
}

#[test]
fn a_listing_of_several_pages_is_read_to_its_end() {
    let place = Place::memory();
    let host = Host::new(&place);
    let mut ids = Vec::new();
    for number in 0..5 {
        tree::write(&host.root, "file", number.to_string());
        ids.insert(0, host.backup());
    }
    place.s3().set_page(2);
    place.s3().take_requests();
    let list = host.json(&["list"]);
    let named: Vec<_> = list["snapshots"]
        .as_array()
        .expect("it is a list")
        .iter()
        .map(|entry| entry["id"].as_str().expect("it has an id").to_owned())
        .collect();
    assert_eq!(named, ids);
    assert_eq!(count(&place.s3().take_requests(), Kind::List), 3);
}

fn identity() -> Identity {
    Identity {
        access_key_id: "AKIATEMPORARY".to_owned(),
        secret_access_key: "a-secret/with+strange=characters".to_owned(),
        session_token: Some("a-token/with+strange=characters&more%2F~".to_owned()),
        region: "eu-central-7".to_owned(),
    }
}

#[test]
fn a_session_token_and_a_region_are_signed() {
    let place = Place::Memory(S3::start_for(identity()));
    let host = Host::new(&place).with("RUNTIME_S3_REGION", identity().region);
    tree::make(&host.root);
    host.backup();
    host.lose_everything();
    let _ = host.run(&["restore"]).expect(0);
    place.s3().assert_no_complaints();
}

#[test]
fn wrong_credentials_are_unavailability_and_said_so() {
    for name in [
        "RUNTIME_S3_ACCESS_KEY_ID",
        "RUNTIME_S3_SECRET_ACCESS_KEY",
        "RUNTIME_S3_SESSION_TOKEN",
    ] {
        let place = Place::memory();
        let host = Host::new(&place).with(name, "wrong");
        let answer = host.run(&["restore", "--json"]).expect(75).json();
        let error = answer["error"].as_str().expect("it is a sentence");
        assert!(
            error.contains("the service answered 403 SignatureDoesNotMatch"),
            "{error}"
        );
    }
}

#[test]
fn secrets_can_come_from_files() {
    let place = Place::Memory(S3::start_for(identity()));
    let mut host = Host::new(&place).with("RUNTIME_S3_REGION", identity().region);
    let secrets = folder();
    for (name, value) in [
        ("RUNTIME_S3_ACCESS_KEY_ID", identity().access_key_id),
        ("RUNTIME_S3_SECRET_ACCESS_KEY", identity().secret_access_key),
        (
            "RUNTIME_S3_SESSION_TOKEN",
            identity().session_token.expect("it has one"),
        ),
    ] {
        tree::write(secrets.path(), name, format!("{value}\n"));
        host.unset(name);
        host.set(
            &format!("{name}_FILE"),
            secrets.path().join(name).display().to_string(),
        );
    }
    tree::write(&host.root, "file", "content");
    host.backup();
    place.s3().assert_no_complaints();
}

#[test]
fn the_bucket_can_be_part_of_the_host_name() {
    if !tree::is_root() {
        // The name of a host on loopback takes a line in /etc/hosts: a private one, which only root can make.
        return;
    }
    let place = Place::memory();
    let port = place.s3().address.port();
    let hosts = folder();
    tree::write(
        hosts.path(),
        "hosts",
        format!("127.0.0.1 {BUCKET}.store.test\n"),
    );
    let endpoint = format!("http://{{bucket}}.store.test:{port}");
    let host = Host::new(&place).with("RUNTIME_S3_ENDPOINT", endpoint);
    let path = hosts.path().join("hosts");
    for verb in ["restore", "list"] {
        let inner = host.command(&[verb]);
        let mut command = std::process::Command::new("unshare");
        command
            .args([
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$1\" /etc/hosts && shift && exec \"$@\"",
                "sh",
            ])
            .arg(&path);
        let outcome = e2e::agent::Running::start(&mut around(command, &inner)).wait();
        let _ = outcome.expect(if verb == "list" { 0 } else { 10 });
    }
    let requests = place.s3().take_requests();
    assert!(
        !requests.is_empty() && requests.iter().all(|request| request.is_virtual_host),
        "{requests:#?}"
    );
    place.s3().assert_no_complaints();
}
