"""Posteriors with known truths: Pyro's guides, NUTS and ours in the same CPU seconds, one thread.

    python -m benchmarks.posteriors [names ...] [--methods ...] [--seconds 10] [--seeds 3]
        [--out FILE] [--costs FILE] [--markdown FILE] [--render] [--smoke]

from the project's root. NUTS runs on our flat log joint, which is faster than Pyro's own potential.
Prints a markdown table. `--out` is a JSON file that the rows are added to, in place of older ones
of the same posterior and method; `--markdown` is the page that shows all of it, and the figures of
`python -m benchmarks.posterior_costs --json FILE` if `--costs` names them. With `--render` nothing
is measured.
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import arviz
import pyro
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from benchmarks import models, timing
from pyro_nf.model.joint import LogJoint
from pyro_nf.posterior.weights import smooth
from pyro_nf.sites.latents import init_anywhere
from pyro_nf.vi.fit import fit_svi
from tests.reference_models import exact_targets

COUNT_DRAWS = 10_000
BATCH = 2_000
# Largest errors that pass all four at once.
MOST_KHAT, LEAST_ESS, MOST_GAP, MOST_MEAN, MOST_SD = 0.7, 0.9, 0.1, 0.1, 0.1


@dataclass(frozen=True)
class Problem:
    """A model, its arguments, exact or reference draws, and its log evidence if it is known."""

    name: str
    model: Callable[..., None]
    args: tuple
    draws: dict[str, Tensor]
    log_evidence: float | None


@dataclass(frozen=True)
class Row:
    """The figures of one method on one problem with one seed; nan where there is none."""

    problem: str
    method: str
    seed: int
    mean_error: float
    sd_error: float
    khat: float
    ess: float
    elbo: float
    log_evidence: float
    evidence_error: float
    gap: float
    steps: int
    seconds: float
    note: str = ""

    @property
    def passes(self) -> bool:
        trusted = self.khat < MOST_KHAT or self.ess > LEAST_ESS
        close = self.mean_error < MOST_MEAN and self.sd_error < MOST_SD
        return trusted and self.gap < MOST_GAP and close


def problems(names: list[str]) -> list[Problem]:
    found = []
    try:
        for name in models.NAMES:
            if not names or name in names:
                r = models.reference(name)
                found.append(Problem(name, r.model, r.args, r.draws, None))
    except FileNotFoundError as error:
        print(f"skipped the posteriors with reference draws: {error}")
    for target in exact_targets():
        if not names or target.name in names:
            draws = target.draw(COUNT_DRAWS, torch.Generator().manual_seed(1))
            found.append(Problem(target.name, target.model, (), draws, target.log_evidence))
    return found


def errors(draws: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, float]:
    """Largest error of a mean, in sd of the truth, and largest relative error of an sd."""
    mean_error = sd_error = 0.0
    for site, exact in truth.items():
        mine, exact = draws[site].double(), exact.double()
        sd = exact.std(0)
        mean_error = max(mean_error, float(((mine.mean(0) - exact.mean(0)) / sd).abs().max()))
        sd_error = max(sd_error, float((mine.std(0) / sd - 1).abs().max()))
    return mean_error, sd_error


def figures(
    problem: Problem, method: str, seed: int, z: Tensor, log_w: Tensor, joint: LogJoint, **rest
) -> Row:
    """Everything that draws and their log weights tell."""
    log_w = log_w.double()
    ok = torch.isfinite(log_w)
    n = len(log_w)
    elbo = float(log_w[ok].mean())
    w = torch.where(ok, log_w, -torch.inf).softmax(0)
    ess = float(1 / (w**2).sum() / n)
    weights = smooth(torch.where(ok, log_w, -torch.inf))
    log_evidence, khat = weights.log_evidence, float(arviz.psislw(log_w[ok].numpy())[1])
    known = problem.log_evidence
    gap = (log_evidence if known is None else known) - elbo
    mean_error, sd_error = errors(joint.unpack(z), problem.draws)
    return Row(
        problem.name,
        method,
        seed,
        mean_error,
        sd_error,
        khat,
        ess,
        elbo,
        log_evidence,
        weights.log_evidence_se,
        gap,
        **rest,
    )


def ours(problem: Problem, seed: int, seconds: float) -> Row:
    clock = time.process_time
    begin = clock()
    fit = fit_svi(
        problem.model,
        args=problem.args,
        max_seconds=seconds,
        seed=seed,
        progress=False,
        clock=clock,
    )
    used = clock() - begin
    posterior = fit.posterior(COUNT_DRAWS, seed=seed)
    return figures(
        problem,
        "ours",
        seed,
        posterior.z,
        posterior.log_weights,
        fit.joint,
        steps=fit.history.steps,
        seconds=used,
    )


def pyro_guide(name: str) -> Callable[[Problem, int, float], Row]:
    """One of Pyro's guides with Adam 1e-2 and 16 particles, vectorised where the model can."""

    def run(problem: Problem, seed: int, seconds: float) -> Row:
        clock = time.process_time
        joint = LogJoint(problem.model, problem.args, seed=seed)
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        init = {"init_loc_fn": init_anywhere(init_to_median)}
        if name == "AutoIAFNormal":
            guide = autoguide.AutoIAFNormal(
                problem.model, num_transforms=2, hidden_dim=[64], **init
            )
        else:
            guide = getattr(autoguide, name)(problem.model, **init)
        begin = clock()
        particles, steps = 16, 0
        optimiser = pyro.optim.ClippedAdam({"lr": 1e-2})
        loss = Trace_ELBO(num_particles=particles, vectorize_particles=joint.kind == "batched")
        svi = SVI(problem.model, guide, optimiser, loss)
        while clock() - begin < seconds:
            svi.step(*problem.args)
            steps += 1
        if name == "AutoLaplaceApproximation":
            guide = guide.laplace_approximation(*problem.args)
        used = clock() - begin
        zs, log_qs = [], []
        with torch.no_grad():
            if name == "AutoNormal":
                # Its sites are normals of their own: the law of the flat vector, put together.
                locs, scales = [], []
                for site in joint.sites:
                    locs.append(guide._get_loc_and_scale(site)[0].reshape(-1))
                    scales.append(guide._get_loc_and_scale(site)[1].reshape(-1))
                law = torch.distributions.Independent(
                    torch.distributions.Normal(torch.cat(locs), torch.cat(scales)), 1
                )
            else:
                law = guide.get_posterior(*problem.args)
            for _ in range(COUNT_DRAWS // BATCH):
                z = law.sample((BATCH,))
                zs.append(z)
                log_qs.append(law.log_prob(z))
            z = torch.cat(zs)
            log_w = joint.log_prob(z) - torch.cat(log_qs)
        return figures(problem, name, seed, z, log_w, joint, steps=steps, seconds=used)

    return run


class OutOfTime(Exception):
    """NUTS has used its seconds."""


def nuts(problem: Problem, seed: int, seconds: float) -> Row:
    """NUTS on the flat log joint's model for as many draws as the seconds allow (warm-up 1/3)."""
    clock = time.process_time
    joint = LogJoint(problem.model, problem.args, seed=seed)
    pyro.set_rng_seed(seed)
    begin = clock()
    draws: list[dict[str, Tensor]] = []

    def hook(kernel: NUTS, sample: dict[str, Tensor], stage: str, i: int) -> None:
        if stage.lower().startswith("sample"):
            draws.append({k: v.detach().clone() for k, v in sample.items()})
        if clock() - begin > seconds:
            raise OutOfTime

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -joint.log_prob(values["z"])

    kernel = NUTS(potential_fn=potential)
    first = {"z": joint.init_loc.clone()}
    mcmc = MCMC(
        kernel,
        1000,
        warmup_steps=500,
        initial_params=first,
        hook_fn=hook,
        disable_progbar=True,
    )
    note = ""
    try:
        mcmc.run()
    except OutOfTime:
        note = f"{len(draws)} of 1000 draws after 500 of warm-up"
    used, nan = clock() - begin, math.nan
    mean_error = sd_error = nan
    if len(draws) > 1:
        z = torch.stack([d["z"] for d in draws])
        mean_error, sd_error = errors(joint.unpack(z), problem.draws)
    return Row(
        problem.name,
        "NUTS",
        seed,
        mean_error,
        sd_error,
        nan,
        nan,
        nan,
        nan,
        nan,
        nan,
        len(draws),
        used,
        note,
    )


METHODS: dict[str, Callable[[Problem, int, float], Row]] = {
    "ours": ours,
    "AutoNormal": pyro_guide("AutoNormal"),
    "AutoMultivariateNormal": pyro_guide("AutoMultivariateNormal"),
    "AutoLaplaceApproximation": pyro_guide("AutoLaplaceApproximation"),
    "AutoIAFNormal": pyro_guide("AutoIAFNormal"),
    "NUTS": nuts,
}


def table(rows: list[Row]) -> str:
    """The worst of the seeds, as markdown."""
    lines = [
        "| posterior | method | mean error | sd error | k-hat | ESS | ELBO gap | steps | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.problem, row.method), []).append(row)
    for (problem, method), group in groups.items():

        def worst(field: str, group: list[Row] = group) -> float:
            values = [getattr(row, field) for row in group]
            return math.nan if any(math.isnan(v) for v in values) else max(values)

        ess = min((row.ess for row in group), key=lambda v: -math.inf if math.isnan(v) else v)
        steps = sum(row.steps for row in group) // len(group)
        verdict = "yes" if all(row.passes for row in group) else "no"
        note = next((row.note for row in group if row.note), "")
        cells = [
            problem,
            method,
            cell(worst("mean_error"), ".3f"),
            cell(worst("sd_error"), ".3f"),
            cell(worst("khat"), ".2f"),
            cell(ess, ".1%"),
            cell(worst("gap"), ".3f"),
            str(steps),
            f"{verdict} {note}".strip(),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(value: float, form: str) -> str:
    """A figure in that format, or a dash where there is none."""
    return "-" if math.isnan(value) else format(value, form)


HEAD = """# Posteriors

How close {doc}`fit_svi <guide>` with its defaults comes to posteriors whose reference draws or
exact forms are known, beside Pyro's own guides in the same CPU seconds on one thread. Errors of
means are in reference standard deviations, those of standard deviations relative; the ELBO gap is
to the exact evidence, or else to the importance estimate; ESS is the share of effective draws. Each
cell is the worst of three seeds. *all* says whether every seed had k-hat < 0.7 or ESS > 90 %, a gap
below 0.1 nats, errors of means below 0.1 and of standard deviations below 10 %. The standard
deviation of 10,000 draws of a heavy tail (`student_3`, `funnel`) is itself uncertain. NUTS is
Pyro's with 500 draws of warm-up and 1,000 more, on our flat log joint, which is faster than its
own; its steps are the draws that it had when its seconds were over.
"""


def add_to(path: Path, rows: list[Row]) -> list[Row]:
    """Writes rows into a JSON file, in place of older ones of the same posterior and method."""
    known = [Row(**r) for r in json.loads(path.read_text())] if path.exists() else []
    fresh = {(row.problem, row.method) for row in rows}
    rows = [row for row in known if (row.problem, row.method) not in fresh] + rows
    order, methods = [p.name for p in problems([])], list(METHODS)
    rows.sort(key=lambda r: (order.index(r.problem), methods.index(r.method), r.seed))
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def page(rows: list[Row], conditions: str, costs: dict[str, dict]) -> str:
    """The page of the docs."""
    parts = [HEAD, table(rows), f"\n{conditions}\n"]
    if costs:
        measured = [f for c in costs.values() for f in c["figures"]]
        figures = [timing.Figure(**{k: v for k, v in f.items() if k != "met"}) for f in measured]
        parts += ["## Costs\n", timing.table(figures), ""]
        parts += [f"{c['conditions']}\n" for c in costs.values()]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="posteriors; all by default")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file that the rows are added to")
    parser.add_argument("--costs", type=Path, help="JSON file of benchmarks.posterior_costs")
    parser.add_argument("--markdown", type=Path, help="page to write")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--smoke", action="store_true", help="one small posterior, half a second")
    options = parser.parse_args()
    names, seconds, seeds = options.names, options.seconds, options.seeds
    if options.smoke:
        names, seconds, seeds = names or ["banana"], 0.5, 1
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for problem in [] if options.render else problems(names):
        for seed in range(seeds):
            for name in options.methods:
                try:
                    row = METHODS[name](problem, seed, seconds)
                except Exception as error:  # a guide that cannot take the model is a row too
                    nan, reason = math.nan, f"{type(error).__name__}: {error}".splitlines()[0]
                    row = Row(problem.name, name, seed, *[nan] * 8, 0, 0.0, reason[:80])
                rows.append(row)
                print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    if options.out:
        rows = add_to(options.out, rows)
    print(table(rows))
    if options.markdown:
        conditions = timing.conditions("python -m benchmarks.posteriors")
        costs = json.loads(options.costs.read_text()) if options.costs else {}
        options.markdown.write_text(page(rows, conditions, costs))


if __name__ == "__main__":
    main()
