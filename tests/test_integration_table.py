"""The table of other libraries follows from what their tests recorded."""

import ast
import json

from tests.integration import table


def test_the_page_has_the_table_of_the_records():
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.with_table(page) == page, "run `python -m tests.integration.table`"


def test_every_integration_test_has_a_record():
    recorded: dict[str, set[str]] = {}
    for path in table.RECORDS.glob("*.json"):
        for test in json.loads(path.read_text())["tests"].values():
            recorded.setdefault(test["file"], set()).add(test["test"])
    written = {
        file.name: {
            node.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
        for file in table.RECORDS.parent.glob("test_*.py")
    }
    assert recorded == written, "run `make integration`"


def test_every_record_passed_or_says_why_not():
    records = [json.loads(path.read_text())["tests"] for path in table.RECORDS.glob("*.json")]
    tests = [(name, test) for record in records for name, test in record.items()]
    assert tests
    assert [name for name, test in tests if test["outcome"] != "passed" and not test["why"]] == []


def test_what_failed_is_said():
    tests = {
        "test_x[1]": {"test": "test_x", "file": "test_f.py", "what": "An x.", "libraries": {}},
        "test_x[2]": {"test": "test_x", "file": "test_f.py", "what": "An x.", "libraries": {}},
    }
    tests["test_x[1]"] |= {"outcome": "passed", "why": ""}
    tests["test_x[2]"] |= {"outcome": "failed", "why": ""}
    record = {"python": "3", "versions": dict.fromkeys(table.ENVIRONMENT, "1"), "tests": tests}
    [row] = table.rows(record)
    assert "1 of 2: failed" in row
    tests["test_x[2]"] |= {"outcome": "skipped", "why": "needs y"}
    [row] = table.rows(record)
    assert "1 of 2: needs y" in row
