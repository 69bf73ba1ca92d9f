//! What the service does with a request that arrived whole: the rules of the protocol, applied to objects in memory.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use md5::{Digest as _, Md5};

use jiff::Timestamp;

use super::wire::{About, Answer, Incoming};
use super::{BUCKET, Inner, Kind, Object, Shared, Upload};
use crate::signature::{self, Signed};
use crate::tree::hex;

/// S3 takes no smaller part but the last.
const SMALLEST_PART: usize = 5 << 20;

/// Checks a request and does what it asks for.
pub fn judge(shared: &Shared, incoming: &Incoming, about: &About) -> Answer {
    let (key, kind) = (about.key.as_str(), about.kind);
    let signed = Signed {
        method: &incoming.method,
        path: &incoming.path,
        query: &incoming.query,
        headers: &incoming.headers,
    };
    let verdict = signature::check(&shared.identity, &signed);
    let mut inner = shared.lock();
    if let Err(reason) = verdict {
        inner.complaints.push(format!("{kind:?} {key}: {reason}"));
        return Answer::refusal(403, "SignatureDoesNotMatch");
    }
    if about.bucket != BUCKET || inner.has_no_bucket {
        return Answer::refusal(404, "NoSuchBucket");
    }
    if !incoming.body.is_empty() && kind != Kind::Complete {
        let sum = BASE64_STANDARD.encode(Md5::digest(&incoming.body));
        if incoming.header("content-md5") != Some(&sum) {
            inner.complaints.push(format!(
                "{kind:?} {key}: its Content-MD5 is missing or wrong"
            ));
            return Answer::refusal(400, "BadDigest");
        }
    }
    match kind {
        Kind::Get | Kind::Head => get(&inner, incoming, key),
        Kind::Put => put(&mut inner, incoming, key),
        Kind::Delete => {
            inner.objects.remove(key);
            Answer::new(204, "")
        }
        Kind::List => list(&inner, incoming),
        Kind::ListUploads => list_uploads(&inner, incoming),
        Kind::Create | Kind::Part | Kind::Complete | Kind::Abort => {
            multipart(&mut inner, incoming, key, kind)
        }
    }
}

pub fn tag(bytes: &[u8]) -> String {
    format!("\"{}\"", hex(&Md5::digest(bytes)))
}

fn get(inner: &Inner, incoming: &Incoming, key: &str) -> Answer {
    let Some(object) = inner.objects.get(key) else {
        return Answer::refusal(404, "NoSuchKey");
    };
    let Some(range) = incoming.header("range") else {
        return Answer::new(200, object.bytes.clone()).with("ETag", &object.tag);
    };
    let bounds = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'));
    let bounds = bounds
        .and_then(|(from, to)| Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?)));
    match bounds {
        Some((from, to)) if from < object.bytes.len() && from <= to => {
            let to = to.min(object.bytes.len() - 1);
            let range = format!("bytes {from}-{to}/{}", object.bytes.len());
            Answer::new(206, &object.bytes[from..=to])
                .with("ETag", &object.tag)
                .with("Content-Range", range)
        }
        _ => Answer::refusal(416, "InvalidRange")
            .with("Content-Range", format!("bytes */{}", object.bytes.len())),
    }
}

fn put(inner: &mut Inner, incoming: &Incoming, key: &str) -> Answer {
    let found = inner.objects.get(key).map(|object| object.tag.clone());
    if !inner.ignores_conditions {
        if incoming.header("if-none-match") == Some("*") && found.is_some() {
            return Answer::refusal(412, "PreconditionFailed");
        }
        if let Some(wanted) = incoming.header("if-match") {
            match found {
                None => return Answer::refusal(404, "NoSuchKey"),
                Some(found) if found != wanted => {
                    return Answer::refusal(412, "PreconditionFailed");
                }
                Some(_) => {}
            }
        }
    }
    let object = Object::new(incoming.body.clone());
    let answer = Answer::new(200, "").with("ETag", &object.tag);
    inner.objects.insert(key.to_owned(), object);
    answer
}

