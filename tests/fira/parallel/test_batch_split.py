"""Micro-batches of a global batch."""

import hashlib

import numpy as np
import pytest
import torch

from fira.data.rows import Rows
from fira.nn.cross_entropy import IGNORE_INDEX
from fira.parallel.batch_split import BatchSplit


def read(first: int, count: int) -> Rows:
    """Sequence i consists of 10·i, 10·i + 1, 10·i + 2; the last target of each odd sequence is ignored."""
    tokens = 10 * np.arange(first, first + count)[:, None] + np.arange(3)
    targets = tokens + 1
    targets[np.arange(first, first + count) % 2 == 1, -1] = IGNORE_INDEX
    return Rows(tokens, targets)


def test_each_sequence_is_in_one_microbatch_and_the_rest_is_padding():
    replicas = [BatchSplit(2, 2, rank, 5).batch(read, 7, 5, dropout_seed=3).microbatches for rank in range(2)]
    assert [len(replica) for replica in replicas] == [2, 2]
    ordered = [microbatch for replica in replicas for microbatch in replica]
    inputs = torch.cat([microbatch.inputs for microbatch in ordered])
    tokens, targets, *_ = read(7, 5)
    assert inputs[:5].tolist() == tokens.tolist()
    assert not inputs[5:].any()
    assert torch.cat([m.context.training.targets for m in ordered])[:5].tolist() == targets.tolist()
    assert (torch.cat([m.context.training.targets for m in ordered])[5:] == IGNORE_INDEX).all()
    assert torch.cat([m.context.lengths for m in ordered]).tolist() == [2, 3, 2, 3, 2, 0, 0, 0]
    assert all(m.boundary == (2, 3, 5) for m in ordered)


def test_micro_batches_of_the_replicas_alternate():
    splits = [BatchSplit(2, 2, rank, 5, alternating=True) for rank in range(2)]
    assert [list(split.numbers(5)) for split in splits] == [[0, 2], [1]]
    first, second = (split.batch(read, 7, 5, dropout_seed=3).microbatches for split in splits)
    ordered = [first[0], second[0], first[1], second[1]]
    assert torch.cat([m.inputs for m in ordered])[:5].tolist() == read(7, 5).tokens.tolist()
    assert torch.cat([m.context.lengths for m in ordered]).tolist() == [2, 3, 2, 3, 2, 0, 0, 0]


def test_weights_make_a_mean_over_the_targets_of_the_global_batch():
    (microbatch, *_) = BatchSplit(2, 2, 0, 5).batch(read, 7, 5, dropout_seed=3, loss_scale=8.0).microbatches
    assert microbatch.context.training.loss_weight == 8 / 12
    assert microbatch.context.training.aux_weights.tolist() == pytest.approx([2 * 8 / 12, 3 * 8 / 12])


def test_weights_of_auxiliary_losses_have_the_precision_of_the_parameters():
    split = BatchSplit(2, 2, 0, 5, dtype=torch.float64)
    (microbatch, *_) = split.batch(read, 7, 5, dropout_seed=3).microbatches
    assert microbatch.context.training.aux_weights.tolist() == [2 / 12, 3 / 12]


