"""lmms-eval's model `llada_v_served`: LLaDA-V behind a running `vllm serve`, by the protocol of its papers.

    pip install ./examples/lmms_eval
    lmms_eval --model llada_v_served --model_args base_url=http://127.0.0.1:8000/v1,keep_ratio=0.25 ...

Found by lmms-eval under the entry point group `lmms_eval.models`.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(
    model_id="llada_v_served",
    simple_class_path="redvtp_lmms_eval.model.ServedLladaV",
)
