//! Which path is which route. Paths are taken literally; only in a request id are escapes decoded, once, and what comes out
//! is checked. What a route does is up to `routes`.

use super::envelope::Problem;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    Status,
    Restart,
    Backup,
    Devices,
    /// With the request id.
    Approve(String),
}

impl Route {
    /// How many there are, each with a number below.
    pub(super) const COUNT: usize = 5;

    pub(super) fn number(&self) -> usize {
        match self {
            Self::Status => 0,
            Self::Restart => 1,
            Self::Backup => 2,
            Self::Devices => 3,
            Self::Approve(_) => 4,
        }
    }

    pub(super) fn pattern(&self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::Restart => "/v1/restart",
            Self::Backup => "/v1/backup",
            Self::Devices => "/v1/devices",
            Self::Approve(_) => "/v1/devices/{requestId}/approve",
        }
    }
}

pub(super) fn route(path: &str) -> Result<Route, Problem> {
    match path {
        "/v1/status" => Ok(Route::Status),
        "/v1/restart" => Ok(Route::Restart),
        "/v1/backup" => Ok(Route::Backup),
        "/v1/devices" => Ok(Route::Devices),
        _ if !path.starts_with('/') || !is_well_escaped(path) => {
            Err(Problem::InvalidRequest("the path is malformed"))
        }
        _ => path
            .strip_prefix("/v1/devices/")
            .and_then(|rest| rest.strip_suffix("/approve"))
            .filter(|id| !id.contains('/'))
            .ok_or(Problem::NotFound)
            .and_then(request_id)
            .map(Route::Approve),
    }
}

fn is_well_escaped(path: &str) -> bool {
    path.split('%').skip(1).all(|rest| {
        let digits = rest.as_bytes().get(..2);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    })
}

/// The escapes in `segment`, which are well formed, are decoded: clients may escape the colon.
fn request_id(segment: &str) -> Result<String, Problem> {
    let mut parts = segment.split('%');
    let mut id = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (digits, rest) = part.split_at(2);
        let byte = u8::from_str_radix(digits, 16).unwrap_or_default();
        id.push(char::from(byte));
        id.push_str(rest);
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || "._:-".contains(c);
    if (1..=128).contains(&id.len()) && id.chars().all(fits) {
        Ok(id)
    } else {
        Err(Problem::InvalidRequest(
            "a request id has 1 to 128 letters, digits, dots, underscores, colons and dashes",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_literally() {
        assert_eq!(route("/v1/status"), Ok(Route::Status));
        for path in [
            "/",
            "/v1",
            "/v1/",
            "/v1/status/",
            "/v1//status",
            "/V1/status",
            "/v1/stat%75s",
            "/v2/status",
            "/v1/devices/",
            "/v1/devices/x",
            "/v1/devices/x/",
            "/v1/devices/x/approve/",
            "/v1/devices/x/y/approve",
            "/v1/devices/approve",
        ] {
            assert_eq!(route(path), Err(Problem::NotFound), "{path}");
        }
        for path in [
            "",
            "*",
            "v1/status",
            "/v1/%",
            "/v1/%4",
            "/v1/%zz",
            "/v1/status%",
        ] {
            assert!(
                matches!(route(path), Err(Problem::InvalidRequest(_))),
                "{path}"
            );
        }
    }

    #[test]
    fn request_ids_are_decoded_once_and_checked() {
        let id = |segment: &str| route(&format!("/v1/devices/{segment}/approve"));
        assert_eq!(id("a.B_9:-"), Ok(Route::Approve("a.B_9:-".into())));
        assert_eq!(id("a%3Ab"), Ok(Route::Approve("a:b".into())));
        assert!(id(&"x".repeat(128)).is_ok());
        for segment in [
            "",
            "a%2fb",
            "a%00",
            "a%20b",
            "a%253A",
            "%c3%a9",
            "a b",
            &"x".repeat(129),
        ] {
            assert!(
                matches!(id(segment), Err(Problem::InvalidRequest(_))),
                "{segment}"
            );
        }
    }
}
