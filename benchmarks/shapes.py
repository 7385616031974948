"""Models of well-known shapes without their weights, for vLLM's `load_format="dummy"`, and checkpoints to go with them.

What a step costs is decided by shapes, not by values, so nothing has to be downloaded.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.checkpoint import CONFIG, fingerprint_of
from vllm_lsa.indexer.indexer_config import DemandIndex
from vllm_lsa.indexer.product import ProductTables
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies
from vllm_lsa.memory.geometry import KVGeometry

CHUNK, BLOCK = 16, 16
"""Tokens of a chunk, and of a block as vLLM has it on a GPU."""

FIRST_WORD = 3
"""Token ids below are special."""


@dataclass(frozen=True)
class Shape:
    """A dense decoder of the Llama architecture. budgets: resident share for lookahead alone, and with demand. fp8: K
    and V are stored in e4m3 instead of bf16."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    max_positions: int
    tied: bool
    budgets: tuple[float, float]
    rope_theta: float = 500000.0
    fp8: bool = False

    @property
    def config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }

    def geometry(self, layer_lanes: int | None = None) -> KVGeometry:
        """Of its KV cache on one rank; one set per KV head by default."""
        lanes = self.kv_heads if layer_lanes is None else layer_lanes
        dtype = torch.uint8 if self.fp8 else torch.bfloat16
        sizes = self.layers, self.heads, self.kv_heads, self.head_dim
        return KVGeometry(*sizes, dtype, BLOCK, CHUNK, lanes, model_dtype=torch.bfloat16)

    @property
    def layer_parameters(self) -> int:
        """Of all matrices in the layers."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads of the weights in bf16: all but the input embedding, of which it reads few rows."""
        return 2 * (self.layer_parameters + self.vocab * self.hidden)

    def prefill_flops(self, tokens: int) -> float:
        """Of a prompt: matrices, and attention to the half of all pairs that is not masked."""
        return 2.0 * tokens * self.layer_parameters + 2.0 * tokens**2 * self.heads * self.head_dim * self.layers

    def prompts(self, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
        """Random token ids, no two prompts alike."""
        random = np.random.default_rng(seed)
        return [random.integers(FIRST_WORD, self.vocab, tokens).tolist() for _ in range(count)]

    def write(self, folder: Path | None = None, tokenizer: bool = False) -> Path:
        """The model's folder, by default always the same one, so that what torch.compile cached for it is found again.

        tokenizer: with one in which every token is a word, so that a text has as many tokens as it has words.
        """
        folder = folder or Path(tempfile.gettempdir()) / "vllm-lsa-shapes" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        if tokenizer:
            self._write_tokenizer(folder)
        return folder

    def _write_tokenizer(self, folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # vLLM bounds a prompt's characters by its longest token, and each word here has a space before it.
        words = {"<s>": 0, "</s>": 1, "<unknown>": 2, **{f"w{i}": i for i in range(FIRST_WORD, self.vocab)}}
        model = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
        model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unknown>",
            model_max_length=self.max_positions, clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)  # fmt: skip

    def checkpoint(self, model: Path, folder: Path | None = None) -> Path:
        """A checkpoint with random tables for demand, of head_dim / 8 bytes a token and KV head, that fits the folder
        `model`. Its only scorer, of layer 0, is random too: use it with "lookahead": "usage"."""
        folder = folder or model.with_name(model.name + "-indexer")
        known = fingerprint_of(model)
        if (folder / CONFIG).is_file() and IndexerConfig.read(folder / CONFIG).backbone_fingerprint == known:
            return folder
        torch.manual_seed(0)
        subspaces = self.head_dim // 8
        self._tables(subspaces).save(folder / "product.safetensors")
        config = IndexerConfig(
            kind="per_layer",
            backbone=self.name,
            backbone_fingerprint=known,
            layers=(0,),
            hidden_size=self.heads * self.head_dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rank=8,
            rope=RopeConfig(style="halves", dims=self.head_dim),
            input="query",
            usage=True,
            chunk_tokens=CHUNK,
            period=64,
            demand_index=DemandIndex(kind="product", subspaces=subspaces, file="product.safetensors"),
        )
        MemoryIndexer(config, inverse_frequencies(self.head_dim, self.rope_theta)).save(folder)
        return folder

    def _tables(self, subspaces: int) -> ProductTables:
        """Rotations, and centroids spread as standard normal keys are."""
        lanes, dim = (self.layers, self.kv_heads), self.head_dim
        to_code = torch.linalg.qr(torch.randn(*lanes, dim, dim)).Q.contiguous()
        centroids = torch.randn(*lanes, subspaces, 256, dim // subspaces)
        return ProductTables(to_code, to_code.transpose(2, 3).contiguous(), torch.zeros(*lanes, dim), centroids)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-8b", 32, 32, 8, 128, 4096, 14336, 128256, 131072 + 1024, False, (0.135, 0.125)),
        Shape("llama-135m-1m", 30, 9, 3, 64, 576, 1536, 49152, 1048576 + 1024, True, (0.065, 0.105)),
    )
}
