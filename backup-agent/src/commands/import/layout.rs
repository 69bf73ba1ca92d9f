//! The other set-up's layout: which folders and files it keeps, and what becomes of each below the home.
//!
//! Keys are somebody else's: a name that could lead out of the home is refused.

use std::{
    collections::HashSet,
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Component, Path, PathBuf},
};

use hyper::body::Bytes;
use serde_json::Value;

use crate::{
    error::Error,
    log,
    store::{Object, Store},
};

/// Folders of the gateway's state, the newer first: the other has the gateway's former name.
const STATE_FOLDERS: [&str; 2] = ["openclaw/", "clawdbot/"];
/// Names of the configuration in them, the newest first.
const CONFIGURATIONS: [&str; 3] = ["openclaw.json", "moltbot.json", "clawdbot.json"];
/// Places of the old host and what they become; the first that fits.
const MOVES: [(&str, &str); 2] = [("/root/.clawdbot", "~/.openclaw"), ("/root", "~")];
/// What `workspace/` is a copy of, below the home.
const OLD_WORKSPACE: &str = "clawd";
/// Says when the old tool last ran, and means nothing to a gateway.
const MARKER: &str = ".last-sync";
/// The gateway's state and the configuration in it, below the home.
const STATE: &str = ".openclaw";
const CONFIGURATION: &str = ".openclaw/openclaw.json";

/// An object and what it becomes.
pub struct Planned {
    pub object: Object,
    /// Below the home.
    pub path: PathBuf,
    /// What is written instead of the object's own bytes.
    pub content: Option<Bytes>,
}

impl Planned {
    /// It stands for a directory, which may be empty.
    pub fn is_directory(&self) -> bool {
        self.object.key.ends_with('/')
    }

    /// Its bytes may be torn: a copy of what was in use.
    pub fn is_database(&self) -> bool {
        self.path
            .extension()
            .is_some_and(|extension| extension == "sqlite")
    }
}

/// Decides what becomes of every object, and where the workspace goes.
pub async fn plan(source: &dyn Store, from: &str) -> Result<(Vec<Planned>, String), Error> {
    let list = async |folder: &str| {
        let listed = source.walk(folder).await;
        listed.map_err(Error::store("list", format!("{from}/{folder}")))
    };
    let (mut folder, mut state, mut configuration) = (STATE_FOLDERS[0], Vec::new(), None);
    for candidate in STATE_FOLDERS {
        let objects = list(candidate).await?;
        let mut keys = CONFIGURATIONS
            .map(|name| format!("{candidate}{name}"))
            .into_iter();
        let found = keys.find(|key| objects.iter().any(|object| object.key == *key));
        if configuration.is_none() && (found.is_some() || state.is_empty()) {
            (folder, state, configuration) = (candidate, objects, found);
        }
    }
    let (workspace, skills) = (list("workspace/").await?, list("skills/").await?);
    if state.is_empty() && workspace.is_empty() && skills.is_empty() {
        return Err(Error::Settings(vec![format!(
            "cannot use --from: {from} has no folder openclaw (or of its former name), workspace or skills; \
             name the bucket, and the prefix if there is one, that holds them"
        )]));
    }

    let mut place = Path::new(STATE).join("workspace");
    let mut content = None;
    if let Some(key) = &configuration {
        let read = source.get(key).await;
        let (text, _) = read.map_err(Error::store("read", format!("{from}/{key}")))?;
        let (text, named) = adapt(text);
        content = Some(Bytes::from(text));
        place = named.unwrap_or(place);
    }
    let mut plan = Vec::new();
    add(&mut plan, state, folder, Path::new(STATE))?;
    let is_own = |file: &Planned| file.path.starts_with(&place) && !file.is_directory();
    if plan.iter().any(is_own) {
        log::warn(
            "the state has the gateway's workspace in it; workspace/ and skills/ go where they were, beside it",
            &[("workspace", format!("~/{}", place.display()).into())],
        );
        place = OLD_WORKSPACE.into();
    }
    add(&mut plan, workspace, "workspace/", &place)?;
    add(&mut plan, skills, "skills/", &place.join("skills"))?;
    if let Some(file) = plan
        .iter_mut()
        .find(|file| Some(&file.object.key) == configuration.as_ref())
    {
        file.path = CONFIGURATION.into();
        file.content = content;
    }
    let mut seen = HashSet::new();
    if let Some(twice) = plan
        .iter()
        .find(|file| !file.is_directory() && !seen.insert(&file.path))
    {
        return Err(refuse(&twice.object.key, "another object has its place"));
    }
    Ok((plan, place.display().to_string()))
}

/// Adds the objects of a folder, to be put below `place`.
fn add(
    plan: &mut Vec<Planned>,
    objects: Vec<Object>,
    folder: &str,
    place: &Path,
) -> Result<(), Error> {
    for object in objects {
        let name = object.key.strip_prefix(folder).unwrap_or_default();
        if name != MARKER {
            let path = place.join(local_path(&object.key, name)?);
            plan.push(Planned {
                object,
                path,
                content: None,
            });
        }
    }
    Ok(())
}

