"""Executes the notebooks; `python -m tests.notebooks.runner` writes them anew, with outputs.

A notebook is two files of the same cells: `NAME.py`, which people edit, and `NAME.ipynb`, which
shows the outputs. Everything in the second one follows from the first one and from a run of it.
"""

import json
import pathlib
import re
import sys
import tempfile
import time

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent.parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
TIMEOUT = 900  # of a cell, in seconds
REPORT = "import json; print(json.dumps(numbers))"


def read(source):
    """Reads the cells of a `.py` file, with ids that depend on their places alone."""
    notebook = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index:02d}"
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def execute(notebook, folder):
    """Runs the cells in a kernel of this interpreter, in a folder; fills in the outputs."""
    options = {"timeout": TIMEOUT, "kernel_name": "python3", "record_timing": False}
    NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options).execute()
    notebook.metadata.pop("language_info", None)
    for cell in notebook.cells:
        _tidy(cell)
    return notebook


def numbers_of(notebook, folder, times):
    """Runs a notebook, each code cell some times in a row; returns its conclusion's `numbers`."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells = [nbformat.from_dict(cell) for cell in code for _ in range(times)]
    cells.append(nbformat.v4.new_code_cell(REPORT))
    for index, cell in enumerate(cells):
        cell["id"] = f"run-{index:02d}"
    repeated = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    return json.loads(execute(repeated, folder).cells[-1].outputs[-1].text)


def sources_of(notebook):
    """Lists kind and text of every cell."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def main(names):
    """Executes all notebooks, or the named ones, and writes their `.ipynb`."""
    for source in SOURCES:
        if names and source.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            notebook = execute(read(source), folder)
            print(f"{source.stem}: {time.perf_counter() - began:.0f} s", flush=True)
        nbformat.write(notebook, source.with_suffix(".ipynb"))


def _tidy(cell):
    """Joins what was printed piece by piece, and keeps of a progress bar what it showed last."""
    if cell.cell_type != "code":
        return
    joined = []
    for output in cell.outputs:
        is_text = output.output_type == "stream"
        if is_text and joined and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r", "", output.text)
    cell.outputs = [out for out in joined if out.output_type != "stream" or out.text.strip()]


if __name__ == "__main__":
    main(sys.argv[1:])
