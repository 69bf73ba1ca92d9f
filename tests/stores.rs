//! Stores as they are: services, proxies and file systems that answer in their own way. What can be worked with is; what
//! cannot is named, and an error is never taken for an absence.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use e2e::agent::{Host, INSTANCE, Outcome, PREFIX, Place, Running, boot_id};
use e2e::front::{Front, certificate};
use e2e::history::History;
use e2e::mount::tmpfs;
use e2e::openclaw::repository;
use e2e::s3::wire::Answer;
use e2e::s3::{BUCKET, Kind};
use e2e::surroundings::around;
use e2e::tree::{self, assert_same, describe};
use serde_json::Value;

const NAMESPACE: &str = " xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";

/// The sentence of a failure.
fn error(outcome: &Outcome) -> String {
    let answer = outcome.json();
    answer["error"]
        .as_str()
        .expect("it is a sentence")
        .to_owned()
}

fn with_file(place: &Place) -> Host {
    let host = Host::new(place);
    tree::write(&host.root, "file", "content");
    host
}

fn ids(list: &Value) -> Vec<String> {
    let snapshots = list["snapshots"].as_array().expect("it is a list").iter();
    let id = |entry: &Value| entry["id"].as_str().expect("it has one").to_owned();
    snapshots.map(id).collect()
}

/// Two backups, a restore and a boot elsewhere, a list and a prune, with a layer in parts among them.
fn live_with(place: &Place) {
    let host = Host::new(place);
    tree::write(&host.root, "noise", tree::noise(1, 12 << 20));
    host.backup();
    tree::write(&host.root, "file", "content");
    let last = host.backup();
    let before = describe(&host.root);
    assert_eq!(
        host.json(&["list"])["snapshots"].as_array().map(Vec::len),
        Some(2)
    );
    let _ = host.run(&["prune"]).expect(0);
    let other = Host::new(place).booted('b');
    assert_eq!(other.json(&["restore"])["snapshot"], last);
    assert_same(&before, &describe(&other.root));
    tree::write(&other.root, "file", "of the other");
    other.backup();
    tree::write(&other.root, "file", "of the other, once more");
    other.backup();
    place.s3().assert_no_complaints();
}

#[test]
fn an_address_that_is_no_s3_service_is_never_an_empty_store() {
    let page = |status, body: &str, kind: &'static str| {
        Answer::new(status, body).with("Content-Type", kind)
    };
    for answer in [
        page(404, "<html><body>Not Found</body></html>", "text/html"),
        page(404, "404 page not found\n", "text/plain"),
        page(404, "{\"message\": \"no route\"}", "application/json"),
        page(404, "", "text/plain"),
        page(
            200,
            "<html><body>log in</body></html>",
            "text/html; charset=utf-8",
        ),
    ] {
        let place = Place::memory();
        let answer = answer.with("ETag", "\"of a page\"");
        place.s3().behave(move |_, _| answer.clone());
        for verb in ["restore", "backup", "list", "prune"] {
            let host = with_file(&place).booted('a');
            let said = error(&host.run(&[verb, "--json"]).expect(75));
            assert!(said.contains("is no S3 service"), "{said}");
            assert!(said.contains("check RUNTIME_S3_ENDPOINT"), "{said}");
        }
        assert!(place.objects().is_empty());
    }
}

#[test]
fn an_answer_without_a_word_is_an_absence_where_the_bucket_is_there() {
    let place = Place::memory();
    place.s3().behave(|asked, serve| {
        // Credentials may be limited to the prefix.
        assert!(
            asked.key.starts_with(PREFIX),
            "{:?} {}",
            asked.kind,
            asked.key
        );
        let answer = serve();
        if answer.status == 404 {
            Answer::new(404, "")
        } else {
            answer
        }
    });
    let _ = Host::new(&place).run(&["restore"]).expect(10);
    live_with(&place);

    place.s3().remove_bucket();
    let said = error(&Host::new(&place).run(&["restore", "--json"]).expect(75));
    assert!(said.contains("404 to a listing of the bucket"), "{said}");
}

#[test]
fn a_bucket_that_is_in_the_endpoint_too_is_said() {
    let place = Place::memory();
    for slash in ["", "/"] {
        let endpoint = format!("http://{}/{BUCKET}{slash}", place.s3().address);
        for verb in ["restore", "backup", "list", "prune"] {
            let host = with_file(&place)
                .booted('a')
                .with("RUNTIME_S3_ENDPOINT", &endpoint);
            let outcome = host.run(&[verb, "--json"]);
            let said = error(&outcome);
            assert_eq!(outcome.code, Some(64), "{said}");
            assert!(
                said.contains("RUNTIME_S3_ENDPOINT: it has the bucket"),
                "{said}"
            );
        }
    }
    assert_eq!(
        place.s3().objects().len(),
        0,
        "nothing is written at a wrong place"
    );
}

