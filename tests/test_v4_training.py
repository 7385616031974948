"""Training for DeepSeek-V4: what vLLM showed and what was captured of it, kills, the published layout, refusals.

vLLM runs the small V4 of tests/v4 once killed and once to the end, and `watch`, which vLLM loads as a plugin of its
own, stores what its c4 layers saw and chose.
"""

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

from indexer_training import train, v4_model
from indexer_training.cli import _steps as steps_of_run
from indexer_training.distributed import Group
from indexer_training.label import counts_of, forced_of, union
from indexer_training.masses import Masses, dense
from indexer_training.settings import STEPS, Settings, read_settings, resolve
from indexer_training.v4_evaluate import kept_mass
from indexer_training.v4_recorder import Recorder
from indexer_training.workspace import Workspace, write_tensors
from tests import v4_runs
from tests.paths import IN_PROCESS, MODEL, ROOT
from tests.v4 import install, model
from tests.v4.pages import read_index_keys
from tests.v4.scorer_twin import Scorers, best_pages
from vllm_lsa import cli
from vllm_lsa.errors import LsaError
from vllm_lsa.indexer import MemoryIndexer
from vllm_lsa.indexer.packed_keys import keys_to_pages, pack_keys, unpack_keys
from vllm_lsa.indexer.published import inverse_frequencies
from vllm_lsa.models.deepseek_v4.scorer import PagedScorer

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT, WINDOWS, LAYERS = 2560, 2, 3
ARGUMENTS = {
    "context": CONTEXT, "documents": WINDOWS, "heldout-documents": 1, "steps": 24, "save-every": 4, "cycles": 4,
    "budget": 0.5, "budgets": (0.2, 0.5, 0.75), "recency-tokens": 256, "device": "cpu", "native-top-p": 0.3,
    "top-p": 0.5, "evaluate-budgets": (0.2, 1.0),
    "engine": json.dumps({"kv_cache_memory_bytes": 300 << 20}),
}  # fmt: skip
RESULTS = ("model.safetensors", "joint.safetensors", "config.json", "README.md")
_SEEN = "V4_TRAINING_SEEN"


