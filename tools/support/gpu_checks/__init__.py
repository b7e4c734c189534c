"""The checks of `python -m tools.gpu`: each a function with a line in `CHECKS`. The tests run them on CPU.

A check returns what it has seen. It raises `Skipped` where it cannot look, and anything else where what it sees is wrong.
It imports within what its own packages need (`Check.needs`), so that the others run where those are missing.
"""

from tools.support.gpu_checks.check import Check
from tools.support.gpu_checks.dali import dali_corrupt, dali_memory, dali_odd, dali_pixels, dali_resumed
from tools.support.gpu_checks.environment import nvjpeg, tf32_flags, versions
from tools.support.gpu_checks.graphs import compiled, cuda_graphs, runs_in_graphs
from tools.support.gpu_checks.host import host_waits, launches
from tools.support.gpu_checks.images import augmentation, colours, evaluation
from tools.support.gpu_checks.numerics import checkpointing, float64_as_torchvision, low_precision
from tools.support.gpu_checks.ranks import lost_rank, process_groups, two_ranks
from tools.support.gpu_checks.runs import out_of_memory, overflow, precisions, resumed
from tools.support.gpu_checks.timing import choice_of_auto, run_beside_steps, speed
from tools.support.gpu_checks.triton import sanitizer, triton_kernels

CHECKS = [
    Check("G0", "versions", versions),
    Check("G0", "TF32 flags", tf32_flags),
    Check("G0", "nvJPEG", nvjpeg, ("nvidia.dali", "torchvision")),
    Check("G1", "float64 as torchvision", float64_as_torchvision, ("torchvision",)),
    Check("G1", "activation checkpointing", checkpointing),
    Check("G1", "precisions against float64", low_precision),
    Check("G2", "colours", colours, ("pydantic",)),
    Check("G2", "augmentation", augmentation, ("pydantic",)),
    Check("G2", "evaluation", evaluation, ("pydantic",)),
    Check("G3", "cut and resumed", resumed, ("pydantic",)),
    Check("G3", "training in each precision", precisions, ("pydantic",)),
    Check("G3", "overflow in fp16", overflow),
    Check("G3", "out of memory", out_of_memory),
    Check("G4", "waits of the host", host_waits, ("pydantic",)),
    Check("G4", "launches of a step", launches, ("triton",)),
    Check("G4", "a run beside its steps", run_beside_steps, ("pydantic",)),
    Check("G5", "process groups", process_groups),
    Check("G5", "two ranks on one device", two_ranks),
    Check("G5", "a killed rank", lost_rank),
    Check("G6", "CUDA graphs", cuda_graphs),
    Check("G6", "CUDA graphs in runs", runs_in_graphs, ("pydantic",)),
    Check("G6", "torch.compile", compiled),
    Check("G7", "DALI's pixels", dali_pixels, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI and odd images", dali_odd, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI and a corrupt image", dali_corrupt, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI, cut and resumed", dali_resumed, ("pydantic", "nvidia.dali")),
    Check("G7", "DALI's memory", dali_memory, ("pydantic", "nvidia.dali")),
    Check("G8", "Triton kernels", triton_kernels, ("triton",)),
    Check("G8", "compute-sanitizer", sanitizer, ("triton",)),
    Check("G8", "auto's choice", choice_of_auto, ("pydantic",)),
    Check("G9", "speed", speed),
]  # fmt: skip
GROUPS = sorted({check.group for check in CHECKS})
