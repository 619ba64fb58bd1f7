"""Bytes from a URL, with time limits and retries. Nothing here starts a program unless the recipe allows it.

    http, https   urllib: no process, no shell
    s3, gs, hf    fsspec with the package that knows the scheme (s3fs, gcsfs, huggingface_hub): no process, no shell
    pipe and all  webdataset's gopen, which runs a shell or a command-line client: only with data.allow_shell
"""

from __future__ import annotations

import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from hsrgan.engine.errors import UserError

STALL_SECONDS = 30.0  # without a byte, after which a connection is given up
ATTEMPTS = 6
BACK_OFF = 1.0  # seconds before the second attempt; doubled before each further one, at most LONGEST_WAIT
LONGEST_WAIT = 30.0
CHUNK = 1 << 20

_OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
_TRANSIENT = {408, 425, 429}  # of the 4xx: worth another try
_T = TypeVar("_T")


class Refused(Exception):
    """An answer that another attempt would not change; the message is the reason."""


def scheme_of(location: str) -> str:
    """"https" of https://…, "pipe" of pipe:…, "" of a path. A path whose name has a colon begins with ./ or /."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location)
    return match[1].lower() if match else ""


def check_scheme(url: str, *, allow_shell: bool) -> None:
    """Raise `UserError` for a scheme that nobody knows, or that runs a program without being allowed to."""
    scheme = scheme_of(url)
    if scheme in ("http", "https") or scheme in _OBJECT_STORES:
        return
    if not allow_shell:
        raise UserError(
            f"{url}: {scheme}: may run a program on this machine; data.allow_shell: true allows that, "
            "and http, https, s3, gs, hf and paths need no leave"
        )
    from webdataset.gopen import gopen_schemes

    if scheme not in gopen_schemes:
        raise UserError(f"{url}: nothing here knows the scheme {scheme}: (a path with a colon begins with ./)")


def open_url(url: str, *, allow_shell: bool) -> tuple[BinaryIO, int | None]:
    """(stream to read and close, its length where the other side says it). `Refused` where it is no use to try again;
    anything else that is raised, here or by the stream, may be different next time."""
    check_scheme(url, allow_shell=allow_shell)
    scheme = scheme_of(url)
    if scheme in ("http", "https"):
        return _open_http(url)
    if scheme in _OBJECT_STORES:
        return _open_object(url, _OBJECT_STORES[scheme])
    from webdataset.gopen import gopen  # imports torch: only where it is needed

    return gopen(url, "rb"), None


class _Redirections(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, answer, code, text, headers, url):
        if scheme_of(url) not in ("http", "https"):
            raise Refused(f"the server sends on to {url}")
        return super().redirect_request(request, answer, code, text, headers, url)


def _opener() -> urllib.request.OpenerDirector:
    """Unlike urllib's usual one, it knows no scheme but http and https."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, _Redirections, urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _open_http(url: str) -> tuple[BinaryIO, int | None]:
    request = urllib.request.Request(url, headers={"User-Agent": "hsrgan", "Accept-Encoding": "identity"})
    try:
        answer = _opener().open(request, timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 500 and error.code not in _TRANSIENT:
                raise Refused(f"the server answers {error.code} {error.reason}") from None
            raise OSError(f"the server answers {error.code} {error.reason}") from None
    except ValueError as error:  # http.client.InvalidURL among others
        raise Refused(str(error)) from None
    length = answer.headers.get("Content-Length", "")
    return answer, int(length) if length.isdigit() else None


def _open_object(url: str, package: str) -> tuple[BinaryIO, int | None]:
    import fsspec  # comes with torch

    try:
        file = fsspec.open(url, "rb").open()
    except ImportError:
        raise UserError(f"{url} needs the package {package}: pip install {package}") from None
    except (FileNotFoundError, PermissionError) as error:
        raise Refused(str(error) or type(error).__name__) from None
    return file, getattr(file, "size", None)


def retrying(url: str, once: Callable[[], _T], note: Callable[[str], None] = lambda text: None) -> _T:
    """`once()`, again after a growing pause where it fails; `note` is told why. Raises `UserError` after the last."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return once()
        except UserError:
            raise
        except Refused as error:
            raise UserError(f"cannot fetch {url} ({error}): mend the address or the rights to it") from None
        except Exception as error:  # clients of object stores raise nearly anything
            reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        if attempt < ATTEMPTS:
            note(f"{url}: {reason}; attempt {attempt} of {ATTEMPTS}")
            time.sleep(min(BACK_OFF * 2 ** (attempt - 1), LONGEST_WAIT) * random.SystemRandom().uniform(0.5, 1))
    raise UserError(
        f"cannot fetch {url} after {ATTEMPTS} attempts (the last: {reason}): see whether it is there, whole and as its "
        "manifest says, and start again; or list the shards without it"
    )


def fetch_text(url: str, *, allow_shell: bool) -> bytes:
    """All of a small file: a manifest or a list of shards."""

    def once() -> bytes:
        stream, length = open_url(url, allow_shell=allow_shell)
        with stream:
            raw = b"".join(iter(lambda: stream.read(CHUNK), b""))
        if length is not None and len(raw) != length:
            raise OSError(f"{len(raw)} of {length} bytes came")
        return raw

    return retrying(url, once)


def tell(text: str) -> None:
    """One line on stderr, straight to the descriptor: safe in a forked worker, where a stream's lock may be held."""
    os.write(2, f"{text}\n".encode())
