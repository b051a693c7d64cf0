"""Some hostile inputs of every kind; ``python -m tests.fuzz`` runs more of them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.harness import attempt
from tests.fuzz.inputs import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_ends_in_a_traceback(kind):
    @settings(
        max_examples=50,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        case = data.draw(KINDS[kind])
        outcome = attempt(case)
        assert not outcome.problem, f"{case}\n{outcome.problem}"

    run()