fn list(inner: &Inner, incoming: &Incoming) -> Answer {
    let prefix = incoming.parameter("prefix").unwrap_or_default();
    let after = incoming.parameter("continuation-token").unwrap_or_default();
    let keys: Vec<&String> = inner
        .objects
        .keys()
        .filter(|key| key.starts_with(&prefix) && **key > after)
        .collect();
    let page = &keys[..keys.len().min(inner.page)];
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>");
    xml.push_str("<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">");
    let is_cut = page.len() < keys.len();
    write!(
        xml,
        "<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><MaxKeys>{}</MaxKeys>",
        inner.page
    )
    .expect("a string");
    write!(xml, "<EncodingType>url</EncodingType><KeyCount>{}</KeyCount><IsTruncated>{is_cut}</IsTruncated>", page.len())
        .expect("a string takes everything");
    for key in page {
        let object = &inner.objects[*key];
        write!(
            xml,
            "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>{}</ETag>\
             <Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
            object.tag.replace('"', "&quot;"),
            object.bytes.len()
        )
        .expect("a string takes everything");
    }
    if let (true, Some(last)) = (is_cut, page.last()) {
        write!(xml, "<NextContinuationToken>{last}</NextContinuationToken>")
            .expect("a string takes everything");
    }
    xml.push_str("</ListBucketResult>");
    Answer::new(200, xml)
}

fn list_uploads(inner: &Inner, incoming: &Incoming) -> Answer {
    let prefix = incoming.parameter("prefix").unwrap_or_default();
    let mut xml = format!(
        "<ListMultipartUploadsResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Bucket>{BUCKET}</Bucket>\
         <Prefix>{prefix}</Prefix><IsTruncated>false</IsTruncated>"
    );
    for (id, upload) in &inner.uploads {
        if upload.object.starts_with(&prefix) {
            write!(
                xml,
                "<Upload><Key>{}</Key><UploadId>{id}</UploadId><Initiated>{:.3}</Initiated></Upload>",
                upload.object, upload.begun
            )
            .expect("a string takes everything");
        }
    }
    xml.push_str("</ListMultipartUploadsResult>");
    Answer::new(200, xml)
}

fn multipart(inner: &mut Inner, incoming: &Incoming, key: &str, kind: Kind) -> Answer {
    let id = incoming.parameter("uploadId").unwrap_or_default();
    if kind == Kind::Create {
        inner.next_upload += 1;
        let id = format!("upload-{}", inner.next_upload);
        let upload = Upload {
            object: key.to_owned(),
            begun: Timestamp::now(),
            parts: BTreeMap::new(),
        };
        inner.uploads.insert(id.clone(), upload);
        return Answer::new(
            200,
            format!(
                "<InitiateMultipartUploadResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Bucket>{BUCKET}</Bucket>\
                 <Key>{key}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            ),
        );
    }
    let upload = inner.uploads.get_mut(&id);
    let Some(Upload { parts, .. }) = upload.filter(|upload| upload.object == key) else {
        return Answer::refusal(404, "NoSuchUpload");
    };
    match kind {
        Kind::Part => {
            let number = incoming
                .parameter("partNumber")
                .and_then(|text| text.parse().ok())
                .unwrap_or(0);
            parts.insert(number, incoming.body.clone());
            Answer::new(200, "").with("ETag", tag(&incoming.body))
        }
        Kind::Abort => {
            inner.uploads.remove(&id);
            Answer::new(204, "")
        }
        _ => {
            let text = String::from_utf8_lossy(&incoming.body).replace("&quot;", "\"");
            let sizes: Vec<usize> = parts.values().map(Vec::len).collect();
            let are_equal = sizes.split_last().is_none_or(|(last, rest)| {
                rest.iter()
                    .all(|size| *size == rest[0] && *size >= SMALLEST_PART && last <= size)
            });
            let are_named = parts.values().all(|part| text.contains(&tag(part)));
            let are_in_order = parts
                .keys()
                .copied()
                .eq(1..=u32::try_from(parts.len()).expect("few parts"));
            if !(are_equal && are_named && are_in_order) {
                inner.complaints.push(format!(
                    "Complete {key}: parts of {sizes:?} bytes, named {are_named}"
                ));
                return Answer::refusal(400, "InvalidPart");
            }
            let object = Object::new(parts.values().flatten().copied().collect());
            let answer = format!(
                "<CompleteMultipartUploadResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Key>{key}</Key>\
                 <ETag>{}</ETag></CompleteMultipartUploadResult>",
                object.tag.replace('"', "&quot;")
            );
            inner.objects.insert(key.to_owned(), object);
            inner.uploads.remove(&id);
            Answer::new(200, answer)
        }
    }
}
