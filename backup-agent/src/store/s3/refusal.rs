//! What an unsuccessful answer means. Only S3's own word says that an object is absent; a 404 without a word says nothing.

use std::time::Duration;

use hyper::{
    HeaderMap,
    header::{LOCATION, RETRY_AFTER},
};
use jiff::{Timestamp, fmt::rfc2822::DateTimeParser};
use url::Url;

use super::xml::{self, Element};
use crate::store::{StoreError, http::Response};

/// Where a service says the region of a bucket in answer to a request that has no body.
const REGION: &str = "x-amz-bucket-region";

/// The service's word, such as `SlowDown`; empty when there is none. Its prose may repeat the request, so it is not taken.
pub fn code(answer: &Response) -> String {
    xml::parse(&answer.body).map_or_else(String::new, |root| word(&root, "Code"))
}

/// What an answer of success stands for that has an error as its body.
pub fn failure(root: &Element) -> Option<StoreError> {
    let code = word(root, "Code");
    (root.name == "Error").then_some(StoreError::Status {
        status: 200,
        code,
        retry_after: None,
        hint: None,
    })
}

/// The error of an answer other than success.
pub fn refusal(answer: &Response) -> StoreError {
    let code = code(answer);
    match (answer.status.as_u16(), code.as_str()) {
        (404, "NoSuchKey" | "NoSuchUpload" | "") => StoreError::NotFound,
        (412, _) => StoreError::Conflict,
        (status, _) => StoreError::Status {
            status,
            retry_after: header(&answer.headers, RETRY_AFTER.as_str()).and_then(wish),
            hint: hint(answer, &code),
            code,
        },
    }
}

