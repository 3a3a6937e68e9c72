"""The data room: text and synthetic recall as batches, and held-out windows with evidence distances."""

from __future__ import annotations

from simba_lab.data.associations import MultiQueryRecall, Needle
from simba_lab.data.compression import xz_bits_per_byte
from simba_lab.data.corpus import Corpus, CorpusSettings, open_corpus
from simba_lab.data.document import Document
from simba_lab.data.drills import DrillData
from simba_lab.data.evidence import (
    evidence_distance,
    evidence_groups,
    find_last_occurrence,
    group_bounds,
    is_far,
)
from simba_lab.data.recall import RecallData, RecallExamples
from simba_lab.data.recall_text import ANSWERS, Fact, draw_facts, weave
from simba_lab.data.shards import Shard
from simba_lab.data.sources import load_documents
from simba_lab.data.split import split_documents
from simba_lab.data.text import TextData
from simba_lab.data.tokenizer import Tokenizer, bytes_tokenizer, train_bpe
from simba_lab.data.windows import EvalWindows, TrainingWindows, cut_eval_windows

__all__ = [
    "ANSWERS",
    "Corpus",
    "CorpusSettings",
    "Document",
    "DrillData",
    "EvalWindows",
    "Fact",
    "MultiQueryRecall",
    "Needle",
    "RecallData",
    "RecallExamples",
    "Shard",
    "TextData",
    "Tokenizer",
    "TrainingWindows",
    "bytes_tokenizer",
    "cut_eval_windows",
    "draw_facts",
    "evidence_distance",
    "evidence_groups",
    "find_last_occurrence",
    "group_bounds",
    "is_far",
    "load_documents",
    "open_corpus",
    "split_documents",
    "train_bpe",
    "weave",
    "xz_bits_per_byte",
]
