"""Stages of a recipe that trains a hybrid recognizer by LF-MMI.

A recipe prepares manifests, `<name>_speech.json` of its data folder (utterance
-> "wav", "length" in seconds and "words"), and a lexicon; all else is here: the
phone n-gram of the denominator, rooms and noise put to the speech while it is
needed, training from scratch, the search for words, N-best lists, results and
`published/`.
"""

import shutil
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.dataio.dataset import (
    DynamicItemDataset,
    FilteredSortedDynamicItemDataset,
)
from speechbrain.dataio.sampler import DynamicBatchSampler
from speechbrain.utils.distributed import run_on_main
from speechbrain.utils.logger import get_logger

from ..allocation.sharing import leave
from ..decoders.chain_graphs import (
    denominator_graph,
    estimate_ngram,
    numerator_graph,
    phone_lattice,
)
from ..decoders.kaldi_decoder import WordDecoder
from ..decoders.nbest import NBest, write_nbest
from ..decoders.ngram import Ngram, estimate_arpa
from ..decoders.viterbi import ExactDecoder
from ..decoders.vocabulary import Lexicon
from ..evaluation.results import Scored, write_results
from ..evaluation.runs import load_metrics
from ..evaluation.wer import oracle_errors
from ..evaluation.word_tasks import RECOGNITION
from ..inference.folder import write_card
from ..inference.speech_recognition import check_lexicon, save_recognizer
from ..locks import hold_results
from ..quantization.packing import MODEL_FILE, read_model
from ..simulation.augmentation import NoisySpeech, Reverberation, Voices
from ..simulation.noise import NoiseMaker
from ..simulation.rooms import RoomBank
from ..training.checkpoints import check_same_network, load_best_
from ..training.choose import system_of
from ..training.hparams_source import HparamsSource
from ..utils import write_text
from .bottleneck_search import use_batch_statistics

logger = get_logger(__name__)


class HybridRecognition(sb.Brain):
    """LF-MMI or CTC training, and a search for words.

    `make_brain` sets `lf_mmi`, the loss, and `word_search`, a WordSearch.
    """

    word_search = None

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
        lengths = (wav_lens * outputs.shape[1]).round().long()
        self.name_too_short(batch.id, batch.phones, lengths.tolist())
        return self.ctc(outputs.log_softmax(2), batch.phones, lengths)

    def compute_objectives(self, predictions, batch, stage):
        """The loss, but in the test; word errors, but in training.

        A beam search takes long where a network knows little yet: validation
        goes without. Words of a test may have no pronunciation.
        """
        exact, loss = self.word_search.exact, torch.zeros(())
        if stage != sb.Stage.TEST:
            loss = self.loss(predictions, batch)
        if stage == sb.Stage.TEST or (stage == sb.Stage.VALID and exact):
            (outputs, _), wav_lens = predictions
            frames = (wav_lens * outputs.shape[1]).round().long().tolist()
            rows = outputs.float().cpu().numpy()
            for i, length in enumerate(frames):
                self.recognize(batch.id[i], batch.words[i], rows[i, :length])
        return loss

    def name_too_short(self, keys, phones, lengths):
        """Log the utterances that CTC cannot align, as LF-MMI does: once."""
        left_out = self.lf_mmi.left_out
        for key, row, frames in zip(keys, phones, lengths):
            # Equal neighbours have a blank between them
            needed = len(row) + sum(a == b for a, b in zip(row, row[1:]))
            if needed > frames and key not in left_out:
                left_out[key] = f"{needed} frames at least, {frames} there"
                logger.warning(
                    "CTC leaves out utterance %s: %s", key, left_out[key]
                )

    def ctc(self, log_probs, phones, lengths):
        """CTC per frame, whose blank is the phone of silence."""
        total = torch.nn.functional.ctc_loss(
            log_probs.transpose(0, 1),
            torch.tensor(
                [phone for pronunciation in phones for phone in pronunciation]
            ),
            lengths,
            torch.tensor([len(pronunciation) for pronunciation in phones]),
            reduction="sum",
            zero_infinity=True,
        )
        return total / lengths.sum()

    def recognize(self, key, reference, outputs):
        """Search the words of one utterance, [frames, outputs]."""
        hypotheses = self.word_search(outputs, key)
        words = hypotheses.hypotheses[0]
        self.lists.append(hypotheses)
        self.wer_stats.append(
            ids=[key], predict=[words.split()], target=[reference.split()]
        )
        self.items.append(
            {"id": key, "reference": reference, "hypothesis": words}
        )

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
            self.items, self.lists = [], []

    def on_stage_end(self, stage, stage_loss, epoch):
        """Log, and save a checkpoint after each epoch."""
        if stage == sb.Stage.TRAIN:
            self.train_loss = stage_loss
            return
        stats = {}
        if self.items:
            stats["WER"] = float(self.wer_stats.summarize("WER"))
        if stage == sb.Stage.VALID:
            stats["loss"] = stage_loss
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
                meta=stats, min_keys=[self.word_search.criterion]
            )
            return
        self.hparams.train_logger.log_stats(
            stats_meta={"epoch loaded": self.hparams.epoch_counter.current},
            test_stats=stats,
        )


