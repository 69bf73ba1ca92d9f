//! Names to addresses, as the C library finds them. musl fails for both families when the question for one of them gets an
//! error, as some forwarders answer AAAA; then each family is asked alone.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
    vec,
};

use dns_lookup::{AddrInfoHints, getaddrinfo};
use hyper_util::client::legacy::connect::dns::Name;
use nix::libc::{AF_INET, AF_INET6, AF_UNSPEC, SOCK_STREAM};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tower_service::Service;

/// How long both families may take together before each is asked alone: a question that gets no answer takes musl 10 s.
const TOGETHER: Duration = Duration::from_secs(2);

/// The resolver of a pool of connections.
#[derive(Clone, Default)]
pub struct Resolver {
    /// The family that had to be asked alone the last time; 0 for none.
    alone: Arc<AtomicI32>,
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (host, alone) = (name.as_str().to_owned(), Arc::clone(&self.alone));
        Box::pin(async move { find(&host, &alone).await.map(Vec::into_iter) })
    }
}

async fn find(host: &str, alone: &AtomicI32) -> Result<Vec<SocketAddr>, io::Error> {
    let known = alone.load(Ordering::Relaxed);
    if known != 0
        && let Ok(found) = joined(ask(host, known)).await
    {
        return Ok(found);
    }
    let mut both = joined(ask(host, AF_UNSPEC));
    let failed = match timeout(TOGETHER, &mut both).await {
        Ok(Ok(found)) => return Ok(found),
        Ok(Err(error)) => Some(error),
        Err(_) => None,
    };
    let is_over = failed.is_some();
    let (mut v4, v6) = (joined(ask(host, AF_INET)), joined(ask(host, AF_INET6)));
    // A host without a route for IPv6 still gets addresses of it, so those of IPv4 come first.
    tokio::select! {
        Ok(found) = &mut both, if !is_over => return Ok(found),
        Ok(found) = &mut v4 => {
            alone.store(AF_INET, Ordering::Relaxed);
            return Ok(found);
        }
        else => {}
    }
    match v6.await {
        Ok(found) => {
            alone.store(AF_INET6, Ordering::Relaxed);
            Ok(found)
        }
        Err(error) => Err(failed.unwrap_or(error)),
    }
}

/// Asks on a thread of its own, which nobody waits for when the time bound runs out.
fn ask(host: &str, family: i32) -> JoinHandle<Result<Vec<SocketAddr>, io::Error>> {
    let host = host.to_owned();
    spawn_blocking(move || {
        let hints = AddrInfoHints {
            address: family,
            socktype: SOCK_STREAM,
            ..AddrInfoHints::default()
        };
        let found = getaddrinfo(Some(&host), None, Some(hints)).map_err(io::Error::from)?;
        found.map(|info| Ok(info?.sockaddr)).collect()
    })
}

type Asked = Pin<Box<dyn Future<Output = Result<Vec<SocketAddr>, io::Error>> + Send>>;

/// No address is no answer.
fn joined(asked: JoinHandle<Result<Vec<SocketAddr>, io::Error>>) -> Asked {
    Box::pin(async move {
        let found = asked.await.map_err(io::Error::other)??;
        if found.is_empty() {
            return Err(io::Error::other("the name has no address"));
        }
        Ok(found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_this_machine_is_found_and_one_of_nobody_is_an_error() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let alone = AtomicI32::new(0);
            let found = find("localhost", &alone)
                .await
                .expect("it is in /etc/hosts");
            assert!(
                found.iter().all(|address| address.ip().is_loopback()),
                "{found:?}"
            );
            // A name with a byte that none has: answered without asking anybody.
            assert!(find("no name\0", &alone).await.is_err());
            assert_eq!(alone.load(Ordering::Relaxed), 0);
        });
    }
}