/// The path that an object's name stands for, refused where it could lead elsewhere.
fn local_path(key: &str, name: &str) -> Result<PathBuf, Error> {
    let mut path = PathBuf::new();
    let name = name.strip_suffix('/').unwrap_or(name);
    for component in name.split('/').filter(|_| !name.is_empty()) {
        let component = decode(component);
        if matches!(&component[..], b"" | b"." | b"..") || component.contains(&0) {
            return Err(refuse(key, "its name cannot be a file's"));
        }
        path.push(OsString::from_vec(component));
    }
    Ok(path)
}

/// As rclone writes names to S3 unless told otherwise: a byte that is not UTF-8 is `‛` and two hexadecimal digits.
fn decode(name: &str) -> Vec<u8> {
    let mut parts = name.split('‛');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let byte = part
            .get(..2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        if let Some(byte) = byte.filter(|byte| !byte.is_ascii()) {
            bytes.push(byte);
            bytes.extend(&part.as_bytes()[2..]);
        } else {
            bytes.extend("‛".bytes().chain(part.bytes()));
        }
    }
    bytes
}

/// The configuration with the old home's places below `agents` made this home's, and the workspace that it names.
fn adapt(text: Vec<u8>) -> (Vec<u8>, Option<PathBuf>) {
    // The old set-up wrote it as plain JSON at each start.
    let Ok(mut value) = serde_json::from_slice::<Value>(&text) else {
        log::warn(
            "the configuration is not plain JSON and is kept as it is; check which places it names",
            &[],
        );
        return (text, None);
    };
    let before = value.clone();
    relocate(&mut value, "");
    let workspace = value
        .pointer("/agents/defaults/workspace")
        .and_then(Value::as_str);
    let workspace = workspace
        .and_then(|text| text.strip_prefix("~/"))
        .map(PathBuf::from);
    let workspace = workspace.filter(|path| {
        path.components()
            .all(|part| matches!(part, Component::Normal(_)))
    });
    let text = if value == before {
        text
    } else {
        format!("{value:#}\n").into_bytes()
    };
    (text, workspace)
}

fn relocate(value: &mut Value, key: &str) {
    match value {
        Value::Object(fields) => fields
            .iter_mut()
            .for_each(|(name, value)| relocate(value, &format!("{key}.{name}"))),
        Value::Array(items) => items.iter_mut().for_each(|item| relocate(item, key)),
        Value::String(text) => {
            let moved = MOVES.iter().find_map(|(old, new)| {
                let rest = text.strip_prefix(old)?;
                (rest.is_empty() || rest.starts_with('/')).then(|| format!("{new}{rest}"))
            });
            match moved {
                // The gateway resolves `~` in all of these, but not everywhere.
                Some(moved) if key.starts_with(".agents.") => *text = moved,
                Some(_) => log::warn(
                    "the configuration names a place of the old host",
                    &[("key", key[1..].into())],
                ),
                None => {}
            }
        }
        _ => {}
    }
}

/// The error of an object that cannot be imported.
pub fn refuse(key: &str, reason: &str) -> Error {
    Error::Damaged {
        key: key.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["..", "../x", "a/../../x", "./x", "a//b", "/x", "a\0b"] {
            assert!(local_path("key", name).is_err(), "{name:?}");
        }
        for (name, want) in [
            ("", &b""[..]),
            ("a/", b"a"),
            ("a/...", b"a/..."),
            ("caf‛E9", b"caf\xe9"),
            // No byte that needs no quoting: it could be a slash.
            ("‛2F‛2E‛2E", "‛2F‛2E‛2E".as_bytes()),
            ("‛", "‛".as_bytes()),
        ] {
            let path = local_path("key", name).expect("it is a file's");
            assert_eq!(path.into_os_string().into_vec(), want, "{name:?}");
        }
    }

    #[test]
    fn places_of_the_old_home_become_this_home_s_where_the_gateway_resolves_them() {
        let text = r#"{"env":{"A":"/root/x"},"agents":{"defaults":{"workspace":"/root/clawd"},
            "list":[{"agentDir":"/root/.clawdbot/agents/a"},{"workspace":"/rooted"}]}}"#;
        let (text, workspace) = adapt(text.into());
        let value: Value = serde_json::from_slice(&text).expect("it is JSON");
        let want = json!({"env": {"A": "/root/x"}, "agents": {"defaults": {"workspace": "~/clawd"},
            "list": [{"agentDir": "~/.openclaw/agents/a"}, {"workspace": "/rooted"}]}});
        assert_eq!((value, workspace), (want, Some("clawd".into())));
        for same in [
            "{}",
            "{ \"a\": [1.0] }",
            "// JSON5\n{}",
            r#"{"agents":{"defaults":{"workspace":"~/../x"}}}"#,
        ] {
            assert_eq!(adapt(same.into()), (same.into(), None));
        }
    }
}
