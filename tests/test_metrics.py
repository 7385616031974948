import inspect
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lsa.metrics import METRICS, LsaCollector, MetricsWriter, footprint_ratio, read_all


def test_sums_over_ranks(tmp_path: Path) -> None:
    writers = [MetricsWriter(tmp_path, rank) for rank in range(3)]
    for rank, writer in enumerate(writers):
        writer.set("pool_slots", 10 + rank)
        writer.add("fetch_seconds", 0.25)
        writer.add("fetch_seconds", 0.5)
    sums = read_all(tmp_path)
    assert list(sums) == [metric.name for metric in METRICS]
    assert sums["pool_slots"] == 33 and sums["fetch_seconds"] == 2.25 and sums["cycles"] == 0
    writers[0].close()
    writers[0].close()
    assert read_all(tmp_path)["pool_slots"] == 23
    for writer in writers:
        writer.close()
    assert not list(tmp_path.iterdir()) and not any(read_all(tmp_path).values())


def test_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert not any(read_all(tmp_path / "new").values())
    MetricsWriter(tmp_path / "new", 0).set("cycles", 1)
    assert read_all(tmp_path / "new")["cycles"] == 1


def test_a_rank_that_starts_again_starts_from_zero(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, 0).set("cycles", 5)
    MetricsWriter(tmp_path, 0).set("evictions", 2)
    sums = read_all(tmp_path)
    assert sums["cycles"] == 0 and sums["evictions"] == 2


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        MetricsWriter(tmp_path, 0).set("footprint_ratio", 1)


def test_bad_file_is_left_out_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MetricsWriter(tmp_path, 0).set("cycles", 5)
    (tmp_path / "1.metrics").write_bytes(b"x" * 7)
    (tmp_path / "2.metrics").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "vllm_lsa"):
        for _ in range(3):
            assert read_all(tmp_path)["cycles"] == 5
    assert len(caplog.records) == 2 and "1.metrics has 7 bytes" in caplog.text


def _work(directory: Path, rank: int, count: int) -> None:
    writer = MetricsWriter(directory, rank)
    for i in range(count):
        writer.add("bytes_fetched", 3)
        # Every byte of the value differs between the two.
        writer.set("slots_used", 1.0 if i % 2 else -1 / 3)
    writer.set("live_requests", 1)


def test_other_processes_are_read_while_they_write(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(tmp_path, rank, 50_000)) for rank in range(2)]
    for worker in workers:
        worker.start()
    last, valid = 0.0, {a + b for a in (0.0, 1.0, -1 / 3) for b in (0.0, 1.0, -1 / 3)}
    while any(worker.is_alive() for worker in workers):
        sums = read_all(tmp_path)
        assert sums["bytes_fetched"] >= last and sums["slots_used"] in valid
        last = sums["bytes_fetched"]
    assert [worker.exitcode for worker in workers] == [0, 0]
    # The workers died without closing: what they did still counts.
    assert read_all(tmp_path)["bytes_fetched"] == 300_000 and read_all(tmp_path)["live_requests"] == 2


def test_footprint_ratio(tmp_path: Path) -> None:
    assert footprint_ratio(read_all(tmp_path)) == 0
    for rank, total in enumerate([100, 300]):
        writer = MetricsWriter(tmp_path, rank)
        writer.set("kv_bytes_total", total)
        writer.set("kv_bytes_resident", total / 10)
        writer.set("index_bytes", 5)
    assert footprint_ratio(read_all(tmp_path)) == pytest.approx(50 / 400)


def test_prometheus(tmp_path: Path) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(LsaCollector(tmp_path))
    for rank in range(2):
        writer = MetricsWriter(tmp_path, rank)
        writer.set("cycles", 3)
        writer.set("kv_bytes_total", 80)
        writer.set("kv_bytes_resident", 20)
    lines = prometheus.generate_latest(registry).decode().splitlines()
    assert "# TYPE vllm_lsa:cycles_total counter" in lines and "vllm_lsa:cycles_total 6.0" in lines
    assert "# TYPE vllm_lsa:kv_bytes_total gauge" in lines and "vllm_lsa:kv_bytes_total 160.0" in lines
    assert "vllm_lsa:footprint_ratio 0.25" in lines
    for metric in METRICS:
        assert f"vllm_lsa:{metric.name}{'_total' if metric.kind == 'counter' else ''}" in "\n".join(lines)


def test_a_registry_made_for_one_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from prometheus_client.multiprocess import MultiProcessCollector

    from vllm_lsa.plugin import metrics as plugin_metrics

    # Without what a plugin that is loaded in this process has done to it; put back afterwards.
    monkeypatch.setattr(MultiProcessCollector, "__init__", inspect.unwrap(MultiProcessCollector.__init__))
    monkeypatch.setattr(plugin_metrics, "_collectors", [LsaCollector(tmp_path)])
    plugin_metrics.install()
    MetricsWriter(tmp_path, 0).set("cycles", 3)
    for _ in range(2):
        registry = prometheus.CollectorRegistry()
        MultiProcessCollector(registry, str(tmp_path))
        assert b"vllm_lsa:cycles_total 3.0" in prometheus.generate_latest(registry)


SERVER = """
import multiprocessing, os
from vllm_lsa.metrics import MetricsWriter, read_all
from vllm_lsa.plugin import metrics

def work():
    metrics.serve()  # as an API server does
    MetricsWriter(metrics.directory(), 0).set("cycles", 3)

if __name__ == "__main__":
    metrics.serve()
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    worker.join()
    print(read_all(metrics.directory())["cycles"])
"""


def test_processes_of_a_server_find_each_other_and_leave_nothing(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    program, temporary = tmp_path / "server.py", tmp_path / "temporary"
    program.write_text(SERVER)
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.check_output([sys.executable, str(program)], env=environment, text=True) == "3.0\n"
    assert not list(temporary.iterdir())
