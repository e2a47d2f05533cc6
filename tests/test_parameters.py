"""Parameters of notebooks: refused in a line, by the command and by plain papermill, before anything is trained."""

import nbformat
import papermill
import pytest
from project import ROOT

from incubate_lib.config import SettingsError
from incubate_lib.pipeline import notebook


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("02_incubate_module", {"module": 1}, "no parameter 'module'; did you mean module_index"),
        ("02_incubate_module", {"module_index": "1"}, "module_index is '1'; it must be int"),
        ("02_incubate_module", {"module_index": True}, "module_index is True; it must be int"),
        ("02_incubate_module", {"preset": "smoke", "module_index": 3}, r"module_index is 3; it must be one of \[0, 1, 2\]"),
        ("01_meta_model", {"overrides": [1]}, r"overrides is \[1\]; it must be list\[str\]"),
        ("01_meta_model", {"preset": "smoke", "strategy": "end_to_end"}, "strategy 'end_to_end' has no phase 'meta'"),
        ("04_finetune", {"preset": "smoke", "seed": -1}, "seed -1 is negative"),
        ("06_analysis", {"seeds": ["0"]}, r"it must be list\[int\]"),
        ("07_nothing", {}, "no notebook"),
        ("01_meta_model", {"phase": "phases/0123/phase.json"}, r"phases/0123/phase\.json is not there"),
        ("01_meta_model", {"phase": "phases/0123/phase.json", "preset": "smoke"}, "which says all; leave preset, overrides"),
        ("04_finetune", {"phase": "phases/0123/phase.json", "seed": 1}, "which says all; leave preset, overrides"),
        ("05_end_to_end", {"phase": "phases/0123/phase.json", "strategy": "mat"}, "which says all; leave preset, overrides"),
    ],
)
def test_parameters_are_checked_before_a_kernel_starts(name, parameters, message, data_folder):
    with pytest.raises(SettingsError, match=message):
        notebook.check_parameters(name, parameters)
    assert not data_folder.exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"modul_index": 1}, "this notebook has no parameter 'modul_index'; did you mean module_index"),
        ({"seed": "one"}, "this notebook: parameter seed is 'one'; it must be int"),
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
