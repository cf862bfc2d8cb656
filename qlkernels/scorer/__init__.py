"""Long-context scoring of a transformers decoder in bounded memory."""

from qlkernels.scorer.decoder import Decoder
from qlkernels.scorer.memory import MemoryEstimate, NotEnoughMemory, estimate_memory
from qlkernels.scorer.scorer import Scorer
