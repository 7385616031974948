"""``python -m vllm_lsa.demo MODEL``: ask about a long document, and see what the device had to hold."""

import argparse
import json
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path
from typing import Any

from vllm_lsa.errors import LsaError
from vllm_lsa.indexer.trained import shipped
from vllm_lsa.serving.client import Piece, read_metrics, stream_chat
from vllm_lsa.serving.progress import Status
from vllm_lsa.serving.server import Server, log_tail, signals_raise

DOCUMENT = Path(__file__).with_name("document.txt")
INTRODUCTION = "Here is the beginning of Isaac Newton's Opticks."
QUESTION = "What is this text about?"
NEEDLE = "Remember this: the telephone number of the lighthouse is 482913."
NEEDLE_DEPTH = 1 / 3
NEEDLE_QUESTION = "What is the telephone number of the lighthouse?"
NEEDLE_ANSWER = "482913"
BUDGET = 0.128  # with the index of 8 bytes a key just under 16 % of 16-bit K and V


class Watch(threading.Thread):
    """Samples the server's metrics twice a second while a request runs: its gauges are those of live requests."""

    def __init__(self, url: str, status: Status) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.status = status
        self.waiting = True  # no token yet
        self.peak: dict[str, float] = {}
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.5):
            try:
                sample = read_metrics(self.url)
            except OSError:  # the server went away: the request that is being watched says so
                return
            if sample.get("vllm_lsa:kv_bytes_total", 0) >= self.peak.get("vllm_lsa:kv_bytes_total", 1):
                self.peak = sample
            if self.waiting:
                self.status.show()

    def finish(self) -> dict[str, float]:
        """Ends the sampling; the sample with the most KV in all."""
        self._done.set()
        self.join()
        return self.peak


def footprint(peak: dict[str, float], fetched: float) -> str:
    """One line on memory. peak: metrics while the answer ran. fetched: bytes copied to the device for it."""
    if not peak:
        return "footprint: this attention backend reports none (no vllm_lsa metrics)"
    total, resident, index = (
        peak[f"vllm_lsa:{name}"] / 1e6 for name in ("kv_bytes_total", "kv_bytes_resident", "index_bytes")
    )
    return (
        f"footprint: total KV {total:.1f} MB, on the device: resident {resident:.1f} MB + index {index:.1f} MB = "
        f"{peak['vllm_lsa:footprint_ratio']:.1%}; fetched from the host {fetched / 1e6:.1f} MB"
    )


def read_document(path: Path) -> str:
    """The text in `path`. Raises LsaError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LsaError(f"--document {path} cannot be read: {error}") from None


def hide(text: str, sentence: str, depth: float) -> str:
    """`text` with a sentence as a paragraph of its own, after the paragraph at the share `depth` of it."""
    place = text.index("\n\n", int(depth * len(text)))
    return f"{text[:place]}\n\n{sentence}{text[place:]}"


def ask(server: Server, text: str, question: str, max_tokens: int) -> str:
    """Asks about a text, prints answer and figures. Returns the answer."""
    prompt = f"{INTRODUCTION}\n\n{text}\n\n{question}"
    print(f"\nquestion: {question}\n", flush=True)
    before = read_metrics(server.url).get("vllm_lsa:bytes_fetched_total", 0.0)
    status = Status("reading the document")
    watch = Watch(server.url, status)
    watch.start()
    first = last = 0.0
    piece = Piece("", 0, 0)
    answer = ""
    try:
        for piece in stream_chat(server.url, server.model, prompt, max_tokens):
            if piece.text and watch.waiting:
                watch.waiting = False
                status.clear()
                first = status.elapsed
            print(piece.text, end="", flush=True)
            answer += piece.text
            last = status.elapsed
    finally:
        peak = watch.finish()
    fetched = read_metrics(server.url).get("vllm_lsa:bytes_fetched_total", 0.0) - before
    speed = (piece.answer_tokens - 1) / (last - first) if last > first else float("nan")
    print(f"\n\n{piece.prompt_tokens:,} prompt tokens, time to first token {first:.1f} s; ", end="")
    print(f"{piece.answer_tokens} answer tokens at {speed:.1f} tokens/s")
    print(footprint(peak, fetched), flush=True)
    return answer


def ask_needle(server: Server, text: str) -> bool:
    """Hides a sentence deep in the text and asks for it, then what the text is about. Whether it was found."""
    text = hide(text, NEEDLE, NEEDLE_DEPTH)
    print(f'hidden a third of the way down: "{NEEDLE}"')
    found = NEEDLE_ANSWER in ask(server, text, NEEDLE_QUESTION, 32)
    print(f"the answer is {'right' if found else f'WRONG: it should be {NEEDLE_ANSWER}'}", flush=True)
    ask(server, text, QUESTION, 64)  # the document is in the prefix cache by now
    return found


def settings(model: Path, backend: str, given: str | None) -> dict[str, Any] | None:
    """The LSA settings to serve with: those given, else the indexer that ships for a model of this name.

    Raises LsaError if they are no JSON object.
    """
    if given is not None:
        try:
            values = json.loads(given)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise LsaError(f'--lsa {given} is not a JSON object: give one like {{"budget": 0.2}}')
        return values
    name = model.resolve().name.lower()
    return {"indexer": name, "budget": BUDGET} if backend == "LSA" and name in shipped() else None


def serve(server: Server) -> None:
    print(f"""serving {server.model} until Ctrl-C; for example:

curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{server.model}", "messages": [{{"role": "user", "content": "What is light?"}}], "max_tokens": 64}}'
""", flush=True)
    server.wait_until_ended()


def main() -> int:
    parser = argparse.ArgumentParser(prog="vllm_lsa.demo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a Hugging Face model folder")
    parser.add_argument("--serve", action="store_true", help="leave the server up instead of asking")
    parser.add_argument("--backend", default="LSA", help="attention backend; CPU_ATTN is stock vLLM's on a CPU")
    parser.add_argument("--lsa", help="LSA settings as JSON (default: the indexer that ships for the model)")
    parser.add_argument("--document", type=Path, help="text file to ask about (default: the demo's own)")
    parser.add_argument(
        "--question", help="what to ask (default: a number hidden in the demo's document, then what it is about)"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="length of the answer")
    parser.add_argument("--port", type=int, default=0, help="local port (default: any free one)")
    parser.add_argument("--log", type=Path, default=Path("server.log"), help="where the server's output goes")
    args = parser.parse_args()
    started, found = time.monotonic(), True
    try:
        lsa = settings(args.model, args.backend, args.lsa)
        text = read_document(args.document or DOCUMENT)
        with signals_raise(), Server(args.model, args.backend, args.log, port=args.port, lsa=lsa) as server:
            if args.serve:
                serve(server)
            else:
                print(f"document: {len(text):,} characters; LSA settings: {json.dumps(lsa)}")
                if args.document or args.question:
                    ask(server, text, args.question or QUESTION, args.max_tokens)
                else:
                    found = ask_needle(server, text)
                print("stopping the server", flush=True)
    except LsaError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (OSError, HTTPException, RuntimeError) as error:
        print("\n".join(["", *log_tail(args.log, 30), f"demo: the request failed: {error!r}"]), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 130
    print(f"done in {time.monotonic() - started:.0f} s")
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
