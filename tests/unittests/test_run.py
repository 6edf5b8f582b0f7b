"""The runner of untouched recipes: what it is asked for, what it sees."""

import pytest
from helpers import brain_of, hparams_of, script

from speechbrain_mpq.run import main, quantized_fit


class Onlooker:
    """Notes what a script gives to fit."""

    def before_fit(self, *given):
        """Keep it."""
        self.given = given

    def after_fit(self, brain):
        """Nothing follows."""

    def trains(self, brain):
        """Go on."""
        return True


@pytest.mark.parametrize(
    "options, match",
    [
        (["--bits", "4 apples"], "budget '4 apples' is not understood"),
        (["--scores", "lk"], r"scores must be one of \('kl', 'output_error'"),
    ],
)
def test_runner_does_not_start_what_it_cannot_finish(tmp_path, options, match):
    script = tmp_path / "train.py"
    script.write_text("raise AssertionError('must not run')")
    with pytest.raises(SystemExit, match=match):
        main([str(script), *options])


@pytest.mark.parametrize("by_name", [True, False])
def test_the_loader_of_the_recipe_is_used(tmp_path, by_name):
    hparams, onlooker = hparams_of("plain", tmp_path, epochs=1), Onlooker()
    brain, loader = brain_of(hparams), {"batch_size": 4}
    train, valid = (script().dataset(4, seed=seed) for seed in (1, 2))
    arguments = [hparams["epoch_counter"], train, valid]
    with quantized_fit(onlooker):
        if by_name:
            brain.fit(*arguments, valid_loader_kwargs=loader)
        else:
            brain.fit(*arguments, False, loader, loader)
    assert onlooker.given == (brain, train, valid, loader)
