"""`vllm serve MODEL` with knobs of its own, for clients that send max_tokens and temperature only; without --plugin."""

from __future__ import annotations

import pytest

from serving.chat import SERVER_DEFAULTS, ask, golden_run, message_of, options_of
from serving.server import Server

pytestmark = pytest.mark.serving

# Neither answer has an end token, so what a client sends beside the length makes no difference.
BY_DEFAULT = golden_run("tall", "redvtp_k25_g32_b32_s32")
OWN_STEPS = golden_run("tall", "redvtp_k25_g32_b32_s16")
CACHED = golden_run("tall", "fast_g32_b32_s16_pri4")


def test_defaults_are_those_of_a_golden_run() -> None:
    assert {"keep_ratio": BY_DEFAULT.keep_ratio, "steps": BY_DEFAULT.params["steps"]} == SERVER_DEFAULTS


def test_client_that_sends_a_length_and_a_temperature_gets_the_servers_knobs(defaults_server: Server) -> None:
    with defaults_server.client() as client:
        answer = ask(
            client,
            defaults_server.model(),
            message_of(BY_DEFAULT.case),
            max_tokens=BY_DEFAULT.params["gen_length"],
            temperature=0,
        )
    assert answer.token_ids == BY_DEFAULT.output
    assert answer.report is not None
    assert answer.report["visual_tokens_kept"] == BY_DEFAULT.data["prune"]["keep_n"]


def test_client_that_sends_no_temperature_is_answered_greedily(defaults_server: Server) -> None:
    with defaults_server.client() as client:
        answer = ask(
            client,
            defaults_server.model(),
            message_of(BY_DEFAULT.case),
            max_completion_tokens=BY_DEFAULT.params["gen_length"],
        )
    assert answer.token_ids == BY_DEFAULT.output


def test_clients_own_knob_goes_before_the_servers(defaults_server: Server) -> None:
    with defaults_server.client() as client:
        answer = ask(
            client,
            defaults_server.model(),
            message_of(OWN_STEPS.case),
            max_tokens=OWN_STEPS.params["gen_length"],
            temperature=0,
            extra_body={"vllm_xargs": {"redvtp_steps": OWN_STEPS.params["steps"]}},
        )
        assert answer.token_ids == OWN_STEPS.output
        cached = ask(client, defaults_server.model(), message_of(CACHED.case), **options_of(CACHED))
    assert cached.token_ids == CACHED.output
