//! The last bytes of a layer: a skippable frame that says where the index is, so that a layer can be read without its
//! record, and a snapshot be made again from layers alone.

use crate::snapshot::{id::hex, record::Layer};

/// First of the sixteen magic numbers of skippable frames (RFC 8878, section 3.1.2).
pub const SKIPPABLE: u32 = 0x184D_2A50;
/// Bytes of a skippable frame's own header.
pub const HEADER: usize = 8;
/// What the content begins with.
const MAGIC: &[u8; 8] = b"OCLAYER1";
/// Bytes of the whole footer.
pub const SIZE: usize = HEADER + 8 + 8 + 8 + 8 + 32;

/// Where the index is and what it must hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Of the index's compressed content in the object: behind the skippable frame's header.
    pub index_offset: u64,
    pub index_size: u64,
    /// Bytes of the tarball before compression.
    pub raw_size: u64,
    pub index_sha256: [u8; 32],
}

/// The header of a skippable frame with that many bytes of content.
pub fn skippable_header(content: u32) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(&SKIPPABLE.to_le_bytes());
    header[4..].copy_from_slice(&content.to_le_bytes());
    header
}

impl Footer {
    /// The footer's bytes; all numbers little-endian, as everywhere in zstd.
    pub fn to_bytes(&self) -> Vec<u8> {
        let content = u32::try_from(SIZE - HEADER).unwrap_or(u32::MAX);
        let mut bytes = skippable_header(content).to_vec();
        bytes.extend_from_slice(MAGIC);
        for number in [self.index_offset, self.index_size, self.raw_size] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.index_sha256);
        bytes
    }

    /// Whether the bytes are the footer of a layer with that record.
    pub fn matches(bytes: &[u8], layer: &Layer) -> bool {
        let (rest, sum) = bytes.split_at(bytes.len().saturating_sub(32));
        <[u8; 32]>::try_from(sum).is_ok_and(|index_sha256| {
            let footer = Self {
                index_offset: layer.index_offset,
                index_size: layer.index_size,
                raw_size: layer.raw_size,
                index_sha256,
            };
            footer.to_bytes().starts_with(rest) && hex(&index_sha256) == layer.index_sha256
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_footer_has_its_documented_shape_and_decoders_skip_it() {
        let footer = Footer {
            index_offset: 0x0102_0304,
            index_size: 5,
            raw_size: 6,
            index_sha256: [7; 32],
        };
        let bytes = footer.to_bytes();
        assert_eq!(bytes.len(), SIZE);
        assert_eq!(bytes[..8], [0x50, 0x2a, 0x4d, 0x18, 64, 0, 0, 0]);
        assert_eq!(bytes[8..16], *b"OCLAYER1");
        assert_eq!(bytes[16..24], [4, 3, 2, 1, 0, 0, 0, 0]);

        let mut stream = zstd::encode_all(&b"content"[..], 3).expect("in memory");
        stream.extend(&bytes);
        let mut text = String::new();
        zstd::Decoder::new(&stream[..])
            .and_then(|mut decoder| decoder.read_to_string(&mut text))
            .expect("a decoder ignores the footer");
        assert_eq!(text, "content");
    }
}