#[test]
fn an_answer_that_names_another_region_is_passed_on() {
    for (status, code) in [
        (301, "PermanentRedirect"),
        (307, "TemporaryRedirect"),
        (400, "AuthorizationHeaderMalformed"),
    ] {
        let place = Place::memory();
        place.s3().behave(move |_, _| {
            let body = format!("<Error><Code>{code}</Code><Region>eu-north-7</Region></Error>");
            Answer::new(status, body).with("Location", "https://elsewhere.example/")
        });
        let said = error(&Host::new(&place).run(&["restore", "--json"]).expect(75));
        assert!(said.contains("eu-north-7: set RUNTIME_S3_REGION"), "{said}");
    }
}

/// Changes every document that a service sends.
fn rewrite(place: &Place, change: impl Fn(&str) -> String + Send + 'static) {
    place.s3().behave(move |_, serve| {
        let mut answer = serve();
        if answer.body.starts_with(b"<") {
            answer.body = change(&answer.text()).into_bytes();
        }
        answer
    });
}

#[test]
fn documents_are_read_whatever_their_namespace() {
    let prefixed = |text: &str| {
        let text = text.replace(NAMESPACE, " xmlns:s3=\"http://s3.example/\"");
        text.replace("</", "\0")
            .replace("<?", "\u{1}")
            .replace('<', "<s3:")
            .replace('\0', "</s3:")
            .replace('\u{1}', "<?")
    };
    let place = Place::memory();
    rewrite(&place, |text| text.replace(NAMESPACE, ""));
    live_with(&place);
    let place = Place::memory();
    rewrite(&place, |text| {
        text.replace(NAMESPACE, " xmlns='http://doc.s3.example/2024'")
    });
    live_with(&place);
    // As rclone calls it.
    let place = Place::memory();
    rewrite(&place, |text| {
        text.replace("InitiateMultipartUploadResult", "InitiateMultipartUpload")
    });
    live_with(&place);
    let place = Place::memory();
    rewrite(&place, prefixed);
    live_with(&place);
    let place = Place::memory();
    rewrite(&place, |text| format!("\u{feff}{text}\n"));
    live_with(&place);
}

#[test]
fn an_error_behind_a_success_is_an_error() {
    let place = Place::memory();
    let failures = Arc::new(AtomicU32::new(0));
    let seen = Arc::clone(&failures);
    // Once for each kind of request that S3 answers so.
    place.s3().behave(move |asked, serve| {
        let bit = match asked.kind {
            Kind::Complete => 1,
            Kind::List => 2,
            Kind::Create => 4,
            _ => 0,
        };
        if bit != 0 && seen.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            return Answer::new(
                200,
                "<?xml version=\"1.0\"?><Error><Code>InternalError</Code></Error>",
            );
        }
        serve()
    });
    live_with(&place);
    assert_eq!(failures.load(Ordering::Relaxed), 7);

    place.s3().behave(|asked, serve| match asked.kind {
        Kind::List => Answer::new(200, "<Error><Code>InternalError</Code></Error>"),
        _ => serve(),
    });
    let said = error(
        &Host::new(&place)
            .run(&["list", "--json", "--timeout", "1s"])
            .expect(75),
    );
    assert!(said.contains("200 InternalError"), "{said}");
}

