"""Downloads against a server on this machine."""

import functools
import gzip
import hashlib
import http.server
import threading

import pooch
import pytest

from jaxlab.data import files

CONTENT = b"published content\n" * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
  """URL of a folder with a good, a damaged and a packed file; cache and JAXLAB_DATA in temporary folders."""
  served = tmp_path / "served"
  served.mkdir()
  (served / "good.txt").write_bytes(CONTENT)
  (served / "damaged.txt").write_bytes(CONTENT[:-5])
  (served / "packed.txt.gz").write_bytes(gzip.compress(CONTENT))
  monkeypatch.setattr(pooch, "os_cache", lambda _: tmp_path / "cache")
  monkeypatch.setenv("JAXLAB_DATA", str(tmp_path / "local"))

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served)) as running:
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/"
    running.shutdown()


def test_downloads_once_and_checks(server, tmp_path):
  path = files.fetch("sub", "good.txt", url=server + "good.txt", sha256=SHA256)
  assert path == tmp_path / "cache/sub/good.txt" and path.read_bytes() == CONTENT
  (tmp_path / "served/good.txt").unlink()
  assert files.fetch("sub", "good.txt", url=server + "good.txt", sha256=SHA256) == path


def test_damaged_download_leaves_nothing(server, tmp_path):
  with pytest.raises(ValueError, match=f"damaged.txt: got a download with another checksum, expected sha256 {SHA256}"):
    files.fetch("sub", "damaged.txt", url=server + "damaged.txt", sha256=SHA256)
  assert not list((tmp_path / "cache/sub").iterdir())


def test_damaged_cache_is_fetched_again(server, tmp_path):
  path = files.fetch("sub", "good.txt", url=server + "good.txt", sha256=SHA256)
  path.write_bytes(CONTENT[:-1])
  assert files.fetch("sub", "good.txt", url=server + "good.txt", sha256=SHA256).read_bytes() == CONTENT


def test_unpacks_gzip(server):
  path = files.fetch("sub", "packed.txt", url=server + "packed.txt.gz", sha256=SHA256)
  assert path.name == "packed.txt" and path.read_bytes() == CONTENT


def test_a_wrong_packed_download_is_not_kept(server, tmp_path):
  url, packed = server + "packed.txt.gz", tmp_path / "served" / "packed.txt.gz"
  right = packed.read_bytes()
  packed.write_bytes(gzip.compress(b"another"))
  with pytest.raises(ValueError, match="another checksum"):
    files.fetch("sub", "packed.txt", url=url, sha256=SHA256)
  packed.write_bytes(right)
  path = files.fetch("sub", "packed.txt", url=url, sha256=SHA256)
  assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["packed.txt"]


def test_local_folder_comes_first(server, tmp_path):
  local = tmp_path / "local/sub/good.txt"
  local.parent.mkdir(parents=True)
  local.write_bytes(CONTENT)
  assert files.fetch("sub", "good.txt", url="http://127.0.0.1:1/good.txt", sha256=SHA256) == local
  local.write_bytes(CONTENT + b"x")
  with pytest.raises(ValueError, match="truncated or changed"):
    files.fetch("sub", "good.txt", url=server + "good.txt", sha256=SHA256)


@pytest.mark.parametrize("url", ["none.txt", "http://127.0.0.1:1/none.txt"])
def test_failed_download_names_the_two_ways(server, tmp_path, url):
  url = url if url.startswith("http") else server + url
  with pytest.raises(files.MissingFile) as error:
    files.fetch("sub", "none.txt", url=url, sha256=SHA256)
  message = str(error.value)
  assert (
    str(tmp_path / "local/sub/none.txt") in message and f"download {url}" in message and "set JAXLAB_DATA" in message
  )
  assert isinstance(error.value, ValueError) and isinstance(error.value, FileNotFoundError)
