//! Listings of a bucket, page by page. A listing that repeats, breaks off or is of something else is an error: what it
//! leaves out would pass for what is not there.

use std::collections::HashSet;

use jiff::Timestamp;
use percent_encoding::percent_decode_str;

use super::{
    refusal::failure,
    remote::{Ask, Remote, WRONG_FORM, plain_tag},
    xml::{self, Element},
};
use crate::{
    snapshot::id,
    store::{Object, StoreError, http::Response},
};

/// An object, and when the service says it was last written.
pub type Listed = (Object, Option<Timestamp>);

const BREAKS_OFF: &str = "it breaks off: it is not the end, and names no continuation as version 2 of the listing has it";

/// Keys on a page where the service does not say how many it gives at most.
const PAGE: usize = 1000;

/// A page of a listing, and where the next one begins.
#[derive(Debug)]
struct Page {
    objects: Vec<Listed>,
    next: Option<String>,
}

/// Every object whose key begins so, with its whole key.
pub async fn list(remote: &Remote, prefix: &str) -> Result<Vec<Listed>, StoreError> {
    let mut objects: Vec<Listed> = Vec::new();
    let mut keys: HashSet<String> = HashSet::new();
    let mut tokens: Vec<String> = Vec::new();
    loop {
        let page = fetch(remote, prefix, tokens.last().map(String::as_str)).await?;
        if let (Some((last, _)), Some((first, _))) = (objects.last(), page.objects.first())
            && first.key <= last.key
        {
            return Err(StoreError::Listing(
                "a page begins before the end of the last one",
            ));
        }
        for (object, modified) in page.objects {
            if !keys.insert(object.key.clone()) {
                return Err(StoreError::Listing("it names a key twice"));
            }
            objects.push((object, modified));
        }
        match page.next {
            None => return Ok(objects),
            Some(token) if tokens.contains(&token) => {
                return Err(StoreError::Listing("it gives a continuation token twice"));
            }
            Some(token) => tokens.push(token),
        }
    }
}

async fn fetch(remote: &Remote, prefix: &str, token: Option<&str>) -> Result<Page, StoreError> {
    let mut query = Vec::from([
        ("encoding-type", "url"),
        ("list-type", "2"),
        ("prefix", prefix),
    ]);
    if let Some(token) = token {
        query.insert(0, ("continuation-token", token));
    }
    let bucket = remote.bucket.name();
    let parse = |answer: &Response| page(&answer.body, bucket, prefix);
    remote.send_and(&Ask::get(None, &query), parse).await
}

/// The root of a listing of this bucket.
pub fn root(body: &[u8], bucket: &str) -> Result<Element, StoreError> {
    let root = xml::parse(body).ok_or(WRONG_FORM)?;
    if root.name != "ListBucketResult" {
        return Err(failure(&root).unwrap_or(WRONG_FORM));
    }
    match root.text("Name") {
        Some(name) if name != bucket => Err(StoreError::Listing("it is of another bucket")),
        _ => Ok(root),
    }
}

fn page(body: &[u8], bucket: &str, prefix: &str) -> Result<Page, StoreError> {
    let root = root(body, bucket)?;
    let is_encoded = root.text("EncodingType") == Some("url");
    if let Some(element) = root.all("Prefix").next()
        && key(element.own_text(), prefix, is_encoded).is_none_or(|found| found != prefix)
    {
        return Err(StoreError::Listing("it is of another prefix"));
    }
    let mut objects = Vec::new();
    for object in root.all("Contents") {
        let text = object.all("Key").next().ok_or(WRONG_FORM)?.own_text();
        let key = key(text, prefix, is_encoded);
        let key = key.ok_or(StoreError::Listing("it names a key of another prefix"))?;
        let size = object.text("Size").and_then(|size| size.parse().ok());
        let modified = object.text("LastModified").and_then(id::time);
        let object = Object {
            key,
            size: size.ok_or(WRONG_FORM)?,
            tag: plain_tag(object.text("ETag").unwrap_or_default()),
        };
        objects.push((object, modified));
    }
    let number = |name| root.text(name).and_then(|text| text.parse::<usize>().ok());
    if number("KeyCount").is_some_and(|count| count > objects.len()) {
        return Err(StoreError::Listing("it has fewer keys than it counts"));
    }
    let token = root.text("NextContinuationToken").map(str::to_owned);
    let is_full = objects.len() >= number("MaxKeys").unwrap_or(PAGE).max(1);
    let next = match root.text("IsTruncated") {
        Some("true") | None if token.is_some() => token,
        Some("false") => None,
        None if !is_full => None,
        _ => return Err(StoreError::Listing(BREAKS_OFF)),
    };
    Ok(Page { objects, next })
}

