"""The one configuration of vllm-lsa: `vllm serve … --additional-config '{"lsa": {…}}'`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_lsa.errors import LsaError
from vllm_lsa.memory.geometry import KVGeometry

GIB = 1 << 30


class LsaConfig(BaseModel):
    """Settings of the LSA backend. Every field has a unit and a default that serves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(
        0.135,
        gt=0,
        le=1,
        description="Largest resident share of a request's chunks, forced and demanded ones included; 1.0 keeps all.",
    )
    period: int = Field(64, ge=1, description="Decode steps between two selections of a request.")
    lead: int = Field(
        0,
        ge=0,
        description="Decode steps by which a selection runs ahead of the cycle it is for; its chunks are fetched "
        "meanwhile, into slots beside those of the old set. 0 selects and fetches at the start of the cycle. Smaller "
        "than period.",
    )
    threshold: float = Field(
        0.0, ge=0, lt=1, description="Score in [0, 1) that a chunk must exceed to be kept; 0 fills the budget."
    )
    sink_tokens: int = Field(16, ge=0, description="Tokens at the start of a request that every selection keeps.")
    recency_tokens: int = Field(128, ge=0, description="Newest tokens that every selection keeps.")
    chunk_tokens: int = Field(
        16, ge=1, description="Tokens of a chunk, the unit of residency; divides vLLM's block size."
    )
    sets: Literal["per_layer", "shared"] = Field(
        "per_layer", description="One resident set per layer, or one set shared by all layers (the paper's rule)."
    )
    mode: Literal["or", "mean"] = Field(
        "or", description="How the votes of heads (and of layers, with shared sets) combine: maximum or mean."
    )
    indexer: str = Field(
        "mean_key", description="What scores the chunks of a request: mean_key, quest, recency, random or keep_all."
    )
    demand: Literal["off", "mean_key", "four_bit"] = Field(
        "mean_key", description="Index by which a layer picks chunks that are not resident, with each step's own query."
    )
    demand_chunks: int = Field(4, ge=1, description="Chunks a layer may demand per decode step.")
    host_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Host memory for the KV cache, GiB, divided over the ranks. Default: four requests "
        "of max_model_len tokens.",
    )
    device_pool_gib: float | None = Field(
        None, gt=0, description="Device memory for resident chunks on each rank, GiB. Default: device_pool_fraction."
    )
    device_pool_fraction: float | None = Field(
        None, gt=0, le=1, description="Device memory for resident chunks as a share of the host store. Default: 0.16."
    )
    check: Literal["off", "assert", "poison"] = Field(
        "off",
        description="Self-checks for tests: assert compares the request mirror with vLLM's block tables at every "
        "step; poison also fills every slot and block that is not in use with NaN.",
    )

    @classmethod
    def parse(cls, additional_config: Any) -> "LsaConfig":
        """Read the "lsa" key of vLLM's ``additional_config``.

        Raises LsaError in one line that names key, value and remedy.
        """
        raw = additional_config.get("lsa", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(raw, Mapping):
            raise LsaError(f'lsa={raw!r} is not an object: pass --additional-config \'{{"lsa": {{"budget": 0.135}}}}\'')
        try:
            config = cls.model_validate(dict(raw))
        except ValidationError as error:
            raise LsaError("; ".join(_explain(e) for e in error.errors())) from None
        config._check()
        return config

    def _check(self) -> None:
        if self.lead >= self.period:
            raise LsaError(f"lsa.lead={self.lead} is not below lsa.period={self.period}: lower lead or raise period")
        if self.device_pool_gib is not None and self.device_pool_fraction is not None:
            raise LsaError(
                f"lsa.device_pool_gib={self.device_pool_gib} and lsa.device_pool_fraction={self.device_pool_fraction} "
                "contradict each other: set one of them"
            )
        for key in ("sink_tokens", "recency_tokens"):
            value = getattr(self, key)
            if value % self.chunk_tokens:
                raise LsaError(
                    f"lsa.{key}={value} is not a multiple of lsa.chunk_tokens={self.chunk_tokens}: round it up"
                )

    @property
    def sink_chunks(self) -> int:
        return self.sink_tokens // self.chunk_tokens

    @property
    def recency_chunks(self) -> int:
        return self.recency_tokens // self.chunk_tokens

    @property
    def demand_ring(self) -> int:
        """Demanded chunks that a layer keeps until the next cycle; the oldest makes room for the newest."""
        return 0 if self.demand == "off" else 4 * self.demand_chunks

    def host_blocks(self, geometry: KVGeometry, max_model_len: int, ranks: int) -> int:
        """Blocks of one rank's host store, vLLM's null block included. Raises LsaError if one request does not fit."""
        per_request = geometry.blocks(max_model_len)
        if self.host_memory_gib is None:
            return 4 * per_request + 1
        blocks = int(self.host_memory_gib * GIB / ranks) // geometry.block_bytes
        if blocks < per_request + 1:
            need = (per_request + 1) * geometry.block_bytes * ranks / GIB
            raise LsaError(
                f"lsa.host_memory_gib={self.host_memory_gib} cannot hold one request of max_model_len={max_model_len} "
                f"tokens: raise host_memory_gib to at least {need:.3f} or lower --max-model-len"
            )
        return blocks

    def pool_slots(self, geometry: KVGeometry, host_blocks: int) -> int:
        """Slots of one rank's device pool. Raises LsaError if the forced chunks of one request do not fit."""
        pages = host_blocks * geometry.chunks_per_block * geometry.num_layers
        if self.device_pool_gib is not None:
            slots, named = (
                int(self.device_pool_gib * GIB) // geometry.page_bytes,
                f"device_pool_gib={self.device_pool_gib}",
            )
        else:
            fraction = 0.16 if self.device_pool_fraction is None else self.device_pool_fraction
            slots, named = int(pages * fraction), f"device_pool_fraction={fraction}"
        least = geometry.num_layers * (self.sink_chunks + self.recency_chunks + 1)
        if slots < least:
            raise LsaError(
                f"lsa.{named} gives {slots} slots, but sink_tokens={self.sink_tokens} + recency_tokens="
                f"{self.recency_tokens} + one chunk of one request need {least} "
                f"({least * geometry.page_bytes / GIB:.4f} GiB): raise the pool or lower sink_tokens or recency_tokens"
            )
        return min(slots, pages)


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"lsa.{key}={error['input']!r} is not a setting: use one of {', '.join(LsaConfig.model_fields)}"
    return f"lsa.{key}={error['input']!r} is not valid: {error['msg']}"
