"""The one configuration of vllm-lsa: `vllm serve … --additional-config '{"lsa": {…}}'`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.checkpoint import CONFIG, IndexerConfig
from vllm_lsa.indexer.trained import find
from vllm_lsa.memory.geometry import PageGeometry

GIB = 1 << 30
DEMAND_RECENCY = 32
"""Newest tokens kept with a demand index that sees every key: they need not be held in advance (docs/log.md)."""


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
    sets: Literal["per_head", "per_layer", "shared"] = Field(
        "per_head",
        description="One resident set per KV head of each layer, per layer, or one for all layers (the paper's rule).",
    )
    mode: Literal["or", "mean"] = Field(
        "or", description="How the votes of heads (and of layers, with shared sets) combine: maximum or mean."
    )
    indexer: str = Field(
        "mean_key",
        description="What scores the chunks of a request: mean_key, quest, usage, recency, random or keep_all; or a "
        "trained checkpoint, by its folder or the name of a shipped one, which also changes the defaults of "
        "chunk_tokens, recency_tokens and demand, and of sets and mode, to those that it was trained for. DeepSeek-V4: "
        "native (its own indexer; the default there), exact (the same in every step, over everything), recency, random "
        "or keep_all; or a memory indexer, a published .pt or .safetensors file or a checkpoint folder, which also "
        "changes the default of threshold.",
    )
    lookahead: Literal["indexer", "usage", "recency"] = Field(
        "indexer",
        description="What a cycle's set begins with: what indexer says; or, with a checkpoint as indexer, what was "
        "used lately or the newest chunks, with the checkpoint's demand index and its layers' shares.",
    )
    demand: Literal["off", "mean_key", "four_bit", "product"] = Field(
        "mean_key",
        description="Index by which each step's own query asks for chunks that are not resident; product comes with a "
        "trained checkpoint.",
    )
    demand_chunks: int = Field(
        8, ge=1, description="Chunks that may enter a resident set per decode step, in the place of the least used."
    )
    demand_threshold: float = Field(
        0.002, ge=0, lt=1, description="Share of a step's attention mass that a chunk must exceed to be demanded."
    )
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
    index_keys: Literal["device", "host"] = Field(
        "device",
        description="DeepSeek-V4: where the index keys of the c4 layers are that no memory indexer scores. host keeps "
        "those of resident pages alone on the device.",
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
        config = config._with_checkpoint()
        config._check()
        return config

    def _with_checkpoint(self) -> "LsaConfig":
        """Fields that were not set take the values that a trained indexer was made for."""
        folder = find(self.indexer)
        if folder is None:
            return self
        trained = IndexerConfig.read(folder / CONFIG)
        defaults: dict[str, Any] = {"chunk_tokens": trained.chunk_tokens, "period": trained.period}
        if trained.demand_index is not None:
            defaults |= {"demand": "product", "recency_tokens": DEMAND_RECENCY}
        if trained.kind == "shared" and self.lookahead == "indexer":
            defaults |= {"sets": "shared", "mode": trained.ensemble}
        unset = {name: value for name, value in defaults.items() if name not in self.model_fields_set}
        return self.model_copy(update=unset)

    def _check(self) -> None:
        if self.lookahead != "indexer" and find(self.indexer) is None:
            raise LsaError(
                f"lsa.lookahead={self.lookahead!r} needs a checkpoint as lsa.indexer, which is {self.indexer!r}: "
                f"set lsa.indexer to {self.lookahead!r} instead"
            )
        self._check_shared()
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

    def _check_shared(self) -> None:
        """A checkpoint of the shared form chooses as its layers were chosen, or not at all."""
        folder = find(self.indexer)
        if folder is None or self.lookahead != "indexer":
            return
        trained = IndexerConfig.read(folder / CONFIG)
        if trained.kind != "shared":
            return
        for key, value in (("sets", "shared"), ("mode", trained.ensemble)):
            if getattr(self, key) != value:
                raise LsaError(
                    f"lsa.{key}={getattr(self, key)!r} contradicts lsa.indexer={self.indexer!r}, which was trained for "
                    f"one set for all layers, with {key}={value!r}: leave lsa.{key} out"
                )

    @property
    def policy(self) -> str:
        """Name of what chooses the sets: a policy or a checkpoint."""
        return self.indexer if self.lookahead == "indexer" else self.lookahead

    @property
    def sink_chunks(self) -> int:
        return self.sink_tokens // self.chunk_tokens

    @property
    def recency_chunks(self) -> int:
        return self.recency_tokens // self.chunk_tokens

    def layer_lanes(self, num_kv_heads: int) -> int:
        """Resident sets of a layer."""
        return num_kv_heads if self.sets == "per_head" else 1

    def host_blocks(self, geometry: PageGeometry, max_model_len: int, ranks: int) -> int:
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

    def pool_size(self) -> tuple[float, float]:
        """Of a rank's device pool: GiB that are set, and its share of the host store where none are."""
        if self.device_pool_gib is not None:
            return self.device_pool_gib, 0.0
        return 0.0, 0.16 if self.device_pool_fraction is None else self.device_pool_fraction

    def pool_slots(self, geometry: PageGeometry, host_blocks: int) -> int:
        """Slots of one rank's device pool. Raises LsaError if the forced chunks of one request do not fit."""
        pages = host_blocks * geometry.chunks_per_block * geometry.num_lanes
        if self.device_pool_gib is not None:
            slots, named = (
                int(self.device_pool_gib * GIB) // geometry.page_bytes,
                f"device_pool_gib={self.device_pool_gib}",
            )
        else:
            _, fraction = self.pool_size()
            slots, named = int(pages * fraction), f"device_pool_fraction={fraction}"
        least = geometry.num_lanes * (self.sink_chunks + self.recency_chunks + 1)
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
