"""Every study runs from end to end, on tiny data in the form of the real ones."""

import pytest

from experiments.study import load_study, study_names
from experiments.sweep import read_results
from tests.experiments.test_cli import invoke
from tests.experiments.tiny_data import write_all, write_decoder

WITHOUT_DATA = {"linear", "conditioning", "digits", "defaults"}
FROM_THE_HUB = {"fine-tune"}
WITH_A_DECODER = {"gsm8k", "scaling"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", sorted(set(study_names()) - FROM_THE_HUB))
def test_smoke_run(name, data, tmp_path):
    file = load_study(name)
    variants = list(file.study.variants)[:1]
    chosen = [f"--variant={variant}" for variant in variants]
    where = [] if name in WITHOUT_DATA else ["--data-dir", data]
    if name in WITH_A_DECODER:
        write_decoder(tmp_path / "decoder", data, steps=2)
        where += ["--model", tmp_path / "decoder"]
    code, output = invoke("run", name, "--smoke", "--out", tmp_path / "results", *chosen, *where)
    assert code == 0, output
    results = read_results(tmp_path / "results")
    assert {r.config.method for r in results} == set(file.smoke["learning_rates"])
    for result in results:
        assert result.status == "finished"
        assert result.config.study == name
        assert result.config.variant == (variants[0] if variants else "")
        assert result.step_ratio > 0
        assert (len(result.probes) > 0) == ("plan.probe_every" in file.smoke)
        for probe in result.probes:  # at the start b = 0, and a has no gradient
            assert 0 <= probe.rank_a <= result.config.task_options["rank"] + 1e-3
            assert 0 < probe.gradient_alignment <= 1
