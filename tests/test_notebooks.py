"""The grammar of the notebooks, checked without running them; nbmake runs every tracked one."""

import ast
import asyncio
import base64
import json
import re
import subprocess

import nbformat
import papermill
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner
from PIL import Image
from project import ROOT

from incubate_lib.config.members import PHASES
from incubate_lib.pipeline.notebook import scrub, without_paths
from incubate_lib.pipeline.shown import LARGEST, SMALL, digest, picture, sources

TRACKED = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "*.ipynb"], capture_output=True, text=True, check=True
).stdout.split()
SHARED = {"preset": "str", "seed": "int", "overrides": "list[str]", "strategy": "str"}  # the same name means the same everywhere


@pytest.fixture(params=TRACKED)
def path(request):
    return ROOT / request.param


@pytest.fixture
def nb(path):
    return nbformat.read(path, as_version=4)


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def test_the_series_is_complete_and_nbmake_sees_all_of_it():
    assert [p.split("/")[-1][:2] for p in TRACKED] == [f"{i:02}" for i in range(13)]
    assert all(p.startswith("notebooks/") for p in TRACKED)
    assert {PHASES[kind].notebook for kind in PHASES} - {""} <= {p.split("/")[-1].removesuffix(".ipynb") for p in TRACKED}


def test_title_and_table_first(nb):
    first = nb.cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "| reads | writes | expected time |" in first.source


def test_thin(nb):
    cells = [[line for line in cell.source.splitlines() if line.strip()] for cell in code_cells(nb)]
    assert len(cells) <= 16
    assert sum(map(len, cells)) <= 110 and max(map(len, cells)) <= 20
    for cell in code_cells(nb):
        tree = ast.parse(cell.source)
        assert not any(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for node in ast.walk(tree))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert all(alias.name != "*" for node in imports for alias in node.names)
        assert not any(line.lstrip().startswith(("!", "%")) for line in cell.source.splitlines())
        assert not re.search(r"/(home|root|Users|mnt)/|~/", cell.source)


def test_prose_goes_before_code(nb):
    words = sum(len(cell.source.split()) for cell in nb.cells if cell.cell_type == "markdown")
    assert words > 120
    assert nb.cells[-1].cell_type == "markdown" or "write_report" in nb.cells[-1].source


def test_committed_with_the_outputs_of_these_sources(nb, path):
    """`incubate notebooks` writes them; after a change of a source it is to be called again."""
    assert nb.metadata.kernelspec.name == "python3"
    assert nb.metadata.shown.sources == sources(nb), f"`incubate notebooks {path.stem}` was not called since"
    assert "widgets" not in nb.metadata and path.stat().st_size <= LARGEST
    shown = [output for cell in code_cells(nb) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown), "a visitor sees results"
    assert all(output.output_type in ("stream", "display_data", "execute_result") for output in shown)
    parts = [text for output in shown for text in [output.get("text"), *output.get("data", {}).values()] if text]
    for text in (part for part in parts if not re.fullmatch(r"[A-Za-z0-9+/=\n]+", part)):  # a picture is in base64
        for private in (r"(^|[\s'\"(=])/\w[\w.-]*/\w", r"\b\d\d:\d\d:\d\d\b", r" at 0x[0-9a-f]{6,}", "widget-view"):
            assert not re.search(private, text, re.M), re.search(f".{{0,60}}{private}.{{0,60}}", text)
    nbformat.validate(nb)


def test_the_front_page_shows_a_picture_of_each_notebook_as_it_is(nb, path):
    """`incubate notebooks` and `incubate figures` write them."""
    place = f"figures/thumbnails/{path.name.removesuffix('.ipynb')}.png"
    with Image.open(ROOT / place) as small:
        assert small.size == SMALL and small.info["of"] == digest(picture(nb)), "call `incubate figures`"
    assert (ROOT / place).stat().st_size < 20_000
    assert f"]({place})](notebooks/{path.name})" in (ROOT / "README.md").read_text()


