import math

import pytest

from poise.core.lab.experiment import Claim
from poise.core.lab.statistics import judge


def claim(**changes):
    settings = {"metric": "m", "arm": "ours", "direction": "lower", "kind": "mechanism", "source": "section 1"}
    return Claim(**(settings | changes))


def arms(ours, baseline):
    return {"ours": {"m": ours}, "baseline": {"m": baseline}}


def test_a_difference_beyond_the_margin_on_every_seed_holds():
    verdict = judge(claim(margin=0.5), arms([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]))
    assert verdict["verdict"] == "holds"
    assert verdict["effect"] == pytest.approx(1.0)
    assert verdict["ci"] == pytest.approx([1.0, 1.0])


def test_a_difference_short_of_the_margin_on_every_seed_is_refuted():
    assert judge(claim(margin=1.5), arms([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]))["verdict"] == "refuted"


def test_an_interval_around_the_margin_is_undecided():
    assert judge(claim(), arms([1.0, 5.0, 3.0, 4.0], [4.0, 1.0, 4.0, 3.0]))["verdict"] == "undecided"


def test_the_effect_is_positive_in_the_claimed_direction():
    values = arms([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
    assert judge(claim(direction="higher"), values)["effect"] == pytest.approx(2.0)
    assert judge(claim(direction="lower"), values)["effect"] == pytest.approx(-2.0)


def test_seeds_are_paired():
    """Large spread over seeds hides nothing when every seed shows the same difference."""
    assert judge(claim(), arms([0.9, 99.9, 999.9], [1.0, 100.0, 1000.0]))["verdict"] == "holds"


def test_a_ratio_is_the_geometric_mean_factor_of_improvement():
    verdict = judge(claim(scale="ratio", margin=3.0), arms([1.0, 1.0, 1.0], [4.0, 8.0, 16.0]))
    assert verdict["effect"] == pytest.approx(8.0)
    assert verdict["verdict"] == "holds"


def test_a_ratio_of_numbers_that_are_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive"):
        judge(claim(scale="ratio", margin=1.0), arms([0.0, 1.0, 1.0], [1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("direction", "bound", "verdict"), [("lower", 0.3, "holds"), ("higher", 0.3, "holds"), ("lower", 0.2, "refuted")]
)
def test_a_bound_may_be_met_exactly(direction, bound, verdict):
    found = judge(claim(versus=None, direction=direction, margin=bound), {"ours": {"m": [0.3] * 5}})
    assert found["verdict"] == verdict


def test_a_difference_of_exactly_the_margin_does_not_count_as_beyond_it():
    assert judge(claim(margin=0.0), arms([1.0] * 5, [1.0] * 5))["verdict"] == "undecided"


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_decide_nothing(seeds):
    assert judge(claim(), arms([0.0] * seeds, [1.0] * seeds))["verdict"] == "undecided"


def test_the_interval_is_a_function_of_the_data():
    values = arms([1.0, 2.0, 4.0], [2.0, 2.5, 9.0])
    assert judge(claim(), values) == judge(claim(), values)


def test_the_interval_shrinks_like_the_standard_error():
    few = judge(claim(), arms([0.0, 1.0] * 4, [1.0] * 8))["ci"]
    many = judge(claim(), arms([0.0, 1.0] * 64, [1.0] * 128))["ci"]
    assert (few[1] - few[0]) / (many[1] - many[0]) == pytest.approx(math.sqrt(16), rel=0.25)


def test_a_missing_metric_is_named():
    with pytest.raises(ValueError, match=r"'m'.*'ours'"):
        judge(claim(), {"ours": {}, "baseline": {"m": [1.0]}})
