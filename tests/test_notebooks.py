"""Every notebook has its outputs and imports that resolve; in the slow tests it runs from top to bottom."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_can_be_read_and_its_imports_resolve(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs), "store the outputs"
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in outputs)
    assert path.stat().st_size < 400_000, "smaller pictures"
    for cell in notebook.cells:
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(code)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
