//! Binds the address of the API: on both families where it is every address or loopback.
//!
//! Invariant: on this port `localhost` leads to us only. Otherwise the gateway's user could listen on the family that we leave
//! free, and be given the service token.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::net::sockopt::set_ipv6_v6only;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::error::Error;

/// Connections that the kernel holds until they are taken, if its `somaxconn` allows (listen(2)). One too many is dropped, and
/// tried again by whoever wants it after a second.
const BACKLOG: u32 = 4096;

/// The kernel's buffer of a connection, each way (it doubles this for its own needs: socket(7)).
const BUFFER: u32 = 32 * 1024;

/// With port 0 the kernel chooses one that is free in one family; the other family may have it taken.
const ATTEMPTS: usize = 16;

pub struct Listeners {
    first: TcpListener,
    second: Option<TcpListener>,
    /// Why the other family has no listener.
    pub missing: Option<io::Error>,
}

impl Listeners {
    pub fn bind(address: SocketAddr) -> Result<Self, Error> {
        // `::ffff:127.0.0.1` is an address of IPv4.
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        let mut attempts = if address.port() == 0 { ATTEMPTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::bind_once(address) {
                Err(Error::PortTaken { .. }) if attempts > 0 => {}
                result => return result,
            }
        }
    }

    fn bind_once(address: SocketAddr) -> Result<Self, Error> {
        let failed = |address| move |source| Error::Listen { address, source };
        let first = listen(address).map_err(|error| explain(address, error))?;
        let port = first.local_addr().map_err(failed(address))?.port();
        let twin = twin(address.ip()).map(|ip| SocketAddr::new(ip, port));
        let (second, missing) = match twin.map(|twin| (twin, listen(twin))) {
            None => (None, None),
            Some((_, Ok(listener))) => (Some(listener), None),
            Some((_, Err(error))) if is_without_family(&error) => (None, Some(error)),
            Some((twin, Err(error))) => return Err(explain(twin, error)),
        };
        Ok(Self {
            first,
            second,
            missing,
        })
    }

    /// The address that was asked for, with the port that it has, and its twin.
    pub fn addresses(&self) -> io::Result<(SocketAddr, Option<SocketAddr>)> {
        let second = self.second.as_ref().map(TcpListener::local_addr);
        Ok((self.first.local_addr()?, second.transpose()?))
    }

    pub async fn accept(&self) -> io::Result<TcpStream> {
        let second = async {
            match &self.second {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        let accepted = tokio::select! {
            accepted = self.first.accept() => accepted,
            accepted = second => accepted,
        };
        accepted.map(|(stream, _)| stream)
    }
}

/// The same place in the other family.
fn twin(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Some(Ipv6Addr::UNSPECIFIED.into()),
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Some(Ipv6Addr::LOCALHOST.into()),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Some(Ipv4Addr::UNSPECIFIED.into()),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some(Ipv4Addr::LOCALHOST.into()),
        _ => None,
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        // IPv4 has a listener of its own, or was not asked for.
        set_ipv6_v6only(&socket, true)?;
        socket
    };
    // The port of the last life, whose connections the kernel still remembers. With another listener it is refused all the same.
    socket.set_reuseaddr(true)?;
    // Connections inherit both: the kernel's own sizes grow to megabytes for each whose client does not read, or is not read.
    socket.set_send_buffer_size(BUFFER)?;
    socket.set_recv_buffer_size(BUFFER)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// The kernel has no such family, or no loopback address in it: then nobody else can listen there either.
fn is_without_family(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    error.kind() == ErrorKind::AddrNotAvailable || code == Some(libc::EAFNOSUPPORT)
}

fn explain(address: SocketAddr, source: io::Error) -> Error {
    match source.kind() {
        ErrorKind::AddrInUse => Error::PortTaken { address },
        _ => Error::Listen { address, source },
    }
}
