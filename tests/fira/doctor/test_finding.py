"""Lines of the diagnosis, and checks that fail."""

from fira.doctor.finding import Finding, Level, examine


def test_a_problem_is_followed_by_its_remedy_and_a_good_line_is_alone():
    assert str(Finding("cores", "8")).split() == ["cores", "OK", "8"]
    first, second = str(Finding("disk", "1 GB", Level.PROBLEM, "free 5 GB")).splitlines()
    assert first.split() == ["disk", "PROBLEM", "1", "GB"]
    assert second.strip() == "→ free 5 GB"


def test_a_check_that_raises_does_not_end_the_others():
    def broken() -> list[Finding]:
        raise ValueError("no\nnumber")

    found = list(examine([("first", broken), ("second", lambda: [Finding("second", "fine")])]))
    assert [finding.level for finding in found] == [Level.PROBLEM, Level.OK]
    assert found[0].text == "this check failed: ValueError: no number"
    assert "\n" not in found[0].remedy


def test_a_check_that_needs_a_missing_package_names_it():
    def broken() -> list[Finding]:
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    (finding,) = examine([("data cache", broken)])
    assert finding.remedy == "pip install tqdm"
