"""torchrun whose end is one line: ``python -m pipeline.torchrun --nproc-per-node 4 -m pipeline.train CONFIG.yaml ...``.

It takes torchrun's own arguments, starts the ranks through torch.distributed.run, and ends with a rank's exit code: 2 after a
mistake of the user, 75 after an interruption. What torchrun would report in a traceback is one line here, by the ranks' own
word (exits.py); ranks leave it to this process to say it.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import first_line
from pipeline.exits import EXIT_BUG, EXIT_KEYBOARD, EXIT_RESUME, EXIT_USER_ERROR, SPEAKER
from pipeline.preemption import leave_closed_outputs

AGAIN = "start the same command again to go on"


def main() -> None:
    try:
        from torch.distributed import run  # which takes seconds
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous.api import RendezvousError
    except KeyboardInterrupt:
        sys.exit(EXIT_KEYBOARD)
    options = run.parse_args(sys.argv[1:])
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed") and "LOGLEVEL" not in os.environ:
            logging.getLogger(name).setLevel(logging.CRITICAL)  # that it sends signals, and which rank has failed
    os.environ[SPEAKER] = "1"
    with tempfile.TemporaryDirectory() as folder:
        try:
            options.log_dir = _own_folder(options.log_dir) if options.log_dir else folder
            run.config_from_args(options)
        except (ValueError, RuntimeError, AssertionError, OSError) as error:  # as --nproc-per-node gpu without a GPU
            print(f"error: torchrun: {first_line(error)}", file=sys.stderr, flush=True)
            sys.exit(EXIT_USER_ERROR)
        failed: dict[int, int] = {}
        asked, lost = None, ""
        try:
            run.run(options)
            return
        except ChildFailedError as error:
            failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except (SignalException, KeyboardInterrupt) as error:
            asked = error.sigval if isinstance(error, SignalException) else signal.SIGINT
        except RendezvousError as error:
            lost = first_line(error)
        words = words_in(Path(options.log_dir))
        code, line = _without_the_others(options, lost) if lost and not words else outcome(words, failed, asked)
    if line:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:  # whoever read it has gone
            leave_closed_outputs()
    sys.exit(code)


def _without_the_others(options: Namespace, reason: str) -> tuple[int, str]:
    """Exit code and line where the launchers do not find each other, or one of them is gone."""
    if any(Path(options.log_dir).glob("*/attempt_*")):
        return EXIT_RESUME, f"interrupted: the launcher of another machine is gone ({reason}); {AGAIN}"
    where = f"--rdzv-endpoint {options.rdzv_endpoint}" if options.rdzv_endpoint else "--master-addr and --master-port"
    return (
        EXIT_USER_ERROR,
        f"error: torchrun: the launchers do not find each other ({reason}): start {options.nnodes} of them, with the same "
        f"{where}, which all machines must reach",
    )


def _own_folder(log_dir: str) -> str:
    """A new folder in the one that ``--log-dir`` names, which other starts may use too, now or before."""
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=log_dir)


def words_in(log_dir: Path) -> list[dict[str, Any]]:
    """What the ranks of this machine have left word of in torchrun's folder, of the last attempt, by rank."""
    attempts = {int(path.name.removeprefix("attempt_")): path for path in log_dir.glob("*/attempt_*")}
    words = []
    for file in sorted(attempts[max(attempts)].glob("*/error.json"), key=_rank_of) if attempts else []:
        with suppress(OSError, ValueError):  # cut short, by a kill
            words.append(json.loads(file.read_text()))
    return words


def _rank_of(file: Path) -> int:
    return int(file.parent.name)


def outcome(
    words: Sequence[Mapping[str, Any]], failed: Mapping[int, int], asked: signal.Signals | None
) -> tuple[int, str]:
    """Exit code, and the line that says why the ranks ended, empty if there is nothing to say.

    A rank that has only lost contact to another leaves with the code of an interruption, and is not the cause. Nor is one
    that torchrun kills, as it does with ranks that do not leave after another has reported that they hang.

    Args:
        words: of the ranks, as `exits.record_for_torchrun` writes them.
        failed: exit codes of the ranks that torchrun saw fail, minus the signal's number for one that was killed.
        asked: the signal that torchrun itself was sent.
    """
    said = {
        code: [str(word["message"]) for word in words if word.get("code") == code]
        for code in (EXIT_BUG, EXIT_USER_ERROR)
    }
    if said[EXIT_USER_ERROR]:
        return EXIT_USER_ERROR, f"error: {said[EXIT_USER_ERROR][0]}"
    if said[EXIT_BUG]:
        rank = next((rank for rank, code in failed.items() if code == EXIT_BUG), 0)
        return (
            EXIT_BUG,
            f"error: rank {rank} failed with the traceback above, which is a bug ({_last_line(said[EXIT_BUG][0])})",
        )
    interrupted = [word for word in words if word.get("code") == EXIT_RESUME]
    by_itself = [word for word in interrupted if not word.get("signal") and not word.get("lost_contact")]
    if by_itself:
        return EXIT_RESUME, f"interrupted: {by_itself[0]['message']}; {AGAIN}"
    for rank, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name
            why = ", often for lack of memory" if name == "SIGKILL" else ""
            return 128 - code, f"interrupted: rank {rank} was ended by {name}{why}; {AGAIN}"
    if interrupted:
        first = min(interrupted, key=lambda word: (bool(word.get("lost_contact")), not word.get("signal")))
        return EXIT_RESUME, f"interrupted: {first['message']}; {AGAIN}"
    if asked:
        return (
            128 + asked,
            "" if asked == signal.SIGINT else f"interrupted: the ranks were ended by {asked.name}; {AGAIN}",
        )
    code = next(iter(failed.values()), EXIT_BUG)
    return code, f"error: rank {next(iter(failed), 0)} ended with exit code {code}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    main()