def test_executed_copies_lose_paths_and_keep_pictures(monkeypatch):
    """In base64, a path as short as that of temporary files stands by chance now and then, and without it the picture is gone."""
    picture = base64.b64encode(bytes(range(255))).decode() + "/short/runs" + "A" * 60
    lines = "\\\n".join([picture, "/short" + picture[:72], picture[:20] + "=="])
    images = [f'<img src="data:image/png;base64,{picture}">', f'frames[0] = "data:image/png;base64,{lines}";',
              "url(data:image/svg+xml,%3Csvg%20href='/short'/%3E)".replace("'", "%27")]  # fmt: skip
    html = f'<a href="/short/x.png">{images[0]}</a><script>{images[1]}</script><p style="background: {images[2]}">in /short/y</p>'
    attached = nbformat.v4.new_markdown_cell("![](attachment:a)", attachments={"a": {"image/png": picture}})
    code = nbformat.v4.new_code_cell('folder = "/short/z"', metadata={"papermill": {"exception": "in /short/q"}})
    data = {"text/html": html, "text/plain": "PosixPath('/short/a')", "image/png": picture, "application/pdf": picture}
    texts = {"application/javascript": "open('/short/k')", "image/svg+xml": "<svg><desc>/short/l</desc></svg>"}
    code.outputs = [
        nbformat.v4.new_output("display_data", data | {"application/json": {"bdata": picture, "in": "/short/j"}} | texts),
        nbformat.v4.new_output("stream", text="reads /short/b\n"),
        nbformat.v4.new_output("error", ename="OSError", evalue="no /short/c", traceback=["\x1b[32m/short/d\x1b[0m", "line"]),
    ]
    parameters = {"papermill": {"input_path": "/short/i", "parameters": {"overrides": ["a=/short/p"]}}}
    nb = nbformat.v4.new_notebook(cells=[attached, code], metadata=parameters | {"widgets": {}})
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/short")
    scrubbed = scrub(nbformat.from_dict(json.loads(json.dumps(nb))))
    nbformat.validate(scrubbed)
    shown, stream, error = scrubbed.cells[1].outputs
    assert shown.data["image/png"] == shown.data["application/pdf"] == shown.data["application/json"]["bdata"] == picture
    assert shown.data["application/json"]["in"] == "tmp/j" and shown.data["application/javascript"] == "open('tmp/k')"
    assert shown.data["image/svg+xml"] == "<svg><desc>tmp/l</desc></svg>"
    assert scrubbed.cells[0].attachments["a"]["image/png"] == picture
    assert shown.data["text/html"] == html.replace("/short/x.png", "tmp/x.png").replace("in /short/y", "in tmp/y")
    assert scrubbed.metadata == {"papermill": {"parameters": {"overrides": ["a=tmp/p"]}}}
    assert scrubbed.cells[1].metadata["papermill"]["exception"] == "in tmp/q"
    assert (stream.text, error.evalue, error.traceback[0]) == ("reads tmp/b\n", "no tmp/c", "\x1b[32mtmp/d\x1b[0m")
    assert scrubbed.cells[1].source == 'folder = "tmp/z"' and shown.data["text/plain"] == "PosixPath('tmp/a')"


def test_a_long_text_that_only_begins_like_a_picture_is_read_once(monkeypatch):
    """Its letters squared would take minutes."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/short")
    text = f"data:text/{'a' * 500_000} in "
    assert without_paths(text + "/short/x") == text + "tmp/x"


def test_parameters_cell_is_what_papermill_sees(nb, path):
    tagged = [cell for cell in code_cells(nb) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assigned = [node.target.id for node in ast.parse(tagged[0].source).body]
    seen = papermill.inspect_notebook(str(path))
    assert list(seen) == assigned, "papermill's pattern lost a line"
    assert len(tagged[0].source.splitlines()) == len(assigned), "one line each, nothing derived"
    for name, parameter in seen.items():
        assert parameter["help"], f"{name} has no comment"
        assert parameter["inferred_type_name"] == SHARED.get(name, parameter["inferred_type_name"])
    own = {
        "07_modular_adaptive_training": {"preset": '"mat-digits"'},
        "08_planner": {"preset": '"imagenet-vit-b"'},
        "09_studies": {"names": "[]"},
        "11_language": {"preset": '"austen"'},
        "12_downstream": {"segmentation": '"scenes-segmentation"'},
    }
    for name, default in own.get(path.stem, {"preset": '"digits"'}).items():
        assert seen[name]["default"] == default, "the committed default is the one that CI runs"


def test_the_parameters_are_set_before_they_are_used(nb):
    names = [index for index, cell in enumerate(code_cells(nb)) if "parameters" in cell.metadata.get("tags", [])]
    assert names == [0], "parameters first, then the imports, folded"


def test_jupyter_client_takes_the_provisioner_that_a_manager_has_already():
    """Warm kernels rest on it, see pipeline/warm.py: else each notebook would start a kernel of its own besides."""

    class Found(Exception):
        pass

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd, **kwargs):
            raise Found(self.parent.connection_file)

    manager = AsyncKernelManager(kernel_name="python3")
    manager.provisioner = Provisioner(kernel_spec=manager.kernel_spec, parent=manager)
    with pytest.raises(Found, match=r"\.json"):
        asyncio.run(manager.start_kernel())
    manager.cleanup_connection_file()