/// What is wrong with each page of a listing, which has one key and the token of the first page, and what is said of it.
type Wrong = (fn(&str, &str) -> String, &'static str);

const TOKEN: &str = "<NextContinuationToken>";

/// What is before the token.
fn head(page: &str) -> &str {
    page.split(TOKEN).next().unwrap_or_default()
}

const LISTINGS: [Wrong; 9] = [
    (
        |page, first| {
            format!(
                "{}{TOKEN}{first}</NextContinuationToken></ListBucketResult>",
                head(page)
            )
        },
        "a continuation token twice",
    ),
    (
        |page, _| {
            format!(
                "{}<NextMarker>x</NextMarker></ListBucketResult>",
                head(page)
            )
        },
        "it breaks off",
    ),
    (
        |page, _| format!("{}</ListBucketResult>", head(page)),
        "it breaks off",
    ),
    (
        |page, _| page.replacen("the-instance/", "another/", 1),
        "of another prefix",
    ),
    (
        |page, _| page.replace("<Key>some/", "<Key>another/"),
        "a key of another prefix",
    ),
    (
        |page, _| page.replace(BUCKET, "another-bucket"),
        "of another bucket",
    ),
    (
        |page, _| {
            let end = "</Contents>";
            let object = page.find("<Contents>").zip(page.find(end));
            let object = object.map_or("", |(begin, stop)| &page[begin..stop + end.len()]);
            page.replace(
                "</ListBucketResult>",
                &format!("{object}</ListBucketResult>"),
            )
        },
        "a key twice",
    ),
    (
        |page, _| page.replace("<KeyCount>1", "<KeyCount>3"),
        "fewer keys than it counts",
    ),
    (
        |page, _| page[..page.len() / 2].to_owned(),
        "not of the form",
    ),
];

/// Lists, prunes and verifies, all of which say this of the listing, and changes nothing.
fn assert_refused(place: &Place, want: &str) {
    let objects = place.objects();
    for arguments in [&["list"][..], &["prune"], &["verify", "all"]] {
        let host = Host::new(place).with("RUNTIME_RETENTION", "last=1");
        let arguments = [arguments, &["--json", "--timeout", "2s"]].concat();
        let said = error(&host.run(&arguments).expect(75));
        assert!(said.contains(want), "{arguments:?}: want {want}: {said}");
    }
    assert!(objects == place.objects(), "{want}");
}

#[test]
fn a_listing_that_repeats_or_breaks_off_hides_nothing_and_removes_nothing() {
    let history = History::make();
    for (change, want) in LISTINGS {
        let place = Place::memory();
        history.copy_to(&place);
        place.s3().set_page(1);
        let mut first = None;
        place.s3().behave(move |asked, serve| {
            let mut answer = serve();
            if asked.kind == Kind::List {
                let page = answer.text();
                let token = page
                    .split(TOKEN)
                    .nth(1)
                    .and_then(|rest| rest.split('<').next());
                let first = first.get_or_insert_with(|| token.unwrap_or_default().to_owned());
                answer.body = change(&page, first).into_bytes();
            }
            answer
        });
        assert_refused(&place, want);
    }
}

#[test]
fn a_service_that_gives_the_first_page_for_ever_is_found_out() {
    let history = History::make();
    let place = Place::memory();
    history.copy_to(&place);
    place.s3().set_page(2);
    let (mut first, mut number) = (None, 0);
    place.s3().behave(move |asked, serve| {
        let answer = serve();
        if asked.kind != Kind::List {
            return answer;
        }
        number += 1;
        let page: &mut Answer = first.get_or_insert(answer);
        let (head, token) = (head(&page.text()).to_owned(), number);
        page.body =
            format!("{head}{TOKEN}{token}</NextContinuationToken></ListBucketResult>").into_bytes();
        page.clone()
    });
    assert_refused(&place, "a page begins before the end of the last one");
}

/// Leaves a key out of every listing.
fn hide(place: &Place, hidden: &[String]) {
    let hidden = hidden.to_vec();
    place.s3().behave(move |asked, serve| {
        let mut answer = serve();
        if asked.kind == Kind::List {
            let text = answer.text();
            let mut objects = text.split("<Contents>");
            let mut shown = objects.next().unwrap_or_default().to_owned();
            for object in objects {
                if hidden.iter().any(|id| object.contains(id)) {
                    shown.push_str(
                        object
                            .split_once("</Contents>")
                            .map_or("", |(_, rest)| rest),
                    );
                } else {
                    shown.push_str("<Contents>");
                    shown.push_str(object);
                }
            }
            let at = shown.find("<KeyCount>").expect("it counts");
            let end = shown.find("</KeyCount>").expect("it counts");
            shown.replace_range(at..end + 11, "");
            answer.body = shown.into_bytes();
        }
        answer
    });
}

#[test]
fn snapshots_that_a_listing_leaves_out_keep_their_layers_and_are_shown() {
    let history = History::make();
    let ids_of = |numbers: &[usize]| -> Vec<String> {
        numbers
            .iter()
            .map(|number| history.ids[*number].clone())
            .collect()
    };
    // One in the middle, a row of them, the head, all but the head.
    for numbers in [&[1][..], &[1, 2], &[3], &[0, 1, 2]] {
        let place = Place::memory();
        history.copy_to(&place);
        hide(&place, &ids_of(numbers));
        let host = Host::new(&place).with("RUNTIME_RETENTION", "last=1");
        let objects = place.objects();
        for arguments in [&["prune", "--json"][..], &["prune", "--dry-run", "--json"]] {
            let said = error(&host.run(arguments).expect(75));
            assert!(said.contains("leaves out snapshots/"), "{said}");
        }
        assert!(
            objects == place.objects(),
            "{numbers:?}: nothing is removed"
        );

        let outcome = host.run(&["list", "--json"]).expect(0);
        let mut shown = ids(&outcome.json());
        shown.reverse();
        assert_eq!(shown, history.ids, "{numbers:?}");
        let message = "the listing of the store leaves out snapshots that are there";
        assert_eq!(outcome.logged(message).len(), 1, "{}", outcome.stderr);
        let checked = host.json(&["verify", "all"]);
        assert_eq!(checked["snapshots"].as_array().map(Vec::len), Some(4));

        place.s3().behave_well();
        let _ = host.run(&["prune"]).expect(0);
    }
}

#[test]
fn parents_that_were_pruned_do_not_stop_the_next_prune() {
    let history = History::make();
    let place = Place::memory();
    history.copy_to(&place);
    let host = Host::new(&place).with("RUNTIME_RETENTION", "last=2");
    assert_eq!(host.json(&["prune"])["kept"], 2);
    let outcome = host.run(&["list", "--json"]).expect(0);
    assert_eq!(ids(&outcome.json()).len(), 2);
    assert_eq!(outcome.stderr, "", "nothing to warn of");
    assert_eq!(host.json(&["prune"])["kept"], 2);
}

#[test]
fn a_range_that_is_called_a_success_is_taken_and_another_range_is_not() {
    let place = Place::memory();
    place.s3().behave(|_, serve| {
        let mut answer = serve();
        if answer.status == 206 {
            answer.status = 200;
        }
        answer
    });
    live_with(&place);

    for (range, status) in [("bytes 3-7/9999999", 206), ("bytes 3-7/*", 200)] {
        let place = Place::memory();
        let host = with_file(&place);
        host.backup();
        place.s3().behave(move |_, serve| {
            let mut answer = serve();
            if answer.status == 206 {
                answer.status = status;
                answer = answer.without("Content-Range").with("Content-Range", range);
            }
            answer
        });
        host.lose_everything();
        let said = error(
            &host
                .run(&["restore", "--json", "--timeout", "2s"])
                .expect(75),
        );
        assert!(said.contains("not the range that was asked for"), "{said}");
    }
}

#[test]
fn a_service_that_ignores_ranges_is_found_out_before_anything_is_kept_there() {
    let whole = |asked: &e2e::s3::Asked<'_>, serve: &mut dyn FnMut() -> Answer| {
        let mut answer = serve();
        if asked.incoming.header("range").is_some() && answer.status == 206 {
            answer = Answer::new(200, tree::noise(3, 9 << 20)).with("ETag", "\"x\"");
            // Small objects are given as they are.
            answer.body.truncate(if asked.key.contains("probe-") {
                30
            } else {
                9 << 20
            });
        }
        answer
    };
    for allowed in [false, true] {
        let place = Place::memory();
        place.s3().behave(whole);
        let mut host = with_file(&place).booted('a');
        if allowed {
            host.set("RUNTIME_STORE_UNFENCED", "allow");
        }
        for verb in ["backup", "restore"] {
            let said = error(&host.run(&[verb, "--json"]).expect(64));
            assert!(said.contains("asked for a range"), "{said}");
        }
        assert!(place.objects().is_empty(), "{:?}", place.keys(""));
    }
    let place = Place::memory();
    let host = with_file(&place);
    host.backup();
    place.s3().behave(whole);
    host.lose_everything();
    let said = error(&host.run(&["restore", "--json"]).expect(75));
    assert!(said.contains("use one that serves ranges"), "{said}");
}

