"""Transformers' side of `lmjax bench decode`: greedy `generate` with its cache, random weights.

    python tests/benchmarks/peers/hf_decode.py '{"hf": {…config.json…}, "batch": 8, "prompt": 32, "new": 64, …}'
"""

import json
import sys

import torch
import transformers

from lmjax.bench.child import Session, peak_rss, serve


def prepare(case: dict, session: Session):
    session.imported()
    torch.manual_seed(0)
    settings = case["hf"] | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case["dtype"])).eval()
    ids = torch.randint(1, case["vocab_size"], (case["batch"], case["prompt"]))
    session.facts |= {"torch": torch.__version__, "transformers": transformers.__version__,
                      "before_bytes": peak_rss()}

    def one() -> None:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
                                 min_new_tokens=case["new"], max_new_tokens=case["new"])
        assert out.shape[1] == case["prompt"] + case["new"]

    def run(steps: int) -> dict[str, float]:
        for _ in range(max(steps // case["new"], 1)):
            one()
        return {}

    one()
    return run


if __name__ == "__main__":
    serve(lambda session: prepare(json.loads(sys.argv[1]), session))
