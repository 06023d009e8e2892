"""An OpenAI-compatible chat endpoint: asked with patience, heard as CoTs.

What an endpoint does with a question, and what becomes of it:

    an answer                              a CoT, with the thought that stands beside it put back, or
                                           `as_written`
    an answer that was broken off          asked again, as below
    HTTP 429                               all wait, as long as it says, and ask again
    HTTP 408, 409, 425, 5xx, no answer     asked again, `retries` times, with longer and longer pauses
    HTTP 400 or 422 that names a setting   asked without it, or by its other name; if answered, always
    HTTP 400, 403, 413, 415, 422, 451      `Refused`: this question alone has no answer
    a refusal, a filter, nothing           `Refused`
    an answer with a secret of ours in it  `Refused`
    anything else, such as HTTP 401        DataError: no question has
"""

import base64
import ipaddress
import json
import logging
import math
import os
import random
import re
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from data import DataError, error_context
from tools.completion import Refused, Unsound, read_completion

try:
    import httpx2
except ImportError:  # only an endpoint needs it
    httpx2 = None

REFUSED = (400, 403, 413, 415, 422, 451)
MISUSED = (400, 422)  # of these, by a setting too
AGAIN = (408, 409, 425)  # and all from 500
PATIENCE = 3600.0  # seconds without room (HTTP 429) for anybody, after which the command stops
LARGEST = 1 << 26  # bytes of an answer
USUAL_KEY = "OPENAI_API_KEY"
SECRET = 6  # characters that a secret has at least: "none" or "EMPTY" is none
# What a setting that an endpoint refuses is called instead; None: it is left out.
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "temperature": None}


