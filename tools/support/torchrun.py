"""How commands start this project's modules in several processes."""

import sys


def torchrun(processes: int, module: str, *arguments: object, launcher_module: str = "pipeline.torchrun") -> list[str]:
    """The command line that runs ``python -m MODULE ARGUMENTS`` in so many processes of this machine, on a free port.

    Args:
        launcher_module: ours, or ``torch.distributed.run`` for torchrun's own.
    """
    launcher = [sys.executable, "-m", launcher_module, "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", module, *map(str, arguments)]
