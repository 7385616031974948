"""Checkpoints of the memory indexer: written and read back, the published layout, every refusal, `vllm-lsa inspect`."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import indexer_twin as twin
from tests.paths import MODEL
from vllm_lsa import cli
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import IndexerConfig, MemoryIndexer
from vllm_lsa.indexer.checkpoint import fingerprint, fingerprint_of
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies

METRICS: dict[str, Any] = {
    "recall": 0.912345678,
    "10 %": {"ΔNLL": 0.019, "needles": "18 | 20"},
    "13.5 %": [{"ΔNLL": 0.011, "tokens": 2048}, {"ΔNLL": 0.012, "tokens": 8192}],
}


def small(**changes: Any) -> MemoryIndexer:
    fields: dict[str, Any] = {
        "kind": "per_layer",
        "backbone": "SmolLM2",
        "backbone_fingerprint": "0123456789ab-ba9876543210",
        "layers": [0, 1, 2, 5],
        "hidden_size": 24,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 8,
        "rank": 10,
        "rope": RopeConfig(style="halves", dims=8),
        "bias": True,
        "thresholds": {"0.135": [0.1, 0.2, 0.3, 0.4]},
        "budget_shares": {"0.135": [0.1, 0.12, 0.15, 0.17]},
        "logit_offset": -0.5,
        "metrics": METRICS,
        **changes,
    }
    return MemoryIndexer(IndexerConfig.model_validate(fields), inverse_frequencies(8, 1e5))


def joint(layers: tuple[int, ...] = (10, 12, 20)) -> dict[str, torch.Tensor]:
    """The tensors of a published file, of small rank and width."""
    return twin.published_tensors({layer: twin.random_layer(4, 128, 6, 20, seed=layer) for layer in layers})


def some_input(indexer: MemoryIndexer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config, g = indexer.config, torch.Generator().manual_seed(0)
    heads = (config.kv_heads,) if config.kv_heads > 1 else ()
    keys = torch.randn(9, *heads, config.head_dim, generator=g)
    return torch.randn(2, config.hidden_size, generator=g), keys, torch.tensor([7, 8000])


def same(a: MemoryIndexer, b: MemoryIndexer) -> bool:
    x = some_input(a)
    return a.layers == b.layers and all(torch.equal(a.logits(n, *x), b.logits(n, *x)) for n in a.layers)


def test_round_trip(tmp_path: Path) -> None:
    indexer = small()
    indexer.save(tmp_path / "a" / "b")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["README.md", "config.json", "model.safetensors"]
    loaded = MemoryIndexer.load(str(tmp_path / "a" / "b"), device="cpu")
    assert loaded.layers == (0, 1, 2, 5) and loaded.config == indexer.config and same(indexer, loaded)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    loaded.save(tmp_path / "again")
    for name in ("README.md", "config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "a" / "b" / name).read_bytes()
    half = tmp_path / "half"
    indexer.save(half, torch.bfloat16)
    assert load_file(half / "model.safetensors")["retrievers.l0.wq_a.weight"].dtype == torch.bfloat16
    x = some_input(indexer)
    assert torch.allclose(MemoryIndexer.load(half).logits(5, *x), indexer.logits(5, *x), atol=0.1)
    assert torch.equal(MemoryIndexer.load(half).layer(5).inv_freq, indexer.layer(5).inv_freq)


def test_model_card(tmp_path: Path) -> None:
    small().save(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nlibrary_name: vllm-lsa\nbase_model: "SmolLM2"\n---\n')
    assert "|  | value | ΔNLL | needles | tokens |" in card
    assert "| recall | 0.91235 |  |  |  |" in card and "| 10 % |  | 0.019 | 18 \\| 20 |  |" in card
    assert card.count("| 13.5 % |") == 2
    small(metrics={}).save(tmp_path)
    assert "Not evaluated" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("freqs", ["freqs_cis", "retrievers.l10.freqs_cis", None])
def test_published(wrapped: bool, dtype: torch.dtype, freqs: str | None, tmp_path: Path) -> None:
    tensors = {name: x.to(dtype) for name, x in joint().items()}
    if freqs:
        tensors[freqs] = torch.ones(8, 32, dtype=torch.complex64)
    save_file(tensors, tmp_path / "joint.safetensors")
    torch.save({"model_state": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "joint.pt")
    a, b = (MemoryIndexer.load(tmp_path / name) for name in ("joint.safetensors", "joint.pt"))
    assert a.layers == (10, 12, 20) and same(a, b) and a.config == b.config
    config = a.config
    assert (config.heads, config.head_dim, config.rank, config.hidden_size) == (4, 128, 6, 20)
    assert config.rotated_keys and config.published_rounding and config.kind == "shared" and config.logit_offset == 0
    assert torch.equal(a.layer(12).wq_a.weight, tensors["retrievers.l12.wq_a.weight"].float())
    # It becomes a folder like any other.
    a.save(tmp_path / "folder")
    assert same(a, MemoryIndexer.load(tmp_path / "folder"))


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def change_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for name, x in changes.items():
            name = "retrievers.l1." + name.replace("__", ".")
            tensors.pop(name, None)
            if x is not None:
                tensors[name] = x
        save_file(tensors, folder / "model.safetensors")

    return apply


def cut(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


NAN = torch.full((10,), torch.nan)
FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is done to a good folder, the file that the refusal names, what else it says
    "no config": (remove("config.json"), "config.json", "does not exist: give a folder"),
    "no weights": (remove("model.safetensors"), "model.safetensors", "does not exist: give a checkpoint folder"),
    "torn config": (cut("config.json", 100), "config.json", r"is not readable JSON \(.+\): copy"),
    "empty config": (cut("config.json", 0), "config.json", "is not readable JSON"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe") and None, "config.json", "not readable"),
    "list config": (lambda f: (f / "config.json").write_text("[1]") and None, "config.json", "is not a JSON object"),
    "torn header": (cut("model.safetensors", 100), "model.safetensors", r"is not a readable safetensors file \(.+copy"),
    "torn data": (cut("model.safetensors", -4), "model.safetensors", "is not a readable safetensors file"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors", "is not a readable safetensors file"),
    "too new": (change_config(format_version=2, new=1), "config.json", "format_version=2, this is 1: upgrade vllm-lsa"),
    "odd version": (change_config(format_version="1"), "config.json", "format_version='1': .+: copy"),
    "no version": (change_config(format_version=...), "config.json", "has no format_version and kind"),
    "unknown kind": (
        change_config(kind="demand"),
        "config.json",
        r"has kind='demand', .+ \(kinds: per_layer, shared\)",
    ),
    "unhashable kind": (change_config(kind=[1]), "config.json", r"has kind=\[1\]"),
    "extra": (change_config(colour="red"), "config.json", "colour is not a field: copy"),
    "missing": (change_config(rank=...), "config.json", "rank is missing: copy"),
    "descending": (change_config(layers=[2, 1, 0, 5]), "config.json", r"layers=\[2, 1, 0, 5\] must ascend"),
    "kv heads": (change_config(kv_heads=4), "config.json", "kv_heads=4 does not divide heads=6"),
    "rope": (change_config(rope={"style": "halves", "first_dim": 2, "dims": 8}), "config.json", "past head_dim=8"),
    "rope style": (change_config(rope={"style": "spiral", "dims": 8}), "config.json", "rope.style='spiral'"),
    "thresholds": (change_config(thresholds={"0.1": [0.5, 0.5]}), "config.json", "has 2 values for 4 layers"),
    "shared-usage": (change_config(kind="shared", usage=True), "config.json", "usage is for sets of layers or heads"),
    "shared-weights": (
        change_config(kind="shared", layer_weights=[1.0] * 40), "config.json", "layer_weights is for sets of layers",
    ),
    "shares": (change_config(budget_shares={"0.1": [0.5]}), "config.json", "has 1 values for 4 layers"),
    "other rank": (change_config(rank=11), "model.safetensors", r"wq_a.weight has shape \[10, 24\], not \[11, 24\]"),
    "other layers": (change_config(layers=[0, 1, 2, 6]), "model.safetensors", "lacks retrievers.l6.bias and 5 more"),
    "lacks": (change_tensors(wq_b__weight=None), "model.safetensors", "lacks retrievers.l1.wq_b.weight: copy"),
    "unknown": (change_tensors(extra=torch.ones(1)), "model.safetensors", "holds unknown retrievers.l1.extra: copy"),
    "shape": (change_tensors(q_norm_weight=torch.ones(9)), "model.safetensors", r"has shape \[9\], not \[10\]"),
    "integers": (change_tensors(q_norm_weight=torch.ones(10).int()), "model.safetensors", "torch.int32, not floating"),
    "not finite": (change_tensors(q_norm_weight=NAN), "model.safetensors", "values that are not finite"),
}


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `load` and `vllm-lsa inspect` both say, the latter with exit status 2."""
    with pytest.raises(LsaError) as raised:
        MemoryIndexer.load(path)
    line = str(raised.value)
    assert "\n" not in line
    for options in ([], ["--json"]):
        assert cli.main(["inspect", str(path), *options]) == 2
        assert capsys.readouterr() == ("", f"vllm-lsa: {line}\n")
    return line


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, file, says = FOLDERS[name]
    small().save(tmp_path)
    damage(tmp_path)
    line = refusal(tmp_path, capsys)
    assert line.startswith(str(tmp_path / file)) and re.search(says, line), line


