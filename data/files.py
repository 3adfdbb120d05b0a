"""Files that are whole or absent: atomic writes, safe opens, hashes, locks.

Everything read here may be hostile: names are plain, links are refused, sizes are limited before reading.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data.errors import DataError

PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CANNOT_LOCK = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # some network file systems
TEMPORARY_SUFFIX = ".tmp"
LOCK_POLL_SECONDS = 0.1


def check_plain_name(name: object, where: str) -> str:
    """Return `name` if it is a file name that can't leave its folder; DataError otherwise."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name) or ".." in name:
        raise DataError(f"{where} names the file {str(name)[:80]!r}: only plain names are allowed")
    return name


def open_regular(path: Path) -> int:
    """Open a regular file for reading, never through a link, and return its descriptor."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path} is a link: links are not followed, copy the file itself there") from None
        raise DataError(f"{path} can't be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} is not a regular file")
    return descriptor


def read_limited(path: Path, limit_bytes: int) -> bytes:
    """Read a whole file of at most `limit_bytes` bytes."""
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise DataError(f"{path} is larger than {limit_bytes} bytes: it can't be a file of this kind")
    return content


def read_json_object(path: Path, limit_bytes: int) -> dict:
    """Read a JSON file whose top level is an object."""
    content = read_limited(path, limit_bytes)
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def map_array(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    """Map `count` items of a file read-only; its size must be exactly that of the items."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size != count * dtype.itemsize:
            raise DataError(f"{path} holds {size} bytes instead of {count * dtype.itemsize}: it is damaged")
        if count == 0:
            return np.empty(0, dtype)
        return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), dtype)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file that is whole or absent: temporary sibling, fsync, rename. `content` may come in parts."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)  # left by a killed process, or a link that someone put there
    try:
        with open(temporary, "xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_to_others(path: Path) -> None:
    """Give a file the mode that `open` gives: safetensors lets only the owner read its own."""
    mask = os.umask(0o077)  # the mask can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_json(path: Path, value: dict) -> None:
    """Write an object as sorted, indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder that can't be written into a DataError naming `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not raised by the operating system
            raise
        if error.errno in NO_SPACE:
            advice = "free some space or choose another folder, then run the same command again"
            raise DataError(f"{folder}: no space left to write ({error.strerror}); {advice}") from error
        raise DataError(f"{folder} can't be written ({error.strerror}): choose another folder") from error


@contextlib.contextmanager
def exclusive_lock(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file, waiting for whoever holds it; the kernel releases that of a dead process at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _try_lock(path)
    if descriptor is None:
        log(f"waiting for the process that holds {path}")
    while descriptor is None:
        time.sleep(LOCK_POLL_SECONDS)
        descriptor = _try_lock(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a holder removes its file when it is done: the lock of a removed file protects nothing
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(descriptor)
        if error.errno in CANNOT_LOCK:
            raise DataError(
                f"{path} can't be locked ({error.strerror}): choose a data.cache_dir on another file system"
            ) from None
        raise
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
