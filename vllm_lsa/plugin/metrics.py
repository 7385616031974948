"""Puts the workers' metrics on vLLM's `/metrics`."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from vllm.config import VllmConfig
from vllm.v1.metrics import prometheus

from vllm_lsa.metrics import LsaCollector

_served: set[Path] = set()


def directory(vllm_config: VllmConfig) -> Path:
    """Where the workers of one engine leave their metrics: the same in every process of that engine."""
    return Path(tempfile.gettempdir()) / f"vllm-lsa-{os.getuid()}" / vllm_config.instance_id


def serve(vllm_config: VllmConfig) -> None:
    """Collect the metrics of an engine in this process."""
    path = directory(vllm_config)
    if path not in _served:
        _served.add(path)
        REGISTRY.register(LsaCollector(path))


def install() -> None:
    """With several API servers vLLM answers from a registry of its own per scrape: add the collectors there too."""
    original = prometheus.get_prometheus_registry

    def get_prometheus_registry() -> CollectorRegistry:
        registry = original()
        if registry is not REGISTRY:
            for path in _served:
                registry.register(LsaCollector(path))
        return registry

    prometheus.get_prometheus_registry = get_prometheus_registry
    user: Any = sys.modules.get("vllm.entrypoints.serve.instrumentator.metrics")
    if user is not None:
        user.get_prometheus_registry = get_prometheus_registry
