"""``python -m vllm_lsa.demo MODEL``: ask a question about a long document, and see what the device had to hold."""

import argparse
import signal
import sys
import threading
import time
from http.client import HTTPException
from pathlib import Path

from vllm_lsa.demo.client import Piece, read_metrics, stream_chat
from vllm_lsa.demo.progress import Status
from vllm_lsa.demo.server import Server, log_tail
from vllm_lsa.errors import LsaError

DOCUMENT = Path(__file__).with_name("document.txt")
INTRODUCTION = "Here is the beginning of Isaac Newton's Opticks."
QUESTION = "What is this text about?"


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


def ask(server: Server, document: Path, question: str, max_tokens: int) -> None:
    prompt = f"{INTRODUCTION}\n\n{document.read_text(encoding='utf-8')}\n\n{question}"
    print(f"\ndocument: {document.name}, {len(prompt):,} characters\nquestion: {question}\n", flush=True)
    before = read_metrics(server.url).get("vllm_lsa:bytes_fetched_total", 0.0)
    status = Status("reading the document")
    watch = Watch(server.url, status)
    watch.start()
    first = last = 0.0
    piece = Piece("", 0, 0)
    try:
        for piece in stream_chat(server.url, server.model, prompt, max_tokens):
            if piece.text and watch.waiting:
                watch.waiting = False
                status.clear()
                first = status.elapsed
            print(piece.text, end="", flush=True)
            last = status.elapsed
    finally:
        peak = watch.finish()
    fetched = read_metrics(server.url).get("vllm_lsa:bytes_fetched_total", 0.0) - before
    speed = (piece.answer_tokens - 1) / (last - first) if last > first else float("nan")
    print(f"\n\n{piece.prompt_tokens:,} prompt tokens, time to first token {first:.1f} s; ", end="")
    print(f"{piece.answer_tokens} answer tokens at {speed:.1f} tokens/s")
    print(footprint(peak, fetched), flush=True)


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
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="text file to ask about")
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--max-tokens", type=int, default=96, help="length of the answer")
    parser.add_argument("--port", type=int, default=0, help="local port (default: any free one)")
    parser.add_argument("--log", type=Path, default=Path("server.log"), help="where the server's output goes")
    args = parser.parse_args()
    for sign in (signal.SIGTERM, signal.SIGHUP):  # so that the server is ended with us
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    started = time.monotonic()
    try:
        with Server(args.model, args.backend, args.log, port=args.port) as server:
            if args.serve:
                serve(server)
            else:
                ask(server, args.document, args.question, args.max_tokens)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