def without(name: str) -> dict[str, torch.Tensor]:
    return {key: x for key, x in joint().items() if key != name}


JOINTS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "no layers": ({"wq_a.weight": torch.ones(2, 2)}, "has no tensors retrievers.l…: give a joint checkpoint"),
    "empty": ({}, "has no tensors retrievers.l…"),
    "lacks wq_a": (without("retrievers.l10.wq_a.weight"), "lacks retrievers.l10.wq_a.weight"),
    "lacks wq_b": (without("retrievers.l12.wq_b.weight"), "lacks retrievers.l12.wq_b.weight"),
    "unknown": ({**joint(), "retrievers.l12.wk.weight": torch.ones(3)}, "holds unknown retrievers.l12.wk.weight"),
    "foreign": ({**joint(), "lm_head.weight": torch.ones(3)}, "holds unknown lm_head.weight"),
    "one dimension": ({**joint(), "retrievers.l10.wq_a.weight": torch.ones(3)}, r"has shape \[3\], not two dimensions"),
    "ranks differ": (
        {**joint(), "retrievers.l20.q_norm_weight": torch.ones(5)}, r"retrievers.l20.q_norm_weight has shape \[5\]",
    ),
    "head width": (
        {**joint(), "retrievers.l12.wq_b.weight": torch.ones(256, 6)}, r"has shape \[256, 6\], not \[512, 6\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("name", JOINTS)
def test_joint_files_that_are_refused(
    name: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, says = JOINTS[name]
    path = tmp_path / f"joint.{suffix}"
    torch.save(tensors, path) if suffix == "pt" else save_file(tensors, path)
    line = refusal(path, capsys)
    assert line.startswith(str(path)) and re.search(says, line), line


def test_pickled_code_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    path, ran = tmp_path / "joint.pt", tmp_path / "ran"
    torch.save({**joint(), "x": Hostile(ran)}, path)
    line = refusal(path, capsys)
    assert re.search(r"does not load as plain weights, it holds code \(.+\): save its tensors alone", line)
    with path.open("wb") as file:
        pickle.dump(Hostile(ran), file)  # not as torch pickles
    assert "it is damaged or holds code (UnpicklingError): save" in refusal(path, capsys)
    assert not ran.exists() and not recwarn.list


@pytest.mark.parametrize("keep", [0, 1, 100, 2000, -20])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_torn_joint_files(keep: int, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"joint.{suffix}"
    torch.save(joint(), path) if suffix == "pt" else save_file(joint(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert refusal(path, capsys).startswith(f"{path} ")


def test_other_things_that_are_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in refusal(tmp_path / "nothing", capsys)
    assert "config.json does not exist" in refusal(tmp_path, capsys)
    (tmp_path / "notes.txt").write_text("hello")
    assert "is not a checkpoint: give" in refusal(tmp_path / "notes.txt", capsys)
    torch.save([1, 2], tmp_path / "list.pt")
    assert "does not hold tensors by name" in refusal(tmp_path / "list.pt", capsys)
    torch.save({"a": 1}, tmp_path / "numbers.pt")
    assert "does not hold tensors by name" in refusal(tmp_path / "numbers.pt", capsys)
    # A model's own folder has a config.json too.
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 576}')
    assert "has no format_version and kind, so it is not a memory indexer's" in refusal(tmp_path, capsys)


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    indexer = small()
    with torch.no_grad():
        indexer.layer(5).q_norm_weight[3] = torch.inf
    with pytest.raises(LsaError, match="retrievers.l5.q_norm_weight has values that are not finite"):
        indexer.save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_backbone(tmp_path: Path) -> None:
    small().save(tmp_path)
    indexer = MemoryIndexer.load(tmp_path)
    indexer.require_backbone("0123456789ab-ba9876543210")
    indexer.require_backbone("0123456789ab")  # weights that could not be sampled
    for wrong, says in (("0123456789ab-ba9876543211", "other weights"), ("1123456789ab", "another architecture")):
        with pytest.raises(LsaError) as raised:
            indexer.require_backbone(wrong)
        line = str(raised.value)
        assert line.startswith(f"{tmp_path} was trained for SmolLM2") and says in line and wrong in line
        assert "train for this one with 'vllm-lsa train'" in line and "\n" not in line
    small(backbone_fingerprint=None).require_backbone("anything")


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 12,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000,
    "rope_scaling": {"type": "linear", "factor": 4},
    "vocab_size": 100,
}


def test_fingerprint_of_a_config() -> None:
    one = fingerprint(LLAMA)
    assert re.fullmatch("[0-9a-f]{12}", one)
    newer = {key: value for key, value in LLAMA.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert fingerprint({**newer, "head_dim": 16, "use_cache": False, "dtype": "float32"}) == one
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert fingerprint({**LLAMA, key: 8}) != one
    for change in (
        {"architectures": ["Qwen3ForCausalLM"]},
        {"head_dim": 32},
        {"rope_theta": 5e5},
        {"rope_scaling": {}},
    ):
        assert fingerprint({**LLAMA, **change}) != one


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    names = [f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(12) for p in "qk"]
    # Small enough that some are subnormal in fp16, which a bf16 model saved in fp16 holds only roughly.
    return {name: (torch.randn(64, 64) * 10.0 ** -torch.arange(0, 64).div(8)).bfloat16().to(dtype) for name in names}


def model_folder(path: Path, tensors: dict[str, torch.Tensor], sharded: bool = False) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA))
    if not sharded:
        save_file(tensors, path / "model.safetensors")
        return path
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_file({name: x for name, x in tensors.items() if shards[name] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return path


def test_fingerprint_of_a_folder(tmp_path: Path) -> None:
    one = fingerprint_of(model_folder(tmp_path / "bf16", weights()))
    assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]{12}", one) and one.startswith(fingerprint(LLAMA))
    for dtype in (torch.float32, torch.float16):
        assert fingerprint_of(model_folder(tmp_path / str(dtype), weights(dtype))) == one
    assert fingerprint_of(model_folder(tmp_path / "sharded", weights(), sharded=True)) == one
    for layer, row, matters in ((0, 0, True), (11, 63, True), (0, 30, False), (5, 0, False)):
        tensors = weights()
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"][row, 3] += 1
        changed = fingerprint_of(model_folder(tmp_path / f"{layer}-{row}", tensors))
        assert (changed != one) == matters and changed.startswith(fingerprint(LLAMA))
    assert fingerprint_of(model_folder(tmp_path / "none", {"x": torch.ones(1)})) == fingerprint(LLAMA)
    cut("model.safetensors", 1000)(tmp_path / "bf16")
    with pytest.raises(LsaError, match="model.safetensors is damaged .+: download"):
        fingerprint_of(tmp_path / "bf16")
    shutil.rmtree(tmp_path / "bf16")
    with pytest.raises(LsaError, match="config.json does not exist"):
        fingerprint_of(tmp_path / "bf16")


@pytest.mark.skipif(not MODEL.exists(), reason="needs the small model: make model")
def test_fingerprint_of_the_small_model() -> None:
    assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]{12}", fingerprint_of(MODEL))


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small().save(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line in (
        f"checkpoint    {tmp_path}",
        "format        checkpoint folder, version 1",
        "kind          per_layer: one resident set per layer",
        "backbone      SmolLM2, fingerprint 0123456789ab-ba9876543210",
        "layers        0-2, 5 (4)",
        "input         hidden, 24 values",
        "scorer        rank 10, 6 heads of 8, bias",
        "keys          mean_key, 3 per chunk",
        "rope          halves on dimensions 0-7 of 8",
        f"parameters    {4 * (10 * 24 + 48 * 10 + 10 + 6 * 24 + 1):,} (float32)",
        "thresholds",
        "  0.135       0.1 0.2 0.3 0.4",
        "budget shares",
        "  0.135       0.1 0.12 0.15 0.17",
        "evaluation",
        "          value    ΔNLL   needles  tokens",
        "  13.5 %           0.012           8192",
    ):
        assert line in lines, "\n".join(lines)
    assert any("wq_b.weight [48, 10]" in line for line in lines)
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layout"] == "folder" and report["parameters"] == 4 * (10 * 24 + 48 * 10 + 10 + 6 * 24 + 1)
    assert report["layer_shapes"]["weights_proj.weight"] == [6, 24]
    assert IndexerConfig.parse(report["config"], tmp_path) == small().config


def test_inspect_a_published_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model_state": joint()}, tmp_path / "joint.pt")
    assert cli.main(["inspect", str(tmp_path / "joint.pt")]) == 0
    out = capsys.readouterr().out
    assert "format        published joint file\n" in out and "backbone      DeepSeek-V4-Flash" in out
    assert "layers        10, 12, 20 (3)\n" in out and "evaluation    none\n" in out
    assert "rope          interleaved on dimensions 64-127 of 128\n" in out
