"""Several clients at a time: `paceline serve` beside `transformers serve` and OpenVINO GenAI's continuous batching.

    python -m venv hf && hf/bin/pip install 'transformers[serving]' accelerate
    python -m venv peer && peer/bin/pip install openvino-genai
    python docs/cpu/serving_peers.py FOLDER MODEL.gguf --transformers hf/bin/transformers --openvino peer/bin/python

FOLDER is the model in safetensors, which the first two serve in bfloat16; MODEL.gguf is the same model in 4 bits, which
OpenVINO and `paceline serve --weights q4-int8` decode. Clients are threads that ask for --new-tokens tokens of a chat,
greedily, one request after another. Ways take turns, each is a process that is alone; a server is asked over HTTP,
OpenVINO through a pipe, because its package brings no server. Answers that end early count with the tokens they have.
"""

import argparse
import contextlib
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

PORT = 8765


class OverHttp:
    """A server that speaks OpenAI's protocol."""

    def __init__(self, command: list[str], model: str, usage: bool):
        self.more = {"stream_options": {"include_usage": True}} if usage else {}
        self.model = model
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(1200):
            if self.process.poll() is not None:
                raise SystemExit(f"the server has ended: {' '.join(command)}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
                return
            time.sleep(0.5)
        self.close()
        raise SystemExit(f"the server does not answer: {' '.join(command)}")

    def ask(self, text: str, tokens: int) -> tuple[int, float]:
        """New tokens, and seconds until the first of them."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
        body |= {"temperature": 0, "stream": True, **self.more}
        connection, first, count = http.client.HTTPConnection("127.0.0.1", PORT, timeout=900), 0.0, 0
        begun = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(reply.read().decode())
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            count = (event.get("usage") or {}).get("completion_tokens", count)
            if not first and event["choices"] and event["choices"][0]["delta"].get("content"):
                first = time.perf_counter() - begun
        connection.close()
        if not (count and first):
            raise RuntimeError("an answer without a token or without their number")
        return count, first

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


class ThroughPipe:
    """OpenVINO's pipeline in a process of its own."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: dict[int, Queue] = {}
        self.lock, self.count = threading.Lock(), 0
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                raise SystemExit(f"the process has ended: {' '.join(command)}")
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            if line.startswith("["):
                number, count, first = json.loads(line)
                self.answers[number].put((count, first))

    def ask(self, text: str, tokens: int) -> tuple[int, float]:
        with self.lock:
            self.count, number = self.count + 1, self.count
            self.answers[number] = Queue()
            self.process.stdin.write(json.dumps([number, text, tokens]) + "\n")
            self.process.stdin.flush()
        return self.answers[number].get()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


def openvino_worker(path: str) -> None:
    """Answer the lines of the standard input, all that are there at a time."""
    import openvino_genai

    settings = openvino_genai.SchedulerConfig()
    settings.max_num_seqs, settings.cache_size = 16, 1
    pipeline = openvino_genai.ContinuousBatchingPipeline(path, settings, "CPU")
    tokenizer, asked, running = pipeline.get_tokenizer(), Queue(), {}

    def listen() -> None:
        for line in iter(sys.stdin.readline, ""):
            asked.put((json.loads(line), time.perf_counter()))
        asked.put(None)

    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)
    while True:
        while not running or not asked.empty():
            if (item := asked.get()) is None:
                return
            (number, text, tokens), begun = item
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.do_sample = tokens, False
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            ids = tokenizer.encode(prompt, add_special_tokens=False).input_ids
            running[number] = [pipeline.add_request(number, ids, config), begun, 0, 0.0]
        pipeline.step()
        for number, record in list(running.items()):
            handle = record[0]
            while handle.can_read():
                record[2] += sum(len(output.generated_ids) for output in handle.read().values())
                record[3] = record[3] or time.perf_counter() - record[1]
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                print(json.dumps([number, record[2], record[3]]), flush=True)
                del running[number]


def load(way, clients: int, each: int, tokens: int, first: int) -> dict:
    """`clients` threads with `each` requests one after another."""
    import serving  # not at the top, because OpenVINO's interpreter lacks what it needs

    def client(index: int) -> list[tuple[int, float]]:
        return [way.ask(serving.chat(first + index * each + turn), tokens) for turn in range(each)]

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        told = [answer for answers in threads.map(client, range(clients)) for answer in answers]
    seconds, firsts = time.perf_counter() - began, sorted(first for _, first in told)
    return {
        "tokens_per_second": sum(count for count, _ in told) / seconds,
        "first_token_p95": firsts[max(0, -(-95 * len(firsts) // 100) - 1)],
        "tokens": sum(count for count, _ in told),
    }


def opened(args, name: str):
    """A way's process, ready to answer."""
    ours = [sys.executable, "-m", "paceline.spec.cli", "serve", "--port", str(PORT), "--room", "512", "--name", "model"]
    ours += ["--max-rows", str(max(args.clients)), "--executor", args.executor]
    if name == "transformers":
        command = [args.transformers, "serve", args.model, "--continuous-batching", "--device", "cpu"]
        return OverHttp([*command, "--dtype", "bfloat16", "--port", str(PORT)], args.model, usage=False)
    if name == "openvino":
        return ThroughPipe([args.openvino, __file__, args.model, args.gguf, "--worker"])
    drafter = "none" if name.startswith("plain") else args.drafter
    source = [args.gguf, "--weights", "q4-int8"] if name.endswith("q4") else [args.model, "--dtype", "bfloat16"]
    return OverHttp([*ours, "--model", *source, "--drafter", drafter], "model", usage=True)


WAYS = ["drafting", "plain", "transformers", "drafting-q4", "plain-q4", "openvino"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("gguf")
    parser.add_argument("--transformers", default="transformers", help="the command of that name")
    parser.add_argument("--openvino", default="python", help="the interpreter that has openvino_genai")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--executor", default="eager", help="of the servers that are ours")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--requests", type=int, default=2, help="of each client")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return openvino_worker(args.gguf)
    told: dict[tuple[str, int], list[dict]] = {}
    for repeat in range(args.repeats):
        for name in args.ways:
            way = opened(args, name)
            try:
                load(way, max(args.clients), 1, 32, first=9000)  # warms up
                for clients in args.clients:
                    record = load(way, clients, args.requests, args.new_tokens, first=1000 * repeat + 100 * clients)
                    told.setdefault((name, clients), []).append(record)
                    print(json.dumps({"way": name, "clients": clients, **record}), flush=True)
            finally:
                way.close()
    for (name, clients), records in told.items():
        speed = statistics.median(record["tokens_per_second"] for record in records)
        first = statistics.median(record["first_token_p95"] for record in records)
        print(f"{name:14} {clients} clients {speed:7.1f} tokens/s, 95 % of first tokens within {first:.2f} s")


if __name__ == "__main__":
    main()
