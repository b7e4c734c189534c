"""What a run says of itself: its configuration and audit as files, a page for TensorBoard, and a summary at the end."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.audit import (
    AuditRow,
    audit,
    count_differences,
    differences,
    in_cell,
    is_papers_data,
    published_errors_hold,
    statistics_text,
    to_markdown,
)
from pipeline.cautions import about_schedule, cautions
from pipeline.checkpoint import CheckpointFolder, FoundCheckpoint
from pipeline.config import Config
from pipeline.config_file import changed_fields, to_yaml
from pipeline.data.splits import with_sets_found
from pipeline.metrics import errors_text, exits_text
from pipeline.optim import learning_rate
from pipeline.paper import setting_for
from pipeline.parsing import flatten, value_text
from pipeline.provenance import provenance
from pipeline.resume import FREE_TO_CHANGE
from pipeline.run import Progress, Run
from pipeline.run_dir import CONFIG, RECORDS, now, replace_text
from pipeline.unused import unused_fields
from pipeline.words import counted, sizes_text


def write_description(run: Run, found: FoundCheckpoint | None) -> None:
    """Write what the run is into its directory, put aside what earlier starts have left there, and warn of a new run."""
    CheckpointFolder(run.dir / "checkpoints").remove_temporary()
    if found:
        found.set_damaged_aside()
    else:
        if (run.dir / RECORDS).exists():
            print(f"{now()} beginning anew: earlier starts of {run.dir} have saved no checkpoint", flush=True)
        for line in warnings_of(run, None):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    replace_text(run.dir / CONFIG, to_yaml(with_sets_found(run.config)))
    write_audit(run)


def write_audit(run: Run) -> None:
    """Write how the run, as far as it is, differs from the paper's."""
    setting = setting_for(run.config)
    title = f"{run.config.model.name} beside {setting.paper}'s {setting.name} setting"
    replace_text(run.dir / "audit.md", to_markdown(audit_of(run), title, run.history.lines(), setting.paper))


def configuration_text(run: Run) -> str:
    """The configuration as YAML, without the fields that do nothing in this run, and with the sets that were found."""
    config = with_sets_found(run.config)
    unused = unused_fields(flatten(dataclasses.asdict(config)))
    return to_yaml(config, unused | ({"data.val"} if config.data.holdout else set()))


def warnings_of(run: Run, found: FoundCheckpoint | None) -> list[str]:
    """A line for each thing about a run that its user should know before hours of training."""
    lines = cautions(run.config, run.train_loader.index, run.val_loader.index, run.world.size)
    lines += run.doubts
    lines += [line for line in changed_rate(run) if line not in lines]
    return lines + (
        [f"{path} is damaged: the run resumes from {found.path.name}" for path in found.damaged] if found else []
    )


def changed_rate(run: Run) -> list[str]:
    """What a change on purpose that has just been made does to the learning rate, if that looks wrong, a line each.

    More epochs stretch a schedule: where it had come to its end, the rate goes back up.
    """
    segment, optim, steps = run.history.segments[-1], run.config.optim, run.train_loader.steps_per_epoch
    if run.is_complete or not segment.changed or segment.step != run.done_steps:
        return []
    names = {field.name for field in dataclasses.fields(optim)}
    was = run.optim_before or optim  # with fields that nothing reads now, which are not among the changed ones
    old = {key.removeprefix("optim."): value for key, (value, _) in segment.changed.items() if key.startswith("optim.")}
    before = dataclasses.replace(was, **{name: value for name, value in old.items() if name in names})
    known = {line.partition(":")[0] for line in about_schedule(before)}
    lines = [line for line in about_schedule(optim) if line.partition(":")[0] not in known]
    rate, last = run.learning_rate, learning_rate(before, run.done_steps - 1, steps)
    if rate <= max(last, learning_rate(before, run.done_steps, steps)):
        return lines
    rises = (
        f"with this change the learning rate rises: {last:.4g} in the last step, {rate:.4g} in the next (schedule "
        f"{optim.schedule} over {counted(optim.epochs, 'epoch')})"
    )
    return [rises, *lines]


def start_text(run: Run) -> str:
    """Where the run goes on, in a line; empty if it is new."""
    if run.is_complete:
        return (
            f"{run.dir} is complete ({counted(run.progress.epoch, 'epoch')}), and nothing is left to train; "
            "--optim.epochs N --train.change optim.epochs trains it to epoch N"
        )
    return f"resuming at {run.position} of {run.dir}" if run.done_steps else ""


