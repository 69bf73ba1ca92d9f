//! What a snapshot leaves out, and what a restore takes of it: gitignore-style patterns, relative to the root.
//!
//! Source of the semantics: gitignore(5). A pattern with a slash other than a trailing one is anchored at the root, another
//! one matches a name at any depth; a trailing slash matches directories only; `!` takes back what an earlier pattern left
//! out, unless a whole directory above is left out; the last pattern that matches decides. One form is added: `NAME -> TARGET`
//! matches a symbolic link alone, by both.

use fast_glob::glob_match;

use super::staging::INSIDE;
use crate::archive::entry::{Entry, Kind};

/// What is left out everywhere, and who makes it again. The order counts: a workspace keeps what only the gateway makes, and
/// the locks of programs that any user may run are left out there, too. A lock names a process of the host it was made on.
/// Names that a user's own file may have are not here, nor is what a person would have to fetch again.
const BUILT_IN: &str = "\
/.restoring/                              # the next restore, where the root is a mount point
/.npm/_*/                                 # npm
/.cache/go-build/                         # Go
/.cache/node-compile-cache/               # Node.js
/.cache/node-gyp/                         # node-gyp
/.cache/{pip,uv}/                         # pip, uv
/.cache/{pnpm,yarn}/                      # pnpm, Yarn
/.cache/pypoetry/{artifacts,cache}/       # Poetry
/.cache/{chromium,google-chrome}/*/*Cache/ # Chromium
/.cache/mozilla/firefox/*/cache2/         # Firefox
/.cache/{fontconfig,mesa_shader_cache*}/  # Fontconfig, Mesa
/.openclaw/cache/control-ui-assets/       # the gateway
/.openclaw/dev/                           # the gateway, update
/.openclaw/extensions/**/node_modules/    # the gateway, plugin update
/.openclaw/git/                           # the gateway, plugin update
/.openclaw/logs/                          # the gateway begins new ones
/.openclaw/npm/                           # the gateway, plugin update
/.openclaw/npm-runtime/                   # the gateway
/.openclaw/plugin-skills/                 # the gateway
/.openclaw/sandbox/skills-workspaces/     # the gateway
/.openclaw/tmp/                           # the gateway
/.openclaw/tools/                         # the gateway
/.openclaw/**/*.pid                       # the process that it names
/.openclaw/**/*.sock                      # the process that listens there
/.openclaw/**/*.update-captures           # the gateway, update
!/.openclaw/**/workspace*/**              # nobody: a workspace is its user's
!/.openclaw/sandboxes/**                  # nobody: likewise
*.sqlite-shm                              # SQLite
*.generation-lock.sqlite                  # the gateway
*.generation-writer.sqlite                # the gateway
*.reindex-lock.sqlite                     # the gateway
Singleton{Lock,Socket,Cookie} -> **       # Chromium, in a profile anywhere
lock -> [0-9]*.*.*.*:*[0-9]               # Firefox, in a profile anywhere
.parentlock                               # Firefox
.#* -> *@*.*[0-9]                         # Emacs, while a file is edited
postmaster.pid                            # PostgreSQL
.s.PGSQL.*.lock                           # PostgreSQL
/.gnupg/**/*.lock                         # GnuPG
/.gnupg/**/.#lk*                          # GnuPG
/.gitconfig.lock                          # git, while it writes
/.config/git/*.lock                       # git, likewise
**/.git/gc.pid                            # git
**/.git/*.lock                            # git
**/.git/{info,logs,modules,objects,rebase-merge,refs,reftable,sequencer,worktrees}/**/*.lock # git
";

/// The built-in patterns and the operator's own.
#[derive(Debug, Clone)]
pub struct Excludes(Patterns);

/// Patterns in their order. Every path of a tree is matched against them, at each look.
#[derive(Debug, Clone)]
struct Patterns {
    all: Vec<Pattern>,
    /// For each byte, the patterns whose matches may end in it: most are not looked at.
    by_last: Vec<Vec<usize>>,
}

#[derive(Debug, Clone)]
struct Pattern {
    /// What every match begins with, as one byte and whole, and ends with. Nearly all paths are told apart by that, at a tenth
    /// of a glob's cost.
    first: Option<u8>,
    prefix: String,
    suffix: String,
    glob: String,
    /// Of a symbolic link; without it a match may be anything.
    target: Option<String>,
    /// It is about the last component alone.
    is_name: bool,
    /// Not taken back by a `!`.
    is_positive: bool,
    only_directories: bool,
}

