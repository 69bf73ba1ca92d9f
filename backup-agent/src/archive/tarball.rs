//! Tar headers in the pax format, as GNU tar and bsdtar read them (POSIX.1-2017 pax, "pax Extended Header"; the GNU tar
//! manual, "Storing Sparse Files", for format 1.0; star(1) for `SCHILY.xattr`).

use std::sync::LazyLock;

use tar::{EntryType, Header};

use super::{
    entry::{Entry, Kind},
    line::USER,
};

/// Bytes of a block; everything in a tarball is padded to it.
pub const BLOCK: u64 = 512;
/// What fits into the seven octal digits of a ustar id field.
const LARGEST_ID: u32 = 0o7_777_777;
/// What fits into the eleven octal digits of a ustar size or time field.
const LARGEST_NUMBER: u64 = 0o77_777_777_777;

/// Type of a deletion's member: a volume label, which tar lists and never unpacks. As a regular file it could not be told from
/// a file of the tree that has such a name, and a name with the prefix may be longer than a file system takes.
const WHITEOUT: u8 = b'V';

/// Zeros from a length to the next block.
pub fn padding(length: u64) -> &'static [u8] {
    const ZEROS: [u8; 512] = [0; 512];
    let missing = length.next_multiple_of(BLOCK) - length;
    &ZEROS[..usize::try_from(missing).unwrap_or(0)]
}

/// The end of a tarball.
pub const TRAILER: [u8; 1024] = [0; 1024];

/// Header blocks of an entry. `segments`: for a file with holes, where its data are, as offset and length; the map of
/// them is part of what is returned, the data follow.
pub fn header(entry: &Entry, segments: Option<&[(u64, u64)]>) -> Vec<u8> {
    let mut header = Header::new_ustar();
    // Room for what nearly every entry has.
    let mut pax = Vec::with_capacity(64);
    let mut map = Vec::new();

    let mut name = entry.path.clone();
    match entry.kind {
        Kind::Dir => {
            if name.is_empty() {
                name.push(b'.');
            }
            name.push(b'/');
            header.set_entry_type(EntryType::Directory);
        }
        Kind::File => header.set_entry_type(EntryType::Regular),
        Kind::Deleted => header.set_entry_type(EntryType::new(WHITEOUT)),
        Kind::Symlink => header.set_entry_type(EntryType::Symlink),
        Kind::Hardlink => header.set_entry_type(EntryType::Link),
    }

    let mut stored = if entry.kind == Kind::File {
        entry.size
    } else {
        0
    };
    if let Some(segments) = segments {
        map = sparse_map(segments, entry.size);
        stored = map.len() as u64 + segments.iter().map(|(_, length)| length).sum::<u64>();
        record(&mut pax, "GNU.sparse.major", b"1");
        record(&mut pax, "GNU.sparse.minor", b"0");
        record(&mut pax, "GNU.sparse.name", &name);
        record(
            &mut pax,
            "GNU.sparse.realsize",
            entry.size.to_string().as_bytes(),
        );
        // For readers that do not know the format: the file that they unpack should look like what it is.
        let base = name.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        name = [&b"GNUSparseFile.0/"[..], base].concat();
    }

    let fields = header
        .as_ustar_mut()
        .expect("the header was made as a ustar header");
    if !fill(&mut fields.name, &name) {
        record(&mut pax, "path", &name);
    }
    if let Some(link) = &entry.link
        && !fill(&mut fields.linkname, link)
    {
        record(&mut pax, "linkpath", link);
    }
    header.set_mode(entry.plain_mode());
    for (key, id, set) in [
        ("uid", entry.uid, Header::set_uid as fn(&mut Header, u64)),
        ("gid", entry.gid, Header::set_gid),
    ] {
        if id > LARGEST_ID {
            record(&mut pax, key, id.to_string().as_bytes());
        }
        set(&mut header, u64::from(id.min(LARGEST_ID)));
    }
    if stored > LARGEST_NUMBER {
        record(&mut pax, "size", stored.to_string().as_bytes());
    }
    header.set_size(stored.min(LARGEST_NUMBER));
    let seconds = entry.mtime.div_euclid(1_000_000_000);
    let nanos = entry.mtime.rem_euclid(1_000_000_000);
    if nanos != 0 || seconds < 0 {
        record(&mut pax, "mtime", decimal_time(entry.mtime).as_bytes());
    }
    header.set_mtime(u64::try_from(seconds).unwrap_or(0).min(LARGEST_NUMBER));
    let own = entry.xattrs.iter();
    for (name, value) in own.filter(|(name, _)| name.starts_with(USER)) {
        // The key ends at the first `=`; GNU tar's way around that.
        let name = name.replace('%', "%25").replace('=', "%3D");
        record(&mut pax, &format!("SCHILY.xattr.{name}"), value);
    }
    header.set_cksum();

    let mut blocks = Vec::with_capacity(3 * 512 + map.len());
    if !pax.is_empty() {
        let mut extended = EXTENDED.clone();
        extended.set_size(pax.len() as u64);
        extended.set_cksum();
        blocks.extend_from_slice(extended.as_bytes());
        blocks.extend_from_slice(&pax);
        blocks.extend_from_slice(padding(pax.len() as u64));
    }
    blocks.extend_from_slice(header.as_bytes());
    blocks.extend_from_slice(&map);
    blocks
}

