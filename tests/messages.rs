//! What the agent says: every error as one sentence and one word, results on standard output only, and no secret ever.

use std::fmt::Write as _;
use std::fs;

use e2e::agent::{Host, Outcome, Place, boot_id};
use e2e::front::{Front, certificate};
use e2e::golden;
use e2e::past;
use e2e::s3::wire::Answer;
use e2e::s3::{Asked, BUCKET, Effect, Kind, S3};
use e2e::signature::Identity;
use e2e::tree;
use jiff::SignedDuration;
use rustix::process::Signal;

/// Names of this run in a text, replaced by what they stand for.
fn neutral(text: &str, host: &Host, place: &Place) -> String {
    let mut text = text.replace(&host.folder.path().display().to_string(), "HOST");
    match place {
        Place::Directory(folder) => {
            text = text.replace(&folder.path().display().to_string(), "STORE");
        }
        Place::Memory(s3) => text = text.replace(&s3.address.to_string(), "127.0.0.1:PORT"),
        Place::Moto(..) => {}
    }
    let mut words = Vec::new();
    for word in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '-') {
        let (name, end) = match word.char_indices().last() {
            Some((at, c)) if !c.is_ascii_alphanumeric() && c != '-' => word.split_at(at),
            _ => (word, ""),
        };
        let is_hex =
            |length| name.len() == length && name.bytes().all(|byte| byte.is_ascii_hexdigit());
        let is_id = name.len() == 28 && name.as_bytes()[8] == b'T' && name.as_bytes()[18] == b'Z';
        let name = match name {
            _ if is_id => "ID",
            _ if is_hex(64) => "SHA256",
            _ if is_hex(32) && name.bytes().any(|byte| byte != name.as_bytes()[0]) => "WRITER",
            _ if name.starts_with("probe-") => "probe-RANDOM",
            name => name,
        };
        words.push(format!("{name}{end}"));
    }
    words.concat()
}

/// One failure in both forms: the sentence for people and the object for programs.
struct Book(String);

impl Book {
    fn add(&mut self, title: &str, host: &Host, place: &Place, arguments: &[&str], code: i32) {
        let plain = host.run(arguments).expect(code);
        assert_eq!(plain.stdout, "", "{title}: results only on standard output");
        let json = host.run(&[arguments, &["--json"]].concat()).expect(code);
        self.add_outcomes(title, host, place, &plain, &json);
    }

    fn add_outcomes(
        &mut self,
        title: &str,
        host: &Host,
        place: &Place,
        plain: &Outcome,
        json: &Outcome,
    ) {
        let object = json.json();
        let sentence = plain.sentence();
        let text = object["error"].as_str().expect("an error has a sentence");
        let code = object["code"].as_str().expect("an error has a word");
        let exit = json.code.expect("it was not killed");
        assert_eq!(
            object.as_object().map(serde_json::Map::len),
            Some(2),
            "nothing else: {object}"
        );
        let (sentence, text) = (neutral(&sentence, host, place), neutral(text, host, place));
        assert_eq!(
            sentence,
            format!("backup-agent: {text}"),
            "{title}: both forms say the same"
        );
        writeln!(self.0, "# {title}: {exit} {code}\n{sentence}\n")
            .expect("a string takes everything");
    }
}

fn with_snapshot(place: &Place) -> Host {
    let host = Host::new(place);
    tree::write(&host.root, "file", "content");
    host.backup();
    host
}

#[test]
fn every_error_is_one_sentence_and_one_word() {
    let mut book = Book(String::new());
    settings(&mut book);
    local(&mut book);
    damage(&mut book);
    writers(&mut book);
    store(&mut book);
    services(&mut book);
    network(&mut book);
    bounds(&mut book);
    golden::compare("agent-errors.txt", &book.0);
}

