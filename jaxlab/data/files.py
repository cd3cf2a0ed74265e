"""Where data files come from: the caller's folder, the folder that `JAXLAB_DATA` names, or a checked download."""

import gzip
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import TypeVar

import pooch

T = TypeVar("T")


class MissingFile(FileNotFoundError, ValueError):
  """A data file is neither on disk nor to be downloaded; the message names it and the ways to get it."""


def fetch(
  folder: str, name: str, *, url: str, sha256: str | None, directory: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Host. Path of a data file whose content has been checked.

  Args:
    folder: subfolder of `JAXLAB_DATA` and of the cache, e.g. "planetoid".
    name: file name in it.
    url: where the original is; one that ends in `.gz` is unpacked.
    sha256: expected checksum; None to accept any content (the loader then checks sizes).
    directory: the only folder to look in; nothing is downloaded. Default: `JAXLAB_DATA`, then the user's cache, which a
      download fills (to a temporary name first, so that it is there in full or not at all).

  Raises:
    MissingFile: not found and not downloaded.
    ValueError: the file's checksum is wrong.
  """
  if directory is not None:
    path = pathlib.Path(directory) / name
    if not path.is_file():
      raise MissingFile(_missing("directory", path, url, folder))
    return _verify(path, sha256)
  local = os.environ.get("JAXLAB_DATA")
  if local and (pathlib.Path(local) / folder / name).is_file():
    return _verify(pathlib.Path(local) / folder / name, sha256)
  cache = pathlib.Path(pooch.os_cache("jaxlab")) / folder
  try:
    if url.endswith(".gz"):  # the checksum is that of the content
      if not (cache / name).is_file() or sha256 not in (None, _digest(cache / name)):
        packed = pathlib.Path(pooch.retrieve(url, None, fname=f"{name}.gz", path=cache))
        write(cache / name, lambda target: _unpack(packed, target))
        packed.unlink()
      return _verify(cache / name, sha256)
    return pathlib.Path(pooch.retrieve(url, f"sha256:{sha256}" if sha256 else None, fname=name, path=cache))
  except ValueError as error:  # pooch: what came is not what was published
    raise ValueError(f"{url}: got a download with another checksum, expected sha256 {sha256} ({error})") from error
  except Exception as error:  # any of requests' exceptions
    path = pathlib.Path(local) / folder / name if local else cache / name
    raise MissingFile(_missing("JAXLAB_DATA", path, url, folder) + f" (download failed: {error})") from error


def _verify(path: pathlib.Path, sha256: str | None) -> pathlib.Path:
  if sha256 is not None and (got := _digest(path)) != sha256:
    raise ValueError(f"{path}: got sha256 {got}, expected {sha256}: truncated or changed, fetch it again")
  return path


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(packed: pathlib.Path, target: pathlib.Path) -> None:
  with gzip.open(packed) as source, open(target, "wb") as file:
    shutil.copyfileobj(source, file)


def _missing(argument: str, path: pathlib.Path, url: str, folder: str) -> str:
  return (
    f"{argument}: got no file {path}, expected it there; either download {url} to that place, "
    f"or set JAXLAB_DATA to a folder with {folder}/{path.name} in it"
  )


def write(path: str | os.PathLike[str], fill: Callable[[pathlib.Path], object]) -> None:
  """Host. Lets `fill` write a file next to `path`, then puts it there in one step: in full or not at all."""
  path = pathlib.Path(path)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
    part = pathlib.Path(folder) / path.name
    fill(part)
    part.replace(path)


def parse(path: pathlib.Path, read: Callable[[pathlib.Path], T], what: str) -> T:
  """`read(path)`, with whatever a damaged file provokes turned into a `ValueError` that names the file."""
  try:
    return read(path)
  except Exception as error:
    reason = f"{type(error).__name__}: {error}"
    raise ValueError(f"{path}: got a file that does not read, expected {what} ({reason})") from error
