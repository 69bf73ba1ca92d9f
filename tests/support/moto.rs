//! A real S3 server of somebody else's making: moto, with atomic conditional writes. It checks no signature.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, Weak};

use crate::wait::until;

/// A server; it is killed when this is dropped.
pub struct Moto {
    pub address: SocketAddr,
    child: Child,
}

impl Moto {
    /// The server that the tests of this program share. It lives for as long as one of them holds it.
    pub fn shared() -> Arc<Self> {
        Self::shared_on(Ipv4Addr::LOCALHOST)
    }

    /// Likewise, on another address of this machine; the first test decides on which.
    pub fn shared_on(address: Ipv4Addr) -> Arc<Self> {
        static SHARED: Mutex<Weak<Moto>> = Mutex::new(Weak::new());
        let mut shared = SHARED
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let moto = Arc::new(Self::start(address));
            *shared = Arc::downgrade(&moto);
            moto
        })
    }

    fn start(address: Ipv4Addr) -> Self {
        let program = std::env::var_os("E2E_MOTO_SERVER")
            .expect("E2E_MOTO_SERVER is not set; run the tests with `make test`, which installs the S3 server and sets it");
        let address = TcpListener::bind((address, 0))
            .and_then(|listener| listener.local_addr())
            .expect("there is a free port");
        let child = Command::new(&program)
            .args([
                "-H",
                &address.ip().to_string(),
                "-p",
                &address.port().to_string(),
            ])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", program.display()));
        let moto = Self { address, child };
        until("moto answers", || TcpStream::connect(address).is_ok());
        moto
    }

    pub fn make_bucket(&self, bucket: &str) {
        let (status, _) = self.request("PUT", &format!("/{bucket}"), b"");
        assert_eq!(status, 200, "moto makes a bucket");
    }

    /// Every object of a bucket.
    pub fn objects(&self, bucket: &str) -> BTreeMap<String, Vec<u8>> {
        let keys = self.keys(bucket).into_iter();
        keys.map(|key| (key.clone(), self.get(bucket, &key)))
            .collect()
    }

    pub fn keys(&self, bucket: &str) -> Vec<String> {
        let (status, page) = self.request("GET", &format!("/{bucket}?list-type=2"), b"");
        assert_eq!(status, 200, "moto lists a bucket");
        let page = String::from_utf8(page).expect("XML is UTF-8");
        let keys = page
            .split("<Key>")
            .skip(1)
            .filter_map(|rest| rest.split_once("</Key>"));
        keys.map(|(key, _)| key.to_owned()).collect()
    }

    pub fn get(&self, bucket: &str, key: &str) -> Vec<u8> {
        let (status, bytes) = self.request("GET", &format!("/{bucket}/{key}"), b"");
        assert_eq!(status, 200, "moto gives {key}");
        bytes
    }

    pub fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        assert_eq!(
            self.request("PUT", &format!("/{bucket}/{key}"), bytes).0,
            200,
            "moto takes {key}"
        );
    }

    pub fn remove(&self, bucket: &str, key: &str) {
        assert_eq!(
            self.request("DELETE", &format!("/{bucket}/{key}"), b"").0,
            204,
            "moto removes {key}"
        );
    }

    pub fn begin_upload(&self, bucket: &str, key: &str) {
        let (status, _) = self.request("POST", &format!("/{bucket}/{key}?uploads"), b"");
        assert_eq!(status, 200, "moto begins an upload of {key}");
    }

    /// Uploads in parts that were neither completed nor aborted.
    pub fn open_uploads(&self, bucket: &str) -> usize {
        let (status, page) = self.request("GET", &format!("/{bucket}?uploads"), b"");
        assert_eq!(status, 200, "moto lists uploads");
        String::from_utf8_lossy(&page).matches("<UploadId>").count()
    }

    fn request(&self, method: &str, target: &str, body: &[u8]) -> (u16, Vec<u8>) {
        let mut stream = TcpStream::connect(self.address).expect("moto listens");
        let length = body.len();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=anyone/20260101/us-east-1/s3/aws4_request\r\nContent-Length: {length}\r\n\r\n",
            self.address
        );
        stream
            .write_all(&[head.as_bytes(), body].concat())
            .expect("moto takes a request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("moto answers");
        let end = answer
            .windows(4)
            .position(|four| four == b"\r\n\r\n")
            .expect("an answer has a head");
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|text| text.parse().ok())
            .expect("an answer has a status");
        (status, answer.split_off(end + 4))
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // It has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