class Supernet(HybridRecognition):
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


class WordSearch:
    """Words of a network's outputs: exact, or by a beam search.

    Arguments
    ---------
    lexicon : Lexicon
    ngram : Ngram
    hparams : dict
        nbest (0: the exact search of the whole graph, one-best; else the
        hypotheses of a list), beams, lm_scale, acoustic_scale and ctc.
    """

    def __init__(self, lexicon, ngram, hparams):
        self.count = hparams["nbest"]
        self.exact = not self.count
        self.criterion = _criterion(hparams)
        scales = {k: hparams[k] for k in ("acoustic_scale", "lm_scale")}
        if self.exact:
            ctc = hparams["ctc"]
            self.decoder = ExactDecoder(lexicon, ngram, **scales, ctc=ctc)
            return
        if hparams["ctc"]:
            raise ValueError(
                "N-best lists are those of LF-MMI: give --nbest 0 with --ctc"
            )
        self.decoder = WordDecoder(lexicon, ngram, **scales, **hparams["beams"])

    def __call__(self, outputs, key):
        """N-best list of an utterance, [frames, outputs]."""
        if not self.exact:
            return self.decoder.nbest(outputs, self.count, key)
        words, score = self.decoder(outputs)
        return NBest(key, [" ".join(words)], [score])


def _criterion(hparams):
    """What the best checkpoint has least of."""
    return "loss" if hparams["nbest"] else "WER"


class Graphs:
    """Graphs of the task, from the lexicon and the training transcripts.

    Arguments
    ---------
    lexicon : Lexicon
        Pronunciations of all words.
    transcripts : dict
        Utterance -> words, of the training set.
    hparams : dict
        phone_order, between_silence, edge_silence, ngram_file (estimated from
        the transcripts if it is not there) and what WordSearch takes.
    """

    def __init__(self, lexicon, transcripts, hparams):
        self.lexicon = lexicon
        self.hparams = hparams
        self.phone_ngram = estimate_ngram(
            [self.lattice(words, key) for key, words in transcripts.items()],
            len(lexicon.phones),
            hparams["phone_order"],
        )
        path = Path(hparams["ngram_file"])
        if not path.is_file():
            run_on_main(estimate_arpa, args=[path, transcripts.values()])
        ngram = Ngram(path)
        lexicon.check_vocabulary(ngram.vocabulary)
        self.vocabulary = ngram.vocabulary
        self.word_search = WordSearch(lexicon, ngram, hparams)

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


def audio_pipeline(hparams, name, speech, noisy):
    """Dynamic item of an utterance as it is heard.

    Arguments
    ---------
    hparams : dict
        rooms, reverberant_share, snr, noise_seed and epoch_counter are used;
        manifests that these do not name are as "test" is.
    name : str
        Only in "train" every epoch is different.
    speech : dict
        Manifest.
    noisy : bool
        Whether rooms and noise are put to it.
    """
    takes = sb.utils.data_pipeline.takes("id", "wav")
    provides = sb.utils.data_pipeline.provides("sig")
    if not noisy:
        return takes(provides(lambda _, wav: sb.dataio.dataio.read_audio(wav)))
    split = name if name in hparams["rooms"] else "test"
    bank = RoomBank(hparams["data_folder"], split, hparams["rooms"][split])
    clips = NoisySpeech(
        speech,
        NoiseMaker(Voices(speech), seed=hparams["noise_seed"]),
        snr=hparams["snr"][split],
        seed=hparams["noise_seed"],
        reverberation=Reverberation(
            bank.first_microphone(), hparams["reverberant_share"][split]
        ),
    )

    def draw(key, _):
        epoch = hparams["epoch_counter"].current if name == "train" else 0
        return torch.from_numpy(clips.draw(key, epoch)[0])

    return takes(provides(draw))