/// A page for a browser: of a login, a proxy or another server. The type says nothing: some services call all their answers
/// pages.
pub fn is_web_page(answer: &Response) -> bool {
    let text = answer.body.trim_ascii_start();
    let begins = |with: &str| {
        let begin = text.get(..with.len()).unwrap_or_default();
        begin.eq_ignore_ascii_case(with.as_bytes())
    };
    begins("<!doctype html") || begins("<html")
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn is_name(text: &&str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-.:".contains(&byte);
    !text.is_empty() && text.len() <= 64 && text.bytes().all(is_plain)
}

fn word(root: &Element, name: &str) -> String {
    let found = root.find(name).map(|element| element.own_text().trim());
    found.filter(is_name).unwrap_or_default().to_owned()
}

/// What the answer says about the right address.
fn hint(answer: &Response, code: &str) -> Option<String> {
    let root = xml::parse(&answer.body).unwrap_or_default();
    let status = answer.status.as_u16();
    let region = header(&answer.headers, REGION).filter(is_name);
    let region = region.map_or_else(|| word(&root, "Region"), str::to_owned);
    let is_elsewhere = (300..400).contains(&status) || code == "AuthorizationHeaderMalformed";
    if is_elsewhere && !region.is_empty() {
        return Some(format!(
            "the bucket is in the region {region}: set RUNTIME_S3_REGION to it, and RUNTIME_S3_ENDPOINT if that names another"
        ));
    }
    if (300..400).contains(&status) {
        let location =
            header(&answer.headers, LOCATION.as_str()).and_then(|to| Url::parse(to).ok());
        let named = word(&root, "Endpoint");
        let place = match &location {
            Some(url) => format!("{}://{}", url.scheme(), url.host_str().unwrap_or_default()),
            None if !named.is_empty() => named,
            None => return None,
        };
        return Some(format!(
            "it names {place} instead: check RUNTIME_S3_ENDPOINT and RUNTIME_S3_REGION"
        ));
    }
    let is_foreign = code.is_empty() && is_web_page(answer);
    is_foreign.then(|| {
        "the answer is a web page and not of S3: check RUNTIME_S3_ENDPOINT, its http or https, and proxies".to_owned()
    })
}

/// How long a `Retry-After` says to wait: a number of seconds, or until a date (RFC 9110, section 10.2.3). One that has
/// passed is no wish.
fn wish(text: &str) -> Option<Duration> {
    let wait = if let Ok(seconds) = text.parse() {
        Duration::from_secs(seconds)
    } else {
        let until = DateTimeParser::new().parse_timestamp(text).ok()?;
        until.duration_since(Timestamp::now()).try_into().ok()?
    };
    (!wait.is_zero()).then_some(wait)
}

#[cfg(test)]
mod tests {
    use hyper::{StatusCode, header::HeaderValue};

    use super::*;

    fn answer(status: u16, body: &str) -> Response {
        Response {
            status: StatusCode::from_u16(status).expect("a status"),
            headers: HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static("7"))]),
            body: body.as_bytes().to_vec().into(),
        }
    }

    #[test]
    fn answers_become_the_errors_they_stand_for() {
        let busy = refusal(&answer(503, "<Error><Code>SlowDown</Code></Error>"));
        assert_eq!(busy.to_string(), "the service answered 503 SlowDown");
        assert!(
            matches!(busy, StoreError::Status { retry_after: Some(wait), .. } if wait.as_secs() == 7)
        );
        assert!(matches!(refusal(&answer(412, "")), StoreError::Conflict));
        for (code, is_absent) in [
            ("NoSuchKey", true),
            ("NoSuchUpload", true),
            ("NoSuchBucket", false),
            ("NotFound", false),
        ] {
            for body in [
                format!("<Error><Code>{code}</Code></Error>"),
                format!("<s:Error xmlns:s='http://x/'><s:Code>{code}</s:Code></s:Error>"),
                format!("<ErrorResponse><Error><Code> {code}\n</Code></Error></ErrorResponse>"),
            ] {
                let error = refusal(&answer(404, &body));
                assert_eq!(matches!(error, StoreError::NotFound), is_absent, "{body}");
            }
        }
    }

    #[test]
    fn an_answer_that_names_the_right_region_or_address_is_heard() {
        let text = |status, body: &str, header: Option<(&'static str, &'static str)>| {
            let mut answer = answer(status, body);
            if let Some((name, value)) = header {
                answer.headers.insert(name, HeaderValue::from_static(value));
            }
            refusal(&answer).to_string()
        };
        let malformed =
            "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>";
        let moved = "<Error><Code>PermanentRedirect</Code><Endpoint>b.s3.eu-west-3.amazonaws.com</Endpoint></Error>";
        let region = Some((REGION, "eu-west-3"));
        for (got, want) in [
            (text(400, malformed, None), "region eu-west-3"),
            (text(301, "", region), "region eu-west-3"),
            (
                text(301, moved, None),
                "b.s3.eu-west-3.amazonaws.com instead",
            ),
            (
                text(
                    307,
                    "",
                    Some((
                        "location",
                        "https://me:pw@other.example/b/k?X-Amz-Signature=1",
                    )),
                ),
                "https://other.example instead",
            ),
            (text(302, "", None), "check RUNTIME_S3_ENDPOINT"),
            (
                text(400, "<html>", Some(("content-type", "text/html"))),
                "a web page",
            ),
        ] {
            assert!(got.contains(want), "{got}");
            assert!(!got.contains("Signature") && !got.contains("pw"), "{got}");
        }
    }

    #[test]
    fn a_wish_to_wait_is_a_number_or_a_date() {
        assert_eq!(wish("7"), Some(Duration::from_secs(7)));
        assert_eq!(wish("Sun, 06 Nov 1994 08:49:37 GMT"), None);
        assert_eq!(wish("0"), None);
        let soon = Timestamp::now() + Duration::from_mins(1);
        let soon = soon.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        let wait = wish(&soon).expect("it is a date").as_secs();
        assert!((50..=60).contains(&wait), "{wait}");
        assert_eq!(wish("soon"), None);
    }

    #[test]
    fn prose_of_the_service_is_not_repeated() {
        for body in [
            "<Code>a b&amp;c</Code> X-Amz-Signature=abc",
            "<Error><Code>a b&amp;c</Code><Message>X-Amz-Signature=abc</Message></Error>",
        ] {
            assert_eq!(
                refusal(&answer(403, body)).to_string(),
                "the service answered 403; check the S3 credentials, what they may do, and this machine's clock"
            );
        }
    }
}
