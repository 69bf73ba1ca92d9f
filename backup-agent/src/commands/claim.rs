//! Whose the instance is: one writer at a time, the one whom the head names. A runtime's restore claims it, and from then on
//! the writer before is fenced. That the head moves by compare-and-swap is its own business; here is who may move it.

use crate::{
    config::Config,
    error::Error,
    snapshot::{
        head::{self, Head, Seen, Swap},
        record::{FORMAT, Record},
    },
    state::State,
    store::{Store, probe},
};

/// Finds out once whether the store does what snapshots rest on, and remembers it.
pub async fn trust(config: &Config, store: &dyn Store, state: &mut State) -> Result<(), Error> {
    if state.facts.is_store_trusted {
        return Ok(());
    }
    match probe(store).await {
        Err(Error::Unfenced { .. }) if config.is_unfenced_allowed => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            state.facts.is_store_trusted = true;
            state.save()
        }
    }
}

/// The error of a writer that lost the head.
pub fn fenced(seen: Option<&Seen>, writer: &str, fork: Option<&str>) -> Error {
    Error::Fenced {
        holder: seen.map_or_else(
            || "nobody (it was removed)".to_owned(),
            |seen| seen.head.writer.clone(),
        ),
        writer: writer.to_owned(),
        kept: fork.map_or_else(String::new, |id| {
            format!("the snapshot is kept as the fork {id}; ")
        }),
    }
}

/// The head in the name of its next holder, who leaves that snapshot the newest.
pub fn claimed(snapshot: Option<(&str, u64)>, writer: &str) -> Head {
    Head {
        format: FORMAT,
        snapshot: snapshot.map(|(id, _)| id.to_owned()),
        sequence: snapshot.map_or(0, |(_, sequence)| sequence),
        writer: writer.to_owned(),
    }
}

/// Makes the head ours after a restore; a person's restore only remembers it. `None`: it moved.
pub async fn take_over(
    store: &dyn Store,
    seen: Option<Seen>,
    record: &Record,
    claimer: Option<&str>,
) -> Result<Option<Option<Seen>>, Error> {
    let Some(writer) = claimer else {
        return Ok(Some(seen));
    };
    // An older snapshot that was asked for by name does not become the newest one by being restored.
    let newest = match &seen {
        Some(seen) if seen.head.snapshot.is_some() => {
            (seen.head.snapshot.clone()).map(|id| (id, seen.head.sequence))
        }
        _ => Some((record.id.clone(), record.sequence)),
    };
    Ok(claim(store, seen, newest, writer).await?.map(Some))
}

/// Writes our name into the head. `None`: somebody moved it since it was seen.
pub async fn claim(
    store: &dyn Store,
    seen: Option<Seen>,
    snapshot: Option<(String, u64)>,
    writer: &str,
) -> Result<Option<Seen>, Error> {
    let snapshot = snapshot.as_ref();
    let next = claimed(
        snapshot.map(|(id, sequence)| (id.as_str(), *sequence)),
        writer,
    );
    if let Some(seen) = &seen
        && seen.head == next
    {
        return Ok(Some(seen.clone()));
    }
    Ok(match head::swap(store, seen.as_ref(), &next).await? {
        Swap::Moved(etag) => Some(Seen { head: next, etag }),
        Swap::Lost(_) => None,
    })
}

/// Remembers the head as it is after a restore: as ours, where it was claimed.
pub fn hold(state: &mut State, seen: Option<Seen>, claimer: Option<&str>) {
    if let Some(writer) = claimer {
        state.facts.writer = Some(writer.to_owned());
    }
    if let Some(seen) = seen {
        state.facts.hold(seen);
    } else {
        state.facts.head = None;
        state.facts.etag = None;
        state.facts.is_fenced = false;
    }
}