def summary(run: Run) -> str:
    """Best and last validation error, beside the published ones where the configuration has them."""
    progress, published = run.progress, run.config.published
    several = run.train_loader.index.several_labels
    best, last = (_of_labels if several else _errors)(progress)
    epochs, (judged, *others) = run.config.optim.epochs, run.validated
    of = f", {judged} weights" if others else ""
    by = progress.best_weights or judged
    of_best = f", {by} weights" if others or by != judged else ""
    lines = [f"best (epoch {progress.best_epoch + 1} of {epochs}{of_best}): validation {best}"]
    lines += [f"last (epoch {progress.epoch} of {epochs}{of}): validation {last}"]
    for weights, errors in zip(
        others, progress.last_of_other_weights, strict=False
    ):  # none of before it was switched on
        lines.append(f"last (epoch {progress.epoch} of {epochs}, {weights} weights): validation {errors}")
    measured = run.measured
    holds = published_errors_hold(run.config, measured.classes, measured.images)
    note = " (test images; ours are held-out training images)" if run.config.data.holdout else ""
    if published.auroc is not None and several and holds:
        lines.append(f"{published.source or 'published'}: mean AUROC {published.auroc}{note}")
    if published.top1 is not None and holds:
        top5 = "" if published.top5 is None else f", top-5 error {published.top5:.2f} %"
        lines.append(f"{published.source or 'published'}: top-1 error {published.top1:.2f} %{top5}{note}")
    if run.config.model.weights:
        lines.append(f"begun with {run.config.model.weights_text}")
    if measured.batch_norms:
        lines.append(f"images in a batch-norm statistic: {_statistic_text(run)}")
    if run.progress.skipped_steps:
        steps = counted(run.progress.skipped_steps, "step")
        lines.append(f"left out, as the loss or gradient was not finite: {steps}")
    lines += run.history.lines()
    lines += [line] if (line := recipe_text(run)) else []
    return "\n".join(lines)


def _statistic_text(run: Run) -> str:
    """The images in a batch-norm statistic, of each part of the run, and in an epoch's last batch if that is smaller."""
    statistic, batches = statistics_text(run.measured.statistics), run.batches
    if batches.steps == 1 or batches.last == batches.size:
        return statistic
    divided = run.history.microbatches_of_last(batches.steps, run.done_steps)
    parts = (dataclasses.replace(batches, microbatches=number).statistic_of_last for number in divided)
    sizes = ", then ".join(map(sizes_text, parts))
    of = f", of {counted(batches.last, 'image')}" if sizes != str(batches.last) else ""
    return f"{statistic} ({sizes} in an epoch's last batch{of})"


def recipe_text(run: Run, in_full: bool = False) -> str:
    """How many parts of the run differ from the paper's, in one line; nothing where its data are not the paper's.

    Args:
        in_full: name each part, a line each, whatever the data are.
    """
    rows, measured, paper = audit_of(run), run.measured, setting_for(run.config).paper
    verdict = f"recipe: {count_differences(rows, paper)}"
    if in_full:
        return "\n".join([verdict, *(f"  {row.part}: {row.here} ({paper}: {row.paper})" for row in differences(rows))])
    if not is_papers_data(run.config, measured.classes, measured.images):
        return ""
    return f"{verdict}: {run.dir / 'audit.md'}"


def _errors(progress: Progress) -> tuple[str, str]:
    """Of the best and of the last epoch."""
    return (
        errors_text(progress.best_top1_error, progress.best_top5_error),
        errors_text(progress.last_top1_error, progress.last_top5_error) + exits_text(progress.last_exit_errors),
    )


def _of_labels(progress: Progress) -> tuple[str, str]:
    """As `_errors`, where images have several labels."""
    return (
        f"mean AUROC {progress.best_auroc:.4f}, mean average precision {progress.best_average_precision:.4f}",
        f"mean AUROC {progress.last_auroc:.4f}, mean average precision {progress.last_average_precision:.4f}",
    )


def audit_of(run: Run) -> list[AuditRow]:
    """The run beside the paper's."""
    return audit(run.config, run.microbatches, run.measured)


def about(run: Run) -> str:
    """A page in Markdown: where this start of a run comes from, what it trains, and what is not as usual."""
    changed = [(f"`{key}`", _cell(value), _cell(usual)) for key, (value, usual) in changed_fields(run.config).items()]
    odd = [(row.part, in_cell(row.here), in_cell(row.paper)) for row in differences(audit_of(run))]
    origin = {**provenance(), "ranks": str(run.world.size), "run directory": str(run.dir.resolve())}
    parts = [
        ("Differs from the defaults", [("field", "here", "default"), *changed]),
        (f"Differs from {setting_for(run.config).paper}'s recipe", [("part", "here", "paper"), *odd]),
    ]
    lines = [f"- {key}: `{value}`" for key, value in origin.items()]
    lines += [f"- {line}" for line in [*run.description().splitlines(), *run.history.lines()]]
    for title, rows in parts:
        lines += ["", f"### {title}", "", *(_markdown_table(rows) if len(rows) > 1 else ["in nothing"])]
    return "\n".join(lines)


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """What TensorBoard's HParams compares runs by: all that a result may depend on, by key."""
    tree = dataclasses.asdict(config)
    fields = flatten({name: tree[name] for name in ("seed", "model", "data", "optim")})
    fields |= {f"train.{name}": tree["train"][name] for name in ("precision", "ema_decay", "best_by")}
    return {
        key: v if isinstance(v, (bool, int, float)) else _cell(v)
        for key, v in fields.items()
        if key not in FREE_TO_CHANGE
    }


def _cell(value: Any) -> str:
    """A value as the command line gives it, in a table."""
    return in_cell(value_text(value))


def _markdown_table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    ruled = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return [f"| {' | '.join(row)} |" for row in ruled]