#[test]
fn a_store_that_refuses_a_right_tag_is_found_out_and_nobody_is_called_fenced() {
    for allowed in [false, true] {
        let place = Place::memory();
        place
            .s3()
            .behave(|asked, serve| match asked.incoming.header("if-match") {
                Some(_) => Answer::refusal(412, "PreconditionFailed"),
                None => serve(),
            });
        let mut host = with_file(&place).booted('a');
        if allowed {
            host.set("RUNTIME_STORE_UNFENCED", "allow");
        }
        for verb in ["backup", "restore"] {
            let said = error(&host.run(&[verb, "--json"]).expect(64));
            assert!(said.contains("an If-Match that matches"), "{said}");
        }
        assert!(place.objects().is_empty());
    }
}

#[test]
fn tags_may_come_in_any_form() {
    let forms: [fn(Kind, &str) -> String; 4] = [
        // A proxy that compresses makes the tags of answers weak.
        |_, tag| format!("W/{tag}"),
        |_, tag| tag.trim_matches('"').to_owned(),
        |kind, tag| {
            if kind == Kind::Get {
                format!("W/{tag}")
            } else {
                tag.to_owned()
            }
        },
        |kind, tag| {
            if kind == Kind::Put {
                tag.to_ascii_uppercase()
            } else {
                tag.to_owned()
            }
        },
    ];
    for form in forms {
        let place = Place::memory();
        place.s3().behave(move |asked, serve| {
            let answer = serve();
            let tag = answer.header("etag").map(|tag| form(asked.kind, tag));
            match tag {
                Some(tag) if asked.kind != Kind::Part => answer.without("etag").with("ETag", tag),
                _ => answer,
            }
        });
        live_with(&place);
    }
}

#[test]
fn a_service_that_takes_its_tag_back_only_as_it_gave_it_gets_it_so() {
    let place = Place::memory();
    place.s3().behave(|asked, serve| {
        let is_quoted = |tag: &str| tag.starts_with('"');
        match asked.incoming.header("if-match") {
            // The probe's own, which matches nothing in any form.
            Some(tag) if tag.contains("0000000000") => Answer::refusal(412, "PreconditionFailed"),
            Some(tag) if is_quoted(tag) => Answer::refusal(412, "PreconditionFailed"),
            Some(_) => {
                // The server itself knows the quoted form only, so what it would do is said here.
                Answer::new(200, "").with("ETag", "11111111111111111111111111111111")
            }
            None => {
                let answer = serve();
                let tag = answer
                    .header("etag")
                    .map(|tag| tag.trim_matches('"').to_owned());
                tag.map_or(answer.clone(), |tag| {
                    answer.without("etag").with("ETag", tag)
                })
            }
        }
    });
    let host = with_file(&place);
    host.backup();
}

/// Credentials without the right to some kinds of requests.
fn forbid(place: &Place, kinds: &'static [Kind]) {
    place.s3().behave(|asked, serve| {
        if kinds.contains(&asked.kind) {
            return Answer::refusal(403, "AccessDenied");
        }
        let answer = serve();
        // As AWS answers whoever may not list.
        if answer.status == 404 && kinds.contains(&Kind::List) {
            return Answer::refusal(403, "AccessDenied");
        }
        answer
    });
}

