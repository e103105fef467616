"""Search and trainer together, whatever the slots, the lengths of the runs and the order in which they end."""

import random
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import FakeBackend, Log

from fasttrain import ScanSpec
from fasttrain.backends.base import Report, Setting
from fasttrain.prepare import make_search
from fasttrain.records import ProbeResult, Problem, Race
from fasttrain.trainer import Trainer

SPEC = ScanSpec(widths=(4, 8), steps=200, check_every=10, data="gaussian:2", lr=(0.01, 0.1), max_probes=30, seeds=4)
PROBLEMS = [Problem(i, variant, 10 * variant.width, 2, 400) for i, variant in enumerate(SPEC.variants(10))]
SETTING = Setting(SPEC, 2, torch.device("cpu"), torch.float32)


class Drawn(FakeBackend):
    """Runs that fit or not by their n and seed alone, and stop for a turn whenever it pleases the dice."""

    dice = random.Random(0)

    def run(self, state, until_step):
        made, ended = 0, []
        until = min(until_step, state.clock + 10 * self.dice.randrange(1, 8))
        while state.clock < until and not ended:
            for position, run in enumerate(state.runs):
                run.step += 10
                chance = random.Random(f"{run.probe.variant} {run.probe.n} {run.probe.seed}").random()
                threshold = (0.3 + 2 * run.problem.variant.lr) * run.problem.params * (0.7 + 0.6 * chance)
                fits = run.probe.n < threshold and run.step >= 10 + 150 * run.probe.n / threshold
                result = run.observe(0.9 ** (run.step / 10), int(not fits))
                if result is not None:
                    ended.append((position, result))
            state.clock += 10
            made += 10 * len(state.runs)
        return Report(ended, made)


def scanned(slots: int, workers: int, threads: bool, seed: int) -> tuple[list[ProbeResult], list, int]:
    """All results in the order in which they came, the estimates, and the most runs that ever trained at once."""
    Drawn.dice = random.Random(seed)
    Drawn.in_threads = threads
    log = Log()
    search = make_search(SPEC, PROBLEMS)
    trainer = Trainer(SETTING, PROBLEMS, lambda _, variant: Drawn(variant, log), slots, workers=workers)
    results, most = [], 0
    while not search.done:
        trainer.submit(search.ask())
        new = trainer.advance()
        most = max(most, trainer.running)
        results += new
        Drawn.dice.shuffle(new)
        search.tell(new)
    assert trainer.idle
    trainer.close()
    return results, search.estimates(), most


def told(results: list[ProbeResult]) -> dict:
    return {result.probe: (result.outcome, result.steps, result.fit_step, result.train_loss) for result in results}


WANTED, ESTIMATES, _ = scanned(slots=1, workers=1, threads=False, seed=0)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.integers(1, 3), st.booleans(), st.integers(0, 2**32))
def test_every_probe_runs_once_and_all_is_the_same(slots, workers, threads, seed):
    results, estimates, most = scanned(slots, workers, threads, seed)
    assert set(Counter(result.probe for result in results).values()) == {1}
    assert told(results) == told(WANTED)
    assert estimates == ESTIMATES
    assert most <= slots


def test_the_scans_are_no_trivial_ones():
    assert len({result.outcome for result in WANTED}) >= 2
    assert any(result.probe.short for result in WANTED)
    assert any(estimate.race is Race.WON for estimate in ESTIMATES)
    assert len(WANTED) > 100
