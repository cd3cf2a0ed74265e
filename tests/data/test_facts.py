"""Facts, their sentences and the editing problems made of them."""

import numpy as np
import pytest

from jaxlab.data import facts
from jaxlab.data.files import MissingFile

WORDINGS = {
  "capital": ("the capital of {} is", "{} is ruled from"),
  "side": ("in {} cars keep to the", "the side of {} is"),
}
TRIPLES = [
  ("Kenya", "capital", "Nairobi"),
  ("Sri Lanka", "capital", "Colombo"),
  ("Peru", "capital", "Lima"),
  ("Andorra", "capital", "Andorra la Vella"),
  ("Kenya", "side", "left"),
  ("Peru", "side", "right"),
  ("Sri Lanka", "side", "left"),
]


@pytest.fixture
def small():
  made = facts.from_triples(TRIPLES, WORDINGS)
  return made, facts.Sentences(made)


def spoken(sentences, batch, *index):
  tokens, mask = batch["tokens"][index], batch["mask"][index]
  return sentences.decode(np.where(mask, 0, tokens)), sentences.decode(np.where(mask, tokens, 0))


def test_sentences_read_as_written(small):
  made, sentences = small
  assert sentences.length == 7 + 3 and sentences.words[0] == "<pad>"
  batch = sentences.encode(made.triples, 0)
  read = [spoken(sentences, batch, i) for i in range(len(TRIPLES))]
  assert read == [(WORDINGS[r][0].format(s), answer) for s, r, answer in TRIPLES]
  place = batch["mask"].argmax(1)
  assert all(batch["tokens"][i, :p].all() for i, p in enumerate(place))  # no gap before the answer
  grid = sentences.encode(np.stack([made.triples] * 2), np.array([[0], [1]]))
  assert grid["tokens"].shape == (2, 7, 10)
  assert spoken(sentences, grid, 1, 1) == ("Sri Lanka is ruled from", "Colombo")


def test_parts_share_no_country(small):
  made, _ = small
  parts = facts.split_subjects(made, (0.5, 0.5), seed=3)
  first, second = (set(part[:, 0]) for part in parts)
  assert not first & second and len(first) == len(second) == 2
  assert sum(map(len, parts)) == 7
  assert not np.array_equal(parts[0], facts.split_subjects(made, (0.5, 0.5), seed=0)[0])


def test_edits_change_the_answer_and_nothing_else(small):
  made, sentences = small
  true = {(s, r): answer for s, r, answer in TRIPLES}
  objects = {"capital": {"Nairobi", "Colombo", "Lima", "Andorra la Vella"}, "side": {"left", "right"}}
  pairs = facts.edit_pairs(
    made, sentences, made.triples, problems=200, edits=2, locality=3, edit_wordings=(0, 1), paraphrase_wordings=(0, 1)
  )  # fmt: skip
  assert pairs["edit"]["tokens"].shape == (200, 2, 10) and pairs["locality"]["mask"].shape == (200, 3, 10)
  known = {(wording.format(s), s, r) for s, r, _ in TRIPLES for wording in WORDINGS[r]}
  facts_of = {prompt: (s, r) for prompt, s, r in known}
  drawn = set()
  for b in range(200):
    changed = set()
    for e in range(2):
      prompt, answer = spoken(sentences, pairs["edit"], b, e)
      other, again = spoken(sentences, pairs["paraphrase"], b, e)
      fact = facts_of[prompt]
      assert prompt != other and facts_of[other] == fact and answer == again
      assert answer != true[fact] and answer in objects[fact[1]]
      changed.add(fact)
      drawn.add((fact, answer))
    assert len(changed) == 2
    for k in range(3):
      prompt, answer = spoken(sentences, pairs["locality"], b, k)
      assert answer == true[facts_of[prompt]] and facts_of[prompt] not in changed
  assert len(drawn) == 4 * 3 + 3  # every other object occurs