#[test]
fn credentials_that_may_not_delete_back_up_boot_and_restore() {
    const WARNING: &str = "probe left on the store: it cannot be deleted";
    let place = Place::memory();
    forbid(&place, &[Kind::Delete, Kind::Abort]);
    let host = with_file(&place);
    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(outcome.logged(WARNING).len(), 1, "{}", outcome.stderr);
    tree::write(&host.root, "file", "other");
    let outcome = host.run(&["backup", "--json"]).expect(0);
    assert_eq!(outcome.stderr, "", "it is said once");
    let other = Host::new(&place).booted('b');
    let outcome = other.run(&["restore", "--json"]).expect(0);
    assert_eq!(outcome.logged(WARNING).len(), 1, "{}", outcome.stderr);
    assert_same(&describe(&host.root), &describe(&other.root));

    let history = History::make();
    let place = Place::memory();
    history.copy_to(&place);
    forbid(&place, &[Kind::Delete, Kind::Abort]);
    let host = Host::new(&place).with("RUNTIME_RETENTION", "last=1");
    let said = error(&host.run(&["prune", "--json"]).expect(75));
    assert!(said.contains("s3:DeleteObject"), "{said}");
    for id in &history.ids {
        let target = Host::new(&place);
        let _ = target.run(&["restore", id]).expect(0);
        assert_same(&history.trees[id], &describe(&target.root));
    }
}

#[test]
fn what_credentials_may_not_do_is_said_by_the_right_that_is_missing() {
    for (kinds, verb, want) in [
        (&[Kind::List][..], "list", "s3:ListBucket"),
        (&[Kind::List], "prune", "s3:ListBucket"),
        (&[Kind::Get], "list", "s3:GetObject"),
        (&[Kind::Put], "backup", "s3:PutObject"),
    ] {
        let place = Place::memory();
        with_file(&place).backup();
        forbid(&place, kinds);
        let host = with_file(&place);
        let said = error(&host.run(&[verb, "--json"]).expect(75));
        assert!(
            said.contains(want) && said.contains("AccessDenied"),
            "{verb}: {said}"
        );
    }
    let place = Place::memory();
    forbid(&place, &[Kind::List]);
    let host = with_file(&place).booted('a');
    let said = error(&host.run(&["restore", "--json"]).expect(75));
    assert!(said.contains("s3:ListBucket"), "{said}");
}

#[test]
fn a_write_that_nobody_confirms_with_a_tag_is_no_write() {
    let place = Place::memory();
    let host = with_file(&place);
    host.backup();
    // A portal between this machine and the service that says yes to everything.
    place.s3().behave(|asked, serve| match asked.kind {
        Kind::Put => Answer::new(200, ""),
        _ => serve(),
    });
    tree::write(&host.root, "file", "other");
    let objects = place.objects();
    let arguments = ["backup", "--json", "--timeout", "5s"];
    let said = error(&host.run(&arguments).expect(75));
    assert!(said.contains("it has no ETag"), "{said}");
    assert!(objects == place.objects());
    place.s3().behave_well();
    host.backup();
}

#[test]
fn an_http_address_of_a_port_that_speaks_something_else_is_said() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let address = listener.local_addr().expect("it is bound");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A TLS alert, as a server of https answers plain text.
            drop((&stream).read(&mut [0; 64]));
            drop((&stream).write_all(&[0x15, 3, 3, 0, 2, 2, 10]));
        }
    });
    let place = Place::memory();
    let host = Host::new(&place).with("RUNTIME_S3_ENDPOINT", format!("http://{address}"));
    let said = error(&host.run(&["list", "--json", "--timeout", "2s"]).expect(75));
    assert!(said.contains("does not answer in HTTP"), "{said}");
    let endpoint = format!("https://{}", place.s3().address);
    let host = Host::new(&place).with("RUNTIME_S3_ENDPOINT", endpoint);
    let said = error(&host.run(&["list", "--json", "--timeout", "2s"]).expect(75));
    assert!(said.contains("when TLS begins"), "{said}");
}

/// A host that reaches its store at this address.
fn at(place: &Place, endpoint: String) -> Host {
    Host::new(place).with("RUNTIME_S3_ENDPOINT", endpoint)
}

#[test]
fn a_private_authority_is_trusted_when_it_is_named() {
    let place = Place::memory();
    let front = Front::tls("good", place.s3().address.port());
    let endpoint = format!("https://localhost:{}", front.port);
    let authority = certificate("authority").display().to_string();
    let said = error(
        &at(&place, endpoint.clone())
            .run(&["list", "--json"])
            .expect(75),
    );
    assert!(said.contains("in RUNTIME_CA_FILE"), "{said}");
    for name in ["RUNTIME_CA_FILE", "SSL_CERT_FILE", "AWS_CA_BUNDLE"] {
        let host = at(&place, endpoint.clone()).with(name, &authority);
        let _ = host.run(&["list"]).expect(0);
    }
    let booted = at(&place, endpoint.clone())
        .booted('a')
        .with("SSL_CERT_FILE", &authority);
    let _ = booted.run(&["restore"]).expect(10);
    let old = Front::old_tls("good", place.s3().address.port());
    let host = at(&place, format!("https://localhost:{}", old.port));
    let _ = host
        .with("RUNTIME_CA_FILE", &authority)
        .run(&["list"])
        .expect(0);
    // The runtime's own setting wins.
    let place = Place::memory();
    let front = Front::tls("good", place.s3().address.port());
    let host = at(&place, format!("https://localhost:{}", front.port))
        .with("SSL_CERT_FILE", "/nowhere")
        .with("RUNTIME_CA_FILE", authority);
    tree::write(&host.root, "noise", tree::noise(1, 9 << 20));
    host.backup();
    place.s3().assert_no_complaints();
}

