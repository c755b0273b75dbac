"""fit_density from batches: what it learns from them, holds out, and refuses in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_nf.flows.flow import Flow
from pyro_nf.flows.recipes import nice, nsf
from pyro_nf.train.batches import part_of, passes
from pyro_nf.train.density import source
from pyro_nf.train.density.fit import fit_density
from pyro_nf.train.density.recipe import DensityFit, DensityRecipe
from pyro_nf.train.density.start import AsGiven, Whitened
from pyro_nf.transforms.chain import Chain
from pyro_nf.transforms.elementwise import Elementwise, Sigmoid
from pyro_nf.univariate.affine import Affine


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def table(count: int = 300) -> Tensor:
    return 5 + draws(count, 2) @ torch.tensor([[2.0, 1.5], [0.0, 0.5]], dtype=torch.float64)


def flow(context_dim: int = 0) -> Flow:
    torch.manual_seed(0)
    return nsf(2, context_dim, count_layers=2, hidden_dims=(8,), count_bins=4).double()


def loader(x: Tensor, *more: Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, *more), **{"batch_size": 50, "shuffle": True} | options)


def fit(flow: Flow, x: Any, **options: Any) -> DensityFit:
    usual: dict[str, Any] = {
        "max_steps": 40,
        "progress": False,
        "check_every": 10,
        "baselines": False,
    }
    usual |= {"patience": None, "starts": (Whitened(),)}
    return fit_density(flow, x, **usual | options)


class Again:
    """Batches that a function makes, as often as one likes."""

    def __init__(self, make: Callable[[], Iterable[Any]]) -> None:
        self.make, self.passes = make, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.make())


@pytest.mark.parametrize(
    "batches",
    [
        lambda x: loader(x),
        lambda x: list(x.split(50)),
        lambda x: [(part,) for part in x.split(50)],
        lambda x: Again(lambda: ([part] for part in x.split(50))),
        lambda x: (x[torch.randint(len(x), (50,))] for _ in itertools.count()),
    ],
    ids=["loader", "tensors", "tuples", "iterable", "endless generator"],
)
def test_batches_are_learned_as_a_table_is(batches: Callable[[Tensor], Iterable[Any]]) -> None:
    x, fresh = table(), table(3000)[300:]
    result = fit(flow(), batches(x))
    entropy = math.log(2 * math.pi * math.e)  # of the table, whose factor has determinant 1
    with torch.no_grad():
        loss = -result.flow().log_prob(fresh).mean().item()
    assert entropy - 0.05 < loss < entropy + 0.15
    assert result.flow.units is not None
    assert (result.flow.units.loc - x.mean(0)).abs().max() < 0.5


def test_pairs_bring_their_contexts() -> None:
    c = draws(400, 1)
    x = torch.cat([3 * c, -c], 1) + 0.3 * draws(400, 2, seed=1)
    result = fit(flow(1), loader(x, c, batch_size=100), max_steps=150, validation=(x[:9], c[:9]))
    for value in (-2.0, 2.0):
        drawn = result.flow(torch.tensor([value]).double()).sample((200,))
        assert drawn.mean(0)[0].item() == pytest.approx(3 * value, abs=2)
    few = {"max_steps": 5}
    by_batches = fit(flow(1), loader(x, c), validation=[(x[:5], c[:5]), (x[5:9], c[5:9])], **few)
    by_rows = fit(flow(1), loader(x, c), validation=(x[:9], c[:9]), **few)
    assert by_batches.validation == by_rows.validation


def test_batches_of_images_with_labels_are_learned() -> None:
    """An embedding takes the labels; a bad pixel is named by batch, row and place."""

    images, labels = 2 + draws(60, 1, 2, 2), torch.arange(60) % 3
    transform = Elementwise(Affine(), event_shape=(1, 2, 2), context_dim=2)
    model = Flow(transform, embed=nn.Embedding(3, 2)).double()
    batches = loader(images, labels, batch_size=16)
    result = fit(model, batches, starts=None)
    assert result.flow.units is not None
    assert math.isfinite(result.validation)
    assert result.flow(labels[:5]).sample().shape == (5, 1, 2, 2)
    images[17, 0, 1, 0] = math.nan
    with pytest.raises(ValueError, match=r"row 1 of batch 1 of x is nan at \(0, 1, 0\)"):
        fit(model, loader(images, labels, batch_size=16, shuffle=False))


def test_held_out_rows_are_left_out_of_later_batches_whatever_their_order() -> None:
    x = table(200)
    x[:10] = x[10]  # rows that are there more than once cannot be told apart
    rows = source.BatchSource(flow(), loader(x, batch_size=30), 0.2, 0, DensityRecipe())
    assert len(rows.held_out) == 40 and len(rows.table) == 160
    held_out = {tuple(row) for row in rows.held_out.y.tolist()} - {tuple(x[10].tolist())}
    passed = rows.batches((None, None), 0)
    for _ in range(2):
        seen = [tuple(row) for y, _ in passed for row in y.tolist()]
        assert not held_out & set(seen)
        assert set(seen) | held_out == {tuple(row) for row in x.tolist()}
        assert len(seen) + len(held_out) == 200


def test_no_more_than_the_first_rows_are_kept() -> None:
    most, given = 0, []

    def stream() -> Iterator[Tensor]:
        for i in range(40):
            given.append(i)
            yield draws(50, 2, seed=i)

    rows = source.BatchSource(flow(), Again(stream), 0.1, 0, DensityRecipe(max_start_rows=200))
    assert given == [0, 1, 2, 3]
    assert len(rows.table) + len(rows.held_out) == 200
    for y, _ in rows.batches(rows.units, 0):
        most = max(most, len(y))
    assert most <= 50


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Draws from the global generator, as many loaders do."""

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(7):
            yield 3 + torch.randn(40, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(table(150)),
        lambda: loader(table(150), generator=torch.Generator().manual_seed(3)),
        lambda: DataLoader(Stream(), batch_size=None),
    ],
    ids=["shuffled", "own generator", "stream"],
)
def test_a_resumed_fit_from_batches_is_bitwise_the_uninterrupted_one(
    make: Callable[[], Iterable[Any]], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"checkpoint_every": 10, "starts": None, "baselines": False}
    validation = draws(30, 2) + 3
    torch.manual_seed(1)
    whole = fit(flow(), make(), validation=validation, **options)
    path, late = tmp_path / "fit", 0
    torch.manual_seed(2)
    batches = make()
    begin = source.begin_pass

    def interrupted(x: Any, number: int) -> Iterator[Any]:
        nonlocal late
        for batch in begin(x, number):
            late += path.exists()
            if late > 5:
                raise KeyboardInterrupt
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "begin_pass", interrupted)
        broken = fit(flow(), batches, validation=validation, checkpoint=path, **options)
    assert broken.history.stopped == "interrupted"
    before = torch.random.get_rng_state()
    resumed = fit(flow(), make(), validation=validation, checkpoint=path, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert resumed.history.losses == whole.history.losses
    for name, value in whole.flow.state_dict().items():
        assert torch.equal(value, resumed.flow.state_dict()[name]), name


def test_a_checkpoint_of_other_batches_is_refused(tmp_path: Path) -> None:
    fit(flow(), loader(table()), checkpoint=tmp_path / "fit")
    with pytest.raises(ValueError, match="other data"):
        fit(flow(), loader(table() + 1), checkpoint=tmp_path / "fit")


def with_entry(value: float, shape: tuple[int, ...] = (20, 2)) -> Tensor:
    x = draws(*shape)
    x[3, 1] = value
    return x


GOOD = draws(20, 2)


@pytest.mark.parametrize(
    ("later", "error", "message"),
    [
        (with_entry(math.nan), ValueError, r"row 3 of batch 2 of x is nan in column 1"),
        (with_entry(math.inf), ValueError, r"row 3 of batch 2 of x is inf in column 1"),
        (with_entry(1e12), ValueError, r"row 3 of batch 2 of x is 1e\+12 in column 1, .* spread"),
        (draws(20, 3), ValueError, r"batch 2 of x .*last dimension 3, but input_dim is 2"),
        (draws(20), ValueError, "batch 2 of x"),
        (draws(20, 2).long(), TypeError, "batch 2 of x must be a floating tensor"),
        ((GOOD, draws(20, 1)), ValueError, "takes none"),
        ((GOOD, GOOD, GOOD), TypeError, "batch 2 of x must be a tensor, or a tuple"),
        ("rows", TypeError, "batch 2 of x must be a tensor, or a tuple .*'rows'"),
        (None, TypeError, "batch 2 of x must be a tensor"),
    ],
)
@pytest.mark.parametrize("is_met_late", [False, True])
def test_a_bad_batch_is_named(later: Any, error: type, message: str, is_met_late: bool) -> None:
    recipe = DensityRecipe(max_start_rows=30 if is_met_late else 20_000)
    model = flow()
    with pytest.raises(error, match=message):
        fit(model, [GOOD, GOOD + 1, later, GOOD], recipe=recipe)
    assert all(p.isfinite().all() for p in model.parameters())


def test_bad_contexts_are_named() -> None:
    for bad, message in (
        (with_entry(math.nan, (20, 2)), "row 3 of the contexts of batch 1 of x is nan in column 1"),
        (with_entry(1e12, (20, 2)), "row 3 of the contexts of batch 1 of x is 1e"),
        (draws(19, 2), "20 rows"),
        (draws(20, 3), "context_dim"),
    ):
        batches = [(GOOD, draws(20, 2, seed=1)), (GOOD, bad)]
        with pytest.raises(ValueError, match=message):
            fit(flow(2), batches, recipe=DensityRecipe(max_start_rows=10))
    with pytest.raises(ValueError, match="missing"):
        fit(flow(2), [GOOD])


def test_rows_beyond_the_ends_of_a_flow_are_named() -> None:
    def onto_interval() -> Flow:
        inner = nice(2, count_layers=2, hidden_dims=(4,))
        return Flow(Chain([inner.transform, Sigmoid()])).double()

    inside = torch.sigmoid(GOOD)
    fit(onto_interval(), [inside, inside.flip(0)], max_steps=3)
    with pytest.raises(ValueError, match=r"row 3 of batch 1 of x is 2 in column 1"):
        fit(
            onto_interval(),
            [inside, torch.where(GOOD[3, 1] == GOOD, 2.0, inside)],
            recipe=DensityRecipe(max_start_rows=10),
        )


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([], ValueError, "x gave 0 batch"),
        (iter([]), ValueError, "x gave 0 batch"),
        ([GOOD[:0]], ValueError, r"1 batch\(es\) with 0 row"),
        ([GOOD[:1]], ValueError, r"1 row"),
        ((part for part in GOOD.split(5)), ValueError, r"ended after 4 batch.*started again"),
        ([[1.0, 2.0]], TypeError, r"batch 0 of x .*torch\.as_tensor"),
        ({"x": GOOD}, TypeError, "x must be a torch.Tensor"),
        ("rows", TypeError, "x must be a torch.Tensor"),
        ([torch.ones(20, 2).double()], ValueError, "columns 0, 1 of x are constant"),
    ],
)
def test_bad_iterables(x: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(flow(), x)


def test_an_iterator_that_ends_in_training_is_named() -> None:
    batches = (part for part in table(200).split(20))
    with pytest.raises(ValueError, match=r"ended after 10 batch.*cannot be started again"):
        fit(flow(), batches, recipe=DensityRecipe(max_start_rows=60))


def test_what_belongs_to_a_table_is_refused_beside_batches() -> None:
    with pytest.raises(ValueError, match="pairs of rows and contexts"):
        fit(flow(1), [GOOD], context=draws(20, 1))
    with pytest.raises(ValueError, match="batch_size is 7"):
        fit(flow(), [GOOD], batch_size=7)
    only_once = iter([[GOOD], []])
    with pytest.raises(ValueError, match="none with rows to train on"):
        fit(flow(), Again(lambda: next(only_once, [])), starts=(AsGiven(),))


# The parts of the machine.


def test_passes_tell_a_sampler_which_one_it_is() -> None:
    class Sampled(list):  # type: ignore[type-arg]
        def __init__(self, *values: int) -> None:
            super().__init__(values)
            self.sampler, self.told = self, []

        def set_epoch(self, number: int) -> None:
            self.told.append(number)

    batches = Sampled(1, 2)
    assert list(itertools.islice(passes(batches), 5)) == [1, 2, 1, 2, 1]
    assert batches.told == [0, 1, 2]
    with pytest.raises(ValueError, match="in pass 2, after 2 in all"):
        list(passes(iter([1, 2])))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_the_parts_of_a_batch_weigh_as_the_whole(size: int, count: int) -> None:
    x, c = draws(count, 3), draws(count, 1, seed=1)
    total, rows = torch.zeros(3, dtype=torch.float64), 0
    for rank in range(size):
        (y, nothing, more), weight = part_of((x, None, {"c": [c]}), rank, size)
        assert nothing is None and len(more["c"][0]) == len(y) > 0
        total += weight * y.mean(0) / size
        rows += len(y) if weight else 0
    torch.testing.assert_close(total, x.mean(0), rtol=1e-12, atol=0)
    assert rows == count
    assert part_of(None, 1, 2) == (None, 1.0)
    assert part_of((x, x[:0]), 1, 2)[1] == 1.0


def test_a_recipe_is_replaced_and_printed() -> None:
    recipe = DensityRecipe(average=0.9, max_steps=7)
    result = fit(flow(), table(), recipe=recipe, max_steps=None)
    assert result.history.steps == 7
    assert "recipe: max_steps=7, average=0.9" in str(result)
    assert "recipe: the default" in str(fit(flow(), table(), max_steps=1))
    with pytest.raises(ValueError, match="DensityRecipe: race_share must"):
        DensityRecipe(race_share=1.5)


def bootstrap(x: Tensor) -> Iterator[Tensor]:
    """Endless batches of rows drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield x[torch.randint(len(x), (40,), generator=generator)]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: itertools.cycle(x.split(40)),
        bootstrap,
        lambda x: Again(lambda: itertools.islice(bootstrap(x), 50)),
    ],
    ids=["cycle", "endless bootstrap", "bootstrap"],
)
def test_held_out_rows_that_come_again_are_left_out(make: Callable[[Tensor], Any]) -> None:
    recipe = DensityRecipe(max_start_rows=2000)
    rows = source.BatchSource(flow(), make(table(200)), 0.2, 0, recipe)
    held_out = {tuple(row) for row in rows.held_out.y.tolist()}
    assert len(held_out) == len(rows.held_out) == 40
    seen = [
        row for y, _ in itertools.islice(rows.batches((None, None), 0), 60) for row in y.tolist()
    ]
    assert len(seen) > 1000
    assert not held_out & set(map(tuple, seen))


def test_20_repeated_values_of_batches_are_named() -> None:
    x = torch.randint(0, 3, (800, 2), generator=torch.Generator().manual_seed(0)).float()
    for batches in (list(x.split(400)), loader(x)):
        with pytest.warns(UserWarning, match="repeat values"):
            fit(flow(), batches, max_steps=3)
