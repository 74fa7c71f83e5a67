"""The HTML report of Step-Saliency: what its page holds, and what a browser makes of it."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_stepflow.runtime.errors import StepFlowFileError, StepFlowInputError
from hf_stepflow.runtime.trace import Trace, TraceStep
from hf_stepflow.saliency.maps import INDICES, pair_counts
from hf_stepflow.saliency.page import PRECISION, pack_maps
from hf_stepflow.saliency.result import StepSaliency

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")

HOSTILE = "</script><script>document.title='taken'</script><!--<script> \"'&amp; <img src=x onerror=a()> $data \u2028"


def trace_of(labels: str, sizes: list[int], texts: list[str]) -> Trace:
    """A trace of steps given by letters: q, t, s; thinking after anything else opens a round."""
    steps: list[TraceStep] = []
    segments, numbers, rounds = [], [], []
    number, place = 0, 0
    for position, (letter, size) in enumerate(zip(labels, sizes, strict=True)):
        if letter == "t" and (position == 0 or labels[position - 1] != "t"):
            number, place = number + 1, 0
        place = 0 if letter == "q" else place + 1
        name = {"q": "question", "t": "thinking", "s": "summary"}[letter]
        start = len(segments)
        steps.append(TraceStep(name, number, place, start, start + size, texts[position]))
        segments += ["qts".index(letter)] * size
        numbers += [place] * size
        rounds += [number] * size
    return Trace(torch.tensor(segments), torch.tensor(numbers), torch.tensor(rounds), steps)


def saliency_of(labels: str, layers: int = 3, heads: int = 0, length: int = 20, **about) -> StepSaliency:
    """Random maps over several orders."""
    sizes = [3 + place % 4 for place in range(len(labels))]
    trace = trace_of(labels, sizes, [(f"Step {place} & so on. " * length)[:length] for place in range(len(labels))])
    shape = (layers, heads, len(labels), len(labels)) if heads else (layers, len(labels), len(labels))
    maps = (3 * torch.randn(shape) - 9).exp().tril()
    sums = maps * pair_counts(trace).float()
    return StepSaliency(sums, [2 * layer + 1 for layer in range(layers)], trace, "causal", about)


def content_of(path: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def unpacked(packed: dict, layers: int, steps: int) -> torch.Tensor:
    """What the page's numbers stand for, [L, S, S]."""
    codes = np.frombuffer(base64.b64decode(packed["codes"]), f"<u{packed['bytes']}").reshape(layers, -1)
    peaks = np.frombuffer(base64.b64decode(packed["peaks"]), "<f4").reshape(layers, steps)
    codes, logs = torch.tensor(codes.astype("int64")), torch.tensor(peaks.astype("float64"))
    rows, columns = torch.tril_indices(steps, steps)
    values = (logs[:, rows] - (256 ** packed["bytes"] - 1 - codes) * packed["step"]).exp()
    maps = torch.zeros(layers, steps, steps, dtype=torch.float64)
    maps[:, rows, columns] = torch.where(codes > 1, values, 0.0)
    return maps


def browse(page: Path, tmp_path: Path, script: str = "") -> str:
    """The page as the browser has made it; with a script run after it, which its policy would not let in."""
    assert BROWSER is not None
    if script:
        text = re.sub("<meta http-equiv[^>]*>", "", page.read_text("utf-8"))
        page = tmp_path / "driven.html"
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1100"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True).stdout


def told(document: str) -> dict:
    """What a driving script left in the document."""
    found = re.search(r'data-told="([^"]*)"', document)
    assert found is not None, document[-2000:]
    return json.loads(unescape(found[1]))


def test_a_long_trace_of_a_deep_model_is_one_small_file(tmp_path: Path) -> None:
    saliency = saliency_of("q" + "t" * 280 + "s" * 19, layers=64, length=300, model="a/b")
    page = tmp_path / "page.html"
    saliency.to_html(page)
    assert page.stat().st_size < 5e6
    content = content_of(page)
    assert content["precision"] == PRECISION[1]
    expected = saliency.maps.double()
    found = unpacked(content["maps"], 64, 300)
    shown = found > 0
    assert ((found - expected).abs() <= PRECISION[1] * expected)[shown].all()
    # What is left out is too small to count in its row.
    assert (expected.amax(-1, keepdim=True).expand_as(expected) * 1e-6 > expected)[~shown].all()


