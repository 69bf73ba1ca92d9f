//! What stands between an agent and its store (`front.py`): a server of TLS, or a proxy.

use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use crate::openclaw::repository;

/// Where it listens, and what it was asked. It ends when this is dropped.
pub struct Front {
    pub port: u16,
    child: Child,
    output: BufReader<ChildStdout>,
}

/// A certificate of the tests, or a key and a certificate.
pub fn certificate(name: &str) -> PathBuf {
    repository().join(format!("tests/support/tls/{name}.pem"))
}

impl Front {
    /// A server of TLS with this certificate in front of a port.
    pub fn tls(name: &str, upstream: u16) -> Self {
        let path = certificate(name).display().to_string();
        Self::start(&["tls", &path, &upstream.to_string()])
    }

    /// Likewise, one that speaks TLS 1.2 at most.
    pub fn old_tls(name: &str, upstream: u16) -> Self {
        let path = certificate(name).display().to_string();
        Self::start(&["tls", &path, &upstream.to_string(), "TLSv1_2"])
    }

    /// A proxy that leads everywhere to one port, to those who show this.
    pub fn proxy(upstream: u16, authorization: Option<&str>) -> Self {
        let upstream = upstream.to_string();
        let arguments = [Some("proxy"), Some(&upstream), authorization];
        Self::start(&arguments.into_iter().flatten().collect::<Vec<_>>())
    }

    fn start(arguments: &[&str]) -> Self {
        let mut child = Command::new("python3")
            .arg(repository().join("tests/support/front.py"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 can be run");
        let mut output = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut line = String::new();
        output.read_line(&mut line).expect("it says its port");
        let port = line.trim().parse().expect("it says its port");
        Self {
            port,
            child,
            output,
        }
    }

    /// The next request that a proxy got, without its query.
    pub fn asked(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it runs");
        line.trim_end().to_owned()
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        // It has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
