"""The page in a real browser, offline: no error, no request, figures drawn, the table sorts and filters."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: the page cannot be opened here")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=10000",
    "--dump-dom",
]

# What a reader does, and what the table shows after it.
VISIT = """
<script>
window.addEventListener("load", () => setTimeout(() => {
  const table = document.getElementById("joined");
  const form = document.getElementById("filters");
  const shown = () => Array.from(table.tBodies[0].rows).filter((row) => !row.hidden);
  const column = (name) => {
    const heads = Array.from(table.querySelectorAll("th[data-column]"));
    const index = heads.findIndex((head) => head.dataset.column === name);
    return shown().map((row) => row.cells[index].dataset.value ?? row.cells[index].textContent);
  };
  const head = (name) => table.querySelector(`th[data-column="${name}"]`);
  const set = (name, value) => {
    form[name].value = value;
    form.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const out = { start: shown().length, hash: location.hash, family: form.family.value, first: column("score") };
  head("own_error").querySelector("button").click();
  out.ascending = column("own_error");
  out.sorted = head("own_error").getAttribute("aria-sort");
  head("own_error").querySelector("button").click();
  out.descending = column("own_error");
  set("family", "kernel");
  out.families = [...new Set(column("family"))];
  set("family", "");
  set("task", "mqar");
  set("budget", "1/4");
  out.tasks = [...new Set(column("task"))];
  out.budgets = [...new Set(column("budget"))];
  set("text", "hyper");
  out.text = [...new Set(column("method"))];
  out.count = document.getElementById("count").textContent;
  const hidden = () => getComputedStyle(head("own_kl")).display === "none";
  out.further = [hidden()];
  form.all.click();
  out.further.push(hidden());
  const before = document.querySelector("#figure-error svg").outerHTML;
  document.querySelectorAll("#figure-error input[type=radio]")[1].click();
  setTimeout(() => {
    out.switched = document.querySelector("#figure-error svg").outerHTML !== before;
    const pre = document.createElement("pre");
    pre.id = "visit";
    pre.textContent = JSON.stringify(out);
    document.body.append(pre);
  }, 500);
}, 3000));
</script>
"""


def visit(address, folder):
    """The document after loading, what the console said, and the addresses that the page asked for."""
    log = folder / "net.json"
    own = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([CHROMIUM, *FLAGS, *own, address], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    # What Chromium asks for on its own account has no origin; what a page asks for has the page's.
    asked = [
        e["params"]["url"] for e in events if e.get("params", {}).get("initiator", "not an origin") != "not an origin"
    ]
    return done.stdout, console, [address for address in asked if not address.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def opened(root, tmp_path_factory):
    return visit((root / "report/index.html").as_uri(), tmp_path_factory.mktemp("opened"))


@pytest.fixture(scope="module")
def used(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("used")
    # The last one: Vega's own code holds the text of another.
    before, _, after = page.rpartition("</body>")
    (folder / "page.html").write_text(f"{before}{VISIT}</body>{after}", encoding="utf-8")
    state = "#family=sparse&sort=score&direction=descending"
    document, console, _ = visit((folder / "page.html").as_uri() + state, folder)
    found = re.search(r'<pre id="visit">(.*?)</pre>', document, flags=re.DOTALL)
    assert found, console
    return json.loads(unescape(found.group(1)))


def test_the_console_is_silent(opened):
    assert opened[1] == []


def test_no_host_is_asked(opened):
    assert opened[2] == []


def test_a_request_and_an_error_would_be_seen(tmp_path):
    """The two tests above can fail: a page that asks and throws is caught."""
    (tmp_path / "page.html").write_text('<img src="http://example.invalid/x.png"><script>nothing();</script>')
    _, console, asked = visit((tmp_path / "page.html").as_uri(), tmp_path)
    assert asked == ["http://example.invalid/x.png"]
    assert any("nothing is not defined" in line for line in console)


@pytest.mark.parametrize(("name", "marks"), [("accuracy", 15), ("error", 20), ("prediction", 15), ("heads", 60)])
def test_figures_are_drawn(opened, name, marks):
    document = opened[0]
    part = document[document.index(f'id="figure-{name}"') :]
    part = part[: part.index("</figure>")]
    assert "<svg" in part
    assert part.count('aria-roledescription="') >= marks


def test_the_address_restores_a_view(used):
    assert used["family"] == "sparse"
    assert used["start"] == 16
    scores = list(map(float, used["first"]))
    assert scores == sorted(scores, reverse=True)


def test_a_heading_sorts_both_ways(used):
    assert used["sorted"] == "ascending"
    ascending, descending = (list(map(float, used[key])) for key in ("ascending", "descending"))
    assert len(ascending) == 16
    assert ascending == sorted(ascending)
    assert descending == sorted(ascending, reverse=True)


def test_filters_combine(used):
    assert used["families"] == ["kernel"]
    assert used["tasks"] == ["mqar"]
    assert len(used["budgets"]) == 1
    assert used["text"] == ["hyperattention"]
    assert used["count"].startswith("2 of ")


def test_further_columns_are_shown_on_request(used):
    assert used["further"] == [True, False]


def test_the_source_of_errors_can_be_switched(used):
    assert used["switched"]
