"""TDNN-F speech recognition of the embedded corpus by LF-MMI.

To run this recipe, do the following:
> python train.py hparams/train.yaml

It speaks the corpus and simulates the rooms if they are not there, estimates
the phone and word n-grams from the training transcripts, trains from scratch
(no alignments), and searches the words exactly. Rooms and noise are put to the
speech while it is needed: others in every epoch of training, the same ones in
validation and test.
"""

import sys
from pathlib import Path

import speechbrain as sb
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.dataio.dataset import (
    DynamicItemDataset,
    FilteredSortedDynamicItemDataset,
)
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main

from speechbrain_mpq.decoders.chain_graphs import (
    ctc_graph,
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from speechbrain_mpq.decoders.ngram import Ngram, estimate_arpa
from speechbrain_mpq.decoders.viterbi import best_path, word_graph
from speechbrain_mpq.decoders.vocabulary import Lexicon
from speechbrain_mpq.experiments.bottleneck_search import use_batch_statistics
from speechbrain_mpq.simulation.noise import NoiseMaker
from speechbrain_mpq.simulation.noisy_speech import NoisySpeech, Voices
from speechbrain_mpq.simulation.rooms import RoomBank


class ASR(sb.Brain):
    """LF-MMI or CTC training."""

    def compute_forward(self, batch, stage):
        """Outputs of the two heads, [batch, frames / 3, outputs].

        Those of training are raw. Elsewhere there is one head, normalized in
        each frame: what LF-MMI and the search make of it is the same, and it
        is a distribution that quantized networks can be compared by.
        """
        batch = batch.to(self.device)
        wavs, wav_lens = batch.sig
        feats = self.hparams.compute_features(wavs)
        feats = self.modules.normalize(feats, wav_lens)
        if stage == sb.Stage.TRAIN:
            feats = self.hparams.augment(feats)
            return self.modules.model(feats, wav_lens, heads=True), wav_lens
        outputs = self.modules.model(feats, wav_lens)
        if self.hparams.ctc:
            outputs = outputs[:, :, : self.hparams.phones]
        return (outputs.log_softmax(2), None), wav_lens

    def loss(self, predictions, batch):
        """LF-MMI or CTC, per frame."""
        (outputs, xent), wav_lens = predictions
        if not self.hparams.ctc:
            return self.lf_mmi(outputs, batch.numerator, wav_lens, xent)
        outputs = outputs[:, :, : self.hparams.phones]
        return self.ctc(outputs.log_softmax(2), batch.phones, wav_lens)

    def compute_objectives(self, predictions, batch, stage):
        """The loss; word errors outside training."""
        loss = self.loss(predictions, batch)
        if stage == sb.Stage.TRAIN:
            return loss
        (outputs, _), wav_lens = predictions
        frames = (wav_lens * outputs.shape[1]).round().long().tolist()
        words = [
            self.words(row[:length])
            for row, length in zip(outputs.float().cpu().numpy(), frames)
        ]
        self.wer_stats.append(
            ids=batch.id,
            predict=words,
            target=[reference.split() for reference in batch.words],
        )
        self.items += [
            {"id": key, "reference": reference, "hypothesis": " ".join(said)}
            for key, reference, said in zip(batch.id, batch.words, words)
        ]
        return loss

    def ctc(self, log_probs, phones, wav_lens):
        """CTC per frame, whose blank is the phone of silence."""
        lengths = (wav_lens * log_probs.shape[1]).round().long()
        total = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor([phone for said in phones for phone in said]),
            lengths,
            torch.tensor([len(said) for said in phones]),
            reduction="sum",
            zero_infinity=True,
        )
        return total / lengths.sum()

    def words(self, outputs):
        """Words of an utterance, [frames, outputs]."""
        graph, labels = self.word_graph
        states, _ = best_path(graph, self.hparams.acoustic_scale * outputs)
        labels = [labels[state] for state in states]
        return [self.vocabulary[i] for i in labels if i is not None]

    def on_fit_batch_start(self, batch, should_step):
        """Set the learning rate and dropout of this step."""
        rate = self.hparams.lr_schedule.calculate_lr(self.optimizer_step)
        self.optimizer.param_groups[0]["lr"] = rate
        progress = self.optimizer_step / self.hparams.training_steps
        dropout = self.hparams.dropout(min(progress, 1.0))
        self.modules.model.set_dropout(dropout)

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Keep the bottlenecks semi-orthogonal."""
        if should_step:
            self.modules.model.constrain()

    def on_stage_start(self, stage, epoch):
        """Count word errors from zero."""
        if stage != sb.Stage.TRAIN:
            self.wer_stats = self.hparams.wer_stats()
            self.items = []

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, and save a checkpoint after each epoch."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        wer = float(self.wer_stats.summarize("WER"))
        stats = {"loss": stage_loss, "WER": wer}
        if stage == sb.Stage.VALID:
            self.hparams.train_logger.log_stats(
                stats_meta={
                    "epoch": epoch,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "left out": len(self.lf_mmi.left_out),
                },
                train_stats={"loss": self.train_loss},
                valid_stats=stats,
            )
            self.checkpointer.save_and_keep_only(
                meta={"WER": wer}, min_keys=["WER"]
            )
            return
        self.hparams.train_logger.log_stats(
            stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
            test_stats=stats,
        )
        with open(self.hparams.wer_file, "w", encoding="utf-8") as fout:
            self.wer_stats.write_stats(fout)


class Supernet(ASR):
    """Training of all candidate bottlenecks, and search for the best ones."""

    def on_fit_batch_start(self, batch, should_step):
        """Draw the candidates of this step as well."""
        super().on_fit_batch_start(batch, should_step)
        self.hparams.bottleneck_search.draw(
            self.modules.model, self.optimizer_step
        )

    def on_stage_start(self, stage, epoch):
        """Validate the largest network."""
        super().on_stage_start(stage, epoch)
        self.hparams.bottleneck_search.widest(self.modules.model)
        use_batch_statistics(self.modules.model, stage != sb.Stage.TRAIN)

    def search(self, held_out):
        """Look for the architecture on utterances that were held out."""
        loader = self.make_dataloader(
            held_out,
            sb.Stage.VALID,
            ckpt_prefix=None,
            batch_size=self.hparams.search_batch_size,
        )

        def batches(epoch):
            # Other noise than in all epochs of the training
            counter = self.hparams.epoch_counter
            counter.current = counter.limit + 1 + epoch
            return loader

        def loss(batch):
            predictions = self.compute_forward(batch, sb.Stage.VALID)
            return self.loss(predictions, batch)

        folder = Path(self.hparams.output_folder)
        self.hparams.bottleneck_search.run(
            self.modules.model, batches, loss, folder, not self.noprogressbar
        )


class Graphs:
    """Graphs of the task, from the lexicon and the training transcripts.

    Arguments
    ---------
    lexicon : Lexicon
        Pronunciations of all words.
    transcripts : dict
        Utterance -> words, of the training set.
    hparams : dict
        phone_order, between_silence, edge_silence, ngram_file, lm_scale and
        ctc.
    """

    def __init__(self, lexicon, transcripts, hparams):
        self.lexicon = lexicon
        self.hparams = hparams
        self.phone_ngram = estimate_ngram(
            [self.lattice(words, key) for key, words in transcripts.items()],
            len(lexicon.phones),
            hparams["phone_order"],
        )
        run_on_main(
            estimate_arpa, args=[hparams["ngram_file"], transcripts.values()]
        )
        ngram = Ngram(hparams["ngram_file"])
        self.vocabulary = ngram.vocabulary
        graph, labels = word_graph(
            lexicon,
            self.vocabulary,
            ngram.bigram(self.vocabulary),
            hparams["lm_scale"],
        )
        if hparams["ctc"]:
            graph = ctc_graph(graph, lexicon.silence)
            labels += [None] * (graph.states - len(labels))
        self.word_graph = graph, labels

    def lattice(self, words, key):
        """Pronunciations of a transcript."""
        return phone_lattice(
            self.lexicon.encode(words.split(), key),
            self.lexicon.silence,
            self.hparams["between_silence"],
            self.hparams["edge_silence"],
            key,
        )

    def numerator(self, words, key):
        """Graph of a transcript."""
        return numerator_graph(self.lattice(words, key), self.phone_ngram, key)


def audio_pipeline(hparams, split, speech):
    """Dynamic item of an utterance as it is heard.

    Arguments
    ---------
    hparams : dict
        noisy, rooms, reverberant_share, snr, seed and epoch_counter are used.
    split : str
        Only in "train" every epoch is different.
    speech : dict
        Manifest of the split.
    """
    takes = sb.utils.data_pipeline.takes("id", "wav")
    provides = sb.utils.data_pipeline.provides("sig")
    if not hparams["noisy"]:
        return takes(provides(lambda _, wav: sb.dataio.dataio.read_audio(wav)))
    bank = RoomBank(hparams["data_folder"], split, hparams["rooms"][split])
    clips = NoisySpeech(
        speech,
        NoiseMaker(Voices(speech), seed=hparams["noise_seed"]),
        snr=hparams["snr"][split],
        seed=hparams["noise_seed"],
        rirs=bank.first_microphone(),
        reverberant_share=hparams["reverberant_share"][split],
    )

    def noisy(key, _):
        epoch = hparams["epoch_counter"].current if split == "train" else 0
        return torch.from_numpy(clips.draw(key, epoch)[0])

    return takes(provides(noisy))


def dataio_prep(hparams):
    """Datasets by name, and the graphs."""
    datasets = {
        split: DynamicItemDataset.from_json(
            Path(hparams["data_folder"]) / f"{split}_speech.json",
            replacements={"data_root": hparams["data_folder"]},
        )
        for split in ("train", "valid", "test")
    }
    path = Path(__file__).parent / hparams["lexicon_file"]
    lexicon = Lexicon.read(path)
    if len(lexicon.phones) != hparams["phones"]:
        raise ValueError(
            f"{path} has {len(lexicon.phones)} phones, silence included, the "
            f"hparams {hparams['phones']}: give --phones {len(lexicon.phones)}"
        )
    entries = datasets["train"].data
    graphs = Graphs(
        lexicon,
        {key: entry["words"] for key, entry in entries.items()},
        hparams,
    )

    @sb.utils.data_pipeline.takes("words", "id")
    @sb.utils.data_pipeline.provides("numerator")
    def numerator_pipeline(words, key):
        return graphs.numerator(words, key)

    @sb.utils.data_pipeline.takes("words", "id")
    @sb.utils.data_pipeline.provides("phones")
    def phones_pipeline(words, key):
        said = graphs.lexicon.encode(words.split(), key)
        return [phone for word in said for phone in word[0]]

    target = phones_pipeline if hparams["ctc"] else numerator_pipeline
    for split, dataset in datasets.items():
        dataset.add_dynamic_item(audio_pipeline(hparams, split, dataset.data))
        dataset.add_dynamic_item(target)
        dataset.set_output_keys(
            ["id", "sig", "words", "phones" if hparams["ctc"] else "numerator"]
        )
    return datasets, graphs


def train_loader_options(dataset, hparams):
    """Batches of utterances of about the same length."""
    sampler = DynamicBatchSampler(
        dataset,
        length_func=lambda entry: entry["length"],
        **hparams["dynamic_batch_sampler"],
    )
    return {"batch_sampler": sampler, **hparams["train_loader_options"]}


def publish(brain, graphs, hparams):
    """Write published/, which HybridASR loads, and the results.

    Arguments
    ---------
    brain : ASR
        After its test.
    graphs : Graphs
    hparams : dict
        output_folder, ngram_file, against and seed are used.
    """
    from speechbrain_mpq.evaluation.recognition_task import RECOGNITION
    from speechbrain_mpq.evaluation.results import Scored, write_results
    from speechbrain_mpq.evaluation.runs import load_metrics
    from speechbrain_mpq.inference.folder import write_card
    from speechbrain_mpq.inference.speech_recognition import save_recognizer
    from speechbrain_mpq.training.choose import system_of

    folder = Path(hparams["output_folder"])
    model = brain.modules.model.without_xent()
    system = {
        **system_of(model, folder),
        "corpus": "embedded",
        "seed": hparams["seed"],
    }
    published = folder / "published"
    if not hparams["ctc"]:
        save_recognizer(model, published, graphs.lexicon, hparams["ngram_file"])
        packed = published / "model.safetensors"
        system["model_bytes"] = packed.stat().st_size
    against = hparams["against"]
    metrics = write_results(
        folder, system, Scored(brain.items), against, task=RECOGNITION
    )
    if not hparams["ctc"]:
        full = load_metrics(f"{against[0]}/metrics.json") if against else None
        write_card(published, metrics=metrics, reference=full, task=RECOGNITION)


def main(arguments):
    """Prepare, train and test."""
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    sb.utils.distributed.ddp_init_group(run_opts)
    sb.create_experiment_directory(
        experiment_directory=hparams["output_folder"],
        hyperparams_to_save=hparams_file,
        overrides=overrides,
    )
    if not hparams["skip_prep"]:
        from speechbrain_mpq.simulation.corpus import prepare_speech
        from speechbrain_mpq.simulation.rooms import prepare_rooms

        run_on_main(
            prepare_speech,
            args=[hparams["data_folder"]],
            kwargs=hparams["utterances"],
        )
        if hparams["noisy"]:
            run_on_main(
                prepare_rooms,
                args=[
                    hparams["data_folder"],
                    hparams["rooms"],
                    hparams["microphones"],
                ],
            )
    data, graphs = dataio_prep(hparams)
    if hparams["search"]:
        hparams["bottleneck_search"].prepare(hparams["model"])
        data["train"], held_out = (
            FilteredSortedDynamicItemDataset(data["train"], keys)
            for keys in hparams["bottleneck_search"].split(data["train"].data)
        )
    brain = (Supernet if hparams["search"] else ASR)(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    denominator = denominator_graph(graphs.phone_ngram)
    brain.lf_mmi = hparams["loss"](denominator).to(brain.device)
    brain.word_graph = graphs.word_graph
    brain.vocabulary = graphs.vocabulary
    brain.fit(
        hparams["epoch_counter"],
        data["train"],
        data["valid"],
        train_loader_kwargs=train_loader_options(data["train"], hparams),
        valid_loader_kwargs=hparams["test_loader_options"],
    )
    if hparams["search"]:
        brain.search(held_out)
        return
    brain.evaluate(
        data["test"],
        min_key="WER",
        test_loader_kwargs=hparams["test_loader_options"],
    )
    run_on_main(publish, args=[brain, graphs, hparams])


if __name__ == "__main__":
    main(sys.argv[1:])
