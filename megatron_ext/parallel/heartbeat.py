"""Tell the ranks of each other without torch: a line of TCP from every rank to rank 0.

What a hung run needs: nothing here is a collective, takes the main thread, or blocks. torch's own store would not do:
a request to a store whose process is stopped waits for ever, and one that is gone prints a stack of C++ per rank
(seen with torch 2.13).

The messages are lines: a word and a JSON value.
    beat VALUE   any rank: it lives, and this is what it does
    bye WHY      the sender leaves; why, or an empty string where all is well
    lost MAP     rank 0: ranks that are gone for a cause of their own, and which
    end TEXT     rank 0: leave at once
"""

from __future__ import annotations

import contextlib
import json
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.errors import LaunchError
from megatron_ext.parallel import groups

_CONNECT_SECONDS = 60.0
_HELLO_SECONDS = 5.0
_MOST_PENDING = 1 << 16
GONE_WITHOUT_A_WORD = "its process ended without a word"


@dataclass(slots=True, kw_only=True)
class Peer:
    """Another rank, as far as it was heard of."""

    rank: int
    node: str
    pid: int
    heard: float
    """When it was last heard of, by this process's monotonic clock."""
    word: str = "null"
    """What it said of itself last, in JSON."""
    state: Literal["here", "left", "lost"] = "here"
    """left: it said good-bye, and nothing was wrong with it."""

    @property
    def silent_seconds(self) -> float:
        return time.monotonic() - self.heard


