import pytest
import torch

from qlkernels import linear_logprob
from qlkernels.targets import targets_from_labels


def test_padded_labels_by_hand():
    labels = torch.tensor([[5, 6, -100, 8], [-100, -100, 3, -100]])
    target_ids, mask = targets_from_labels(labels)
    assert target_ids.tolist() == [[6, 0, 8, 0], [0, 3, 0, 0]]
    assert mask.tolist() == [[True, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_labels_do_not_cross_sequences(dtype):
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    cu_seqlens = torch.tensor([0, 0, 2, 2, 5, 6, 6], dtype=dtype)  # some are empty
    target_ids, mask = targets_from_labels(labels, cu_seqlens)
    assert target_ids.tolist() == [2, 0, 4, 5, 0, 0]
    assert mask.tolist() == [True, False, True, True, False, False]


def test_rows_past_the_last_sequence_are_padding():
    target_ids, mask = targets_from_labels(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2]))
    assert mask.tolist() == [True, False, False, False] and target_ids[0] == 2


def test_nothing():
    for labels, cu in (
        (torch.zeros(2, 0, dtype=torch.int64), None),
        (torch.zeros(0, dtype=torch.int64), torch.tensor([0])),
    ):
        target_ids, mask = targets_from_labels(labels, cu)
        assert target_ids.shape == mask.shape == labels.shape


def test_loss_equals_that_of_cross_entropy_on_labels():
    torch.manual_seed(0)
    x, w = torch.randn(2, 7, 16), torch.randn(31, 16)
    labels = torch.randint(31, (2, 7))
    labels[0, :3] = -100
    target_ids, mask = targets_from_labels(labels)
    scores = linear_logprob(x, w, target_ids, row_mask=mask)
    want = torch.nn.functional.cross_entropy(
        (x @ w.t())[:, :-1].reshape(-1, 31), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(-scores.logprobs.sum() / mask.sum(), want)


@pytest.mark.parametrize(
    "labels, cu_seqlens, error",
    [
        (torch.zeros(3, dtype=torch.int64), None, ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 6]), ValueError),
        (torch.zeros(2, 3), None, TypeError),
        (None, None, TypeError),
    ],
)
def test_refusals(labels, cu_seqlens, error):
    with pytest.raises(error, match="labels"):
        targets_from_labels(labels, cu_seqlens)