#[test]
fn a_file_without_authorities_is_refused_by_its_setting() {
    let place = Place::memory();
    let host = with_file(&place);
    let folder = host.folder.path();
    tree::write(folder, "empty.pem", "");
    tree::write(folder, "text.pem", "no certificate");
    let paths = ["empty.pem", "text.pem", "nowhere.pem", ""];
    for (endpoint, names) in [
        (
            "https://localhost:1",
            &["RUNTIME_CA_FILE", "SSL_CERT_FILE"][..],
        ),
        ("http://localhost:1", &["RUNTIME_CA_FILE"]),
    ] {
        for (name, path) in names.iter().flat_map(|name| paths.map(|path| (name, path))) {
            let path = folder.join(path).display().to_string();
            let host = at(&place, endpoint.to_owned()).with(name, path);
            let said = error(&host.run(&["list", "--json"]).expect(64));
            assert!(said.contains(&format!("cannot use {name}: ")), "{said}");
        }
    }
    // It is another program's where there is no TLS.
    let host = Host::new(&place).with("SSL_CERT_FILE", "/nowhere");
    let _ = host.run(&["list"]).expect(0);
    let directory = Place::directory();
    let host = Host::new(&directory).with("RUNTIME_CA_FILE", "/nowhere");
    let _ = host.run(&["list"]).expect(64);
}

#[test]
fn what_is_wrong_with_a_certificate_is_said_with_what_helps() {
    let place = Place::memory();
    for (name, problem, remedy) in [
        (
            "good",
            "authority that is not known here",
            "RUNTIME_CA_FILE",
        ),
        ("expired", "has expired", "clock"),
        ("not-yet", "not valid yet", "clock"),
        ("other-name", "for another name", "RUNTIME_S3_ENDPOINT"),
        (
            "self-signed",
            "certificate of an authority as its own",
            "CA:FALSE",
        ),
    ] {
        let front = Front::tls(name, place.s3().address.port());
        let mut host = at(&place, format!("https://localhost:{}", front.port));
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
        let outcome = host.run(&["list", "--json"]).expect(75);
        let said = error(&outcome);
        assert!(
            said.contains(problem) && said.contains(remedy),
            "{name}: {said}"
        );
    }
}

#[test]
fn a_proxy_leads_to_the_store_and_its_password_is_never_shown() {
    let place = Place::memory();
    let port = place.s3().address.port();
    let tls = Front::tls("good", port);
    let authority = certificate("authority").display().to_string();
    // The name is for the proxy to find.
    for (endpoint, upstream, asked) in [
        ("https://store.test", tls.port, "CONNECT store.test:443"),
        (
            "https://store.test:8443",
            tls.port,
            "CONNECT store.test:8443",
        ),
    ] {
        for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"] {
            let mut proxy = Front::proxy(upstream, Some("Basic bWU6cEBzcw=="));
            let host = at(&place, endpoint.to_owned())
                .with("RUNTIME_CA_FILE", &authority)
                .with("RUNTIME_LOG", "debug")
                .with(name, format!("http://me:p%40ss@localhost:{}", proxy.port));
            // The store signs for the host that it is asked by.
            let outcome = host.run(&["list", "--json"]).expect(0);
            assert_eq!(proxy.asked(), asked);
            assert!(!format!("{outcome:?}").contains("p%40ss"), "{outcome:?}");

            let host = host.with(name, format!("http://me:wr0ng@localhost:{}", proxy.port));
            let outcome = host.run(&["list", "--json", "--timeout", "2s"]).expect(75);
            let said = error(&outcome);
            assert!(
                said.contains(&format!("({name}): it wants a user and a password")),
                "{said}"
            );
            assert!(!format!("{outcome:?}").contains("wr0ng"), "{outcome:?}");
        }
    }
    let mut proxy = Front::proxy(port, Some("Basic bWU6cEBzcw=="));
    let address = format!("http://me:p%40ss@localhost:{}", proxy.port);
    let host = at(&place, "http://store.test".to_owned()).with("http_proxy", &address);
    tree::write(&host.root, "file", "content");
    let outcome = host.run(&["backup"]);
    place.s3().assert_no_complaints();
    let _ = outcome.expect(0);
    let asked = proxy.asked();
    let whole = format!("http://store.test/{BUCKET}/some/prefix/the-instance/");
    assert!(asked.contains(&whole), "{asked}");
    place.s3().assert_no_complaints();
}

