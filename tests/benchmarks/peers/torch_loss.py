"""PyTorch's side of `lmjax bench loss`: logits, `F.cross_entropy` and backward, as a training loop writes it.

    python tests/benchmarks/peers/torch_loss.py '{"rows": 8, "seq_len": 512, "vocab": 8192, "width": 256, …}'
"""

import json
import sys

import torch
import torch.nn.functional as F

from lmjax.bench.child import Session, peak_rss, serve


def prepare(shape: dict, session: Session):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, V = shape["rows"] * shape["seq_len"], shape["vocab"]
    torch.manual_seed(0)
    x = torch.randn(tokens, shape["width"], device=device, requires_grad=True)
    head = (0.02 * torch.randn(V, shape["width"], device=device)).requires_grad_()
    targets = torch.randint(0, V, (tokens,), device=device)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=shape["dtype"] == "bfloat16")
    session.facts |= {"torch": torch.__version__, "before_bytes": peak_rss()}
    if device == "cuda":
        session.last = lambda: {"peak_device_bytes": torch.cuda.max_memory_allocated()}

    def run(steps: int) -> dict[str, float]:
        for _ in range(steps):
            x.grad = head.grad = None
            with autocast:
                loss = F.cross_entropy(F.linear(x, head).float(), targets)
            loss.backward()
        return {"loss": loss.item()}

    run(2)
    return run


if __name__ == "__main__":
    serve(lambda session: prepare(json.loads(sys.argv[1]), session))
