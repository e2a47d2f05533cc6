"""Parameters of notebooks: refused in a line, by the command and by plain papermill, before anything is trained."""

import re

import nbformat
import papermill
import pytest
import sentences
from project import ROOT

from incubate_lib.config import SettingsError
from incubate_lib.pipeline import notebook


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("02_incubate_module", {"module": 1}, f"no parameter 'module'; {sentences.did_you_mean('module_index')}"),
        ("02_incubate_module", {"module_index": "1"}, sentences.must_be("module_index", "1", "int")),
        ("02_incubate_module", {"module_index": True}, sentences.must_be("module_index", True, "int")),
        ("02_incubate_module", {"preset": "smoke", "module_index": 3}, sentences.must_be("module_index", 3, "one of [0, 1, 2]")),
        ("01_meta_model", {"overrides": [1]}, sentences.must_be("overrides", [1], "list[str]")),
        ("01_meta_model", {"preset": "smoke", "strategy": "end_to_end"}, "strategy 'end_to_end' has no phase 'meta'"),
        ("04_finetune", {"preset": "smoke", "seed": -1}, sentences.NEGATIVE_SEED),
        ("06_analysis", {"seeds": ["0"]}, sentences.must_be("seeds", ["0"], "list[int]")),
        ("07_nothing", {}, "no notebook"),
        ("01_meta_model", {"phase": "phases/0123/phase.json"}, sentences.not_there("phases/0123/phase.json")),
        ("01_meta_model", {"phase": "phases/0123/phase.json", "preset": "smoke"}, sentences.PHASE_SAYS_ALL),
        ("04_finetune", {"phase": "phases/0123/phase.json", "seed": 1}, sentences.PHASE_SAYS_ALL),
        ("05_end_to_end", {"phase": "phases/0123/phase.json", "strategy": "mat"}, sentences.PHASE_SAYS_ALL),
    ],
)
def test_parameters_are_checked_before_a_kernel_starts(name, parameters, message, data_folder):
    with pytest.raises(SettingsError, match=re.escape(message)):
        notebook.check_parameters(name, parameters)
    assert not data_folder.exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"modul_index": 1}, f"this notebook has no parameter 'modul_index'; {sentences.did_you_mean('module_index')}"),
        ({"seed": "one"}, sentences.must_be("this notebook: parameter seed", "one", "int")),
        ({"strategy": "deep"}, "unknown strategy 'deep'"),
    ],
)
def test_plain_papermill_refuses_wrong_parameters_in_a_line(parameters, message, tmp_path, data_folder):
    """Nothing is trained, and there is no traceback to read."""
    source = notebook.notebook_path("02_incubate_module")
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(str(source), str(tmp_path / "out.ipynb"), {"preset": "smoke"} | parameters, progress_bar=False)
    assert caught.value.evalue.startswith(message) and len(caught.value.traceback) == 1
    assert not data_folder.exists()


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))])
def test_every_notebook_checks_what_is_put_into_it(name):
    cells = [cell for cell in nbformat.read(notebook.notebook_path(name), 4).cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    assert cells[at + 2].source.startswith("check_injected(In)\n"), "the first after the imports"
