"""A model by its shape against the card of a file of that shape, and rivals by one simulator."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from edgellm.bench.homes import random_home
from edgellm.bench.policies import POLICIES
from edgellm.bench.rivals import contest
from edgellm.bench.simulator import play, shortage
from edgellm.errors import UsageError
from edgellm.modelfile import read_card
from edgellm.modelref import demo_model
from edgellm.planner.sketch import ModelSketch
from edgellm.types import EngineSettings, LayerSpan, Mode

SETTINGS = (
    EngineSettings(),
    EngineSettings(context=1000, sequences=4, kv_type="q8_0"),
    EngineSettings(context=512, mode=Mode.REFERENCE, sequences=2, chunk=512),
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_sketch_weighs_what_the_file_of_its_shape_does(settings: EngineSettings) -> None:
    card = read_card(demo_model())
    sketch = ModelSketch(
        n_layers=card.n_layers,
        n_embd=card.n_embd,
        n_ff=card.n_ff,
        heads=card.n_head,
        kv_heads=card.layers[0].k_elements // card.layers[0].k_row,
        n_vocab=card.n_vocab,
        bits_per_weight=8.5,
        tied_head=card.tied_head,
    )
    assert sketch.boundaries == card.boundaries
    assert sketch.file_bytes == pytest.approx(card.file_bytes, rel=0.03)
    for span in (LayerSpan(0, 8), LayerSpan(0, 3), LayerSpan(2, 5), LayerSpan(5, 8)):
        ours, its = sketch.stage_memory(span, settings), card.stage_memory(span, settings)
        assert ours.total == pytest.approx(its.total, rel=0.01)
        for cached in (0, 300, 5000):
            work, real = (one.stage_work(span, settings, cached) for one in (sketch, card))
            for name in ("decode_bytes", "prefill_flops", "head_bytes", "scan_bytes", "scan_flops"):
                assert getattr(work, name) == pytest.approx(getattr(real, name), rel=0.01), name


def test_experts_cost_memory_all_and_time_those_in_use() -> None:
    dense = ModelSketch(4, 256, 512, 4, 4, 1000)
    sparse = ModelSketch(4, 256, 512, 4, 4, 1000, experts=8, experts_used=2)
    span, settings = LayerSpan(0, 2), EngineSettings()
    grown = sparse.stage_memory(span, settings).total - dense.stage_memory(span, settings).total
    matrices = 2 * 3 * 256 * 512 * 4.85 / 8
    assert grown > 6.9 * matrices
    read = [one.stage_work(span, settings, 0).decode_bytes for one in (dense, sparse)]
    assert read[1] - read[0] == pytest.approx(matrices, rel=0.02)


@pytest.mark.parametrize(
    "change", [{"n_layers": 0}, {"n_layers": 2000}, {"bits_per_weight": 0.1}, {"experts_used": 3}]
)
def test_models_that_cannot_be(change: dict[str, int]) -> None:
    shape = {"n_layers": 4, "n_embd": 8, "n_ff": 8, "heads": 2, "kv_heads": 2, "n_vocab": 9}
    with pytest.raises(UsageError):
        ModelSketch(**{**shape, **change})  # type: ignore[arg-type]


# --- rivals -----------------------------------------------------------------------------


def test_every_rule_gives_each_layer_to_somebody() -> None:
    chance = random.Random(4)
    split = dict.fromkeys(POLICIES, 0)
    for _ in range(12):
        home = random_home(chance)
        for name, policy in POLICIES.items():
            stages = policy(home)
            if stages is None:
                continue
            split[name] += 1
            assert [span.first for _, span in stages] == [
                0,
                *(span.end for _, span in stages[:-1]),
            ]
            assert stages[-1][1].end == home.card.n_layers
            assert len({offer.name for offer, _ in stages}) == len(stages)
            if not shortage(home.card, home.settings, stages):
                assert play(home.card, home.settings, stages, home.situation).tpot_s > 0
    assert min(split.values()) > 3


def test_the_rules_do_what_they_say() -> None:
    homes = [random_home(random.Random(seed), 3, 6) for seed in range(40)]
    several = 0
    for home in homes:
        layers = home.card.n_layers
        total = sum(offer.memory_bytes for offer in home.offers)
        for offer, span in POLICIES["llama.cpp: by free memory"](home) or ():
            assert abs(len(span) - layers * offer.memory_bytes / total) < 2
        by_memory = POLICIES["exo: by memory"](home) or []
        held = sum(offer.memory_bytes for offer, _ in by_memory)
        for offer, span in by_memory:
            assert abs(len(span) - layers * offer.memory_bytes / held) < 1
        if len(by_memory) > 1:
            several += 1
            fewer = held - min(offer.memory_bytes for offer, _ in by_memory)
            assert fewer < home.card.file_bytes <= held
    assert several > 5


def check_contest(homes: int, seed: int) -> None:
    made = contest(homes, seed)
    assert made.missed == 0
    assert made.planned >= homes * 0.9
    for rival in made.rivals:
        assert rival.better == 0, rival
        assert rival.fits + rival.short == homes
        assert rival.median >= 1 - 1e-6 or not rival.fits
    medians = {rival.name: rival.median for rival in made.rivals}
    assert medians["llama.cpp: by free memory"] > 1.5
    assert medians["exo: by memory"] > 1.05


def test_no_rule_is_ever_faster() -> None:
    check_contest(30, 11)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_rule_is_ever_faster_in_a_thousand_homes() -> None:
    check_contest(1000, 0)


def test_the_table_of_the_contest() -> None:
    import typer

    from edgellm.cli.rivals import rivals

    command = typer.Typer()
    command.command()(rivals)
    runner = CliRunner()
    shown = runner.invoke(command, ["--homes", "3"])
    assert shown.exit_code == 0
    assert "exo: by memory" in shown.stdout
    told = json.loads(runner.invoke(command, ["--homes", "3", "--json"]).stdout)
    assert told["homes"] == 3
    assert {one["name"] for one in told["rivals"]} == set(POLICIES)
