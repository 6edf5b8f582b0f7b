"""A recipe as others write them, in seconds: CTC on random features.

Knows nothing of quantization; the tests of the plugin run it.
"""

import sys

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import DynamicItemDataset


class TinyASR(sb.Brain):
    """CTC training."""

    def compute_forward(self, batch, stage):
        """Log-probabilities [batch, frames, tokens], and relative lengths."""
        batch = batch.to(self.device)
        feats, lens = batch.feats
        hidden, _ = self.modules.encoder(feats)
        logits = self.modules.output(self.hparams.norm(hidden))
        return logits.float().log_softmax(-1), lens

    def compute_objectives(self, predictions, batch, stage):
        """CTC loss."""
        log_probs, lens = predictions
        tokens, token_lens = batch.tokens
        return self.hparams.loss(log_probs, tokens, lens, token_lens)

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log, and save a checkpoint after each epoch."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
        elif stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                {"epoch": epoch},
                {"loss": self.train_loss},
                {"loss": stage_loss},
            )
            self.checkpointer.save_and_keep_only(
                {"loss": float(stage_loss)}, min_keys=["loss"]
            )


def dataset(count, seed):
    """Random features with as random tokens; lengths differ."""

    @sb.utils.data_pipeline.takes("number")
    @sb.utils.data_pipeline.provides("feats", "tokens")
    def pipeline(number):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        yield torch.randn(12 + number % 3, 8, generator=generator)
        yield torch.randint(1, 5, (3,), generator=generator)

    return DynamicItemDataset(
        {f"item{i}": {"number": i} for i in range(count)},
        dynamic_items=[pipeline],
        output_keys=["id", "feats", "tokens"],
    )


def main(arguments):
    """Train and test."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.utils.distributed.ddp_init_group(run_opts)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    brain = TinyASR(
        modules=hparams["modules"],
        opt_class=hparams["opt_class"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    options = {"batch_size": hparams["batch_size"]}
    brain.fit(
        hparams["epoch_counter"],
        dataset(hparams["items"], seed=1),
        dataset(4, seed=2),
        train_loader_kwargs=dict(options),
        valid_loader_kwargs=dict(options),
    )
    loss = brain.evaluate(
        dataset(4, seed=3), min_key="loss", test_loader_kwargs=dict(options)
    )
    print(f"test loss {float(loss):.6f}")
    return brain


if __name__ == "__main__":
    main(sys.argv[1:])