fn settings(book: &mut Book) {
    let place = Place::directory();
    let host = Host::new(&place);
    book.add("not an id", &host, &place, &["restore", "yesterday"], 64);
    tree::write(host.folder.path(), "target/file", "in the way");
    let target = host.folder.path().join("target").display().to_string();
    book.add(
        "target in use",
        &host,
        &place,
        &["restore", "--target", &target],
        64,
    );
    book.add(
        "relative root",
        &host,
        &place,
        &["backup", "--root", "data"],
        64,
    );
    book.add(
        "import from nowhere",
        &host,
        &place,
        &["import", "--from", "r2:bucket"],
        64,
    );
    tree::write(host.folder.path(), "old/else/file", "content");
    let old = format!("file://{}", host.folder.path().join("old").display());
    book.add(
        "import of something else",
        &host,
        &place,
        &["import", "--from", &old],
        64,
    );
    let mut all = Host::new(&place);
    for (name, value) in [
        ("RUNTIME_ROOT", "data"),
        ("RUNTIME_STATE", "/"),
        ("RUNTIME_INSTANCE_ID", "UPPER"),
        ("RUNTIME_STORE", "ftp://x"),
        ("RUNTIME_BACKUP_TIMEOUT", "5"),
        ("RUNTIME_RESTORE_TIMEOUT", "0s"),
        ("RUNTIME_STORE_UNFENCED", "yes"),
        ("RUNTIME_EXCLUDE", "[a"),
        ("RUNTIME_RETENTION", "last=all"),
        ("RUNTIME_LOG", "loud"),
        ("RUNTIME_BOOT_ID", "x"),
    ] {
        all.set(name, value);
    }
    book.add(
        "every bad setting at once",
        &all,
        &place,
        &["list", "--timeout", "soon"],
        64,
    );
    let mut s3 = Host::new(&place);
    s3.set("RUNTIME_STORE", "s3://bucket");
    book.add("S3 without anything else", &s3, &place, &["list"], 64);
    for (name, value) in [
        ("S3_ACCESS_KEY_ID", "id"),
        ("S3_SECRET_ACCESS_KEY", "secret"),
    ] {
        s3.set(&format!("RUNTIME_{name}"), value);
    }
    for (title, endpoint) in [
        ("endpoint of no kind", "host:1"),
        ("endpoint with a user", "http://me:secret@host"),
    ] {
        s3.set("RUNTIME_S3_ENDPOINT", endpoint);
        book.add(title, &s3, &place, &["list"], 64);
    }
    s3.set("RUNTIME_S3_ENDPOINT", "http://host");
    s3.set("RUNTIME_S3_SECRET_ACCESS_KEY_FILE", "/nowhere");
    book.add("a secret given twice", &s3, &place, &["list"], 64);
    s3.unset("RUNTIME_S3_SECRET_ACCESS_KEY");
    book.add(
        "a secret's file that is missing",
        &s3,
        &place,
        &["list"],
        64,
    );
    let unfenced = Place::memory();
    unfenced.s3().ignore_conditions();
    book.add(
        "a store without conditions",
        &Host::new(&unfenced),
        &unfenced,
        &["backup"],
        64,
    );
}

fn local(book: &mut Book) {
    let place = Place::directory();
    let host = with_snapshot(&place);
    host.lose_root();
    book.add("no root", &host, &place, &["backup"], 74);
    fs::remove_dir_all(&host.state).expect("it is there");
    tree::write(host.folder.path(), "state", "not a directory");
    book.add("no state", &host, &place, &["backup"], 64);
    let place = Place::directory();
    let host = with_snapshot(&place);
    for (title, target) in [
        ("target among the working files", "state/lock/target"),
        ("target in the state", "state/target"),
        ("target in the root", "root/target"),
    ] {
        let target = host.folder.path().join(target).display().to_string();
        book.add(title, &host, &place, &["restore", "--target", &target], 64);
    }
    fs::remove_file(host.state.join("state.json")).expect("it is there");
    std::os::unix::fs::symlink("elsewhere", host.state.join("state.json")).expect("can link");
    book.add("a link in the state", &host, &place, &["backup"], 74);
}

