//! One path of a snapshot, and its line in an index.

use std::{borrow::Cow, cmp::Ordering, collections::BTreeMap};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{Deserialize, Serialize};

use crate::snapshot::id::hex;

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Dir,
    File,
    Symlink,
    /// Another name of a file that comes earlier in the walk.
    Hardlink,
    /// Nothing any more: hides what older layers have under this path. Has no other member.
    Deleted,
}

/// A run of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(Option<u32>, u64, u64)", into = "(Option<u32>, u64, u64)")]
pub enum Extent {
    /// In the raw tar stream of a layer, by its number in the index's own list.
    Data {
        layer: u32,
        offset: u64,
        length: u64,
    },
    /// Zeros that take no room.
    Hole { length: u64 },
}

impl From<(Option<u32>, u64, u64)> for Extent {
    fn from((layer, offset, length): (Option<u32>, u64, u64)) -> Self {
        match layer {
            Some(layer) => Self::Data {
                layer,
                offset,
                length,
            },
            None => Self::Hole { length },
        }
    }
}

impl From<Extent> for (Option<u32>, u64, u64) {
    fn from(extent: Extent) -> Self {
        match extent {
            Extent::Data {
                layer,
                offset,
                length,
            } => (Some(layer), offset, length),
            Extent::Hole { length } => (None, 0, length),
        }
    }
}

/// One path with all that a restore needs to make it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative, components joined by `/`; empty for the root.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits, with set-id and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub mtime: i64,
    /// Logical bytes of a file, holes included; 0 for other types.
    pub size: u64,
    /// Target of a symbolic link as it is written there, or path of the file that a hard link is a name of.
    pub link: Option<Vec<u8>>,
    /// Of a file's data extents in order.
    pub sha256: Option<String>,
    pub extents: Vec<Extent>,
    /// The `user.*` attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// Only in the local index: what tells a changed file from an unchanged one. Without it the entry counts as changed.
    pub stamp: Option<Stamp>,
    /// Only in the local index: the layers that have a word on this path, oldest first, by their numbers in the snapshot's
    /// list. The last one's word is this entry.
    pub layers: Vec<u32>,
}

/// The part of a file's status that changes with it and cannot be set by its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Nanoseconds since the epoch.
    pub ctime: i64,
    pub ino: u64,
    /// The file has more than one name.
    pub is_linked: bool,
}

/// Where a file's bytes are: its runs of data (offset and length, ascending) one after the other from `start` on, holes
/// between them.
pub fn extents(runs: &[(u64, u64)], size: u64, start: u64) -> Vec<Extent> {
    let mut extents = Vec::with_capacity(runs.len());
    let (mut at, mut stored) = (0, start);
    for &(offset, length) in runs {
        if offset > at {
            extents.push(Extent::Hole {
                length: offset - at,
            });
        }
        if length > 0 {
            extents.push(Extent::Data {
                layer: 0,
                offset: stored,
                length,
            });
        }
        stored += length;
        at = offset + length;
    }
    if size > at {
        extents.push(Extent::Hole { length: size - at });
    }
    extents
}

/// The runs of data that extents stand for, as offset in the file and length.
pub fn runs(extents: &[Extent]) -> Vec<(u64, u64)> {
    let mut offset = 0;
    let mut runs = Vec::new();
    for extent in extents {
        let (Extent::Data { length, .. } | Extent::Hole { length }) = *extent;
        if matches!(extent, Extent::Data { .. }) {
            runs.push((offset, length));
        }
        // An index from the store may claim anything.
        offset = u64::saturating_add(offset, length);
    }
    runs
}

/// Order of a depth-first walk with sorted directories: component by component, by bytes.
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    // A name has no byte below the separator, once that counts as the lowest of all.
    let rank = |byte: u8| if byte == b'/' { 0 } else { byte };
    let common = a.len().min(b.len());
    match a[..common].iter().zip(&b[..common]).find(|(a, b)| a != b) {
        Some((a, b)) => rank(*a).cmp(&rank(*b)),
        None => a.len().cmp(&b.len()),
    }
}

/// About the bytes that an entry with `data` bytes of content takes in a tar stream: a header, nearly always an extended
/// one too, and what fills the last block.
pub fn weight(data: u64) -> u64 {
    const HEADERS: u64 = 1536;
    const BLOCK: u64 = 512;
    data.div_ceil(BLOCK)
        .saturating_mul(BLOCK)
        .saturating_add(HEADERS)
}

