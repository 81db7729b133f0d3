"""The table of docs/integrations.md: `python -m tests.integration.table`.

It follows from the records of `make integration`, one file an environment.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
RECORDS = Path(__file__).parent / "records"
MARKS = ("<!-- table -->", "<!-- end of table -->")
HEAD = "| library | what was run | tests passed |\n|---|---|---|"
ENVIRONMENT = ("jax", "flax", "optax")


def rows(record: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of one environment, one a file of tests."""
    files: dict[str, list[dict[str, Any]]] = {}
    for test in record["tests"].values():
        files.setdefault(test["file"], []).append(test)
    versions = record["versions"]
    environment = ", ".join(f"{name} {versions[name]}" for name in ENVIRONMENT)
    for file, tests in files.items():
        libraries = ", ".join(f"{name} {of}" for name, of in tests[0]["libraries"].items())
        what = "<br>".join(dict.fromkeys(test["what"] for test in tests))
        passed = sum(test["outcome"] == "passed" for test in tests)
        why = sorted({test["why"] or test["outcome"] for test in tests} - {"passed"})
        yield (
            f"| [{libraries}](../tests/integration/{file})<br>Python {record['python']},"
            f" {environment} | {what} | {passed} of {len(tests)}{_listed(why)} |"
        )


def _listed(why: list[str]) -> str:
    return f": {'; '.join(why)}" if why else ""


def table() -> str:
    """Makes the table of all records."""
    records = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return "\n".join([HEAD, *(row for record in records for row in rows(record))])


def with_table(page: str) -> str:
    """Puts the table between the marks of a page."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