#[test]
fn a_proxy_that_cannot_be_used_is_refused_by_its_setting_and_an_exempt_host_needs_none() {
    let place = Place::memory();
    for (name, value) in [
        ("HTTP_PROXY", "socks5://localhost:1"),
        ("http_proxy", "https://localhost:1"),
        ("ALL_PROXY", "socks5h://me:secret@localhost:1"),
        ("HTTP_PROXY", "http://"),
    ] {
        let host = Host::new(&place).with(name, value);
        let said = error(&host.run(&["list", "--json"]).expect(64));
        assert!(said.contains(&format!("cannot use {name}: ")), "{said}");
        assert!(
            said.contains("NO_PROXY") && !said.contains("secret"),
            "{said}"
        );
        for exempt in [
            "*",
            "127.0.0.1",
            "127.0.0.0/8",
            &place.s3().address.to_string(),
        ] {
            let host = Host::new(&place).with(name, value).with("NO_PROXY", exempt);
            let _ = host.run(&["list"]).expect(0);
        }
    }
    // One for https is not asked for http.
    let host = Host::new(&place).with("HTTPS_PROXY", "http://localhost:1");
    let _ = host.run(&["list"]).expect(0);
    let host = Host::new(&place).with("HTTP_PROXY", "http://localhost:1");
    let said = error(&host.run(&["list", "--json", "--timeout", "2s"]).expect(75));
    assert!(
        said.contains("the proxy localhost:1 (HTTP_PROXY)"),
        "{said}"
    );
}

/// Without the look at each family alone, only the released program fails here: its C library is musl's.
#[test]
fn a_name_is_found_where_the_question_for_the_other_family_fails() {
    if !tree::is_root() {
        eprintln!("skipped: it takes root to have a network of one's own");
        return;
    }
    let place = Place::memory();
    let script = repository()
        .join("tests/support/names.py")
        .display()
        .to_string();
    for family in ["4", "6"] {
        for failure in [
            "noerror", "nxdomain", "servfail", "refused", "notimp", "silent",
        ] {
            let host = at(&place, "http://store.test:9000".to_owned());
            let arguments = ["--net", "--mount", "python3", &script, family, failure];
            let mut command = behind("unshare", &arguments, &host, &["list", "--json"]);
            let outcome = Running::start(&mut command).wait();
            assert_eq!(outcome.code, Some(0), "{family} {failure}: {outcome:?}");
        }
    }
}

/// The agent with another program around it.
fn behind(program: &str, arguments: &[&str], host: &Host, verb: &[&str]) -> Command {
    let mut outer = Command::new(program);
    outer.args(arguments);
    around(outer, &host.command(verb))
}