class Failed(Refused):
    """No answer came, however often it was asked."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Reply(NamedTuple):
    """What came back from a request."""

    status: int  # of HTTP; 0: nothing came
    problem: str  # what to say of it where it is no answer
    pause: float = 0.0  # seconds for which it asks
    text: str = ""


class Endpoint:
    """Asks one model of an endpoint, from any thread, as the module says.

    url: up to /v1; a name and password in it, and what follows a "?", are used and never shown, and
    neither is the key. timeout: seconds that a request may take; retries: attempts after the first;
    patience: seconds for which all may wait for room. Raises DataError if the address, the key or
    what the environment says of proxies and certificates cannot be used."""

    def __init__(self, url: str, model: str, key: str | None = None, max_tokens: int = 4096,
                 temperature: float = 1.0, timeout: float = 120.0, retries: int = 10,
                 patience: float = PATIENCE):
        if httpx2 is None:
            raise DataError("an endpoint needs httpx2: pip install -r tools/requirements.txt")
        for name in ("httpx2", "httpcore2"):  # which log addresses and headers
            logging.getLogger(name).setLevel(logging.WARNING)
        check_key(key)
        self.shown = shown(url)
        parts = check_address(url, self.shown)
        self.secrets = secrets_of(parts, key)
        self.model, self.timeout, self.retries, self.patience = model, timeout, retries, patience
        path = parts.path.rstrip("/") + "/chat/completions"
        host = parts.netloc.rpartition("@")[2]
        self.target = parts._replace(netloc=host, path=path, fragment="").geturl()
        self.headers = {"Content-Type": "application/json"}
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        elif "@" in parts.netloc:
            self.headers["Authorization"] = f"Basic {basic(parts)}"
        self.client, self.way_there = open_client(parts, timeout)
        self.settings = {"max_tokens": max_tokens, "temperature": temperature}
        self.as_written = False  # whether the content of an answer is all of a CoT (`read_completion`)
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.room_at = 0.0  # before which nobody asks, of time.monotonic()
        self.full_since: float | None = None  # from when it has had room for nobody

    def limit(self, max_tokens: int, temperature: float) -> None:
        """Ask for CoTs of another length, at another temperature, from now on."""
        values = {"max_tokens": max_tokens, "max_completion_tokens": max_tokens, "temperature": temperature}
        with self.lock:
            self.settings = {name: values[name] for name in self.settings}

    def ask(self, content: list[dict], beside: dict | None = None) -> dict:
        """The answer to a message: its cot, and whether it is truncated (`read_completion`). What is
        `beside` the message goes before the settings. Raises Refused where this message has none,
        DataError where none has, Stopped after `stop`."""
        settings = usual = self.settings
        failures = 0
        turned_away = 0
        while True:
            self.wait_for_room()
            reply = self.post(content, settings | (beside or {}))
            problem = reply.problem
            if reply.status == 429:
                turned_away += 1
                self.make_wait(reply.pause or min(2.0**turned_away / 2, 30.0), problem)
                continue
            self.full_since = None
            if reply.status == 200:
                try:
                    answer = read_completion(reply.text, self.as_written)
                    if settings is not usual:
                        self.settle_on(settings)
                    if self.scrubbed(answer["cot"]) != answer["cot"]:  # to be neither shown nor changed
                        raise Refused("the answer has the key in it, or what is secret in the address")
                    return answer
                except Unsound as error:
                    problem = f"{error} ({problem})"
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    problem = f"an answer that is no chat completion ({problem})"
            elif reply.status in REFUSED:
                settings = without_refused(settings, reply.text) if reply.status in MISUSED else None
                if settings is None:
                    raise Refused(problem)
                continue
            elif 0 < reply.status < 500 and reply.status not in AGAIN:
                raise DataError(f"{self.shown}: {problem}")
            failures += 1
            if failures > self.retries or reply.pause > self.patience:
                attempts = f"{failures} attempt{'s' * (failures > 1)}"
                raise Failed(f"gave up after {attempts}: {problem}")
            self.pause(max(reply.pause, min(2.0**failures / 4, 8.0)))

    def post(self, content: list[dict], settings: dict) -> "Reply":
        """What comes back, if it is there whole within the time-out."""
        message = {"role": "user", "content": content}
        body = json.dumps({"model": self.model, "messages": [message]} | settings).encode()
        try:
            response, text = self.exchange(body)
        except httpx2.TimeoutException:
            return Reply(0, f"timed out after {self.timeout:g} seconds{self.way_there}")
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            return Reply(0, self.clean(f"no answer: {str(error) or type(error).__name__}{self.way_there}"))
        problem = f"HTTP {response.status_code} {response.reason_phrase}{self.way_there}: {plain(text)}"
        pause = retry_after(response.headers.get("Retry-After"))
        return Reply(response.status_code, self.clean(problem), pause, text)

    def exchange(self, body: bytes) -> tuple["httpx2.Response", str]:
        """A response and its text."""
        end = time.monotonic() + self.timeout
        parts, size = [], 0
        with self.client.stream("POST", self.target, content=body, headers=self.headers) as response:
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if time.monotonic() > end:  # however slowly it trickles in
                    raise httpx2.ReadTimeout("timed out")
                if size > LARGEST:
                    raise ValueError(f"an answer of more than {LARGEST:,} bytes")
        return response, b"".join(parts).decode(errors="replace")

    # -- waiting

    def wait_for_room(self) -> None:
        """Returns when the endpoint may have room. Raises Stopped after `stop`."""
        while (left := self.room_at - time.monotonic()) > 0:
            self.pause(left)
        self.pause(0.0)

    def make_wait(self, seconds: float, problem: str) -> None:
        """Let all wait. Raises DataError past the patience."""
        with self.lock:
            now = time.monotonic()
            self.full_since = now if self.full_since is None else self.full_since
            if now + seconds > self.full_since + self.patience:
                raise DataError(f"{self.shown}: no room within {self.patience:g} seconds: {problem}")
            # Those who were sent away together are not to come back together.
            self.room_at = max(self.room_at, now + seconds * random.uniform(1.0, 1.1))

    def pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped

    # -- what it takes

    def settle_on(self, settings: dict) -> None:
        """Ask in this way from now on, which has been answered."""
        with self.lock:
            if settings.keys() == self.settings.keys():  # another has said it
                return
            gone = ", ".join(name for name in self.settings if name not in settings)
            new = ", ".join(name for name in settings if name not in self.settings)
            self.settings = settings
        instead = f"with {new} instead" if new else "without"
        tqdm.write(f"{self.shown}: refuses {gone}; asked {instead} from here on", file=sys.stderr)

    # -- what is said of it

    def clean(self, text: str) -> str:
        """What somebody else has said, on one line, short and without secrets."""
        return one_line(self.scrubbed(text), 300)

    def scrubbed(self, text: str) -> str:
        for secret in self.secrets:
            text = text.replace(secret, "…")
        return text


def without_refused(settings: dict, text: str) -> dict | None:
    """The settings without one that a refusal names, which may get its other name; None if it
    names none."""
    named = re.findall(r"\w+", text)
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        named.insert(0, str(json.loads(text)["error"]["param"]))  # the one that is meant
    for name in named:
        if name in settings and name in OTHER_NAMES:
            other = {OTHER_NAMES[name]: settings[name]} if OTHER_NAMES[name] else {}
            return {kept: settings[kept] for kept in settings if kept != name} | other
    return None


def retry_after(value: str | None) -> float:
    """The seconds that a Retry-After header asks for, as a number or a date; 0 if it has neither."""
    with suppress(ValueError, TypeError, OverflowError):
        seconds = float(value)
        return seconds if 0 < seconds < math.inf else 0.0
    with suppress(ValueError, TypeError, OverflowError):
        when = parsedate_to_datetime(value)
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max((when - datetime.now(UTC)).total_seconds(), 0.0)
    return 0.0


def plain(text: str) -> str:
    """A body as it is to be shown: JSON without escapes, in which a secret could hide."""
    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(text), ensure_ascii=False)
    return text


def one_line(text: str, most: int = 200) -> str:
    """The beginning of a text, as a terminal can show it."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return " ".join(line.split())[:most]


