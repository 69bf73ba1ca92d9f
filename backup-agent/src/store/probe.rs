//! Finds out, on an object of its own, whether a store does what snapshots rest on: it gives ranges, and it writes under a
//! condition exactly when that is met.

use super::{PROBE, Store, StoreError};
use crate::{
    error::{Chain, Error},
    log,
    snapshot::id,
};

const FIRST: &[u8] = b"the first content of the probe";
const SECOND: &[u8] = b"another content of the same object";
/// A tag that no object has.
const OTHER_TAG: &str = "\"00000000000000000000000000000000\"";

/// The error of a store that cannot be trusted or used.
pub async fn probe(store: &dyn Store) -> Result<(), Error> {
    let suffix = id::random_hex::<8>().map_err(Error::local("read", "random bytes"))?;
    let key = format!("{PROBE}{suffix}");
    let found = try_out(store, &key).await;
    if let Err(error) = store.delete(&key).await
        && found.is_ok()
    {
        log::warn(
            "probe left on the store: it cannot be deleted",
            &[
                ("key", key.as_str().into()),
                ("error", Chain(&error).to_string().into()),
            ],
        );
    }
    found
}

async fn try_out(store: &dyn Store, key: &str) -> Result<(), Error> {
    let failed = || {
        |error| match error {
            StoreError::NoRanges => Error::Unusable {
                lacks: "it gives the whole object when it is asked for a range",
            },
            other => Error::store("probe", key)(other),
        }
    };
    match store.put_if(key, FIRST.to_vec(), None).await {
        // A retry after a lost answer meets the first try's own object.
        Ok(_) | Err(StoreError::Conflict) => {}
        Err(error) => return Err(failed()(error)),
    }
    let (bytes, tag) = store.get(key).await.map_err(failed())?;
    let range = store.get_range(key, 4, 5).await.map_err(failed())?;
    if bytes != FIRST || range[..] != FIRST[4..9] {
        return Err(Error::Unusable {
            lacks: "it does not give back what was written",
        });
    }
    let mut tag = tag;
    for is_last in [false, true] {
        match store.put_if(key, SECOND.to_vec(), Some(&tag)).await {
            Ok(_) => break,
            Err(StoreError::Conflict) => {}
            Err(error) => return Err(failed()(error)),
        }
        // The first try may have taken effect while its answer was lost, or the tag came altered.
        let (bytes, now) = store.get(key).await.map_err(failed())?;
        if bytes == SECOND {
            break;
        }
        if is_last {
            return Err(Error::Unusable {
                lacks: "it refuses a write under an If-Match that matches",
            });
        }
        tag = now;
    }
    let tries = [
        (None, "it replaced an object under If-None-Match"),
        (
            Some(OTHER_TAG),
            "it replaced an object under an If-Match that does not match",
        ),
    ];
    for (expected, broken) in tries {
        match store.put_if(key, FIRST.to_vec(), expected).await {
            Err(StoreError::Conflict) => {}
            Ok(_) => return Err(Error::Unfenced { broken }),
            Err(error) => return Err(failed()(error)),
        }
    }
    Ok(())
}
