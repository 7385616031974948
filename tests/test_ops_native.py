import ctypes

import pytest

from vllm_lsa.errors import LsaError
from vllm_lsa.ops import build, native


def test_build_makes_a_library_with_every_kernel(tmp_path):
    library = ctypes.CDLL(str(build.build_cpu(tmp_path / "new")))
    assert [name for name in native._SIGNATURES if not hasattr(library, name)] == []
    assert [p.name for p in (tmp_path / "new").iterdir()] == [build.LIBRARY]


def test_build_without_compiler_or_source(tmp_path, monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(LsaError, match="no C\\+\\+ compiler"):
        build.build_cpu(tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    with pytest.raises(LsaError, match="source checkout"):
        build.build_cpu(tmp_path)


def test_missing_library_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(LsaError, match="python -m vllm_lsa.ops.build"):
        native.kernel.__wrapped__("lsa_copy_pages")
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    with pytest.raises(LsaError, match="python -m vllm_lsa.ops.build"):
        native.kernel.__wrapped__("lsa_copy_pages")
