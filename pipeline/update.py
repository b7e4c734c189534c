"""What an optimiser step does with the gradients of its batch."""

from torch import Tensor, nn

from pipeline.optim import set_learning_rate
from pipeline.run import Run


def update(run: Run, logged: bool, norm: Tensor | None, skipped: bool) -> tuple[float, float | None]:
    """Clip the gradient, and move the weights and then their average. Waits for the device
    only where the step is logged, and in fp16 where the optimiser is not torch's fused one.

    In fp16 the loss scaler leaves out a step whose gradient is not finite, which only the device knows: such a step moves the
    average once more towards the same weights. With ``train.not_finite skip`` it is known here, and moves nothing.

    Args:
        logged: the gradient's norm is wanted.
        norm: the gradient's, if it is known already (`Run.gradient_norm`).
        skipped: the step is to be left out; then the norm is known.

    Returns:
        The learning rate, and the norm of the gradient of all parameters before it is clipped, without the loss scale; None
        unless logged.
    """
    limit = run.config.optim.clip_grad_norm
    if norm is None and (logged or limit):
        norm = run.gradient_norm()
    if limit and norm is not None:
        nn.utils.clip_grads_with_norm_(run.network.parameters(), limit, norm)
    rate = run.learning_rate
    if not skipped:
        set_learning_rate(run.optimizer, rate)
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.progress.skipped_steps += skipped
    if run.ema and not skipped:
        run.ema.update()
    return rate, norm.item() if logged and norm is not None else None
