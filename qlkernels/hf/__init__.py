"""Our ops inside transformers models, through transformers' own registries."""

from qlkernels.hf.attention import packed_groups
