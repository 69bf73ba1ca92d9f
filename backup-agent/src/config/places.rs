//! Where root, state, store and target really are: symbolic links followed, none of them inside of another, and state and
//! store in no other user's hands. Only looks; run on a thread, for a dead file system may hold a look for ever.

use std::{
    ffi::{CString, OsString},
    fs::{self, Metadata},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use nix::unistd::{Gid, Uid, User, getgrouplist};

use crate::tree::identity::Identity;

/// As many as the kernel follows (`path_resolution(7)`).
const MOST_LINKS: u32 = 40;

/// Names in the state folder that are the agent's own: an instance of a store there must not have one.
const OWN_NAMES: [&str; 4] = ["import", "index", "lock", "state.json"];

/// A folder as the settings have it.
#[derive(Debug, Clone)]
pub struct Named {
    pub name: &'static str,
    pub path: PathBuf,
}

/// Every folder that the settings name; `None` for one whose form is wrong already.
#[derive(Debug, Default)]
pub struct Places {
    pub root: Option<Named>,
    /// This run replaces the root, or what is beside it. Any other goes on with a root that is something else by now: a backup
    /// says what that means, and the rest have nothing to do with it.
    pub is_root_replaced: bool,
    pub state: Option<Named>,
    /// A `file://` store, and the instance on it.
    pub store: Option<Named>,
    pub instance: String,
    /// The store is below the state because nobody said otherwise.
    pub is_store_default: bool,
    /// Of a restore.
    pub target: Option<Named>,
    /// What an import reads.
    pub source: Option<Named>,
    /// Whose processes must not get at state and store.
    pub gateway: Option<Identity>,
}

/// The folders without any link, or everything that is wrong with them.
#[derive(Debug, Default)]
pub struct Real {
    pub root: PathBuf,
    pub state: PathBuf,
    pub target: Option<PathBuf>,
}

impl Places {
    /// Looks at all of them.
    pub fn check(&self) -> Result<Real, Vec<String>> {
        let mut problems = Vec::new();
        let mut resolve = |named: &Option<Named>| {
            let named = named.as_ref()?;
            let resolved = Resolved::of(&named.path);
            let resolved = resolved.map_err(|reason| problems.push(sentence(named.name, &reason)));
            Some((named.name, resolved.ok()?))
        };
        let root = match &self.root {
            Some(root) if !self.is_root_replaced => {
                let resolved = Resolved::of(&root.path);
                Some((
                    root.name,
                    resolved.unwrap_or_else(|_| Resolved::as_written(root)),
                ))
            }
            root => resolve(root),
        };
        let state = resolve(&self.state);
        let store = resolve(&self.store);
        let target = resolve(&self.target);
        let source = resolve(&self.source);
        // The folder of the instance, below that of the store.
        let objects = store.as_ref().and_then(|(name, store)| {
            let objects = Resolved::of(&store.path.join(&self.instance));
            let objects = objects.map_err(|reason| problems.push(sentence(name, &reason)));
            Some((*name, objects.ok()?))
        });

        let gateway = self.gateway.map(Hands::of);
        // What is in there may be a link, too.
        let mut inside = Vec::new();
        if let Some((name, objects)) = &objects {
            for folder in ["layers", "snapshots"] {
                match Resolved::of(&objects.path.join(folder)) {
                    Ok(folder) => inside.push((*name, folder)),
                    Err(reason) => problems.push(sentence(name, &reason)),
                }
            }
        }
        let judged = [&state, &store, &objects].into_iter().flatten();
        for (name, folder) in judged.chain(&inside) {
            if let Err(reason) = folder.judge(gateway.as_ref()) {
                let problem = sentence(name, &reason);
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
            }
        }
        let own_store = store.as_ref().filter(|_| !self.is_store_default);
        for (inner, outer) in [
            (state.as_ref(), root.as_ref()),
            (own_store, root.as_ref()),
            (target.as_ref(), root.as_ref()),
            (target.as_ref(), state.as_ref()),
            (target.as_ref(), store.as_ref()),
        ] {
            problems.extend(nested(inner, outer));
        }
        for folder in objects
            .iter()
            .chain(&inside)
            .filter(|_| !self.is_store_default)
        {
            let apart = nested(Some(folder), root.as_ref());
            // Said of the store itself already, unless a link leads elsewhere.
            let is_said = |(_, store): &(_, Resolved)| folder.1.path.starts_with(&store.path);
            if !own_store.is_some_and(is_said) {
                problems.extend(apart);
            }
        }
        // An import only reads its source; what comes after it (a restore, a prune) does not.
        for outer in [&root, &state, &objects] {
            let inside = |(_, source): &&(_, Resolved)| {
                outer.as_ref().is_some_and(|(_, outer)| source.is_in(outer))
            };
            problems.extend(nested(source.as_ref().filter(inside), outer.as_ref()));
        }
        if let (Some((_, state)), Some((name, objects))) = (&state, &objects) {
            problems.extend(in_each_others_files(state, name, objects));
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let path = |found: Option<(_, Resolved)>| found.map(|(_, folder)| folder.path);
        Ok(Real {
            root: path(root).unwrap_or_default(),
            state: path(state).unwrap_or_default(),
            target: path(target),
        })
    }
}

/// The problem of a setting.
pub fn sentence(name: &str, reason: &str) -> String {
    format!("cannot use {name}: {reason}")
}

/// A folder that may be there or not, and the way to it.
#[derive(Debug)]
struct Resolved {
    /// Without links and `..`.
    path: PathBuf,
    /// Its status, when it is there.
    status: Option<Metadata>,
    /// Every folder on the way, and the owner of what was looked up in it, when that was there.
    way: Vec<(PathBuf, Metadata, Option<u32>)>,
}

impl Resolved {
    /// Walks as the kernel does. A link is followed if root or the caller made it, and if it leads to something.
    fn of(path: &Path) -> Result<Self, String> {
        let mut names = Vec::new();
        push_names(&mut names, path);
        let mut at = PathBuf::from("/");
        let mut here = Some(look(&at)?.ok_or("there is no /")?);
        let mut way = Vec::new();
        // The last link, and how many names are left when its target has been walked.
        let mut link: Option<(PathBuf, usize)> = None;
        let mut links = 0;
        while let Some(name) = names.pop() {
            if name == ".." {
                if here.is_none() {
                    return Err(format!(
                        "{} is not there, and \"..\" follows it",
                        at.display()
                    ));
                }
                at.pop();
                here = look(&at)?;
                continue;
            }
            let Some(folder) = here.take() else {
                at.push(name);
                continue;
            };
            if !folder.is_dir() {
                return Err(format!("{} is not a directory", at.display()));
            }
            let found = look(&at.join(&name))?;
            way.push((at.clone(), folder, found.as_ref().map(Metadata::uid)));
            at.push(name);
            match found {
                None => {
                    if let Some((link, _)) = link.as_ref().filter(|(_, left)| names.len() >= *left)
                    {
                        return Err(format!(
                            "{} is a symbolic link that leads nowhere: there is no {}",
                            link.display(),
                            at.display()
                        ));
                    }
                }
                Some(status) if status.is_symlink() => {
                    if !is_trusted(status.uid()) {
                        return Err(format!(
                            "{} is a symbolic link that user {} made; remove it, or make it anew as yourself",
                            at.display(),
                            status.uid()
                        ));
                    }
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(format!("{} is a loop of symbolic links", path.display()));
                    }
                    let target = fs::read_link(&at).map_err(|error| cannot_look(&at, &error))?;
                    link = Some((at.clone(), names.len()));
                    at.pop();
                    if target.is_absolute() {
                        at = PathBuf::from("/");
                    }
                    here = look(&at)?;
                    push_names(&mut names, &target);
                }
                Some(status) => here = Some(status),
            }
        }
        if here.as_ref().is_some_and(|status| !status.is_dir()) {
            return Err(format!("{} is not a directory", at.display()));
        }
        Ok(Self {
            path: at,
            status: here,
            way,
        })
    }

    /// What cannot be walked to.
    fn as_written(named: &Named) -> Self {
        Self {
            path: named.path.clone(),
            status: None,
            way: Vec::new(),
        }
    }

    /// Whether it is that folder, or inside of it. By the numbers of the folders that are there, too: a mount may show one
    /// under two names.
    fn is_in(&self, outer: &Self) -> bool {
        let id = |status: &Metadata| (status.dev(), status.ino());
        let above = self.path.ancestors();
        let is_same = |outer: (u64, u64)| {
            let mut ids = above.filter_map(|path| fs::symlink_metadata(path).ok());
            ids.any(|status| id(&status) == outer)
        };
        self.path.starts_with(&outer.path) || outer.status.as_ref().map(id).is_some_and(is_same)
    }

    /// Whether what is in it is what the caller put there.
    fn judge(&self, gateway: Option<&Hands>) -> Result<(), String> {
        if let Some(status) = &self.status {
            let path = self.path.display();
            let owner = status.uid();
            if !is_trusted(owner) {
                let us = Uid::effective();
                return Err(format!(
                    "{path} belongs to user {owner}, who may have put anything into it; \
                     remove it, or look at what is in it and chown it to user {us}"
                ));
            }
            if is_open(status.mode()) {
                return Err(format!(
                    "other users may write into {path} (its mode is {:o}); look at what is in it, then chmod go-w it",
                    status.mode() & 0o7777
                ));
            }
        }
        let Some(gateway) = gateway else {
            return Ok(());
        };
        match self.way.iter().find(|step| gateway.may_replace(step)) {
            None => Ok(()),
            Some((folder, ..)) => Err(format!(
                "the gateway's user {} may write into {}, and so put something else in its place; \
                 chown or chmod that folder, or use another",
                gateway.uid,
                folder.display()
            )),
        }
    }
}

fn push_names(names: &mut Vec<OsString>, path: &Path) {
    let kept = path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    let kept: Vec<OsString> = kept.collect();
    names.extend(kept.into_iter().rev());
}

/// The status of what is there, the link itself where it is one.
fn look(path: &Path) -> Result<Option<Metadata>, String> {
    match fs::symlink_metadata(path) {
        Ok(status) => Ok(Some(status)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot_look(path, &error)),
    }
}

fn cannot_look(path: &Path, error: &io::Error) -> String {
    format!("cannot look at {}: {error}", path.display())
}

/// Who may have made what root works in: root, and whoever runs this.
pub fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == Uid::effective().as_raw()
}

