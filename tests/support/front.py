"""What stands between an agent and its store: a server of TLS, or a proxy. Prints its port, then what it is asked.

usage: front.py tls CERTIFICATE UPSTREAM-PORT [NEWEST-VERSION] | front.py proxy UPSTREAM-PORT [AUTHORIZATION]
"""
import select
import socket
import ssl
import sys
import threading

mode, upstream = sys.argv[1], int(sys.argv[3 if sys.argv[1] == "tls" else 2])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)


def join(stream, first=b"", header=b""):
    """Passes on what either side sends, in one thread: a connection of TLS is not for two."""
    server = socket.create_connection(("127.0.0.1", upstream))
    try:
        server.sendall(first)
        while True:
            is_pending = isinstance(stream, ssl.SSLSocket) and stream.pending()
            ready = [stream] if is_pending else select.select([stream, server], [], [])[0]
            for source, target in ((stream, server), (server, stream)):
                if source in ready:
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is server and header:
                        data, header = data.replace(b"\r\n", b"\r\n" + header, 1), b""
                    target.sendall(data)
    except OSError:
        pass
    finally:
        stream.close()
        server.close()


def tls(stream):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[2])
    if len(sys.argv) > 4:
        context.maximum_version = ssl.TLSVersion[sys.argv[4]]
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
        # One request for each connection: the next one would have to be changed, too.
        join(stream, b"\r\n".join(lines), b"Connection: close\r\n")


while True:
    stream, _ = listener.accept()
    threading.Thread(target=tls if mode == "tls" else proxy, args=(stream,), daemon=True).start()
