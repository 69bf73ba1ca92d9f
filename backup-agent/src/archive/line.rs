//! An entry's line in an index, as JSON. What a line says is refused here where no tree could have it, whoever wrote it:
//! everybody behind can take a path for a path. Whether lines follow each other rightly is for the merge to judge.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt,
    io::{self, Write},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Unexpected, Visitor},
};

use super::{
    entry::{Entry, Kind, LONGEST_NAME, LONGEST_PATH, Numbers, ROOT, Stamp, display},
    extents::Extents,
};
use crate::snapshot::id::{hex, unhex};

/// What begins the names of attributes that are the gateway's own.
pub const USER: &str = "user.";

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
    sha256: Option<Sum>,
    #[serde(skip_serializing_if = "<[_]>::is_empty", default)]
    extents: Cow<'a, Extents>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    xattrs: BTreeMap<String, String>,
    /// Those outside of `user.*`: readers that do not know this leave them out.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
    system: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    stamp: Option<Stamp>,
    #[serde(skip_serializing_if = "<[_]>::is_empty", default)]
    layers: Cow<'a, Numbers>,
}

/// A sha256 as 64 digits in lower case.
struct Sum([u8; 32]);

impl Serialize for Sum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;

        impl Visitor<'_> for Digits {
            type Value = Sum;

            fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
                to.write_str("64 hexadecimal digits in lower case")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Sum, E> {
                let sum = unhex(text).map(Sum);
                sum.ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_str(Digits)
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for this shape"
)]
fn is_zero(size: &u64) -> bool {
    *size == 0
}

/// Which index a line is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A layer's: what is about one disk and one snapshot has no meaning there, and is left out.
    Layer,
    /// One of this disk.
    Local,
}

impl Entry {
    /// Appends the line for an index, without its newline.
    pub fn append_line(&self, scope: Scope, to: &mut Vec<u8>) {
        let path: &[u8] = if self.path.is_empty() {
            ROOT.as_bytes()
        } else {
            &self.path
        };
        let (path, path64) = encode(path);
        let (link, link64) = self.link.as_deref().map_or((None, None), encode);
        let status = self.kind != Kind::Deleted;
        let encoded = |is_own: bool| {
            let attributes = self.xattrs.iter();
            attributes
                .filter(|(name, _)| name.starts_with(USER) == is_own)
                .map(|(name, value)| (name.clone(), BASE64_STANDARD.encode(value)))
                .collect()
        };
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
            sha256: self.sha256.map(Sum),
            extents: Cow::Borrowed(&self.extents),
            xattrs: encoded(true),
            system: encoded(false),
            stamp: self.stamp.filter(|_| scope == Scope::Local),
            layers: match scope {
                Scope::Layer => Cow::default(),
                Scope::Local => Cow::Borrowed(&self.layers),
            },
        };
        serde_json::to_writer(Pieces(to), &json).expect(
            "an entry has string keys and no failing serializer, and a buffer takes it all",
        );
    }

    /// Reads a line; the reason when it is not one.
    pub fn from_line(line: &[u8]) -> Result<Self, String> {
        let line: Line<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        let mut path = decode(line.path, line.path64)?.ok_or("a line has no path")?;
        if path == ROOT.as_bytes() {
            path.clear();
        } else if !is_possible(&path) {
            return Err(format!("{}: the name cannot be a file's", display(&path)));
        }
        let xattrs = line
            .xattrs
            .into_iter()
            .chain(line.system)
            .map(|(name, value)| match BASE64_STANDARD.decode(value) {
                Ok(value) => Ok((name, value)),
                Err(_) => Err(format!("the value of {name} is not base64")),
            });
        let target = decode(line.link, line.link64)?;
        let leads_on =
            |target: &Vec<u8>| (1..LONGEST_PATH).contains(&target.len()) && !target.contains(&0);
        if line.kind == Kind::Symlink && !target.as_ref().is_some_and(leads_on) {
            return Err(format!(
                "{}: the link has no possible target",
                display(&path)
            ));
        }
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
            link: target,
            sha256: line.sha256.map(|sum| sum.0),
            extents: line.extents.into_owned(),
            xattrs: xattrs.collect::<Result<_, _>>()?,
            stamp: line.stamp,
            layers: line.layers.into_owned(),
        })
    }
}

