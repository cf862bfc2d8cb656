"""Answer scorers and rewards.

score(sample, response).value                    # by rule
score(sample, response, judge=Judge(client))     # the judge where the rule fails
"""

from qwenlong.rewards import rules  # registers the rewards
from qwenlong.rewards.extract import clean_answer, extract_answer, extract_choice, final_text
from qwenlong.rewards.judge import Judge, JudgeError, Verdict, parse_verdict
from qwenlong.rewards.numbers import Number, docmath_match, numbers_match, parse_gold, parse_number
from qwenlong.rewards.registry import (
    Graded,
    Score,
    grade,
    register_reward,
    reward_names,
    score,
    score_many,
)
from qwenlong.rewards.text import (
    cover_match,
    exact_match,
    mrcr_grade,
    needle_recall,
    normalize_answer,
    sequence_ratio,
    sub_em,
    sub_em_loose,
    token_f1,
)
