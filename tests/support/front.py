"""What stands between an agent and its store: a server of TLS, or a proxy. Prints its port, then what it is asked.

usage: front.py tls CERTIFICATE UPSTREAM-PORT | front.py proxy UPSTREAM-PORT [AUTHORIZATION]
"""
import socket
import ssl
import sys
import threading

mode, upstream = sys.argv[1], int(sys.argv[3 if sys.argv[1] == "tls" else 2])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)


def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def join(stream, first=b""):
    server = socket.create_connection(("127.0.0.1", upstream))
    server.sendall(first)
    threading.Thread(target=pump, args=(server, stream), daemon=True).start()
    pump(stream, server)


def tls(stream):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2])
    try:
        stream = context.wrap_socket(stream, server_side=True)
    except OSError:
        return
    join(stream)


def proxy(stream):
    head = b""
    while b"\r\n\r\n" not in head:
        data = stream.recv(65536)
        if not data:
            return
        head += data
    lines = head.split(b"\r\n")
    method, target, _ = lines[0].split(b" ")
    wanted = [line for line in lines if line.lower().startswith(b"proxy-authorization: ")]
    # The query has the signature.
    print(method.decode(), target.split(b"?")[0].decode(), flush=True)
    values = [line.split(b": ", 1)[1].decode() for line in wanted]
    if values != sys.argv[3:]:
        stream.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    elif method == b"CONNECT":
        stream.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        join(stream)
    else:
        path = b"/" + target.split(b"/", 3)[3]
        lines[0] = lines[0].replace(target, path)
        server = socket.create_connection(("127.0.0.1", upstream))
        server.sendall(b"\r\n".join(lines))
        threading.Thread(target=pump, args=(stream, server), daemon=True).start()
        # One request for each connection: the next one would have to be changed, too.
        stream.sendall(server.recv(65536).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        pump(server, stream)


while True:
    stream, _ = listener.accept()
    threading.Thread(target=tls if mode == "tls" else proxy, args=(stream,), daemon=True).start()