# ------------------------------
# Addresses, keys, and what the environment says


def shown(url: str) -> str:
    """An address without what may be secret: name, password, and all behind a "?"."""
    url = re.split(r"[?#]", url, maxsplit=1)[0]
    return re.sub(r"^([^/]*//)?[^/]*@", r"\1", url)


def check_address(url: str, name: str):
    """The parts of an address. Raises DataError, with its `name`, if it is none."""
    with error_context(f"{name}: not an address such as https://HOST/v1", ValueError):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("it begins with neither http://HOST nor https://HOST")
        if parts.port == 0:
            raise ValueError("port 0")
        parts.hostname.encode("idna")
    return parts


def check_key(key: str | None, name: str = "the key of --api-key-env") -> None:
    """Raises DataError, with its name, if no header can hold a key."""
    if wrong := re.search("[^!-~]", key or ""):
        what = {"\n": "a line break", "\r": "a line break", " ": "a space"}
        found = what.get(wrong[0], f"U+{ord(wrong[0]):04X}, which is not ASCII")
        raise DataError(f"{name}: its character {wrong.start() + 1} is {found}")


def key_in(variable: str) -> str | None:
    """The key that a variable of the environment holds; None where the usual one is not set. Raises
    DataError, naming it, if another is not, or no header can hold the key."""
    key = os.environ.get(variable)
    if key is None and variable != USUAL_KEY:
        raise DataError(f"--api-key-env: the environment has no variable {variable}")
    check_key(key, variable)
    return key


def secrets_of(parts, key: str | None) -> list[str]:
    """What is never shown, in every form in which it may come back, the longest first."""
    secrets = {key, parts.username, parts.password}
    for pair in parts.query.split("&"):
        secrets.add(pair.partition("=")[2] or pair)
    secrets |= {unquote(each) for each in secrets if each}
    if "@" in parts.netloc:
        secrets.add(basic(parts))
    return sorted((each for each in secrets if each and len(each) >= SECRET), key=len, reverse=True)


def basic(parts) -> str:
    """Name and password of an address, as the Basic scheme writes them."""
    pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
    return base64.b64encode(pair.encode()).decode()


def open_client(parts, timeout: float) -> tuple["httpx2.Client", str]:
    """A client for an address, and what to say of the way there, if that is not the plain one.
    Raises DataError, naming the variable, where one of the environment cannot be used."""
    variable, proxy = proxy_of(parts)
    certificates = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
    verify = False  # nothing to look at
    if parts.scheme == "https" or (proxy or "").startswith("https:"):
        with error_context(f"{certificates}: no certificates can be read from it", OSError):
            if certificates:
                os.stat(os.environ[certificates])
            verify = httpx2.create_ssl_context()
    limits = httpx2.Limits(max_connections=None)
    times = httpx2.Timeout(timeout, pool=None)
    try:
        client = httpx2.Client(proxy=proxy, verify=verify, timeout=times, limits=limits, trust_env=False)
        if proxy and not (urlsplit(proxy).hostname and urlsplit(proxy).port != 0):
            raise ValueError("no host")
    except ImportError as error:
        raise DataError(f"{variable}: a SOCKS proxy needs socksio: pip install socksio") from error
    except (ValueError, httpx2.InvalidURL) as error:
        # Without its value, which may hold a password.
        raise DataError(f"{variable}: not a proxy such as http://HOST:PORT") from error
    way = [f"by the proxy of {variable}"] * bool(proxy)
    way += [f"by the certificates of {certificates}"] * bool(certificates and verify)
    return client, f" ({', '.join(way)})" if way else ""


def proxy_of(parts) -> tuple[str | None, str | None]:
    """The variable of the environment that names a proxy for an address, and the proxy. A neighbour on
    this machine needs none."""
    proxies = urllib.request.getproxies()
    kind = next((kind for kind in (parts.scheme, "all") if proxies.get(kind)), None)
    host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    if kind is None or is_loopback(parts.hostname) or urllib.request.proxy_bypass(host):
        return None, None
    names = (f"{kind}_proxy", f"{kind}_proxy".upper())
    variable = next((name for name in names if os.environ.get(name)), "the system's proxy")
    proxy = proxies[kind]
    return variable, proxy if "://" in proxy else f"http://{proxy}"


def is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
