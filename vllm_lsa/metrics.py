"""Metrics that survive vLLM's process boundaries: workers write small files, the API server adds them up.

Every rank maps one file of float64, in the order of METRICS. A value is one aligned 8-byte store by its only writer and
one load by a reader, so neither needs a lock.
"""

import logging
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from prometheus_client import Metric as PrometheusMetric

logger = logging.getLogger("vllm_lsa")


class Metric(NamedTuple):
    """One value of a rank. Prometheus sees ``vllm_lsa:<name>``, with ``_total`` for a counter, summed over ranks."""

    name: str
    kind: Literal["gauge", "counter"]
    unit: str
    help: str


METRICS = (
    Metric("kv_bytes_total", "gauge", "bytes", "K and V of the live requests, in whole chunks"),
    Metric("kv_bytes_resident", "gauge", "bytes", "K and V in the resident sets of the live requests"),
    Metric("index_bytes", "gauge", "bytes", "Index cells of the live requests"),
    Metric("pool_slots", "gauge", "slots", "Slots of the device pool"),
    Metric("slots_used", "gauge", "slots", "Slots that resident sets hold"),
    Metric("slots_cached", "gauge", "slots", "Slots that no set holds but whose chunk is still valid"),
    Metric("live_requests", "gauge", "requests", "Requests that hold K and V"),
    Metric("host_blocks", "gauge", "blocks", "Blocks of the host store"),
    Metric("chunks_selected", "counter", "chunks", "Chunks that selections kept, over all sets"),
    Metric("chunks_demanded", "counter", "chunks", "Chunks that steps took into resident sets"),
    Metric("chunks_missed", "counter", "chunks", "Kept chunks that had no slot when they were needed"),
    Metric("bytes_fetched", "counter", "bytes", "Copied from the host store to slots"),
    Metric("bytes_demanded", "counter", "bytes", "Those of bytes_fetched that steps asked for themselves"),
    Metric("bytes_written_back", "counter", "bytes", "Copied from the device to the host store"),
    Metric("bytes_streamed", "counter", "bytes", "Read from the host store without keeping a slot"),
    Metric("fetch_seconds", "counter", "seconds", "Time that fetches took"),
    Metric("stall_seconds", "counter", "seconds", "Time that decoding waited for fetches"),
    Metric("cycles", "counter", "cycles", "Selections of requests"),
    Metric("evictions", "counter", "slots", "Cached chunks that made room for others"),
)  # fmt: skip
PER_GROUP = ("live_requests", "host_blocks", "cycles")
"""What all ranks of a tensor-parallel group share: its first one reports it, the others 0."""
_PLACE = {metric.name: place for place, metric in enumerate(METRICS)}
_SIZE = 8 * len(METRICS)
_SUFFIX = ".metrics"


class MetricsWriter:
    """One rank's values, all 0 at first. Raises KeyError for a name that METRICS lacks."""

    def __init__(self, directory: str | os.PathLike[str], name: int | str) -> None:
        """directory: of this server alone, created if need be. name: distinct among the server's workers."""
        self._path = Path(directory) / f"{name}{_SUFFIX}"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that no reader meets a file of another size.
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(bytes(_SIZE))
        with fresh.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._values = memoryview(self._map).cast("d")
        fresh.replace(self._path)

    def set(self, name: str, value: float) -> None:
        self._values[_PLACE[name]] = value

    def add(self, name: str, value: float) -> None:
        self._values[_PLACE[name]] += value

    def close(self) -> None:
        """Withdraw the values: unlinks the file. Nothing may be set afterwards; closing again does nothing."""
        self._values.release()
        self._map.close()
        self._path.unlink(missing_ok=True)


def read_all(directory: str | os.PathLike[str]) -> dict[str, float]:
    """Every metric of METRICS, summed over the ranks that have a file in `directory`; 0 where there is none."""
    ranks = [values for path in sorted(Path(directory).glob(f"*{_SUFFIX}")) if (values := _read(path)) is not None]
    return {metric.name: float(sum(values[place] for values in ranks)) for place, metric in enumerate(METRICS)}


def footprint_ratio(sums: Mapping[str, float]) -> float:
    """Device memory of K, V and index over what K and V would take without LSA; 0 while no request is live."""
    total = sums["kv_bytes_total"]
    return (sums["kv_bytes_resident"] + sums["index_bytes"]) / total if total else 0.0


class LsaCollector:
    """A prometheus_client collector of one server's metrics: ``registry.register(LsaCollector(directory))``."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = directory

    def collect(self) -> Iterator["PrometheusMetric"]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        sums = read_all(self._directory)
        families = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        for metric in METRICS:
            yield families[metric.kind](f"vllm_lsa:{metric.name}", f"{metric.help} ({metric.unit}).", sums[metric.name])
        yield GaugeMetricFamily(
            "vllm_lsa:footprint_ratio", "Resident K, V and index of the live requests over all their K and V.",
            footprint_ratio(sums),
        )  # fmt: skip


_skipped: set[Path] = set()


def _read(path: Path) -> list[float] | None:
    """The values of one file, or None if its writer left meanwhile or it is not of this version's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == _SIZE:
                # Mapped: read() could return half of a value that is being stored.
                with mmap.mmap(file.fileno(), _SIZE, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                    with view.cast("d") as values:
                        return [float(value) for value in values]
    except FileNotFoundError:
        return None
    if path not in _skipped:
        _skipped.add(path)
        logger.warning("metrics file %s has %d bytes instead of %d: its rank is left out", path, size, _SIZE)
    return None
