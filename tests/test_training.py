"""Training of the indexer, whole: its result, kills and resuming, several processes, labels, losses, refusals."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from indexer_training import masses, train
from indexer_training.backbone import Rotary, unsuited
from indexer_training.capture import Recorder
from indexer_training.cli import _steps as steps_of_run
from indexer_training.data import is_synthetic
from indexer_training.distributed import Group
from indexer_training.label import counts_of, forced_of, labels
from indexer_training.product import fit_layer
from indexer_training.settings import STEPS, Settings, resolve, write_settings
from indexer_training.train import Batch, choose_layers, loss_of
from indexer_training.workspace import Workspace, write_json, write_tensors
from tests import test_engine, tiny_models
from tests.paths import MODEL, ROOT
from tests.test_ensemble import compare_lanes
from vllm_lsa import cli
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import IndexerConfig, LayerIndexer, MemoryIndexer
from vllm_lsa.indexer.checkpoint import fingerprint_of
from vllm_lsa.indexer.product import ProductIndex, ProductTables
from vllm_lsa.indexer.rotary import RopeConfig, inverse_frequencies, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS, KV_HEADS, DIM, CONTEXT = 2, 4, 2, 16, 512
ARGUMENTS = {
    "context": CONTEXT, "documents": 4, "steps": 24, "save_every": 4, "cycles": 4, "key_sample": 1024,
    "damage_windows": 1, "heldout_documents": 1, "evaluate_budgets": 0.4, "budget": 0.4, "rank": 24, "device": "cpu",
}  # fmt: skip
RESULTS = ("model.safetensors", "product.safetensors", "config.json", "README.md")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, queries and keys large enough that attention is not even."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config)
    for layer in llama.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.data.normal_(std=0.25)
    llama.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def command(out: Path, model: Path, text: Path, **changes: Any) -> list[str]:
    given = {"model": model, "text": text, "out": out, **ARGUMENTS, **changes}
    return ["train", *(word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value)))]


def start(arguments: list[str], log: Path, *launcher: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, *(launcher or ("-m", "vllm_lsa.cli")), *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(program, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    code = process.wait(timeout=200)
    assert code == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def runs(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs with the same settings: `whole`, `killed` time and again, and `two` processes."""
    folder = tmp_path_factory.mktemp("runs")
    log = {name: folder / f"{name}.log" for name in ("whole", "killed", "two")}
    two = start(
        command(folder / "two", model, text), log["two"], "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", "2", "-m", "vllm_lsa.cli",
    )  # fmt: skip
    whole = start(command(folder / "whole", model, text), log["whole"])
    out = folder / "killed"
    for marker in (
        "data/window_00001.safetensors", "capture/window_00000.safetensors", "train/state.pt",
        "calibrate/layer_000.safetensors",
    ):  # fmt: skip
        killed = start(command(out, model, text), log["killed"])
        while not (out / "work" / marker).exists():
            assert killed.poll() is None, f"ended before {marker}: {log['killed'].read_text()[-3000:]}"
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)  # of this process only: those of the steps must go with it
        assert killed.wait() == -signal.SIGKILL
    finish(start(["train", "--out", str(out)], log["killed"]), log["killed"])
    finish(whole, log["whole"])
    finish(two, log["two"])
    return folder


