"""SpeechBrain's language models with one matrix for words in and words out.

The input embedding and the output layer share their weights, which are most
of a word model: they are stored, counted and quantized once.
"""

import torch
from speechbrain.lobes.models.RNNLM import RNNLM
from speechbrain.lobes.models.transformer.TransformerLM import TransformerLM
from speechbrain.nnet.RNN import GRU, LSTM

RNNS = {"lstm": LSTM, "gru": GRU}
SPREAD = 0.1  # of the first embeddings, which are output weights as well


class TiedRNNLM(RNNLM):
    """Recurrent language model with tied embeddings.

    Returns logits and hidden states, as SpeechBrain's `RNNLMRescorer` and
    `RNNLMScorer` want them.

    Arguments
    ---------
    vocab : int
        Words and special symbols.
    size : int
        Of the embeddings and of every layer.
    layers : int
    dropout : float
        Of embeddings, between the layers, and before the output layer.
    rnn : str
        "lstm" or "gru".
    vocabulary_sha256 : str
        Checksum of the vocabulary that it was trained with (see
        `Vocabulary.sha256`), which a packed folder has beside it.

    Example
    -------
    >>> model = TiedRNNLM(vocab=10, size=4, layers=1)
    >>> logits, hidden = model(torch.tensor([[1, 5, 9]]))
    >>> logits.shape
    torch.Size([1, 3, 10])
    >>> sum(p.numel() for p in model.parameters())  # 10 x 4, 10, an LSTM
    210
    """

    def __init__(
        self,
        vocab,
        size=256,
        layers=2,
        dropout=0.2,
        rnn="lstm",
        vocabulary_sha256="",
    ):
        if rnn not in RNNS:
            raise ValueError(f"rnn must be one of {tuple(RNNS)}, not {rnn!r}")
        super().__init__(
            output_neurons=vocab,
            embedding_dim=size,
            dropout=dropout,
            rnn_class=RNNS[rnn],
            rnn_layers=layers,
            rnn_neurons=size,
            return_hidden=True,
            dnn_blocks=0,
            dnn_neurons=size,
        )
        self.settings = {
            "vocab": vocab,
            "size": size,
            "layers": layers,
            "dropout": dropout,
            "rnn": rnn,
            "vocabulary_sha256": vocabulary_sha256,
        }
        self.dnn.append(torch.nn.Dropout(dropout), layer_name="dropout")
        torch.nn.init.uniform_(self.embedding.Embedding.weight, -SPREAD, SPREAD)
        self.out.w.weight = self.embedding.Embedding.weight


class TiedTransformerLM(TransformerLM):
    """Transformer language model with tied embeddings.

    Arguments
    ---------
    vocab : int
        Words and special symbols.
    size : int
        Of embeddings and attention.
    layers : int
    heads : int
    width : int
        Of the feed-forward layers.
    dropout : float
    max_length : int
        Longest sequence.
    vocabulary_sha256 : str
        See `TiedRNNLM`.

    Example
    -------
    >>> model = TiedTransformerLM(vocab=10, size=8, layers=1, heads=2, width=8)
    >>> model(torch.tensor([[1, 5, 9]])).shape
    torch.Size([1, 3, 10])
    """

    def __init__(
        self,
        vocab,
        size=192,
        layers=6,
        heads=8,
        width=384,
        dropout=0.1,
        max_length=1000,
        vocabulary_sha256="",
    ):
        super().__init__(
            vocab=vocab,
            d_model=size,
            nhead=heads,
            num_encoder_layers=layers,
            num_decoder_layers=0,
            d_ffn=width,
            dropout=dropout,
            activation=torch.nn.GELU,
            normalize_before=False,
            max_length=max_length,
        )
        self.settings = {
            "vocab": vocab,
            "size": size,
            "layers": layers,
            "heads": heads,
            "width": width,
            "dropout": dropout,
            "max_length": max_length,
            "vocabulary_sha256": vocabulary_sha256,
        }
        embedding = self.custom_src_module.emb.Embedding
        self.output_proj.layers[2].w.weight = embedding.weight

    def make_masks(self, src, *arguments, **options):
        """SpeechBrain's; padding as what is added, as for words ahead."""
        ahead, padding = super().make_masks(src, *arguments, **options)
        if padding is not None:  # PyTorch warns of masks of two kinds
            added = torch.zeros(padding.shape, device=padding.device)
            padding = added.masked_fill(padding, float("-inf"))
        return ahead, padding