/// The header of an extended header, without its size: nearly every entry has one.
static EXTENDED: LazyLock<Header> = LazyLock::new(|| {
    let mut extended = Header::new_ustar();
    extended.set_entry_type(EntryType::XHeader);
    let fields = extended
        .as_ustar_mut()
        .expect("the header was made as a ustar header");
    fill(&mut fields.name, b"PaxHeaders/entry");
    extended.set_mode(0o644);
    extended.set_uid(0);
    extended.set_gid(0);
    extended.set_mtime(0);
    extended
});

/// Puts as much of the text into a field as it takes; whether that is all of it.
fn fill(field: &mut [u8], text: &[u8]) -> bool {
    let taken = text.len().min(field.len());
    field[..taken].copy_from_slice(&text[..taken]);
    taken == text.len()
}

/// Appends `<length> <key>=<value>\n`, where the length counts itself.
fn record(pax: &mut Vec<u8>, key: &str, value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + digits(length) != length {
        length += 1;
    }
    pax.extend_from_slice(format!("{length} {key}=").as_bytes());
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

/// How many a number has, above 0.
fn digits(number: usize) -> usize {
    number.ilog10() as usize + 1
}

/// Seconds with nine decimals; before 1970 the whole number is negative, not its parts.
fn decimal_time(nanos: i64) -> String {
    let sign = if nanos < 0 { "-" } else { "" };
    let nanos = nanos.unsigned_abs();
    format!(
        "{sign}{}.{:09}",
        nanos / 1_000_000_000,
        nanos % 1_000_000_000
    )
}

/// The map in front of a sparse file's data: a count, then offset and length of each run, one number a line.
fn sparse_map(segments: &[(u64, u64)], size: u64) -> Vec<u8> {
    let mut runs = segments.to_vec();
    // A hole at the end is told by an empty run there.
    if runs.last().is_none_or(|(at, length)| at + length < size) {
        runs.push((size, 0));
    }
    let mut map = format!("{}\n", runs.len()).into_bytes();
    for (offset, length) in runs {
        map.extend_from_slice(format!("{offset}\n{length}\n").as_bytes());
    }
    map.extend_from_slice(padding(map.len() as u64));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pax_record_counts_its_own_length() {
        for length in 0..2_000 {
            let mut pax = Vec::new();
            record(&mut pax, "path", &vec![b'x'; length]);
            let text = String::from_utf8(pax).expect("ASCII");
            let (count, _) = text.split_once(' ').expect("a count");
            assert_eq!(count.parse(), Ok(text.len()), "{length}");
        }
    }

    #[test]
    fn times_before_1970_are_negative_as_a_whole() {
        assert_eq!(decimal_time(-1), "-0.000000001");
        assert_eq!(decimal_time(-1_500_000_000), "-1.500000000");
        assert_eq!(decimal_time(1_500_000_000), "1.500000000");
    }
}
