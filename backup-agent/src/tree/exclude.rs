//! What a snapshot leaves out, and what a restore takes of it: gitignore-style patterns, relative to the root.
//!
//! Source of the semantics: gitignore(5). A pattern with a slash other than a trailing one is anchored at the root, another
//! one matches a name at any depth; a trailing slash matches directories only; `!` takes back what an earlier pattern left
//! out, unless a whole directory above is left out; the last pattern that matches decides.

use fast_glob::glob_match;

use crate::archive::entry::{Entry, Kind};

/// Rebuilt by the gateway or by `SQLite`, or only true on the host they were made on. Everything here was seen to be missing
/// after a restore without harm; upstream's own backup leaves the same out.
const BUILT_IN: &[&str] = &[
    // The restore's own working directory, where the root is a mount point.
    "/.restoring/",
    "/.cache/",
    "/.npm/",
    "*.sqlite-shm",
    "*.generation-lock.sqlite",
    "*.generation-writer.sqlite",
    "*.reindex-lock.sqlite",
    "/.openclaw/**/*.sock",
    "/.openclaw/**/*.pid",
    "/.openclaw/**/*.update-captures",
    "/.openclaw/cache/control-ui-assets/",
    "/.openclaw/tmp/",
    "/.openclaw/plugin-skills/",
    "/.openclaw/**/node_modules/",
    "/.openclaw/dev/",
    "/.openclaw/git/",
    "/.openclaw/npm/",
    "/.openclaw/npm-runtime/",
    "/.openclaw/tools/",
    "/.openclaw/sandbox/skills-workspaces/",
    "/.openclaw/browser/*/user-data/Singleton*",
];

/// The built-in patterns and the operator's own.
#[derive(Debug, Clone)]
pub struct Excludes(Vec<Pattern>);

#[derive(Debug, Clone)]
struct Pattern {
    glob: String,
    /// What every match begins and ends with. Nearly all paths are told apart by that, at a tenth of a glob's cost.
    prefix: String,
    suffix: String,
    /// It is about the last component alone.
    is_name: bool,
    /// Not taken back by a `!`.
    is_positive: bool,
    only_directories: bool,
}

impl Pattern {
    fn matches(&self, path: &[u8], name: &[u8], is_directory: bool) -> bool {
        let text = if self.is_name { name } else { path };
        (is_directory || !self.only_directories)
            && text.starts_with(self.prefix.as_bytes())
            && text.ends_with(self.suffix.as_bytes())
            && glob_match(&self.glob, text)
    }
}

impl Default for Excludes {
    fn default() -> Self {
        Self(BUILT_IN.iter().map(|text| parse(text)).collect())
    }
}

impl Excludes {
    /// Leaves nothing out.
    pub fn none() -> Self {
        Self(Vec::new())
    }

    /// The built-in list followed by a comma-separated one.
    pub fn new(extra: &str) -> Result<Self, String> {
        let mut all = Self::default();
        for text in extra.split(',').map(str::trim).filter(|t| !t.is_empty()) {
            all.0.push(valid(text)?);
        }
        Ok(all)
    }

    /// Whether the entry is left out, and with it everything below.
    pub fn matches(&self, path: &[u8], is_directory: bool) -> bool {
        matches(&self.0, path, is_directory)
    }
}

/// What of a snapshot is wanted: the same patterns, which here say what to take.
#[derive(Debug, Clone)]
pub struct Selection {
    patterns: Vec<Pattern>,
    /// The directory that was taken last, and everything below it with it.
    inside: Option<Vec<u8>>,
}

impl Selection {
    /// A selection by patterns; at least one.
    pub fn new(patterns: &[String]) -> Result<Self, String> {
        Ok(Self {
            patterns: patterns
                .iter()
                .map(|t| valid(t))
                .collect::<Result<_, _>>()?,
            inside: None,
        })
    }

    /// Whether the entry is wanted. Entries have to come in the order of a walk.
    pub fn takes(&mut self, entry: &Entry) -> bool {
        let is_below = |outer: &Vec<u8>| {
            let rest = entry.path.strip_prefix(&outer[..]);
            rest.is_some_and(|rest| rest.starts_with(b"/"))
        };
        let is_directory = entry.kind == Kind::Dir;
        if self.inside.as_ref().is_some_and(is_below) {
            return true;
        }
        let is_taken = matches(&self.patterns, &entry.path, is_directory);
        if is_taken && is_directory {
            self.inside = Some(entry.path.clone());
        }
        is_taken
    }
}