def test_held_out_wordings_and_seeds(small):
  made, sentences = small
  make = lambda seed: facts.edit_pairs(
    made, sentences, made.triples, problems=50, locality=1, edit_wordings=(0,), paraphrase_wordings=(1,), seed=seed
  )
  first = make([1, 2])
  asked = {spoken(sentences, first["paraphrase"], b, 0)[0] for b in range(50)}
  assert asked == {WORDINGS[r][1].format(s) for s, r, _ in TRIPLES}
  np.testing.assert_array_equal(first["edit"]["tokens"], make([1, 2])["edit"]["tokens"])
  assert not np.array_equal(first["edit"]["tokens"], make([1, 3])["edit"]["tokens"])


def test_published_files():
  try:
    everything = facts.load()
  except MissingFile as error:
    pytest.skip(str(error))
  assert everything.triples.shape == (1687, 3) and len(everything.subjects) == 251
  table = {(everything.subjects[s], everything.relations[r]): everything.objects[o] for s, r, o in everything.triples}
  assert table["Kenya", "capital"] == "Nairobi" and table["Kenya", "calling_code"] == "254"
  assert table["Japan", "driving_side"] == "left" and ("Antarctica", "capital") not in table
  assert all(len(each) == facts.NUM_WORDINGS == len(set(each)) for each in everything.wordings)
  short = facts.load(("continent", "capital"), max_words=1)
  assert short.relations == ("continent", "capital")
  assert not any(" " in name for name in (*short.subjects, *short.objects))
  assert facts.Sentences(facts.load(max_words=2)).length <= 12


def test_bad_arguments_are_named(small, tmp_path):
  made, sentences = small
  make = lambda **changes: facts.edit_pairs(
    made,
    sentences,
    **{"triples": made.triples, "problems": 1, "locality": 2, "edit_wordings": (0,), "paraphrase_wordings": (1,)}
    | changes,
  )
  (tmp_path / "country-by-capital-city.json").write_text("[]")
  cases = {
    "relations": [lambda: facts.load(()), lambda: facts.load(("king",))],
    "max_words": [lambda: facts.load(max_words=0)],
    "directory": [lambda: facts.load(("currency",), tmp_path)],
    str(tmp_path): [lambda: facts.load(("capital",), tmp_path)],  # another file under the name
    "triples": [
      lambda: facts.from_triples([], WORDINGS),
      lambda: facts.from_triples([("Kenya", "king", "none")], WORDINGS),
      lambda: facts.from_triples([*TRIPLES, ("Peru", "side", "left")], WORDINGS),
      lambda: make(locality=7),
    ],
    "wordings": [
      lambda: facts.from_triples(TRIPLES, {**WORDINGS, "side": ("in {} it is",)}),
      lambda: facts.from_triples(TRIPLES, {**WORDINGS, "side": ("in {} it is", "what")}),
    ],
    "fractions": [
      lambda: facts.split_subjects(made, (0.6, 0.6), seed=0),
      lambda: facts.split_subjects(made, (), seed=0),
    ],
    "seed": [lambda: facts.split_subjects(made, (0.5,), seed=-1)],
    "problems": [lambda: make(problems=0)],
    "edits": [lambda: make(edits=0)],
    "locality": [lambda: make(locality=0)],
    "edit_wordings": [lambda: make(edit_wordings=()), lambda: make(edit_wordings=(2,))],
    "paraphrase_wordings": [lambda: make(paraphrase_wordings=(5,))],
  }
  for argument, calls in cases.items():
    for call in calls:
      with pytest.raises(ValueError) as error:
        call()
      assert str(error.value).startswith(f"{argument}: got ") or str(error.value).startswith(f"{argument}/")
  one_side = facts.from_triples([("Kenya", "side", "left"), ("Japan", "side", "left")], {"side": ("in {} the",)})
  with pytest.raises(ValueError, match="^facts: got one object"):
    facts.edit_pairs(
      one_side, facts.Sentences(one_side), one_side.triples, problems=1, locality=1, edit_wordings=(0,),
      paraphrase_wordings=(0,),
    )  # fmt: skip
