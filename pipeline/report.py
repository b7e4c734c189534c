"""What a run says of itself: its configuration and audit as files, and a summary at the end."""

import sys

from pipeline.audit import AuditRow, audit, count_differences, origin_text, setting_for, statistics_text, to_markdown
from pipeline.checkpoint import CheckpointFolder, Found
from pipeline.config import to_yaml
from pipeline.data.checks import warnings_about
from pipeline.metrics import exits_text
from pipeline.run import Progress, Run
from pipeline.run_dir import replace_text


def write_description(run: Run, found: Found | None) -> None:
    """Write what the run is into its directory, put aside what earlier starts have left there, and warn of a new run."""
    CheckpointFolder(run.dir / "checkpoints").remove_temporary()
    if found:
        found.set_damaged_aside()
    else:
        for line in warnings_of(run, None):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    setting = setting_for(run.config)
    title = f"{run.config.model.name} beside {setting.paper}'s {setting.name} setting"
    replace_text(run.dir / "config.yaml", to_yaml(run.config))
    replace_text(run.dir / "audit.md", to_markdown(audit_of(run), title, run.history.lines()))


def warnings_of(run: Run, found: Found | None) -> list[str]:
    """A line for each thing about a run that its user should know before hours of training."""
    config, lines = run.config, warnings_about(run.train_loader.index, run.val_loader.index, run.config.data)
    lines += [f"{path} is damaged: the run resumes from {found.path.name}" for path in found.damaged] if found else []
    late = [epoch for epoch in config.optim.milestones if epoch >= config.optim.epochs]
    if config.optim.schedule == "step" and late:
        lines.append(
            f"the learning rate never drops at epoch {', '.join(map(str, late))}: the run has optim.epochs "
            f"{config.optim.epochs}; set optim.milestones"
        )
    if config.optim.class_weights == "balanced" and config.data.sampling == "balanced":
        lines.append(
            "optim.class_weights balanced and data.sampling balanced correct for rare classes twice, so that rare ones count "
            "more than frequent ones: leave one of them out"
        )
    return lines


def summary(run: Run) -> str:
    """Best and last validation error, beside the published ones where the configuration has them."""
    progress, published = run.progress, run.config.published
    several = run.train_loader.index.several_labels
    best, last = (_of_labels if several else _errors)(progress)
    lines = [f"best  (epoch {progress.best_epoch}): {best}", f"last  (epoch {progress.epoch - 1}): {last}"]
    if published.auroc is not None and several:
        lines.append(f"{published.source or 'published'}: mean AUROC {published.auroc}")
    if published.top1 is not None:
        top5 = "" if published.top5 is None else f", top-5 error {published.top5:.2f} %"
        note = " (test images; ours are held-out training images)" if run.config.data.holdout else ""
        lines.append(f"{published.source or 'published'}: top-1 error {published.top1:.2f} %{top5}{note}")
    if run.config.model.weights:
        lines.append(f"begun with {origin_text(run.config.model)}")
    lines.append(f"images in a batch-norm statistic: {statistics_text(run.measured.statistics)}")
    if run.progress.skipped_steps:
        lines.append(f"{run.progress.skipped_steps} steps were left out, as their loss or gradient was not finite")
    lines += run.history.lines()
    verdict = count_differences(audit_of(run), setting_for(run.config).paper)
    lines.append(f"recipe: {verdict} ({run.dir / 'audit.md'})")
    return "\n".join(lines)


def _errors(progress: Progress) -> tuple[str, str]:
    """Of the best and of the last epoch."""
    return (
        f"top-1 error {progress.best_top1_error:.2f} %, top-5 error {progress.best_top5_error:.2f} %",
        f"top-1 error {progress.last_top1_error:.2f} %, top-5 error {progress.last_top5_error:.2f} %"
        f"{exits_text(progress.last_exit_errors)}",
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
