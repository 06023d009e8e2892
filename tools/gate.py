"""Who may ask `tools.serve`: connections that send what they announce, and callers that are no web
page of another site."""

import asyncio
import os
import shutil
import sys
import time
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

try:
    import resource
except ImportError:  # Windows has none
    resource = None

HEAD_SECONDS = 10  # in which the head of a request has to come
CONNECTIONS = 512  # beyond which the oldest that is not waiting for an answer is closed


def own_hosts(address: str, allowed: list[str]) -> set[str]:
    """The names by which a server may be asked that listens at an address; none: by any. Behind a
    name of its own a web page could ask what only this machine may reach."""
    own = {address, "localhost", "127.0.0.1", "::1"} if ip_address(address).is_loopback else set()
    return own | {name.lower() for name in allowed}


def check_sender(request: Request, hosts: set[str]) -> None:
    """HTTPException for a request that a web page of another site has made."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if hosts and name not in hosts:
        raise HTTPException(403, f"the Host {host[:100]!r} is none of {', '.join(sorted(hosts))}: "
                            "start with --allow-host")
    if origin is not None and origin.partition("://")[2] != host:
        raise HTTPException(403, f"the Origin {origin[:100]!r} is another site")


def open_files() -> int:
    """How many files a process may have open; each connection is one."""
    if resource is None:
        return sys.maxsize
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if most == resource.RLIM_INFINITY else most


class Connection(H11Protocol):
    """It is closed where no head of a request comes; and where there are too many, the oldest makes
    room, of those whose request has not come to `waits`: they are silent, or send, or do not read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.since = time.monotonic()
        self.before = None  # what it asked when it was last looked at
        self.loop.call_later(HEAD_SECONDS, self.look)
        alive = [one for one in self.connections if not one.transport.is_closing()]
        if len(alive) > min(CONNECTIONS, open_files() // 2):
            others = [one for one in alive if not (one.scope and one.scope["state"].get("waits"))]
            min(others, key=lambda one: one.since).transport.abort()

    def look(self) -> None:
        if self.conn.their_state is h11.IDLE and self.cycle is self.before:
            self.transport.abort()
        if not self.transport.is_closing():
            self.before = self.cycle
            self.loop.call_later(HEAD_SECONDS, self.look)

    def send_400_response(self, msg: str) -> None:
        """To what is no HTTP."""
        self.config.app.state.refuse(400, msg)
        with suppress(h11.LocalProtocolError):  # what came before it has been answered
            super().send_400_response(msg)
        self.transport.close()


class Server(uvicorn.Server):
    """It ends when what is under way is done, and at a second signal at once."""

    def __init__(self, app: FastAPI, folder: Path):
        super().__init__(uvicorn.Config(app, http=Connection, ws="none", log_level="error",
                                        access_log=False, lifespan="off",
                                        # so many are let in before those too many are closed
                                        backlog=min(open_files() // 16, 128)))
        self.folder = folder

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit:
            self.leave(128 + sig)
        self.should_exit = True

    def leave(self, status: int) -> None:
        """End the process, whatever its threads do."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(status)
