import pytest
import torch

from qlkernels.prefix_group import pack_groups


def two_groups():
    """P = 4 with answers of 3, 0 and 1 tokens; P = 1 (no prefix rows) with an answer of 2."""
    return pack_groups([[1, 2, 3, 4], [9]], [[[10, 11, 12], [], [20]], [[30, 31]]])


def test_layout_by_hand():
    layout = two_groups()
    #                       prefix     answer 0   2    answer 3
    assert layout.input_ids.tolist() == [1, 2, 3, 4, 10, 11, 4, 9, 30]
    assert layout.target_ids.tolist() == [2, 3, 4, 10, 11, 12, 20, 30, 31]
    assert layout.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 3, 0, 1]
    assert layout.cu_seqlens.tolist() == [0, 3, 6, 6, 7, 7, 9]
    assert layout.prefix_of.tolist() == [0, 0, 0, 0, 4, 4]
    assert layout.group_of.tolist() == [0, 0, 0, 0, 1, 1]
    assert layout.answer_of.tolist() == [-1, 0, 1, 2, -1, 3]
    assert layout.segment_of.tolist() == [0, 0, 0, 1, 1, 1, 3, 5, 5]
    assert layout.is_answer.tolist() == [False] * 3 + [True] * 4 + [True] * 2
    assert layout.prompt_lengths == (4, 1)
    assert layout.answer_lengths == ((3, 0, 1), (2,))
    assert (layout.num_groups, layout.num_answers, layout.max_answer_length) == (2, 4, 3)
    assert layout.max_seqlen == 3
    assert layout.num_full_tokens == (4 + 3 - 1) + (4 - 1) + (4 + 1 - 1) + (1 + 2 - 1)
    first, second = layout.spans()
    assert first == (0, 3, 7, (3, 0, 1)) and second == (7, 7, 9, (2,))


def test_dtypes():
    layout = two_groups()
    for name in ("input_ids", "position_ids", "target_ids", "segment_of", "answer_rows"):
        assert getattr(layout, name).dtype == torch.int64, name
    for name in ("cu_seqlens", "prefix_of", "group_of", "answer_of"):
        assert getattr(layout, name).dtype == torch.int32, name
    assert layout.is_answer.dtype == torch.bool


def test_every_row_scores_the_token_that_the_full_sequence_scores():
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, (P,), generator=g) for P in (1, 2, 7)]
    answers = [[torch.randint(100, (R,), generator=g) for R in Rs] for Rs in ([3, 5], [], [0, 4])]
    layout = pack_groups(prompts, answers)
    full = [
        torch.cat([prompt, answer])
        for prompt, group in zip(prompts, answers, strict=True)
        for answer in group
    ]
    for t, segment in enumerate(layout.segment_of.tolist()):
        a, group = int(layout.answer_of[segment]), int(layout.group_of[segment])
        sequence = prompts[group] if a < 0 else full[a]
        position = int(layout.position_ids[t])
        assert layout.input_ids[t] == sequence[position]
        assert layout.target_ids[t] == sequence[position + 1]


def test_gather_and_scatter_by_hand():
    layout = two_groups()
    values = torch.arange(9.0)
    values[:3] = torch.nan  # prefix rows are not read
    padded = layout.gather_answers(values)
    assert padded.tolist() == [[3.0, 4.0, 5.0], [0.0] * 3, [6.0, 0.0, 0.0], [7.0, 8.0, 0.0]]
    mask = layout.answer_mask()
    assert mask.int().tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    padded[~mask] = torch.nan  # nor is the padding
    assert layout.scatter_answers(padded).tolist() == [0.0, 0.0, 0.0, 3, 4, 5, 6, 7, 8]
    advantages = torch.tensor([1.0, torch.nan, -2.0, 3.0])
    spread = layout.spread_answers(advantages)
    assert spread.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, -2.0, 3.0, 3.0]
    assert layout.gather_answers(layout.target_ids).tolist() == [
        [10, 11, 12], [0, 0, 0], [20, 0, 0], [30, 31, 0],
    ]  # fmt: skip


def test_gather_and_scatter_are_differentiable():
    layout = two_groups()
    values = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    per_answer = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.gather_answers, values)
    assert torch.autograd.gradcheck(layout.scatter_answers, padded)
    assert torch.autograd.gradcheck(layout.spread_answers, per_answer)


@pytest.mark.parametrize("groups", [([], []), ([[5]], [[]]), ([[5]], [[[]]]), ([[5, 6]], [[]])])
def test_almost_nothing(groups):
    layout = pack_groups(*groups)
    T = sum(len(p) - 1 for p in groups[0])
    assert layout.input_ids.shape == (T,) and layout.cu_seqlens[-1] == T
    assert layout.answer_mask().shape == (layout.num_answers, 0)
    padded = layout.gather_answers(torch.randn(T, 3))
    assert padded.shape == (layout.num_answers, 0, 3)
    assert layout.scatter_answers(padded).tolist() == [[0.0] * 3] * T
    assert layout.spread_answers(torch.ones(layout.num_answers)).tolist() == [0.0] * T


def test_lists_and_tensors_give_the_same():
    lists = two_groups()
    tensors = pack_groups(
        [torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([9])],
        [[torch.tensor([10, 11, 12]), torch.tensor([]), [20]], [[30, 31]]],
    )
    assert torch.equal(lists.input_ids, tensors.input_ids)
    assert torch.equal(lists.target_ids, tensors.target_ids)
    assert torch.equal(lists.answer_slots, tensors.answer_slots)


def test_to_moves_every_tensor():
    moved = two_groups().to("meta")
    tensors = [x for x in vars(moved).values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == 11 and all(x.device.type == "meta" for x in tensors)
    assert moved.spans() == two_groups().spans()
    with pytest.raises(ValueError, match=r"is on cpu, but the layout is on meta.*layout.to"):
        moved.gather_answers(torch.zeros(9))


@pytest.mark.parametrize(
    "prompts, answers, error, words",
    [
        ([[]], [[[1]]], ValueError, r"prompts\[0\] is empty"),
        ([[1], [2]], [[[1]]], ValueError, "2 prompts but answers of 1 groups"),
        ([[[1, 2]]], [[]], ValueError, r"prompts\[0\] must be 1-D"),
        ([[1]], [[[1.5]]], TypeError, r"answers\[0\]\[0\] must hold integers"),
        ([[1]], [[torch.tensor([True])]], TypeError, "a mask"),
        ([["a"]], [[]], TypeError, "must hold token ids"),
        ([torch.zeros(1, device="meta")], [[torch.zeros(1)]], ValueError, "several devices"),
    ],
)
def test_wrong_groups(prompts, answers, error, words):
    with pytest.raises(error, match=words):
        pack_groups(prompts, answers)


def test_wrong_values():
    layout = two_groups()
    with pytest.raises(ValueError, match=r"values must be \[T, ...\] with leading sizes \(9,\)"):
        layout.gather_answers(torch.zeros(8))
    with pytest.raises(ValueError, match=r"leading sizes \(4, 3\)"):
        layout.scatter_answers(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"\[A, ...\]"):
        layout.spread_answers(torch.zeros(3))