/// What is at a path, as far as patterns ask.
#[derive(Clone, Copy)]
enum Node<'a> {
    Directory,
    /// With its target.
    Link(&'a [u8]),
    Other,
}

impl Pattern {
    fn matches(&self, path: &[u8], name: &[u8], node: Node<'_>) -> bool {
        let text = if self.is_name { name } else { path };
        self.first.is_none_or(|first| text.first() == Some(&first))
            && (!self.only_directories || matches!(node, Node::Directory))
            && text.starts_with(self.prefix.as_bytes())
            && text.ends_with(self.suffix.as_bytes())
            && self.is_for(node)
            && glob_match(&self.glob, text)
    }

    fn is_for(&self, node: Node<'_>) -> bool {
        match (&self.target, node) {
            (None, _) => true,
            (Some(glob), Node::Link(target)) => glob_match(glob, target),
            (Some(_), _) => false,
        }
    }
}

impl FromIterator<Pattern> for Patterns {
    fn from_iter<T: IntoIterator<Item = Pattern>>(patterns: T) -> Self {
        let all: Vec<Pattern> = patterns.into_iter().collect();
        let may_end_in = |pattern: &Pattern, byte| {
            let last = pattern.suffix.as_bytes().last();
            last.is_none_or(|last| *last == byte)
        };
        let by_last = (0..=u8::MAX).map(|byte| {
            let numbers = 0..all.len();
            numbers.filter(|at| may_end_in(&all[*at], byte)).collect()
        });
        let by_last = by_last.collect();
        Self { all, by_last }
    }
}

impl Patterns {
    /// Whether the last pattern that matches is one without `!`.
    fn match_last(&self, path: &[u8], node: Node<'_>) -> bool {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
        let Some(last) = path.last() else {
            return false;
        };
        let candidates = &self.by_last[usize::from(*last)];
        let is_match = |at: &usize, is_positive| {
            let pattern = &self.all[*at];
            pattern.is_positive == is_positive && pattern.matches(path, name, node)
        };
        // Nearly nothing is left out, so what may take something back is asked last.
        let Some(at) = candidates.iter().rposition(|at| is_match(at, true)) else {
            return false;
        };
        !candidates[at + 1..].iter().any(|at| is_match(at, false))
    }
}

impl Default for Excludes {
    fn default() -> Self {
        Self(built_in().map(|(text, _)| parse(text)).collect())
    }
}

/// Each built-in pattern, and who makes again what it matches.
fn built_in() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = BUILT_IN.lines().filter_map(|line| line.split_once(" # "));
    lines.map(|(pattern, by_whom)| (pattern.trim(), by_whom.trim()))
}

impl Excludes {
    /// Leaves nothing out.
    pub fn none() -> Self {
        Self([].into_iter().collect())
    }

    /// The built-in list followed by a comma-separated one.
    pub fn new(extra: &str) -> Result<Self, String> {
        let extra = split_list(extra).into_iter().map(valid);
        let built_in = built_in().map(|(text, _)| Ok(parse(text)));
        let all = built_in.chain(extra);
        Ok(Self(all.collect::<Result<_, String>>()?))
    }

    /// Whether what is no symbolic link is left out, and with it everything below.
    pub fn matches(&self, path: &[u8], is_directory: bool) -> bool {
        // Whatever the list says: a restore works in there.
        if path == INSIDE.as_bytes() {
            return true;
        }
        let node = if is_directory {
            Node::Directory
        } else {
            Node::Other
        };
        self.0.match_last(path, node)
    }

    /// Whether a symbolic link is left out.
    pub fn matches_link(&self, path: &[u8], target: &[u8]) -> bool {
        self.0.match_last(path, Node::Link(target))
    }
}

/// What of a snapshot is wanted: the same patterns, which here say what to take.
#[derive(Debug, Clone)]
pub struct Selection {
    patterns: Patterns,
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
        let node = match (entry.kind, &entry.link) {
            (Kind::Dir, _) => Node::Directory,
            (Kind::Symlink, Some(target)) => Node::Link(target),
            _ => Node::Other,
        };
        let is_taken = self.patterns.match_last(&entry.path, node);
        if is_taken && is_directory {
            self.inside = Some(entry.path.clone());
        }
        is_taken
    }
}

