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

# --- extraction --------------------------------------------------------------

EXTRACT_TRIPLES = """List the facts that the text states about named things, as triples of \
subject, relation and object.

<text>
{text}
</text>

Rules:
1. Write subject and object exactly as the text writes them. The relation is a short phrase in \
lower case, such as "is the capital of".
2. For each triple give the quote that states it: the words of the text, copied without a change. \
Subject and object stand in the quote.
3. Take only what the text says. Leave out opinions and guesses. At most {most} triples, the most \
specific ones first.

Reply with JSON alone: {"triples": [{"subject": "...", "relation": "...", "object": "...", \
"quote": "..."}]}"""

EXTRACT_SCHEMA = """Several texts report the same kind of figures. Define one table that holds the \
figures of all of them.

{texts}

Rules:
1. One row stands for one thing that a text reports on; say what it is, in the singular and the \
plural.
2. The first column names that thing. Further columns hold the figures and properties that most of \
the texts give, at most {most}.
3. Types are "text", "integer" and "real". A column has one unit, or null.

Reply with JSON alone: {"entity": "...", "entities": "...", "columns": [{"label": "...", "type": \
"...", "unit": null}]}"""

EXTRACT_ROWS = """Fill a table from a text. One row stands for one {entity}.

Columns:
{columns}

<text>
{text}
</text>

Rules:
1. One row for each {entity} that the text reports on, in the order of the text.
2. Write numbers with digits, in the unit of the column, and null where the text gives no value. \
Never calculate or guess.
3. For each row give the quote that states its values: one passage of the text, copied without a \
change.

Reply with JSON alone: {"rows": [{"values": {"column label": "value"}, "quote": "..."}]}"""

# --- self-evolving questions -------------------------------------------------

TASK_TYPES = {
    "viewpoint": "viewpoint analysis: what a person, an institution or a text holds, how its "
    "position differs from another one or shifts, and on what it rests",
    "in_context_learning": "learning from the context: a rule, a format, a procedure or a term "
    "that the documents introduce must be understood and applied to a new case in the question",
    "causal": "causal analysis: why something happened or what followed from it, through at least "
    "one step in between",
    "hypothetical": "hypothetical reasoning: what would hold if one stated condition were "
    "different, as it follows from the documents",
}

PROPOSE = """You set a question on the documents below, for a reader who has all of them at \
hand. Kind of question: {kind}.

<documents>
{documents}
</documents>

{history}Rules:
1. The question needs passages from {needed}. Nobody can answer it without the documents.
2. It has one answer, short (at most {words} words), that the documents settle without doubt.
3. The question does not contain or hint at the answer, and makes sense on its own: no "the text \
above", no document numbers.
4. Quote the passages that the answer rests on, copied without a change, each with the number of \
its document.

Reply with JSON alone: {"question": "...", "answer": "...", "quotes": [{"document": 1, "text": \
"..."}]}"""

PROPOSE_HISTORY = """These questions on the same documents have been asked and solved; the share \
of right answers stands beside each:
{pairs}

Write one that is different from all of them and harder: more passages, more steps, or a less \
obvious connection. Difficulty wanted: level {level} of {levels}.

"""
