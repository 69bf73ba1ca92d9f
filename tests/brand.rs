//! The gateway's name: by none of its former ones anywhere, and not borrowed for what is the runtime's own.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use e2e::binaries::binary;

/// What upstream called the gateway before (its `docs/start/lore.md`). The second stands for all that begin with it.
const FORMER: [&str; 3] = ["warelay", "clawd", "moltbot"];

/// What has to know them: it reads what the gateway wrote under those names. And this list.
const KNOWS_FORMER: [&str; 4] = [
    "backup-agent/src/commands/import/layout.rs",
    "docs/migration.md",
    "tests/brand.rs",
    "tests/import.rs",
];

/// Where the programs say `openclaw` because the gateway is meant. Messages call it the gateway.
const MEANT: [&str; 12] = [
    "\"OPENCLAW_",                  // its environment, whole names: no RUNTIME_OPENCLAW_…
    ".openclaw",                    // its folder; the field below
    "openclaw.json",                // its configuration
    "openclaw.sqlite",              // its database
    "\"openclaw\"",                 // its command, its user, the key of its version in `status`
    "\"openclaw-{}\"",              // its folder for locks
    "pub openclaw: Option<String>", // its version
    "openclaw: None",               // likewise
    "\"openclaw/\"",                // its folder in another set-up's bucket
    "no folder openclaw (",         // likewise
    "`openclaw doctor`",            // its command
    "one OpenClaw gateway",         // what the supervisor keeps running, as its help says
];

/// Folders of the runtime that carry the project's name.
const FOLDERS: [&str; 2] = [
    "/var/lib/openclaw-runtime",
    "/usr/local/lib/openclaw-runtime",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are a folder of the repository")
        .to_owned()
}

/// Every file below, with its path from the repository's root. Left out: what is hidden, built or installed.
fn files(folder: &str) -> Vec<(String, String)> {
    const LEFT_OUT: [&str; 3] = ["target", "dist", "node_modules"];
    let root = root();
    let mut found = Vec::new();
    let mut folders = vec![root.join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("can list") {
            let path = entry.expect("can list").path();
            let name = path.file_name().and_then(OsStr::to_str).expect("is text");
            if LEFT_OUT.contains(&name) || (name.starts_with('.') && name != ".ci") {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = std::fs::read(&path).expect("can read");
                let path = path.strip_prefix(&root).expect("is below the root");
                let path = path.to_str().expect("is text").to_owned();
                found.push((path, String::from_utf8_lossy(&bytes).into_owned()));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} has files");
    found
}

fn former(text: &str) -> Option<&'static str> {
    // What follows the present name may look like a former one: `OpenClawDoctor`.
    let text = text.to_ascii_lowercase().replace("openclaw", "");
    FORMER.into_iter().find(|name| text.contains(name))
}

#[test]
fn nothing_calls_the_gateway_by_a_former_name() {
    let mut wrong = String::new();
    for (path, text) in files("") {
        if KNOWS_FORMER.contains(&path.as_str()) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if let Some(name) = former(line) {
                let _ = writeln!(wrong, "{path}:{}: {name}", number + 1);
            }
        }
        assert_eq!(former(&path), None, "{path}");
    }
    assert!(wrong.is_empty(), "former names of the gateway:\n{wrong}");
    // The agent has them, for `import`.
    let program = std::fs::read(binary("supervisor")).expect("can read");
    assert_eq!(former(&String::from_utf8_lossy(&program)), None);
}

#[test]
fn programs_name_the_gateway_only_where_it_is_meant() {
    let sources = ["supervisor", "backup-agent", "worker/src", "tests/golden"];
    let mut wrong = String::new();
    for (path, text) in sources.into_iter().flat_map(files) {
        for (number, line) in text.lines().enumerate() {
            let code = line.trim_start();
            if code.starts_with("//") || code.starts_with('*') || code.starts_with("/*") {
                continue;
            }
            let rest = FOLDERS
                .iter()
                .chain(&MEANT)
                .fold(code.to_owned(), |rest, meant| rest.replace(meant, ""));
            if rest.to_ascii_lowercase().contains("openclaw") {
                let _ = writeln!(wrong, "{path}:{}: {code}", number + 1);
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "the gateway's name where the runtime is meant, or \"the gateway\" will do:\n{wrong}"
    );
}
