"""A server that takes uploads as fast as the kernel gives them, for the rows that move bulk.

`python sink.py` prints its port and serves until it is stopped. Any request is answered with the number of octets in
its body; a target that ends in `crc` also with their CRC-32, for checking what arrived.
"""

from __future__ import annotations

import re
import socket
import sys
import threading
import zlib

BLOCK = 1 << 20
DISCARD = socket.MSG_TRUNC if sys.platform == "linux" else 0  # the kernel drops what it has instead of copying it to us


def serve(connection: socket.socket) -> None:
    """Answer requests with a known length, one after the other."""
    block = memoryview(bytearray(BLOCK))
    with connection:
        while octets := read_head(connection):
            head, _, begun = octets.partition(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            total = int(length[1]) if length else 0
            summing = head.partition(b"\r\n")[0].split()[1].endswith(b"crc")
            crc = zlib.crc32(begun)
            left = total - len(begun)
            while left > 0:
                count = connection.recv_into(block, min(left, BLOCK), 0 if summing else DISCARD)
                if not count:
                    return
                left -= count
                if summing:
                    crc = zlib.crc32(block[:count], crc)
            body = b"%d %d\n" % (total, crc) if summing else b"%d\n" % total
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


def read_head(connection: socket.socket) -> bytes:
    """A request's head and what came with it of the body; b"" when there is no further request."""
    octets = b""
    while b"\r\n\r\n" not in octets:
        more = connection.recv(65536)
        if not more:
            return b""
        octets += more
    return octets


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