class _Line:
    """A non-blocking connection that carries lines of text both ways."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self._received = bytearray()
        self._pending = bytearray()

    def send(self, kind: str, value: Any) -> None:
        """Send, or keep what does not go out now; where nothing goes out for long, later beats are dropped."""
        if kind != "beat" or len(self._pending) < _MOST_PENDING:
            self._pending += f"{kind} {json.dumps(value)}\n".encode()
        with contextlib.suppress(OSError):  # a closed one is noticed in `receive`, a full one takes it next time
            while self._pending:
                del self._pending[: self.connection.send(self._pending)]

    def receive(self) -> tuple[list[str], bool]:
        """Return the whole lines that came, and whether the other side is still there."""
        here = True
        try:
            while chunk := self.connection.recv(1 << 16):
                self._received += chunk
            here = False
        except BlockingIOError:
            pass
        except OSError:
            here = False
        *lines, rest = self._received.split(b"\n")
        self._received = bytearray(rest)
        return [line.decode(errors="replace") for line in lines], here


class Heartbeat:
    """This rank's lines: rank 0 has one to every rank, the others one to rank 0. For one thread at a time."""

    def __init__(self, *, rank: int, world_size: int, node: str, pid: int) -> None:
        self.rank = rank
        self.node = node
        self.world_size = world_size
        self.peers: dict[int, Peer] = {}
        """Whom this rank has a line to."""
        self.lost: dict[int, str] = {}
        """Ranks that are gone for a cause of their own, and the cause; anywhere in the run."""
        self.end: str | None = None
        """Why rank 0 says to leave."""
        self.names: list[str] = []
        """Every rank of the run, as a person would look for it."""
        self._hello = {"rank": rank, "node": node, "pid": pid}
        self._lines: dict[int, _Line] = {}
        self._selector = selectors.DefaultSelector()

    def connect(self, address: str) -> None:
        """Open the lines; `address` is where rank 0 can be reached. Every rank calls it.

        Raises:
            LaunchError: a rank cannot reach rank 0; on every rank.
        """
        self.names = groups.gather_objects(f"rank {self.rank} ({self.node}, pid {self._hello['pid']})")
        listener = None
        with groups.together():
            if self.rank == 0:
                listener = _listener(self.world_size)
        port = listener.getsockname()[1] if listener else 0
        port, token = groups.broadcast_object((port, secrets.token_hex(16)))
        with groups.together():
            if listener is None:
                self._reach(address, port, token)
            else:
                with listener:
                    self._accept(listener, token)

    def _accept(self, listener: socket.socket, token: str) -> None:
        deadline = time.monotonic() + _CONNECT_SECONDS
        while missing := [rank for rank in range(1, self.world_size) if rank not in self.peers]:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise LaunchError(
                    f"rank 0: no line came from rank {missing[0]} ({len(missing)} are missing) to TCP port "
                    f"{listener.getsockname()[1]} within {_CONNECT_SECONDS:.0f} s; open the ports between the nodes."
                ) from None
            hello = _read_hello(connection, _HELLO_SECONDS)
            if hello is None or hello.pop("token", None) != token:  # a stranger
                connection.close()
            else:
                connection.settimeout(_HELLO_SECONDS)
                connection.sendall(json.dumps(self._hello).encode() + b"\n")
                self._add(connection, hello)

    def _reach(self, address: str, port: int, token: str) -> None:
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            connection.sendall(json.dumps({**self._hello, "token": token}).encode() + b"\n")
            # Rank 0 answers one after another, and waits a little for each that says nothing.
            hello = _read_hello(connection, _CONNECT_SECONDS)
        except OSError as error:
            hello, why = None, error.strerror or str(error)
        else:
            why = "it answers otherwise than rank 0 does"
        if hello is None:
            raise LaunchError(
                f"rank {self.rank} on {self._hello['node']}: rank 0 cannot be reached at {address}, TCP port {port} "
                f"({why}); open the ports between the nodes."
            )
        self._add(connection, hello)

    def _add(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        rank = hello["rank"]
        self.peers[rank] = Peer(**hello, heard=time.monotonic())
        self._lines[rank] = _Line(connection)
        self._selector.register(connection, selectors.EVENT_READ, rank)

    def beat(self, word: Any) -> None:
        """Say what this rank does."""
        self._tell("beat", word)

    def poll(self) -> None:
        """Take note of what came since."""
        news = False
        for key, _ in self._selector.select(0):
            peer = self.peers[key.data]
            lines, here = self._lines[peer.rank].receive()
            for line in lines:
                news |= self._take(peer, line)
            if not here:
                news |= self._drop(peer)
        if news and self.rank == 0:
            self._tell("lost", self.lost)

    def end_all(self, text: str) -> None:
        """Let every rank leave at once. Rank 0 calls it."""
        self._tell("end", text)

    def close(self, why: str = "") -> None:
        """Leave; `why` says what went wrong with this rank itself, where something did."""
        self._tell("bye", why)
        for line in self._lines.values():
            line.connection.close()
        self._lines.clear()
        self._selector.close()

    def _tell(self, kind: str, value: Any) -> None:
        for line in self._lines.values():
            line.send(kind, value)

    def _take(self, peer: Peer, line: str) -> bool:
        """Take one message; say whether it tells of a loss."""
        kind, _, value = line.partition(" ")
        peer.heard = time.monotonic()
        if kind == "beat":
            peer.word = value
        elif kind == "end":
            self.end = json.loads(value)
        elif kind == "lost":
            self.lost |= {int(rank): why for rank, why in json.loads(value).items()}
        elif kind == "bye":
            why = json.loads(value)
            peer.state = "lost" if why else "left"
            if why:
                self.lost[peer.rank] = why
            return bool(why)
        return False

    def _drop(self, peer: Peer) -> bool:
        self._selector.unregister(self._lines[peer.rank].connection)
        self._lines.pop(peer.rank).connection.close()
        if peer.state != "here":
            return False
        peer.state = "lost"
        self.lost[peer.rank] = GONE_WITHOUT_A_WORD
        return True


def _listener(world_size: int) -> socket.socket:
    """Listen on a free port of this machine, on both families where it has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world_size)
    return socket.create_server(("", 0), backlog=world_size)


def _read_hello(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    connection.settimeout(seconds)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 4096 and (chunk := connection.recv(1)):
            text += chunk
        hello = json.loads(text)
        known = {"rank", "node", "pid"}.issubset(hello)
    except (OSError, ValueError, TypeError):
        return None
    return hello if known else None