def test_whole_run(runs: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "whole"
    assert sorted(path.name for path in out.iterdir()) == sorted([*RESULTS, "run.json", "work"])
    indexer = MemoryIndexer.load(out)
    config = indexer.config
    indexer.require_backbone(fingerprint_of(model))
    assert config.input == "query" and config.usage and config.weights_bias and config.backbone == "tiny"
    assert (config.hidden_size, config.heads, config.kv_heads, config.rank) == (HEADS * DIM, HEADS, KV_HEADS, 24)
    assert config.layer_weights is not None and len(config.layer_weights) == LAYERS
    assert math.isclose(sum(config.layer_weights), LAYERS, rel_tol=1e-6)
    assert config.layer_gains is not None and len(config.layer_gains) == len(config.layers)
    assert config.demand_index is not None
    tables = ProductTables.load(out / config.demand_index.file)
    assert (tables.layers, tables.kv_heads, tables.head_dim, tables.subspaces) == (LAYERS, KV_HEADS, DIM, 8)
    assert list(config.thresholds) == ["0.05", "0.075", "0.1", "0.135", "0.16", "0.2"]
    for values in config.thresholds.values():
        assert all(0 <= value <= 1 for value in values)
    assert {"dense", "recall, trained, 40.0%"} <= config.metrics.keys()
    run = json.loads((out / "run.json").read_text())
    assert list(run["steps"]) == list(STEPS)
    assert all(step["seconds"] >= 0 and step["peak_rss_mib"] > 0 for step in run["steps"].values())
    assert cli.main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "demand index  product, 8 bytes" in shown and "trained, 40.0% + index 12.5%" in shown
    assert (out / "README.md").read_text().count("| trained, 40.0%") == 1


def test_killed_and_resumed(runs: Path) -> None:
    for name in RESULTS:
        assert (runs / "whole" / name).read_bytes() == (runs / "killed" / name).read_bytes(), name
    found = 0
    for path in (runs / "whole" / "work").rglob("*.safetensors"):
        assert path.read_bytes() == (runs / "killed" / path.relative_to(runs / "whole")).read_bytes(), path
        found += 1
    assert found > 15
    assert not [path for path in (runs / "killed").rglob("*") if path.name == "state.pt"]
    steps = json.loads((runs / "killed" / "run.json").read_text())["steps"]
    assert any(step["resumed"] for step in steps.values())


def test_two_processes(runs: Path) -> None:
    steps = json.loads((runs / "two" / "run.json").read_text())["steps"]
    assert {step["processes"] for step in steps.values()} == {2}
    for name in ("model.safetensors", "product.safetensors", "work/train/indexer.safetensors"):
        one, two = load_file(runs / "whole" / name), load_file(runs / "two" / name)
        assert one.keys() == two.keys()
        for key, x in one.items():
            assert torch.allclose(x.double(), two[key].double(), rtol=0, atol=1e-6), key


def test_training_without_the_backbone(runs: Path, tmp_path: Path) -> None:
    """Not even transformers can be imported, and the model's weights are not there."""
    out = tmp_path / "copy"
    shutil.copytree(runs / "whole", out)
    for step in STEPS[3:]:
        shutil.rmtree(out / "work" / step)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from indexer_training.cli import step_main; step_main('train')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--out", str(out)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr.decode()
    for name in ("indexer.safetensors", "recall.json"):
        assert (out / "work/train" / name).read_bytes() == (runs / "whole/work/train" / name).read_bytes()
    # A step by itself says what it lacks.
    arguments = [sys.executable, "-m", "indexer_training.export", "--out", str(out)]
    done = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=100)
    assert done.returncode == 2 and b"export needs what calibrate makes" in done.stderr


SHARED: dict[str, Any] = {"form": "shared", "min_gain": -1.0}  # so that both layers are taken


def as_shared(runs: Path, name: str) -> Path:
    """A run that has captured what `whole` has, and labelled nothing yet."""
    out = runs / name
    shutil.copytree(runs / "whole", out)
    for step in STEPS[2:]:
        shutil.rmtree(out / "work" / step)
    for result in RESULTS:
        (out / result).unlink()
    return out


def go_on(out: Path, given: dict[str, Any]) -> None:
    """Run what is left, here: a new process would take seconds to start."""
    settings = resolve(out, given)
    write_settings(out, settings)
    assert steps_of_run(STEPS, out, settings) == 0


@pytest.fixture(scope="module")
def shared(runs: Path) -> Path:
    out = as_shared(runs, "shared")
    go_on(out, SHARED)
    return out


