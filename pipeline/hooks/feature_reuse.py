"""Pictures of the network's feature reuse (the paper's Figure 5) in TensorBoard, every few epochs and at the end."""

from pipeline.feature_reuse import draw_reuse, feature_reuse
from pipeline.hooks.hook import EpochResult, Hook, Training
from pipeline.models.densenet import DenseNet
from pipeline.run import Run


class FeatureReusePictures(Hook):
    changes_network = False

    def __init__(self, run: Run):
        self._every = run.config.train.reuse_every

    def on_epoch(self, trainer: Training, result: EpochResult) -> None:
        run, done = trainer.run, result.epoch + 1
        due = self._every and (done % self._every == 0 or run.is_complete)
        if due and run.world.is_main and isinstance(run.network, DenseNet):
            picture = draw_reuse(feature_reuse(run.network), f"{run.config.model.name} after {done} epochs")
            trainer.monitor.figure("feature reuse", picture, run.done_steps)
