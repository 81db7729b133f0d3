import math
from io import StringIO

import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments.report import draw_figure, make_table, summarize
from tests.experiments.samples import make_result


@pytest.fixture
def results():
    return [
        make_result(learning_rate=1e-3, loss=0.9),
        make_result(learning_rate=1e-2, loss=0.4),
        make_result(learning_rate=1e-1, loss=0.6),
        make_result(learning_rate=1e-2, loss=0.2, seed=1),
        make_result(method="altlora", learning_rate=0.1, loss=0.5),
        make_result(method="altlora", learning_rate=1.0, loss=0.1, status="diverged"),
        make_result(method="altlora-plus", learning_rate=9.0, loss=math.nan, status="diverged"),
    ]


def test_summary_chooses_the_finished_run_with_the_lowest_validation_loss(results):
    adamw, altlora, lost = summarize(results)
    assert [run.config.seed for run in adamw.best] == [0, 1]
    assert adamw.best[0].config.learning_rate == 1e-2
    assert not adamw.at_edge
    assert altlora.best[0].config.learning_rate == 0.1
    assert altlora.at_edge
    assert lost.best == []


def test_table_shows_spread_edge_and_divergence(results):
    text = StringIO()
    Console(file=text, width=80).print(make_table(summarize(results), "a title"))
    rows = {line.split()[0]: line for line in text.getvalue().splitlines() if line.strip()}
    assert "0.300 ± 0.141" in rows["adamw"]
    assert " 0/3" in rows["adamw"]
    assert " 0.1* " in rows["altlora"]
    assert " 1/2" in rows["altlora"]
    assert " 1/1" in rows["altlora-plus"]


def test_figure_is_a_readable_png(results, tmp_path):
    path = tmp_path / "new" / "figure.png"
    draw_figure(summarize(results), "a title", path)
    pixels = imread(path)
    assert pixels.shape[1] > 1000
    assert pixels[..., :3].std() > 0.05