fn damage(book: &mut Book) {
    let place = Place::directory();
    let host = Host::new(&place);
    book.add("nothing there", &host, &place, &["restore"], 10);
    tree::write(&host.root, "file", "content");
    let snapshot = host.backup();
    tree::write(host.folder.path(), "old/openclaw/openclaw.json", "{}");
    let old = format!("file://{}", host.folder.path().join("old").display());
    book.add(
        "import into a used instance",
        &host,
        &place,
        &["import", "--from", &old],
        64,
    );
    book.add(
        "no such snapshot",
        &host,
        &place,
        &["restore", "20200101T000000000Z-00000000"],
        10,
    );
    fs::remove_dir_all(&host.state).expect("it is there");
    // What is right on the disk would not be read from the store.
    fs::remove_file(host.root.join("file")).expect("it is there");

    let layer = place.keys("layers/").remove(0);
    let sound = place.objects();
    let mut cut = sound[&layer].clone();
    cut.truncate(100);
    let mut changed = sound[&layer].clone();
    changed[50] ^= 1;
    let mut index = sound[&layer].clone();
    let at = index.len() - 100;
    index[at] ^= 1;
    for (title, bytes) in [
        ("a layer cut", &cut),
        ("a frame changed", &changed),
        ("an index changed", &index),
    ] {
        place.put(&layer, bytes);
        book.add(title, &host, &place, &["restore"], 11);
    }
    place.remove(&layer);
    book.add("a layer missing", &host, &place, &["restore"], 11);
    let record = format!("snapshots/{snapshot}.json");
    for key in ["head.json", record.as_str()] {
        let mut changed = sound[key].clone();
        changed[10] ^= 1;
        for (how, bytes) in [("changed", &changed[..]), ("cut", &sound[key][..40])] {
            place.put(key, bytes);
            let name = if key == record { "a record" } else { "a head" };
            book.add(&format!("{name} {how}"), &host, &place, &["restore"], 11);
        }
        place.put(key, &sound[key]);
    }
    place.remove(&record);
    book.add("a record missing", &host, &place, &["restore"], 11);
}

fn writers(book: &mut Book) {
    let place = Place::directory();
    let first = with_snapshot(&place).booted('a');
    let second = Host::new(&place).booted('b');
    let _ = second.run(&["restore"]).expect(0);
    tree::write(&first.root, "file", "more");
    // The first time it keeps a fork, then it only says so.
    let plain = first.run(&["backup"]).expect(12);
    fs::remove_dir_all(&first.state).expect("it is there");
    let json = first.run(&["backup", "--json"]).expect(12);
    book.add_outcomes("fenced, with a fork", &first, &place, &plain, &json);
    book.add("fenced since", &first, &place, &["backup"], 12);
    place.remove("head.json");
    book.add(
        "fenced, and the head is gone",
        &first,
        &place,
        &["backup"],
        12,
    );
}

fn store(book: &mut Book) {
    let answer = |status, code| Effect::Status {
        status,
        code,
        retry_after: None,
    };
    for (title, kind, key, effect) in [
        (
            "forbidden to read",
            Kind::Get,
            "head.json",
            answer(403, "AccessDenied"),
        ),
        (
            "no bucket",
            Kind::Get,
            "head.json",
            answer(404, "NoSuchBucket"),
        ),
        (
            "a clock that is wrong",
            Kind::Get,
            "head.json",
            answer(403, "RequestTimeTooSkewed"),
        ),
        (
            "forbidden to list",
            Kind::List,
            "",
            answer(403, "AccessDenied"),
        ),
        ("a status without a word", Kind::List, "", answer(400, "")),
    ] {
        let place = Place::memory();
        place.s3().add_fault(kind, key, 100, effect);
        book.add(title, &Host::new(&place), &place, &["restore"], 75);
    }
    for (title, kind, key, effect) in [
        (
            "forbidden to probe",
            Kind::Put,
            "probe-",
            answer(403, "AccessDenied"),
        ),
        (
            "forbidden to write a layer",
            Kind::Put,
            "layers/",
            answer(403, "AccessDenied"),
        ),
        (
            "forbidden to write a record",
            Kind::Put,
            "snapshots/",
            answer(403, "AccessDenied"),
        ),
        (
            "forbidden to write the head",
            Kind::Put,
            "head.json",
            answer(403, "AccessDenied"),
        ),
    ] {
        let place = Place::memory();
        let host = Host::new(&place);
        place.s3().add_fault(kind, key, 100, effect);
        book.add(title, &host, &place, &["backup"], 75);
    }
    let wait = Effect::Status {
        status: 503,
        code: "SlowDown",
        retry_after: Some(3600),
    };
    let place = Place::memory();
    place.s3().add_fault(Kind::Get, "head.json", 100, wait);
    book.add(
        "busy for an hour",
        &Host::new(&place),
        &place,
        &["restore"],
        75,
    );
}

