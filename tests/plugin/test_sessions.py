"""Streaming input sessions are refused, and refusing them leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import LLM, SamplingParams

from plugin.requests import scheduler_of
from redvtp.errors import InvalidRequest
from vllm_redvtp.scheduling import endings
from vllm_redvtp.scheduling.endings import RefusedSessions

HELLO = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"


class Message:
    def __init__(self, request_id: str, resumable: bool) -> None:
        self.request_id = request_id
        self.resumable = resumable


def _refuse(sessions: RefusedSessions, request_id: str, resumable: bool) -> None:
    message: Any = Message(request_id, resumable)
    sessions.refuse(message)


def test_every_message_of_a_session_is_refused_and_the_last_one_ends_it() -> None:
    sessions = RefusedSessions()
    for resumable in (True, True, False):
        with pytest.raises(InvalidRequest, match="streaming input sessions are not supported"):
            _refuse(sessions, "a", resumable)
    assert len(sessions) == 0
    _refuse(sessions, "a", False)


def test_sessions_without_a_last_message_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "_SESSIONS", 10)
    sessions = RefusedSessions()
    for number in range(100):
        with pytest.raises(InvalidRequest):
            _refuse(sessions, str(number), True)
    assert len(sessions) == 10


def test_an_aborted_session_is_forgotten(llm: LLM) -> None:
    """A client that leaves sends no last message, so its id stayed for ever."""
    engine: Any = llm.llm_engine
    core = engine.engine_core.engine_core
    # Other tests' sessions may not have ended.
    before = len(scheduler_of(llm)._sessions)
    request = engine.input_processor.process_inputs(
        "leaving", {"prompt": HELLO}, SamplingParams(max_tokens=8), supported_tasks=("generate",), resumable=True
    )
    core.add_request(*core.preprocess_add_request(request))
    assert len(scheduler_of(llm)._sessions) == before + 1
    core.abort_requests([request.request_id])
    assert len(scheduler_of(llm)._sessions) == before
    core.step()