def watch() -> None:
    """An entry point of vLLM: stores, for each step of a c4 layer, what the model saw and what its indexer chose."""
    from vllm.forward_context import get_forward_context
    from vllm.models.deepseek_v4.cpu.cpu_sparse import DeepseekV4CPUAttention as Attention

    forward, select, attend = Attention.forward, Attention._sparse_indexer_and_attn, Attention.forward_mqa
    seen: dict[str, Any] = {}

    def watched_forward(self: Any, positions: torch.Tensor, hidden_states: torch.Tensor, *more: Any) -> Any:
        seen.update(hidden=hidden_states.clone(), positions=positions.clone())
        return forward(self, positions, hidden_states, *more)

    def watched_select(self: Any, hidden: Any, q: Any, scale: Any, weights: Any, *more: Any) -> None:
        seen.update(q=q, weights=weights)
        select(self, hidden, q, scale, weights, *more)

    def watched_attend(self: Any, *arguments: Any) -> None:
        attend(self, *arguments)
        metadata = get_forward_context().attn_metadata
        if self.compress_ratio != 4 or not isinstance(metadata, dict) or seen["q"] is None:
            return
        about, cache = metadata[self.indexer.k_cache.prefix], self.indexer.k_cache.kv_cache
        (chunk,) = about.prefill.chunks
        entries = torch.arange(len(seen["positions"]) // 4)
        slots = chunk.block_table[0].long()[entries // 64] * 64 + entries % 64
        keys, scales = read_index_keys(cache.flatten(1), 64, slots)
        chosen = self.topk_indices_buffer[: len(seen["positions"])].clone()
        found = {**seen, "chosen": chosen, "keys": keys * scales.unsqueeze(1), "prefix": self.prefix}
        torch.save(found, Path(os.environ[_SEEN]) / f"{time.monotonic_ns()}.pt")

    Attention.forward, Attention._sparse_indexer_and_attn = watched_forward, watched_select
    Attention.forward_mqa = watched_attend


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small V4 with the RoPE of V4-Flash, which the published layout implies, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = model.write(tmp_path_factory.mktemp("v4") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["rope_scaling"] |= {"factor": 16, "original_max_position_embeddings": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i + 2 for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def command(out: Path, path: Path, text: Path, **changes: Any) -> list[str]:
    given = {"model": path, "text": text, "out": out, **ARGUMENTS, **changes}
    words = ["train"]
    for name, value in given.items():
        words += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def environment(folder: Path) -> dict[str, str]:
    """With the fallbacks, and `watch` as a plugin beside them."""
    found = install.environment(folder, plugins=("v4_training_watch",))
    info = folder / "v4_training_watch-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: v4-training-watch\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\nv4_training_watch = {__name__}:watch\n")
    (folder / "seen").mkdir()
    found[_SEEN] = str(folder / "seen")
    return {**os.environ, **IN_PROCESS, **found, "OMP_NUM_THREADS": "1"}


def start(arguments: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        program = [sys.executable, "-m", "vllm_lsa.cli", *arguments]
        return subprocess.Popen(program, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env)


def kill_at(process: subprocess.Popen[bytes], marker: Path, log: Path) -> None:
    while not marker.exists():
        assert process.poll() is None, f"ended before {marker}: {log.read_text()[-3000:]}"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)  # of this process only: vLLM must go with it
    assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def run(path: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `out`, a run that was killed after its first window, and `plugin/seen`, what vLLM's layers saw."""
    folder = tmp_path_factory.mktemp("run")
    env, log, out = environment(folder / "plugin"), folder / "log.txt", folder / "out"
    first = out / "work/capture/window_00000.safetensors"
    kill_at(start(command(out, path, text), log, env), first, log)
    before = first.read_bytes()
    assert start(["train", "--out", str(out)], log, env).wait(timeout=300) == 0, log.read_text()[-3000:]
    assert first.read_bytes() == before
    assert json.loads((out / "run.json").read_text())["steps"]["capture"]["resumed"]
    return folder


@pytest.fixture(scope="module")
def seen(run: Path) -> list[list[dict[str, Any]]]:
    """Of each window, of each c4 layer: positions [T], hidden [T, F], q, weights, chosen [T, 512], keys [N, 128]."""
    found: list[list[dict[str, Any]]] = []
    for i in range(WINDOWS):
        # The first window that vLLM was asked for, and the last but one, which is before the held-out one: between
        # them there may be one that a kill cut off.
        files = sorted((run / "plugin/seen").glob("*.pt"))
        begin = 0 if i == 0 else len(files) - 2 * LAYERS
        steps = [torch.load(x, weights_only=True) for x in files[begin : begin + LAYERS]]
        assert [x["prefix"].split(".")[2] for x in steps] == ["2", "4", "5"]
        assert all(torch.equal(x["positions"], torch.arange(CONTEXT)) for x in steps)
        found.append(steps)
    return found


def settings_of(out: Path, **changes: Any) -> Settings:
    return Settings.model_validate({**read_settings(out), **changes})


def captured(run: Path, window: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"out/work/capture/window_{window:05d}.safetensors")


@pytest.mark.vllm
def test_hidden_states_and_keys_are_those_that_the_model_saw(run: Path, seen: list[list[dict[str, Any]]]) -> None:
    s = settings_of(run / "out")
    assert list(s.starts) == list(range(2112, CONTEXT - 63, 64)) and s.candidates == (0, 1, 2)
    for window, layers in enumerate(seen):
        found = captured(run, window)
        assert not torch.equal(found["query"][0], found["query"][1])
        for layer, saw in enumerate(layers):
            assert torch.equal(found["query"][layer], saw["hidden"][torch.tensor(s.starts) - 1])
            assert torch.equal(unpack_keys(found["keys"][layer]), saw["keys"])


def golden_of(saw: dict[str, Any], token: int, p: float) -> torch.Tensor:
    """The fewest of what the native indexer chose that hold p of the softmax of its logits; in float64."""
    chosen = [n for n in saw["chosen"][token].tolist() if n >= 0]
    assert len(chosen) == len(set(chosen)) == min(512, (token + 1) // 4) and max(chosen) < (token + 1) // 4
    if p >= 1:
        return torch.tensor(chosen)
    products = (saw["keys"][chosen].double() @ saw["q"][token].double().T).relu()
    shares = dict(zip(chosen, (products @ saw["weights"][token].double()).softmax(0).tolist(), strict=True))
    golden: list[int] = []
    held = 0.0
    for n in sorted(chosen, key=shares.__getitem__, reverse=True):
        if held >= p:
            break
        golden.append(n)
        held += shares[n]
    return torch.tensor(golden)


def check_counts(s: Settings, tensors: dict[str, torch.Tensor], layers: list[dict[str, Any]], wrong: float) -> None:
    """tensors against the recorded choices. wrong: share of golden entries that rounding may tell differently."""
    counts, total, off = counts_of(s), 0, 0.0
    for layer, saw in enumerate(layers):
        golden = {token: golden_of(saw, token, s.native_top_p) for token in range(s.starts[0] - 64, CONTEXT)}
        for kind, begin, end in (("next", 0, s.window), ("last", -64, 0)):
            found = Masses(*(tensors[f"{kind}_{part}"][layer] for part in Masses._fields))
            assert not found.rest.any()
            everything = dense(found, counts, s.chunks)[:, 0]
            for i, first in enumerate(s.starts):
                want = torch.zeros(s.chunks)
                for token in range(first + begin, first + end):
                    whole = golden[token][4 * golden[token] + 3 < first]  # when the cycle begins
                    want[whole] += 1
                # Nothing that is not past, whatever the window's tokens chose.
                assert not everything[i, first // 4 :].any()
                got = (everything[i] * want.sum()).round()  # stored as shares in fp16
                total, off = total + int(want.sum()), off + float((got - want).abs().sum())
    assert off <= wrong * total


@pytest.mark.vllm
def test_golden_entries_are_those_of_the_native_choice(run: Path, seen: list[list[dict[str, Any]]]) -> None:
    s = settings_of(run / "out")
    for window, layers in enumerate(seen):
        check_counts(s, captured(run, window), layers, 0.0005)


def replay(s: Settings, layers: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
    """What is noted of a window that comes in steps of so many tokens."""
    recorder = Recorder(s, LAYERS)
    for begin in range(0, CONTEXT, step):
        some = slice(begin, begin + step)
        for layer, saw in enumerate(layers):
            at = saw["positions"][some]
            entries = at[(at + 1) % 4 == 0] // 4
            query = (saw["q"][some], saw["weights"][some])
            recorder.note(layer, at, saw["hidden"][some], query, saw["chosen"][some], saw["packed"][entries])
    return recorder.tensors()


@pytest.mark.vllm
def test_steps_windows_and_the_whole_choice(run: Path, seen: list[list[dict[str, Any]]]) -> None:
    """Prompts in chunks show the same; a window of two periods and native_top_p=1 are exact."""
    out = run / "out"
    layers = [{**saw, "packed": captured(run, 0)["keys"][i]} for i, saw in enumerate(seen[0])]
    again = replay(settings_of(out), layers, 700)
    for name, x in captured(run, 0).items():
        assert torch.equal(again[name], x), name
    s = settings_of(out, window=128, native_top_p=1.0, candidates=(1,))
    tensors = replay(s, layers, 1000)
    assert len(tensors["query"]) == len(tensors["keys"]) == 1
    assert torch.equal(tensors["query"][0], captured(run, 0)["query"][1][: len(s.starts)])
    check_counts(s, tensors, layers, 0)


@pytest.mark.vllm
def test_capture_is_causal(run: Path, seen: list[list[dict[str, Any]]]) -> None:
    """What comes after a cycle changes only its window's counts, and what comes after that nothing."""
    s = settings_of(run / "out")
    layers = [{**saw, "packed": captured(run, 0)["keys"][i]} for i, saw in enumerate(seen[0])]
    before, start = replay(s, layers, CONTEXT), s.starts[2]
    others = [{**saw, "packed": captured(run, 1)["keys"][i]} for i, saw in enumerate(seen[1])]

    def after(end: int) -> dict[str, torch.Tensor]:
        def join(name: str, saw: dict[str, Any], other: dict[str, Any]) -> torch.Tensor:
            at = end // 4 if name == "packed" else end
            x, y = saw[name], other[name]
            return torch.cat([x.view(torch.uint8)[:at], y.view(torch.uint8)[at:]]).view(x.dtype)

        names = ("positions", "hidden", "q", "weights", "chosen", "packed")
        mixed = [{n: join(n, saw, other) for n in names} for saw, other in zip(layers, others, strict=True)]
        return replay(s, mixed, CONTEXT)

    changed = after(start)
    for name in ("query", "last_chunk", "last_mass", "last_rest"):
        assert torch.equal(changed[name][:, :3], before[name][:, :3]), name
        assert not name.endswith(("query", "mass")) or not torch.equal(changed[name][:, 3:], before[name][:, 3:])
    assert torch.equal(changed["keys"][:, : start // 4], before["keys"][:, : start // 4])
    assert not torch.equal(changed["next_mass"][:, 2], before["next_mass"][:, 2])
    changed = after(start + s.window)
    for name in ("next_chunk", "next_mass", "next_rest"):
        assert torch.equal(changed[name][:, :3], before[name][:, :3]), name


@pytest.mark.vllm
def test_labels_are_golden_in_enough_layers(run: Path) -> None:
    s = settings_of(run / "out", golden_layers=2)
    counts, fixed = counts_of(s), forced_of(s, counts_of(s))
    found = captured(run, 0)
    upcoming, last = (Masses(*(found[f"{kind}_{part}"] for part in Masses._fields)) for kind in ("next", "last"))
    got = union(upcoming, last, counts, fixed, s)
    assert not (got.golden & fixed).any() and not (got.golden & got.hard).any()
    for i in range(len(counts)):
        votes = torch.zeros(s.chunks, dtype=torch.int64)
        for layer in range(LAYERS):
            free = {
                n: m
                for n, m in zip(upcoming.chunk[layer, i, 0].tolist(), upcoming.mass[layer, i, 0].tolist(), strict=True)
                if m and not fixed[i, n]
            }
            held = 0.0
            for n in sorted(free, key=free.__getitem__, reverse=True):
                if held >= 0.5 * sum(free.values()):
                    break
                votes[n] += 1
                held += free[n]
        assert int((got.golden[i] != (votes >= 2)).sum()) <= 3  # of equal ones any may be the last
        assert 20 < int(got.golden[i].sum()) < 400


@pytest.mark.vllm
def test_scorers_begin_as_the_native_indexer(run: Path, seen: list[list[dict[str, Any]]]) -> None:
    work = Workspace(run / "out", settings_of(run / "out"))
    indexer = v4_model.untrained(work)
    assert "native" in v4_model.initialise(indexer, work)
    assert (indexer.config.rank, indexer.config.heads) == (256, 32)
    at = torch.tensor(work.settings.starts) - 1
    for layer, saw in enumerate(seen[0]):
        products = torch.einsum("thd,nd->thn", saw["q"][at].float(), saw["keys"]).relu()
        native = torch.einsum("thn,th->tn", products, saw["weights"][at])
        ours = indexer.logits(layer, saw["hidden"][at], captured(run, 0)["keys"][layer], at)
        assert (ours - native).abs().mean() < 0.03 * native.std()
    small = v4_model.untrained(Workspace(run / "out", settings_of(run / "out", heads=8)))
    assert v4_model.initialise(small, work).startswith("random")


@pytest.mark.vllm
def test_training_and_its_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss falls; PagedScorer reads the published layout and the folder, and scores as the module in training."""
    out = run / "out"
    facts = json.loads((out / "run.json").read_text())["steps"]
    assert list(facts) == list(STEPS)
    assert facts["train"]["loss_last"] < 0.95 * facts["train"]["loss_first"]
    work = Workspace(out, settings_of(out))
    trained, about = train.read_trained(work)
    assert about["layers"] == [0, 1, 2] and about["ensemble"] == "or"
    keys = captured(run, 1)["keys"]
    hidden, at = captured(run, 1)["query"], torch.tensor(work.settings.starts) - 1
    pages = [keys_to_pages(x) for x in keys]
    table = torch.arange(len(pages[0])).expand(len(at), -1)
    lengths = torch.full((len(at),), len(keys[0]))
    rounded = v4_model.untrained(work)
    state = {n: x if n.endswith("inv_freq") else x.bfloat16().float() for n, x in trained.state_dict().items()}
    rounded.load_state_dict(state)
    for file in (out / "joint.safetensors", out):
        scorer = PagedScorer.load(file, "fp32")
        assert scorer.layers == (0, 1, 2)
        for layer in scorer.layers:
            got = scorer.logits(layer, hidden[layer], at, pages[layer], table, lengths, len(keys[0]))
            exact = rounded.logits(layer, hidden[layer], keys[layer], at)
            assert torch.allclose(got, exact, atol=1e-4, rtol=1e-4)
            assert torch.allclose(got, trained.logits(layer, hidden[layer], keys[layer], at), atol=0.1, rtol=0.02)
        served = PagedScorer.load(file).scores(
            dict(enumerate(hidden)), at, dict(enumerate(pages)), table, lengths, len(keys[0])
        )
        assert served.shape == (len(at), len(keys[0])) and (served >= 0).all() and (served <= 1).all()
        assert cli.main(["inspect", str(file)]) == 0
        assert "keys          packed_e4m3" in capsys.readouterr().out
    folder = MemoryIndexer.load(out).config
    assert folder.input == "hidden" and folder.chunk_tokens == 4 and folder.demand_index is None
    assert "recall, trained, 50.0%" in folder.metrics and list(folder.thresholds) == ["0.5", "0.75"]
    table = folder.metrics["golden on kept pages, 100.0%"]
    assert table == dict.fromkeys(("newest", "usage", "untrained", "trained", "oracle"), 1.0)
    assert all(0 < x <= 1 for x in folder.metrics["golden on kept pages, 20.0%"].values())
    said = (run / "log.txt").read_text()
    for line in (
        "no product tables",
        "no threshold for budgets below",
        "scorers begin with the native",
    ):
        assert line in said


@pytest.mark.vllm
def test_the_trained_folder_is_served_and_selects_as_it_scores(run: Path, path: Path, tmp_path: Path) -> None:
    """Every selection is what the folder's scorers say in float64 of the hidden states and keys served, with its own
    threshold, and the pool is all that is read."""
    settings = v4_runs.sparse(str(run / "out"), pages=24)
    prompts = [v4_runs.LONG, v4_runs.LONG[:3500]]  # 16 + 14 pages; on a budget 12 + 11
    lsa = v4_runs.run(tmp_path, path, [v4_runs.batch(*prompts, max_tokens=20)], settings)
    assert [len(tokens) for tokens in lsa["tokens"][0]] == [20, 20]
    assert lsa["selected"] == lsa["counts"]["cycles"] == 4
    assert lsa["oracle"] == LAYERS * 19 * 2
    assert lsa["counts"]["chunks_missed"] == lsa["pinned"] == 0
    assert any(held < whole for held, whole in lsa["held"])
    said = (tmp_path / "log.txt").read_text()
    assert "memory indexer of layers 2 = c4 layer 0, 4 = c4 layer 1, 5 = c4 layer 2; mode or" in said


@pytest.mark.vllm
def test_eval_reports_what_lies_on_the_pages_that_are_kept(run: Path, path: Path, text: Path, tmp_path: Path) -> None:
    """The column of the indexer is what its float64 twin keeps; a second call, on the same capture, has the native."""
    out, log, context, budgets = tmp_path / "out", tmp_path / "log.txt", 3072, (0.8, 0.92, 1.0)
    words = ["eval", "--model", str(path), "--text", str(text), "--out", str(out), "--contexts", str(context)]
    words += ["--documents", "2", "--budgets", ",".join(map(str, budgets)), "--recency-tokens", "256"]
    words += ["--device", "cpu", "--engine", ARGUMENTS["engine"], "--native-top-p", "1"]
    env = {**os.environ, **IN_PROCESS, **install.environment(tmp_path / "plugin"), "OMP_NUM_THREADS": "1"}
    assert start([*words, "--indexer", str(run / "out")], log, env).wait(timeout=300) == 0, log.read_text()[-3000:]
    found = json.loads((out / "v4.json").read_text())
    scorers, starts = Scorers(run / "out", path), range(2112, context - 63, 64)
    caught, whole = dict.fromkeys(budgets, 0.0), 0.0
    for window in range(2):
        file = f"window_{window:05d}.safetensors"
        seen, mass = (load_file(out / f"{context}/work" / step / file) for step in ("capture", "label"))
        for cycle, begin in enumerate(starts):
            entries = begin // 4
            hidden = {n: seen["query"][n, cycle].double().numpy() for n in range(LAYERS)}
            keys = {n: unpack_keys(seen["keys"][n])[:entries].double().numpy() for n in range(LAYERS)}
            scores = scorers.scores(hidden, begin - 1, keys, "or").tolist()
            whole += float(mass["mass"][cycle].sum())
            for budget in budgets:
                pages = max(int(budget * -(-entries // 64)), 9)  # eight full ones and a part, as served
                kept = best_pages(scores, pages, -1.0, 64, 64)
                of_pages = torch.tensor(kept).repeat_interleave(64)[:entries]
                caught[budget] += float(mass["mass"][cycle, :entries][of_pages].sum())
    assert [row["budget"] for row in found["rows"]] == list(budgets)
    for row in found["rows"]:
        assert row["indexer"] == pytest.approx(caught[row["budget"]] / whole, abs=2e-4)
        shares = {name: row[name] for name in ("newest", "usage", "native", "indexer", "oracle")}
        assert all(0 < x <= 1 for x in shares.values()) and row["cycles"] == 2 * len(starts)
        assert row["budget"] < 1 or set(shares.values()) == {1.0}
    assert found["rows"][0]["indexer"] < found["rows"][1]["indexer"] < 1
    stamp = (out / f"{context}/work/capture/window_00000.safetensors").stat().st_mtime_ns
    assert start([*words, "--indexer", "native"], log, env).wait(timeout=100) == 0
    again = json.loads((out / "v4.json").read_text())["rows"]
    assert again == [{name: x for name, x in row.items() if name != "indexer"} for row in found["rows"]]
    assert (out / f"{context}/work/capture/window_00000.safetensors").stat().st_mtime_ns == stamp


def test_eval_refuses_what_v4_cannot_follow(
    path: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = v4_runs.scorers(tmp_path / "wide.safetensors", hidden=128)
    for more, named in (
        (["--served"], "--served has no meaning for DeepSeek-V4"),
        (["--methods", "lsa"], "--methods has no meaning for DeepSeek-V4"),
        (["--indexer", "quest"], "--indexer quest is no memory indexer's"),
        (["--indexer", str(wide)], "of width 128, and"),
        (["--contexts", "2112"], "from 2176 on, since up to 2048 everything is chosen"),
        (["--engine", "tp=8"], "--engine tp=8 is no JSON object"),
    ):
        words = ["eval", "--model", str(path), "--text", str(text), "--out", str(tmp_path / "out"), "--device", "cpu"]
        assert cli.main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert named in said and said.count("\n") == 1, said


@pytest.mark.vllm
def test_killed_in_training_and_resumed(run: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "killed", tmp_path / "log.txt"
    shutil.copytree(run / "out", out)
    for step in STEPS[3:]:
        shutil.rmtree(out / "work" / step)
    for name in RESULTS:
        (out / name).unlink()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    kill_at(start(["train", "--out", str(out)], log, env), out / "work/train/state.pt", log)
    assert not (out / "work/train/done.json").exists()
    assert steps_of_run(STEPS, out, resolve(out, {})) == 0
    for name in (
        *RESULTS,
        "work/train/indexer.safetensors",
        "work/train/recall.json",
        "work/calibrate/calibration.json",
    ):
        assert (out / name).read_bytes() == (run / "out" / name).read_bytes(), name


def test_it_learns_and_picks_the_layers_that_know(path: Path, tmp_path: Path) -> None:
    """What is golden follows from the hidden states of one of three candidates, on windows that are not trained on."""
    settings = resolve(tmp_path / "out", {
        "model": str(path), "text": "t", "device": "cpu", "context": 2560, "documents": 8, "candidates": [0, 1, 2],
        "layers": 1, "steps": 60, "rank": 64, "heads": 4, "loss": "bce", "recency_tokens": 64, "sink_tokens": 0,
        "learning_rate": 3e-3, "budget": 0.25,
    })  # fmt: skip
    work = Workspace(tmp_path / "out", settings)
    hints = 8
    generator = torch.Generator().manual_seed(0)
    marks = torch.randn(hints, 256, generator=generator)
    themes = 4 * torch.randn(hints, 128, generator=generator)
    themes[:, 64:] = 0  # what RoPE turns says nothing
    counts = counts_of(settings)
    native = {
        f"l{layer}.{name}": torch.zeros(shape)
        for layer in range(LAYERS)
        for name, shape in (
            ("wq_a", (128, 256)), ("q_norm", (128,)), ("wq_b", (2048, 128)), ("weights_proj", (16, 256)),
        )
    }  # fmt: skip
    write_tensors(work.folder("capture") / "model.safetensors", native)
    for window in range(settings.documents):
        theme = torch.randint(hints, (settings.chunks,), generator=generator)
        keys = pack_keys(themes[theme] + torch.randn(settings.chunks, 128, generator=generator))
        coming = torch.randint(hints, (len(counts),), generator=generator)
        hidden = torch.randn(LAYERS, len(counts), 256, generator=generator)
        hidden[1] += 3 * marks[coming]  # the others know nothing
        golden = (theme == coming.unsqueeze(1)) & (torch.arange(settings.chunks) < counts.unsqueeze(1))
        golden &= ~forced_of(settings, counts)
        mass = golden / golden.sum(1, keepdim=True)
        write_tensors(work.shard("capture", window), {"query": hidden.bfloat16(), "keys": keys.expand(3, -1, -1)})
        flags = {"golden": golden.byte(), "hard": torch.zeros_like(golden).byte()}
        write_tensors(work.shard("label", window), {"mass": mass, "usage": torch.zeros_like(mass), **flags})
    facts = train.run(work, Group("train", "cpu"))
    _, about = train.read_trained(work)
    assert about["layers"] == [1]
    assert about["alone"][1] > max(about["alone"][0], about["alone"][2]) + 0.3
    assert facts["recall"]["trained"] > 0.8 and facts["loss_last"] < 0.7 * facts["loss_first"]


def test_settings(path: Path, tmp_path: Path) -> None:
    def told(**given: Any) -> Settings:
        return resolve(tmp_path / "new", {"model": str(path), "text": "t", "device": "cpu", **given})

    s = told()
    assert (s.form, s.chunk_tokens, s.first, s.rank, s.heads, s.loss) == ("shared", 4, 2112, 256, 32, "bce")
    assert (s.candidates, s.layers, s.golden_layers, s.context, s.kept) == ((0, 1, 2), 3, 1, 4096, 1024)
    assert s.v4 and (s.weight_decay, s.learning_rate, s.budget) == (0.01, 1e-4, 0.2)
    # Settings that another model has not are no part of what its steps are told apart by.
    assert told(candidates=[0, 2]).candidates == (0, 2)
    assert s.hash_of("data") == told(candidates=[0, 2]).hash_of("data") != told(context=2560).hash_of("data")
    assert s.hash_of("capture") != told(candidates=[0, 2]).hash_of("capture")
    assert s.hash_of("export") == told(engine="{}").hash_of("export")
    # V4-Flash itself.
    flash = tmp_path / "flash"
    flash.mkdir()
    (flash / "model.safetensors").touch()
    config = json.loads((path / "config.json").read_text())
    config |= {"num_hidden_layers": 43, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0], "q_lora_rank": 1024}
    config |= {"index_n_heads": 64, "hidden_size": 4096, "max_position_embeddings": 1 << 20}
    (flash / "config.json").write_text(json.dumps(config))
    s = told(model=str(flash))
    assert (s.candidates, s.layers, s.golden_layers, s.rank, s.heads) == ((10, 12, 20), 3, 3, 2048, 128)
    assert torch.equal(v4_model.V4Shape.read(flash).inverse_frequencies(), inverse_frequencies())


def test_refusals(path: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"

    def refused(**changes: Any) -> str:
        assert cli.main(command(new, changes.pop("model", path), text, **changes)) == 2
        said = capsys.readouterr().err
        assert said.startswith("vllm-lsa: ") and said.count("\n") == 1
        return said

    assert "--loss soft needs a bias" in refused(loss="soft")
    assert "--form per_layer does not work" in refused(form="per_layer")
    assert "--chunk-tokens 8 does not work" in refused(chunk_tokens=8)
    assert "--candidates 3" in refused(candidates=3)
    assert "--layers 4 is more than the 3" in refused(layers=4)
    assert "--engine tp=8 is no JSON object" in refused(engine="tp=8")
    assert "--subspaces has no meaning for DeepSeek-V4" in refused(subspaces=8)
    assert "longer than the 16383 tokens" in refused(context=16384)
    assert "is of DeepSeek-V4 alone" in refused(model=MODEL)
    assert not new.exists()
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((path / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "compress_ratios": [0, 0, 128, 128, 128, 128]}))
    assert "has no c4 layers" in refused(model=broken)
    (broken / "config.json").write_text(json.dumps({**config, "index_topk": None}))
    assert "lacks index_topk" in refused(model=broken)


def test_kept_mass_is_that_of_the_pages_with_the_best_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([640, 1000, 1280])
    scores, mass = (torch.rand(3, 1300, generator=generator) for _ in range(2))
    want = 0.0
    for i, count in enumerate(counts.tolist()):
        pages = range(-(-count // 64))
        best = {page: float(scores[i, 64 * page : min(64 * page + 64, count)].max()) for page in pages}
        # The first page and the last 100 entries, and those with the best entries to 11 or 0.75 of them.
        kept = {0, *range((count - 100) // 64, len(pages))}
        for page in sorted(set(pages) - kept, key=best.__getitem__, reverse=True):
            if len(kept) < max(int(0.75 * len(pages)), 9):
                kept.add(page)
        want += sum(float(mass[i, n]) for n in range(count) if n // 64 in kept)
    assert kept_mass(scores, mass, counts, 0.75, [100, 64]) == pytest.approx(want, rel=1e-5)


def test_a_window_with_gaps_is_refused() -> None:
    """Such as one rank of several that share the layers would see."""
    s: Any = SimpleNamespace(
        starts=range(128, 193, 64), chunk_tokens=4, chunks=64, candidates=(0,), period=64, window=64, native_top_p=1.0,
        kept=8,
    )  # fmt: skip
    recorder = Recorder(s, 1)
    at = torch.arange(128)
    recorder.note(0, at, torch.zeros(128, 4), None, torch.zeros(128, 1), torch.zeros(32, 132, dtype=torch.uint8))
    assert math.isclose(float(recorder.written.float().mean()), 0.5)
    with pytest.raises(LsaError, match="did not run the whole window"):
        recorder.tensors()
