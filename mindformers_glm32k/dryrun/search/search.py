"""The search for the fastest layout that fits: guess, compile the most promising, learn from them, guess again."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindformers_glm32k.dryrun.report.estimate import estimate, fitted
from mindformers_glm32k.dryrun.search.figures import best_order, figures_of, fullest, memory_terms, program_of
from mindformers_glm32k.dryrun.search.measure import Programs
from mindformers_glm32k.dryrun.search.model import Dims, Model
from mindformers_glm32k.dryrun.search.results import Candidate
from mindformers_glm32k.dryrun.search.space import HARDER, Setting, applied, settings
from mindformers_glm32k.errors import CommandFailed, InputError

SHOWN = 10  # candidates
COMPILED = 2  # of them, compiled at full depth
_COMPILED_AT_MOST = 4  # where compiled ones turn out worse than the next candidates
_PROMISING = 4  # settings whose own shallow programs are compiled before the search ends
MINUTES = 20.0  # after which no compile starts
_FAMILIES = 10  # pairs of shallow programs at most
_FAMILIES_IN_VAIN = 4  # at most while nothing fits
_EXPECTED = 40.0  # seconds of a pair of shallow programs, before the first is measured
_NEAR = 1.15  # a guess of memory that is this much too high may still be right
_FAILURES = 2  # failed families of the same axes, after which these axes are given up
_SURE = 0.2  # exponent on _NEAR for guesses from programs of the same axes, which err less
_PER_LAYOUT = 3  # candidates of the same axes
_RESIZED = 2  # pairs of shallow programs with chunks of other sizes, at most
_WORTH = 1.001  # speedup that other chunk sizes must bring


class Search:
    """One search.

    Args:
        written: the YAML's content with the search's overrides.
        merged: the same with MindFormers' defaults.
        devices: NPUs.
        limit: bytes that a card may take.
        rows: most sequences of a step.
        folder: for files of the compiles.
        minutes: after which no compile starts.
    """

    def __init__(
        self,
        written: dict[str, Any],
        merged: dict[str, Any],
        devices: int,
        limit: float,
        rows: int,
        folder: Path,
        minutes: float = MINUTES,
    ):
        self.written, self.devices, self.limit, self.seconds = written, devices, limit, 60 * minutes
        self.dims = Dims.of(merged)
        self.model = Model(self.dims)
        self.programs = Programs(folder, written)
        self.progress = Progress()
        self.failed: set[Setting] = set()  # families whose programs do not compile
        self.settings = list(settings(merged, devices, rows))
        self.variants = _variants(self.settings)
        if not self.settings:
            raise InputError(
                f"--devices {devices}: no layout of so many NPUs passes the trainer's checks with at most {rows} "
                "sequences a step; give another number of NPUs or raise --rows"
            )

    def run(self, quick: bool = False) -> list[Candidate]:
        """Candidates, best first; those that do not fit come last."""
        for family in self._unknown():
            self._compile_shallow(family)
        return self.shown() if quick else self._confirmed()

    def _config(self, setting, order=None):
        return applied(self.written, setting.keys(order))

    def _unknown(self):
        """Yields the next family to compile until the best settings are known or a limit is reached."""
        while self.progress.seconds < self.seconds:
            best = self._all(near=_NEAR)[:_PROMISING]
            unknown = [item.setting for item in best if not item.known]
            fits = any(item.bytes <= self.limit for item in best)
            tried = len(self.model.known) + len(self.failed)
            if not unknown or tried >= (_FAMILIES if fits else 1 if self._hopeless(best) else _FAMILIES_IN_VAIN):
                return
            missing = [family for setting in unknown for family in self.model.missing(setting)]
            self.progress.total = len(set(missing))
            yield missing[0]

    def _hopeless(self, found):
        """Whether weights, moments and their update alone exceed the limit for every candidate in `found`."""
        return all(max(stage["update", item.order] for stage in item.stages) > self.limit for item in found)

    def _compile_shallow(self, family):
        self.progress.say(f"2 and 4 layers a stage of {family.name}")
        even = replace(family, layers=(self.dims.layers // family.pipeline_stage,) * family.pipeline_stage)
        try:
            shallow, deeper = self.programs.shallow(self._config(even))
        except (InputError, CommandFailed) as error:
            self.failed.add(family)
            self.progress.say(f"{family.name} does not compile: {str(error).splitlines()[0]}")
            return
        self.model.learn(family, *([figures_of(program) for program in programs] for programs in (shallow, deeper)))
        self.progress.done()

    def _all(self, near: float = 1.0) -> list[Candidate]:
        """All candidates by the model, the fastest that fit first; `near` stretches the limit for guesses."""

        def fits(item):
            factor = 1 if item.known else near ** (_SURE if self.model.is_near(item.setting) else 1)
            return item.bytes <= self.limit * factor

        found = []
        for variants in self.variants:
            tried = []
            for setting in variants:  # each takes less memory and slightly more time than the one before
                if self._may_compile(setting):
                    tried.append(self.candidate(setting))
                    if fits(tried[-1]):
                        break
            if not tried:
                continue
            least = min(tried, key=lambda item: item.bytes)
            found.append(least)
            mixed = None if least.bytes <= self.limit else self._mixed(least.setting)
            if mixed is not None:
                found.append(mixed)
            found += self._resized(least, found[-1])
        return _ranked(found, fits)

    def _resized(self, plain, best):
        """Variants of a known candidate with other chunk sizes that make it fit or faster than `best`; smaller loss
        chunks only where logits limit it."""
        if not plain.known or plain.setting.usual != plain.setting:
            return []
        by_loss, found = self.model.limited_by_loss(plain.setting), []
        spent = sum(family.usual != family for family in (*self.model.known, *self.failed)) >= _RESIZED
        for setting in plain.setting.resized(self.dims.length, self.dims.loss_chunk):
            smaller = (setting.loss_chunk or self.dims.loss_chunk) < self.dims.loss_chunk
            if smaller and not by_loss or not self._may_compile(setting):
                continue
            item = self.candidate(setting)
            if item.bytes > self.limit:
                item = self._mixed(setting) or item
            better = best.bytes > self.limit or item.speed > best.speed * _WORTH
            if better and item.bytes <= self.limit and (item.known or not spent):
                found.append(item)
        return found

    def _may_compile(self, setting):
        """False after the family failed to compile, or after _FAILURES families of the same axes did."""
        alike = sum(family.axes == setting.axes for family in self.failed)
        return setting.family not in self.failed and alike < _FAILURES

    def _mixed(self, setting):
        """The setting with as few layers of stronger recomputation as make it fit; None where that is impossible."""
        if setting.recompute not in HARDER or setting.interleave > 1:
            return None
        whole = replace(setting, recompute=HARDER[setting.recompute])
        if not self._may_compile(whole) or self.candidate(whole).bytes > self.limit:
            return None
        recomputed = []
        for order in ("bfs", "dfs"):
            counts = []
            for stage, (much, little) in enumerate(zip(self.model.stages(setting), self.model.stages(whole))):
                size, saved = much["passes", order], much["passes", order] - little["passes", order]
                share = (size - self.limit) / saved if saved > 0 else 0
                counts.append(min(max(math.ceil(share * setting.layers[stage]), 0), setting.layers[stage]))
            recomputed.append(tuple(counts))
        best = replace(setting, recomputed=min(recomputed, key=sum))
        if best.recomputed == best.layers or not any(best.recomputed):
            return None
        return self.candidate(best)

    def candidate(self, setting: Setting, stages: list[dict] | None = None) -> Candidate:
        """The candidate of a setting, by the model or from `stages`, the figures of programs at full depth."""
        figures = stages or self.model.stages(setting)
        report = self._report(setting, figures)
        before, found = estimate(report), fitted(report)
        order = best_order(figures)
        return Candidate(
            setting,
            found["tokens_per_second_per_device"],
            tuple(found["interval"]),
            before["tokens_per_second_per_device"],
            found["step_seconds"],
            before["parts"],
            fullest(figures, order),
            order,
            memory_terms(max(figures, key=lambda stage: stage["bytes", order]), order),
            known=stages is not None or self.model.is_known(setting),
            compiled=stages is not None,
            stages=figures,
        )

    def _report(self, setting, figures):
        return {
            "config": setting.name,
            "programs": [program_of(part, stage) for stage, part in enumerate(figures)],
            "layout_sizes": {
                "stages": setting.pipeline_stage,
                "micro_batches": setting.sequences if setting.pipeline_stage > 1 else 1,
                "interleave": setting.interleave,
            },
            "tokens_per_step": setting.rows * self.dims.length,
            "world_size": self.devices,
        }

    def _confirmed(self):
        """The best candidates, the first COMPILED of them compiled at full depth."""
        found, tried = self.shown(), 0
        while tried < _COMPILED_AT_MOST and self.progress.seconds < self.seconds:
            open_ones = [item for item in found[:COMPILED] if item.bytes <= self.limit and not item.compiled]
            if not open_ones:
                break
            self.progress.total, tried = len(open_ones), tried + 1
            found.remove(open_ones[0])
            found = self._ranked([*found, *self._compiled(open_ones[0])])
        return found

    def _compiled(self, candidate):
        """The candidate with the figures of its programs at full depth; empty where these do not compile."""
        self.progress.say(f"all layers of {candidate.setting.name}")
        try:
            programs = self.programs.full(self._config(candidate.setting, candidate.order))
        except (InputError, CommandFailed) as error:
            self.progress.say(f"{candidate.setting.name} does not compile: {str(error).splitlines()[0]}")
            return []
        self.progress.done()
        return [self.candidate(candidate.setting, [figures_of(program) for program in programs])]

    def _ranked(self, found):
        return _ranked(found, lambda item: item.bytes <= self.limit)

    def shown(self) -> list[Candidate]:
        """The candidates of a table: not too many of the same axes, and no guesses where something known fits."""
        found, axes, ranked = [], {}, self._all()
        sure = [item for item in ranked if item.known and item.bytes <= self.limit]
        for item in sure or ranked:
            key = item.setting.axes
            if len(found) < SHOWN and axes.get(key, 0) < _PER_LAYOUT:
                axes[key] = axes.get(key, 0) + 1
                found.append(item)
        return found


def _ranked(found, fits):
    """The fastest that fit, then those that do not, by memory."""
    return sorted(found, key=lambda item: (not fits(item), -item.speed if fits(item) else item.bytes))


def _variants(found):
    """Groups of settings that differ only in MLP chunks and optimizer level (cheap in time), the plainest first."""
    groups = {}
    for setting in found:
        groups.setdefault(replace(setting, mlp_chunk=None, level=1), []).append(setting)
    return [sorted(group, key=lambda one: (one.level, one.mlp_chunk is not None)) for group in groups.values()]


class Progress:
    """Lines on standard error: what is compiled, how long it took so far, how long it may still take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.began = clock, clock()
        self.total = _PROMISING
        self.spent: list[float] = []
        self.started = self.began

    @property
    def seconds(self) -> float:
        """Seconds since the search began."""
        return self.clock() - self.began

    def say(self, what: str) -> None:
        """A line about what begins now."""
        self.started = self.clock()
        each = sum(self.spent) / len(self.spent) if self.spent else _EXPECTED
        left = each * max(self.total, 1)
        text = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        print(f"search: {what}, {self.seconds:.0f} s; about {text} left", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Records the time of the step announced last."""
        self.spent.append(self.clock() - self.started)
