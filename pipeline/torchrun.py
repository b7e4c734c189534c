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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.exits import EXIT_BUG, EXIT_KEYBOARD, EXIT_RESUME, EXIT_USER_ERROR, SPEAKER

AGAIN = "start the same command again to go on"


def main() -> None:
    try:
        from torch.distributed import run  # which takes seconds
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except KeyboardInterrupt:
        sys.exit(EXIT_KEYBOARD)
    options = run.parse_args(sys.argv[1:])
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed") and "LOGLEVEL" not in os.environ:
            logging.getLogger(name).setLevel(logging.CRITICAL)  # that it sends signals, and which rank has failed
    try:
        run.config_from_args(options)
    except (ValueError, RuntimeError, AssertionError) as error:  # as --nproc-per-node gpu without a GPU
        print(f"error: torchrun: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    os.environ[SPEAKER] = "1"
    with tempfile.TemporaryDirectory() as folder:
        options.log_dir = options.log_dir or folder
        before = set(Path(options.log_dir).glob("*"))  # of earlier starts
        failed: dict[int, int] = {}
        asked = None
        try:
            run.run(options)
            return
        except ChildFailedError as error:
            failed = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except (SignalException, KeyboardInterrupt) as error:
            asked = error.sigval if isinstance(error, SignalException) else signal.SIGINT
        code, line = outcome(words_in(set(Path(options.log_dir).glob("*")) - before), failed, asked)
    if line:
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)


def words_in(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """What the ranks of this machine have left word of in torchrun's folders, of the last attempt, by rank."""
    files: dict[int, list[Path]] = {}
    for file in chain.from_iterable(folder.glob("attempt_*/*/error.json") for folder in folders):
        files.setdefault(int(file.parent.parent.name.removeprefix("attempt_")), []).append(file)
    words = []
    for file in sorted(files[max(files)], key=lambda file: int(file.parent.name)) if files else []:
        with suppress(OSError, ValueError):  # cut short, by a kill
            words.append(json.loads(file.read_text()))
    return words


def outcome(
    words: Sequence[Mapping[str, Any]], failed: Mapping[int, int], asked: signal.Signals | None
) -> tuple[int, str]:
    """Exit code, and the line that says why the ranks ended, empty if there is nothing to say.

    A rank that has only lost contact to another leaves with the code of an interruption, and is not the cause.

    Args:
        words: of the ranks, as `exits.record_for_torchrun` writes them.
        failed: exit codes of the ranks that torchrun saw fail, minus the signal's number for one that was killed.
        asked: the signal that torchrun itself was sent.
    """
    said = {
        code: [str(word["message"]) for word in words if word.get("code") == code]
        for code in (EXIT_BUG, EXIT_USER_ERROR, EXIT_RESUME)
    }
    if said[EXIT_USER_ERROR]:
        return EXIT_USER_ERROR, f"error: {said[EXIT_USER_ERROR][0]}"
    if said[EXIT_BUG]:
        rank = next((rank for rank, code in failed.items() if code == EXIT_BUG), 0)
        return (
            EXIT_BUG,
            f"error: rank {rank} failed with the traceback above, which is a bug ({_last_line(said[EXIT_BUG][0])})",
        )
    for rank, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name
            why = ", often for lack of memory" if name == "SIGKILL" else ""
            return 128 - code, f"interrupted: rank {rank} was ended by {name}{why}; {AGAIN}"
    if said[EXIT_RESUME]:
        by_signal = [str(word["message"]) for word in words if word.get("signal")]
        return EXIT_RESUME, f"interrupted: {(by_signal or said[EXIT_RESUME])[0]}; {AGAIN}"
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
