"""Facts about countries as short sentences, in five wordings each, and the edit and locality pairs made of them.

Triples (subject, relation, object) such as (Kenya, capital, Nairobi) come from `samayo/country-json` (MIT). A sentence
is a wording of the relation with the subject in it, the prompt, followed by the object, the answer: "the capital of
Kenya is | Nairobi". Every word is a token; 0 pads at the end. Host code, NumPy out.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxlab import checks
from jaxlab.data import files

PAD = 0

_URL = "https://raw.githubusercontent.com/samayo/country-json/master/src"
# Relation -> file, key of the object, checksum, wordings. A wording has the subject once, and the answer follows it.
_RELATIONS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
  "capital": (
    "country-by-capital-city.json",
    "city",
    "448e7c9be3b58ee5b85bea786e3688c13cb82298f072dcfc1e7bf5d83724ce52",
    (
      "the capital of {} is",
      "{} has its capital in",
      "the government of {} sits in",
      "which capital has {} ? it is",
      "in {} the capital is called",
    ),
  ),
  "currency": (
    "country-by-currency-name.json",
    "currency_name",
    "09d939d97be80086eb8384741ad747e12c4da128e527ad445129922af610939d",
    (
      "the currency of {} is",
      "{} has as its currency the",
      "people in {} pay with the",
      "which currency has {} ? it is",
      "in {} prices are given in",
    ),
  ),
  "continent": (
    "country-by-continent.json",
    "continent",
    "ad4bb67626dd2f86cf957038ab7ed823c8a662c9927d19a0ad1b9488b325144b",
    (
      "the continent of {} is",
      "{} lies on the continent",
      "maps of {} are maps of",
      "which continent has {} ? it is",
      "in {} people live in",
    ),
  ),
  "region": (
    "country-by-region-in-world.json",
    "location",
    "2f230154fd26b4e9ed0f526f6bd66ef577c49b6f52e823db87bb525673eb9626",
    (
      "the region of {} is",
      "{} belongs to the region",
      "the neighbours of {} are in",
      "which region is {} in ? it is",
      "in {} you are in the region",
    ),
  ),
  "calling_code": (
    "country-by-calling-code.json",
    "calling_code",
    "eb704821c3981fa1edd1dfe544e72ca71f8d4e820cecf2795d4b9980f2ba5f82",
    (
      "the calling code of {} is",
      "{} has the calling code",
      "to phone {} dial",
      "which calling code has {} ? it is",
      "in {} phone numbers start with",
    ),
  ),
  "domain": (
    "country-by-domain-tld.json",
    "tld",
    "362a9482572f9605c44e6afec0e93db2c27ccab57f09c5b09057a1bb3ddf036a",
    (
      "the internet domain of {} is",
      "{} has the internet domain",
      "addresses of {} end in",
      "which internet domain has {} ? it is",
      "in {} websites end in",
    ),
  ),
  "driving_side": (
    "country-by-driving-side.json",
    "side",
    "8c484ca8a7713fbffc9aa8e36fbabff8bbd25826573107c5c4d9262e0e8e9da0",
    (
      "the driving side of {} is",
      "{} has its traffic on the",
      "cars of {} keep to the",
      "which driving side has {} ? it is",
      "in {} you drive on the",
    ),
  ),
}
RELATIONS = tuple(_RELATIONS)
NUM_WORDINGS = 5


class Facts(NamedTuple):
  """Triples as indices.

  Attributes:
    subjects: names, sorted.
    relations: names.
    objects: names, sorted.
    triples: [F, 3] int32: subject, relation, object; no subject has two objects of one relation.
    wordings: of each relation, with `{}` in the subject's place.
  """

  subjects: tuple[str, ...]
  relations: tuple[str, ...]
  objects: tuple[str, ...]
  triples: Int[np.ndarray, "f 3"]
  wordings: tuple[tuple[str, ...], ...]


def load(
  relations: Sequence[str] = RELATIONS,
  directory: str | os.PathLike[str] | None = None,
  *,
  max_words: int | None = None,
) -> Facts:
  """Host. The countries' facts.

  Args:
    relations: among `RELATIONS`; their order is kept.
    directory: folder with the files `country-by-*.json`. Default: `JAXLAB_DATA/facts`, else a download.
    max_words: leave out countries and objects with longer names, for short sentences; None for all.

  Raises:
    ValueError: unknown or no relation, missing (`files.MissingFile`) or damaged file.
  """
  if not relations:
    raise ValueError(f"relations: got none, expected names among {list(RELATIONS)}")
  if max_words is not None:
    checks.count("max_words", max_words)
  short = lambda name: max_words is None or len(name.split()) <= max_words
  found: dict[str, dict[str, str]] = {}
  for relation in relations:
    name, key, sha256, _ = _RELATIONS[checks.choice("relations", relation, RELATIONS)]
    path = files.fetch("facts", name, url=f"{_URL}/{name}", sha256=sha256, directory=directory)
    rows = files.parse(path, lambda p: json.loads(p.read_text()), "a JSON list")
    found[relation] = {row["country"]: str(row[key]) for row in rows if row[key] not in (None, "")}
  return from_triples(
    [
      (subject, relation, answer)
      for relation, table in found.items()
      for subject, answer in table.items()
      if short(subject) and short(answer)
    ],
    {relation: _RELATIONS[relation][3] for relation in relations},
  )


def from_triples(triples: Sequence[tuple[str, str, str]], wordings: Mapping[str, Sequence[str]]) -> Facts:
  """Host. Facts of any kind.

  Args:
    triples: (subject, relation, object), words separated by spaces.
    wordings: relation -> ways to say it, as many for each, with `{}` for the subject.

  Raises:
    ValueError: no triple, a relation without wordings, a wording without `{}`, numbers of wordings that differ, two
      objects for one subject and relation.
  """
  if not triples:
    raise ValueError("triples: got none, expected at least one")
  if len({len(each) for each in wordings.values()}) != 1:
    raise ValueError(f"wordings: got {[len(each) for each in wordings.values()]}, expected as many for each relation")
  for wording in (w for each in wordings.values() for w in each):
    if wording.split().count("{}") != 1:
      raise ValueError(f"wordings: got {wording!r}, expected the word {{}} once")
  relations = tuple(wordings)
  if unknown := {relation for _, relation, _ in triples} - set(relations):
    raise ValueError(f"triples: got relations {sorted(unknown)}, expected those with wordings, {list(relations)}")
  if len({(subject, relation) for subject, relation, _ in triples}) != len(triples):
    raise ValueError("triples: got two objects for a subject and a relation, expected one")
  subjects = tuple(sorted({subject for subject, _, _ in triples}))
  objects = tuple(sorted({answer for _, _, answer in triples}))
  places = [{name: i for i, name in enumerate(names)} for names in (subjects, relations, objects)]
  rows = [[place[name] for place, name in zip(places, triple, strict=True)] for triple in triples]
  return Facts(subjects, relations, objects, np.array(rows, np.int32), tuple(tuple(w) for w in wordings.values()))


class Sentences:
  """Host. Turns triples into padded token ids.

  Attributes:
    words: word of each token id; word 0 is padding.
    length: N of every sentence.
  """

  def __init__(self, facts: Facts):
    """Args: facts, whose words become the vocabulary."""
    prompts = [[wording.split() for wording in each] for each in facts.wordings]
    answers = [answer.split() for answer in facts.objects]
    names = [subject.split() for subject in facts.subjects]
    vocabulary = {word for each in facts.wordings for wording in each for word in wording.split() if word != "{}"}
    vocabulary |= {word for words in (*answers, *names) for word in words}
    self.words = ("<pad>", *sorted(vocabulary))
    ids = {word: i for i, word in enumerate(self.words)}
    filled = [[[_fill(wording, name) for wording in each] for each in prompts] for name in names]  # [S][R][P] -> words
    longest_answer = max(map(len, answers))
    self.length = longest_answer + max(len(words) for each in filled for row in each for words in row)
    self._prompts = np.array(
      [[[_padded(words, ids, self.length) for words in row] for row in each] for each in filled], np.int32
    )
    self._prompt_lengths = np.sum(self._prompts != PAD, axis=-1)
    self._answers = np.array([_padded(words, ids, longest_answer) for words in answers], np.int32)

  def encode(
    self, triples: Int[np.ndarray, "*b 3"], wordings: Int[np.ndarray, "*b"] | int
  ) -> dict[str, Int[np.ndarray, "*b n"] | Bool[np.ndarray, "*b n"]]:
    """Sentences of triples.

    Args:
      triples: subject, relation and object; they need not be true.
      wordings: which wording of the relation.

    Returns:
      `tokens` [..., N] int32, `mask` [..., N] bool, True at the answer's words.
    """
    subject, relation, answer = np.moveaxis(np.asarray(triples), -1, 0)
    wordings = np.broadcast_to(wordings, subject.shape)
    tokens = self._prompts[subject, relation, wordings]
    words = self._answers[answer]
    # Answer word j stands at prompt length + j.
    place = np.arange(self.length) - self._prompt_lengths[subject, relation, wordings][..., None]
    inside = (place >= 0) & (place < words.shape[-1])
    spread = np.take_along_axis(words, np.where(inside, place, 0), axis=-1)
    return {"tokens": np.where(inside, spread, tokens), "mask": inside & (spread != PAD)}

  def decode(self, tokens: Int[np.ndarray, " n"]) -> str:
    """The words of one sentence."""
    return " ".join(self.words[token] for token in tokens if token != PAD)


def split_subjects(facts: Facts, fractions: Sequence[float], *, seed: int) -> tuple[Int[np.ndarray, "f 3"], ...]:
  """Host. The triples of disjoint groups of subjects, so that all facts of a country are in one part.

  Args:
    facts: all.
    fractions: of the subjects in each part; their sum is at most 1.
    seed: of the split.

  Raises:
    ValueError: fractions outside [0, 1] or with a larger sum.
  """
  for fraction in fractions:
    checks.real("fractions", fraction)
  if not fractions or sum(fractions) > 1 + 1e-9:
    raise ValueError(f"fractions: got {list(fractions)}, expected at least one, and a sum of at most 1")
  order = np.random.default_rng(checks.count("seed", seed, 0)).permutation(len(facts.subjects))
  ends = np.rint(np.cumsum([0, *fractions]) * len(order)).astype(int)
  return tuple(
    facts.triples[np.isin(facts.triples[:, 0], order[low:high])] for low, high in zip(ends, ends[1:], strict=False)
  )


def edit_pairs(
  facts: Facts,
  sentences: Sentences,
  triples: Int[np.ndarray, "f 3"],
  *,
  problems: int,
  edits: int = 1,
  locality: int = 8,
  edit_wordings: Sequence[int] = (0, 1, 2),
  paraphrase_wordings: Sequence[int] = (0, 1, 2),
  seed: int | Sequence[int] = 0,
) -> dict[str, Any]:
  """Host. Editing problems: facts to change, the changed facts in other words, and facts that must stay.

  An edit is a fact of `triples` whose object is drawn anew, evenly among the other objects that its relation has in
  `facts`. Locality facts are facts of `triples` besides the problem's edits, of any subject.

  Args:
    facts: all.
    sentences: of these facts.
    triples: facts to draw from, such as those of some subjects.
    problems: B.
    edits: E of each problem, of different facts.
    locality: M of each problem.
    edit_wordings: wordings an edit is given in.
    paraphrase_wordings: wordings it is asked for in, where there is a choice another than the edit's.
    seed: of all that is drawn.

  Returns:
    `edit` and `paraphrase`, each of `tokens` [B, E, N] int32 and `mask` [B, E, N] bool; `locality` likewise [B, M, N].

  Raises:
    ValueError: counts below 1, fewer facts than a problem takes, a relation with one object, wordings that there are
      not.
  """
  checks.count("problems", problems)
  checks.count("edits", edits)
  checks.count("locality", locality)
  if edits + locality > len(triples):
    raise ValueError(f"triples: got {len(triples)}, expected at least edits + locality, {edits + locality}")
  for name, chosen in (("edit_wordings", edit_wordings), ("paraphrase_wordings", paraphrase_wordings)):
    if not chosen:
      raise ValueError(f"{name}: got none, expected at least one")
    for wording in chosen:
      checks.count(name, wording, 0, len(facts.wordings[0]) - 1)
  rng = np.random.default_rng(seed)
  objects = [np.unique(facts.triples[facts.triples[:, 1] == r, 2]) for r in range(len(facts.relations))]
  for r in np.unique(triples[:, 1]):
    if len(objects[r]) < 2:
      raise ValueError(f"facts: got one object of {facts.relations[r]!r}, expected at least two to choose from")
  # The first E + M of a random order of all facts, for each problem.
  keys = rng.random((problems, len(triples)))
  order = np.argpartition(keys, edits + locality - 1, axis=1)[:, : edits + locality]
  order = rng.permuted(order, axis=1)
  edited, kept = triples[order[:, :edits]].copy(), triples[order[:, edits:]]
  for r, choices in enumerate(objects):
    of = edited[..., 1] == r
    # The rank of the old object plus 1 to K - 1, around: any but the old.
    shift = rng.integers(1, len(choices), of.sum()) if of.any() else np.zeros(0, int)
    edited[of, 2] = choices[(np.searchsorted(choices, edited[of, 2]) + shift) % len(choices)]
  given = rng.choice(np.asarray(edit_wordings), (problems, edits))
  asked = rng.choice(np.asarray(paraphrase_wordings), (problems, edits))
  for wording in set(edit_wordings) & set(paraphrase_wordings):
    others = [w for w in paraphrase_wordings if w != wording]
    same = (given == wording) & (asked == wording)
    if others:
      asked[same] = rng.choice(others, same.sum())
  everything = sorted({*edit_wordings, *paraphrase_wordings})
  return {
    "edit": sentences.encode(edited, given),
    "paraphrase": sentences.encode(edited, asked),
    "locality": sentences.encode(kept, rng.choice(everything, kept.shape[:2])),
  }


def _fill(wording: Sequence[str], subject: Sequence[str]) -> list[str]:
  return [word for part in wording for word in (subject if part == "{}" else [part])]


def _padded(words: Sequence[str], ids: Mapping[str, int], length: int) -> list[int]:
  return [ids[word] for word in words] + [PAD] * (length - len(words))
