//! The index of one layer, fetched to the local disk: it is checked against its sha256 and its header is judged before
//! anything is made of it. Its lines are judged by whoever reads them.

use std::{
    fs::File,
    io::{Seek, Write},
};

use sha2::{Digest, Sha256};

use super::{
    download::{RANGE, range},
    footer,
    frames::{Frame, LARGEST},
    index::{IndexReader, LayerHeader},
    spool::{Spool, SpoolReader},
};
use crate::{
    error::Error,
    snapshot::{
        id::hex,
        record::{FORMAT, Layer, layer_key},
    },
    store::{Store, twice},
};

/// What errors call the file.
const UNDER_WAY: &str = "the index under way in RUNTIME_STATE";

/// The index of a layer, on the local disk.
pub struct LayerIndex {
    pub layer: Layer,
    pub frames: Vec<Frame>,
    spool: Spool,
}

impl LayerIndex {
    /// Fetches the index of a layer into `file`, and judges it.
    pub async fn fetch(store: &dyn Store, layer: &Layer, mut file: File) -> Result<Self, Error> {
        twice(async || {
            file.rewind().map_err(Error::local("write", UNDER_WAY))?;
            fetch_index(store, layer, &mut file).await
        })
        .await?;
        Self::judge(layer, file)
    }

    /// An index in a file, if its header can be believed.
    pub fn judge(layer: &Layer, file: File) -> Result<Self, Error> {
        let mut index = Self {
            layer: layer.clone(),
            frames: Vec::new(),
            spool: Spool::new(file),
        };
        let mut lines = index.open()?;
        index.frames = check_header(layer, lines.line().ok().flatten())?.frames;
        Ok(index)
    }

    /// Its lines behind the header.
    pub fn lines(&self) -> Result<IndexReader<SpoolReader>, Error> {
        let mut lines = self.open()?;
        match lines.line() {
            Ok(Some(_)) => Ok(lines),
            Ok(None) | Err(_) => Err(self.layer.damaged("its index has no header")),
        }
    }

    fn open(&self) -> Result<IndexReader<SpoolReader>, Error> {
        IndexReader::new(self.spool.reader()).map_err(Error::local("set up", "zstd"))
    }
}

async fn fetch_index(store: &dyn Store, layer: &Layer, file: &mut File) -> Result<(), Error> {
    let key = layer_key(&layer.id);
    let mut sum = Sha256::new();
    let mut at = 0;
    while at < layer.index_size {
        let length = RANGE.min(layer.index_size - at);
        let bytes = range(store, &key, layer.index_offset + at, length).await?;
        sum.update(&bytes);
        file.write_all(&bytes)
            .map_err(Error::local("write", UNDER_WAY))?;
        at += length;
    }
    let got = hex(&sum.finalize());
    if got == layer.index_sha256 {
        return Ok(());
    }
    let want = &layer.index_sha256;
    let reason = format!("expected sha256 {want} of its index, got {got}");
    Err(layer.damaged(reason))
}

/// Judges the first line of a layer's index.
fn check_header(layer: &Layer, line: Option<&[u8]>) -> Result<LayerHeader, Error> {
    let header: LayerHeader = line
        .and_then(|line| serde_json::from_slice(line).ok())
        .ok_or_else(|| layer.damaged("its index has no header"))?;
    if header.format != FORMAT {
        let reason = format!("it has format {}, this tool reads {FORMAT}", header.format);
        return Err(layer.damaged(reason));
    }
    if header.layers.first() != Some(&layer.id) {
        return Err(layer.damaged("its index is another layer's"));
    }
    let too_large = |frame: &&Frame| frame.raw.max(frame.stored) > LARGEST as u64;
    if header.frames.iter().find(too_large).is_some() {
        return Err(layer.damaged("a frame is larger than any writer makes it"));
    }
    let stored: u64 = header.frames.iter().map(|frame| frame.stored).sum();
    if stored + footer::HEADER as u64 != layer.index_offset {
        return Err(layer.damaged("its frames do not end where its index begins"));
    }
    Ok(header)
}
