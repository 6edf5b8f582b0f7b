"""Tiny folders that SpeechBrain's from_hparams loads, with random weights."""

import torch
from hyperpyyaml import load_hyperpyyaml

PRETRAINER = """
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
"""

FEATURES = """
sample_rate: 16000
compute_features: !new:speechbrain.lobes.features.Fbank
    n_mels: 8
"""

CTC = """
layers: !new:speechbrain.nnet.containers.LengthsCapableSequential
    - !new:speechbrain.nnet.RNN.LSTM
        input_size: 8
        hidden_size: 12
    - !new:speechbrain.nnet.linear.Linear
        input_size: 12
        n_neurons: 5
log_softmax: !new:speechbrain.nnet.activations.Softmax
    apply_log: True
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !ref <compute_features>
    layers: !ref <layers>
    log_softmax: !ref <log_softmax>
modules:
    encoder: !ref <encoder>  # a comment that stays
tokenizer: !new:speechbrain.dataio.encoder.CTCTextEncoder
decoding_function: !name:speechbrain.decoders.ctc_greedy_decode
    blank_id: 0
"""

ATTENTION = """
layers: !new:speechbrain.nnet.RNN.LSTM
    input_size: 8
    hidden_size: 12
embedding: !new:speechbrain.nnet.embedding.Embedding
    num_embeddings: 5
    embedding_dim: 4
attention: !new:speechbrain.nnet.RNN.AttentionalRNNDecoder
    enc_dim: 12
    input_size: 4
    rnn_type: gru
    attn_type: content
    hidden_size: 10
    attn_dim: 6
    num_layers: 1
output: !new:speechbrain.nnet.linear.Linear
    input_size: 10
    n_neurons: 5
model: !new:torch.nn.ModuleList
    - [!ref <layers>, !ref <embedding>, !ref <attention>, !ref <output>]
encoder: !new:speechbrain.nnet.containers.LengthsCapableSequential
    compute_features: !ref <compute_features>
    layers: !ref <layers>
decoder: !new:speechbrain.decoders.S2SRNNGreedySearcher
    embedding: !ref <embedding>
    decoder: !ref <attention>
    linear: !ref <output>
    bos_index: 0
    eos_index: 0
    min_decode_ratio: 0.0
    max_decode_ratio: 0.1
modules:
    encoder: !ref <encoder>
    decoder: !ref <decoder>
tokenizer: !new:tokenizer_of_the_test.Letters
"""

CLASSES = """
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: sentence
embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
    input_size: 8
    channels: [8, 8, 8, 8, 24]
    kernel_sizes: [5, 3, 3, 3, 1]
    dilations: [1, 2, 3, 4, 1]
    attention_channels: 4
    res2net_scale: 2
    se_channels: 4
    lin_neurons: 6
classifier: !new:speechbrain.lobes.models.ECAPA_TDNN.Classifier
    input_size: 6
    out_neurons: 3
modules:
    compute_features: !ref <compute_features>
    mean_var_norm: !ref <normalize>
    embedding_model: !ref <embedding_model>
    classifier: !ref <classifier>
label_encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
"""

SEPARATION = """
sample_rate: 16000
num_spks: 2
encoder: !new:speechbrain.lobes.models.dual_path.Encoder
    kernel_size: 16
    out_channels: 8
block: !new:speechbrain.lobes.models.dual_path.SBTransformerBlock
    num_layers: 1
    d_model: 8
    nhead: 2
    d_ffn: 16
masknet: !new:speechbrain.lobes.models.dual_path.Dual_Path_Model
    num_spks: 2
    in_channels: 8
    out_channels: 8
    num_layers: 1
    K: 20
    intra_model: !ref <block>
    inter_model: !ref <block>
    norm: ln
decoder: !new:speechbrain.lobes.models.dual_path.Decoder
    in_channels: 8
    out_channels: 1
    kernel_size: 16
    stride: 8
    bias: False
modules:
    encoder: !ref <encoder>
    masknet: !ref <masknet>
    decoder: !ref <decoder>
"""

TOKENIZER = """
class Letters:
    def decode_ids(self, ids):
        return " ".join("_abcd"[i] for i in ids)
"""


def write_source(folder, hparams, loadables, others=()):
    """A folder that from_hparams loads, with random weights."""
    names = (*loadables, *others)
    lines = "".join(f"        {name}: !ref <{name}>\n" for name in names)
    text = hparams + PRETRAINER + lines
    folder.mkdir()
    (folder / "hyperparams.yaml").write_text(text)
    torch.manual_seed(0)
    loaded = load_hyperpyyaml(text)
    for name in loadables:
        torch.save(loaded[name].state_dict(), folder / f"{name}.ckpt")
    for name in others:
        labels = list("_abc ") if "tokenizer" in name else ["x", "y", "z"]
        loaded[name].update_from_iterable(labels, sequence_input=False)
        loaded[name].save(folder / f"{name}.ckpt")
