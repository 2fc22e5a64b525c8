"""Every fault of `lmjax chaos`, injected for real; and that it does harm where its protection is taken out.

    python -m pytest -m faults        all of them, once each, with the mutations (about half an hour)
    lmjax chaos                       the same catalogue, with as many tries as docs/reliability.md reports

The default suite runs the few that are marked so. The table at the end says what each cost.
"""

import pytest

from lmjax.chaos import commands
from lmjax.chaos.catalogue import FAULTS
from lmjax.chaos.lab import Broken, Lab

ROWS = []


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("chaos"))
    yield lab
    if ROWS:
        print("\n" + commands.table(ROWS))


@pytest.mark.parametrize("fault", [
    pytest.param(fault, id=fault.name, marks=() if fault.few else pytest.mark.faults) for fault in FAULTS])
def test_a_fault_is_survived(lab, fault):
    rows = commands.round_of([fault], lab, 1, float("inf"))
    ROWS.extend(rows)
    if not rows[0]["tries"]:
        pytest.skip(rows[0]["skipped"])
    assert not rows[0]["broken"], rows[0]["broken"][0]


@pytest.mark.faults
@pytest.mark.parametrize("fault", [pytest.param(f, id=f"{f.name} without {f.protection}") for f in FAULTS
                                   if f.protection])
def test_without_its_protection_the_fault_does_harm(lab, fault):
    """The known-wrong variant: the same fault, the same check, one protection less."""
    lab.without = fault.protection
    try:
        with pytest.raises(Broken):
            fault.run(lab)
    finally:
        lab.without = ""
        commands.clean(lab)