/// Services that answer in their own way.
fn services(book: &mut Book) {
    let with = |change: fn(&Asked<'_>, Answer) -> Answer| {
        let place = Place::memory();
        place
            .s3()
            .behave(move |asked, serve| change(asked, serve()));
        place
    };
    for (title, verb, code, change) in [
        (
            "a service that ignores ranges",
            "backup",
            64,
            (|asked, mut answer| {
                if asked.incoming.header("range").is_some() && answer.status == 206 {
                    answer = Answer::new(200, vec![b'x'; 40]).with("ETag", "\"x\"");
                }
                answer
            }) as fn(&Asked<'_>, Answer) -> Answer,
        ),
        ("an address of something else", "restore", 75, |_, _| {
            Answer::new(404, "<html>not found</html>")
        }),
        ("a page in the place of the store", "restore", 75, |_, _| {
            Answer::new(200, "<!DOCTYPE html><html>log in</html>")
        }),
        ("a bucket in another region", "restore", 75, |_, _| {
            Answer::new(301, "").with("x-amz-bucket-region", "eu-north-7")
        }),
        ("an address that leads elsewhere", "restore", 75, |_, _| {
            Answer::new(307, "").with("Location", "https://elsewhere.example/?X-Amz-Signature=1")
        }),
        (
            "a listing that breaks off",
            "list",
            75,
            |asked, mut answer| {
                if asked.kind == Kind::List {
                    let text = answer.text().replace(">false<", ">true<");
                    answer.body = text.into_bytes();
                }
                answer
            },
        ),
        ("an expired session", "restore", 75, |_, _| {
            Answer::refusal(403, "ExpiredToken")
        }),
        ("keys that nobody knows", "restore", 75, |_, _| {
            Answer::refusal(403, "InvalidAccessKeyId")
        }),
    ] {
        let place = with(change);
        let host = Host::new(&place);
        tree::write(&host.root, "file", "content");
        book.add(title, &host, &place, &[verb], code);
    }
    listings_and_rights(book);
}

fn listings_and_rights(book: &mut Book) {
    let place = Place::memory();
    place
        .s3()
        .behave(|asked, serve| match asked.incoming.header("if-match") {
            Some(_) => Answer::refusal(412, "PreconditionFailed"),
            None => serve(),
        });
    book.add(
        "a store that refuses a right tag",
        &Host::new(&place),
        &place,
        &["backup"],
        64,
    );
    let place = Place::memory();
    let endpoint = format!("http://{}/{BUCKET}", place.s3().address);
    let host = Host::new(&place).with("RUNTIME_S3_ENDPOINT", endpoint);
    book.add("the bucket in the endpoint", &host, &place, &["list"], 64);
    let place = Place::memory();
    let host = with_snapshot(&place);
    let first = place.keys("snapshots/").remove(0);
    tree::write(&host.root, "file", "other");
    host.backup();
    place.s3().behave(move |asked, serve| {
        let mut answer = serve();
        if asked.kind == Kind::List {
            let shown = answer.text().replace(&first, "snapshots/of-nobody");
            answer.body = shown.into_bytes();
        }
        answer
    });
    book.add(
        "a listing that leaves a snapshot out",
        &host,
        &place,
        &["prune"],
        75,
    );
    let place = Place::memory();
    let host = with_snapshot(&place);
    place.s3().add_fault(
        Kind::Delete,
        "",
        10,
        Effect::Status {
            status: 403,
            code: "AccessDenied",
            retry_after: None,
        },
    );
    let layer = format!(
        "layers/{}.tar.zst",
        past::id(SignedDuration::from_hours(200), "00000000")
    );
    place.put(&layer, b"nobody's");
    book.add("forbidden to delete", &host, &place, &["prune"], 75);
}

/// The way to a service.
fn network(book: &mut Book) {
    let place = Place::memory();
    let host = Host::new(&place);
    let empty = host.folder.path().join("empty.pem").display().to_string();
    tree::write(host.folder.path(), "empty.pem", "");
    let mut host = host.with("RUNTIME_CA_FILE", empty);
    book.add(
        "authorities without a certificate",
        &host,
        &place,
        &["list"],
        64,
    );
    host.set(
        "RUNTIME_CA_FILE",
        host.folder.path().join("nowhere.pem").display().to_string(),
    );
    book.add("authorities that are missing", &host, &place, &["list"], 64);
    host.unset("RUNTIME_CA_FILE");
    host.set("HTTP_PROXY", "socks5://me:secret@localhost:1");
    book.add("a proxy of another kind", &host, &place, &["list"], 64);
    host.set("HTTP_PROXY", "http://me:secret@localhost:1");
    book.add(
        "a proxy that nobody serves",
        &host,
        &place,
        &["list", "--timeout", "1s"],
        75,
    );
    host.unset("HTTP_PROXY");
    for name in ["good", "expired", "other-name", "self-signed"] {
        let front = Front::tls(name, place.s3().address.port());
        host.set(
            "RUNTIME_S3_ENDPOINT",
            format!("https://localhost:{}", front.port),
        );
        if name != "good" {
            let trusted = if name == "self-signed" {
                name
            } else {
                "authority"
            };
            host.set(
                "RUNTIME_CA_FILE",
                certificate(trusted).display().to_string(),
            );
        }
        let title = format!("a certificate: {name}");
        book.add(&title, &host, &place, &["list"], 75);
    }
}

fn bounds(book: &mut Book) {
    let place = Place::memory();
    let nobody = [
        "backup",
        "--freeze-user",
        "no-such-user",
        "--max-pause",
        "soon",
    ];
    book.add(
        "nobody to stop, and for no time",
        &Host::new(&place),
        &place,
        &nobody,
        64,
    );
    place
        .s3()
        .add_fault(Kind::Get, "head.json", 6, Effect::Stall);
    let host = Host::new(&place);
    book.add(
        "out of time",
        &host,
        &place,
        &["restore", "--timeout", "500ms"],
        124,
    );
    book.add(
        "out of more time",
        &host,
        &place,
        &["restore", "--timeout", "1s"],
        124,
    );
    book.add(
        "out of time to prune",
        &host,
        &place,
        &["prune", "--timeout", "500ms"],
        124,
    );
    for (title, signal, code) in [
        ("terminated", Signal::TERM, 143),
        ("interrupted", Signal::INT, 130),
    ] {
        let run = |arguments: &[&str]| {
            place.s3().take_requests();
            place
                .s3()
                .add_fault(Kind::Get, "head.json", 1, Effect::Stall);
            let running = host.start(arguments);
            place.s3().wait_for(Kind::Get, "head.json");
            running.signal(signal);
            running.wait().expect(code)
        };
        let (plain, json) = (run(&["restore"]), run(&["restore", "--json"]));
        book.add_outcomes(title, &host, &place, &plain, &json);
    }
}

#[test]
fn a_user_that_does_not_exist_is_a_bad_setting_for_root() {
    let place = Place::directory();
    let host = Host::new(&place).with("RUNTIME_GATEWAY_USER", "no-such-user");
    let outcome = host
        .run(&["list"])
        .expect(if tree::is_root() { 64 } else { 0 });
    let is_named = outcome.sentence().contains("RUNTIME_GATEWAY_USER");
    assert_eq!(is_named, tree::is_root(), "{}", outcome.stderr);
}

#[test]
fn nobody_stops_the_user_who_runs_the_agent() {
    let place = Place::directory();
    let host = Host::new(&place);
    let ourselves = nix::unistd::getuid().to_string();
    let outcome = host
        .run(&["backup", "--freeze-user", &ourselves])
        .expect(64);
    assert!(
        outcome.sentence().contains("--freeze-user"),
        "{}",
        outcome.stderr
    );
    assert!(place.objects().is_empty());
}

#[test]
fn a_command_line_that_makes_no_sense_is_a_usage_error() {
    let place = Place::directory();
    let host = Host::new(&place);
    for arguments in [
        &["frobnicate"][..],
        &[],
        &["backup", "--frobnicate"],
        &["backup", "--level", "99"],
        &["check", "now"],
        &["restore", "--target"],
        &["restore", "a", "b"],
    ] {
        let json = host.run(&[arguments, &["--json"]].concat()).expect(64);
        let object = json.json();
        assert_eq!(object["code"], "usage", "{object}");
        let sentence = object["error"].as_str().expect("it is a sentence");
        assert!(
            sentence.starts_with("cannot understand the command line: "),
            "{sentence}"
        );
        assert_eq!(json.stderr, "", "the object says all of it");
        let outcome = host.run(arguments).expect(64);
        assert_eq!(outcome.stdout, "", "{arguments:?}");
        let is_told = outcome.stderr.contains("Usage: backup-agent")
            || outcome
                .stderr
                .contains("For more information, try '--help'");
        assert!(is_told, "{}", outcome.stderr);
    }
    let help = host.run(&["--help"]).expect(0);
    assert_eq!(help.stderr, "");
    golden::compare("agent-help.txt", &help.stdout);
}

#[test]
fn answers_have_the_members_that_programs_rely_on() {
    let place = Place::directory();
    let host = Host::new(&place);
    tree::write(&host.root, "file", "content");
    let mut text = String::new();
    let target = host.folder.path().join("target").display().to_string();
    tree::write(
        host.folder.path(),
        "old/openclaw/state/openclaw.sqlite",
        "content",
    );
    let from = format!("file://{}", host.folder.path().join("old").display());
    for arguments in [
        &["backup"][..],
        &["backup"],
        &["backup", "--fork"],
        &["restore"],
        &["restore", "--target", &target],
        &["list"],
        &["prune"],
        &["prune", "--dry-run"],
        &["import", "--instance", "other", "--from", &from],
    ] {
        let mut answer = host.json(arguments);
        mask(&mut answer);
        let answer = neutral(&answer.to_string(), &host, &place);
        writeln!(text, "{} {answer}", arguments[0]).expect("a string takes everything");
    }
    golden::compare("agent-answers.txt", &text);
}

/// Replaces what differs from run to run by what it is.
fn mask(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            for (name, value) in members {
                match (name.as_str(), &value) {
                    (
                        "snapshot" | "id" | "parent" | "time" | "writer",
                        serde_json::Value::String(_),
                    ) => {
                        *value = name.to_uppercase().into();
                    }
                    (
                        "durationMs" | "bytesUploaded" | "bytesDownloaded" | "storedBytes"
                        | "layersBytes" | "monthlyUsd",
                        serde_json::Value::Number(n),
                    ) => {
                        *value = if n.as_u64() == Some(0) && name != "durationMs" {
                            0.into()
                        } else {
                            "NUMBER".into()
                        };
                    }
                    _ => mask(value),
                }
            }
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(mask),
        _ => {}
    }
}

