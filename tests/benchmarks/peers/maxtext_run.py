"""MaxText's side of `lmjax bench train`: its own config, state and train step, called as its own loop calls them.

    python3.12 tests/benchmarks/peers/maxtext_run.py CASE

Written against maxtext 0.2.5 (`requirements-maxtext.txt`), which has no public Python API for training: setup and
step are the functions of its `train_loop`. Checkpoints, TensorBoard and its log are off, and so is everything that
speaks to Google Cloud. Its weights are its own, so that its losses are near ours but not equal. Shapes with a sliding
window or learned positions are refused.
"""

import importlib.metadata
import os
import sys
import tempfile

import numpy as np

from lmjax.bench.cases import WARMUP, Case, tokens
from lmjax.bench.child import Session, serve

os.environ |= {"DECOUPLE_GCLOUD": "TRUE", "TF_CPP_MIN_LOG_LEVEL": "3"}


def arguments(case: Case, folder: str) -> list[str]:
    """The command line of the case. It has no policy that keeps everything; "minimal" keeps every matrix product."""
    m, o = case.model, case.optim
    values = {
        "run_name": "bench", "base_output_directory": folder, "dataset_type": "synthetic", "steps": 1_000_000,
        "hardware": case.platform, "skip_jax_distributed_system": True,
        "base_num_decoder_layers": m["num_layers"], "base_emb_dim": m["d_model"], "head_dim": m["head_dim"],
        "base_num_query_heads": m["num_heads"], "base_num_kv_heads": m["num_kv_heads"], "base_mlp_dim": m["d_ff"],
        "vocab_size": m["vocab_size"], "logits_via_embedding": m["tied"], "max_target_length": case.seq_len,
        "per_device_batch_size": case.batch, "normalization_layer_epsilon": m["norm_eps"],
        "rope_max_timescale": int(m["rope_theta"]), "dtype": case.dtype, "weight_dtype": "float32",
        "opt_type": "adamw", "adam_b1": o["b1"], "adam_b2": o["b2"], "adam_eps": o["eps"],
        "adam_weight_decay": o["weight_decay"], "gradient_clipping_threshold": o["clip_norm"],
        "learning_rate": o["learning_rate"], "warmup_steps_fraction": 0.0,
        "attention": "dot_product" if case.platform == "cpu" else "autoselected",
        "remat_policy": "minimal" if case.remat == "none" else "full", "enable_dropout": False,
        "enable_checkpointing": False, "enable_tensorboard": False, "log_config": False, "jax_cache_dir": "",
    }
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]


def prepare(folder: str, session: Session):
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train
    from maxtext.utils import sharding, train_utils

    session.imported()
    case = Case.load(folder)
    m = case.model
    if any(m["windows"]) or m["positions"] != "rope" or not m["gated"] or m["qk_norm"] or m["scale_embed"]:
        raise ValueError("the MaxText peer has plain Llama shapes only")
    scratch = tempfile.mkdtemp(dir=folder)
    config, recorder = train.initialize(["bench", *arguments(case, scratch)])
    _, _, placed, _, mesh, _, _, _, _, _, state = train_utils.setup_train_loop(config, recorder)
    model, state = nnx.split(state)
    params_placed, placed = sharding.maybe_update_params_sharding_with_opt(config, placed)
    step, _ = train_utils.jit_train_and_eval_step(config, model, mesh, state, placed, train.train_step,
                                                  params_shardings=params_placed)
    where = sharding.get_input_data_sharding(config, mesh)
    data = tokens(m["vocab_size"], case.batch, case.seq_len)
    ones = np.ones((case.batch, case.seq_len), np.int32)
    index = np.cumsum(ones, axis=1, dtype=np.int32) - 1
    done = 0

    def advance():
        """One step of its loop, with our tokens; its metrics, not fetched yet."""
        nonlocal state, done
        x = data[done % len(data)]
        done += 1
        batch = {"inputs": x[:, :-1], "targets": x[:, 1:], "inputs_position": index, "targets_position": index,
                 "inputs_segmentation": ones, "targets_segmentation": ones}
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            state, metrics = step(state, jax.device_put(batch, where))
        return metrics["scalar"]

    def number(metrics, name: str) -> float:
        return float(metrics[f"learning/{name}"])

    warm = [advance() for _ in range(WARMUP)]
    first = [{"loss": number(s, "loss"), "grad_norm": number(s, "grad_norm")} for s in warm]
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(nnx.merge(model, state).model, nnx.Param)))
    session.facts |= {"jax": jax.__version__, "first_steps": first, "parameters": parameters,
                      "maxtext": importlib.metadata.version("maxtext")}

    def last() -> dict[str, int]:
        stats = jax.devices()[0].memory_stats() or {}
        return {"peak_device_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}

    session.last = last

    def run(steps: int) -> dict[str, float]:
        pending, value = None, 0.0
        for _ in range(steps):
            metrics = advance()
            if pending is not None:
                value = number(pending, "loss")
            pending = metrics
        value = number(pending, "loss")
        jax.block_until_ready(state)
        return {"loss": value}

    return run


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    serve(lambda session: prepare(sys.argv[1], session))
    return 0


if __name__ == "__main__":
    sys.exit(main())