/// Whether others may replace what is in a folder of this mode. In a sticky one, as a fresh tmpfs is, they may only add to it,
/// and files that they add are not taken for ours.
pub fn is_open(mode: u32) -> bool {
    mode & 0o022 != 0 && mode & 0o1000 == 0
}

/// A user's rights on folders.
struct Hands {
    uid: Uid,
    groups: Vec<Gid>,
}

impl Hands {
    fn of(identity: Identity) -> Self {
        let user = User::from_uid(identity.uid).ok().flatten();
        let name = user.and_then(|user| CString::new(user.name).ok());
        let groups = name.and_then(|name| getgrouplist(&name, identity.gid).ok());
        Self {
            uid: identity.uid,
            groups: groups.unwrap_or_else(|| vec![identity.gid]),
        }
    }

    /// Whether this user may rename what is in a folder, or make it where there is none.
    fn may_replace(&self, (_, folder, owner): &(PathBuf, Metadata, Option<u32>)) -> bool {
        if folder.uid() == self.uid.as_raw() {
            return true;
        }
        let right = if self.groups.contains(&Gid::from_raw(folder.gid())) {
            0o020
        } else {
            0o002
        };
        // In a sticky folder only its owner does, and that of the thing. What is not there yet is looked at once it is.
        let is_sticky = folder.mode() & 0o1000 != 0;
        folder.mode() & right != 0 && !(is_sticky && *owner != Some(self.uid.as_raw()))
    }
}