/// Appends the many pieces of a few bytes that JSON is written in: for each of them a call of musl's memcpy, which begins
/// with a string instruction, would take longer than all else.
struct Pieces<'a>(&'a mut Vec<u8>);

impl Write for Pieces<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        const FEW: usize = 24;
        if piece.len() > FEW {
            self.0.extend_from_slice(piece);
        } else {
            for byte in piece {
                self.0.push(*byte);
            }
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a tree can have this path: each component a name, none of which leads anywhere else.
fn is_possible(path: &[u8]) -> bool {
    let is_name = |name: &[u8]| {
        !matches!(name, b"" | b"." | b"..") && name.len() <= LONGEST_NAME && !name.contains(&0)
    };
    path.len() <= LONGEST_PATH && path.split(|byte| *byte == b'/').all(is_name)
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
    use smallvec::smallvec;

    use super::*;
    use crate::archive::extents::Extent;

    fn line(entry: &Entry) -> Vec<u8> {
        let mut line = Vec::new();
        entry.append_line(Scope::Local, &mut line);
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
            sha256: Some([0xab; 32]),
            extents: smallvec![
                Extent::Data {
                    layer: 0,
                    offset: 512,
                    length: 4,
                },
                Extent::Hole { length: 8 },
            ],
            xattrs: BTreeMap::from([("user.a".to_owned(), vec![0, 255])]),
            stamp: None,
            layers: Numbers::new(),
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
    fn a_line_of_a_layer_has_nothing_of_this_disk() {
        let plain = entry(b"dir/file");
        let local = Entry {
            stamp: Some(Stamp {
                ctime: 1,
                ino: 2,
                is_linked: false,
                is_unread: false,
                is_bare: false,
            }),
            layers: smallvec![0, 3],
            ..plain.clone()
        };
        assert_eq!(Entry::from_line(&line(&local)).as_ref(), Ok(&local));
        let mut of_layer = Vec::new();
        local.append_line(Scope::Layer, &mut of_layer);
        assert_eq!(Entry::from_line(&of_layer), Ok(plain));
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
    fn a_sum_has_64_digits_in_lower_case() {
        let good = String::from_utf8(line(&entry(b"file"))).expect("it is JSON");
        let sum = "ab".repeat(32);
        for bad in [
            "",
            "ab",
            &sum[1..],
            &sum.to_uppercase(),
            &format!("{sum}ab"),
        ] {
            let read = Entry::from_line(good.replace(&sum, bad).as_bytes());
            assert!(read.is_err(), "{bad} reads as {read:?}");
        }
    }

    #[test]
    fn what_can_be_no_path_is_refused_whoever_wrote_it() {
        let name = "n".repeat(LONGEST_NAME + 1);
        let path = "n/".repeat(LONGEST_PATH / 2) + "n";
        let paths = [
            "/etc", "a/", "a//b", "a/./b", "a/../b", "..", "a\0", &name, &path,
        ];
        for path in paths {
            for line in [
                line(&entry(path.as_bytes())),
                line(&Entry::deleted(path.into())),
            ] {
                let read = Entry::from_line(&line);
                assert!(read.is_err(), "{path:?} reads as {read:?}");
            }
        }
        let mut entry = entry(&path.as_bytes()[2..]);
        assert_eq!(Entry::from_line(&line(&entry)), Ok(entry.clone()));
        entry.kind = Kind::Symlink;
        let target = "n".repeat(LONGEST_PATH);
        for target in [None, Some(""), Some("a\0b"), Some(&target)] {
            entry.link = target.map(Into::into);
            assert!(Entry::from_line(&line(&entry)).is_err(), "{target:?}");
        }
    }

    #[test]
    fn names_of_any_bytes_read_back() {
        for path in [&b"\xff\xfe/\n"[..], b"", b"\"quoted\"", "ümläut".as_bytes()] {
            let mut entry = entry(path);
            entry.link = Some(b"\x80target".to_vec());
            assert_eq!(Entry::from_line(&line(&entry)), Ok(entry));
        }
    }
}