#[test]
fn no_secret_and_no_signature_is_ever_written() {
    let secrets = Identity {
        access_key_id: "AKIADISTINCTIVEKEYID".to_owned(),
        secret_access_key: "distinctive-secret-access-key".to_owned(),
        session_token: Some("distinctive-session-token".to_owned()),
        region: "auto".to_owned(),
    };
    let place = Place::Memory(S3::start_for(secrets));
    let mut host = Host::new(&place).with("RUNTIME_LOG", "debug").booted('a');
    tree::write(&host.root, "noise", tree::noise(1, 20 << 20));
    let mut said = String::new();
    let mut run = |host: &Host, arguments: &[&str]| {
        let outcome = host.run(arguments);
        said.push_str(&outcome.stdout);
        said.push_str(&outcome.stderr);
    };
    let busy = Effect::Status {
        status: 503,
        code: "SlowDown",
        retry_after: Some(0),
    };
    let denied = Effect::Status {
        status: 403,
        code: "AccessDenied",
        retry_after: None,
    };
    for effect in [
        busy,
        denied,
        Effect::ResetBefore,
        Effect::ResetInBody,
        Effect::Truncate,
        Effect::LoseAnswer,
    ] {
        for kind in [
            Kind::Get,
            Kind::Put,
            Kind::Part,
            Kind::Create,
            Kind::Complete,
            Kind::List,
            Kind::Delete,
        ] {
            place.s3().add_fault(kind, "", 1, effect);
        }
        run(&host, &["backup"]);
        run(&host, &["restore", "--json"]);
        run(&host, &["list"]);
        place.s3().clear_faults();
        tree::write(&host.root, "file", format!("{effect:?}"));
        fs::remove_dir_all(&host.state).expect("it is there");
    }
    place
        .s3()
        .add_fault(Kind::Get, "head.json", 1, Effect::Stall);
    run(&host, &["restore", "--timeout", "500ms"]);
    host.set("RUNTIME_S3_ENDPOINT", "http://127.0.0.1:1");
    run(&host, &["list", "--timeout", "5s"]);
    host.set("RUNTIME_BOOT_ID", boot_id('z'));
    run(&host, &["list"]);
    assert!(said.contains("trying again"), "the log was on: {said}");
    for secret in [
        "DISTINCTIVE",
        "distinctive",
        "X-Amz",
        "Signature=",
        "Credential=",
    ] {
        assert!(!said.contains(secret), "{secret} in:\n{said}");
    }
    for (key, bytes) in place.objects() {
        assert!(
            !String::from_utf8_lossy(&bytes).contains("distinctive"),
            "{key}"
        );
    }
}
