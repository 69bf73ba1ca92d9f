//! Connections to the service: straight, or through a proxy, by a tunnel for https and by whole addresses for http.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::{
    Uri,
    rt::{Read, ReadBufCursor, Write},
};
use hyper_util::{
    client::legacy::connect::{Connected, Connection, HttpConnector},
    rt::TokioIo,
};
use tokio::net::TcpStream;
use tower_service::Service;

use super::{http::innermost, proxy::Proxy, resolve::Resolver};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Connects to where an address leads.
#[derive(Clone)]
pub struct Connector {
    pub tcp: HttpConnector<Resolver>,
    pub proxy: Option<Proxy>,
}

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = Failure;
    type Future = Pin<Box<dyn Future<Output = Result<Stream, Failure>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.tcp.poll_ready(context).map_err(Into::into)
    }

    fn call(&mut self, target: Uri) -> Self::Future {
        let proxy = self.proxy.clone();
        let first = proxy.as_ref().map_or(&target, |proxy| &proxy.address);
        let connecting = self.tcp.call(first.clone());
        Box::pin(async move {
            let connected = connecting.await;
            let Some(proxy) = proxy else {
                let (tcp, is_proxied) = (connected?, false);
                return Ok(Stream { tcp, is_proxied });
            };
            let mut tcp = connected.map_err(|error| proxy.failed(&innermost(&error)))?;
            let is_proxied = target.scheme_str() == Some("http");
            if !is_proxied {
                proxy.tunnel(tcp.inner_mut(), &target).await?;
            }
            Ok(Stream { tcp, is_proxied })
        })
    }
}

/// A connection, and whether a proxy reads what is sent on it.
pub struct Stream {
    tcp: TokioIo<TcpStream>,
    is_proxied: bool,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        self.tcp.connected().proxy(self.is_proxied)
    }
}

impl Read for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(context, buffer)
    }
}

impl Write for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(context, bytes)
    }
}
