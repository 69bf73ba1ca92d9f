//! Every reader of bytes that somebody else may have written, as one function each: what the fuzz targets in `tests/fuzz/`
//! call. An assertion here is a promise to the rest of the program that holds for any input.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is how a broken promise is told"
)]

use std::{ffi::OsString, fs::File, io::Write};

use clap::Parser;
use rustix::fs::{MemfdFlags, memfd_create};
use sha2::{Digest, Sha256};

use crate::{
    archive::{
        entry::{Entry, compare},
        footer::Footer,
        frames::{Frame, LARGEST},
        index::IndexReader,
        layer_index::LayerIndex,
        line::Scope,
        merge::{Merge, Source},
        reader::unpack_all,
    },
    cli::Cli,
    config::Config,
    snapshot::{
        head, history,
        id::hex,
        record::{self, Layer, Record},
        sealed,
    },
};

const ID: &str = "20260102T030405006Z-89abcdef";

/// A head, then records, a line each. As they are, and under a right checksum, which no mutation would ever find.
pub fn records(bytes: &[u8]) {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let mut tip = None;
    for bytes in lines.next().into_iter().flat_map(as_it_is_and_sealed) {
        if let Ok(head) = head::judge(&bytes) {
            assert_eq!(head::judge(&sealed::seal(&head)).ok().as_ref(), Some(&head));
            tip = head.snapshot;
        }
    }
    let mut records: Vec<Record> = Vec::new();
    for bytes in lines.flat_map(as_it_is_and_sealed) {
        let known: Option<Record> = sealed::open("any", &bytes).ok();
        let id = known.map_or_else(|| ID.to_owned(), |record| record.id);
        if let Ok(record) = record::judge(&id, &bytes) {
            let again = record::judge(&id, &sealed::seal(&record));
            assert_eq!(again.ok().as_ref(), Some(&record));
            records.push(record);
        }
    }
    let tip = tip.or_else(|| Some(records.first()?.id.clone()));
    assert!(history::line(&records, tip.as_deref()).len() <= records.len());
    let sizes = records.iter().flat_map(|record| &record.layers);
    let _: u64 = sizes.map(|layer| layer.size).sum();
}

fn as_it_is_and_sealed(bytes: &[u8]) -> [Vec<u8>; 2] {
    let body = bytes.strip_suffix(b"}").unwrap_or(bytes);
    [bytes.to_vec(), sealed::close(body.to_vec())]
}

/// The lines of the indexes of two layers, with a form feed between them: they are merged.
pub fn index(bytes: &[u8]) {
    // As the store has it: compressed, or something else.
    if let Ok(mut lines) = IndexReader::new(bytes) {
        while let Ok(Some(_)) = lines.entry() {}
    }
    let mut indexes = Vec::new();
    for lines in bytes.split(|byte| *byte == b'\x0c').take(2) {
        let packed = zstd::encode_all(lines, 1).expect("it is packed in memory");
        let layer = layer(&packed);
        let Ok(index) = LayerIndex::judge(&layer, file(&packed)) else {
            return;
        };
        if let Ok(mut source) = Source::new(&index) {
            while let Ok(Some(entry)) = source.take() {
                let mut line = Vec::new();
                entry.append_line(Scope::Local, &mut line);
                assert_eq!(Entry::from_line(&line).as_ref(), Ok(&entry));
                assert!(!entry.display().chars().any(char::is_control));
                let _ = entry.weight();
            }
        }
        indexes.push(index);
    }
    let Ok(mut merge) = Merge::new(&indexes) else {
        return;
    };
    let mut last: Option<Vec<u8>> = None;
    while let Ok(Some(word)) = merge.next() {
        let path = word.entry.path;
        assert!(last.is_none_or(|last| compare(&last, &path).is_lt()));
        last = Some(path);
    }
}

/// A layer's end and its frames. One byte says how many rows the frame table has; each takes five: raw bytes, a flag, stored
/// bytes. What is left is the object.
pub fn layer_object(bytes: &[u8]) {
    let any = layer(bytes);
    Footer::matches(bytes, &any);
    let Some((&rows, rest)) = bytes.split_first() else {
        return;
    };
    let Some((rows, object)) = rest.split_at_checked(usize::from(rows) * 5) else {
        return;
    };
    let mut at = 0;
    let mut table = Vec::new();
    let mut wanted = Vec::new();
    for row in rows.chunks_exact(5) {
        let stored = usize::from(u16::from_le_bytes([row[3], row[4]]));
        let Some(bytes) = object.get(at..at + stored) else {
            break;
        };
        at += stored;
        let raw = u64::from(u16::from_le_bytes([row[0], row[1]])) << (row[2] >> 4);
        table.push(Frame {
            // A header with more is refused.
            raw: raw.min(LARGEST as u64),
            stored: stored as u64,
            sha256: hex(&Sha256::digest(bytes)),
        });
        wanted.push(row[2] & 1 == 1);
    }
    for (frame, raw) in unpack_all(&any, &table, &wanted, object) {
        assert!(raw.is_none_or(|raw| raw.len() as u64 == frame.raw && raw.len() <= LARGEST));
    }
}

/// Arguments, then `NAME=value` for each variable, a line each.
pub fn settings(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines();
    let words = lines.next().unwrap_or_default().split_whitespace();
    let Ok(cli) = Cli::try_parse_from(["backup-agent"].into_iter().chain(words)) else {
        return;
    };
    let variables: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once('=')).collect();
    let _ = Config::load(&cli, |name| {
        // Whatever file somebody made up is not read.
        let mut known = variables.iter().filter(|_| !name.ends_with("_FILE"));
        let (_, value) = known.find(|(known, _)| *known == name)?;
        Some(OsString::from(*value))
    });
}

/// A layer whose index is these bytes, behind as many frames as the index says.
fn layer(index: &[u8]) -> Layer {
    Layer {
        id: ID.to_owned(),
        size: index.len() as u64,
        raw_size: 0,
        sha256: String::new(),
        index_offset: 8,
        index_size: index.len() as u64,
        index_sha256: hex(&Sha256::digest(index)),
    }
}

fn file(content: &[u8]) -> File {
    let file = memfd_create("index", MemfdFlags::CLOEXEC).expect("the kernel has memory");
    let mut file = File::from(file);
    file.write_all(content).expect("the kernel has memory");
    file
}