type Found = (&'static str, Resolved);

/// What is wrong when one is the other or inside of it, either way.
fn nested(one: Option<&Found>, other: Option<&Found>) -> Option<String> {
    let ((name, one), (other_name, other)) = (one?, other?);
    let relation = match (one.is_in(other), other.is_in(one)) {
        (true, true) => "is the folder of",
        (true, false) => "is inside of the folder of",
        (false, true) => "has inside of it the folder of",
        (false, false) => return None,
    };
    let reason = format!(
        "{} {relation} {other_name} ({}); choose a folder apart from it",
        one.path.display(),
        other.path.display()
    );
    Some(sentence(name, &reason))
}

/// A store below the state is the default; an instance whose folder is one of the agent's own working files is not, nor is a
/// state among an instance's objects.
fn in_each_others_files(state: &Resolved, name: &str, objects: &Resolved) -> Option<String> {
    let below = objects.path.strip_prefix(&state.path).ok();
    let first = below.and_then(|below| below.iter().next()?.to_str());
    let is_own = first.is_some_and(|first| {
        OWN_NAMES.contains(&first)
            || first.starts_with("index.")
            || Path::new(first).extension().is_some_and(|end| end == "new")
    });
    let reason = if is_own {
        "is among the working files of RUNTIME_STATE"
    } else if state.is_in(objects) {
        "has inside of it the folder of RUNTIME_STATE"
    } else {
        return None;
    };
    let reason = format!(
        "{} {reason} ({}); choose a folder apart from it",
        objects.path.display(),
        state.path.display()
    );
    Some(sentence(name, &reason))
}