/// An entry as JSON. Names that are not UTF-8 go, in base64, under keys of their own.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none", default)]
    path: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    path64: Option<String>,
    #[serde(rename = "type")]
    kind: Kind,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    mode: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    uid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    gid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    mtime: Option<i64>,
    #[serde(skip_serializing_if = "is_zero", default)]
    size: u64,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    link: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    link64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    sha256: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty", default)]
    extents: Cow<'a, [Extent]>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    xattrs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    stamp: Option<Stamp>,
    #[serde(skip_serializing_if = "<[_]>::is_empty", default)]
    layers: Cow<'a, [u32]>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for this shape"
)]
fn is_zero(size: &u64) -> bool {
    *size == 0
}

/// The root's path in an index: an empty name is easily taken for a missing one.
const ROOT: &str = ".";

impl Entry {
    /// A path with nothing under it: a deletion, or the start of another entry.
    pub fn deleted(path: Vec<u8>) -> Self {
        Self {
            path,
            kind: Kind::Deleted,
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: 0,
            size: 0,
            link: None,
            sha256: None,
            extents: Vec::new(),
            xattrs: BTreeMap::new(),
            stamp: None,
            layers: Vec::new(),
        }
    }

    /// Bytes of a file's content, holes left out.
    pub fn data(&self) -> u64 {
        let lengths = self.extents.iter().map(|extent| match extent {
            Extent::Data { length, .. } => *length,
            Extent::Hole { .. } => 0,
        });
        lengths.fold(0, u64::saturating_add)
    }

    /// About the bytes that it takes in a tar stream.
    pub fn weight(&self) -> u64 {
        weight(self.data())
    }

    /// Appends the line for an index, without its newline.
    pub fn append_line(&self, to: &mut Vec<u8>) {
        let path: &[u8] = if self.path.is_empty() {
            ROOT.as_bytes()
        } else {
            &self.path
        };
        let (path, path64) = encode(path);
        let (link, link64) = self.link.as_deref().map_or((None, None), encode);
        let status = self.kind != Kind::Deleted;
        let json = Line {
            path,
            path64,
            kind: self.kind,
            mode: status.then_some(self.mode),
            uid: status.then_some(self.uid),
            gid: status.then_some(self.gid),
            mtime: status.then_some(self.mtime),
            size: self.size,
            link,
            link64,
            sha256: self.sha256.as_deref().map(Cow::Borrowed),
            extents: Cow::Borrowed(&self.extents),
            xattrs: self
                .xattrs
                .iter()
                .map(|(name, value)| (name.clone(), BASE64_STANDARD.encode(value)))
                .collect(),
            stamp: self.stamp,
            layers: Cow::Borrowed(&self.layers),
        };
        serde_json::to_writer(to, &json).expect(
            "an entry has string keys and no failing serializer, and a buffer takes it all",
        );
    }

    /// Reads a line; the reason when it is not one.
    pub fn from_line(line: &[u8]) -> Result<Self, String> {
        let line: Line<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        let mut path = decode(line.path, line.path64)?.ok_or("a line has no path")?;
        if path == ROOT.as_bytes() {
            path.clear();
        }
        let xattrs =
            line.xattrs
                .into_iter()
                .map(|(name, value)| match BASE64_STANDARD.decode(value) {
                    Ok(value) => Ok((name, value)),
                    Err(_) => Err(format!("the value of {name} is not base64")),
                });
        let missing = || "a line has no mode, owner or time".to_owned();
        let status = if line.kind == Kind::Deleted {
            None
        } else {
            let owner = line.uid.zip(line.gid);
            let status = line.mode.zip(owner).zip(line.mtime);
            Some(status.ok_or_else(missing)?)
        };
        let ((mode, (uid, gid)), mtime) = status.unwrap_or_default();
        Ok(Self {
            path,
            kind: line.kind,
            mode,
            uid,
            gid,
            mtime,
            size: line.size,
            link: decode(line.link, line.link64)?,
            sha256: line.sha256.map(Cow::into_owned),
            extents: line.extents.into_owned(),
            xattrs: xattrs.collect::<Result<_, _>>()?,
            stamp: line.stamp,
            layers: line.layers.into_owned(),
        })
    }

    /// The path for people.
    pub fn display(&self) -> String {
        display(&self.path)
    }
}

