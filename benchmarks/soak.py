"""Does a server survive hours of good, wrong, hostile and abandoned requests, and is everything as before afterwards?

    python benchmarks/soak.py                       # starts a server, 10,000 requests
    python benchmarks/soak.py --seconds 600 --concurrency 16
    python benchmarks/soak.py --base-url http://127.0.0.1:8000 --server-pid 4711 --log server.log

Some requests are left in the middle, and an operator pauses, resumes and resets caches meanwhile (`--preempt`: with
requests running). Afterwards everything must be as before: each good request got the tokens it gets alone, each bad one
a 4xx, all KV blocks are free, the server's processes hold no more memory than after the first requests, and there is no
traceback in the log. Status 0 if all of this holds, 1 if not, 2 if the server did not come up or ended early.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
from server import Server, ServerGone, started_server
from soak_requests import Sent, good_requests, hostile_request, long_request
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = REPOSITORY / "tests" / "golden" / "ckpt" / "tiny-llada-v"
# Generous: a request may wait for a paused server.
REQUEST_SECONDS = 300
SHARES = {"good": 0.5, "hostile": 0.35, "left": 0.15}
OPERATIONS = ["/pause?mode=wait", "/pause?mode=keep&clear_cache=false", "/reset_prefix_cache", "/reset_mm_cache"]
PREEMPTING = ["/pause?mode=keep", "/reset_prefix_cache?reset_running_requests=true"]
# What allocators and caches may still take after the first requests.
RSS_SHARE, RSS_BYTES = 0.03, 64 << 20
SHOWN_FAILURES = 20
MIB = 1 << 20


@dataclass
class Findings:
    """Everything seen.

    right: the answer of each good request alone.
    sent, wrong: requests by kind.
    failures: the first few, in words.
    rss: (second, bytes).
    operations: the operator's calls.
    """

    right: dict[str, Any] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, problem: str | None) -> None:
        self.sent[kind] += 1
        if problem is not None:
            self.wrong[kind] += 1
            self.fail(f"{kind}: {problem}")

    def fail(self, problem: str) -> None:
        if len(self.failures) < SHOWN_FAILURES:
            self.failures.append(problem[:400])
        self.wrong["all"] += 1


async def answer(client: httpx.AsyncClient, request: Sent) -> Any:
    """(token ids, text, finish reason) of a good request. Raises ValueError for anything but a whole answer."""
    headers = {"Content-Type": "application/json"}
    if not request.stream:
        response = await client.post(request.path, content=request.body, headers=headers)
        if response.status_code != 200:
            raise ValueError(f"HTTP {response.status_code}: {response.text[:200]}")
        choice = response.json()["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return choice["token_ids"], text, choice["finish_reason"]
    tokens: list[int] = []
    texts: list[str] = []
    reason = None
    async with client.stream("POST", request.path, content=request.body, headers=headers) as stream:
        if stream.status_code != 200:
            raise ValueError(f"HTTP {stream.status_code}")
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", []):
                tokens += choice.get("token_ids") or []
                texts.append(choice["delta"].get("content") or "")
                reason = choice["finish_reason"] or reason
    return tokens, "".join(texts), reason


async def check_good(client: httpx.AsyncClient, request: Sent, findings: Findings) -> None:
    try:
        got = await answer(client, request)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        findings.count(request.kind, f"{type(error).__name__}: {error}")
        return
    right = findings.right[request.kind]
    findings.count(request.kind, None if got == right else f"answered {got}, alone {right}")


async def check_hostile(client: httpx.AsyncClient, request: Sent, findings: Findings) -> None:
    try:
        response = await client.post(request.path, content=request.body, headers={"Content-Type": "application/json"})
    except httpx.HTTPError as error:
        findings.count(request.kind, f"{type(error).__name__}: {error}")
        return
    refused = 400 <= response.status_code < 500
    said = f"HTTP {response.status_code} to {request.body[:200]!r}: {response.text[:200]}"
    findings.count(request.kind, None if refused else said)


async def leave_early(url: str, request: Sent, random: Random, findings: Findings) -> None:
    """Sends a long request and hangs up, before or in the middle of the answer."""
    # A new connection: a pool counts those that were cancelled as still in use.
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, trust_env=False) as client:
        with contextlib.suppress(TimeoutError, httpx.HTTPError, ValueError):
            await asyncio.wait_for(answer(client, request), random.choice([0.01, 0.1, 0.5, 2]) * random.random())
    findings.count(request.kind, None)


async def operate(url: str, random: Random, operations: list[str], findings: Findings) -> None:
    """Pauses, resumes and resets for as long as the others send. Ends with a server that is not paused."""
    # Separate connections: resuming must not queue behind the requests that wait for it.
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, trust_env=False) as client:
        try:
            while True:
                operation = random.choice(operations)
                await _order(client, operation, findings)
                if operation.startswith("/pause"):
                    await asyncio.sleep(random.uniform(0, 0.5))
                    await _order(client, "/resume", findings)
                await asyncio.sleep(random.uniform(0.5, 3))
        finally:
            await asyncio.shield(_order(client, "/resume", findings))


async def _order(client: httpx.AsyncClient, operation: str, findings: Findings) -> None:
    findings.operations[operation] += 1
    try:
        response = await client.post(operation, headers={"Connection": "close"})
    except httpx.HTTPError as error:
        findings.fail(f"{operation}: {type(error).__name__}: {error}")
        return
    if response.status_code != 200:
        findings.fail(f"{operation}: HTTP {response.status_code} {response.text[:200]}")


async def soak(server: Server, options: argparse.Namespace, findings: Findings) -> None:
    limits = httpx.Limits(max_connections=options.concurrency + 4)
    async with httpx.AsyncClient(
        base_url=server.url, timeout=REQUEST_SECONDS, trust_env=False, limits=limits
    ) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        good = good_requests(model)
        for request in tqdm(good, desc="alone", unit="request", leave=False):
            try:
                findings.right[request.kind] = await answer(client, request)
            except ValueError as error:
                raise ServerGone(f"the server does not answer {request.kind!r}: {error}\n{server.tail()}") from error
        random = Random(options.seed)
        started = time.monotonic()
        numbers = iter(range(options.requests))
        bar = tqdm(total=options.requests, desc="soak", unit="request")

        async def send() -> None:
            for number in numbers:
                if options.seconds is not None and time.monotonic() - started > options.seconds:
                    return
                draw = Random(f"{options.seed}/{number}")
                way = draw.choices(list(SHARES), list(SHARES.values()))[0]
                if way == "good":
                    await check_good(client, draw.choice(good), findings)
                elif way == "hostile":
                    await check_hostile(client, hostile_request(model, draw), findings)
                else:
                    await leave_early(server.url, long_request(model, draw), draw, findings)
                bar.update()
                bar.set_postfix(wrong=findings.wrong["all"])

        async def watch() -> None:
            while True:
                server.check_alive()
                rss = server.rss()
                if rss is not None:
                    findings.rss.append((time.monotonic() - started, rss))
                await asyncio.sleep(1)

        operations = OPERATIONS + (PREEMPTING if options.preempt else [])
        beside = [asyncio.create_task(watch())]
        if not options.no_operator:
            beside.append(asyncio.create_task(operate(server.url, random, operations, findings)))
        sending = asyncio.gather(*(send() for _ in range(options.concurrency)))
        try:
            # Stop waiting if the server is gone.
            ends: list[asyncio.Future[Any]] = [sending, beside[0]]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if beside[0].done():
                sending.cancel()
                await beside[0]
            await sending
        finally:
            bar.close()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        await wait_until_idle(server, findings)
        for request in tqdm(good, desc="alone again", unit="request", leave=False):
            await check_good(client, request, findings)
        # vLLM counts a request out shortly after its last token.
        await wait_until_idle(server, findings)


async def wait_until_idle(server: Server, findings: Findings, seconds: float = 120) -> None:
    """Requests that were left early end a moment later."""
    deadline = time.monotonic() + seconds
    while server.busy():
        if time.monotonic() > deadline:
            findings.fail(f"{server.busy():.0f} requests still running or waiting after {seconds:.0f} s")
            return
        await asyncio.sleep(0.2)


def check_rest(server: Server, tracebacks: int | None, findings: Findings) -> list[str]:
    """Blocks, memory and log, as lines of the summary; failures go to the findings too."""
    usage = server.metric("vllm:kv_cache_usage_perc")
    if usage:
        findings.fail(f"{usage:.2%} of the KV blocks are not back in the pool")
    lines = [f"KV blocks in use: {usage:.2%}"]
    if len(findings.rss) < 8:
        lines.append("memory: not watched" if not findings.rss else "memory: the run was too short to judge")
    else:
        # The first fifth is warm-up: allocators grow to what the largest batch needs.
        settled = [rss for _, rss in findings.rss[len(findings.rss) // 5 :]]
        third = max(1, len(settled) // 3)
        first, last = (statistics.median(part) for part in (settled[:third], settled[-third:]))
        lines.append(f"memory: {first / MIB:,.0f} MiB after warm-up, {last / MIB:,.0f} MiB at the end")
        if last - first > max(RSS_SHARE * first, RSS_BYTES):
            findings.fail(f"the server's memory grew by {(last - first) / MIB:,.0f} MiB")
    now = server.tracebacks()
    if tracebacks is None or now is None:
        lines.append("log: not watched")
    else:
        lines.append(f"tracebacks in the log: {now - tracebacks}")
        if now != tracebacks:
            findings.fail(f"{now - tracebacks} tracebacks in {server.log}")
    return lines


def summary(findings: Findings, seconds: float, lines: list[str]) -> str:
    width = max(len(kind) for kind in findings.sent) if findings.sent else 0
    table = [f"{'request':{width}}  {'sent':>6}  {'wrong':>6}"]
    kinds = sorted(findings.sent.items())
    table += [f"{kind:{width}}  {count:>6}  {findings.wrong[kind]:>6}" for kind, count in kinds]
    table.append(
        f"{'all':{width}}  {findings.sent.total():>6}  {sum(findings.wrong[kind] for kind in findings.sent):>6}"
    )
    operations = ", ".join(f"{name} {count}" for name, count in sorted(findings.operations.items()))
    ends = [f"{seconds:,.0f} s; operator: {operations or 'none'}", *lines]
    ends += [f"FAILED {failure}" for failure in findings.failures]
    ends.append("all well" if not findings.failures else f"{findings.wrong['all']} findings")
    return "\n".join([*table, "", *ends])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, metavar="N", help="stop sending after so long")
    parser.add_argument("--concurrency", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of requests (default: %(default)s)")
    parser.add_argument("--model", default=str(MODEL), help="checkpoint to serve (default: the tests' tiny LLaDA-V)")
    parser.add_argument("--serve", nargs="+", default=[], metavar="WORD", help="more for vllm serve, without dashes: "
                        "--serve max-num-seqs=4")  # fmt: skip
    parser.add_argument("--base-url", metavar="URL", help="ask this server instead of starting one; it needs "
                        "VLLM_SERVER_DEV_MODE=1, --dtype float32 and --no-log-error-stack")  # fmt: skip
    parser.add_argument("--server-pid", type=int, metavar="PID", help="with --base-url: whose memory to watch")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the server's log, to write or to read")
    parser.add_argument("--preempt", action="store_true", help="also reset and pause in ways that preempt requests")
    parser.add_argument("--no-operator", action="store_true", help="no pauses and no resets")
    return parser.parse_args(arguments)


def run(server: Server, options: argparse.Namespace) -> int:
    findings = Findings()
    tracebacks, started = server.tracebacks(), time.monotonic()
    try:
        asyncio.run(soak(server, options, findings))
    except KeyboardInterrupt:
        findings.fail("interrupted")
    lines = check_rest(server, tracebacks, findings)
    print(summary(findings, time.monotonic() - started, lines))
    return 1 if findings.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.base_url:
            return run(Server(options.base_url.rstrip("/"), options.server_pid, options.log), options)
        # float32: tokens do not depend on what else is in a batch. vLLM's dev mode has the endpoint that resets caches;
        # the tracebacks of refused requests that it would log must not hide real ones.
        flags = ["--dtype", "float32", "--no-log-error-stack", *(f"--{word}" for word in options.serve)]
        with tempfile.TemporaryDirectory() as folder:
            log = options.log or Path(folder) / "server.log"
            with started_server(options.model, log, flags, VLLM_SERVER_DEV_MODE="1") as server:
                return run(server, options)
    except (ServerGone, httpx.HTTPError) as error:
        print(f"soak: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