@pytest.mark.parametrize("heads", [0, 5])
def test_values_are_as_exact_as_the_page_says(tmp_path: Path, heads: int) -> None:
    saliency = saliency_of("qtttttss", heads=heads)
    saliency.sums[0, ..., 3, :] = 0.0
    saliency.sums[1, ..., 4, 2] = 1e-30
    saliency.to_html(tmp_path / "page.html")
    content = content_of(tmp_path / "page.html")
    expected = (saliency.maps.mean(1) if heads else saliency.maps).double()
    found = unpacked(content["maps"], 3, 8)
    assert content["precision"] == 0.001
    assert ((found - expected).abs() <= 0.001 * expected).all()
    assert torch.equal(found == 0, expected == 0)
    assert [step["tokens"] for step in content["steps"]] == [3, 4, 5, 6, 3, 4, 5, 6]
    assert list(content["indices"]) == list(INDICES)


def test_entries_far_below_their_row_are_told_from_zeros() -> None:
    maps = torch.zeros(1, 1000, 1000)
    maps[0, 2, :3] = torch.tensor([1.0, 1e-20, 0.0])
    packed = pack_maps(maps)
    assert packed["bytes"] == 1
    assert list(base64.b64decode(packed["codes"])[3:6]) == [255, 1, 0]


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    saliency_of("qtts", model="https://host/model").to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8").replace("https://host/model", "", 1)
    assert not re.search(r"https?:|//\w+\.\w+/|\burl\(|@import|<link|\bsrc=|\bfetch\(|\bimport\b", text)
    assert "default-src 'none'" in text


def test_texts_cannot_end_the_element_that_holds_them(tmp_path: Path) -> None:
    saliency = saliency_of("qts", model=HOSTILE, revision=HOSTILE)
    saliency.trace.steps[1] = TraceStep("thinking", 1, 1, 3, 7, HOSTILE + "\ud800")
    saliency.to_html(tmp_path / "page.html")
    content = content_of(tmp_path / "page.html")
    assert content["steps"][1]["text"] == HOSTILE + "\ud800"
    assert content["facts"][0] == HOSTILE
    assert (tmp_path / "page.html").read_text("utf-8").count("<script") == 2


def test_facts(tmp_path: Path) -> None:
    about = {"model": "a/b", "revision": "0123456789abcdef", "dtype": "bfloat16", "loss": [30, 77], "loss_value": 1.25}
    settings = {"oeb_layers": [0, 1], "tau_max": 0.15, "smi_layers": "none", "alpha": 0.06, "sink_tokens": 4}
    saliency_of("qts", **about, stepflow=settings).to_html(tmp_path / "page.html")
    facts = content_of(tmp_path / "page.html")["facts"]
    assert facts[:4] == ["a/b", "revision 0123456789ab", "bfloat16", "loss: logit of token 77 at position 30, 1.25"]
    assert facts[4] == "StepFlow on: oeb_layers [0, 1], tau_max 0.15, smi_layers none, alpha 0.06, sink_tokens 4"
    saliency_of("qts").to_html(tmp_path / "page.html")
    assert content_of(tmp_path / "page.html")["facts"][:2] == ["model without a name", "StepFlow off"]


def test_long_texts_are_cut(tmp_path: Path) -> None:
    saliency_of("qts", length=4100).to_html(tmp_path / "page.html")
    assert content_of(tmp_path / "page.html")["steps"][0]["text"].endswith("… (100 more characters)")


def test_what_cannot_be_shown(tmp_path: Path) -> None:
    saliency = saliency_of("qts")
    saliency.sums[0, 2, 1] = float("nan")
    with pytest.raises(StepFlowInputError, match="no numbers"):
        saliency.to_html(tmp_path / "page.html")
    with pytest.raises(StepFlowInputError, match="no steps"):
        StepSaliency(torch.zeros(1, 0, 0), [0], trace_of("", [], [])).to_html(tmp_path / "page.html")
    with pytest.raises(StepFlowFileError, match="cannot be written"):
        saliency_of("qts").to_html(tmp_path / "none" / "page.html")


