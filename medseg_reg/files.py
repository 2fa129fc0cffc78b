"""Files that are written whole or not at all, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_reg.errors import MedsegError


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block succeeds.

    The data are flushed to the disk before the rename, so after a crash or a power cut the
    file is the old one or the new one, never half of one. The suffix is kept, because writers
    of images choose their format by it. Without `durable` a power cut may leave an empty file, a
    killed process still not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = "".join(path.suffixes[-2:]) if path.name.endswith(".gz") else path.suffix
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except OSError as error:
            # A full disk is often told without the name of the file.
            if error.errno is None or error.filename not in (None, str(temporary)):
                raise
            raise OSError(error.errno, error.strerror, str(path)) from None
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that gets its name when the block succeeds.

    Raises:
        OSError: `target` exists by then and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        os.rename(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a text file whole or not at all."""
    with replacing(path, durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of bytes whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any, durable: bool = True) -> None:
    """Write a JSON file whole or not at all; numbers that JSON cannot hold are an error."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n", durable)


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is an error that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MedsegError(f"{path}: does not exist.") from None
    except (ValueError, RecursionError) as error:
        raise MedsegError(f"{path}: is not valid JSON ({error}).") from None


def sha256_of(*paths: Path) -> str:
    """Return the SHA-256 of the contents of the files, one after the other, as hex digits."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(1 << 20))  # one for all files: new memory costs more than reading
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while length := file.readinto(block):
                digest.update(block[:length])
    return digest.hexdigest()


def wait_for(path: Path, seconds: float = 600.0) -> None:
    """Wait until another process has written a file.

    Raises:
        MedsegError: it has not appeared in that time.
    """
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise MedsegError(
                f"{path}: the first process has not written it in {seconds:.0f} s. See its message."
            )
        time.sleep(0.1)


def require_space(folder: Path, size: int) -> None:
    """Refuse to start a job whose output of `size` bytes does not fit on the disk of `folder`."""
    existing = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise MedsegError(
            f"{folder}: {_amount(size)} are needed and {_amount(free)} are free on its disk. Free "
            "some space, or choose a folder on another disk."
        )


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def require_writable(folder: Path) -> None:
    """Create a folder if needed and prove that files can be made in it, before hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MedsegError(
            f"{folder}: cannot be written to ({error.strerror}). Choose another folder."
        ) from None
