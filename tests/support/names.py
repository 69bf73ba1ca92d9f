"""Runs a command where the name store.test has an address of one family and the question for the other one fails.

usage: unshare --net --mount names.py FAMILY(4|6) FAILURE(noerror|formerr|servfail|nxdomain|notimp|refused|silent) COMMAND...
A store that is empty answers at port 9000 of that address.
"""
import fcntl
import http.server
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading

family, failure, command = sys.argv[1], sys.argv[2], sys.argv[3:]
CODES = {"noerror": 0, "formerr": 1, "servfail": 2, "nxdomain": 3, "notimp": 4, "refused": 5}
A, AAAA = 1, 28

subprocess.run(["mount", "--make-rprivate", "/"], check=True)
with tempfile.NamedTemporaryFile("w", suffix=".conf", delete=False) as conf:
    conf.write("nameserver 127.0.0.1\noptions timeout:2 attempts:2\n")
os.chmod(conf.name, 0o644)
subprocess.run(["mount", "--bind", conf.name, "/etc/resolv.conf"], check=True)
os.unlink(conf.name)
# SIOCSIFFLAGS with IFF_UP: the loopback device of a new network is down.
control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"lo", 1))


def answer(question, kind):
    good = A if family == "4" else AAAA
    if kind == good:
        address = socket.inet_aton("127.0.0.1") if good == A else socket.inet_pton(socket.AF_INET6, "::1")
        record = b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 60, len(address)) + address
        return struct.pack(">HHHHH", 0x8180, 1, 1, 0, 0) + question + record
    if failure == "silent":
        return None
    return struct.pack(">HHHHH", 0x8180 | CODES[failure], 1, 0, 0, 0) + question


def serve_names(server):
    while True:
        data, asker = server.recvfrom(2048)
        end = 12
        while data[end]:
            end += data[end] + 1
        text = answer(data[12 : end + 5], struct.unpack(">H", data[end + 1 : end + 3])[0])
        if text:
            server.sendto(data[:2] + text, asker)


class Store(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        is_listing = "list-type=2" in self.path
        body = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>" if is_listing else b"<Error><Code>NoSuchKey</Code></Error>"
        self.send_response(200 if is_listing else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET if family == "4" else socket.AF_INET6


names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.bind(("127.0.0.1", 53))
threading.Thread(target=serve_names, args=(names,), daemon=True).start()
store = Server(("127.0.0.1" if family == "4" else "::1", 9000), Store)
threading.Thread(target=store.serve_forever, daemon=True).start()
sys.exit(subprocess.run(command).returncode)