/// A run in which a system call on some folders of a store fails.
fn with_fault(call: &str, errno: &str, paths: &[PathBuf], host: &Host, verb: &str) -> Outcome {
    let trace = format!("trace={call}");
    let inject = format!("inject={call}:error={errno}");
    let mut arguments = vec!["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject];
    let paths: Vec<String> = paths
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    for path in &paths {
        arguments.extend(["-P", path]);
    }
    let mut command = behind("strace", &arguments, host, &[verb, "--json"]);
    Running::start(&mut command).wait()
}

#[test]
fn a_folder_that_cannot_be_synced_keeps_snapshots() {
    for errno in ["EINVAL", "EBADF", "EOPNOTSUPP", "ENOSYS", "EIO"] {
        let place = Place::directory();
        let host = with_file(&place);
        host.backup();
        let Place::Directory(folder) = &place else {
            continue;
        };
        let base = folder.path().join("store").join(INSTANCE);
        let folders = [base.clone(), base.join("layers"), base.join("snapshots")];
        tree::write(&host.root, "file", "other");
        let before = describe(&host.root);
        let outcome = with_fault("fsync", errno, &folders, &host, "backup");
        // An error of the disk is one.
        let want = if errno == "EIO" { 75 } else { 0 };
        let _ = outcome.expect(want);
        if want == 0 {
            host.lose_everything();
            let _ = host.run(&["restore"]).expect(0);
            assert_same(&before, &describe(&host.root));
        }
    }
}

#[test]
fn a_folder_without_locks_is_used_on_the_operators_word_only() {
    for errno in ["ENOLCK", "EOPNOTSUPP", "ENOSYS"] {
        let place = Place::directory();
        let mut host = with_file(&place);
        let Place::Directory(folder) = &place else {
            continue;
        };
        let lock = [folder.path().join("store").join(INSTANCE).join(".lock")];
        for booted in [false, true] {
            if booted {
                host.set("RUNTIME_BOOT_ID", boot_id('a'));
            }
            for verb in ["backup", "restore"] {
                if verb == "restore" && !booted {
                    continue;
                }
                let said = error(&with_fault("flock", errno, &lock, &host, verb).expect(64));
                assert!(
                    said.contains("has no locks") && said.contains("RUNTIME_STORE_UNFENCED=allow"),
                    "{said}"
                );
            }
        }
        host.unset("RUNTIME_BOOT_ID");
        host.set("RUNTIME_STORE_UNFENCED", "allow");
        let _ = with_fault("flock", errno, &lock, &host, "backup").expect(0);
        let before = describe(&host.root);
        host.lose_everything();
        let _ = host.run(&["restore"]).expect(0);
        assert_same(&before, &describe(&host.root));
    }
}

#[test]
fn a_folder_that_is_read_only_gives_and_takes_nothing() {
    let place = Place::directory();
    let Place::Directory(folder) = &place else {
        return;
    };
    let Some(disk) = tmpfs(&folder.path().join("store"), "size=8m") else {
        return;
    };
    let host = with_file(&place);
    host.backup();
    let before = describe(&host.root);
    disk.remount("ro");
    tree::write(&host.root, "file", "other");
    let said = error(&host.run(&["backup", "--json"]).expect(75));
    assert!(said.contains("mounted read-only"), "{said}");
    let other = Host::new(&place);
    for verb in ["list", "restore", "verify"] {
        let _ = other.run(&[verb]).expect(0);
    }
    assert_same(&before, &describe(&other.root));
}

#[test]
fn a_folder_that_cannot_replace_files_is_named() {
    let place = Place::directory();
    let host = with_file(&place);
    host.backup();
    tree::write(&host.root, "file", "other");
    let outcome = with_fault("/^rename", "EEXIST", &[], &host, "backup").expect(75);
    assert!(
        error(&outcome).contains("cannot replace a file by rename"),
        "{}",
        error(&outcome)
    );
    let _ = host.run(&["backup"]).expect(0);
}

/// A listing that is right, and records that cannot be had: neither is the store empty, nor are their layers of no use.
#[test]
fn records_that_are_listed_and_answered_as_absent_are_an_error_for_every_verb() {
    for is_every in [true, false] {
        let place = Place::memory();
        let host = with_file(&place);
        let first = host.backup();
        tree::write(&host.root, "since", tree::noise(1, 5000));
        host.backup();
        place.remove("head.json");
        let layers = place.keys("layers/");
        place.s3().behave(move |asked, serve| {
            let is_hidden =
                asked.key.contains("snapshots/") && (is_every || asked.key.contains(&first));
            if asked.kind == Kind::Get && is_hidden {
                Answer::refusal(404, "NoSuchKey")
            } else {
                serve()
            }
        });
        for verb in ["list", "prune"] {
            let outcome = host.run(&[verb, "--json"]);
            assert_eq!(outcome.code, Some(75), "{verb}: {outcome:?}");
        }
        if is_every {
            let other = Host::new(&place).booted('c');
            assert_eq!(other.run(&["restore", "--json"]).code, Some(75));
        }
        assert_eq!(place.keys("layers/"), layers);
    }
}

#[test]
fn a_store_whose_records_are_all_gone_keeps_its_layers() {
    let place = Place::directory();
    let host = with_file(&place);
    let snapshot = host.backup();
    let month = std::time::Duration::from_hours(24 * 30);
    e2e::past::set_back(&place, &[(snapshot, month)]);
    // The head that it is remembered with is gone.
    host.lose_everything();
    for key in place.keys("snapshots/") {
        place.remove(&key);
    }
    place.remove("head.json");
    let kept = place.keys("layers/");
    let outcome = host.run(&["prune"]).expect(0);
    assert_eq!(place.keys("layers/"), kept, "{outcome:?}");
}

/// A record that is a link into another folder is there; one that leads nowhere is no absence.
#[test]
fn a_record_that_is_a_link_is_listed_and_its_layers_stay() {
    let place = Place::directory();
    let host = with_file(&place);
    host.backup();
    tree::write(&host.root, "since", "since");
    let newest = host.backup();
    // Nothing else names it.
    place.remove("head.json");
    let Place::Directory(folder) = &place else {
        unreachable!("it was made as one");
    };
    let records = folder.path().join("store").join(INSTANCE).join("snapshots");
    let record = records.join(format!("{newest}.json"));
    let elsewhere = folder.path().join("elsewhere");
    std::fs::rename(&record, &elsewhere).expect("it can be moved");
    std::os::unix::fs::symlink(&elsewhere, &record).expect("it can be made");
    let listed = host.json(&["list"]);
    assert_eq!(listed["snapshots"].as_array().map(Vec::len), Some(2));
    std::fs::remove_file(&elsewhere).expect("it is there");
    let layers = place.keys("layers/");
    let refused = host.run(&["prune", "--json"]);
    assert_eq!(refused.code, Some(75), "{refused:?}");
    assert_eq!(place.keys("layers/"), layers);
}

#[test]
fn what_is_no_file_in_a_directory_store_is_said_at_once() {
    let place = Place::directory();
    let host = with_file(&place);
    host.backup();
    let Place::Directory(folder) = &place else {
        unreachable!("it was made as one");
    };
    let head = folder.path().join("store").join(INSTANCE).join("head.json");
    std::fs::remove_file(&head).expect("it is there");
    let made = Command::new("mkfifo").arg(&head).status();
    assert!(made.is_ok_and(|status| status.success()));
    for verb in ["list", "backup", "prune"] {
        let arguments: &[&str] = if verb == "backup" {
            &[verb, "--confirm"]
        } else {
            &[verb]
        };
        let outcome = host.run(arguments);
        assert_eq!(outcome.code, Some(75), "{outcome:?}");
        assert!(
            outcome.sentence().contains("it is not a file"),
            "{outcome:?}"
        );
    }
}
