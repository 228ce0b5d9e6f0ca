"""The checklist names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_line_of_the_checklist_is_numbered_and_names_tests_that_exist() -> None:
    lines = (HERE / "conformance.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if re.match(r"\| \d", line)]
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1))
    for _, what, tests in rows:
        named = re.findall(r"`(\w+)::(\w+)`", tests)
        assert named, what
        for module, name in named:
            folder = HERE / "clients" if module.startswith("client_") else HERE
            prefix = "" if module.startswith("client_") else "test_"
            source = (folder / f"{prefix}{module}.py").read_text()
            assert re.search(rf"^(async )?(def|class) {name}\b", source, re.MULTILINE), name
