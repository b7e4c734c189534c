"""How commands start this project's modules in several processes."""

import sys


def torchrun(processes: int, module: str, *arguments: object) -> list[str]:
    """The command line that runs ``python -m MODULE ARGUMENTS`` in so many processes of this machine, on a free port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", module, *map(str, arguments)]