/// A path for people: control characters and what is not UTF-8 are escaped, so that a name cannot play tricks on a terminal.
pub fn display(path: &[u8]) -> String {
    if path.is_empty() {
        return ROOT.to_owned();
    }
    let mut text = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text.extend(["\\x", &hex(&[*byte])]);
        }
    }
    text
}

fn encode(bytes: &[u8]) -> (Option<Cow<'_, str>>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(Cow::Borrowed(text)), None),
        Err(_) => (None, Some(BASE64_STANDARD.encode(bytes))),
    }
}

fn decode(text: Option<Cow<'_, str>>, base64: Option<String>) -> Result<Option<Vec<u8>>, String> {
    match (text, base64) {
        (Some(text), None) => Ok(Some(text.into_owned().into_bytes())),
        (None, Some(base64)) => match BASE64_STANDARD.decode(base64) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(_) => Err("a name is not base64".to_owned()),
        },
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err("a name is given twice".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(entry: &Entry) -> Vec<u8> {
        let mut line = Vec::new();
        entry.append_line(&mut line);
        line
    }

    fn entry(path: &[u8]) -> Entry {
        Entry {
            path: path.to_vec(),
            kind: Kind::File,
            mode: 0o644,
            uid: 1000,
            gid: 1000,
            mtime: 1_700_000_000_123_456_789,
            size: 12,
            link: None,
            sha256: Some("ab".repeat(32)),
            extents: vec![
                Extent::Data {
                    layer: 0,
                    offset: 512,
                    length: 4,
                },
                Extent::Hole { length: 8 },
            ],
            xattrs: BTreeMap::from([("user.a".to_owned(), vec![0, 255])]),
            stamp: None,
            layers: vec![],
        }
    }

    #[test]
    fn a_line_is_plain_json_and_reads_back() {
        let line = line(&entry(b"dir/file"));
        assert_eq!(
            String::from_utf8_lossy(&line),
            format!(
                r#"{{"path":"dir/file","type":"file","mode":420,"uid":1000,"gid":1000,"mtime":1700000000123456789,"size":12,"sha256":"{}","extents":[[0,512,4],[null,0,8]],"xattrs":{{"user.a":"AP8="}}}}"#,
                "ab".repeat(32)
            )
        );
        assert_eq!(Entry::from_line(&line), Ok(entry(b"dir/file")));
    }

    #[test]
    fn a_deletion_has_a_path_and_nothing_else() {
        let line = line(&Entry::deleted(b"gone".to_vec()));
        assert_eq!(
            String::from_utf8_lossy(&line),
            r#"{"path":"gone","type":"deleted"}"#
        );
        assert_eq!(
            Entry::from_line(&line),
            Ok(Entry::deleted(b"gone".to_vec()))
        );
        let bare = Entry::from_line(br#"{"path":"there","type":"dir","mode":448}"#);
        assert!(bare.is_err(), "{bare:?}");
    }

    #[test]
    fn names_of_any_bytes_read_back() {
        for path in [&b"\xff\xfe/\n"[..], b"", b"\"quoted\"", "ümläut".as_bytes()] {
            let mut entry = entry(path);
            entry.link = Some(b"\x80target".to_vec());
            assert_eq!(Entry::from_line(&line(&entry)), Ok(entry));
        }
    }

    #[test]
    fn paths_sort_as_a_walk_meets_them() {
        let walk: [&[u8]; 8] = [
            b"", b"a", b"a/\x01", b"a/b", b"a/b/c", b"a/c", b"a\x01", b"a.b",
        ];
        for pair in walk.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn extents_cover_the_file_with_its_holes() {
        let data = |offset, length| Extent::Data {
            layer: 0,
            offset,
            length,
        };
        let hole = |length| Extent::Hole { length };
        for (all, size, want) in [
            (&[(0, 10)][..], 10, vec![data(512, 10)]),
            (&[], 10, vec![hole(10)]),
            (&[], 0, vec![]),
            (
                &[(4, 2), (8, 1)],
                12,
                vec![hole(4), data(512, 2), hole(2), data(514, 1), hole(3)],
            ),
        ] {
            assert_eq!(extents(all, size, 512), want);
            assert_eq!(runs(&want), all);
        }
    }

    #[test]
    fn names_cannot_write_to_a_terminal() {
        assert_eq!(display(b"a\x1b[2Jb\xff"), "a\\u{1b}[2Jb\\xff");
        assert_eq!(display(b""), ".");
    }
}