def test_keys_are_a_hash_of_seed_and_sequence_number():
    (microbatch,) = BatchSplit(2, 1, 0, 5).batch(read, 7, 2, dropout_seed=3).microbatches
    digests = [hashlib.sha256(f"3/{number}".encode()).digest()[:8] for number in (7, 8)]
    assert microbatch.context.keys.tolist() == [int.from_bytes(digest, "little") // 4 for digest in digests]


def test_evaluation_has_neither_keys_nor_auxiliary_weights():
    (microbatch,) = BatchSplit(2, 1, 0, 5).batch(read, 7, 2, dropout_seed=None).microbatches
    assert microbatch.context.keys is None
    assert microbatch.context.training.aux_weights is None


def test_batch_without_targets_has_a_finite_weight():
    empty = Rows(np.zeros((1, 3), int), np.full((1, 3), IGNORE_INDEX))
    (microbatch,), *counts = BatchSplit(1, 1, 0, 5).batch(lambda first, count: empty, 0, 1, dropout_seed=None)
    assert counts == [0, 0]
    assert microbatch.context.training.loss_weight == 1.0


@pytest.mark.parametrize(("sequences", "count"), [(1, 1), (6, 1), (7, 2), (12, 2), (13, 3)])
def test_count_is_rounded_up(sequences, count):
    assert BatchSplit(3, 2, 0, 5).count(sequences) == count


def test_tensors_for_a_gpu_are_copied_from_pinned_memory_without_waiting(monkeypatch):
    """Simulated: pin_memory and copies to the device are recorded."""
    pinned, copied = [], []

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x.clone())
        return pinned[-1]

    def to(x: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        copied.append((any(x is other for other in pinned), non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    (batch,) = BatchSplit(2, 1, 0, 5, torch.device("cuda", 0)).batch(read, 0, 2, dropout_seed=3).microbatches
    assert copied == [(True, True)] * 5  # tokens, lengths, keys, targets, weights of the auxiliary loss
    assert any(batch.inputs is x for x in pinned)  # the engine copies it on the rank of the first stage
    pinned.clear()
    BatchSplit(2, 1, 0, 5, torch.device("cpu")).batch(read, 0, 2, dropout_seed=3)
    BatchSplit(2, 1, 0, 5).batch(read, 0, 2, dropout_seed=3)
    assert not pinned


def test_contexts_are_on_the_device_of_the_split_and_inputs_on_the_cpu():
    (microbatch,) = BatchSplit(2, 1, 0, 5, torch.device("meta")).batch(read, 7, 2, dropout_seed=3).microbatches
    assert microbatch.context.lengths.device.type == "meta"
    assert microbatch.inputs.device.type == "cpu"


def packed(first: int, count: int) -> Rows:
    """Three sequences with documents of 2 and 1, of 1, and of 1, 1 and 1 tokens; two targets are trained."""
    documents = np.array([[0, 0, 1], [0, -1, -1], [0, 1, 2]])
    targets = np.full((3, 3), IGNORE_INDEX)
    targets[0, 1] = targets[2, 2] = 4
    return Rows(np.arange(9).reshape(3, 3), targets, documents)


def test_documents_have_their_own_lengths_keys_and_weights():
    (one, two), *counts = BatchSplit(2, 1, 0, 5).batch(packed, 7, 3, dropout_seed=3, loss_scale=4.0)
    assert counts == [2, 7]
    assert [m.context.training.loss_weight for m in (one, two)] == [2.0, 2.0]
    assert one.context.lengths.tolist() == [3, 1]
    assert one.context.documents.numbers.tolist() == [[0, 0, 1], [0, -1, -1]]
    assert two.context.documents.numbers.tolist() == [[0, 1, 2], [-1, -1, -1]]
    weights = [m.context.training.aux_weights for m in (one, two)]
    np.testing.assert_allclose(weights[0], np.array([[2, 1], [1, 0]]) * 4 / 7, rtol=1e-6)
    np.testing.assert_allclose(weights[1], np.array([[1, 1, 1], [0, 0, 0]]) * 4 / 7, rtol=1e-6)
    digests = [hashlib.sha256(text).digest()[:8] for text in (b"3/7", b"3/7/1", b"3/8", b"3/8/1")]
    keys = [int.from_bytes(digest, "little") // 4 for digest in digests]
    assert one.context.keys.tolist() == [keys[:2], keys[2:]]


def test_one_document_per_sequence_equals_a_sequence_without_documents():
    def single(first: int, count: int) -> Rows:
        return packed(first, count)._replace(documents=np.zeros((3, 3), int))

    (microbatch, _), _, tokens = BatchSplit(2, 1, 0, 5).batch(single, 7, 3, dropout_seed=3)
    assert microbatch.context.documents is None
    assert microbatch.context.lengths.tolist() == [3, 3]  # although the last target is ignored
    assert tokens == 9
    (plain,) = BatchSplit(2, 1, 0, 5).batch(read, 7, 2, dropout_seed=3).microbatches
    assert microbatch.context.keys.tolist() == plain.context.keys.tolist()
