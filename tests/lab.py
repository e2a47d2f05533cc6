"""A real JupyterLab with a real browser in front of it: Playwright drives Debian's Chromium, no browser is downloaded.

    with Lab(folder, env={"INCUBATE_DATA": "…"}) as lab:
        lab.add("notebooks/06_analysis.ipynb", notebook)
        page = lab.open("notebooks/06_analysis.ipynb")
        page.run_all()
        assert not page.errors()

What a person does is done with mouse and keyboard. What a cell has printed, and whether it is done, is asked of JupyterLab
itself, since of a long notebook only a part is drawn.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import nbformat
import psutil
from patience import HANG, wait_for

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {  # JupyterLab would ask about news in a corner, and look for updates on the network
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PANEL = "const panel = [...jupyterapp.shell.widgets('main')].find(w => w.context && w.context.path === path);"
CELLS = "panel.content.widgets.map(w => w.model).filter(m => m.type === 'code' && m.sharedModel.source.trim())"
STATE = f"""path => {{
  {PANEL}
  if (!panel || !panel.context.isReady) return null;
  const kernel = panel.sessionContext.session?.kernel;
  return {{
    kernel: kernel?.id, status: kernel?.status, unsaved: panel.context.model.dirty,
    cells: {CELLS}.map(m => ({{
      count: m.executionCount || 0, running: m.executionState === 'running',
      failed: [...Array(m.outputs.length).keys()].some(i => m.outputs.get(i).type === 'error'),
    }})),
  }};
}}"""  # without what was printed: it is asked for ten times a second
OUTPUTS = f"""([path, containing]) => {{
  {PANEL}
  return {CELLS}.filter(m => m.sharedModel.source.includes(containing)).flatMap(m => m.outputs.toJSON());
}}"""
PICTURE = """async image => {
  const blob = await (await fetch(image.src)).blob();
  const reader = new FileReader();
  return new Promise(done => { reader.onload = () => done(reader.result); reader.readAsDataURL(blob); });
}"""  # the address alone changes with every update, whether or not the picture does


def missing() -> list[str]:
    """Return what is not on this machine."""
    wanted = {"playwright": importlib.util.find_spec("playwright"), "chromium": _browser()}
    return [name for name, there in wanted.items() if not there]


def _browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Lab:
    """A server and a browser. They start with the object and end with `close`, which ends only what it started."""

    def __init__(self, folder: Path, *, env: dict[str, str] | None = None, screenshots: Path | None = None) -> None:
        assert not missing(), f"no {', '.join(missing())} here"
        self.root, self.screenshots = folder / "root", screenshots or folder / "screenshots"
        self.token, self.port = secrets.token_hex(16), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.stack, self.started = contextlib.ExitStack(), []
        self.log = folder / "server.log"
        for path in (self.root, self.screenshots):
            path.mkdir(parents=True, exist_ok=True)
        try:
            self._start_server(folder, env or {})
            self._start_browser()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_server(self, folder: Path, env: dict[str, str]) -> None:
        # Nothing of the user's is read or written: neither settings nor which tabs were open.
        own = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}
        own |= {f"JUPYTERLAB_{name}_DIR": str(folder / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
        for name, values in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
            f"--ServerApp.root_dir={self.root}", f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.server = subprocess.Popen(
                command, env=os.environ | own | env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        self.stack.callback(self._stop_server)
        wait_for(self._answers, "the server")

    def _answers(self) -> bool:
        assert self.server.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return bool(self.ask("GET", "api/status"))
        return False

    def _stop_server(self) -> None:
        with contextlib.suppress(OSError):
            self.ask("POST", "api/shutdown")  # it ends its kernels, too
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.wait(20)  # then it is killed, in whatever state
        left = [process for process in self.started if process.is_running()]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, 10)
        if self.server.poll() is None:
            self.server.kill()
        self.server.wait()

    def _start_browser(self) -> None:
        from playwright.sync_api import sync_playwright

        driver = self.stack.enter_context(sync_playwright())
        browser = driver.chromium.launch(executable_path=_browser())
        self.stack.callback(browser.close)
        self.context = browser.new_context(viewport={"width": 1400, "height": 1000})

    def close(self) -> None:
        """End the browser, the kernels and the server, whatever state they are in."""
        self.started = self.processes()
        self.stack.close()

    def processes(self) -> list[psutil.Process]:
        """Return the server, its kernels and what they started, as far as they are alive."""
        try:
            server = psutil.Process(self.server.pid)
            return [server, *server.children(recursive=True)]
        except (AttributeError, psutil.NoSuchProcess):
            return [process for process in self.started if process.is_running()]

    def ask(self, method: str, path: str) -> Any:
        """Ask the server's REST interface, as JupyterLab does."""
        request = urllib.request.Request(f"{self.url}/{path}", method=method, headers={"Authorization": f"token {self.token}"})
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def add(self, path: str, nb: nbformat.NotebookNode) -> str:
        """Put a notebook below the server's root folder."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, self.root / path)
        return path

    def open(self, path: str) -> "NotebookPage":
        """Open a notebook in a tab of the browser; returns when it is drawn and its kernel has answered."""
        return NotebookPage(self, path)


class NotebookPage:
    """A notebook in JupyterLab, as somebody sees it who works with it."""

    def __init__(self, lab: Lab, path: str) -> None:
        self.lab, self.path, self.console = lab, path, []
        self.page = lab.context.new_page()
        self.page.set_default_timeout(HANG * 1000)
        self.page.on("dialog", lambda dialog: dialog.accept())  # "leave this page?"
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        workspace = re.sub(r"\W", "-", path)  # one each, or a tab would show the others' notebooks, too
        self._load(f"{lab.url}/lab/workspaces/{workspace}/tree/{path}?token={lab.token}")

    def _load(self, url: str | None = None, answers: bool = True) -> None:
        self.page.goto(url) if url else self.page.reload()
        self.page.wait_for_function("window.jupyterapp !== undefined")
        wait_for(self.state, f"{self.path} to be read")
        self.panel = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.panel.locator(".jp-Cell").first.wait_for()
        if answers:
            wait_for(lambda: self.state()["status"] in ("idle", "busy"), f"the kernel of {self.path}")

    def state(self) -> dict[str, Any] | None:
        """Return the kernel's id and status, and how far each code cell is; None while the notebook is read."""
        return self.page.evaluate(STATE, self.path)

    def menu(self, *names: str) -> None:
        """Choose from the menus at the top: `menu("Run", "Run All Cells")`."""
        top, *below = names
        self.page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{top}$")).click()
        for name in below:
            label = self.page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{re.escape(name)}$"))
            label.locator("visible=true").last.click()

    def start_all(self) -> int:
        """Choose Run → Run All Cells; return the number of the last cell run before, which `wait` needs."""
        last = max((cell["count"] for cell in self.state()["cells"]), default=0)
        self.menu("Run", "Run All Cells")
        return last

    def wait(self, last: int = 0) -> None:
        """Wait until every code cell is done, or one has failed, and the kernel is idle."""

        def done() -> bool:
            state = self.state()
            ended = all(cell["count"] > last for cell in state["cells"]) or any(cell["failed"] for cell in state["cells"])
            return ended and state["status"] == "idle" and not any(cell["running"] for cell in state["cells"])

        wait_for(done, f"the cells of {self.path}", self.text)

    def run_all(self) -> None:
        """Run all cells to the end."""
        self.wait(self.start_all())

    def outputs(self, containing: str = "") -> list[dict[str, Any]]:
        """Return the outputs of the cells whose source contains a text, in the notebook's format."""
        return self.page.evaluate(OUTPUTS, [self.path, containing])

    def text(self, containing: str = "") -> str:
        """Return the plain text of the outputs of the cells whose source contains a text."""
        words = []
        for output in self.outputs(containing):
            text = output.get("text") or output.get("data", {}).get("text/plain") or output.get("evalue", "")
            words.append(text if isinstance(text, str) else "".join(text))
        return "\n".join(words)

    def errors(self) -> list[str]:
        """Return what went wrong: errors of cells, errors of the page itself, and widgets that cannot be drawn."""
        failed = [f"{o['ename']}: {o['evalue']}" for o in self.outputs() if o["output_type"] == "error"]
        undrawn = self.page.locator(".jp-OutputArea", has_text=re.compile("Error (displaying|creating) widget|Loading widget"))
        return failed + self.console + ["a widget is not drawn"] * bool(undrawn.count())

    def widget(self, kind: str, label: str = "") -> Any:
        """Return a widget on the page by its class (`slider`, `dropdown`, …) and its description."""
        found = self.panel.locator(f".jp-OutputArea .widget-{kind}")
        if label:
            exactly = re.compile(rf"^\s*{re.escape(label)}\s*$")
            found = found.filter(has=self.page.locator(".widget-label", has_text=exactly))
        found.first.scroll_into_view_if_needed()
        return found.first

    def choose(self, option: str, *, label: str = "") -> None:
        """Choose an option of a menu (Dropdown) by its text."""
        self.widget("dropdown", label).locator("select").select_option(index=self.options(label=label).index(option))

    def options(self, *, label: str = "") -> list[str]:
        """Return the options of a menu, as they stand in it."""
        texts = self.widget("dropdown", label).locator("option").all_inner_texts()
        return [text.replace("\xa0", " ") for text in texts]  # ipywidgets has its spaces unbreakable

    def drag(self, share: float, *, label: str = "") -> str:
        """Drag a slider to a share of its length, with the mouse; return what it reads then."""
        slider = self.widget("slider", label)
        handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
        y = handle["y"] + handle["height"] / 2
        self.page.mouse.move(handle["x"] + handle["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(track["x"] + share * track["width"], y, steps=5)
        self.page.mouse.up()
        return slider.locator(".widget-readout").inner_text()

    def enter(self, value: object, *, label: str = "") -> None:
        """Set a slider to a number by writing it beside the slider."""
        readout = self.widget("slider", label).locator(".widget-readout")
        readout.fill(str(value))
        readout.press("Enter")

    def press(self, label: str) -> None:
        """Press a button by the words on it."""
        button = self.panel.locator(".jp-OutputArea button.widget-button", has_text=re.compile(rf"^\s*{re.escape(label)}\s*$"))
        button.first.click()

    def picture(self) -> str:
        """Return the picture that an Image widget shows, as the browser has it (a data URL)."""
        return self.widget("image").evaluate(PICTURE)

    def save(self) -> nbformat.NotebookNode:
        """Save with Ctrl-S; return what is in the file then."""
        self.page.keyboard.press("Control+s")
        wait_for(lambda: not self.state()["unsaved"], f"{self.path} to be saved")
        return nbformat.read(self.lab.root / self.path, as_version=4)

    def reload(self, answers: bool = True) -> None:
        """Reload the page, as with F5; returns when the notebook is there again, and its kernel has answered (one that trains
        answers when its cell is done)."""
        self._load(answers=answers)

    def screenshot(self, name: str) -> Path:
        """Save a picture of the page as it is."""
        path = self.lab.screenshots / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    def screenshots(self, name: str) -> list[Path]:
        """Save pictures of the whole notebook, a screen each from top to bottom: `<name>-1.png`, …"""
        scroll = "(box, y) => { box.scrollTop = y; return [box.scrollTop, box.clientHeight]; }"
        box, taken, y = self.panel.locator(".jp-WindowedPanel-outer"), [], 0
        while box.evaluate(scroll, y)[0] >= y - 1 or not taken:
            self.page.wait_for_timeout(500)  # cells that come into view are drawn when there is time
            taken.append(self.screenshot(f"{name}-{len(taken) + 1}"))
            y += box.evaluate(scroll, y)[1]
        return taken

    def close(self) -> None:
        """Close the tab and end the kernel."""
        self.page.close()
        for session in self.lab.ask("GET", "api/sessions"):
            if session["path"] == self.path:
                self.lab.ask("DELETE", f"api/sessions/{session['id']}")


def _end_with_parent() -> None:
    """Have Linux end this process when the tests are killed, which then cannot clean up (1 is PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