/// The patterns of a list. A comma in braces, or behind a backslash, is of a pattern.
fn split_list(list: &str) -> Vec<&str> {
    if list.is_empty() {
        return Vec::new();
    }
    let (mut depth, mut is_escaped) = (0_usize, false);
    let is_between = |c: char| {
        let is_literal = is_escaped;
        is_escaped = c == '\\' && !is_literal;
        match c {
            _ if is_literal => {}
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' => return depth == 0,
            _ => {}
        }
        false
    };
    list.split(is_between).map(str::trim).collect()
}

fn valid(text: &str) -> Result<Pattern, String> {
    let pattern = parse(text);
    if pattern.glob.is_empty() {
        return Err(format!("{text:?} is an empty pattern"));
    }
    for glob in std::iter::once(&pattern.glob).chain(&pattern.target) {
        fast_glob::validate(glob)
            .map_err(|problem| format!("{text:?} is not a pattern: {problem}"))?;
    }
    Ok(pattern)
}

fn parse(text: &str) -> Pattern {
    let (text, target) = match text.split_once(" -> ") {
        Some((name, target)) => (name, Some(target.to_owned())),
        None => (text, None),
    };
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
        first: prefix.bytes().next(),
        prefix: prefix.to_owned(),
        suffix: suffix.to_owned(),
        glob: glob.to_owned(),
        target,
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
            ("*.{log,tmp} , x", "a.tmp", false, true),
            ("*.{log,tmp} , x", "x", false, true),
            ("a\\,b", "a,b", false, true),
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
    fn a_pattern_with_a_target_is_about_links_alone() {
        let rows: &[(&str, &str, &str, bool)] = &[
            ("x -> y", "x", "y", true),
            ("x -> y", "deep/x", "y", true),
            ("/x -> y", "deep/x", "y", false),
            ("x -> y", "x", "z", false),
            ("x -> a*z", "x", "a/z", false),
            ("x -> a**", "x", "ab", true),
            ("x -> **", "x", "/a/z", true),
            ("x", "x", "anything", true),
            ("x/", "x", "anything", false),
            ("x,!x -> y", "x", "y", false),
            ("x,!x -> y", "x", "z", true),
            ("x -> y,!x", "x", "y", false),
        ];
        for (patterns, path, target, want) in rows {
            let excludes = Excludes::new(patterns).expect("the row's patterns are right");
            assert_eq!(
                excludes.matches_link(path.as_bytes(), target.as_bytes()),
                *want,
                "{patterns} on {path} -> {target}"
            );
        }
        let excludes = Excludes::new("x -> **").expect("a good pattern");
        for is_directory in [false, true] {
            assert!(!excludes.matches(b"x", is_directory));
        }
        assert!(Excludes::new("x -> [a").is_err());
    }

    #[test]
    fn the_built_in_list_leaves_out_what_is_made_again() {
        let excludes = Excludes::default();
        for (path, is_directory) in [
            (".openclaw/state/openclaw.sqlite-shm", false),
            (".openclaw/workspace/notes.sqlite-shm", false),
            (".openclaw/tmp", true),
            (".openclaw/logs", true),
            (".openclaw/gateway.pid", false),
            (".openclaw/browser/main/browser.pid", false),
            (".cache/pip", true),
            (".cache/uv", true),
            (".cache/node-compile-cache", true),
            (".cache/chromium/Default/Cache", true),
            (".cache/google-chrome/Default/Code Cache", true),
            (".cache/mesa_shader_cache_db", true),
            (".npm/_cacache", true),
            (".openclaw/cache/control-ui-assets", true),
            (".openclaw/extensions/a/node_modules", true),
            ("pg/postmaster.pid", false),
            (".openclaw/workspace/db/postmaster.pid", false),
            ("run/.s.PGSQL.5432.lock", false),
            (".mozilla/firefox/p.default/.parentlock", false),
            (".gnupg/public-keys.d/pubring.db.lock", false),
            (".gitconfig.lock", false),
            (".git/index.lock", false),
            (".openclaw/workspace/.git/index.lock", false),
            ("a/b/.git/HEAD.lock", false),
            ("a/.git/refs/heads/deep/name.lock", false),
            ("a/.git/objects/maintenance.lock", false),
            ("a/.git/modules/sub/index.lock", false),
            ("a/.git/worktrees/w/HEAD.lock", false),
            ("a/.git/gc.pid", false),
        ] {
            assert!(excludes.matches(path.as_bytes(), is_directory), "{path}");
        }
        for (path, target) in [
            (".openclaw/browser/main/user-data/SingletonLock", "host-42"),
            (".config/chromium/SingletonSocket", "/tmp/.org.x/S"),
            (".openclaw/workspace/profile/SingletonCookie", "12345"),
            (".mozilla/firefox/p.default/lock", "127.0.1.1:+4242"),
            (".openclaw/workspace/profile/lock", "10.0.0.7:4242"),
            ("notes/.#todo.org", "me@oldhost.4242:1700000000"),
        ] {
            assert!(
                excludes.matches_link(path.as_bytes(), target.as_bytes()),
                "{path}"
            );
        }
    }

    #[test]
    fn the_built_in_list_keeps_what_nobody_makes_again() {
        let excludes = Excludes::default();
        for (path, is_directory) in [
            (".openclaw/state/openclaw.sqlite", false),
            (".openclaw/state/openclaw.sqlite-wal", false),
            (".openclaw/openclaw.json", false),
            (".openclaw/workspace", true),
            (".openclaw/workspace/AGENTS.md", false),
            (".openclaw/workspace/app/node_modules", true),
            (".openclaw/workspace-work/app/node_modules", true),
            (".openclaw/workspace/server.pid", false),
            (".openclaw/workspace/mail.sock", false),
            (".openclaw/sandboxes/agent/app.pid", false),
            (".openclaw/skills/mine/node_modules", true),
            (".openclaw/workspace/tmp", true),
            (".openclaw/workspace/logs", true),
            (".gitconfig", false),
            ("app/node_modules", true),
            ("project/server.pid", false),
            ("project/.cache", true),
            ("tmp", true),
            (".npm", true),
            (".cache", true),
            (".cache/ms-playwright/mcp-chrome-profile", true),
            (".cache/camoufox", true),
            (".cache/pypoetry/virtualenvs", true),
            (".cache/huggingface/token", false),
            // A user's own, whatever a program calls its lock.
            ("lock", false),
            ("lock", true),
            ("project/SingletonLock", false),
            ("project/Cargo.lock", false),
            ("project/.git", true),
            ("project/.git/index", false),
            ("project/.git/worktrees/w/locked", false),
            ("project/.git/trees/feature/Cargo.lock", false),
            ("project.git/package.lock", false),
        ] {
            assert!(!excludes.matches(path.as_bytes(), is_directory), "{path}");
        }
        for (path, target) in [
            ("project/lock", "../other/lock"),
            ("project/lock", "1.2.3"),
            ("project/.#draft", "draft"),
            ("project/node_modules", "../node_modules"),
        ] {
            assert!(
                !excludes.matches_link(path.as_bytes(), target.as_bytes()),
                "{path}"
            );
        }
    }

    #[test]
    fn the_operator_takes_back_what_the_built_in_list_leaves_out() {
        let excludes = Excludes::new("!/.openclaw/logs/,!SingletonLock").expect("good patterns");
        assert!(!excludes.matches(b".openclaw/logs", true));
        assert!(excludes.matches(b".openclaw/tmp", true));
        assert!(!excludes.matches_link(b".config/chromium/SingletonLock", b"host-1"));
        assert!(excludes.matches_link(b".config/chromium/SingletonCookie", b"1"));
    }

    #[test]
    fn the_documented_list_is_the_one_in_the_code() {
        let page = include_str!("../../../docs/backup-agent.md");
        let list = page
            .rsplit("```")
            .nth(1)
            .expect("the list is the last block");
        assert_eq!(list.trim_start_matches('\n'), BUILT_IN);
        assert_eq!(built_in().count(), BUILT_IN.lines().count());
        for (pattern, by_whom) in built_in() {
            assert!(valid(pattern).is_ok(), "{pattern}");
            assert!(!by_whom.is_empty(), "nobody makes {pattern} again");
        }
    }

    #[test]
    fn a_bad_pattern_is_named() {
        for (list, pattern) in [
            ("fine,[a", "[a"),
            ("*.{log", "*.{log"),
            ("a,,b", "\"\" is an empty"),
            ("a,", "\"\" is an empty"),
            ("a, ", "\"\" is an empty"),
            ("!", "\"!\" is an empty"),
            ("/", "\"/\" is an empty"),
        ] {
            let problem = Excludes::new(list).expect_err(list);
            assert!(problem.contains(pattern), "{list}: {problem}");
        }
    }
}