def load_data(hparams):
    """Datasets by name, and the graphs.

    Returns
    -------
    datasets : dict
        "train", "valid" and the names of test_sets.
    graphs : Graphs
    """
    sets = {
        split: {"speech": split, "noisy": hparams["noisy"]}
        for split in ("train", "valid")
    }
    sets |= hparams["test_sets"]
    datasets = {
        name: DynamicItemDataset.from_json(
            Path(hparams["data_folder"]) / f"{options['speech']}_speech.json",
            replacements={"data_root": hparams["data_folder"]},
        )
        for name, options in sets.items()
    }
    lexicon = Lexicon.read(hparams["lexicon_file"])
    if len(lexicon.phones) != hparams["phones"]:
        raise ValueError(
            f"{hparams['lexicon_file']} has {len(lexicon.phones)} phones, "
            f"silence included, the hparams {hparams['phones']}: give "
            f"--phones {len(lexicon.phones)}"
        )
    entries = datasets["train"].data
    graphs = Graphs(
        lexicon,
        {key: entry["words"] for key, entry in entries.items()},
        hparams,
    )
    for key, entry in datasets["valid"].data.items():
        graphs.lattice(entry["words"], key)  # an error now, not after an epoch
    target = _target(graphs, hparams["ctc"])
    for name, dataset in datasets.items():
        options = sets[name]
        dataset.add_dynamic_item(
            audio_pipeline(
                hparams, options["speech"], dataset.data, options["noisy"]
            )
        )
        keys = ["id", "sig", "words"]
        if name in ("train", "valid"):
            dataset.add_dynamic_item(target)
            keys.append("phones" if hparams["ctc"] else "numerator")
        dataset.set_output_keys(keys)
    return datasets, graphs


def _target(graphs, ctc):
    """Dynamic item of what the loss compares with."""

    @sb.utils.data_pipeline.takes("words", "id")
    @sb.utils.data_pipeline.provides("numerator")
    def numerator_pipeline(words, key):
        return graphs.numerator(words, key)

    @sb.utils.data_pipeline.takes("words", "id")
    @sb.utils.data_pipeline.provides("phones")
    def phones_pipeline(words, key):
        phones = graphs.lexicon.encode(words.split(), key)
        return [phone for word in phones for phone in word[0]]

    return phones_pipeline if ctc else numerator_pipeline


def make_brain(graphs, hparams, run_opts):
    """The Brain with its loss and its search for words."""
    brain = (Supernet if hparams["search"] else HybridRecognition)(
        modules=hparams["modules"],
        opt_class=hparams["optimizer"],
        hparams=hparams,
        run_opts=run_opts,
        checkpointer=hparams["checkpointer"],
    )
    denominator = denominator_graph(graphs.phone_ngram)
    brain.lf_mmi = hparams["loss"](denominator).to(brain.device)
    brain.word_search = graphs.word_search
    return brain


def train_loader_options(dataset, hparams):
    """Batches of utterances of about the same length."""
    sampler = DynamicBatchSampler(
        dataset,
        length_func=lambda entry: entry["length"],
        **hparams["dynamic_batch_sampler"],
    )
    return {"batch_sampler": sampler, **hparams["train_loader_options"]}


def score(brain, datasets, hparams):
    """Recognize every test set; word errors, references and N-best lists.

    Returns
    -------
    dict of str -> list of dict
        Test set -> items of `evaluation.recognition_task`.
    """
    folder, items = Path(hparams["output_folder"]), {}
    for name in hparams["test_sets"]:
        brain.evaluate(
            datasets[name],
            min_key=brain.word_search.criterion,
            test_loader_kwargs=hparams["test_loader_options"],
        )
        items[name] = brain.items
        run_on_main(_write_words, args=[brain, folder, name])
    return items


def _write_words(brain, folder, name):
    """Alignments of a test set, and its lists if there are any."""
    with open(folder / f"wer_{name}.txt", "w", encoding="utf-8") as fout:
        brain.wer_stats.write_stats(fout)
    if brain.word_search.exact:
        return
    write_nbest(folder / f"{name}_nbest.json", brain.lists)
    lines = [f"{item['id']} {item['reference']}" for item in brain.items]
    write_text(folder / f"{name}_refs.txt", "\n".join(lines) + "\n")
    pairs = [
        (item["reference"], nbest.hypotheses)
        for item, nbest in zip(brain.items, brain.lists)
    ]
    logger.info("%s: oracle WER %.2f %%", name, oracle_errors(pairs).rate)


