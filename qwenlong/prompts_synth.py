"""Prompts of the data synthesis, named. Filled by ``qwenlong.prompts.fill``.

Replies are JSON, so that one reader (``qwenlong.data.extract.parse_json``) serves all. The task
types of the proposer, the history buffer and the closed-book screen follow what arXiv 2512.12967,
section 3, and its relative SPELL describe, in our own words.
"""

from __future__ import annotations

# --- tables ------------------------------------------------------------------

TABLE_QUESTION = """A table is spread over several documents. You write one question about it that \
only a calculation over its rows can answer.

Table {table}, one row for each {entity}:
{schema}

The documents at hand are those {place}. A few of their rows:
{rows}

Write one question of this kind: {kind}
Rules:
1. Name every one of the documents in the question, as they are named above.
2. The answer is one number or one name, and only one answer is right.
3. Do not mention tables, columns, rows or SQL. Do not give the answer.
4. Say which quantity is asked for; its unit goes into the field "unit" ("" for a count or a name).

Reply with JSON alone: {"question": "...", "unit": "..."}"""

TABLE_KINDS = {
    "aggregation": "a total, an average, a count or an extreme over the documents",
    "calculation": "a difference, a ratio, a share or a range computed from several figures",
    "temporal": "a comparison or a growth between periods",
    "ranking": "the name or the value at a certain place of an order",
    "multi_step": "two steps, where the second uses the result of the first",
}

TABLE_SQL = """Translate a question into one SQLite query.

Table {table}, one row for each {entity}:
{schema}

The column {partition} says which document a row comes from. Its values in the documents at hand: \
{values}

Question: {question}

Rules:
1. One SELECT (WITH is allowed) that returns one row with one column: the answer.
2. Select the documents that the question names by {partition}. Use the columns above alone.
3. NULL means that a value is not known: leave such rows out of every calculation.
4. Do not round. A division of whole numbers needs "* 1.0". A share or growth in percent is \
multiplied by 100.
5. Only these functions: COUNT, SUM, AVG, MIN, MAX, ABS, COALESCE, CASE, LENGTH, SUBSTR, INSTR, \
RANK, ROW_NUMBER, LAG, LEAD.

Reply with JSON alone: {"sql": "..."}"""

TABLE_PARAPHRASE = """Say this question in other words, as a different person would ask it.

Question: {question}

Keep every name, number, unit and quoted term exactly as it is written. Keep what is asked for: \
the same figure, the same direction, the same rows. Do not answer it.

Reply with JSON alone: {"question": "..."}"""
