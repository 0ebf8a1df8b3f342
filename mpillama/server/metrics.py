"""Prometheus' text format: llama.cpp's names, and mpillama's own."""

from __future__ import annotations

from collections.abc import Mapping

from mpillama.comm.metered import Traffic
from mpillama.engine.base import Stats
from mpillama.server.bridge import Totals


def render(stats: Stats, totals: Totals, traffic: Traffic, answers: Mapping[int, int]) -> str:
    """Return all metrics; times are in seconds.

    Args:
        stats: of the engine.
        totals: of the requests that have ended.
        traffic: of this rank in collectives.
        answers: how often each HTTP status was given.
    """
    theirs: list[tuple[str, str, str, float]] = [
        ("prompt_tokens_total", "counter", "Prompt tokens evaluated", stats.prompt_tokens),
        ("prompt_seconds_total", "counter", "Time of prompts, summed over requests", totals.prompt_seconds),
        ("tokens_predicted_total", "counter", "Tokens generated", stats.generated_tokens),
        ("tokens_predicted_seconds_total", "counter", "Time of generation, over requests", totals.decode_seconds),
        ("n_decode_total", "counter", "Steps of the model", stats.steps),
        ("n_tokens_max", "counter", "Longest sequence so far", totals.longest),
        (
            "prompt_tokens_seconds",
            "gauge",
            "Prompt tokens per second",
            stats.prompt_tokens / max(totals.prompt_seconds, 1e-9) if stats.finished else 0,
        ),
        (
            "predicted_tokens_seconds",
            "gauge",
            "Generated tokens per second of one sequence",
            stats.generated_tokens / max(totals.decode_seconds, 1e-9) if stats.finished else 0,
        ),
        ("requests_processing", "gauge", "Sequences that take part in steps", stats.running),
        ("requests_deferred", "gauge", "Sequences that wait", stats.waiting),
        ("n_busy_slots_per_decode", "gauge", "Sequences per step", totals.busy / max(stats.steps, 1)),
    ]
    ours: list[tuple[str, str, str, float]] = [
        ("requests_total", "counter", "Requests taken in", stats.requests),
        ("requests_finished_total", "counter", "Requests that came to their end", stats.finished),
        (
            "requests_cancelled_total",
            "counter",
            "Requests whose clients went away, or had no time left",
            stats.cancelled,
        ),
        ("prefix_cache_tokens_total", "counter", "Prompt tokens found in the KV cache", stats.cached_tokens),
        ("preemptions_total", "counter", "Sequences sent back to wait for KV blocks", stats.preemptions),
        ("kv_blocks", "gauge", "KV blocks in all", stats.kv_blocks),
        ("kv_blocks_used", "gauge", "KV blocks of running sequences", stats.kv_used),
        ("kv_blocks_cached", "gauge", "KV blocks kept for prompts that begin alike", stats.kv_cached),
        ("steps_total", "counter", "Steps", stats.steps),
        ("step_seconds_total", "counter", "Time of steps", stats.step_seconds),
        ("run_seconds_total", "counter", "Time of steps in the model, on all ranks", stats.run_seconds),
        ("sample_seconds_total", "counter", "Time of steps choosing tokens", stats.sample_seconds),
        (
            "collective_seconds_total",
            "counter",
            "Time of steps in collectives on rank 0, waiting for slower ranks included",
            traffic.ns / 1e9,
        ),
        ("collectives_total", "counter", "Collectives", traffic.calls),
        ("collective_bytes_total", "counter", "Bytes of the results of collectives on rank 0", traffic.nbytes),
    ]
    lines: list[str] = []
    for prefix, metrics in (("llamacpp:", theirs), ("mpillama_", ours)):
        for name, kind, help_, value in metrics:
            lines += [f"# HELP {prefix}{name} {help_}", f"# TYPE {prefix}{name} {kind}", f"{prefix}{name} {value:.12g}"]
    lines += ["# HELP mpillama_http_answers_total Answers by status", "# TYPE mpillama_http_answers_total counter"]
    lines += [f'mpillama_http_answers_total{{status="{status}"}} {n}' for status, n in sorted(answers.items())]
    return "\n".join(lines) + "\n"
