"""Training: the network that serves, with gradients. Pre-training and fine-tuning.

`loop` has the steps (AdamW, warm-up and cosine, clipping, accumulation, data parallelism; it stops
and resumes). `pretrain`, `generate`, `classify` and `seq2seq` each have a loss and its data;
`folder` writes Hugging Face folders. The network is `model.transformer`: there is no second one.
"""


class TrainingError(ValueError):
    """Data or options that cannot be trained with, in one line."""