fn matches(patterns: &[Pattern], path: &[u8], is_directory: bool) -> bool {
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    let mut newest_first = patterns.iter().rev();
    let decisive = newest_first.find(|pattern| pattern.matches(path, name, is_directory));
    decisive.is_some_and(|pattern| pattern.is_positive)
}

fn valid(text: &str) -> Result<Pattern, String> {
    let pattern = parse(text);
    fast_glob::validate(&pattern.glob)
        .map_err(|problem| format!("{text:?} is not a pattern: {problem}"))?;
    Ok(pattern)
}

fn parse(text: &str) -> Pattern {
    let (is_positive, text) = match text.strip_prefix('!') {
        Some(rest) => (false, rest),
        None => (true, text),
    };
    let (only_directories, text) = match text.strip_suffix('/') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let is_name = !text.contains('/');
    let glob = text.strip_prefix('/').unwrap_or(text);
    let is_special = |c: char| "*?[]{}\\!".contains(c);
    let prefix = glob.find(is_special).map_or(glob, |at| &glob[..at]);
    let suffix = glob.rfind(is_special).map_or(glob, |at| &glob[at + 1..]);
    Pattern {
        prefix: prefix.to_owned(),
        suffix: suffix.to_owned(),
        glob: glob.to_owned(),
        is_name,
        is_positive,
        only_directories,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_follow_gitignore() {
        let rows: &[(&str, &str, bool, bool)] = &[
            ("*.log", "a.log", false, true),
            ("*.log", "deep/down/a.log", false, true),
            ("/a.log", "deep/a.log", false, false),
            ("/a.log", "a.log", false, true),
            ("build/", "x/build", true, true),
            ("build/", "x/build", false, false),
            ("a/*.txt", "a/b.txt", false, true),
            ("a/*.txt", "a/b/c.txt", false, false),
            ("a/**/z", "a/b/c/z", false, true),
            ("a/**/z", "a/z", false, true),
            ("*.log,!keep.log", "keep.log", false, false),
            ("*.log,!keep.log", "lose.log", false, true),
        ];
        for (patterns, path, is_directory, want) in rows {
            let excludes = Excludes::new(patterns).expect("the row's patterns are right");
            assert_eq!(
                excludes.matches(path.as_bytes(), *is_directory),
                *want,
                "{patterns} on {path}"
            );
        }
    }

    #[test]
    fn names_that_are_not_utf8_are_matched_by_bytes() {
        let excludes = Excludes::new("*.tmp").expect("a good pattern");
        assert!(excludes.matches(b"dir/\xff\xfe.tmp", false));
        assert!(!excludes.matches(b"dir/\xff\xfe.txt", false));
    }

    #[test]
    fn the_built_in_list_leaves_out_what_is_rebuilt_and_keeps_what_is_not() {
        let excludes = Excludes::default();
        for (path, is_directory) in [
            (".openclaw/state/openclaw.sqlite-shm", false),
            (".openclaw/tmp", true),
            (".cache", true),
            (".openclaw/cache/control-ui-assets", true),
            (".openclaw/extensions/a/node_modules", true),
            (".openclaw/browser/main/user-data/SingletonLock", false),
        ] {
            assert!(excludes.matches(path.as_bytes(), is_directory), "{path}");
        }
        for path in [
            ".openclaw/state/openclaw.sqlite",
            ".openclaw/state/openclaw.sqlite-wal",
            ".openclaw/openclaw.json",
            ".openclaw/workspace/AGENTS.md",
            ".gitconfig",
            "project/server.pid",
            "project/.cache",
            "tmp",
        ] {
            assert!(!excludes.matches(path.as_bytes(), false), "{path}");
        }
    }

    #[test]
    fn the_documented_list_is_the_one_in_the_code() {
        let page = include_str!("../../../docs/backup-agent.md");
        let list = page
            .rsplit("```")
            .nth(1)
            .expect("the list is the last block");
        let documented: Vec<&str> = list.split_whitespace().collect();
        assert_eq!(documented, BUILT_IN);
    }

    #[test]
    fn a_bad_pattern_is_named() {
        let problem = Excludes::new("fine,[a").expect_err("an open bracket");
        assert!(problem.contains("[a"), "{problem}");
    }
}
