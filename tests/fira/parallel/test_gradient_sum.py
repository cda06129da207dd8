"""The buckets in which gradients are reduced. `tests/integration/test_parity.py` tests the sums."""

import torch

from fira.parallel.gradient_sum import BUCKET, buckets


def sizes_of(tensors: list[torch.Tensor]) -> list[int]:
    slices = buckets(tensors)
    assert [i for bucket in slices for i in range(bucket.start, bucket.stop)] == list(range(len(tensors)))
    return [bucket.stop - bucket.start for bucket in slices]


def test_buckets_keep_order_and_are_complete_at_their_size():
    assert sizes_of([torch.empty(size // 4) for size in (BUCKET // 2, BUCKET // 4, BUCKET // 4, 4, BUCKET, 8)]) == [
        3,
        2,
        1,
    ]
    assert sizes_of([]) == []


def test_bucket_with_one_byte_less_than_its_size_is_not_complete():
    sizes = (BUCKET, BUCKET - 1, 1, 1)
    assert sizes_of([torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]) == [1, 2, 1]


def test_buckets_are_split_by_device():
    on_meta = [torch.empty(2, device="meta") for _ in range(2)]
    assert sizes_of([torch.empty(2), *on_meta, torch.empty(2)]) == [1, 2, 1]