def publish(brain, graphs, items, hparams):
    """Write published/, which HybridASR loads, and the results.

    Arguments
    ---------
    brain : HybridRecognition
    graphs : Graphs
    items : dict
        Of `score`. Results of one test set are in the output folder, those of
        several in folders of their names; the card has those of the first.
    hparams : dict
        output_folder, ngram_file, against, corpus, seed and, of a network in
        full precision, system are used.
    """
    folder, against = Path(hparams["output_folder"]), hparams["against"]
    model = brain.modules.model.without_xent()
    system = {
        **system_of(model, folder),
        "corpus": hparams["corpus"],
        "seed": hparams["seed"],
    }
    if system["system"] == "fp32":
        system["system"] = hparams.get("system", "fp32")
    published = folder / "published"
    if not hparams["ctc"]:
        lexicon = graphs.lexicon.of(graphs.vocabulary)
        save_recognizer(model, published, lexicon, hparams["ngram_file"])
        packed = published / "model.safetensors"
        system["model_bytes"] = packed.stat().st_size
    for name, scored in items.items():
        several = len(items) > 1
        where = Path(name if several else "")
        (folder / where).mkdir(exist_ok=True)
        others = [Path(other) / where for other in against]
        if several:
            system["corpus"] = f"{hparams['corpus']}, {name}"
        metrics = write_results(
            folder / where,
            system,
            Scored(scored),
            others,
            task=RECOGNITION,
        )
        if hparams["ctc"] or name != next(iter(items)):
            continue
        full = load_metrics(others[0] / "metrics.json") if others else None
        write_card(published, metrics=metrics, reference=full, task=RECOGNITION)


def _begin(hparams):
    """The search, if there is one, with the network as training begins."""
    model = hparams["model"]
    search = hparams["bottleneck_search"] if hparams["search"] else None
    if search:
        search.prepare(model)
    options = "the options of that training (--search, --bottlenecks, --size)"
    begin, key = hparams["start_from"], _criterion(hparams)
    if begin and Path(begin, MODEL_FILE).is_file():
        # What is published lacks the second head, which begins afresh
        bare = model.without_xent()
        load_best_(bare, begin, f"give {options}")
        model.load_state_dict(bare.state_dict(), strict=False)
        about = read_model(begin).architecture or {"arguments": {}}
        model.settings["phones"] = about["arguments"].get("phones")
    elif begin:
        load_best_(model, begin, f"give {options}", "model", key)
    fix = f"give another --output_folder, or {options}"
    check_same_network(model, hparams["checkpointer"], fix, "model")
    return search


def run(arguments, prepare, script):
    """Prepare, train and test: the main of a recipe.

    Arguments
    ---------
    arguments : list of str
        Command line: hparams file, which may name a `base`, and overrides.
    prepare : callable
        Given the hparams; makes what skip_prep is about.
    script : str
        The recipe's file, kept with the results. A lexicon_file without folder
        is beside it.
    """
    hparams_file, run_opts, overrides = sb.parse_arguments(arguments)
    source = HparamsSource(hparams_file, overrides)
    hparams = source.read()
    search = _begin(hparams)
    sb.utils.distributed.ddp_init_group(run_opts)
    folder = Path(hparams["output_folder"])
    hold_results(folder)
    sb.create_experiment_directory(folder)
    resolved = [folder / "hyperparams.yaml", source.written()]
    run_on_main(write_text, args=resolved)
    run_on_main(shutil.copy, args=[script, folder])
    if not hparams["skip_prep"]:
        prepare(hparams)
    if Path(hparams["lexicon_file"]).parent == Path():
        beside = Path(script).with_name(hparams["lexicon_file"])
        hparams["lexicon_file"] = beside
    datasets, graphs = load_data(hparams)
    if hparams["model"].settings["phones"]:  # of what training begins with
        check_lexicon(hparams["model"], graphs.lexicon)
    if search:
        train = datasets["train"]
        datasets["train"], held_out = (
            FilteredSortedDynamicItemDataset(train, keys)
            for keys in search.split(train.data)
        )
    brain = make_brain(graphs, hparams, run_opts)
    brain.fit(
        hparams["epoch_counter"],
        datasets["train"],
        datasets["valid"],
        train_loader_kwargs=train_loader_options(datasets["train"], hparams),
        valid_loader_kwargs=hparams["test_loader_options"],
    )
    if search:
        brain.search(held_out)
        return
    items = score(brain, datasets, hparams)
    run_on_main(publish, args=[brain, graphs, items, hparams])
    leave()
