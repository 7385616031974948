"""`vllm-lsa eval --served`: what a real server says of forced tokens and tasks; stopping and going on; refusals."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from tests import random_checkpoint
from tests.paths import DOCUMENT, MODEL, ROOT
from vllm_lsa import cli
from vllm_lsa.config import LsaConfig
from vllm_lsa.errors import LsaError
from vllm_lsa.evaluation import served_report
from vllm_lsa.evaluation.command import METHODS
from vllm_lsa.evaluation.methods import load_trained, make_rules
from vllm_lsa.evaluation.served import WHOLE, variants
from vllm_lsa.evaluation.served_requests import answered_task, forced_document
from vllm_lsa.evaluation.served_settings import pool_gib, served_settings
from vllm_lsa.evaluation.suite import make_suite
from vllm_lsa.memory.geometry import KVGeometry
from vllm_lsa.serving.client import FORCED, FORCING, stream_completion
from vllm_lsa.serving.server import Server

GEOMETRY = KVGeometry(30, 9, 3, 64, torch.float32, 128, 16, 3)  # of the model, with chunks of 16 tokens

# -- without a server -------------------------------------------------------------------------------------------------


def test_settings_say_what_the_rules_say(tmp_path: Path) -> None:
    names = [name for name in METHODS if name != "lookahead"]
    rules = make_rules(names, None, {"demand_threshold": 0.01})
    expected = {
        "lsa": ("usage", "four_bit", 8, 32), "demand": ("recency", "four_bit", 8, 32),
        "usage+demand": ("usage", "four_bit", 8, 32), "recency+demand": ("recency", "four_bit", 8, 32),
        "recency": ("recency", "off", 16, 128), "random": ("random", "off", 16, 128),
        "mean_key": ("mean_key", "off", 16, 128), "quest": ("quest", "off", 16, 128),
    }  # fmt: skip
    for name, rule in rules.items():
        if name == "demand_alone":
            with pytest.raises(LsaError, match="--methods demand_alone cannot be served.* leave it out"):
                served_settings(name, rule, None)
            continue
        config = LsaConfig.parse({"lsa": served_settings(name, rule, None)})
        assert (config.indexer, config.demand, config.chunk_tokens, config.recency_tokens) == expected[name]
        assert (config.budget, config.period, config.demand_threshold) == (rule.budget, 64, 0.01)

    folder = random_checkpoint.write(tmp_path / "checkpoint", 30, 9, 3, 64, 8, period=64)
    rules = make_rules(["lsa", "lookahead", "demand"], load_trained(folder, MODEL, torch.device("cpu")), {})
    lsa = LsaConfig.parse({"lsa": served_settings("lsa", rules["lsa"], folder)})
    assert (lsa.indexer, lsa.demand, lsa.chunk_tokens) == (str(folder), "product", 8)
    assert LsaConfig.parse({"lsa": served_settings("lookahead", rules["lookahead"], folder)}).demand == "off"
    demand = LsaConfig.parse({"lsa": served_settings("demand", rules["demand"], folder)})
    assert (demand.indexer, demand.policy, demand.demand) == (str(folder), "recency", "product")
    with pytest.raises(LsaError, match="--indexer .*lsa.pt cannot be served: give a checkpoint folder"):
        served_settings("lsa", rules["lsa"], tmp_path / "lsa.pt")


def test_pool_puts_every_request_on_its_budget() -> None:
    for budget, shortest, longest in ((0.2, 1000, 2048), (1.0, 512, 2048)):
        config = LsaConfig.parse({"lsa": {"device_pool_gib": pool_gib(GEOMETRY, budget, shortest, longest)}})
        slots = config.pool_slots(GEOMETRY, 100)
        assert slots == 90 * (63 if budget < 1 else 128) - (budget < 1)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(DOCUMENT.read_text())
    command = ["eval", "--model", str(MODEL), "--text", str(tmp_path), "--out", str(tmp_path / "out")]

    def refused(*more: str) -> str:
        assert cli.main([*command, *more]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]  # after transformers' progress
        assert line.startswith("vllm-lsa: ")
        return line

    assert "--steps 128 is of --served" in refused("--steps", "128")
    assert "--steps 100 is not a multiple of 64" in refused("--served", "--steps", "100")
    assert "--quick is of the offline form" in refused("--served", "--quick")
    assert "leaves 192 tokens of prompt" in refused("--served", "--contexts", "384,512")
    assert "demand_alone cannot be served" in refused("--served", "--methods", "demand_alone")
    assert "at most 8192 tokens" in refused("--served", "--contexts", "16384")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "vllm is not installed" in refused("--served")


def test_forced_tokens_mask_what_is_sampled_from() -> None:
    pytest.importorskip("vllm")
    from vllm import SamplingParams

    from vllm_lsa.plugin.forced_tokens import ForcedTokens

    def params(forced: Any) -> SamplingParams:
        return SamplingParams(extra_args={FORCED: forced})

    for bad in ("12", [1, "2"], [1.0], [-1], [True]):
        with pytest.raises(ValueError, match="is not a list of token ids"):
            ForcedTokens.validate_params(params(bad))
    ForcedTokens.validate_params(SamplingParams())
    ForcedTokens.validate_params(params([3, 0]))
    processor = ForcedTokens(None, torch.device("cpu"), False)
    assert processor.new_req_logits_processor(SamplingParams()) is None
    force = processor.new_req_logits_processor(params([3, 0, 9]))
    assert force is not None
    assert [int(force([1] * n, torch.arange(5.0)).argmax()) for n in range(4)] == [3, 0, 4, 4]


def test_report_sets_both_forms_side_by_side() -> None:
    def record(kind: str, method: str, budget: float, nll: list[float], **more: Any) -> dict[str, Any]:
        costs = {"resident": 0.2, "index": 0.1, "footprint": 0.3, "demanded": 1.0, "missed": 0.0}
        key = {"context": 512, "budget": budget, "method": method, "document": "a", "tokens": "0"}
        return {"kind": kind, **key, "result": {"nll": nll, "best": [round(x) for x in nll], **costs, **more}}

    records = [
        record("served document", "dense", 1.0, [9.0] + [1.0] * 64 + [2.0] * 63),
        record("served document", "lsa", 0.2, [9.0] + [1.5] * 64 + [2.2] * 63),
        record("offline document", "dense", 1.0, [1.0] * 64 + [2.0] * 63),
        record("offline document", "lsa", 0.2, [1.0] * 64 + [3.0] * 21 + [2.0] * 42),
    ]
    dense, row = served_report.document_rows(records)
    assert (dense["difference"], dense["largest_difference"], dense["top1"]) == (0, 0, 1)
    assert (row["nll"], row["dense_nll"], row["first_nll"]) == pytest.approx((2.2, 2.0, 1.5))
    assert row["difference"] == pytest.approx((0.2 * 42 - 0.8 * 21) / 63)
    assert row["abs_difference"] == pytest.approx((0.2 * 42 + 0.8 * 21) / 63)
    assert (row["offline_top1"], row["top1"], row["tokens"]) == pytest.approx((2 / 3, 1.0, 127))
    task = {"kind": "served task", "context": 512, "budget": 0.2, "method": "lsa", "task": "t"}
    tasks = served_report.task_rows(
        [
            {**task, "variant": v, "result": {"right": r}}
            for v, r in (("inside", True), ("inside", False), (WHOLE, True))
        ]
    )
    _, found = served_report.method_rows([dense, row], tasks)
    assert found["dnll_percent"] == pytest.approx(10) and found["first_dnll_percent"] == pytest.approx(50)
    assert (found["answered_inside"], found[f"answered_{WHOLE}"]) == (0.5, 1.0)
    assert found["footprint"] == 0.3


# -- with one ---------------------------------------------------------------------------------------------------------

CONTEXT, STEPS = 512, 128


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a command that was stopped while it started a server, and given again."""
    folder = tmp_path_factory.mktemp("served")
    text, out = folder / "text", folder / "out"
    text.mkdir()
    (text / "a.txt").write_text(DOCUMENT.read_text()[:9000])
    command = [
        sys.executable, "-m", "vllm_lsa.cli", "eval", "--served", "--model", str(MODEL), "--text", str(text), "--out",
        str(out), "--contexts", str(CONTEXT), "--steps", str(STEPS), "--budgets", "0.45", "--methods", "dense,recency",
        "--documents", "1", "--tasks", "0", "--device", "cpu", "--recency-tokens", "64",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    server_log = out / "logs" / "dense-1-512.log"
    deadline = time.monotonic() + 120
    while not (server_log.exists() and server_log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    results = json.loads((out / "served.json").read_text())
    assert not results["finished"] and "give the same command again" in results["notes"][-1]
    records = (out / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in records] == ["offline document"] * 2

    (out / "records.jsonl").write_text("\n".join(records) + '\n{"key": "torn')
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
    assert (out / "records.jsonl").read_text().splitlines()[:2] == records
    return out


@pytest.mark.vllm
def test_served_and_offline_are_one(out: Path) -> None:
    results = json.loads((out / "served.json").read_text())
    assert results["finished"] and results["versions"]["vllm"]
    rows = {row["method"]: row for row in results["served_documents"]}
    assert set(rows) == {"dense", "recency"}
    dense, sparse = rows["dense"], rows["recency"]
    for prefix in ("", "first_"):
        assert dense[f"{prefix}abs_difference"] < 1e-4 and dense[f"{prefix}largest_difference"] < 1e-3
    # Nothing but the rule decides the first period of a set that depends on no usage. Afterwards the offline form's
    # past is dense.
    assert sparse["first_largest_difference"] < 1e-3 < abs(sparse["first_nll"] - dense["first_nll"])
    assert 1e-3 < sparse["abs_difference"] < 1
    assert 0.3 < sparse["resident"] <= 0.45 and sparse["missed"] == 0
    assert sparse["footprint"] == pytest.approx(sparse["resident"] + sparse["index"])
    with (out / "served.csv").open() as file:
        assert file.readline().startswith("# 20") and len(list(csv.DictReader(file))) == 2


@pytest.mark.vllm
def test_lsa_that_keeps_everything_is_stock(out: Path, tmp_path: Path) -> None:
    """Forced documents, also where the pool does not hold what is kept; free answers; what goes wrong."""
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines() if "torn" not in line]
    found = {record["kind"]: record["result"] for record in records if record["method"] == "dense"}
    stock, offline = found["served document"], found["offline document"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = tokenizer(DOCUMENT.read_text()[:9000])["input_ids"][:CONTEXT]
    prompt, forced = tokens[: CONTEXT - STEPS], tokens[CONTEXT - STEPS :]
    suite = make_suite(0, tokenizer, CONTEXT, [DOCUMENT.read_text()], 1, ["single_needle"])
    lsa = {"budget": 1.0, "device_pool_gib": pool_gib(GEOMETRY, 0.5, len(prompt), CONTEXT)}
    arguments = ["--logits-processors", FORCING]
    with Server(MODEL, "LSA", tmp_path / "log", CONTEXT, dtype="float32", lsa=lsa, arguments=arguments) as server:
        ours = forced_document(server, prompt, forced, 90)  # which checks that they came back
        assert ours["nll"] == pytest.approx(stock["nll"], abs=1e-3)
        assert ours["nll"][1:] == pytest.approx(offline["nll"], abs=1e-3)
        assert ours["best"] == stock["best"]
        assert ours["missed"] > 0 and 0.5 < ours["resident"] < 1 and ours["demanded"] == 0

        answers = [answered_task(server, task, start, tokenizer) for task, _, start in variants([tuple(suite)])]
        assert len(answers) == 3 and answers[0]["right"]
        assert answers[1:] == answers[:1] * 2  # prefilled or forced, it is the same text

        with pytest.raises(RuntimeError, match="not a list of token ids.*400"):
            next(stream_completion(server.url, server.model, [1, 2], 2, [-5]))
        with pytest.raises(LsaError, match="did not take the tokens that were forced; its log is"):
            forced_document(server, [1, 2], [3, 10**6], 90)
    with pytest.raises(LsaError, match=r"a request to the server failed .*the server's log is .*log"):
        forced_document(server, [1, 2], [3, 4], 90)
