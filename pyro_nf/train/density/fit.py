"""Fit a flow to rows of numbers, or of events of any shape, in memory or in batches."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pyro_nf._checks import (
    check_budget,
    check_count,
    check_entries,
    check_flag,
    check_kind,
    check_number,
    check_patience,
    check_positive,
    check_running,
)
from pyro_nf.flows.flow import Flow
from pyro_nf.train.budget import Budget
from pyro_nf.train.density.recipe import DensityFit, DensityRecipe
from pyro_nf.train.density.source import check_data, source_of
from pyro_nf.train.density.start import Start
from pyro_nf.train.density.table import warn_of_dependent_columns, warn_of_repeats
from pyro_nf.train.density.work import Options, Work
from pyro_nf.train.modes import ordinary, recording
from pyro_nf.train.stages import History
from pyro_nf.train.world import SEARCH_SECONDS, World


def fit_density(
    flow: Flow,
    x: Tensor | Iterable[Any],
    *,
    context: Tensor | None = None,
    validation: float | Tensor | tuple[Tensor, Tensor] | Iterable[Any] = 0.1,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    learning_rate: float = 3e-3,
    weight_decay: float | None = None,
    starts: Sequence[Start] | None = None,
    baselines: bool = True,
    patience: float | None = 0.5,
    check_every: int = 50,
    seed: int | None = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    compile: bool = False,
    recipe: DensityRecipe | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DensityFit:
    r"""Fit a flow to rows by maximum likelihood.

    .. math:: \min_\theta \; -\tfrac{1}{N} \sum_i \log q_\theta(x_i \mid c_i)

    A part of the rows is held out. Columns and contexts are brought to the unit scale by fixed
    maps that become part of the flow (``flow.units``, ``flow.context_units``), so that the fit does
    not depend on units. Each start sets linear layers from the data and trains for a
    small share of the budget; validation chooses the one that goes on. The learning rate rises,
    then falls along a cosine that ends with the budget. The flow ends with the moving average of
    the parameters that was best on the validation rows. Few rows for many columns bring weight
    decay on the networks, which rises when the flow overfits: when validation becomes worse while
    the loss falls, the fit goes back to its best state under more decay. Biases do not decay, so
    that what is left is linear maps and free marginals.

    A row is an event of any shape. Of images ``(C, H, W)`` each channel is a column and has one
    unit, of other events each entry. Contexts that the flow embeds may be whatever the embedding
    takes; floating tensors get units before it.

    By default the starts are `Standardised` and `Whitened`. If the base of the flow is the standard
    normal, heavy tails bring `StudentTails` of both, and the better of them is tried with
    the normal too; and if a Gaussian mixture found by EM is better on the validation rows than all
    others after their race, the flow starts from that base (`MixtureBase`) and trains on, layers
    and all. The mixture and the copula are of vectors: for other events they are left out.

    A flow with layers that draw or lose something is trained by the bound that its ``log_prob`` is,
    with fresh draws in each step and the same ones in each look at validation; one whose
    log-determinants are estimated likewise.

    Rows that do not fit in memory are given in batches, by a ``DataLoader`` or anything else that
    can be started again. Its first rows, up to 20,000, give units and starts; a share of them is
    held out and recognised in all later batches, so that these may be shuffled. Where batches
    change their rows, by noise for example, give validation rows of their own.

    Where ``torch.distributed`` is initialised, all processes call this alike and fit together
    (:func:`~pyro_nf.train.loop.train`): the first one looks for the start, and all have the same
    flow in the end.

    Ctrl-C at any moment ends the fit with the best state so far.

    Args:
        flow: The flow, changed in place.
        x: Rows, shape ``(N, D)`` or ``(N, *event_shape)``, N at least 2; or an iterable of batches,
            each a tensor of rows, or a tuple of rows, or of rows and contexts.
        context: Contexts of the rows, shape ``(N, C)``, for a flow that takes them; or N of what
            its embedding takes.
        validation: The share of rows to hold out, or rows, or rows and their contexts, or an
            iterable of batches of these.
        max_steps: The most steps, those of the starts included; 5,000 if ``max_seconds`` is not
            given either.
        max_seconds: The most seconds, all included.
        batch_size: Rows in a batch; by default a tenth of the rows, but 64 to 256.
        learning_rate: The highest learning rate of Adam.
        weight_decay: Decay of the networks' weights; by default :math:`10 \min(1, (20 D / N)^3)` at
            first, and more whenever the flow overfits.
        starts: What to try, and nothing else; ``(AsGiven(),)`` goes on with a flow that was trained
            before, in the units that it has.
        baselines: Whether to fit the Gaussian mixture and the Gaussian copula, for comparison;
            without them the mixture is no start either.
        patience: Stop when validation has not improved for this share of the budget.
        check_every: Steps between two looks at validation.
        seed: Seed of the fit; the global generators are left as they were.
        progress: Whether to show a progress bar.
        checkpoint: A file for the state of the fit; if it exists the fit goes on from there, if
            data and settings are those of then. The budget may be another.
        checkpoint_every: Steps between two writes of it, rounded up to a check.
        compile: Whether to compile the loss with ``torch.compile``: a step then took about half as
            long in two dimensions, but compiling some 20 seconds of CPU at the first step, so that
            it pays from about 10,000 steps on.
        recipe: Settings beyond these arguments; `DensityRecipe` by default.
        clock: Returns the seconds that ``max_seconds`` counts.

    Returns:
        The flow with history, validation loss and baselines; print it for a small table.

    Raises:
        TypeError: If the data are not floating tensors.
        RuntimeError: If another process of the fit failed, or is lost.
        ValueError: If a shape is wrong, there are too few rows, an iterable gives no rows or cannot
            be started again, or a column of rows or contexts is constant, has NaN or inf,
            loses its digits in the dtype of the flow, or has an entry so far out that the others
            vanish beside it; the message names the column, or the batch and the row.
        OSError: If the checkpoint cannot be written.

    Example:
        >>> import torch
        >>> from pyro_nf.flows.recipes import gaussian
        >>> x = 3 + 2 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
        >>> fit = fit_density(gaussian(1), x, max_steps=100, progress=False)
        >>> abs(fit.flow().sample((10_000,)).mean().item() - 3) < 0.3
        True
    """
    check_kind("fit_density", "flow", flow, Flow, "make one, as nsf(2)")
    check_data(flow, x, context, validation, batch_size)
    check_budget("fit_density", max_steps, max_seconds)
    check_count("fit_density", "batch_size", batch_size, optional=True)
    check_positive("fit_density", "learning_rate", learning_rate)
    wanted = "a number >= 0, or None"
    check_number("fit_density", "weight_decay", weight_decay, wanted, at_least=0, optional=True)
    if starts is not None:
        check_entries("fit_density", "starts", starts, Start)
    check_flag("fit_density", "baselines", baselines)
    check_flag("fit_density", "compile", compile)
    check_patience("fit_density", patience)
    check_count("fit_density", "check_every", check_every)
    check_kind("fit_density", "recipe", recipe, DensityRecipe, optional=True)
    check_running("fit_density", seed, progress, checkpoint, checkpoint_every, clock)
    recipe = DensityRecipe() if recipe is None else recipe
    result = DensityFit(flow, History(), math.nan, recipe=recipe)
    was_training = flow.training
    flow.eval()  # dropout is for the steps, and the loop turns it on
    if max_steps is None and max_seconds is None:
        max_steps = recipe.max_steps
    options = Options(
        learning_rate=learning_rate,
        raise_decay=weight_decay is None,
        patience=patience,
        check_every=check_every,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        compile=compile,
        recipe=recipe,
    )
    try:
        budget = Budget(max_steps, max_seconds, clock)
        x, context, validation = ordinary((x, context, validation))
        with (
            recording("fit_density"),
            World.joined(SEARCH_SECONDS, is_led=True) as world,
        ):
            source = world.together(
                lambda: source_of(
                    flow, x, context, validation, seed, batch_size, recipe, world.is_first
                )
            )
            if world.is_first:
                if not flow.transform.codomain.is_discrete:
                    is_share = isinstance(validation, (int, float))
                    warn_of_repeats(source.inspected, is_share and not source.keeps_apart)
                    warn_of_dependent_columns(source.inspected.y)
                decay = recipe.weight_decay(source.count_rows, source.table.y[0].numel())
                options = replace(
                    options,
                    batch_size=source.batch_size,
                    weight_decay=decay if weight_decay is None else weight_decay,
                )
            work = Work(result, source, budget, options, world)
            work.lead(starts, baselines) if world.is_first else work.follow()
    except KeyboardInterrupt:
        result.history.stopped = "interrupted"
    finally:
        flow.train(was_training)
    return result