def test_shared_form(
    shared: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From labels to serving: its checkpoint loads, is shown, and gives the engine one set for all layers."""
    indexer = MemoryIndexer.load(shared)
    config = indexer.config
    indexer.require_backbone(fingerprint_of(model))
    about = json.loads((shared / "work/train/recall.json").read_text())
    assert (config.kind, list(config.layers), config.ensemble) == ("shared", about["layers"], about["ensemble"])
    assert config.layers == (0, 1) and config.bias and not config.usage and config.layer_weights is None
    assert list(config.layer_gains or ()) == about["gains"]
    assert about["recall"]["usage"][0] + sum(about["gains"]) == pytest.approx(about["recall"]["trained"][0], abs=1e-4)
    assert about["recall"]["trained"][0] <= about["recall"]["oracle"][0]
    assert list(config.thresholds) == ["0.05", "0.075", "0.1", "0.135", "0.16", "0.2"] and not config.budget_shares
    values = [x for (x,) in config.thresholds.values()]
    assert values == sorted(values, reverse=True) and all(0 <= x <= 1 for x in values)
    assert {"dense", "trained, 40.0% + index 12.5%", "recall, trained, 40.0%"} <= config.metrics.keys()
    assert cli.main(["inspect", str(shared)]) == 0
    shown = capsys.readouterr().out
    assert f"shared: one resident set, {config.ensemble} over layers" in shown and "demand index  product" in shown

    monkeypatch.setattr(test_engine, "LAYERS", LAYERS)
    monkeypatch.setattr(test_engine, "HQ", HEADS)
    given = {"indexer": str(shared), "demand": "off", "budget": 0.3, "period": 16, "check": "poison"}
    settings = LsaConfig.parse({"lsa": {**given, "recency_tokens": 16}})
    assert (settings.sets, settings.mode, settings.chunk_tokens) == ("shared", config.ensemble, 8)
    simulation = test_engine.Simulation(settings, slots=LAYERS * 45)
    same = compare_lanes(simulation)
    test_engine.run(simulation, 80)
    assert simulation.sparse_decodes > 100 and same and all(same)
    simulation.leak_check()


def test_shared_form_killed_and_resumed(runs: Path, shared: Path) -> None:
    out, log = as_shared(runs, "shared_killed"), runs / "shared_killed.log"
    words = (word for name, value in SHARED.items() for word in ("--" + name.replace("_", "-"), str(value)))
    killed = start(["train", "--out", str(out), *words], log)
    while not (out / "work/train/state.pt").exists():
        assert killed.poll() is None, log.read_text()[-3000:]
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (out / "work/train/done.json").exists()
    go_on(out, {})
    for name in (*RESULTS, "work/train/indexer.safetensors", "work/train/recall.json"):
        assert (out / name).read_bytes() == (shared / name).read_bytes(), name


def test_captured_queries(runs: Path, model: Path) -> None:
    """What is stored is what q_proj gave for the last token before each cycle: RoPE is off again."""
    from transformers import AutoModel

    settings = settings_of(runs / "whole")
    captured = load_file(runs / "whole/work/capture/window_00002.safetensors")
    tokens = load_file(runs / "whole/work/data/window_00002.safetensors")["tokens"]
    llama = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for layer in llama.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        llama(input_ids=tokens.long()[None])
    for layer in range(LAYERS):
        want = seen[layer][torch.tensor(settings.starts) - 1]
        assert torch.allclose(captured["query"][layer].float(), want, atol=1e-3 * float(want.abs().max()))


def settings_of(out: Path) -> Settings:
    content = json.loads((out / "work" / "settings.json").read_text())
    del content["layout"]
    return Settings.model_validate(content)


def small_settings(**changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "model": "m", "text": "t", "context": 320, "documents": 1, "heldout": "", "heldout_documents": 1,
        "dtype": "float32", "window": 64, "first": 128, "rank": 8, "steps": 1, "measure_every": 1,
        "evaluate_budgets": (0.1,), "kept": 12, "recency_tokens": 16, "sink_tokens": 8,
    }  # fmt: skip
    return Settings.model_validate({**fields, **changes})


def record(settings: Settings, q: torch.Tensor, k: torch.Tensor) -> dict[str, torch.Tensor]:
    speeds = inverse_frequencies(DIM, 1e4)
    backbone: Any = SimpleNamespace(rotary=Rotary(speeds[None], 1.0, "halves", DIM))
    recorder = Recorder(settings, backbone, 0)
    out = recorder.attend(0, q, k, torch.randn(k.shape, generator=torch.Generator().manual_seed(3)), DIM**-0.5)
    assert out.shape == q.shape
    return recorder.tensors()


def some_attention(settings: Settings, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = settings.context, DIM
    return 2 * torch.randn(HEADS, *shape, generator=g), 2 * torch.randn(KV_HEADS, *shape, generator=g)


@pytest.mark.parametrize(("window", "decay"), [(64, 0.7), (128, 1.0)])
def test_masses_and_labels_are_aligned(window: int, decay: float) -> None:
    """Against loops over cycles, heads, queries and keys, in float64."""
    s = small_settings(window=window, usage_decay=decay)
    q, k = some_attention(s)
    got = record(s, q, k)
    counts, fixed = counts_of(s), forced_of(s, counts_of(s))
    parts = masses.Masses._fields
    upcoming, last = (masses.Masses(*(got[f"{kind}_{part}"] for part in parts)) for kind in ("next", "last"))
    positive, hard = labels(upcoming, last, fixed, 0.6)
    group = HEADS // KV_HEADS
    assert list(s.starts) == list(range(128, 320 - window + 1, 64))
    for i, start in enumerate(s.starts):
        n = start // 8
        assert int(counts[i]) == n
        for head in range(KV_HEADS):
            coming, used = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
            for t in range(start - 64, start + window):
                shares = torch.zeros(n, dtype=torch.float64)
                for h in range(head * group, (head + 1) * group):
                    dots = (k[head].double() @ q[h, t].double()) * DIM**-0.5
                    seen = dots[: min(t + 1, start)].exp()
                    seen = torch.cat([seen, seen.new_zeros(start - len(seen))]).view(n, 8).sum(-1)
                    shares += seen / seen.sum() / group
                if t >= start:
                    coming += shares / window
                elif decay == 1:
                    used += shares / 64
                else:
                    used = torch.maximum(used * decay, shares)
            for found, want in ((upcoming, coming), (last, used)):
                assert torch.equal(found.mass[0, i, head].sort(descending=True).values, found.mass[0, i, head])
                for c, m in zip(found.chunk[0, i, head].tolist(), found.mass[0, i, head].tolist(), strict=True):
                    assert abs(m - float(want[c])) < 1e-3
                rest = float(want.sum()) - float(found.mass[0, i, head].double().sum())
                assert abs(float(found.rest[0, i, head]) - rest) < 1e-2
                everything = masses.dense(masses.Masses(*(x[0, i : i + 1] for x in found)), counts[i : i + 1], s.chunks)
                assert abs(float(everything[0, head, :n].sum()) - float(want.sum())) < 1e-2

            def top(mass: torch.Tensor, start: int = start, n: int = n) -> set[int]:
                free = {c: float(mass[c]) for c in range(1, n - 2)}  # 1 sink chunk, 2 newest ones
                chosen: set[int] = set()
                for c in sorted(free, key=free.__getitem__, reverse=True):
                    if sum(free[x] for x in chosen) >= 0.6 * sum(free.values()):
                        break
                    chosen.add(c)
                return chosen

            def named(flags: torch.Tensor, where: masses.Masses, i: int = i, head: int = head) -> set[int]:
                return set(where.chunk[0, i, head][flags[0, i, head]].tolist())

            # What is kept one by one may end before a share is reached.
            want_positive = top(coming) & set(upcoming.chunk[0, i, head].tolist())
            assert len(named(positive, upcoming) ^ want_positive) <= 1
            want_hard = (top(used) & set(last.chunk[0, i, head].tolist())) - want_positive
            assert len(named(hard, last) ^ want_hard) <= 1


def test_labels_are_causal() -> None:
    """Tokens after a cycle's window change nothing of it; those in it change neither its query nor usage nor keys."""
    s = small_settings()
    q, k = some_attention(s)
    before = record(s, q, k)
    other_q, other_k = some_attention(s, seed=1)
    start = s.starts[1]

    def after(end: int) -> dict[str, torch.Tensor]:
        return record(s, torch.cat([q[:, :end], other_q[:, end:]], 1), torch.cat([k[:, :end], other_k[:, end:]], 1))

    changed = after(start)
    for name in ("query", "last_chunk", "last_mass", "last_rest"):
        assert torch.equal(changed[name][:, :2], before[name][:, :2]), name
        assert not torch.equal(changed[name][:, 2:], before[name][:, 2:]), name
    assert torch.equal(changed["keys"][:, : start // 8], before["keys"][:, : start // 8])
    assert not torch.equal(changed["next_mass"][:, 1], before["next_mass"][:, 1])
    changed = after(start + 64)
    for name in ("next_chunk", "next_mass", "next_rest"):
        assert torch.equal(changed[name][:, :2], before[name][:, :2]), name


def scorer(usage: bool = True) -> LayerIndexer:
    config = IndexerConfig(
        kind="per_layer", backbone="test", layers=(0,), hidden_size=20, heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM,
        rank=9, rope=RopeConfig(style="halves", dims=DIM), usage=usage, weights_bias=True, bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    made = LayerIndexer(config, inverse_frequencies(DIM, 1e4))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


@pytest.mark.parametrize("per_row", [False, True])
def test_head_logits(per_row: bool) -> None:
    made = scorer()
    x, at, counts = torch.randn(3, 20), torch.tensor([40, 90, 900]), torch.tensor([5, 9, 11])
    keys = torch.randn(*([3] if per_row else []), 11, KV_HEADS, DIM)
    used = torch.rand(3, KV_HEADS, 11)
    alone = made.head_logits(x, keys, at).detach()
    # Over all heads together it is the paper's score.
    assert made.bias is not None
    assert torch.allclose(alone.sum(1) - (KV_HEADS - 1) * made.bias, made(x, keys, at), atol=1e-4)
    got = made.head_logits(x, keys, at, used, counts).detach()
    assert made.usage_gain is not None and made.usage_floor is not None and made.age_gain is not None
    gain, floor, age_gain = (x.tolist() for x in (made.usage_gain, made.usage_floor, made.age_gain))
    for b in range(3):
        for h in range(KV_HEADS):
            for n in range(11):
                more = gain[h] * math.log(float(used[b, h, n]) + math.exp(floor[h]))
                more -= age_gain[h] * math.log(max(1, int(counts[b]) - n))
                assert abs(float(got[b, h, n]) - float(alone[b, h, n]) - more) < 1e-4
    made.head_logits(x, keys, at, used, counts).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())
    simple = scorer(usage=False)
    assert torch.equal(simple.head_logits(x, keys, at, used, counts), simple.head_logits(x, keys, at))
    for bad in ({"usage": used}, {"usage": used[:, :1], "counts": counts}, {"usage": used, "counts": counts[:2]}):
        with pytest.raises(ValueError, match="usage|counts"):
            made.head_logits(x, keys, at, **bad)


@pytest.mark.parametrize("loss", ["soft", "bce", "focal"])
def test_losses(loss: str) -> None:
    """What is attended to goes up, hard negatives go down and do so harder, and what is always kept is left alone."""
    fixed = torch.zeros(1, 6, dtype=torch.bool)
    fixed[0, 0] = True
    chunk, mass = torch.tensor([[[[2, 1]]]]), torch.tensor([[[[0.6, 0.1]]]]).half()
    upcoming = masses.Masses(chunk.short(), mass, torch.zeros(1, 1, 1).half())
    last = masses.Masses(torch.tensor([[[[4, 2]]]]).short(), mass, torch.zeros(1, 1, 1).half())
    flags = torch.tensor([[[[1, 0]]]], dtype=torch.uint8)
    nothing = torch.zeros(0)
    counts = torch.tensor([6])
    batch = Batch(nothing, nothing, upcoming, last, flags, flags, counts, counts, fixed)

    def gradient(weight: float) -> torch.Tensor:
        logits = torch.zeros(1, 1, 6, requires_grad=True)
        loss_of(logits, batch, 0, small_settings(loss=loss, hard_weight=weight)).backward()
        assert logits.grad is not None
        return logits.grad[0, 0]

    plain, harder = gradient(1.0), gradient(3.0)
    for found in (plain, harder):
        assert found[0] == 0 and found[2] < 0 and found[4] > 0
    assert harder[4] / harder[5] > 2.5 * (plain[4] / plain[5])


@pytest.mark.parametrize("loss", ["soft", "bce"])
def test_it_learns(loss: str, tmp_path: Path) -> None:
    """Attention that a hidden map of the query decides, while usage says nothing: learned on windows not trained on."""
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "hidden_size": HEADS * DIM, "head_dim": DIM,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    })  # fmt: skip
    (tmp_path / "model" / "model.safetensors").touch()
    s = small_settings(
        model=str(tmp_path / "model"), context=1024, documents=16, steps=160, rank=HEADS * DIM, loss=loss, kept=64,
        budget=0.3, learning_rate=4e-3, hard_weight=1.0,
    )  # fmt: skip
    work = Workspace(tmp_path, s)
    write_tensors(
        work.folder("capture") / "model.safetensors", {"inv_freq": torch.zeros(1, DIM // 2)},
        {"rotary": json.dumps({"scaling": 1.0, "style": "halves", "dims": DIM})},
    )  # fmt: skip
    counts, unused = counts_of(s), s.chunks - 1
    g = torch.Generator().manual_seed(0)
    hidden_map = torch.linalg.qr(torch.randn(HEADS * DIM, HEADS * DIM, generator=g))[0]
    later = torch.arange(s.chunks) >= counts[:, None, None]
    for i in range(s.documents):
        x = torch.randn(len(counts), HEADS * DIM, generator=g)
        keys = torch.randn(s.chunks, KV_HEADS, DIM, generator=g)
        q = (x @ hidden_map).view(len(counts), KV_HEADS, -1, DIM)
        mass = (torch.einsum("shgd,nhd->shgn", q, keys) * 0.7).masked_fill(later[:, :, None], -torch.inf).softmax(-1)
        usage = torch.rand(len(counts), KV_HEADS, s.chunks, generator=g).masked_fill(later, 0)
        upcoming = masses.sparse(mass.mean(2), s.kept, unused)
        last = masses.sparse(usage / usage.sum(-1, keepdim=True), s.kept, unused)
        both = [masses.Masses(*(part[None] for part in found)) for found in (upcoming, last)]
        positive, hard = labels(*both, forced_of(s, counts), s.top_p)
        parts = masses.Masses._fields
        content = {f"{n}_{p}": getattr(m, p) for n, m in zip(("next", "last"), both, strict=True) for p in parts}
        nothing = {name: torch.zeros(1) for name in ("query_moment", "key_sum", "key_sample")}
        write_tensors(
            work.shard("capture", i), {**content, "query": x[None].half(), "keys": keys[None].half()} | nothing
        )
        write_tensors(work.shard("label", i), {"positive": positive.byte(), "hard": hard.byte()})
    facts = train.run(work, Group("train", "cpu"))
    found = facts["recall"]
    assert found["trained"] > found["usage"] + 0.2 and found["oracle"] > found["trained"]
    assert facts["loss_last"] < facts["loss_first"]


def test_product_tables_fit() -> None:
    """Products with queries come out better than by k-means of the keys as they are, and the same again."""
    g = torch.Generator().manual_seed(0)
    skew = torch.randn(KV_HEADS, 32, 32, generator=g)
    keys = torch.randn(KV_HEADS, 2000, 32, generator=g) @ skew + 3
    queries = torch.randn(KV_HEADS, 300, 32, generator=g) * torch.logspace(0, -2, 32)
    moment = queries.transpose(1, 2) @ queries / 300

    def fit(moment: torch.Tensor) -> ProductTables:
        return ProductTables(**{name: x[None] for name, x in fit_layer(moment, keys.mean(1), keys, 8).items()})

    def error(tables: ProductTables) -> float:
        index = ProductIndex(8, 32, torch.float32, tables)
        some = keys[:, :800].unflatten(1, (-1, 8)).transpose(0, 1)
        total = 0.0
        for i in range(20):
            query = queries[:, i]
            true = torch.einsum("hd,nhcd->hnc", query, some)
            centred = true - (query * tables.mean[0]).sum(-1)[:, None, None]
            got = index.chunk_logits(query, index.encode(some), 1.0)
            total += float((got - centred.logsumexp(-1)).square().mean())
        return total

    tables = fit(moment)
    eye = torch.eye(32).expand(KV_HEADS, 32, 32)
    assert torch.allclose(tables.to_code[0] @ tables.to_query[0], eye, atol=1e-3)
    assert error(tables) < 0.5 * error(fit(eye.contiguous()))
    again = fit(moment)
    assert all(torch.equal(getattr(again, name), getattr(tables, name)) for name in ("to_code", "centroids"))


def test_choices() -> None:
    assert [is_synthetic(i, 0.3) for i in range(10)].count(True) == 3
    assert not any(is_synthetic(i, 0.0) for i in range(10)) and all(is_synthetic(i, 1.0) for i in range(10))
    found = {"usage": [0.5, 0.5, 0.5], "trained": [0.6, 0.501, 0.4]}
    assert choose_layers(found, 0.002) == [0] and choose_layers(found, 0.5) == [0]
    s = small_settings(documents=20)
    assert s.validation == [7, 15] and len(s.training) == 18
    assert small_settings().validation == small_settings().training == [0]
    # Where files are and how often state is saved changes no result; all else does, from its step on.
    assert s.hash_of("export") == small_settings(documents=20, save_every=3, device="cuda").hash_of("export")
    other = small_settings(documents=20, loss="bce")
    assert s.hash_of("label") == other.hash_of("label") and s.hash_of("train") != other.hash_of("train")


def test_queries_turn_back() -> None:
    """With YaRN's factor too: the feature is the query before RoPE."""
    s = small_settings()
    speeds = inverse_frequencies(DIM, 1e4)
    plain = torch.randn(s.context, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    turned = 1.3 * rotate(plain, torch.arange(s.context), speeds, RopeConfig(style="halves", dims=DIM))
    backbone: Any = SimpleNamespace(rotary=Rotary(speeds[None], 1.3, "halves", DIM))
    recorder = Recorder(s, backbone, 0)
    recorder.attend(0, turned.transpose(0, 1), *2 * (some_attention(s)[1],), DIM**-0.5)
    want = plain[torch.tensor(s.starts) - 1].flatten(1)
    assert torch.allclose(recorder.tensors()["query"][0].float(), want, atol=5e-3)


def test_refusals(runs: Path, model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    new = tmp_path / "new"

    def refused(arguments: list[str]) -> str:
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("vllm-lsa: ") and said.count("\n") == 1
        return said

    assert "has no config.json" in refused(command(new, tmp_path / "none", text))
    assert "no folder with documents" in refused(command(new, model, tmp_path / "none"))
    assert "no folder with documents" in refused(command(new, model, tmp_path / "empty"))
    assert "longer than the 1024 tokens" in refused(command(new, model, text, context=2048))
    assert "no room for a cycle" in refused(command(new, model, text, context=128, first=64, window=128))
    assert "not a multiple of chunk_tokens=8" in refused(command(new, model, text, period=60))
    assert "does not divide the model's head_dim=16" in refused(command(new, model, text, subspaces=3))
    assert "--device tpu" in refused(command(new, model, text, device="tpu"))
    assert "not empty and holds no run" in refused(command(tmp_path / "other", model, text))
    assert "give --model and --text" in refused(["train", "--out", str(new)])
    assert "--layers is of --form shared alone" in refused(command(new, model, text, layers=2))
    assert "has one set for all: leave it out" in refused([*command(new, model, text, form="shared"), "--damage"])
    assert "--layers 3 is more than the 2 layers" in refused(command(new, model, text, form="shared", layers=3))
    whole = ["train", "--out", str(runs / "whole")]
    assert "--form per_layer, not shared" in refused([*whole, "--form", "shared"])
    assert "--context 512, not 256" in refused([*whole, "--context", "256"])
    assert not new.exists()
    for name, reason in (
        ("mistral_window", "sliding window"), ("gemma2_softcap", "caps attention logits"), ("gpt_oss_sinks", "sinks"),
        ("deepseek_mla", "latent attention"), ("bert_encoder", "encoder"), ("bloom_alibi", "ALiBi"),
        ("whisper_encoder_decoder", "encoder"),
    ):  # fmt: skip
        assert reason in refused(command(new, tiny_models.write(name, tmp_path), text)), name
    assert unsuited({**json.loads((model / "config.json").read_text())}) == ""
    # Without the run's folder in the way, nothing is left of a refusal; a run goes on with what it was told.
    with pytest.raises(LsaError, match="steps"):
        resolve(runs / "whole", {"steps": 25})
    assert resolve(runs / "whole", {}).steps == 24 and resolve(runs / "whole", {"steps": 24}).rank == 24


def test_one_run_at_a_time(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workspace(runs / "whole", settings_of(runs / "whole"))
    with work.lock():
        monkeypatch.setattr("indexer_training.workspace._PATIENCE", 0.2)
        with pytest.raises(LsaError, match="in use by another run"):
            work.lock()
    work.lock().close()
    assert not list((runs / "killed").rglob("*.unfinished"))


def test_help_is_quick() -> None:
    code = (
        "import sys; from indexer_training import cli\n"
        "import argparse; cli.add_command(argparse.ArgumentParser().add_subparsers())\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
