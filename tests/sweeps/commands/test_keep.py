"""mode=keep: a file says of a study what its directory does, to whoever reads either."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from sweeps import load_results, load_samples
from sweeps.results.table import load_tables
from tests.sweeps.commands.test_merge import EARLIER
from tests.sweeps.studies import command, store_study, study

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A study of which the 3-bit cell is not measured."""
    store_study(tmp_path / "r", study(), wanted=lambda m: m.cell.quant.bits != 3)
    return tmp_path / "r"


def test_a_file_reads_as_its_directory_does(part: Path, tmp_path: Path) -> None:
    for out in (EARLIER, part):
        kept = tmp_path / "of" / f"{out.name}.parquet"
        assert command("mode=keep", f"out={out}", f"to={kept}") == 0
        for long in (False, True):
            pd.testing.assert_frame_equal(load_results(kept, long), load_results(out, long))
        measurements = load_results(out, long=True)["measurement"]
        there, here = load_samples(out, measurements), load_samples(kept, measurements)
        assert any(there.values())
        for measurement, samples in there.items():
            assert {n: v.tolist() for n, v in here[measurement].items()} == {n: v.tolist() for n, v in samples.items()}
    both = load_tables([tmp_path / "of" / "r.parquet", part])
    for table, alone in zip(both, load_tables([part]), strict=True):
        pd.testing.assert_frame_equal(table, alone)


def test_outcomes_and_cells_that_are_chosen_are_kept_and_no_others(part: Path, tmp_path: Path) -> None:
    kept = tmp_path / "k.parquet"
    assert command("mode=keep", f"out={part}", f"to={kept}", "samples=[nats]", "where={bits: 4}") == 0
    assert set(load_results(kept)["bits"]) == {4}
    long = load_results(kept, long=True)
    names = {
        row["eval"]: set(load_samples(kept, [row["measurement"]])[row["measurement"]]) for _, row in long.iterrows()
    }
    assert names == {"jargon": {"nats"}, "choice": set()}
    assert command("mode=keep", f"out={part}", f"to={kept}", "samples=[]") == 0
    assert not any(load_samples(kept, load_results(kept, long=True)["measurement"]).values())


def test_commands_of_analysis_read_it(part: Path, tmp_path: Path, capsys: Capture) -> None:
    kept = tmp_path / "k.parquet"
    assert command("mode=keep", f"out={part}", f"to={kept}", "samples=[nats,tokens]") == 0
    assert main(["report", str(kept), "--page-only", "--title", "My study"]) == 0
    said = capsys.readouterr().out
    assert "<title>My study</title>" in (tmp_path / "reports" / "all.html").read_text()
    assert str(tmp_path / "reports" / "all.html") in said
    assert {p.name for p in tmp_path.iterdir()} == {"r", "k.parquet", "reports"}
    assert main(["findings", str(kept), "--study", "other"]) == 2
    assert f"{str(kept)!r} holds no study named 'other'; it holds s" in capsys.readouterr().err


def test_what_can_not_be_is_refused_by_name(part: Path, tmp_path: Path, capsys: Capture) -> None:
    def refused(*arguments: str) -> str:
        assert command("mode=keep", f"out={part}", *arguments) == 2
        return capsys.readouterr().err

    assert "to=null is not valid with mode=keep: name a file that ends in .parquet" in refused()
    assert "kept.csv' is not valid with mode=keep" in refused(f"to={tmp_path}/kept.csv")
    kept = tmp_path / "k.parquet"
    assert "samples='nat' is not valid: samples there have" in refused(f"to={kept}", "samples=[nat]")
    assert not kept.exists()
    pd.DataFrame({"measurement": ["a"], "samples": [None]}).to_parquet(kept)
    assert main(["findings", str(kept)]) == 2
    assert "is no file of results: mode=keep writes one" in capsys.readouterr().err
    kept.write_bytes(b"no parquet")
    assert main(["findings", str(kept)]) == 2
    assert "is damaged, or no parquet file" in capsys.readouterr().err


def test_sizes_of_quantized_weights_alone_leave_out_what_stays_at_16_bits(part: Path) -> None:
    from analysis.cells import quantized_alone

    wide = load_results(part)
    weights, rest = 600, 400
    bits = wide["bits"].map({16: 16.0, 4: 4.25, 3: 3.25}).astype(float)
    for each, total in (("bits_per_param", "total_bits"), ("bits_per_param_nominal", "total_bits_nominal")):
        wide[each], wide[total] = bits, weights * bits + rest * 16
    wide.loc[wide["bits"] == 3, ["total_bits", "total_bits_nominal"]] = np.nan
    alone = quantized_alone(wide.assign(params=weights + rest))
    assert alone["total_bits"].tolist() == (weights * bits).tolist()