/// The key that a listing means, below this prefix. Some services encode keys without saying so, some say so and do not,
/// and some write a space as `+`.
fn key(text: &str, prefix: &str, is_encoded: bool) -> Option<String> {
    let decode = |text: &str| Some(percent_decode_str(text).decode_utf8().ok()?.into_owned());
    let mut forms = [
        decode(&text.replace('+', " ")),
        decode(text),
        Some(text.to_owned()),
    ];
    if !is_encoded {
        forms.reverse();
    }
    let mut forms = forms.into_iter().flatten();
    forms.find(|form| form.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "<Name>b</Name><Prefix>p/</Prefix><IsTruncated>false</IsTruncated>";

    fn read(inside: &str) -> Result<Vec<String>, String> {
        let text = format!("<ListBucketResult>{inside}</ListBucketResult>");
        let page = page(text.as_bytes(), "b", "p/").map_err(|error| error.to_string())?;
        let mut keys: Vec<String> = page
            .objects
            .into_iter()
            .map(|(object, _)| object.key)
            .collect();
        keys.extend(page.next.map(|token| format!("then {token}")));
        Ok(keys)
    }

    fn object(key: &str) -> String {
        format!("<Contents><Key>{key}</Key><Size>1</Size></Contents>")
    }

    #[test]
    fn a_page_is_whole_or_an_error() {
        let (one, two) = (object("p/1"), object("p/2"));
        let more = HEAD.replace("false", "true");
        let unsaid = HEAD.replace("<IsTruncated>false</IsTruncated>", "");
        let token = "<NextContinuationToken>t</NextContinuationToken>";
        for (inside, want) in [
            (format!("{HEAD}{one}{two}"), Ok(vec!["p/1", "p/2"])),
            (format!("{HEAD}{token}"), Ok(vec![])),
            (format!("{more}{token}{one}"), Ok(vec!["p/1", "then t"])),
            (format!("{unsaid}{token}{one}"), Ok(vec!["p/1", "then t"])),
            (format!("{unsaid}{one}"), Ok(vec!["p/1"])),
            (one.clone(), Ok(vec!["p/1"])),
            (format!("{more}{one}"), Err("it breaks off")),
            (
                format!("{more}<NextMarker>p/1</NextMarker>{one}"),
                Err("it breaks off"),
            ),
            (
                format!("{more}<NextContinuationToken/>{one}"),
                Err("it breaks off"),
            ),
            (
                format!("{unsaid}<MaxKeys>1</MaxKeys>{one}"),
                Err("it breaks off"),
            ),
            (
                format!("{HEAD}<KeyCount>2</KeyCount>{one}"),
                Err("fewer keys"),
            ),
            (
                format!("{HEAD}{}", object("q/1")),
                Err("a key of another prefix"),
            ),
            (HEAD.replace("p/", "q/"), Err("another prefix")),
            (HEAD.replace("p/", ""), Err("another prefix")),
            (HEAD.replace(">b<", ">c<"), Err("another bucket")),
            (
                format!("{HEAD}<Contents><Key>p/1</Key></Contents>"),
                Err("form"),
            ),
        ] {
            match (read(&inside), want) {
                (Ok(keys), Ok(want)) => assert_eq!(keys, want, "{inside}"),
                (Err(error), Err(want)) => assert!(error.contains(want), "{inside}: {error}"),
                (got, want) => panic!("{inside}: got {got:?}, want {want:?}"),
            }
        }
    }

    #[test]
    fn an_answer_of_another_kind_is_no_listing() {
        let error = |text: &str| {
            page(text.as_bytes(), "b", "p/")
                .expect_err(text)
                .to_string()
        };
        assert!(error("<ListAllMyBucketsResult/>").contains("form"));
        assert!(error("").contains("form"));
        assert!(error("<ListBucketResult><Name>b</Name>").contains("form"));
        assert!(error("<Error><Code>SlowDown</Code></Error>").contains("200 SlowDown"));
    }

    #[test]
    fn keys_are_read_however_a_service_encodes_them() {
        for (text, is_encoded, want) in [
            ("a%20b/%C3%BC%2B", true, Some("a b/ü+")),
            ("a+b/%C3%BC%2B", true, Some("a b/ü+")),
            ("a b/ü+", true, Some("a b/ü ")),
            ("a b/x", false, Some("a b/x")),
            ("a b/%41", false, Some("a b/%41")),
            ("a%20b/x", false, Some("a b/x")),
            ("elsewhere/x", true, None),
        ] {
            assert_eq!(key(text, "a b/", is_encoded).as_deref(), want, "{text}");
        }
        assert_eq!(key("a+b/x", "a+b/", true).as_deref(), Some("a+b/x"));
    }
}
