"""The scripts behind the published figures keep the machine of each row, and stop where a part fails."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import reasoner_calibration, saliency_scale, smollm2_saliency


def test_rows_keep_the_machine_that_they_were_measured_on(tmp_path: Path, monkeypatch) -> None:
    kept = tmp_path / "scale.json"
    monkeypatch.setattr(saliency_scale, "WAYS", ())
    monkeypatch.setattr(saliency_scale, "model", lambda: None)
    for processor, lengths in (("this one", ["512", "1024"]), ("another", ["1024"])):
        monkeypatch.setattr(saliency_scale, "machine", lambda processor=processor: {"processor": processor})
        monkeypatch.setattr(sys, "argv", ["saliency_scale", "--json", str(kept), "--lengths", *lengths])
        saliency_scale.main()
    rows = json.loads(kept.read_text())["rows"]
    assert {row["tokens"]: row["machine"]["processor"] for row in rows} == {512: "this one", 1024: "another"}


def test_published_rows_name_their_machine() -> None:
    rows = json.loads(Path(saliency_scale.__file__).with_suffix(".json").read_text())["rows"]
    assert all({"processor", "threads", "torch", "transformers"} <= row["machine"].keys() for row in rows)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="contextlib.chdir")
def test_saliency_fails_where_diagnose_does(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(smollm2_saliency, "FOLDER", tmp_path / "kept")
    monkeypatch.setattr(smollm2_saliency, "unpacked", lambda folder: folder)  # a model that is not there
    monkeypatch.setattr(sys, "argv", ["smollm2_saliency"])
    with pytest.raises(SystemExit) as ended:
        smollm2_saliency.main()
    assert ended.value.code == 2


def test_p_values_of_the_levels_are_adjusted() -> None:
    row = {"n": 100, "base": [0.5, 0.4, 0.6], "delta": [0.05, 0.01, 0.09], "gained": 6, "lost": 1}
    rows = [{**row, "level": name, "p_value": value} for name, value in (("a", 0.02), ("b", 0.5), ("c", 0.03))]
    lines = reasoner_calibration.difficulties_table(rows).splitlines()[-3:]
    assert [line.strip("| ").rpartition("| ")[2] for line in lines] == ["0.06", "0.5", "0.06"]
    assert lines[0].startswith("| a | 100 | 50.0 | +5.0 [+1.0, +9.0] | 6 | 1 |")
