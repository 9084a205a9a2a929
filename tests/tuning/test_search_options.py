"""Options of a search: bad values and combinations are refused where they are read."""

import pytest

from kngd_ray.config import parse
from kngd_ray.errors import UsageError
from kngd_ray.tuning import SearchOptions


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"num_samples": 0}, "num_samples is 0; it must be 1 or more"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"max_failures": -1}, "max_failures is -1"),
        ({"sampler": "nsga2", "batch": 1}, "nsga2 takes it as its population, which needs 2 or more"),
        ({"sampler": "tpee"}, "did you mean tpe?"),
        ({"samplr": "tpe"}, "unknown key 'samplr'; did you mean sampler?"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"cpus_per_trial": 0.0}, "cpus_per_trial is 0.0"),
        ({"objective": []}, "name one or more (log_posterior, evidence, held_out_nll, held_out_accuracy), each once"),
        ({"objective": ["evidence", "evidence"]}, "held_out_accuracy), each once"),
        ({"objective": "accuracy"}, "valid: evidence, held_out_accuracy, held_out_nll"),
        ({"seeds": []}, "name at least one"),
        ({"seeds": [0, 0]}, "seeds must differ"),
        ({"seeds": [-1]}, "0 or more"),
        ({"scheduler": "asha", "objective": ["evidence", "held_out_nll"]}, "compares trials by one objective"),
        ({"scheduler": "asha", "trial": "batched"}, "take trial=local or train"),
    ],
)
def test_bad_options_are_refused(raw: dict, says: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse(SearchOptions, raw)
    assert says in str(refusal.value)


def test_directions_and_folds_follow_from_the_objectives() -> None:
    one = SearchOptions()
    assert (one.directions, one.cross_validated) == (["maximize"], False)
    two = parse(SearchOptions, {"objective": "held_out_nll,held_out_accuracy"})
    assert (two.directions, two.cross_validated) == (["minimize", "maximize"], True)