DRIVE = """
const entries = [];
for (let l = 0; l < layers.length; l++) for (let i = 0; i < count; i++) for (let j = 0; j <= i; j++)
  entries.push(valueOf(l, i, j));
const slider = byId("layer");
slider.value = 2;
slider.dispatchEvent(new Event("input"));
const box = heat.getBoundingClientRect();
const cell = plot.size / count;
const at = { clientX: box.left + plot.left + 1.5 * cell, clientY: box.top + plot.top + 4.5 * cell, bubbles: true };
heat.dispatchEvent(new PointerEvent("pointermove", at));
const tip = [...byId("tip").children].map((one) => one.textContent);
heat.dispatchEvent(new MouseEvent("click", at));
const pixel = heat.getContext("2d").getImageData(plot.left + 0.5 * cell, plot.top + 6.5 * cell, 1, 1).data;
const clicked = { ...document.documentElement.dataset };
const sources = [...byId("sources").querySelectorAll(".chip, b")].map((one) => one.textContent);
const readers = [...byId("readers").querySelectorAll(".chip, b")].map((one) => one.textContent);
for (const key of ["ArrowUp", "ArrowUp", "Enter", "PageDown"])
  heat.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
document.body.dataset.told = JSON.stringify({
  entries, tip, sources, readers, clicked, alpha: pixel[3], typed: { ...document.documentElement.dataset },
  marks: [...document.querySelectorAll("#charts h3 span")].map((one) => one.textContent),
  tinted: [...document.querySelectorAll("#steps li[data-step]")].filter((one) => one.style.background).length,
});
"""


@needs_browser
def test_a_browser_shows_what_the_maps_hold(tmp_path: Path) -> None:
    saliency = saliency_of("qttttsss", layers=4)
    page = tmp_path / "page.html"
    saliency.to_html(page)
    seen = told(browse(page, tmp_path, DRIVE))
    rows, columns = torch.tril_indices(8, 8)
    torch.testing.assert_close(
        torch.tensor(seen["entries"]).double(), saliency.maps.double()[:, rows, columns].flatten(), rtol=1e-3, atol=0
    )
    assert (seen["clicked"]["layer"], seen["clicked"]["selected"]) == ("5", "4")  # the third layer is the model's 5
    assert (seen["typed"]["layer"], seen["typed"]["selected"]) == ("3", "2")
    sums = saliency.sums[2].double()
    reads, readers = sums[4] / sums[4].sum(), sums[:, 4] / sums[:, 4].sum()
    assert float(seen["tip"][0]) == pytest.approx(float(saliency.maps[2, 4, 1]), rel=6e-3)
    shown = re.fullmatch(r"([\d.]+) % of what step 4 reads in layer 5", seen["tip"][1])
    assert shown is not None
    assert float(shown[1]) == pytest.approx(100 * float(reads[1]), abs=0.5)
    for listed, shares in ((seen["sources"], reads), (seen["readers"], readers)):
        order = [place for place in shares.argsort(descending=True).tolist() if shares[place] > 0]
        assert listed[0::2] == [str(place) for place in order]
        assert float(listed[1].removesuffix(" %")) == pytest.approx(100 * float(shares.max()), abs=0.6)
    assert seen["tip"][2:] == ["4 thinking readsStep 4 & so on. Step", "1 thinkingStep 1 & so on. Step"]
    assert seen["alpha"] == 255
    assert seen["tinted"] == 8
    assert len(seen["marks"]) == len(INDICES)
    assert all(mark.startswith("layer 3: ") for mark in seen["marks"])


@needs_browser
@pytest.mark.parametrize("kind", ["hostile", "one", "zero", "rounds"])
def test_the_page_runs_under_its_own_policy(tmp_path: Path, kind: str) -> None:
    if kind == "rounds":
        saliency = saliency_of("qttsqtts", heads=2)
    elif kind == "one":
        saliency = saliency_of("q", layers=1)
    else:
        saliency = saliency_of("qttss")
    if kind == "zero":
        saliency.sums.zero_()
    if kind == "hostile":
        saliency.trace.steps[1] = TraceStep("thinking", 1, 1, 3, 7, HOSTILE)
    saliency.to_html(tmp_path / "page.html")
    document = browse(tmp_path / "page.html", tmp_path)
    assert 'data-ready="true"' in document
    assert "<title>Step-Saliency · model without a name</title>" in document
    assert "<img" not in document
    if kind == "zero":
        assert "all zero" in document
    if kind == "rounds":
        assert "question and earlier rounds" in document
        assert "thinking, round 2" in document
