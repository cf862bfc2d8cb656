"""Long-context scoring of a transformers decoder in bounded memory."""

from qlkernels.scorer.decoder import Decoder
from qlkernels.scorer.scorer import Scorer
