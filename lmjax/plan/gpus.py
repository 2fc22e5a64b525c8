"""What XLA has to be told of a GPU to compile for it where there is none: its description, as protobuf text.

The fields are those of XLA's GpuTargetConfigProto; the numbers are NVIDIA's (the tables of the CUDA programming guide
by compute capability, and the data sheets of A100, H100 SXM and H200 SXM). Memory and bandwidth are those of
`lmjax.plan.machine`, so that the two cannot disagree. No times are taken from such a program: there is no GPU to tune
its products on.
"""

from lmjax.plan.machine import HOST_GPUS, Machine

# name -> (JAX's name, compute capability, cores, shared bytes of a core, of a block at most, L2 bytes, GHz)
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, 108, 167_936, 166_912, 40 << 20, 1.41),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 132, 233_472, 232_448, 50 << 20, 1.98),
    "h200": ("NVIDIA H200", 9, 132, 233_472, 232_448, 50 << 20, 1.98),
}


def target(machine: Machine) -> str:
    """GpuTargetConfigProto, as text, of the machine's GPU."""
    name, major, cores, shared, most, cache, clock = _GPUS[machine.name]
    return f"""platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} }}
  core_count: {cores} fpus_per_core: {64 if major == 8 else 128} clock_rate_ghz: {clock} l2_cache_size: {cache}
  device_memory_size: {int(machine.chip.hbm)} memory_bandwidth: {int(machine.chip.hbm_rate)}
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {most}
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}}
"""


def topology(machine: Machine) -> str:
    """As the CUDA plug-in reads it: slices x hosts x GPUs of a host."""
    hosts = max(machine.num_devices // HOST_GPUS, 1)
    return f"1x{hosts}x{machine.num_devices // hosts}"
