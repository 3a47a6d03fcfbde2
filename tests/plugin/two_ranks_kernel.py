"""The small model's requests over two tensor-parallel ranks, preempted now and then, in a process of its own:

python -m plugin.two_ranks_kernel answers.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from vllm import LLM

from devices import vllm_options
from plugin.test_cpu_attention_tokens import SMALL_MODEL, answers_of, small_model_requests


def main(output: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(str(SMALL_MODEL), dtype="float32", tensor_parallel_size=2, disable_log_stats=True, **vllm_options())
    Path(output).write_text(json.dumps(answers_of(llm, small_model_requests(), preempt_every=5)))


if __name__ == "__main__":
    main(*sys.argv[1:])
